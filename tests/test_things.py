"""misc/things.py, on packages made here: photographs of things, composed from cut-outs and backgrounds."""

import random
import shutil

import numpy as np
import pytest
import things
from PIL import Image, ImageDraw

from dataset.__main__ import main as dataset_main

# Instead of the two programs: packages are folders in $PACKAGES.
APT_GET = """#!/bin/bash
[ "$1" = download ] && [ -d "$PACKAGES/$2" ] || { echo "E: Unable to locate package $2" >&2; exit 100; }
touch "$2_1.0_all.deb"
"""
DPKG = """#!/bin/bash
[ "$1" = -x ] && [ -f "$2" ] && cp -r "$PACKAGES/${2%%_*}" "$3"
"""
RED, BLUE = (220, 20, 20), (20, 20, 220)


def write_stamp(path, colour, size=(50, 30)):
    """A rectangle of one colour on a transparent ground."""
    stamp = Image.new("RGBA", (90, 80))
    ImageDraw.Draw(stamp).rectangle((20, 10, 19 + size[0], 9 + size[1]), fill=colour)
    path.parent.mkdir(parents=True, exist_ok=True)
    stamp.save(path)


def write_background(path, shade):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (64, 40), (shade, 255 - shade, shade)).save(path, quality=95)


@pytest.fixture
def parts(tmp_path):
    """Two things, and one background more than a thing has photographs."""
    stamps = {"brick": tmp_path / "brick.png", "book": tmp_path / "book.png"}
    for path, colour in zip(stamps.values(), (RED, BLUE)):
        write_stamp(path, colour)
    backgrounds = [tmp_path / f"{number}.jpg" for number in range(things.PHOTOS + 1)]
    for number, path in enumerate(backgrounds):
        write_background(path, 20 * number)
    return stamps, backgrounds


def photographs(folder, name):
    """The photographs of a thing, int (5, 480, 640, 3)."""
    images = [Image.open(folder / name / f"{number}.jpg") for number in range(1, 6)]
    assert {(image.format, image.size, image.mode) for image in images} == {("JPEG", (640, 480), "RGB")}
    return np.stack([np.asarray(image, int) for image in images])


def test_photographs_show_their_thing(parts, tmp_path):
    """Whole: it has the area of the cut-out at one of the sizes. No two photographs are alike."""
    things.compose(*parts, tmp_path / "photos")
    assert sorted(path.name for path in (tmp_path / "photos").rglob("*.jpg")) == sorted(
        [f"{n}.jpg" for n in range(1, 6)] * 2
    )
    for name, channel in (("brick", 0), ("book", 2)):
        pixels = photographs(tmp_path / "photos", name)
        others = np.delete(pixels, channel, axis=3).max(axis=3)
        areas = (pixels[..., channel] > 2 * others + 20).sum(axis=(1, 2)) / (50 * 30)
        smallest, largest = ((share * 480) ** 2 / (50**2 + 30**2) for share in (0.45, 0.95))
        assert (areas > 0.95 * smallest).all() and (areas < 1.05 * largest).all() and len(set(areas)) == 5


def test_photographs_of_a_thing_have_different_backgrounds(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(things, "light", lambda picture, chance: picture)
    things.compose(*parts, tmp_path / "photos")
    shades = photographs(tmp_path / "photos", "brick")[:, 5, 5, 0]
    assert len(set(np.round(shades / 20))) == 5 and np.abs(shades - 20 * np.round(shades / 20)).max() <= 4


def test_photographs_are_the_same_each_time(parts, tmp_path):
    """Whichever other things there are."""
    stamps, backgrounds = parts
    things.compose(stamps, backgrounds, tmp_path / "first")
    things.compose(stamps, backgrounds, tmp_path / "second")
    things.compose({"book": stamps["book"]}, backgrounds, tmp_path / "third")
    files = {folder: sorted((tmp_path / folder).rglob("*.jpg")) for folder in ("first", "second", "third")}
    contents = {folder: [path.read_bytes() for path in paths] for folder, paths in files.items()}
    assert contents["first"] == contents["second"] and len(set(contents["first"])) == 10
    assert contents["third"] == contents["first"][:5]


def test_light():
    """Brightness and colour, the same up and down, with a gradient from side to side."""
    grey = Image.new("RGB", (640, 480), (100, 100, 100))
    means = []
    for seed in range(40):
        pixels = np.asarray(things.light(grey, random.Random(seed)), float)
        means.append(pixels.mean(axis=(0, 1)))
        columns = pixels.mean(axis=(0, 2))
        assert abs(pixels[:240].mean() - pixels[240:].mean()) < 0.5
        assert abs(columns[:320].mean() + columns[320:].mean() - 2 * pixels.mean()) < 1e-6
        assert abs(columns[-1] - columns[0]) < 0.65 * pixels.mean()
    red, green, blue = np.array(means).T
    assert green.min() < 75 and green.max() > 115 and green.min() > 59 and green.max() < 131
    assert (red / green).max() > 1.1 and (red / green).min() < 0.9 and np.allclose((red + blue) / 2, green, atol=0.5)


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Two things and six backgrounds in packages, and programs that fetch them."""
    monkeypatch.setattr(things, "THINGS", {"brick": "town/brick", "book": "hobbies/books/book"})
    monkeypatch.setattr(things, "NATURE", "Grass Sand")
    monkeypatch.setattr(things, "WALLPAPERS", "Sea Sky Snow Wood")
    root = tmp_path / "packages"
    for path, colour in (("town/brick", RED), ("hobbies/books/book", BLUE)):
        write_stamp(root / things.STAMPS / f"usr/share/tuxpaint/stamps/{path}.png", colour)
    for number, name in enumerate(("Grass", "Sand")):
        write_background(root / things.MATE / f"usr/share/backgrounds/mate/nature/{name}.jpg", 20 * number)
    for number, name in enumerate(("Sea", "Sky", "Snow", "Wood"), 2):
        path = root / things.PLASMA / f"usr/share/wallpapers/{name}/contents/images/2560x1600.jpg"
        write_background(path, 20 * number)
    for package in (things.STAMPS, things.MATE, things.PLASMA):
        notice = root / package / "usr/share/doc" / package / "copyright"
        notice.parent.mkdir(parents=True)
        notice.write_text(f"Copyright: the authors of {package}\n", encoding="utf-8")
    for name, text in (("apt-get", APT_GET), ("dpkg", DPKG)):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(text)
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    monkeypatch.setenv("PACKAGES", str(root))
    return root


def test_packages_become_a_dataset(packages, tmp_path, capsys):
    folder = tmp_path / "photos"
    things.main([str(folder)])
    last = f"5 photographs each of 2 things are in {folder}, their licences in LICENSES.txt"
    assert capsys.readouterr().out.splitlines()[-1] == last
    assert sorted(path.name for path in folder.iterdir()) == ["LICENSES.txt", "book", "brick"]
    notices = (folder / "LICENSES.txt").read_text()
    assert all(f"{name}:\n\nCopyright: the authors of {name}\n" in notices for name in (things.STAMPS, things.MATE))
    dataset_main(["check", "folder", "--data-root", str(folder)])
    out = capsys.readouterr().out
    assert "train: 5 images of 1 class" in out and "No problems found" in out


def error(capsys, folder):
    with pytest.raises(SystemExit):
        things.main([str(folder)])
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_errors_are_one_line(packages, tmp_path, monkeypatch, capsys):
    assert error(capsys, packages) == f"things.py: error: {packages} exists already: expected the name of a new folder"
    (packages / things.STAMPS / "usr/share/tuxpaint/stamps/town/brick.png").unlink()
    line = "things.py: error: brick.png is not in these packages: expected those of Debian 12 or 13"
    assert error(capsys, tmp_path / "photos") == line
    shutil.rmtree(packages / things.MATE)
    assert f"E: Unable to locate package {things.MATE}" in error(capsys, tmp_path / "photos")
    monkeypatch.setenv("PATH", str(tmp_path))
    line = "things.py: error: apt-get is missing: the photographs are in packages of Debian, so use Debian or Ubuntu"
    assert error(capsys, tmp_path / "photos") == line and not (tmp_path / "photos").exists()


@pytest.mark.slow
def test_real_packages(tmp_path, capsys):
    """Downloads 300 MB: all names exist, and the photographs are a dataset without duplicates."""
    try:
        things.fetch(things.MATE, tmp_path)
    except OSError as reason:
        pytest.skip(str(reason))
    things.main([str(tmp_path / "photos")])
    for name in things.THINGS:
        photographs(tmp_path / "photos", name)
    assert len(things.THINGS) == 64 and "License: GPL-2+" in (tmp_path / "photos/LICENSES.txt").read_text()
    dataset_main(["check", "folder", "--data-root", str(tmp_path / "photos")])
    assert "eval: 160 images of 32 classes" in capsys.readouterr().out
