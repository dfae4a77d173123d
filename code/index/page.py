"""The page of `search.py serve`: drop photographs, see which things of an index they show. Gradio draws and serves it.

Only this machine can open it. No file is served by its path, and nothing is requested from outside.
"""

import html
import json
import logging
import os
import re
import shutil
import signal
import socket
import time
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from string import Template
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from proxy_anchor.files import BadFile, printable
from proxy_anchor.report.thumbnails import Thumbnail, data_uri, figure

if TYPE_CHECKING:
    from proxy_anchor.api import Search

HOST = "127.0.0.1"
NAMES = (HOST, "localhost")  # under which this machine may be asked
MOST, LARGEST = 32, "50mb"  # photographs at a time, and the size of one
WAITING = 3600  # seconds that an upload may wait for its question
QUESTION, LONGEST = "/gradio_api/queue/join", 2**20  # where a question is sent, and its bytes, without the photographs
THUMBNAIL = 208  # pixels, at most
CACHED = 1000  # thumbnails in memory, of about 8 kB each
SAMPLE = 1000  # vectors that the largest distance is estimated from
# What the page itself requests. Gradio answers more: files by their paths, addresses elsewhere, its own documentation.
REQUESTED = re.compile(
    r"/|/(?:theme\.css|favicon\.ico|manifest\.json)|/(?:assets|static|svelte)/.*"
    r"|/gradio_api/(?:upload|upload_progress|queue/join|queue/data|heartbeat/\w+)",
    re.DOTALL,
)
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; frame-ancestors 'none'; form-action 'none'; base-uri 'self'"
)
# The field asks for images, so that a phone offers its camera, but refuses no file: `ask` says why one cannot be read.
# Photographs can be pasted.
SCRIPT = Template("""<script>
new MutationObserver(() => {
    const input = document.querySelector("#photographs input[type=file]");
    if (input && input.accept !== "$accept") input.accept = "$accept";
}).observe(document, {childList: true, subtree: true, attributeFilter: ["accept"]});
document.addEventListener("paste", event => {
    const input = document.querySelector("#photographs input[type=file]");
    if (input && event.clipboardData.files.length) {
        input.files = event.clipboardData.files;
        input.dispatchEvent(new Event("change", {bubbles: true}));
    }
});
</script>""")


def gradio():
    """The library, without its telemetry. Raises ImportError with how to install it."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    try:
        import gradio
    except ImportError as error:
        raise ImportError(
            f"search.py serve needs Gradio, which cannot be imported ({error}): pip install 'gradio>=6.31,<7'"
        ) from error
    return gradio


class Query(NamedTuple):
    """A photograph that was asked for: its picture, a data URI, and the nearest entries, or why it cannot be read."""

    name: str
    picture: str
    nearest: list[tuple[str, float]]
    probability: float | None = None  # see api.Answer
    error: str = ""


class Answers:
    """Answers photographs in HTML: the thing that each shows and the `count` nearest entries, at a threshold.

    thumbnail: of an image or an entry. loosest, start, strictest: the ends of the slider, and where it begins. At its
    loose end, everything matches.
    """

    def __init__(self, search: "Search", thumbnail: Thumbnail, count: int):
        self.search, self.thumbnail, self.count = search, thumbnail, count
        self.kind = "folders" if search.index.made["by_folder"] else "images"
        self.picture = lru_cache(CACHED)(self.draw)
        threshold = search.threshold
        if search.measure == "distance":
            self.loosest, self.strictest = round(max(2 * spread(search.index.images), threshold or 0), 4), 0.0
        else:
            self.loosest, self.strictest = min(0.0, round(threshold or 0, 4)), 1.0
        self.start = self.loosest if threshold is None else round(threshold, 4)

    def ask(self, paths: list[str], slider: float | None) -> tuple[list[Query], str]:
        """The queries for uploaded files, and the answers."""
        queries: list[Query] = []
        for path in paths:
            name = printable(os.path.basename(path))
            try:
                if len(queries) >= MOST:
                    raise BadFile(f"{path} is one too many: drop {MOST} photographs at a time")
                answer = self.search.query(path, self.count)
                queries.append(Query(name, self.draw(path), answer.nearest, answer.probability))
            except (OSError, ValueError) as error:
                reason = printable(str(error).replace(path, os.path.basename(path)))
                queries.append(Query(name, "", [], error=reason))
        return queries, self.decide(queries, slider)

    def decide(self, queries: list[Query], slider: float | None) -> str:
        """The answers at the threshold of the slider."""
        return "".join(self.answer(query, self.limit(slider)) for query in queries)

    def limit(self, slider: float | None) -> float | None:
        """The threshold of the slider, which shows four digits of it; None, an empty field, is that of the start."""
        if slider in (None, self.start):
            return self.search.threshold
        return None if slider == self.loosest else slider

    def answer(self, query: Query, limit: float | None) -> str:
        if query.error:
            return (
                f'<section class="answer unreadable"><div><h3>{html.escape(query.name)}</h3>'
                f"<p>{html.escape(query.error)}</p></div></section>"
            )
        measure = self.search.measure
        answer = self.search.decide(query.name, query.nearest, limit, query.probability)
        name, numbers = answer.verdict(measure, limit)
        if answer.matches:
            others = [f"{printable(os.path.basename(folder))} ({best:.4f})" for folder, best, _ in answer.things[1:]]
            numbers += "" if limit is None else f"; the threshold is {limit:.4f}"
            numbers += f". Then: {', '.join(others)}" if others else ""
        nearest = "".join(
            figure(
                self.picture(path), f"{value:.4f} {self.name_of(path)}", path, "" if near in answer.matches else "far"
            )
            for near in answer.nearest
            for path, value in [near]
        )
        return (
            f'<section class="answer {"known" if answer.matches else "unknown"}">'
            f"{figure(query.picture, query.name, query.name, 'query')}<div><h3>{html.escape(name)}</h3>"
            f'<p>{html.escape(numbers)}</p><div class="nearest">{nearest}</div></div></section>'
        )

    def name_of(self, entry: str) -> str:
        """The name of an entry's thing, or its own if it is of none."""
        return printable(os.path.basename(self.search.index.thing_of(entry) or entry))

    def draw(self, path: str) -> str:
        """A thumbnail as a data URI, "" if the file is gone or damaged."""
        return data_uri(path, THUMBNAIL, self.thumbnail)

    def remark(self) -> str:
        """What the slider begins with, and why."""
        index, calibration = self.search.index, self.search.calibration
        if calibration:
            return f"Calibrated for {len(index.images):,} images: {calibration.promise(len(index.images))}."
        if self.kind == "folders":
            return "There is no calibrated threshold for single photographs among folders: everything matches."
        return (
            "This index has no threshold: everything matches. If each of its folders shows one thing, run "
            "search.py index again with --calibrate."
        )


def spread(images: Any) -> float:
    """The largest distance between the mean of some vectors of an index and one of them."""
    vectors = images.take(np.linspace(0, len(images) - 1, min(SAMPLE, len(images))).astype(int))
    return float(np.linalg.norm(vectors - vectors.mean(axis=0), axis=1).max())


def delete_uploads(paths: list[str], uploads: str) -> None:
    """Delete files that were asked about, each with its folder, and what has waited too long in the folder of all."""
    for path in paths:
        with suppress(OSError):  # a file that was dropped twice, or two files of the same content
            os.remove(path)
            os.rmdir(os.path.dirname(path))
    for entry in os.scandir(uploads):
        with suppress(OSError):
            if entry.stat().st_mtime < time.time() - WAITING:
                (shutil.rmtree if entry.is_dir() else os.remove)(entry.path)


class Guard:
    """An ASGI application that lets through what the page itself requests from this machine, and refuses the rest.

    The Host shows a name that an outsider has pointed at this machine, the Origin a page of somebody else's. Gradio
    would copy any file that a question names, and fetch it from elsewhere: only those in the folder `uploads` pass.
    """

    def __init__(self, app, uploads: str):
        self.app, self.uploads = app, os.path.join(os.path.realpath(uploads), "")

    async def __call__(self, scope, receive, send):
        from starlette.datastructures import MutableHeaders
        from starlette.requests import Request
        from starlette.responses import PlainTextResponse

        async def send_with_policy(message):
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Content-Security-Policy"] = POLICY
            await send(message)

        async def replay():
            return questions.pop() if questions else await receive()

        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            request, questions = Request(scope, receive), []
            answer = self.app
            if not self.is_from_page(request):
                answer = PlainTextResponse("This page is for this machine alone", 403)
            elif scope["path"] == QUESTION:
                body = await read(request)
                questions.append({"type": "http.request", "body": body})
                if len(body) > LONGEST:
                    answer = PlainTextResponse(f"This question is too long: drop {MOST} photographs at a time", 413)
                elif not self.names_uploads(body):
                    answer = PlainTextResponse("Only photographs that were dropped on the page can be asked about", 403)
            await answer(scope, replay, send_with_policy)

    def is_from_page(self, request) -> bool:
        """Whether a request is one that the page makes, and no other page does."""
        host = request.headers.get("host", "")
        is_here = (
            host.partition(":")[0] in NAMES and request.headers.get("origin", f"http://{host}") == f"http://{host}"
        )
        return is_here and REQUESTED.fullmatch(request.scope["path"]) is not None

    def names_uploads(self, body: bytes) -> bool:
        """Whether all files that a question names were uploaded."""
        try:
            values = [json.loads(body)]
        except (ValueError, RecursionError):
            return False
        for value in values:  # grows
            if isinstance(value, dict):
                path = value.get("path")
                if path is not None and not (isinstance(path, str) and self.is_upload(path)):
                    return False
            values += value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
        return True

    def is_upload(self, path: str) -> bool:
        return os.path.isabs(path) and os.path.realpath(path).startswith(self.uploads)


async def read(request) -> bytes:
    """The body of a question or, of one that is too long, its beginning, which is too long already."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > LONGEST:
            break
    return body


def application(answers: Answers, name: str, extensions: list[str], uploads: str) -> Guard:
    """The page as an ASGI application.

    name: of the index; extensions: of photographs that browsers do not take for images; uploads: the folder for files.
    """
    os.environ["GRADIO_TEMP_DIR"] = uploads
    gr = gradio()
    from fastapi import FastAPI

    def ask(files: list[dict] | None, slider: float | None):
        """What `Answers.ask` gives, and None, which empties the field of the photographs."""
        paths = [file["path"] for file in files or []]
        try:
            return *answers.ask(paths, slider), None
        finally:
            delete_uploads(paths, uploads)

    measure = answers.search.measure
    with gr.Blocks(title=f"{name} · search", analytics_enabled=False) as blocks:
        gr.HTML(
            "<h1>What is this?</h1><p>Drop, paste or choose photographs (on a phone, take one), and see which thing in "
            f"<b>{html.escape(name)}</b> they show, among {len(answers.search.index.images):,} {answers.kind}.</p>",
            elem_id="heading",
        )
        queries = gr.State([])
        photographs = gr.File(label="Photographs", file_count="multiple", elem_id="photographs", height=140)
        slider = gr.Slider(
            min(answers.loosest, answers.strictest),
            max(answers.loosest, answers.strictest),
            value=answers.start,
            step=0.0001,
            label=f"Threshold: {'largest' if measure == 'distance' else 'smallest'} {measure} that counts as a match",
            info=answers.remark(),
            elem_id="threshold",
        )
        shown = gr.HTML(elem_id="answers")
        # Gradio's preprocessing would raise for an empty number field, and open a file that stays for each photograph.
        raw: dict[str, Any] = {"api_visibility": "private", "preprocess": False}
        photographs.upload(ask, [photographs, slider], [queries, shown, photographs], **raw)
        slider.input(
            answers.decide, [queries, slider], shown, trigger_mode="always_last", show_progress="hidden", **raw
        )
    fonts = {"font": ["system-ui", "sans-serif"], "font_mono": ["ui-monospace", "monospace"]}  # not from elsewhere
    settings = {"ssr_mode": False, "mcp_server": False, "pwa": False, "run_history": False, "enable_monitoring": False}
    app = gr.mount_gradio_app(
        FastAPI(openapi_url=None),
        blocks,
        "/",
        server_name=HOST,
        footer_links=[],
        max_file_size=LARGEST,
        theme=gr.themes.Default(**fonts),
        css_paths=Path(__file__).with_suffix(".css"),
        head=SCRIPT.substitute(accept=",".join(["image/*", *extensions])),
        **settings,
    )
    return Guard(app, uploads)


def serve(answers: Answers, name: str, extensions: list[str], port: int) -> None:
    """Serve the page until this process is interrupted. Raises OSError if the port is taken.

    port: 0 for any that is free.
    """
    import uvicorn

    with TemporaryDirectory(prefix="search-") as uploads, socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
            listener.listen()
        except OSError as error:
            raise OSError(f"Port {port} cannot be used ({error.strerror}): choose another --port") from error
        app = application(answers, name, extensions, uploads)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))
        # When it ends, the connections of open pages are cut off, which would be logged as errors.
        logging.getLogger("uvicorn.error").addFilter(lambda _: not server.should_exit)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # the uploads are deleted then too
        print(
            f"Open http://{HOST}:{listener.getsockname()[1]} in a browser on this machine; Ctrl-C ends it", flush=True
        )
        server.run([listener])
