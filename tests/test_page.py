"""search.py serve: what the page answers, in a real browser too, and what it refuses."""

import mimetypes
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch
import trees
from helpers import RECORD, fails, make_index, threshold
from pages import REPOSITORY
from PIL import Image, ImageDraw

import net
import search
from dataset.files import extensions, read_thumbnail
from proxy_anchor import checkpoint
from proxy_anchor.api import Search
from proxy_anchor.index import page

pytest.importorskip("faiss")
LIMIT = 0.998
# The page in a process of its own, which knows the network "tiny" and writes down whom it connects to.
SERVER = """
import sys
connections = open(sys.argv.pop(1), "a")
def write(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.bind"):
        host = arguments[1] if event in ("socket.connect", "socket.bind") else arguments
        print(event, host[0] if isinstance(host, tuple) else host, file=connections, flush=True)
sys.addaudithook(write)
import helpers, search
search.main(sys.argv[1:])
"""


def unknown(path):
    """An image that is like none of trees.folder's."""
    image = Image.new("RGB", (40, 32), "black")
    ImageDraw.Draw(image).rectangle((10, 6, 30, 20), fill="white")
    image.save(path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With an index of images, one of folders, and photographs to ask for."""
    folder = tmp_path_factory.mktemp("page")
    trees.save_checkpoint(folder / "a.pth", net.create("tiny", 8), RECORD)
    checkpoint.save_calibration(folder / "a.pth", threshold(LIMIT), checkpoint.Checkpoint(folder / "a.pth").identity)
    trees.folder(folder / "images", classes=("ant", "<b>ee", "cat"))
    make_index(folder, folder / "images", folder / "photos.index")
    make_index(folder, folder / "images", folder / "things.index", "--by-folder")
    (folder / "broken.jpg").write_text("no image")
    unknown(folder / "unknown.png")
    return folder


@pytest.fixture
def copies(folder, tmp_path):
    """copies(names): copies of files in the folder, as they are uploaded."""
    return lambda *names: [str(shutil.copy(folder / name, tmp_path)) for name in names]


def answers_of(index, count=10, **settings):
    opened = Search(index, **settings)
    return page.Answers(opened, lambda path, size: read_thumbnail(search.first_image(path), size), count)


def headings(text):
    return re.findall("<h3>(.*?)</h3>", text)


def test_answers_are_those_of_query(folder, copies):
    answers = answers_of(folder / "photos.index")
    files = copies("images/cat/3.jpg", "unknown.png", "broken.jpg")
    queries, text = answers.ask(files, answers.start)
    assert headings(text) == ["cat", "no match", "broken.jpg"]
    expected = answers.search.query(folder / "images/cat/3.jpg")
    assert queries[0].nearest == expected.nearest and queries[0].nearest[0][1] == pytest.approx(1)
    near = len(expected.matches)
    assert (
        f"{expected.verdict('similarity', LIMIT)[1]}; the threshold is {LIMIT}" in text and "similarity 1.0000" in text
    )
    refused = answers.search.query(folder / "unknown.png")
    assert f"the best similarity is {refused.nearest[0][1]:.4f}, the threshold {LIMIT}" in text
    assert "The image broken.jpg cannot be read: it is damaged" in text and str(files[2]) not in text
    assert text.count('<figure class="far"') == 20 - near


def test_slider_begins_at_the_threshold_and_its_loose_end_refuses_nothing(folder, copies):
    answers = answers_of(folder / "photos.index")
    answers.search.threshold = LIMIT + 1e-6
    answers = page.Answers(answers.search, answers.thumbnail, 10)
    assert answers.limit(answers.start) == answers.limit(None) == LIMIT + 1e-6
    assert (answers.loosest, answers.strictest) == (0, 1)
    queries, _ = answers.ask(copies("unknown.png"), answers.start)
    best = queries[0].nearest[0][1]
    for value, heading in ((best - 1e-4, False), (best + 1e-4, True), (0, False)):
        assert (headings(answers.decide(queries, value)) == ["no match"]) == heading
    assert "threshold" not in answers.decide(queries, 0)
    assert "5% of unknown queries" in answers.remark()


def test_distances(tmp_path):
    network = net.create("tiny", 8, l2_norm=False)
    trees.save_checkpoint(tmp_path / "a.pth", network, RECORD | {"l2_norm": 0, "distance": "euclidean"})
    images = trees.folder(tmp_path / "images", classes=("ant", "bee"))
    make_index(tmp_path, images, tmp_path / "index")
    answers = answers_of(tmp_path / "index")
    vectors = torch.from_numpy(answers.search.index.images.vectors.copy())
    assert torch.pdist(vectors).max() <= answers.loosest == answers.start and answers.strictest == 0
    queries, text = answers.ask([str(shutil.copy(images / "bee" / "2.jpg", tmp_path))], answers.start)
    assert headings(text) == ["bee"] and "distance 0.0000" in text and "far" not in text
    second = queries[0].nearest[1][1]
    assert answers.decide(queries, second / 2).count('"far"') == 9


def test_index_of_folders(folder, copies):
    answers = answers_of(folder / "things.index")
    _, text = answers.ask(copies("images/cat/3.jpg"), answers.start)
    assert len(headings(text)) == 1 and "far" not in text and answers.start == answers.loosest
    assert text.count("data:image/jpeg") == 1 + len(answers.search.index.images) and "missing" not in text
    assert "no calibrated threshold for single photographs among folders" in answers.remark()


def test_index_without_a_threshold(folder, tmp_path):
    trees.save_checkpoint(tmp_path / "a.pth", net.create("tiny", 8), RECORD)
    make_index(tmp_path, folder / "images", tmp_path / "index")
    answers = answers_of(tmp_path / "index")
    assert "--calibrate" in answers.remark() and answers.limit(answers.start) is None


def test_images_of_no_folder_are_named_themselves(folder, copies, tmp_path):
    shutil.copytree(folder / "images" / "cat", tmp_path / "photos", ignore=shutil.ignore_patterns("more"))
    make_index(folder, tmp_path / "photos", tmp_path / "index")
    answers = answers_of(tmp_path / "index")
    _, text = answers.ask(copies("images/cat/3.jpg"), 0)
    assert headings(text) == ["3.jpg"] and "<figcaption>1.0000 3.jpg</figcaption>" in text


def test_names_are_text_and_files_that_are_gone_are_named(folder, copies, tmp_path):
    shutil.copytree(folder / "images", tmp_path / "images")
    make_index(folder, tmp_path / "images", tmp_path / "index")
    shutil.rmtree(tmp_path / "images" / "ant")
    answers = answers_of(tmp_path / "index", count=100)
    (name,) = copies("broken.jpg")
    shutil.move(name, name := str(tmp_path / "<img src=x>.jpg"))
    _, text = answers.ask([name, *copies("images/cat/1.jpg")], 0)
    assert "&lt;b&gt;ee" in text and "&lt;img src=x&gt;.jpg" in text
    assert "<b>" not in text and "<img src=x" not in text
    assert text.count('<div class="missing">missing or damaged</div>') == 6


def test_batches_and_pixels_are_limited(folder, copies, tmp_path, monkeypatch):
    answers = answers_of(folder / "photos.index")
    many = [str(shutil.copy(folder / "unknown.png", tmp_path / f"{i}.png")) for i in range(page.MOST + 2)]
    _, text = answers.ask(many, 0)
    assert text.count("unreadable") == 2 and "33.png is one too many: drop 32 photographs at a time" in text
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    _, text = answers.ask(copies("unknown.png"), 0)
    assert "it has more than the allowed 1,000 pixels; make it smaller" in text


def test_remark_on_the_weights_of_a_backbone_is_that_of_query(folder, tmp_path, monkeypatch, capsys):
    flags = ["--backbone-only", "--model", "tiny", "--pretrained", str(folder / "a.pth"), "--image-size", "32"]
    more = ["--images", str(folder / "images"), "--out", str(tmp_path / "index"), "--workers", "0"]
    search.main(["index", *flags, *more])
    capsys.readouterr()
    search.main(["query", "--index", str(tmp_path / "index"), str(folder / "unknown.png"), "--threshold", "none"])
    remark = capsys.readouterr().err
    monkeypatch.setattr(page, "gradio", lambda: None)
    monkeypatch.setattr(page, "serve", lambda *_: None)
    search.main(["serve", "--index", str(tmp_path / "index")])
    assert capsys.readouterr().err == remark and "left out: embedding (2)" in remark


def test_gradio_is_named_where_it_is_missing(folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    fails(lambda: search.main(["serve", "--index", str(folder / "photos.index")]), capsys, "pip install 'gradio>=")


def test_port_that_is_taken(folder, capsys):
    pytest.importorskip("gradio")
    with socket.create_server(("127.0.0.1", 0)) as other:
        flags = ["--index", str(folder / "photos.index"), "--port", str(other.getsockname()[1])]
        fails(lambda: search.main(["serve", *flags]), capsys, "(Address already in use): choose another --port")


# What the page refuses


@pytest.fixture
def client(folder, tmp_path, monkeypatch):
    """Requests to the page, as from a page on this machine."""
    pytest.importorskip("gradio")
    from starlette.testclient import TestClient

    monkeypatch.setenv("GRADIO_TEMP_DIR", "")  # restored in the end
    monkeypatch.setattr(page, "LARGEST", "2kb")
    (tmp_path / "uploads").mkdir()
    application = page.application(answers_of(folder / "photos.index"), "photos", [], str(tmp_path / "uploads"))
    return TestClient(application, "http://127.0.0.1:7860")


def upload(client, content=b"1", **headers):
    return client.post("/gradio_api/upload", files={"files": ("a.png", content)}, headers=headers)


def ask(client, *files, session="a", **headers):
    described = [{"path": file, "meta": {"_type": "gradio.FileData"}} for file in files]
    question = {"data": [described, 0.5], "fn_index": 0, "session_hash": session, "trigger_id": None}
    return client.post("/gradio_api/queue/join", json=question, headers=headers)


def test_no_file_is_served_by_its_path_and_no_other_part_of_gradio(folder, client):
    (file,) = upload(client, (folder / "unknown.png").read_bytes()).json()
    assert os.path.exists(file) and client.get("/").status_code == 200
    for path in ("/etc/passwd", folder / "images/cat/3.jpg", file, "http://127.0.0.1:7860/", folder / "unknown.png"):
        for start in ("/gradio_api/file=", "/gradio_api/file/", "/gradio_api/proxy=", "/file=", "/static/../file="):
            assert client.get(f"{start}{path}").status_code == 403
    for path in (
        "static/..%2f..%2f..%2f..%2f..%2f..%2fetc/passwd",
        "assets//etc/passwd",
        "static/%2e%2e/%2e%2e/routes.py",
    ):
        assert client.get(f"/{path}").status_code in (403, 404)
    for path in ("info", "openapi.json", "startup-events", "call/ask", "run/ask", "vibe-code", "runs"):
        assert client.get(f"/gradio_api/{path}").status_code == client.post(f"/gradio_api/{path}").status_code == 403
    for path in ("docs", "openapi.json", "monitoring", "config", "login", "gradio_api/deep_link"):
        assert client.get(f"/{path}").status_code == 403


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "http://example.com"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:8000"},
        {"Origin": "https://127.0.0.1:7860"},
        {"Origin": "http://127.0.0.1.example.com:7860"},
        {"Host": "example.com:7860", "Origin": "http://example.com:7860"},
        {"Host": "127.0.0.1.example.com:7860"},
        {"Host": ""},
    ],
)
def test_other_pages_cannot_ask(client, tmp_path, headers):
    """Neither with their own address nor, by DNS, with the address of this machine under their name."""
    for response in (client.get("/", headers=headers), upload(client, **headers), ask(client, **headers)):
        assert response.status_code == 403
    assert not any((tmp_path / "uploads").iterdir())


def test_pages_of_this_machine_can_ask(client):
    for host in ("127.0.0.1:7860", "localhost:7860", "localhost"):
        headers = {"Host": host, "Origin": f"http://{host}"}
        (file,) = upload(client, **headers).json()
        assert ask(client, file, **headers).status_code == 200


def test_questions_name_only_uploads(folder, client, tmp_path):
    (file,) = upload(client).json()
    (tmp_path / "uploads" / "link").symlink_to("/etc")
    outside = [
        "/etc/passwd",
        str(folder / "images/cat/3.jpg"),
        "http://example.com/a.png",
        f"{tmp_path}/uploads/../a.png",
        f"{tmp_path}/uploads/link/passwd",
        "a.png",
        ["/etc/passwd"],
        {"path": "/etc/passwd"},
    ]
    assert ask(client, file).status_code == 200
    for path in outside:
        assert ask(client, file, path).status_code == 403
        assert "were dropped on the page" in ask(client, path).text
    for body in (b"", b"{", b"[" * 10**5):
        assert client.post("/gradio_api/queue/join", content=body).status_code == 403


def test_questions_that_are_too_long_are_refused_in_words(client):
    response = ask(client, *upload(client).json(), session="a" * page.LONGEST)
    assert response.status_code == 413 and "drop 32 photographs at a time" in response.text


def test_uploads_are_limited(client, tmp_path):
    assert upload(client, b"1" * 1000).status_code == 200
    response = upload(client, b"1" * 3000)
    assert response.status_code == 413 and "maximum allowed size" in response.text
    assert [file.stat().st_size for file in (tmp_path / "uploads").rglob("*") if file.is_file()] == [1000]


def test_uploads_are_deleted(client, tmp_path):
    """Those that were asked about with their folders, and those of some age that nobody has asked about."""
    uploads = tmp_path / "uploads"
    asked, twice, new, old = [upload(client, content).json()[0] for content in (b"1", b"1", b"2", b"3")]
    (uploads / "interrupted").write_text("")
    for path in (uploads / "interrupted", os.path.dirname(old)):
        os.utime(path, 2 * (time.time() - page.WAITING - 1,))
    page.delete_uploads([asked, twice], str(uploads))
    assert [str(path) for path in uploads.rglob("*")] == [os.path.dirname(new), new]
    page.delete_uploads([new], str(uploads))
    assert not any(uploads.iterdir())


def test_policy_keeps_the_browser_from_other_addresses(client):
    policy = dict(rule.split(" ", 1) for rule in client.get("/").headers["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == "'self'" and policy["frame-ancestors"] == "'none'"
    assert not re.search(r"\*|https?:", " ".join(policy.values()))


# In a browser


@pytest.fixture(scope="module")
def server(folder):
    """The address of the page, and the process that serves it; its end is tested too."""
    pytest.importorskip("gradio")
    (folder / "temporary").mkdir()
    paths = f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'tests'}"
    environment = os.environ | {"PYTHONPATH": paths, "TMPDIR": str(folder / "temporary")}
    arguments = ["serve", "--index", str(folder / "photos.index"), "--port", "0"]
    command = [sys.executable, "-c", SERVER, str(folder / "connections"), *arguments]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        line = process.stdout.readline()
        try:
            yield re.search(r"http://127\.0\.0\.1:\d+", line)[0], process
        finally:
            process.send_signal(signal.SIGINT)
            output, errors = process.communicate(timeout=60)
    assert (output, errors, process.returncode) == ("", "search.py: interrupted\n", 130)
    assert not any((folder / "temporary").glob("search-*"))


@pytest.fixture
def tab(server, browser):
    """A new tab with the page, as wide as a phone; what it requests and complains about is checked in the end."""
    url, _ = server
    context = browser.new_context(
        viewport={"width": 390, "height": 844}, permissions=["clipboard-read", "clipboard-write"]
    )
    tab = context.new_page()
    requests, errors = [], []
    tab.on("request", lambda request: requests.append(request.url))
    tab.on("console", lambda message: errors.append(message.text) if "Policy" in message.text else None)
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.on("response", lambda response: errors.append(response.url) if response.status == 403 else None)
    tab.goto(url)
    tab.wait_for_selector("#photographs input[type=file]", state="attached")
    yield tab
    context.close()
    assert len(requests) > 10 and not errors
    assert [request for request in requests if not request.startswith((url + "/", "data:", f"blob:{url}/"))] == []


def drop(tab, *files):
    """Drop files on the field; browsers do not know the type of HEIC."""
    contents = [[file.name, mimetypes.guess_type(file)[0] or "", list(file.read_bytes())] for file in files]
    transfer = tab.evaluate_handle(
        "files => { const transfer = new DataTransfer(); for (const [name, type, bytes] of files)"
        " transfer.items.add(new File([new Uint8Array(bytes)], name, {type})); return transfer }",
        contents,
    )
    tab.dispatch_event("#photographs button", "drop", {"dataTransfer": transfer})


def shown(tab, count=1):
    """The headings of the answers, once there are so many, in which every picture can be seen."""
    tab.wait_for_function(f"document.querySelectorAll('.answer').length == {count}", timeout=20_000)
    assert tab.evaluate("Array.from(document.querySelectorAll('.answer img'), i => i.naturalWidth > 0).every(Boolean)")
    return tab.locator(".answer h3").all_inner_texts()


@pytest.mark.slow
def test_browser_drops_pastes_and_chooses(folder, tab):
    drop(tab, folder / "images/cat/3.jpg")
    assert shown(tab) == ["cat"] and "similarity 1.0000" in tab.locator(".answer p").inner_text()
    assert tab.locator(".nearest figure").count() == 10
    tab.set_input_files("#photographs input[type=file]", [folder / "images/ant/2.jpg", folder / "unknown.png"])
    assert shown(tab, 2) == ["ant", "no match"]
    tab.evaluate(
        "bytes => navigator.clipboard.write([new ClipboardItem({'image/png': new Blob([new Uint8Array(bytes)],"
        " {type: 'image/png'})})])",
        list((folder / "unknown.png").read_bytes()),
    )
    tab.keyboard.press("Control+V")
    assert shown(tab) == ["no match"]
    assert tab.locator("#photographs input[type=file]").get_attribute("accept").startswith("image/*")  # or camera


@pytest.mark.slow
def test_browser_shows_what_is_refused_and_moves_the_threshold(folder, tab):
    drop(tab, folder / "unknown.png")
    assert shown(tab) == ["no match"] and f"the threshold {LIMIT}" in tab.locator(".answer p").inner_text()
    value = tab.locator("#threshold input[type=number]")
    assert value.input_value() == str(LIMIT)
    value.fill("0")
    tab.wait_for_selector(".known")
    assert shown(tab) != ["no match"]
    value.fill("1")
    tab.wait_for_selector(".unknown")
    assert shown(tab) == ["no match"]


@pytest.mark.slow
def test_browser_shows_that_a_pdf_is_no_photograph_and_answers_the_next_one(folder, tab):
    (folder / "a.pdf").write_bytes(b"%PDF-1.4 no photograph")
    drop(tab, folder / "a.pdf")
    assert shown(tab) == ["a.pdf"]
    assert "The image a.pdf cannot be read: it is damaged, or none of" in tab.locator(".unreadable p").inner_text()
    drop(tab, folder / "images/cat/3.jpg")
    tab.wait_for_selector(".known")
    assert shown(tab) == ["cat"]


@pytest.mark.slow
def test_browser_takes_any_content_of_the_number_field(folder, tab):
    """An empty field is the threshold of the start, and a number beyond the slider's ends decides too."""
    assert tab.locator("#threshold").inner_text().startswith("Threshold: smallest similarity that counts as a match")
    drop(tab, folder / "unknown.png")
    assert shown(tab) == ["no match"]
    value = tab.locator("#threshold input[type=number]")
    value.fill("0")
    tab.wait_for_selector(".known")
    value.fill("")
    tab.wait_for_selector(".unknown")
    drop(tab, folder / "images/cat/3.jpg")
    tab.wait_for_selector(".known")
    assert shown(tab) == ["cat"] and f"the threshold is {LIMIT}" in tab.locator(".answer p").inner_text()
    value.fill("5")
    tab.wait_for_selector(".unknown")
    assert shown(tab) == ["no match"]


@pytest.mark.slow
def test_browser_shows_heic_and_broken_files(folder, tab):
    files = [folder / "broken.jpg", folder / "unknown.png"]
    if ".heic" in extensions():
        image = Image.open(folder / "images/cat/4.jpg").resize((400, 320), Image.Resampling.NEAREST)
        image.save(folder / "photo.heic", quality=-1)
        files.append(folder / "photo.heic")
    drop(tab, *files)
    assert shown(tab, len(files)) == ["broken.jpg", "no match", "cat"][: len(files)]
    assert "The image broken.jpg cannot be read: it is damaged" in tab.locator(".unreadable p").inner_text()


@pytest.mark.slow
def test_browser_shows_all_of_it_on_a_phone(folder, tab):
    drop(tab, folder / "images/cat/3.jpg", folder / "broken.jpg")
    shown(tab, 2)
    parts = "Array.from(document.querySelectorAll('#heading *, #threshold, .answer, .answer *')"
    for left, right in tab.evaluate(f"{parts}, e => e.getBoundingClientRect()).map(box => [box.left, box.right])"):
        assert 0 <= left <= right <= 390
    assert tab.evaluate("document.documentElement.scrollWidth") == 390
    sizes = tab.evaluate("Array.from(document.querySelectorAll('.answer img'), i => i.getBoundingClientRect().width)")
    assert min(sizes) >= 80


@pytest.mark.slow
def test_process_listens_here_and_asks_nobody(folder, tab):
    """It has served the pages of the tests above, and answers one more photograph."""
    drop(tab, folder / "unknown.png")
    shown(tab)
    events = [line.split(maxsplit=1) for line in (folder / "connections").read_text().splitlines()]
    assert {host for event, host in events if event != "socket.bind"} <= {"127.0.0.1", "localhost", "None"}
    assert {host for event, host in events if event == "socket.bind"} == {"127.0.0.1"}
    (uploads,) = (folder / "temporary").glob("search-*")
    assert not any(uploads.iterdir())


@pytest.mark.slow
def test_picture_of_the_page(folder, browser, tmp_path):
    pytest.importorskip("gradio")
    flags = ["--backbone-only", "--model", "resnet18", "--pretrained", "none", "--image-size", "32", "--workers", "0"]
    search.main(["index", *flags, "--images", str(folder / "images"), "--out", str(tmp_path / "index")])
    files = [tmp_path / "index", folder / "unknown.png", folder / "broken.jpg", tmp_path / "page.jpg"]
    subprocess.run([sys.executable, REPOSITORY / "misc" / "page_picture.py", *files], check=True, timeout=120)
    with Image.open(tmp_path / "page.jpg") as image:
        assert image.width == 900 and image.height > 600
    result = subprocess.run([sys.executable, REPOSITORY / "misc" / "page_picture.py"], capture_output=True, text=True)
    assert result.returncode == 2 and "the following arguments are required: index, photographs" in result.stderr
