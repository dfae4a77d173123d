"""Duplicate images: identical files, and near duplicates, whose perceptual hashes differ in few bits."""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
from PIL import Image

from proxy_anchor.files import quantity

THRESHOLD = 4  # of 64 bits: resized, recompressed and slightly edited copies are below it, unrelated photos at about 32
FLAT = 4.0  # standard deviation of grey values (0 to 255) below which a perceptual hash only reflects noise
BLOCK = 1 << 17  # pairs at a time, to fit a CPU cache
SHOWN, CANDIDATES = 10, 1000  # closest pairs: listed, and kept while searching
SPLITS = ("train", "test", "both")  # of the two images of a pair
MISSING = "Near duplicates were not checked, only identical files: pip install imagehash"


def available() -> bool:
    """Whether the library for perceptual hashes is installed."""
    return find_spec("imagehash") is not None


def perceptual_hash(pixels: np.ndarray) -> int | None:
    """The 64 bits of imagehash.phash for uint8 RGB (H, W, 3); None for nearly uniform images, which all look alike."""
    import imagehash  # optional

    small = Image.fromarray(pixels).convert("L").resize((32, 32), Image.Resampling.LANCZOS)  # as phash does
    return int(str(imagehash.phash(small)), 16) if np.asarray(small).std() >= FLAT else None


def near_pairs(hashes: np.ndarray, threshold: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(i, j, bits) of the pairs i < j of hashes, uint64 (N,), that differ in at most `threshold` bits, in blocks."""
    rows = max(1, BLOCK // max(1, len(hashes)))
    for start in range(0, len(hashes), rows):
        bits = bit_count(hashes[start : start + rows, None] ^ hashes[start:])
        i, j = np.nonzero(bits <= threshold)
        i, j = i[i < j], j[i < j]
        if len(i):
            yield start + i, start + j, bits[i, j]


def bit_count(numbers: np.ndarray) -> np.ndarray:
    """The number of ones in each uint64: counted in groups of 2, 4 and 8 bits, then summed by a multiplication."""
    # np.bitwise_count takes half of the time, but needs numpy 2.
    one, two, four, fifty_six = np.array([1, 2, 4, 56], dtype=np.uint64)
    fives, threes, fifteens, ones = (np.uint64(int(byte * 8, 16)) for byte in ("55", "33", "0f", "01"))
    numbers = numbers - (numbers >> one & fives)
    numbers = (numbers & threes) + (numbers >> two & threes)
    numbers = numbers + (numbers >> four) & fifteens
    return (numbers * ones >> fifty_six).astype(np.uint8)


@dataclass
class Duplicates:
    """Numbers of identical and near-duplicate pairs, and the closest pairs.

    same, near: the number of pairs in each of SPLITS. in_two_classes: the number of different-class pairs of each kind.
    closest: (first, second, bits) of pairs, sorted by bits, each image once; bits is -1 for identical files.
    """

    same: np.ndarray
    near: np.ndarray
    in_two_classes: tuple[int, int]
    closest: list[tuple[int, int, int]]


def find(hashes, digests, tests, classes, groups) -> Duplicates:
    """The duplicates among N images. Arguments (N,): uint64 hashes, digests, is-test flags, classes, groups.

    Pairs within a group are skipped, because they are known to be alike: groups are numbers, -1 for none, and numbered
    separately for training and test images.
    """
    counts, in_two_classes = np.zeros((2, len(SPLITS)), dtype=int), np.zeros(2, dtype=int)
    closest = np.empty((0, 4), dtype=int)
    for i, j, bits in near_pairs(hashes, THRESHOLD):
        same_group = (groups[i] == groups[j]) & (groups[i] >= 0) & (tests[i] == tests[j])
        i, j, bits = i[~same_group], j[~same_group], bits[~same_group].astype(int)
        bits[digests[i] == digests[j]] = -1
        near, two_classes = (bits >= 0).astype(int), classes[i] != classes[j]
        split = np.where(tests[i] == tests[j], tests[i].astype(int), SPLITS.index("both"))
        np.add.at(counts, (near, split), 1)
        np.add.at(in_two_classes, near[two_classes], 1)
        closest = np.concatenate([closest, np.stack([bits, ~two_classes, i, j], axis=1)])
        closest = closest[np.lexsort(closest.T[::-1])][:CANDIDATES]
    listed: list[tuple[int, int, int]] = []
    seen: set[int] = set()
    for bits, _, i, j in closest.tolist():
        if not {i, j} & seen:
            listed.append((i, j, bits))
            seen |= {i, j}
    same, near = counts
    return Duplicates(same, near, tuple(in_two_classes.tolist()), listed)


def describe(images: list, tests: list[bool], classes: list, groups: list[int]) -> list[str]:
    """Lines on the duplicates among check.Images, and on checks that were not possible."""
    # Without a perceptual hash, 64 bits of the digest: equal for identical files, and far from all others.
    bits = [int(image.digest[:16], 16) if image.perceptual is None else image.perceptual for image in images]
    digests = np.unique([image.digest for image in images], return_inverse=True)[1]
    labels = np.unique(list(map(str, classes)), return_inverse=True)[1]
    pairs = find(np.array(bits, dtype=np.uint64), digests, np.array(tests), labels, np.array(groups))

    lines = []
    if not available():
        lines.append(MISSING)
    elif flat := sum(image.perceptual is None for image in images):
        lines.append(f"{quantity(flat, 'nearly uniform image')}: checked for identical files only")
    if not pairs.closest:
        return [*lines, "No duplicates: no identical files" + f", nor hashes within {THRESHOLD} bits" * available()]
    lines.append(f"{'pairs of images':<30}" + "".join(f"  {split:>7}" for split in SPLITS) + "  classes differ")
    for name, counts, two in zip(
        ("identical files", f"at most {THRESHOLD} of 64 bits apart"), (pairs.same, pairs.near), pairs.in_two_classes
    ):
        lines.append(f"  {name:<28}" + "".join(f"  {count:>7,}" for count in counts) + f"  {two:>14,}")
    lines.append("The closest pairs, each image once:")
    for i, j, bits_apart in pairs.closest[:SHOWN]:
        kind = "identical" if bits_apart < 0 else f"{bits_apart} bits"
        split = SPLITS[2 if tests[i] != tests[j] else tests[i]]
        same = f"both {classes[i]}" if classes[i] == classes[j] else f"{classes[i]} and {classes[j]}"
        lines.append(f"  {kind:<9}  {split:<5}  {images[i].path} = {images[j].path} ({same})")
    return lines
