"""Images as they are read: the formats, the orientation in EXIF, transparency, 16 bits, and what is left out."""

import io
import json
import os
import re
import struct
import subprocess
import sys
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import trees
from helpers import write_csv
from pages import REPOSITORY, blocks
from PIL import Image, ImageOps

import dataset
import evaluate
import export
import hubconf
import net
import search
import train
from dataset import files, folder, transforms
from dataset.__main__ import main as dataset_main
from dataset.files import BadFile, image_size, read_image, read_thumbnail
from proxy_anchor import checkpoint, exported
from proxy_anchor.index.store import Index
from proxy_anchor.runs import run_folders

T = Image.Transpose
STORED = {  # how a camera stores a picture with this orientation in EXIF
    1: None,
    2: T.FLIP_LEFT_RIGHT,
    3: T.ROTATE_180,
    4: T.FLIP_TOP_BOTTOM,
    5: T.TRANSPOSE,
    6: T.ROTATE_90,
    7: T.TRANSVERSE,
    8: T.ROTATE_270,
}
RECORD = {"model": "tiny", "embedding_size": 8, "image_size": 32, "l2_norm": 1, "crop": 1.0}
ALONE = ["--backbone-only", "--model", "tiny", "--pretrained", "none", "--image-size", "32", "--workers", "0"]


def picture(seed=1, width=56, height=40):
    """No two sides or corners of it are alike."""
    random = np.random.default_rng(seed)
    pixels = random.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(pixels.repeat(8, axis=0).repeat(8, axis=1))


def exif(orientation):
    content = Image.Exif()
    content[0x0112] = orientation
    return content.tobytes()


def save_turned(path, orientation, image=None, **settings):
    """The picture as a camera that was held so stores it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = image or picture()
    stored = image if STORED[orientation] is None else image.transpose(STORED[orientation])
    stored.save(path, exif=exif(orientation), **settings)
    return np.asarray(stored)


def pixels(path, upright=True):
    return read_image(str(path), upright).permute(1, 2, 0).numpy()


# Formats


def test_nothing_is_handed_to_ghostscript(tmp_path, monkeypatch):
    """A stranger's PostScript under a photo's name, and a stand-in for Ghostscript that leaves a mark."""
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/mark\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 32 32\n%%EndComments\nshowpage\n"
    for name in ("holiday.jpg", "holiday.eps", "holiday.ps"):
        (tmp_path / name).write_bytes(postscript)
        for read in (read_image, image_size):
            with pytest.raises(BadFile, match=f"{name} cannot be read: it is damaged, or none of JPEG, PNG, WEBP"):
                read(str(tmp_path / name))
    assert not (tmp_path / "mark").exists()
    with Image.open(tmp_path / "holiday.jpg") as image, pytest.raises(Exception):  # noqa: B017 (the mark is the test)
        image.load()
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize("form", ["TGA", "ICO", "PCX", "SGI", "DDS", "IM", "EPS", "ICNS", "MSP"])
def test_formats_of_no_photograph_are_refused(form, tmp_path):
    picture(width=64, height=64).convert("1" if form == "MSP" else "RGB").save(tmp_path / "a.png", format=form)
    with pytest.raises(BadFile, match="none of JPEG, PNG"):
        read_image(tmp_path / "a.png")


def test_every_image_is_opened_in_chosen_formats():
    files = subprocess.run(["git", "ls-files", "*.py"], cwd=REPOSITORY, capture_output=True, text=True).stdout.split()
    opened = [
        line
        for name in files
        if not name.startswith("tests/")
        for line in (REPOSITORY / name).read_text().splitlines()
        if "Image.open(" in line
    ]
    assert opened and all("formats=" in line for line in opened)


def test_endings_of_images():
    for ending in ("jpg", "JPG", "jpeg", "PNG", "webp", "tif", "TIFF", "bmp", "gif", "ppm", "jp2", "MPO"):
        assert files.is_image(f"a.{ending}")
    for ending in ("eps", "ps", "psd", "fits", "pdf", "h5", "wmf", "ico", "txt", "jpg.txt"):
        assert not files.is_image(f"a.{ending}") and not files.is_image(ending)


# Orientation


def kinds():
    """{name: (settings of saving, the largest difference from the picture)}."""
    exact, near = {}, 3
    found = {
        "a.png": (exact, 0),
        "a.webp": ({"lossless": True}, 0),
        "a.tiff": (exact, 0),
        "b.tif": ({"compression": "tiff_lzw"}, 0),
        "a.jpg": ({"quality": 95, "subsampling": 0}, near),
        "a.mpo": ({"quality": 95, "subsampling": 0, "save_all": True, "append_images": [picture()]}, near),
    }
    if "AVIF" in files.formats():
        found["a.avif"] = ({"quality": 100, "subsampling": "4:4:4"}, near)
    if "HEIF" in files.formats():
        found["A.HEIC"] = ({"quality": -1}, near)
    return found


@pytest.mark.parametrize("name", kinds())
@pytest.mark.parametrize("orientation", STORED)
def test_photos_are_upright(orientation, name, tmp_path):
    settings, tolerance = kinds()[name]
    stored = save_turned(tmp_path / name, orientation, **settings)
    expected = np.asarray(picture())
    assert image_size(str(tmp_path / name)) == (56, 40)
    assert np.abs(pixels(tmp_path / name).astype(int) - expected).max() <= tolerance
    as_stored = pixels(tmp_path / name, upright=False)
    assert image_size(str(tmp_path / name), upright=False) == as_stored.shape[1::-1]
    if name.split(".")[1] not in ("tiff", "tif", "HEIC"):  # which are turned when they are decoded
        assert np.abs(as_stored.astype(int) - stored).max() <= tolerance


@pytest.mark.parametrize("name", kinds())
@pytest.mark.parametrize("orientation", STORED)
def test_thumbnails_are_upright(orientation, name, tmp_path):
    large = picture().resize((1120, 800), Image.Resampling.NEAREST)
    save_turned(tmp_path / name, orientation, large, **kinds()[name][0])
    small = read_thumbnail(str(tmp_path / name), 56)
    assert small.size == (56, 40) and small.mode == "RGB"
    assert np.abs(np.asarray(small).astype(int) - np.asarray(picture())).mean() < 10
    with pytest.raises(BadFile, match="b.jpg is missing"):
        read_thumbnail(str(tmp_path / "b.jpg"), 56)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "I;16", "1"])
def test_photos_of_all_modes_are_upright(mode, tmp_path):
    image = picture().convert("L" if mode == "I;16" else mode)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257)
    name = "a.jpg" if mode == "CMYK" else "a.png"
    save_turned(tmp_path / name, 6, image)
    with Image.open(tmp_path / name) as opened:
        expected = np.asarray(ImageOps.exif_transpose(opened).convert("RGB"))
    if mode == "I;16":
        expected = np.dstack([np.asarray(image) // 257] * 3)
    assert np.array_equal(pixels(tmp_path / name), expected)


@pytest.mark.parametrize(
    "block",
    [
        b"Exif\0\0nothing",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        exif(6)[:-8],
        exif(9),
        b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\0\x01",
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\xff\0\0\0\x1a\0\0\0",
    ],
)
@pytest.mark.parametrize("ending", ["jpg", "png", "webp"])
def test_damaged_exif_is_no_error(block, ending, tmp_path):
    settings = {} if ending == "png" else {"lossless": True} if ending == "webp" else {"quality": 95, "subsampling": 0}
    path = tmp_path / f"a.{ending}"
    picture().save(path, exif=block, **settings)
    assert image_size(str(path)) == (56, 40)
    assert np.abs(pixels(path).astype(int) - np.asarray(picture())).max() <= 3
    assert np.array_equal(pixels(path), pixels(path, upright=False))


@pytest.fixture
def turned(tmp_path):
    """Two class folders, each with one picture in all eight orientations."""
    for seed, name in enumerate(("ant", "bee")):
        for orientation in STORED:
            save_turned(tmp_path / "photos" / name / f"{orientation}.png", orientation, picture(seed))
    return tmp_path / "photos"


def same(images):
    """Whether all images of each label are one."""
    first = {}
    return all(torch.equal(image, first.setdefault(label, image)) for image, label in images)


def test_all_orientations_are_one_image_of_a_dataset(turned, tmp_path):
    table = write_csv(
        tmp_path / "a.csv",
        [
            (f"photos/{name}/{number}.png", name, split)
            for split in ("train", "eval")
            for name in ("ant", "bee")
            for number in STORED
        ],
    )
    for name, root in (("folder", turned), ("csv", table)):
        for split in ("train", "eval"):
            assert same(dataset.load(name, root, split, transforms.Evaluation(32)))
            stored = dataset.load(name, root, split, transforms.Evaluation(32), upright=False)
            assert not same(stored) and not stored.upright
    images, plain = (dataset.load("csv", table, "eval", upright=upright) for upright in (True, False))
    for each in (images, plain):
        each.use_cache(tmp_path / "cache", 0, lambda batches, description: batches, print)
    assert same(images) and not same(plain) and images.cache.folder != plain.cache.folder
    assert [tuple(images[i][0].shape) for i in range(8)] == [(3, 40, 56)] * 8


@pytest.mark.parametrize("name", ["cub", "cars", "SOP", "Inshop"])
def test_benchmarks_are_read_as_stored(name, tmp_path):
    root = {"cub": trees.cub, "cars": trees.cars, "SOP": trees.sop, "Inshop": trees.inshop}[name](tmp_path)
    for split in dataset.splits(name, root):
        images = dataset.load(name, root, split, allow_partial=True)
        stored = save_turned(Path(images.paths[0]), 6, format="PNG")
        assert not images.upright and np.array_equal(images[0][0].permute(1, 2, 0), stored)
        images.use_cache(tmp_path / "cache", 0, lambda batches, description: batches, print)
        assert np.array_equal(images[0][0].permute(1, 2, 0), stored)
    assert not dataset.glyphs.UPRIGHT


def ask(index, capsys, *more):
    capsys.readouterr()
    search.main(["query", "--index", str(index), "--json", *map(str, more)])
    out, err = capsys.readouterr()
    return json.loads(out), err


def test_all_orientations_are_one_entry_of_an_index(turned, tmp_path, capsys):
    index = tmp_path / "photos.index"
    search.main(["index", *ALONE, "--images", str(turned), "--out", str(index)])
    vectors = Index.open(index).images.vectors
    assert Index.open(index).spec.orientation == "upright"
    assert np.ptp(vectors[:8], axis=0).max() < 1e-6 and np.ptp(vectors[8:], axis=0).max() < 1e-6
    results, err = ask(index, capsys, turned / "bee", "-k", 16, "--save", tmp_path / "a.png")
    assert "stored" not in err
    for result in results:
        near = [n["path"] for n in result["neighbours"] if n["similarity"] > 0.999999]
        assert len(near) == 8 and all("/bee/" in path for path in near)


def test_index_of_before_goes_on_as_stored(turned, tmp_path, capsys):
    index = tmp_path / "photos.index"
    command = ["index", *ALONE, "--images", str(turned), "--out", str(index)]
    search.main(command)
    content = json.loads((index / "images.json").read_text())
    del content["made"]["network"]["orientation"], content["folders"], content["files"], content["sha256"]
    (index / "images.json").write_text(json.dumps(content))
    (turned / "ant" / "6.png").write_bytes((turned / "bee" / "6.png").read_bytes())
    capsys.readouterr()
    search.main(command)
    out, _ = capsys.readouterr()
    assert out.count("built from photos as stored") == 1 and "changed: 1" in out
    results, err = ask(index, capsys, turned / "ant" / "6.png", "-k", 20)
    assert err.count("built from photos as stored") == 1
    alike = {n["path"] for n in results[0]["neighbours"] if n["similarity"] > 0.999999}
    assert str(turned / "ant" / "6.png") in alike and not any(path.endswith("/1.png") for path in alike)
    assert "orientation" not in json.loads((index / "images.json").read_text())["made"]["network"]


def test_index_of_a_benchmark_is_as_stored(cub_root, tmp_path, capsys):
    flags = ["index", *ALONE, "--dataset", "cub", "--data-root", str(cub_root), "--allow-partial", "--split", "eval"]
    search.main([*flags, "--out", str(tmp_path / "index")])
    search.main([*flags, "--out", str(tmp_path / "index")])
    assert "photos as stored" not in capsys.readouterr().out
    assert Index.open(tmp_path / "index").spec.orientation == "stored"
    _, err = ask(tmp_path / "index", capsys, cub_root / "CUB_200_2011/images/101.Bird_101/Bird_101_0000.jpg")
    assert "as stored" not in err


def test_lines_on_the_page_see_photos_upright(turned):
    (program,) = [block for block in blocks(REPOSITORY / "docs" / "use.md", "python") if "onnxruntime" in block]
    exec(program.split("session =")[0], names := {})
    recipe, seen = transforms.recipe(32, interpolation="bicubic"), transforms.Evaluation(32, interpolation="bicubic")
    for path in sorted(turned.glob("ant/*.png")):
        assert np.array_equal(names["pixels"](path, **recipe), seen(read_image(str(path))))
    hidden = np.dstack([np.asarray(picture()), np.arange(56)[None].repeat(40, 0) * 4]).astype(np.uint8)
    Image.fromarray(hidden).save(path := turned / "hidden.png")
    assert np.array_equal(names["pixels"](path, **recipe), seen(read_image(str(path))))


def test_pictures_of_a_search_are_upright(turned):
    first = search.read_entry(str(turned / "ant" / "1.png"), upright=True)
    assert torch.equal(search.read_entry(str(turned / "ant" / "6.png"), upright=True), first)
    assert torch.equal(search.read_entry(str(turned / "ant"), upright=True), first)


# The record


def test_orientation_that_a_checkpoint_does_not_record_is_as_stored(tmp_path):
    network = net.create("tiny", 8)
    for orientation in ("stored", "upright"):
        trees.save_checkpoint(tmp_path / "a.pth", network, RECORD | {"orientation": orientation})
        assert checkpoint.Checkpoint(tmp_path / "a.pth").spec.orientation == orientation
    trees.save_checkpoint(tmp_path / "a.pth", network, RECORD)
    assert checkpoint.Checkpoint(tmp_path / "a.pth").spec.orientation == "stored"
    trees.save_checkpoint(tmp_path / "a.pth", network, RECORD | {"orientation": "sideways"})
    with pytest.raises(ValueError, match="damaged: its record of the network"):
        checkpoint.Checkpoint(tmp_path / "a.pth")


def train_on(root, logs, *more, epochs=1):
    train.main(
        [
            "--dataset",
            "folder",
            "--data-root",
            str(root),
            "--batch-size",
            "8",
            "--workers",
            "0",
            "--model",
            "tiny",
            "--pretrained",
            "none",
            "--embedding-size",
            "8",
            "--image-size",
            "32",
            "--epochs",
            str(epochs),
            "--LOG_DIR",
            str(logs),
            *more,
        ]
    )


def test_run_records_and_keeps_its_orientation(turned, tmp_path, monkeypatch, capsys):
    """A run of before, on photos as stored: --resume PATH goes on with them, auto says so; with a remark it is new."""
    seen = []
    open_splits = dataset.open_splits

    def watch(*args, **choice):
        splits = open_splits(*args, **choice)
        seen.append({images.upright for images in splits.values()})
        return splits

    monkeypatch.setattr(dataset, "open_splits", watch)
    train_on(turned, tmp_path)
    (run,) = (tmp_path / "logs_folder").iterdir()
    assert run_folders.read_config(run)["orientation"] == "upright" and seen.pop() == {True}
    assert checkpoint.Checkpoint(run / "folder_tiny_best.pth").spec.orientation == "upright"
    config = json.loads((run / "config.json").read_text())
    del config["orientation"]
    (run / "config.json").write_text(json.dumps(config))
    train_on(turned, tmp_path, "--resume", str(run), epochs=2)
    assert seen.pop() == {False} and "Resuming" in capsys.readouterr().out
    assert run_folders.read_config(run)["orientation"] == "stored"
    with pytest.raises(SystemExit, match="1"):
        train_on(turned, tmp_path, "--resume", "auto", epochs=2)
    assert f"not turned upright by their EXIF: --resume {run} continues it that way; choose" in capsys.readouterr().err
    train_on(turned, tmp_path, "--resume", "auto", "--remark", "_upright", epochs=2)
    assert seen.pop() == {True} and "Logging to" in capsys.readouterr().out
    assert run_folders.read_config(run.with_name(f"{run.name}_upright"))["orientation"] == "upright"


def test_evaluation_follows_the_dataset(turned, tmp_path, monkeypatch, cub_root):
    trees.save_checkpoint(tmp_path / "a.pth", net.create("tiny", 8), RECORD | {"orientation": "stored"})
    seen = []
    monkeypatch.setattr("dataset.images.read_image", lambda path, upright: seen.append(upright) or read_image(path))
    flags = ["--resume", str(tmp_path / "a.pth"), "--workers", "0"]
    evaluate.main([*flags, "--dataset", "folder", "--data-root", str(turned)])
    assert seen and all(seen)
    seen.clear()
    evaluate.main([*flags, "--dataset", "cub", "--data-root", str(cub_root), "--allow-partial"])
    assert seen and not any(seen)


@pytest.mark.parametrize("orientation", ["upright", "stored", None])
def test_exported_file_records_the_orientation(orientation, turned, tmp_path):
    pytest.importorskip("safetensors")
    record = RECORD if orientation is None else RECORD | {"orientation": orientation}
    trees.save_checkpoint(tmp_path / "a.pth", net.create("tiny", 8), record)
    export.main(["--resume", str(tmp_path / "a.pth"), "--out", str(tmp_path / "a.safetensors"), "--check", str(turned)])
    assert exported.read(tmp_path / "a.safetensors")["network"]["orientation"] == (orientation or "stored")
    assert ("were rotated upright" in (tmp_path / "a-card.md").read_text()) == (orientation == "upright")


# Transparency


def cut_out(hidden):
    """A thing on a transparent ground, below which are these colours."""
    inside = np.hypot(*np.mgrid[-20:20, -28:28]) < 15
    colours = np.where(inside[..., None], np.asarray(picture()), hidden)
    return np.dstack([colours, inside * 255]).astype(np.uint8), inside


@pytest.mark.parametrize(
    "name", ["a.png", "a.webp", "a.tiff", "palette.png", "gray.png", "bytes.png", "index.png", "a.gif"]
)
def test_hidden_colours_do_not_count(name, tmp_path):
    results = []
    for hidden in (np.zeros(3), np.asarray(picture(2))):
        rgba, inside = cut_out(hidden)
        image, settings = Image.fromarray(rgba), {"lossless": True} if name == "a.webp" else {}
        if name == "gray.png":
            image = image.convert("LA")
        elif name == "palette.png":
            image = image.quantize(200)
        elif name in ("bytes.png", "index.png", "a.gif"):
            clear = 7 if hidden.ndim == 1 else 9
            image = Image.fromarray(np.where(inside, 3, clear).astype(np.uint8)).convert("P")
            image.putpalette(bytes(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8)))
            alphas = bytes(0 if i == clear else 255 for i in range(256))
            settings["transparency"] = alphas if name == "bytes.png" else clear
        image.save(tmp_path / name, **settings)
        results.append(pixels(tmp_path / name))
        assert (results[-1][~inside] == 255).all() and not (results[-1][inside] == 255).all()
    assert np.array_equal(*results)


def test_half_transparent_is_half_white(tmp_path):
    Image.new("RGBA", (4, 4), (100, 0, 200, 128)).save(tmp_path / "a.png")
    assert np.abs(pixels(tmp_path / "a.png")[0, 0].astype(int) - (177, 127, 227)).max() <= 1


def write_png(path, values, colour, bits=16, clear=b""):
    """A PNG of a kind that Pillow cannot write: 16 bits, or a transparent value."""
    part = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    rows = b"".join(b"\0" + row.astype(">u2" if bits == 16 else "u1").tobytes() for row in values)
    head = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], bits, colour, 0, 0, 0)
    chunks = part(b"IHDR", head) + (part(b"tRNS", clear) if clear else b"") + part(b"IDAT", zlib.compress(rows))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunks + part(b"IEND", b""))


def test_transparent_value_is_white(tmp_path):
    gray = np.full((4, 4), 40000, dtype=np.uint16)
    gray[0, 0] = 300
    write_png(tmp_path / "gray16.png", gray, 0, clear=struct.pack(">H", 300))
    write_png(tmp_path / "rgb16.png", np.dstack([gray] * 3), 2, clear=struct.pack(">3H", 300, 300, 300))
    Image.fromarray((gray >> 8).astype(np.uint8)).save(tmp_path / "gray8.png", transparency=1)
    Image.fromarray(np.dstack([gray >> 8] * 3).astype(np.uint8)).save(tmp_path / "rgb8.png", transparency=(1, 1, 1))
    Image.fromarray(np.where(gray < 400, 51, 153).astype(np.uint8)).save(tmp_path / "gray4.png", bits=4, transparency=3)
    for path in tmp_path.glob("*.png"):
        found = pixels(path)
        assert (found[0, 0] == 255).all() and (abs(found[1:].astype(int) - 155) < 3).all(), path.name


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "1", "P", "YCbCr"])
def test_opaque_images_are_what_pillow_converts(mode, tmp_path):
    name = "a.jpg" if mode in ("CMYK", "YCbCr") else "a.png"
    picture().convert(mode).save(tmp_path / name)
    with Image.open(tmp_path / name) as image:
        assert np.array_equal(pixels(tmp_path / name), np.asarray(image.convert("RGB")))


# 16 bits


def write_tiff(path, values, order="<", apart=False):
    """A TIFF of 16-bit colours, which Pillow cannot write; apart: one colour after the other."""
    height, width, channels = values.shape
    data = (values.transpose(2, 0, 1) if apart else values).astype(f"{order}u2").tobytes()
    strips, size = (channels, height * width * 2) if apart else (1, len(data))
    after = 8 + 2 + 12 * 10 + 4
    start = after + 2 * channels + 8 * strips
    offset, counts = (after + 2 * channels, after + 2 * channels + 4 * strips) if apart else (start, size)
    tags = [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, channels, after),
        (259, 3, 1, 1),
        (262, 3, 1, 2),
        (273, 4, strips, offset),
        (277, 3, 1, channels),
        (278, 4, 1, height),
        (279, 4, strips, counts),
        (284, 3, 1, 2 if apart else 1),
    ]
    entries = b"".join(
        struct.pack(f"{order}HHI", *tag[:3])
        + struct.pack(f"{order}HH" if tag[1:3] == (3, 1) else f"{order}I", tag[3], *[0][: tag[1:3] == (3, 1)])
        for tag in tags
    )
    tables = struct.pack(f"{order}{channels}H", *[16] * channels)
    tables += struct.pack(f"{order}{strips}I", *(start + i * size for i in range(strips)))
    tables += struct.pack(f"{order}{strips}I", *[size] * strips)
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HIH", 42, 8, len(tags))
    path.write_bytes(head + entries + struct.pack(f"{order}I", 0) + tables + data)


def deep(tmp_path, bits):
    """Files of 16 bits with values of fewer."""
    gray = np.linspace(0, 2**bits - 1, 64 * 64).reshape(64, 64).astype(np.uint16)
    rgb, full = np.dstack([gray] * 3), np.full_like(gray, 65535)
    write_png(tmp_path / "gray.png", gray, 0)
    write_png(tmp_path / "rgb.png", rgb, 2)
    write_png(tmp_path / "gray_alpha.png", np.dstack([gray, full]), 4)
    write_png(tmp_path / "rgb_alpha.png", np.dstack([rgb, full]), 6)
    Image.fromarray(gray).save(tmp_path / "gray.tiff")
    Image.fromarray(gray).save(tmp_path / "gray_lzw.tiff", compression="tiff_lzw")
    Image.frombytes("I;16B", (64, 64), gray.astype(">u2").tobytes()).save(tmp_path / "gray_big.tiff")
    write_tiff(tmp_path / "rgb.tiff", rgb)
    write_tiff(tmp_path / "rgb_big.tiff", rgb, ">")
    (tmp_path / "rgb.ppm").write_bytes(b"P6 64 64 65535\n" + rgb.astype(">u2").tobytes())
    (tmp_path / "gray.pgm").write_bytes(b"P5 64 64 65535\n" + gray.astype(">u2").tobytes())
    (tmp_path / "plain.pgm").write_text(f"P2 64 64 65535\n{' '.join(map(str, gray.ravel()))}")
    return sorted(path for path in tmp_path.iterdir() if path.suffix != ".pth")


@pytest.mark.parametrize("bits", [8, 9, 10, 12, 14, 15])
def test_fewer_bits_in_16_are_refused(bits, tmp_path):
    for path in (paths := deep(tmp_path, bits)):
        with pytest.raises(BadFile, match=rf"{path.name} cannot be read: .*; convert it to 8 bits per channel$"):
            read_image(path)
    assert len(paths) == 12


def test_16_bits_of_all_formats_are_scaled(tmp_path):
    expected = np.linspace(0, 255, 64 * 64).reshape(64, 64)
    for path in deep(tmp_path, 16):
        assert np.abs(pixels(path).astype(float) - expected[..., None]).max() <= 1, path.name


@pytest.mark.parametrize("largest", [1023, 4095, 32767])
def test_declared_range_is_scaled(largest, tmp_path):
    """PPM says its largest value, so even a dark image of it is what it is."""
    gray = np.linspace(0, largest // 4, 64 * 64).reshape(64, 64)
    (tmp_path / "a.pgm").write_bytes(b"P5 64 64 %d\n" % largest + gray.astype(">u2").tobytes())
    (tmp_path / "a.ppm").write_bytes(b"P6 64 64 %d\n" % largest + np.dstack([gray] * 3).astype(">u2").tobytes())
    for name in ("a.pgm", "a.ppm"):
        assert abs(int(pixels(tmp_path / name).max()) - 63) <= 1


def test_16_bit_colours_that_are_apart_are_refused(tmp_path):
    """Pillow gives other pixels."""
    write_tiff(tmp_path / "a.tiff", np.full((8, 8, 3), 60000, np.uint16), apart=True)
    with pytest.raises(BadFile, match="one after the other in 16 bits"):
        read_image(tmp_path / "a.tiff")


# Warnings and limits


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_16_bit_gray_whose_white_is_0_is_refused(compression, tmp_path):
    """Pillow takes it for black; of 8 bits it does not."""
    Image.new("I;16", (8, 8)).save(tmp_path / "a.tiff", compression=compression, tiffinfo={262: 0})
    with pytest.raises(BadFile, match="its white is stored as 0 in 16 bits"):
        read_image(tmp_path / "a.tiff")


def test_no_warnings_of_libraries(tmp_path):
    """In a process of its own: pytest has its own filters."""
    palette = picture().quantize(8)
    palette.save(tmp_path / "palette.png", transparency=bytes([0, 128, 255, 255, 255, 255, 255, 255]))
    Image.new("L", (10000, 9500), 200).save(tmp_path / "large.png")
    picture().save(tmp_path / "exif.jpg", exif=exif(6)[:-8])
    picture().save(buffer := io.BytesIO(), "TIFF", compression="tiff_lzw")
    (tmp_path / "cut.tiff").write_bytes(buffer.getvalue()[:-20])
    (tmp_path / "tags.tiff").write_bytes(buffer.getvalue().replace(struct.pack("<H", 282), struct.pack("<H", 65000)))
    program = f"""
import sys
sys.path.insert(0, {str(REPOSITORY)!r})
from dataset.check import inspect
for image in inspect({sorted(map(str, tmp_path.iterdir()))!r}, 0):
    print(image.path, image.problem)
"""
    done = subprocess.run([sys.executable, "-W", "default", "-c", program], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == "" and done.stdout.count("\n") == 5


def test_too_many_pixels_are_one_line(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    picture().save(tmp_path / "panorama.png")
    with pytest.raises(BadFile) as error:
        read_image(tmp_path / "panorama.png")
    assert str(error.value) == (
        f"The image {tmp_path}/panorama.png cannot be read: it has more than the allowed 2,000 pixels; make it smaller"
    )


# torch.hub


def test_transform_of_the_hub_is_evaluation_in_all_modes(turned, tmp_path):
    trees.save_checkpoint(tmp_path / "a.pth", net.create("resnet18", 8), RECORD | {"model": "resnet18"})
    _, transform = hubconf.embedding(str(tmp_path / "a.pth"))
    rgba, _ = cut_out(np.asarray(picture(2)))
    Image.fromarray(rgba).save(tmp_path / "alpha.png")
    Image.fromarray(rgba).convert("LA").save(tmp_path / "gray_alpha.png")
    picture().quantize(8).save(tmp_path / "bytes.png", transparency=bytes([0, 128, 255, 255, 255, 255, 255, 255]))
    picture().quantize(8).save(tmp_path / "palette.gif", transparency=3)
    picture().convert("CMYK").save(tmp_path / "cmyk.jpg")
    picture().convert("F").save(tmp_path / "float.tiff")
    (tmp_path / "deep").mkdir()
    (tmp_path / "dark").mkdir()
    paths = [*turned.rglob("*.png"), *tmp_path.glob("*.*g"), *tmp_path.glob("*.gif"), *tmp_path.glob("*.tiff")]
    refused = 0
    for path in [*paths, *deep(tmp_path / "deep", 16), *deep(tmp_path / "dark", 12)]:
        with Image.open(path) as image:
            try:
                expected = transforms.Evaluation(32, crop=1.0)(read_image(path))
            except BadFile:
                refused += 1
                with pytest.raises(ValueError, match="convert it to 8 bits"):
                    transform(image)
                continue
            assert torch.equal(transform(image), expected), path
    assert refused == 13
    assert torch.equal(transform(picture()), transform(picture().convert("RGBA")))  # made in memory


# What is left out


@pytest.fixture
def phone(tmp_path):
    """Folders with files of all kinds, of which three are read without an optional library in any case."""
    for number, name in enumerate(("ant/1.JPG", "ant/2.jpeg", "bee/1.jpg")):
        trees.write_image(tmp_path / "phone" / name, number)
    for name in (
        "ant/x.CR2",
        "ant/y.dng",
        "ant/z.MOV",
        "bee/deep/a.cr2",
        "bee/noending",
        "bee/._a.nef",
        "bee/notes.txt",
        "bee/1.xmp",
        "bee/a.\x1b[31mred",
        "ant/Thumbs.db",
        "ant/desktop.ini",
    ):
        (tmp_path / "phone" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "phone" / name).write_bytes(b"no image")
    return tmp_path / "phone"


def test_files_that_are_left_out_are_named(phone, tmp_path, capsys):
    def printed(run, *flags):
        run([*map(str, flags)])
        return "".join(capsys.readouterr())

    data = ["--dataset", "folder", "--data-root", phone, "--workers", "0"]
    counted = printed(dataset_main, "check", "folder", "--data-root", phone, "--workers", "0")
    assert sorted(re.search("Left out: (.*);", counted)[1].split(", ")) == [
        "1 .dng",
        "1 .mov",
        "2 .cr2",
        "2 without an extension",
    ]
    assert counted.count("Left out") == printed(evaluate.main, *ALONE, *data).count("Left out") == 1
    index, query = ["--images", phone, "--out", tmp_path / "index"], ["query", "--index", tmp_path / "index"]
    assert printed(search.main, "index", *ALONE, *index).count("1 .dng") == 1
    assert printed(search.main, *query, phone / "ant", phone / "bee").count("2 .cr2") == 1
    assert "Left out" not in printed(search.main, *query, phone / "ant" / "1.JPG")
    pytest.importorskip("safetensors")
    trees.save_checkpoint(tmp_path / "a.pth", net.create("tiny", 8), RECORD)
    check = ["--resume", tmp_path / "a.pth", "--out", tmp_path / "a.safetensors", "--check", phone]
    assert printed(export.main, *check).count("1 .mov") == 1


def test_folder_of_nothing_but_others_says_so(tmp_path, capsys):
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "1.NEF").write_bytes(b"")
    words = "Left out: 1 .nef; convert photos to JPEG"
    with pytest.raises(BadFile, match=f"The class folder .*bee has no images. {words}"):
        dataset.load("folder", tmp_path, "eval")
    with pytest.raises(FileNotFoundError, match=f"There are no images in .*ant. {words}"):
        search.images_at(str(tmp_path / "ant"))
    assert not capsys.readouterr().out


def test_line_on_what_is_left_out_is_short():
    assert files.describe_skipped(Counter()) == ""
    assert files.describe_skipped(files.count_skipped([f"{i}.e{i}" for i in range(20)])).count(",") == files.SHOWN
    assert files.count_skipped(["a.txt", "b.json", ".c.nef", "Thumbs.db", "d.jpg"]) == Counter()


def test_photos_of_an_iphone_without_the_library(tmp_path):
    """In a process that has no pillow-heif, HEIC is named with the remedy, also under another name."""
    (tmp_path / "a").mkdir()
    for name in ("1.HEIC", "2.jpg"):
        (tmp_path / "a" / name).write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    program = f"""
import sys
sys.modules["pillow_heif"] = None
sys.path.insert(0, {str(REPOSITORY)!r})
from pathlib import Path
from dataset import files, folder
contents = folder.scan(Path({str(tmp_path)!r}))
print(len(contents.images), files.describe_skipped(contents.skipped))
try:
    files.read_image(contents.images[0])
except files.BadFile as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        "1 Left out: 1 .heic; pip install pillow-heif reads .heic",
        f"The image {tmp_path}/a/2.jpg cannot be read: it may be HEIC; pip install pillow-heif reads it",
    ], done.stderr


def test_photos_of_an_iphone_with_the_library(tmp_path):
    pytest.importorskip("pillow_heif")
    files.formats()
    for number, name in enumerate(("ant/1.HEIC", "bee/1.heif")):
        (tmp_path / name).parent.mkdir()
        picture(number).save(tmp_path / name, format="HEIF", quality=-1)
    images = dataset.load("folder", tmp_path, "eval")
    for workers in (0, 2):
        ((batch, _),) = dataset.eval_loader(images, 1, workers)
        assert np.abs(batch[0].permute(1, 2, 0).numpy().astype(int) - np.asarray(picture(1))).max() <= 3


# Folders that are no classes


@pytest.mark.parametrize(
    "names",
    [
        ("train", "val", "test"),
        ("Train", "TEST"),
        ("training", "validation", "birds"),
        ("images", "masks"),
        ("train2017", "val2017"),
        ("train_set", "test_set"),
        ("query", "gallery"),
        ("images",),
        ("train",),
        ("train", "test1"),
        ("images_train", "images_val"),
        ("x-train", "x-test"),
        ("bounding_box_train", "bounding_box_test", "query", "gt_bbox"),
    ],
)
def test_splits_are_no_classes(names, tmp_path):
    for name in names:
        trees.write_image(tmp_path / name / "ant" / "1.jpg", 0)
    likely = next((name for name in names if re.search("^im|train", name.lower())), sorted(names)[0])
    words = rf"which are no classes: .* --data-root {re.escape(str(tmp_path / likely))}, .*--dataset csv"
    for split in ("train", "eval"):
        with pytest.raises(BadFile, match=words):
            dataset.load("folder", tmp_path, split)


def test_classes_may_have_the_name_of_a_split(tmp_path):
    for name in ("bus", "car", "train", "tram"):
        trees.write_image(tmp_path / name / "1.jpg", 0)
    assert dataset.load("folder", tmp_path, "eval").classes == ["train", "tram"]


def test_classes_may_all_have_the_word_of_a_split(tmp_path):
    for name in ("freight_train", "steam train"):
        trees.write_image(tmp_path / name / "1.jpg", 0)
    assert dataset.load("folder", tmp_path, "eval").classes == ["steam train"]


def test_what_systems_write_is_hidden(tmp_path):
    names = ("@eaDir", "__MACOSX", "$RECYCLE.BIN", "System Volume Information", ".thumbnails", "#recycle")
    trees.folder(tmp_path, classes=("ant", "bee", *names))
    for name in names:
        trees.write_image(tmp_path / "bee" / name / "1.jpg", 0)
    (tmp_path / "bee" / "._1.jpg").write_bytes(b"")
    images = dataset.load("folder", tmp_path, "eval")
    assert images.classes == ["bee"] and len(images) == 6
    assert len(folder.scan(tmp_path).images) == 12 and files.is_hidden("thumbs.DB") and not files.is_hidden("a.jpg")


def test_folder_reached_through_a_link_counts_once(tmp_path):
    trees.folder(tmp_path / "photos", classes=("ant", "bee", "cat"))
    (tmp_path / "photos" / "all").mkdir()
    (tmp_path / "photos" / "all" / "again").symlink_to(tmp_path / "photos" / "bee")
    assert len(search.images_at(str(tmp_path / "photos"))) == 18
    (tmp_path / "photos" / "all" / "again").unlink()
    (tmp_path / "photos" / "all").rmdir()
    (tmp_path / "photos" / "dog").symlink_to(tmp_path / "photos" / "ant")
    with pytest.raises(BadFile, match="ant and .*dog are the same folder: remove one of the links"):
        dataset.load("folder", tmp_path / "photos", "eval")
    (tmp_path / "photos" / "dog").unlink()
    (tmp_path / "photos" / "dog").symlink_to(tmp_path / "photos" / "ant" / "more")
    with pytest.raises(BadFile, match="dog is a folder in .*ant: its images would belong to two classes"):
        dataset.load("folder", tmp_path / "photos", "train")
