import fcntl
import multiprocessing
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import trees
from PIL import Image
from torchvision.transforms import v2

import dataset
from dataset import cars, cub, files, glyphs, inshop, sop, transforms
from dataset.cache import Cache
from dataset.check import inspect
from dataset.files import BadFile
from dataset.loading import BalancedBatches, RandomBatches, parallel
from proxy_anchor import files as files_leaf

# The published layouts


def names(images):
    return [os.path.basename(path) for path in images.paths]


def test_cub(cub_root):
    train = dataset.load("cub", cub_root, "train", allow_partial=True)
    test = dataset.load("cub", cub_root, "eval", allow_partial=True)
    assert (len(train), train.num_classes, len(test), test.num_classes) == (24, 4, 18, 3)
    assert train.labels.tolist() == [c for c in range(4) for _ in range(6)]
    assert names(test)[6] == "Bird_102_0000.jpg" and test[6][1] == 1
    assert test[6][0].dtype == torch.uint8


@pytest.mark.parametrize("layout", [trees.cars, trees.cars_devkit])
def test_cars(tmp_path, layout):
    layout(tmp_path)
    train = dataset.load("cars", tmp_path, "train", allow_partial=True)
    test = dataset.load("cars", tmp_path, "eval", allow_partial=True)
    assert (len(train), train.num_classes, len(test), test.num_classes) == (12, 3, 12, 3)
    assert np.bincount(train.labels).tolist() == [4, 4, 4]


def test_cars_labels_beside_the_devkit(tmp_path):
    trees.cars_devkit(tmp_path)
    with_labels = "cars_test_annos_withlabels.mat"
    (tmp_path / "cars196" / "devkit" / with_labels).rename(tmp_path / "cars196" / with_labels)
    assert len(dataset.load("cars", tmp_path, "eval", allow_partial=True)) == 12


def test_sop(tmp_path):
    trees.sop(tmp_path)
    test = dataset.load("SOP", tmp_path, "eval", allow_partial=True)
    assert (len(test), test.num_classes, test.labels.tolist()) == (9, 3, [0, 0, 0, 1, 1, 1, 2, 2, 2])
    assert names(test)[0] == "111085134189_0.JPG"


@pytest.mark.parametrize("table, images", [("Eval", "Img"), (".", "."), ("Anno", "Img"), ("Anno", ".")])
def test_inshop(tmp_path, table, images):
    trees.inshop(tmp_path, table, images)
    train = dataset.load("Inshop", tmp_path, "train", allow_partial=True)
    query = dataset.load("Inshop", tmp_path, "query", allow_partial=True)
    gallery = dataset.load("Inshop", tmp_path, "gallery", allow_partial=True)
    assert (len(train), train.num_classes) == (8, 2)
    assert query.labels.tolist() == gallery.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert names(query) != names(gallery)


def test_query_and_gallery_share_labels_when_ids_differ(tmp_path):
    trees.inshop(tmp_path)
    path = tmp_path / "Inshop_Clothes" / "Eval" / "list_eval_partition.txt"
    rows = [row for row in path.read_text().splitlines() if not ("id_00000003" in row and row.endswith("query"))]
    path.write_text("\n".join(rows) + "\n")
    assert dataset.load("Inshop", tmp_path, "query", allow_partial=True).labels.tolist() == [1, 1, 2, 2]


@pytest.mark.parametrize(
    "name, make, sizes",
    [
        ("cub", trees.cub, {"train": (4, 24), "eval": (3, 18)}),
        ("cars", trees.cars, {"train": (3, 12), "eval": (3, 12)}),
        ("SOP", trees.sop, {"train": (3, 9), "eval": (3, 9)}),
        ("Inshop", trees.inshop, {"train": (2, 8), "query": (3, 6), "gallery": (3, 6)}),
    ],
)
def test_sizes_are_checked(tmp_path, monkeypatch, name, make, sizes):
    make(tmp_path)
    for split in sizes:
        with pytest.raises(BadFile, match=rf"{name} {split}: found .* expected .* Likely cause: .*--allow-partial"):
            dataset.load(name, tmp_path, split)
    monkeypatch.setattr(dataset.BENCHMARKS[name], "SIZES", sizes)
    for split, (classes, images) in sizes.items():
        loaded = dataset.load(name, tmp_path, split)
        assert (loaded.num_classes, len(loaded)) == (classes, images)


@pytest.mark.parametrize("name, make", [("cub", trees.cub), ("Inshop", trees.inshop)])
def test_open_reads_each_split_once(tmp_path, monkeypatch, name, make):
    make(tmp_path)
    source, read = dataset.BENCHMARKS[name], []
    samples = source.samples
    monkeypatch.setattr(source, "samples", lambda folder, split: read.append(split) or samples(folder, split))
    found = dataset.open_splits(name, tmp_path, 32, allow_partial=True)
    assert read == dataset.splits(name, tmp_path) == list(found)
    assert list(found) == [images.name.split()[1] for images in found.values()]
    for split, images in found.items():
        alone = dataset.load(name, tmp_path, split, allow_partial=True)
        assert (images.paths, images.classes) == (alone.paths, alone.classes)
        assert images.labels.tolist() == alone.labels.tolist()


def test_published_sizes():
    assert cub.SIZES == {"train": (100, 5864), "eval": (100, 5924)}
    assert cars.SIZES == {"train": (98, 8054), "eval": (98, 8131)}
    assert sop.SIZES == {"train": (11318, 59551), "eval": (11316, 60502)}
    assert inshop.SIZES == {"train": (3997, 25882), "query": (3985, 14218), "gallery": (3985, 12612)}


# What can be wrong


@pytest.mark.parametrize(
    "name, file",
    [("cub", "images"), ("cars", "cars_annos.mat"), ("SOP", "Ebay_train.txt"), ("Inshop", "list_eval_partition.txt")],
)
def test_missing_data_names_the_file_and_its_source(tmp_path, name, file):
    with pytest.raises(FileNotFoundError, match=rf"There is no .*{file}\. (Download|Needed)"):
        dataset.load(name, tmp_path, "train")


def test_missing_image_is_named(cub_root, tmp_path, monkeypatch):
    trees.sop(tmp_path)
    monkeypatch.setattr(sop, "SIZES", {"train": (3, 9), "eval": (3, 9)})
    (tmp_path / "Stanford_Online_Products" / "bicycle_final" / "111085122872_1.JPG").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 9; .*111085122872_1.JPG"):
        dataset.load("SOP", tmp_path, "train")
    assert len(dataset.load("SOP", tmp_path, "train", allow_partial=True)) == 8


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "ends before its header, line 1"),
        ("image_id class_id path\n", "line 1: expected the header"),
        ("image_id class_id super_class_id path\n1 1 1 a.JPG\n2 1\n", "line 3: expected 4 columns"),
        ("image_id class_id super_class_id path\n1 x 1 a.JPG\n", "line 2: the class_id 'x' is not a whole number"),
    ],
)
def test_malformed_table_names_the_line(tmp_path, text, message):
    trees.sop(tmp_path)
    (tmp_path / "Stanford_Online_Products" / "Ebay_train.txt").write_text(text)
    with pytest.raises(BadFile, match=rf"Ebay_train.txt.*{message}"):
        dataset.load("SOP", tmp_path, "train")


def test_malformed_mat_file(tmp_path):
    trees.cars(tmp_path)
    path = tmp_path / "cars196" / "cars_annos.mat"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(BadFile, match="cars_annos.mat is not an annotation file"):
        dataset.load("cars", tmp_path, "train")


def test_malformed_mat_record(tmp_path):
    from scipy.io import savemat

    trees.cars(tmp_path)
    fields = ["relative_im_path", "class"]
    savemat(
        tmp_path / "cars196" / "cars_annos.mat",
        {"annotations": trees._annotations([("car_ims/000001.jpg", 1), (5, "x")], fields)},
    )
    with pytest.raises(BadFile, match="record 2"):
        dataset.load("cars", tmp_path, "train")


def test_wrong_inshop_archive(tmp_path):
    trees.inshop(tmp_path)
    folder = tmp_path / "Inshop_Clothes" / "Img"
    trees.write_image(folder / "img" / "x.jpg", 0)
    for path in folder.glob("img/WOMEN/**/*.jpg"):
        Image.new("RGB", (750, 1101)).save(path)
    with pytest.raises(BadFile, match="img_highres.zip"):
        dataset.load("Inshop", tmp_path, "train", allow_partial=True)
    (folder / "img").rename(folder / "img_highres")
    with pytest.raises(FileNotFoundError, match="not img_highres.zip"):
        dataset.load("Inshop", tmp_path, "train")


def test_unknown_split(cub_root):
    with pytest.raises(ValueError, match="no split 'query'"):
        dataset.load("cub", cub_root, "query")


# Images


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    image = Image.new("RGB", (8, 8), (200, 180, 20)).convert(mode)
    path = tmp_path / ("image.tiff" if mode == "CMYK" else "image.png")
    image.save(path)
    rgb = files.read_image(path)
    assert rgb.dtype == torch.uint8 and files.image_size(path) == (8, 8)
    np.testing.assert_array_equal(rgb.permute(1, 2, 0), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("dtype, suffix", [(np.uint16, "png"), (np.uint16, "tiff"), (np.int32, "tiff")])
def test_16_bits_are_scaled(tmp_path, dtype, suffix):
    values = np.linspace(0, 65535, 64).reshape(8, 8).astype(dtype)
    Image.fromarray(values).save(tmp_path / f"image.{suffix}")
    rgb = files.read_image(tmp_path / f"image.{suffix}").permute(1, 2, 0).numpy()
    np.testing.assert_allclose(rgb, np.repeat(values[..., None] / 257, 3, axis=2), atol=0.5)


@pytest.mark.parametrize(
    "pixels",
    [
        np.linspace(0, 1, 64, dtype=np.float32),
        np.linspace(0, 255, 64, dtype=np.float32),
        np.arange(64, dtype=np.uint16),
        np.arange(192, 256, dtype=np.int32),
        np.linspace(0, 2**31 - 1, 64).astype(np.int32),
        np.linspace(-(2**15), 2**15 - 1, 64).astype(np.int32),
    ],
)
def test_pixels_of_an_unknown_range_are_refused(tmp_path, pixels):
    path = tmp_path / "image.tiff"
    Image.fromarray(pixels.reshape(8, 8)).save(path)
    with pytest.raises(BadFile, match=rf"{path} cannot be read: its pixels are \w+ from .* to .*, expected 16 bits"):
        files.read_image(path)


def test_black_is_black_in_16_bits(tmp_path):
    Image.fromarray(np.zeros((8, 8), dtype=np.uint16)).save(tmp_path / "image.png")
    assert files.read_image(tmp_path / "image.png").sum() == 0


def test_any_name_of_a_file_is_read(tmp_path):
    paths = [os.fsdecode(os.fsencode(tmp_path) + name) for name in (b"/\xff\xfe.jpg", "/\N{SNOWMAN}\n.jpg".encode())]
    for path in paths:
        trees.write_image(Path(path), 0)
    assert [image.problem for image in inspect(paths, workers=0)] == ["", ""]


def test_unreadable_image_is_named(tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    with pytest.raises(BadFile, match="bad.jpg cannot be read"):
        files.read_image(tmp_path / "bad.jpg")
    with pytest.raises(BadFile, match="none.jpg is missing"):
        files.read_image(tmp_path / "none.jpg")


# Transforms


@pytest.mark.parametrize("size, resized", [(224, 256), (256, 292), (324, 361), (448, 512), (64, 73)])
@pytest.mark.parametrize("shape", [(500, 375), (300, 421)])
def test_evaluation_transform_is_pils(size, resized, shape):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (shape[1], shape[0], 3), dtype=np.uint8))
    short, long = sorted(shape)
    target = (resized, int(resized * long / short))
    target = target if shape[0] == short else target[::-1]
    scaled = image.resize(target, Image.Resampling.BILINEAR)
    left, top = round((scaled.width - size) / 2), round((scaled.height - size) / 2)
    expected = np.asarray(scaled.crop((left, top, left + size, top + size)))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    difference = np.abs(transforms.Evaluation(size)(pixels).permute(1, 2, 0).numpy().astype(int) - expected)
    assert difference.mean() < 1 and difference.max() <= 3  # of 255


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_jpegs_are_what_pillow_decodes(tmp_path, mode):
    smooth = Image.effect_noise((90, 70), 60).resize((375, 251), Image.Resampling.BICUBIC).convert(mode)
    smooth.save(tmp_path / "image.jpg", quality=90)
    expected = np.asarray(Image.open(tmp_path / "image.jpg").convert("RGB"))
    np.testing.assert_array_equal(files.read_image(tmp_path / "image.jpg").permute(1, 2, 0), expected)


@pytest.mark.parametrize("shape", [(375, 500), (64, 64), (20, 300), (1, 1)])
@pytest.mark.parametrize("flip", [True, False])
def test_random_crop_is_torchvisions(shape, flip):
    """What is faster draws the same numbers and gives the same pixels, up to how torch 2.6 rounds them."""
    crop = v2.RandomResizedCrop(32, scale=(0.3, 1.0), interpolation=v2.InterpolationMode.BILINEAR, antialias=True)
    theirs = v2.Compose([crop, v2.RandomHorizontalFlip()]) if flip else crop
    ours = transforms.RandomCrop(32, (0.3, 1.0), flip)
    image = torch.randint(0, 256, (*shape, 3), dtype=torch.uint8).permute(2, 0, 1)
    for layout in (image, image.contiguous()):
        for seed in range(20):
            torch.manual_seed(seed)
            expected = theirs(layout)
            torch.manual_seed(seed)
            difference = (ours(layout).int() - expected.int()).abs().float()
            assert difference.max() <= 1 and difference.mean() < 0.3


def test_training_crops_have_the_published_distribution():
    """The boxes against those drawn by the published description, written out: area, shape and place."""
    from scipy.stats import ks_2samp

    def published_box(random, height, width):
        while True:
            area = height * width * random.uniform(0.08, 1)
            ratio = np.exp(random.uniform(np.log(3 / 4), np.log(4 / 3)))
            w, h = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
            if w <= width and h <= height:  # (torchvision gives up after 10 draws, which is rare)
                return random.integers(0, height - h + 1), random.integers(0, width - w + 1), h, w

    crop, image = transforms.RandomCrop(32).crop, torch.zeros(3, 375, 500, dtype=torch.uint8)
    boxes = [
        [box[key] for key in ("top", "left", "height", "width")]
        for box in (crop.make_params([image]) for _ in range(3000))
    ]
    random = np.random.default_rng(0)
    expected = np.array([published_box(random, 375, 500) for _ in range(3000)])
    for column in range(4):
        assert ks_2samp(np.array(boxes)[:, column], expected[:, column]).pvalue > 1e-3
    shares = [np.prod(values[:, 2:], axis=1) for values in (np.array(boxes), expected)]
    assert ks_2samp(*shares).pvalue > 1e-3


def test_glyphs_are_never_mirrored():
    image = torch.zeros(3, 64, 64, dtype=torch.uint8)
    image[:, :, 32:] = 255  # dark left, light right
    mild = transforms.RandomCrop(32, **glyphs.AUGMENTATION)
    full = transforms.RandomCrop(32)

    def mirrored(transform):
        return [bool((x := transform(image)[0].float())[:, 0].mean() > x[:, -1].mean()) for _ in range(60)]

    assert not any(mirrored(mild)) and any(mirrored(full))


# Sampling and randomness


def keys(sampler, epoch=0):
    sampler.set_epoch(epoch)
    return [[index for _, _, index in batch] for batch in sampler]


def test_random_batches_are_a_shuffle_without_the_rest():
    batches = keys(RandomBatches(np.zeros(23), 5, seed=1))
    assert [len(b) for b in batches] == [5, 5, 5, 5]
    assert len({i for b in batches for i in b}) == 20
    assert batches == keys(RandomBatches(np.zeros(23), 5, seed=1)) != keys(RandomBatches(np.zeros(23), 5, seed=2))
    assert batches != keys(RandomBatches(np.zeros(23), 5, seed=1), epoch=1)


@pytest.mark.parametrize("batch_size, per_class, size", [(12, 3, 12), (10, 4, 8), (6, 6, 6), (8, 1, 8)])
def test_balanced_batches(batch_size, per_class, size):
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(9), 5))
    sampler = BalancedBatches(labels, batch_size, per_class, seed=1)
    batches = keys(sampler)
    assert len(batches) == len(sampler) == 45 // batch_size
    for batch in batches:
        counts = np.bincount(labels[batch])
        assert len(batch) == size and set(counts) <= {0, per_class} and (counts > 0).sum() == size // per_class
    assert batches == keys(BalancedBatches(labels, batch_size, per_class, seed=1)) != keys(sampler, epoch=1)


def test_wrong_batch_sizes():
    with pytest.raises(ValueError, match="larger than the training set of 9 images"):
        RandomBatches(np.zeros(9), 10, seed=1)
    with pytest.raises(ValueError, match="between 1 and the batch size"):
        BalancedBatches(np.zeros(9), 4, 5, seed=1)
    with pytest.raises(ValueError, match="needs 4 classes per batch, but the training set has 2"):
        BalancedBatches(np.repeat([0, 1], 5), 8, 2, seed=1)


def epoch_of(cub_root, workers, epoch, per_class=None):
    loader = dataset.train_loader(
        dataset.train_set("cub", cub_root, 32, allow_partial=True), 6, per_class, seed=3, workers=workers
    )
    loader.batch_sampler.set_epoch(epoch)
    return [(images, labels) for images, labels in loader]


def test_the_number_of_workers_changes_nothing(cub_root):
    alone = epoch_of(cub_root, 0, epoch=2)
    torch.manual_seed(99)  # nor does what was drawn before
    for (a, la), (b, lb) in zip(alone, epoch_of(cub_root, 2, epoch=2), strict=True):
        assert torch.equal(a, b) and torch.equal(la, lb)
    assert not torch.equal(alone[0][0], epoch_of(cub_root, 0, epoch=1)[0][0])


@pytest.mark.parametrize("sampler", [RandomBatches, lambda *a, **k: BalancedBatches(a[0], a[1], 2, *a[2:], **k)])
def test_views_come_one_after_the_other(sampler):
    """All first views, then all second ones, of the images that one view has; processes have consecutive parts."""
    labels = np.arange(30) % 5
    single, double = sampler(labels, 6, 3), sampler(labels, 6, 3, views=2)
    single.set_epoch(4)
    double.set_epoch(4)
    assert double.images_per_batch == 12 and len(double) == len(single)
    batches = list(double)
    for keys, once in zip(batches, single, strict=True):
        assert keys == [(3, 4, view, index) for view in (0, 1) for _, _, index in once]
    parts = [sampler(labels, 6, 3, (rank, 5), views=2) for rank in range(5)]
    for part in parts:
        part.set_epoch(4)
    assert [[key for keys in shares for key in keys] for shares in zip(*parts)] == batches


def test_views_of_an_image_differ(cub_root):
    images = dataset.train_set("cub", cub_root, 32, allow_partial=True)
    loader = dataset.train_loader(images, 4, 2, seed=3, workers=0, views=2)
    loader.batch_sampler.set_epoch(1)
    keys = next(iter(loader.batch_sampler))
    batch, labels = next(iter(loader))
    assert batch.shape == (8, 3, 32, 32) and torch.equal(labels[:4], labels[4:])
    for i, (seed, epoch, view, index) in enumerate(keys):
        assert torch.equal(batch[i], images[seed, epoch, view, index][0])
        assert not torch.equal(batch[i], batch[(i + 4) % 8])


def test_augmentation_depends_on_seed_epoch_and_index_alone(cub_root):
    images = dataset.train_set("cub", cub_root, 32, allow_partial=True)
    state = torch.get_rng_state()
    first = images[3, 1, 7][0]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(images[3, 1, 7][0], first)
    assert not torch.equal(images[3, 2, 7][0], first) and not torch.equal(images[4, 1, 7][0], first)


@pytest.mark.parametrize("workers", [0, 2])
def test_parallel_keeps_the_order_and_the_random_numbers(workers):
    state = torch.get_rng_state()
    assert list(parallel(str.upper, ["b", "a", "c"], workers)) == ["B", "A", "C"]
    assert torch.equal(torch.get_rng_state(), state)


# Glyphs


@pytest.fixture(scope="module")
def glyph_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("glyphs")
    dataset.load("glyphs", root, "train")
    return root


def test_glyphs_are_complete(glyph_root):
    train, test = (dataset.load("glyphs", glyph_root, split) for split in ("train", "eval"))
    assert not {os.path.dirname(p).rsplit("/")[-1] for p in train.paths} & {
        os.path.dirname(p).rsplit("/")[-1] for p in test.paths
    }
    for images in (train, test):
        counts = np.bincount(images.labels)
        assert counts.min() >= 12 and counts.max() <= 16
    assert train[0][0].shape == (3, 64, 64)


def test_glyphs_of_one_look_are_one_class(glyph_root):
    letters = {path.name for path in glyph_root.glob("glyphs/*/*")}
    assert "0041" in letters and "0391" not in letters and "0410" not in letters  # A, Alpha, Cyrillic A


def test_glyphs_are_drawn_the_same_again(glyph_root):
    from PIL import ImageFont

    path = glyph_root / "glyphs" / "train" / "0041" / "DejaVuSans-Bold.png"
    font = ImageFont.truetype(glyphs._font_path("DejaVuSans-Bold.ttf"), glyphs.FONT_SIZE)
    again = glyphs.draw_letter("A", font, np.random.default_rng([0x41, 1]))
    np.testing.assert_array_equal(np.asarray(Image.open(path)), np.asarray(again))


def test_glyphs_interrupted_leave_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(glyphs, "choose_letters", lambda characters: [0x41, None])
    with pytest.raises(TypeError):
        glyphs.draw(tmp_path / "glyphs")
    assert not list(tmp_path.iterdir())


# Cache


def cached(paths, folder, workers=0):
    lines = []
    cache = Cache(folder, paths)
    cache.build(workers, lambda batches, description: batches, lines.append)
    return cache, lines


@pytest.mark.parametrize("workers", [0, 2])
def test_cache_holds_the_decoded_images(tmp_path, workers):
    paths = dataset.load("cub", trees.cub(tmp_path / "data"), "train", allow_partial=True).paths
    Image.new("RGB", (1, 1)).save(paths[3])  # sizes differ
    cache, lines = cached(paths, tmp_path / "cache", workers)
    for index, path in enumerate(paths):
        assert torch.equal(cache[index], files.read_image(path))
    assert len(lines) == 1 and "Decoding 24 images" in lines[0]
    assert cached(paths, tmp_path / "cache")[1] == []  # it is there


def test_cache_is_built_anew_for_changed_images(tmp_path):
    paths = dataset.load("cub", trees.cub(tmp_path / "data"), "train", allow_partial=True).paths
    first, _ = cached(paths, tmp_path / "cache")
    trees.write_image(Path(paths[0]), 12345)
    os.utime(paths[0], (1, 1))
    for changed in (paths, paths[:-1], paths[::-1]):
        cache, lines = cached(changed, tmp_path / "cache")
        assert lines and cache.folder != first.folder
        assert torch.equal(cache[0], files.read_image(changed[0]))


def test_unfinished_cache_is_never_read(tmp_path, monkeypatch):
    paths = dataset.load("cub", trees.cub(tmp_path / "data"), "train", allow_partial=True).paths
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", lambda *names: (_ for _ in ()).throw(KeyboardInterrupt))
        cached(paths, tmp_path / "cache")
    assert list((tmp_path / "cache").glob("*.unfinished"))
    cache, lines = cached(paths, tmp_path / "cache")
    assert lines and torch.equal(cache[5], files.read_image(paths[5]))
    assert not list((tmp_path / "cache").glob("*.unfinished"))


def test_what_killed_processes_left_is_removed(tmp_path):
    paths = dataset.load("cub", trees.cub(tmp_path / "data"), "train", allow_partial=True).paths
    dead, alive = "d" * 20, "a" * 20
    for name in (dead, alive):
        (tmp_path / "cache" / f"{name}.unfinished").mkdir(parents=True)
        (tmp_path / "cache" / f"{name}.unfinished" / "images.bin").write_bytes(b"half")
    (tmp_path / "cache" / "thesis.unfinished").mkdir()  # the user's own
    with open(tmp_path / "cache" / f"{alive}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        cached(paths, tmp_path / "cache")
        left = sorted(path.name for path in (tmp_path / "cache").glob("*.unfinished"))
        assert left == [f"{alive}.unfinished", "thesis.unfinished"]
    cached(paths, tmp_path / "cache")
    assert [path.name for path in (tmp_path / "cache").glob("*.unfinished")] == ["thesis.unfinished"]


@pytest.mark.parametrize("content", ['{"a": 1}', "{}", "5", "[null]", '[["a"]]', "no JSON"])
def test_paths_of_another_program_in_the_folder_of_caches(tmp_path, content):
    paths = dataset.load("cub", trees.cub(tmp_path / "data"), "train", allow_partial=True).paths
    (tmp_path / "cache" / "p").mkdir(parents=True)
    (tmp_path / "cache" / "p" / "paths.json").write_text(content)
    assert len(cached(paths, tmp_path / "cache")[1]) == 1


def test_lock_of_a_cache_ends_with_its_process(tmp_path):
    """A worker that outlives it does not hold it."""
    context = multiprocessing.get_context("fork")
    with files_leaf.hold(tmp_path / "lock"):
        runs = context.Event()
        worker = context.Process(target=lambda: [runs.set(), time.sleep(60)])
        worker.start()
        assert runs.wait(60)
    try:
        files_leaf.hold(tmp_path / "lock", wait=False).close()
    finally:
        worker.kill()
        worker.join()


def test_older_caches_are_named(tmp_path):
    train, test = (
        dataset.load("cub", trees.cub(tmp_path / "data"), split, allow_partial=True).paths
        for split in ("train", "eval")
    )
    first, _ = cached(train, tmp_path / "cache")
    assert len(cached(test, tmp_path / "cache")[1]) == 1  # another part of the same dataset
    trees.write_image(Path(train[0]), 12345)
    os.utime(train[0], (1, 1))
    _, (line, _) = cached(train, tmp_path / "cache")
    assert line == (
        "Other caches of some of these images, or of deleted images, take 0.00 GB; "
        f"remove those that you no longer need: {first.folder}"
    )
    for path in test:
        os.remove(path)
    assert cached(train[:1], tmp_path / "cache")[1][0].count(str(tmp_path / "cache")) == 3  # that of what is gone, too


def test_cache_needs_room(tmp_path, monkeypatch):
    paths = dataset.load("cub", trees.cub(tmp_path / "data"), "train", allow_partial=True).paths
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": 1000}))
    with pytest.raises(OSError, match="has too little space: 92,160 bytes needed, 1,000 bytes free"):
        cached(paths, tmp_path / "cache")
    assert not [p for p in (tmp_path / "cache").iterdir() if p.is_dir()]


def zeroed(path):
    """Half of it, with the size and the times of before."""
    before = os.stat(path)
    path.write_bytes(path.read_bytes()[: before.st_size // 2].ljust(before.st_size, b"\0"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("name", ["images.bin", "shapes.npy", "seals.json"])
@pytest.mark.parametrize(
    "damage", [Path.unlink, lambda path: os.truncate(path, 0), lambda path: os.truncate(path, 99), zeroed]
)
def test_damaged_cache_is_named(tmp_path, name, damage):
    paths = dataset.load("cub", trees.cub(tmp_path / "data"), "train", allow_partial=True).paths
    cache, _ = cached(paths, tmp_path / "cache")
    damage(cache.folder / name)
    with pytest.raises(files.BadFile, match=f"The cache {cache.folder} is damaged .*: delete this folder"):
        cached(paths, tmp_path / "cache")


def test_image_that_changes_while_it_is_cached(tmp_path, monkeypatch):
    paths = dataset.load("cub", trees.cub(tmp_path / "data"), "train", allow_partial=True).paths
    monkeypatch.setattr("dataset.cache.image_size", lambda path, upright: (9, 9))  # it was, before
    with pytest.raises(files.BadFile, match=f"{paths[0]} changed while"):
        cached(paths, tmp_path / "cache")


def test_processes_build_one_cache(tmp_path):
    """Two at the same time: one builds, the other waits and finds it."""
    paths = dataset.load("cub", trees.cub(tmp_path / "data"), "train", allow_partial=True).paths
    with ThreadPoolExecutor(2) as pool:  # flock is between open files, of a process or of two
        lines = [lines for _, lines in pool.map(lambda _: cached(paths, tmp_path / "cache"), range(2))]
    assert sorted(map(len, lines)) == [0, 1]


@pytest.mark.parametrize("interpolation", [None, "bicubic"])
def test_cache_holds_what_evaluation_sees(tmp_path, interpolation):
    """Exactly, in the size of the network: photographs of one's own, large and small, and those of a benchmark."""
    own = trees.folder(tmp_path / "photos", images=2)
    Image.effect_noise((900, 1200), 80).convert("RGB").save(own / "new.png")
    paths = [str(path) for path in own.rglob("[n0-9]*.[jp][pn]g")]
    for upright in (True, False):
        plain, fast = (
            dataset.ImageDataset(
                paths,
                np.zeros(len(paths), int),
                [""],
                transforms.Evaluation(32, interpolation=interpolation),
                upright=upright,
            )
            for _ in range(2)
        )
        fast.use_cache(tmp_path / "cache", 0, lambda batches, description: batches, print)
        assert (fast.cache.folder / "images.bin").stat().st_size == len(paths) * 3 * 32 * 32
        assert all(torch.equal(plain[i][0], fast[i][0]) for i in range(len(paths)))


def test_cache_of_large_photographs_holds_what_training_needs(tmp_path):
    """A crop of the smallest share is not enlarged; small images and those of benchmarks keep every pixel."""
    sizes = [(3000, 4000), (4000, 300), (60, 50)]
    paths = [str(tmp_path / f"{width}.png") for width, _ in sizes]
    for path, size in zip(paths, sizes):
        Image.effect_noise(size, 80).convert("RGB").save(path)
    crop = transforms.RandomCrop(32)
    own, benchmark = (
        dataset.ImageDataset(paths, np.arange(3), [*"abc"], crop, upright=upright) for upright in (True, False)
    )
    for images in (own, benchmark):
        images.use_cache(tmp_path / "cache", 0, lambda batches, description: batches, print)
    assert [tuple(benchmark.cache[i].shape[1:]) for i in range(3)] == [(4000, 3000), (300, 4000), (50, 60)]
    large, long, small = (own.cache[i] for i in range(3))
    assert torch.equal(small, files.read_image(paths[2]))
    area = 32 * 32 / (0.08 * 3 / 4)
    for stored, (width, height) in zip((large, long), sizes):
        assert stored.shape[1] * stored.shape[2] == pytest.approx(area, rel=0.02)
        assert stored.shape[2] / stored.shape[1] == pytest.approx(width / height, rel=0.05)
    boxes = [crop.crop.make_params([large]) for _ in range(300)]
    assert min(min(box["height"], box["width"]) for box in boxes) >= 31  # of 32, rounded
    assert own[1, 0, 0][0].shape == (3, 32, 32)


def test_cache_changes_nothing(tmp_path):
    root = trees.cub(tmp_path / "data")
    plain, fast = (dataset.train_set("cub", root, 32, allow_partial=True) for _ in range(2))
    fast.use_cache(tmp_path / "cache", 0, lambda batches, description: batches, print)
    for workers in (0, 2):
        loaders = [dataset.train_loader(images, 8, None, 1, workers) for images in (plain, fast)]
        for (images, labels), (cached_images, cached_labels) in zip(*loaders, strict=True):
            assert torch.equal(images, cached_images) and torch.equal(labels, cached_labels)
