import io
import os
import resource
import shutil
import stat
import tarfile
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest
import trees
from helpers import mutations, result_or_error
from PIL import Image

import dataset
from dataset import prepare
from dataset.__main__ import main


def archive_of(folder, path, names):
    """A tar or zip archive of these names in the folder, as its extension says."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as file:
            for name in names:
                for member in sorted([folder / name, *(folder / name).rglob("*")]):
                    file.write(member, member.relative_to(folder))
    else:
        with tarfile.open(path, "w:gz") as file:
            for name in names:
                file.add(folder / name, name)
    return str(path)


def same_files(left, right):
    found = [{p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()} for root in (left, right)]
    return found[0] == found[1]


@pytest.fixture
def published(monkeypatch):
    """Small datasets count as the published ones."""

    def set_sizes(name, **sizes):
        monkeypatch.setattr(dataset.BENCHMARKS[name], "SIZES", sizes)

    return set_sizes


def run(*argv):
    main([str(argument) for argument in argv])


@pytest.mark.parametrize(
    "name, make, archives, sizes",
    [
        ("cub", trees.cub, {"CUB_200_2011.tgz": ("", ["CUB_200_2011"])}, {"train": (4, 24), "eval": (3, 18)}),
        (
            "cars",
            trees.cars,
            {"car_ims.tgz": ("cars196", ["car_ims"]), "cars_annos.mat": None},
            {"train": (3, 12), "eval": (3, 12)},
        ),
        (
            "cars",
            trees.cars_devkit,
            {"car_devkit.tgz": ("cars196", ["devkit"]), "t.tgz": ("cars196", ["cars_train", "cars_test"])},
            {"train": (3, 12), "eval": (3, 12)},
        ),
        ("SOP", trees.sop, {"S.zip": ("", ["Stanford_Online_Products"])}, {"train": (3, 9), "eval": (3, 9)}),
        (
            "Inshop",
            trees.inshop,
            {"img.zip": ("Inshop_Clothes/Img", ["img"]), "Eval/list_eval_partition.txt": None},
            {"train": (2, 8), "query": (3, 6), "gallery": (3, 6)},
        ),
    ],
)
def test_prepare_and_check(tmp_path, published, capsys, name, make, archives, sizes):
    published(name, **sizes)
    original = make(tmp_path / "original")
    folder = dataset.BENCHMARKS[name].FOLDER
    paths = []
    for archive, content in archives.items():
        if content is None:
            paths.append(original / folder / archive)
        else:
            paths.append(archive_of(original / content[0], tmp_path / archive, content[1]))
    run("prepare", name, *paths, "--data-root", tmp_path / "data")
    output, error = capsys.readouterr()
    assert "checksum" not in output
    # The file of another checksum than the published one's: one line, at the end.
    known = [str(path) for path in paths if path and os.path.basename(path) in prepare.DIGESTS.values()]
    assert [line.split(": ")[2].split(". ")[0] for line in error.splitlines()] == [", ".join(known)] * bool(known)
    assert f"This is the published {name}." in output
    if name != "cub":  # CUB's extra file of macOS is in both
        assert same_files(original / folder, tmp_path / "data" / folder)
    assert [path.name for path in (tmp_path / "data").iterdir()] == [folder]


def test_known_archive_is_named(tmp_path, monkeypatch):
    path = tmp_path / "file"
    path.write_bytes(b"content")
    monkeypatch.setitem(prepare.DIGESTS, "9a0364b9e99bb480dd25e1f0284c8555", "known.tgz")
    assert prepare.published_name(path) == "known.tgz"
    path.write_bytes(b"other")
    assert prepare.published_name(path) is None


def tar_with(path, **attributes):
    with tarfile.open(path, "w") as file:
        data = attributes.pop("data", b"data")
        member = tarfile.TarInfo(attributes.pop("name", "images/a"))
        member.size = 0 if attributes.get("type", tarfile.REGTYPE) != tarfile.REGTYPE else len(data)
        for key, value in attributes.items():
            setattr(member, key, value)
        file.addfile(member, io.BytesIO(data))
    return path


def zip_with(path, name, mode=stat.S_IFREG | 0o644):
    with zipfile.ZipFile(path, "w") as file:
        member = zipfile.ZipInfo(name)
        member.external_attr = mode << 16
        member.create_system = 3
        file.writestr(member, "/etc/passwd")
    return path


HOSTILE = {
    "parent": lambda path: tar_with(path, name="../outside"),
    "link out": lambda path: tar_with(path, type=tarfile.SYMTYPE, linkname="/etc/passwd"),
    "link up": lambda path: tar_with(path, type=tarfile.SYMTYPE, linkname="../../outside"),
    "hard link": lambda path: tar_with(path, type=tarfile.LNKTYPE, linkname="../../outside"),
    "device": lambda path: tar_with(path, type=tarfile.CHRTYPE),
    "fifo": lambda path: tar_with(path, type=tarfile.FIFOTYPE),
    "zip parent": lambda path: zip_with(path, "images/../../outside"),
    "zip absolute": lambda path: zip_with(path, "/outside"),
    "zip backslash": lambda path: zip_with(path, "..\\outside"),
    "zip drive": lambda path: zip_with(path, "c:outside"),
    "zip link": lambda path: zip_with(path, "images/a", stat.S_IFLNK | 0o777),
    "link inside": lambda path: tar_with(path, type=tarfile.SYMTYPE, linkname="b"),
    "hard link inside": lambda path: tar_with(path, type=tarfile.LNKTYPE, linkname="images/b"),
    "hidden link": lambda path: tar_with(path, name="__MACOSX/a", type=tarfile.SYMTYPE, linkname="b"),
    "block device": lambda path: tar_with(path, type=tarfile.BLKTYPE),
    "sparse": lambda path: tar_with(path, type=tarfile.GNUTYPE_SPARSE),
    "sparse by its header": lambda path: tar_with(
        path, pax_headers={"GNU.sparse.map": "0,4", "GNU.sparse.size": "9999999999"}
    ),
    "sparse without a map": lambda path: tar_with(
        path, pax_headers={"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9"}
    ),
    "contiguous": lambda path: tar_with(path, type=tarfile.CONTTYPE),
    "unknown type": lambda path: tar_with(path, type=b"Z"),
    "negative size": lambda path: tar_with(path, pax_headers={"size": "-512"}),
    "absolute parent": lambda path: tar_with(path, name="//../outside"),
    "backslash": lambda path: tar_with(path, name="..\\outside"),
    "drive": lambda path: tar_with(path, name="c:/outside"),
    "zip link to a folder": lambda path: zip_with(path, "images/", stat.S_IFLNK | 0o777),
    "zip fifo": lambda path: zip_with(path, "images/a", stat.S_IFIFO | 0o644),
    "zip socket": lambda path: zip_with(path, "images/a", stat.S_IFSOCK | 0o644),
    "zip device": lambda path: zip_with(path, "images/a", stat.S_IFCHR | 0o666),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_archives_are_refused(tmp_path, capsys, kind):
    archive = HOSTILE[kind](tmp_path / "archive")
    with pytest.raises(SystemExit) as refused:
        run("prepare", "cub", archive, "--data-root", tmp_path / "data" / "deep")
    error = capsys.readouterr().err
    assert refused.value.code == 1 and "python -m dataset: error: " in error and str(archive) in error
    assert error.count("\n") == 1
    assert not list((tmp_path / "data" / "deep").iterdir()) and not (tmp_path / "outside").exists()


def several(path, *members):
    """A tar of (name, attributes) each."""
    with tarfile.open(path, "w") as file:
        for name, attributes in members:
            member = tarfile.TarInfo(name)
            data = attributes.get("data", b"") if "type" not in attributes else b""
            member.size = len(data)
            for key in {"type", "linkname", "mode"} & set(attributes):
                setattr(member, key, attributes[key])
            file.addfile(member, io.BytesIO(data))
    return path


def link(target):
    return {"type": tarfile.SYMTYPE, "linkname": target}


def through_links(path):
    """A chain of links that lead into each other, longer than a path may be, and then out."""
    name, step, members = "", "d" * 247, []
    for letter in "abcdefghijklmnop":
        members += [(f"{name}{step}", {"type": tarfile.DIRTYPE}), (f"{name}{letter}", link(step))]
        name += f"{step}/"
    chain = "/".join("abcdefghijklmnop")
    members += [(f"{chain}/{'l' * 254}", link("../" * 16)), ("escape", link(f"{chain}/{'l' * 254}/../../../.."))]
    return several(path, *members, ("escape/victim", {"data": b"written"}))


@pytest.mark.parametrize(
    "make",
    [
        through_links,
        # Relative links that mean another place once they are moved.
        lambda path: several(
            path,
            ("a/b/c/devkit", link("../../../victims")),
            ("a/b/cars_test_annos_withlabels.mat", {"data": b"written"}),
        ),
        lambda path: several(path, ("a/b/c/images", link("../../victims"))),
        lambda path: several(path, ("images", link(".")), ("images/victim", {"data": b"written"})),
        lambda path: several(
            path, ("images/a", {"data": b"1"}), ("images/b", {"type": tarfile.LNKTYPE, "linkname": "a"})
        ),
    ],
)
@pytest.mark.parametrize("name", ["cub", "cars"])
def test_links_are_refused(tmp_path, capsys, name, make):
    """On any Python, wherever they lead; nothing is written or read outside the data root."""
    victims = tmp_path / "victims"
    victims.mkdir()
    (victims / "victim").write_bytes(b"the user's")
    with pytest.raises(SystemExit):
        run("prepare", name, make(tmp_path / "a.tar"), "--data-root", tmp_path / "data")
    assert "is refused: its member" in capsys.readouterr().err
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a.tar", "data", "victims"]
    assert [path.read_bytes() for path in victims.iterdir()] == [b"the user's"]
    assert not list((tmp_path / "data").iterdir())


@pytest.mark.parametrize("place", ["CUB_200_2011", "CUB_200_2011.preparing"])
def test_planted_links_are_not_followed(tmp_path, capsys, place):
    victims = tmp_path / "victims"
    for folder in ("data", "victims"):
        (tmp_path / folder).mkdir()
    (tmp_path / "data" / place).symlink_to(victims, target_is_directory=True)
    archive = several(tmp_path / "a.tar", ("images/001.Bird/a.jpg", {"data": b"written"}))
    with pytest.raises(SystemExit):
        run("prepare", "cub", archive, "--data-root", tmp_path / "data")
    assert "remove it" in capsys.readouterr().err
    assert not list(victims.iterdir()) and (tmp_path / "data" / place).is_symlink()


@pytest.mark.parametrize(
    "members",
    [
        [("images/a", {"data": b"1"}), ("images/a", {"data": b"2"})],
        [("images/a", {"data": b"1"}), ("images/a", {"type": tarfile.DIRTYPE})],
        [("images/a", {"type": tarfile.DIRTYPE}), ("images/a", {"data": b"1"})],
        [("images", {"data": b"1"}), ("images/a", {"data": b"1"})],
    ],
)
def test_a_name_twice_in_one_archive_is_refused(tmp_path, members):
    with pytest.raises(ValueError, match=r"a.tar holds 'images/a' twice, or as a file and as a folder"):
        list(prepare.extract(several(tmp_path / "a.tar", *members), tmp_path / "out"))


def test_tar_that_ends_in_a_zip_is_a_tar(tmp_path):
    inner = io.BytesIO()
    with zipfile.ZipFile(inner, "w") as file:
        file.writestr("other", "")
    archive = several(tmp_path / "a.tar", ("images/a", {"data": b"1"}), ("more.zip", {"data": inner.getvalue()}))
    assert list(prepare.extract(archive, tmp_path / "out")) == ["images/a", "more.zip"]


def test_files_get_the_usual_permissions(tmp_path):
    archive = several(tmp_path / "a.tar", ("images/a", {"data": b"1", "mode": 0o6777}))
    list(prepare.extract(archive, tmp_path / "out"))
    (tmp_path / "usual").touch()
    assert os.stat(tmp_path / "out" / "images" / "a").st_mode == os.stat(tmp_path / "usual").st_mode


def test_damaged_archives(tmp_path):
    """Each is extracted or gives an error that names it."""
    for suffix in (".zip", ".tgz"):
        archive = tmp_path / f"a{suffix}"
        for number in range(4):
            trees.write_image(tmp_path / "images" / f"{number}", number)
        archive_of(tmp_path, archive, ["images"])
        for number, data in enumerate(mutations(archive.read_bytes(), 140, seed=5)):
            archive.write_bytes(data)
            result = result_or_error(lambda a=archive, n=number: list(prepare.extract(a, tmp_path / f"{a.suffix}{n}")))
            assert isinstance(result, list) or str(archive) in str(result)


# Archives as they circulate


def copy_of(source, target):
    target.parent.mkdir(parents=True, exist_ok=True)
    (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
    return target


@pytest.mark.parametrize("suffix", [".zip", ".tgz"])
def test_what_a_system_hides_is_left_out(tmp_path, published, suffix):
    published("cub", train=(4, 24), eval=(3, 18))
    original = trees.cub(tmp_path / "original")
    for name in ("__MACOSX/CUB_200_2011/images/001.Bird_1/._a.jpg", "CUB_200_2011/images/._001.Bird_1"):
        (original / name).parent.mkdir(parents=True, exist_ok=True)
        (original / name).write_bytes(b"\0\5\26\7")
    for name in ("Thumbs.db", ".DS_Store", "desktop.ini", "@eaDir/a.jpg"):
        trees.write_image(original / "CUB_200_2011" / "images" / "101.Bird_101" / name, 0)
        trees.write_image(original / "CUB_200_2011" / "images" / name, 0)
    archive = archive_of(original, tmp_path / f"a{suffix}", ["CUB_200_2011", "__MACOSX"])
    run("prepare", "cub", archive, "--data-root", tmp_path / "data")
    prepared = tmp_path / "data" / "CUB_200_2011"
    assert len([path for path in prepared.rglob("*") if path.is_file()]) == 24 + 18
    shutil.rmtree(prepared)
    shutil.copytree(original / "CUB_200_2011", prepared)  # by hand, with all of them
    run("check", "cub", "--data-root", tmp_path / "data")


@pytest.mark.parametrize("inside", ["CUB_200_2011/CUB_200_2011/images", "images/images", "a/b/images/images/images"])
def test_a_folder_in_one_of_its_own_name(tmp_path, published, inside):
    published("cub", train=(4, 24), eval=(3, 18))
    original = trees.cub(tmp_path / "original")
    copy_of(original / "CUB_200_2011" / "images", tmp_path / "packed" / inside)
    archive = archive_of(tmp_path / "packed", tmp_path / "a.zip", [inside.split("/")[0]])
    run("prepare", "cub", archive, "--data-root", tmp_path / "data")


@pytest.mark.parametrize(
    "name",
    [
        "cars_test_annos_withlabels (1).mat",
        "cars_test_annos_withlabels(2).mat",
        "cars_test_annos_withlabels-1.mat",
        "cars_test_annos_withlabels 2.mat",
        "cars_test_annos_withlabels - Copy.mat",
        "cars_test_annos_withlabels copy.mat",
    ],
)
def test_a_second_download_and_a_devkit_met_twice(tmp_path, published, name, capsys):
    """As the devkit circulates: the labels of the test images beside it, and all of it in several archives."""
    published("cars", train=(3, 12), eval=(3, 12))
    original = trees.cars_devkit(tmp_path / "original")
    labels = original / "cars196" / "devkit" / "cars_test_annos_withlabels.mat"
    with_labels = archive_of(original / "cars196", tmp_path / "with.tgz", ["devkit", "cars_train"])
    copy_of(labels, tmp_path / name)
    copy_of(original / "cars196" / "cars_test", tmp_path / "packed" / "cars_test" / "cars_test")
    copy_of(labels, tmp_path / "packed" / "a" / name)
    copy_of(labels, tmp_path / "packed" / "devkit" / "devkit" / name)
    second = archive_of(tmp_path / "packed", tmp_path / "second.zip", ["cars_test", "a", "devkit"])
    labels.unlink()
    without = archive_of(original, tmp_path / "without.tgz", ["cars196/devkit", "cars196/cars_train"])
    for files in ([without, second], [tmp_path / name, second, with_labels, with_labels, without]):
        run("prepare", "cars", *files, "--data-root", tmp_path / "data")
        shutil.rmtree(tmp_path / "data")
    (tmp_path / name).write_bytes(b"another")
    with pytest.raises(SystemExit):
        run("prepare", "cars", with_labels, tmp_path / name, second, "--data-root", tmp_path / "data")
    assert "is in the archives twice, with different contents" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, make, content, missing",
    [
        ("cars", trees.cars, ["cars196/car_ims"], "cars_annos.mat"),
        ("cars", trees.cars, ["cars196/cars_annos.mat"], "car_ims"),
        (
            "cars",
            trees.cars_devkit,
            ["cars196/cars_train", "cars196/cars_test", "cars196/devkit/cars_train_annos.mat"],
            "devkit/cars_test_annos_withlabels.mat",
        ),
        ("cars", trees.cars_devkit, ["cars196/devkit"], "cars_train, cars_test"),
        ("Inshop", trees.inshop, ["Inshop_Clothes/Img"], "Eval/list_eval_partition.txt"),
        ("Inshop", trees.inshop, ["Inshop_Clothes/Eval"], "Img/img"),
        (
            "SOP",
            trees.sop,
            ["Stanford_Online_Products/bicycle_final", "Stanford_Online_Products/Ebay_train.txt"],
            "Ebay_test.txt",
        ),
    ],
)
def test_half_a_dataset_says_what_is_missing(tmp_path, capsys, name, make, content, missing):
    original = make(tmp_path / "original")
    if name == "cars" and "devkit/cars_train" in content[-1]:  # the devkit as published, without the labels
        (original / "cars196" / "devkit" / "cars_test_annos_withlabels.mat").unlink()
        content = [*content[:-1], "cars196/devkit"]
    archive = archive_of(original, tmp_path / "half.tgz", content)
    with pytest.raises(SystemExit):
        run("prepare", name, archive, "--data-root", tmp_path / "data")
    words = f"{archive} holds only some of {name}: give the archives of {missing} too\n"
    assert capsys.readouterr().err.endswith(words)
    assert not list((tmp_path / "data").iterdir())  # so that the whole can be prepared


def test_damaged_download_is_warned_of(tmp_path, capsys):
    """Also where it cannot be extracted."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a").write_bytes(os.urandom(100_000))
    archive = archive_of(tmp_path, tmp_path / "CUB_200_2011 (1).tgz", ["images"])
    os.truncate(archive, 50_000)
    with pytest.raises(SystemExit):
        run("prepare", "cub", archive, "--data-root", tmp_path / "data")
    warning, error = capsys.readouterr().err.splitlines()
    assert warning.startswith("Warning: the checksum differs from the published file's: ") and archive in warning
    assert error.startswith("python -m dataset: error: ") and archive in error


def test_absolute_tar_names_land_inside(tmp_path):
    archive = tar_with(tmp_path / "archive", name="/images/a")
    assert list(prepare.extract(archive, tmp_path / "out")) == ["/images/a"]
    assert (tmp_path / "out" / "images" / "a").read_bytes() == b"data"


@pytest.mark.parametrize("suffix", [".tgz", ".zip"])
def test_bombs_are_refused(tmp_path, monkeypatch, suffix):
    (tmp_path / "images").mkdir()
    for i in range(5):
        (tmp_path / "images" / str(i)).write_bytes(bytes(1_000_000))
    archive = tmp_path / f"bomb{suffix}"
    archive_of(tmp_path, archive, ["images"])
    monkeypatch.setattr(prepare, "MAX_BYTES", 3e6)
    with pytest.raises(ValueError, match="holds more than"):
        list(prepare.extract(archive, tmp_path / "out"))
    monkeypatch.setattr(prepare, "MAX_BYTES", 3e9)
    monkeypatch.setattr(prepare, "MAX_FILES", 3)
    with pytest.raises(ValueError, match="than 3 files"):
        list(prepare.extract(archive, tmp_path / "out2"))


def test_interrupted_it_starts_again(tmp_path, published, monkeypatch):
    published("cub", train=(4, 24), eval=(3, 18))
    original = trees.cub(tmp_path / "original")
    archive = archive_of(original, tmp_path / "a.tgz", ["CUB_200_2011"])
    leftover = tmp_path / "data" / "CUB_200_2011.preparing" / "extracted" / "images" / "999.Nothing"
    leftover.mkdir(parents=True)  # of a killed attempt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prepare, "_arrange", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
        list(prepare.prepare("cub", tmp_path / "data", "CUB_200_2011", [tmp_path / "a.tgz"]))
    assert not (tmp_path / "data" / "CUB_200_2011").exists()
    run("prepare", "cub", archive, "--data-root", tmp_path / "data")
    with pytest.raises(SystemExit):
        run("prepare", "cub", archive, "--data-root", tmp_path / "data")  # it is there already


def test_what_lies_in_the_way_is_kept(tmp_path):
    archive = tmp_path / "a.tgz"
    archive_of(trees.cub(tmp_path / "original"), archive, ["CUB_200_2011"])
    notes = tmp_path / "data" / "CUB_200_2011.preparing" / "notes.txt"
    notes.parent.mkdir(parents=True)
    notes.write_text("mine")
    with pytest.raises(FileExistsError, match=r"preparing holds files that are not of an interrupted attempt"):
        list(prepare.prepare("cub", tmp_path / "data", "CUB_200_2011", [archive]))
    assert notes.read_text() == "mine" and os.listdir(tmp_path / "data") == ["CUB_200_2011.preparing"]


def test_two_attempts_at_once_take_turns(tmp_path):
    archive = tmp_path / "a.tgz"
    archive_of(trees.cub(tmp_path / "original"), archive, ["CUB_200_2011"])
    first = prepare.prepare("cub", tmp_path / "data", "CUB_200_2011", [archive])
    next(first)
    with ThreadPoolExecutor() as threads:
        second = threads.submit(lambda: list(prepare.prepare("cub", tmp_path / "data", "CUB_200_2011", [archive])))
        time.sleep(0.5)
        assert not second.done()
        names = list(first)
        with pytest.raises(FileExistsError, match="exists already"):
            second.result()
    assert names and len(list((tmp_path / "data" / "CUB_200_2011" / "images").iterdir())) == 7


def test_full_disk_names_the_file(tmp_path, capsys):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "large").write_bytes(bytes(100_000))
    archive = archive_of(tmp_path, tmp_path / "a.tgz", ["images"])
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(SystemExit):
            run("prepare", "cub", archive, "--data-root", tmp_path / "data")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "'images/large' cannot be extracted to" in capsys.readouterr().err
    assert not list((tmp_path / "data").iterdir())


@pytest.mark.parametrize(
    "argv, words",
    [(["cub", "nowhere.tgz"], "There is no archive nowhere.tgz"), (["cub", __file__], "holds nothing of cub")],
)
def test_wrong_archives(tmp_path, capsys, argv, words):
    with pytest.raises(SystemExit) as refused:
        run("prepare", *argv, "--data-root", tmp_path)
    assert refused.value.code == 1 and words in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_check_finds_what_is_wrong(tmp_path, published, capsys):
    published("cub", train=(4, 24), eval=(3, 18))
    images = trees.cub(tmp_path) / "CUB_200_2011" / "images"
    run("check", "cub", "--data-root", tmp_path, "--workers", 2)
    assert "Images in both training and test: 0" in capsys.readouterr().out
    (images / "001.Bird_1" / "Bird_1_0000.jpg").write_bytes(b"")
    (images / "101.Bird_101" / "Bird_101_0000.jpg").write_bytes(
        (images / "002.Bird_2" / "Bird_2_0000.jpg").read_bytes()
    )
    os.remove(images / "103.Bird_103" / "Bird_103_0005.jpg")
    with pytest.raises(SystemExit) as failed:
        run("check", "cub", "--data-root", tmp_path, "--workers", 0)
    output = capsys.readouterr()
    assert failed.value.code == 1 and "cub has 2 problems" in output.err
    assert "Images in both training and test: 1" in output.out and "Bird_101_0000.jpg" in output.out
    assert "Bird_1_0000.jpg cannot be read" in output.out and "eval is not the published split" in output.out


def test_check_tells_of_any_name(tmp_path, capsys):
    folder = trees.folder(tmp_path)
    for name in (b"ant/\xff.jpg", b"eel/\xff.jpg"):
        shutil.copy(folder / "bee" / "1.jpg", os.path.join(os.fsencode(folder), name))
    with open(os.path.join(os.fsencode(folder), b"eel/\xfe.jpg"), "wb"):
        pass
    with pytest.raises(SystemExit):
        run("check", "folder", "--data-root", tmp_path, "--workers", 0)
    output = capsys.readouterr()
    assert r"eel/\udcfe.jpg cannot be read" in output.out and r"ant/\udcff.jpg = " in output.out
    assert (
        "Identical files have different labels: " in output.out and "folder has 2 problems, listed above" in output.err
    )


def test_usage_errors(capsys):
    for argv in (
        [],
        ["check"],
        ["check", "mnist"],
        ["prepare", "glyphs", "a.zip"],
        ["check", "cub", "--workers", "-1"],
    ):
        with pytest.raises(SystemExit) as refused:
            run(*argv)
        assert refused.value.code == 2


def test_bad_images_are_left_out_and_change_no_other(tmp_path):
    """With --skip-bad-images the others get the augmentation that they would have got."""
    root = trees.cub(tmp_path)
    whole = dataset.train_set("cub", root, 32, allow_partial=True)
    bad = [whole.paths[1], whole.paths[7]]
    expected = {path: whole[3, 5, index][0] for index, path in enumerate(whole.paths)}
    with open(bad[0], "wb") as file:
        file.write(b"no image")
    os.truncate(bad[1], 600)
    images = dataset.train_set("cub", root, 32, allow_partial=True)
    found = images.find_bad(workers=2)
    assert list(found) == bad and all("cannot be read" in reason for reason in found.values())
    images.leave_out(found)
    assert len(images) == 22 and images.num_classes == 4
    for index, path in enumerate(images.paths):
        assert (images[3, 5, index][0] == expected[path]).all() and images.labels[index] == whole.labels[
            whole.paths.index(path)
        ]


def test_kinds_of_images(tmp_path):
    """Each kind of file is either an image or an error with the path and the reason."""
    from dataset.files import BadFile, read_image

    pixels = Image.effect_noise((20, 10), 50)
    frames = [Image.new("P", (20, 10), color) for color in (1, 2)]
    frames[0].save(tmp_path / "animated.gif", save_all=True, append_images=frames[1:])
    pixels.convert("CMYK").save(tmp_path / "cmyk.jpg")
    pixels.convert("P").save(tmp_path / "palette.png")
    Image.new("RGB", (1, 1)).save(tmp_path / "one.png")
    for name in ("animated.gif", "cmyk.jpg", "palette.png"):
        assert read_image(str(tmp_path / name)).shape == (3, 10, 20)
    assert read_image(str(tmp_path / "one.png")).shape == (3, 1, 1)
    bomb = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(bomb, "PNG")
    (tmp_path / "huge.png").write_bytes(bomb.getvalue())
    (tmp_path / "empty.jpg").write_bytes(b"")
    pixels.save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:-100])
    (tmp_path / "text.jpg").write_text("no image")
    for name in ("huge.png", "empty.jpg", "cut.jpg", "text.jpg"):
        with pytest.raises(BadFile, match=rf"{name} cannot be read: \S+"):
            read_image(str(tmp_path / name))
