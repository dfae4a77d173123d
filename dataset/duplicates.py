"""Images that are there twice: the same files, and near duplicates, whose perceptual hashes differ in few bits."""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
from PIL import Image

THRESHOLD = 4  # bits of 64: resized, compressed and slightly edited copies are within it, other photos at about 32
FLAT = 4.0  # standard deviation of the grey values, of 255, below which a perceptual hash is that of the noise
BLOCK = 1 << 17  # pairs at a time: what a cache holds
SHOWN, CANDIDATES = 10, 1000  # of the list of the worst
PLACES = ("train", "test", "both")  # where the two images of a pair are
MISSING = "Near duplicates were not looked for, only the same files: pip install imagehash"


def available() -> bool:
    """Whether the library of the perceptual hash is installed."""
    return find_spec("imagehash") is not None


def perceptual_hash(pixels: np.ndarray) -> int | None:
    """The 64 bits of imagehash.phash, for uint8 RGB (H, W, 3); None for nearly uniform images, which all look alike."""
    import imagehash  # optional

    small = Image.fromarray(pixels).convert("L").resize((32, 32), Image.Resampling.LANCZOS)  # as phash does
    return int(str(imagehash.phash(small)), 16) if np.asarray(small).std() >= FLAT else None


def near_pairs(hashes: np.ndarray, most: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(i, j, bits): the pairs i < j of hashes, uint64 (N,), that differ in at most so many bits, block by block."""
    rows = max(1, BLOCK // max(1, len(hashes)))
    for start in range(0, len(hashes), rows):
        bits = bit_count(hashes[start : start + rows, None] ^ hashes[start:])
        i, j = np.nonzero(bits <= most)
        i, j = i[i < j], j[i < j]
        if len(i):
            yield start + i, start + j, bits[i, j]


def bit_count(numbers: np.ndarray) -> np.ndarray:
    """The number of ones in each uint64, counted in each two bits, four, eight, and then added up by a product."""
    # np.bitwise_count is in numpy 2 only, and takes half of the time.
    one, two, four, fifty_six = np.array([1, 2, 4, 56], dtype=np.uint64)
    fives, threes, fifteens, ones = (np.uint64(int(byte * 8, 16)) for byte in ("55", "33", "0f", "01"))
    numbers = numbers - (numbers >> one & fives)
    numbers = (numbers & threes) + (numbers >> two & threes)
    numbers = numbers + (numbers >> four) & fifteens
    return (numbers * ones >> fifty_six).astype(np.uint8)


@dataclass
class Duplicates:
    """Pairs of the same file and pairs of near duplicates, and the worst of both.

    same, near: how many pairs there are in each of PLACES. in_two_classes: those of each kind whose classes differ.
    worst: (first, second, bits) of pairs, the same files first, then by their bits, each image once; bits is -1 for
    the same file.
    """

    same: np.ndarray
    near: np.ndarray
    in_two_classes: tuple[int, int]
    worst: list[tuple[int, int, int]]


def find(hashes, digests, tests, classes, groups) -> Duplicates:
    """The duplicates among N images: uint64 hashes, digests of the files, whether they test, classes, groups.

    Pairs of one group, which are known to be alike, are left out: groups are numbers, and -1 for none; those of
    training and test images are not the same.
    """
    counts, in_two_classes = np.zeros((2, len(PLACES)), dtype=int), np.zeros(2, dtype=int)
    worst = np.empty((0, 4), dtype=int)
    for i, j, bits in near_pairs(hashes, THRESHOLD):
        known = (groups[i] == groups[j]) & (groups[i] >= 0) & (tests[i] == tests[j])
        i, j, bits = i[~known], j[~known], bits[~known].astype(int)
        bits[digests[i] == digests[j]] = -1
        near, two_classes = (bits >= 0).astype(int), classes[i] != classes[j]
        place = np.where(tests[i] == tests[j], tests[i].astype(int), PLACES.index("both"))
        np.add.at(counts, (near, place), 1)
        np.add.at(in_two_classes, near[two_classes], 1)
        worst = np.concatenate([worst, np.stack([bits, ~two_classes, i, j], axis=1)])
        worst = worst[np.lexsort(worst.T[::-1])][:CANDIDATES]
    listed: list[tuple[int, int, int]] = []
    seen: set[int] = set()
    for bits, _, i, j in worst.tolist():
        if not {i, j} & seen:
            listed.append((i, j, bits))
            seen |= {i, j}
    same, near = counts
    return Duplicates(same, near, tuple(in_two_classes.tolist()), listed)


def describe(images: list, tests: list[bool], classes: list, groups: list[int]) -> list[str]:
    """Lines on the duplicates among check.Images, and on what could not be looked for."""
    # Where there is no perceptual hash, 64 bits of the digest: equal for the same file, and near to no other's.
    bits = [int(image.digest[:16], 16) if image.perceptual is None else image.perceptual for image in images]
    digests = np.unique([image.digest for image in images], return_inverse=True)[1]
    labels = np.unique(list(map(str, classes)), return_inverse=True)[1]
    found = find(np.array(bits, dtype=np.uint64), digests, np.array(tests), labels, np.array(groups))

    lines = []
    if not available():
        lines.append(MISSING)
    elif flat := sum(image.perceptual is None for image in images):
        lines.append(f"{flat:,} images are nearly uniform: among them, only the same files were looked for")
    if not found.worst:
        return [*lines, "No image is there twice" + f", nor within {THRESHOLD} of 64 bits" * available()]
    lines.append(f"{'pairs of images':<30}" + "".join(f"  {place:>7}" for place in PLACES) + "  classes differ")
    for name, counts, two in zip(
        ("the same file", f"at most {THRESHOLD} of 64 bits apart"), (found.same, found.near), found.in_two_classes
    ):
        lines.append(f"  {name:<28}" + "".join(f"  {count:>7,}" for count in counts) + f"  {two:>14,}")
    lines.append("The worst, each image once:")
    for i, j, bits_apart in found.worst[:SHOWN]:
        kind = "same file" if bits_apart < 0 else f"{bits_apart} bits"
        place = PLACES[2 if tests[i] != tests[j] else tests[i]]
        same = f"both {classes[i]}" if classes[i] == classes[j] else f"{classes[i]} and {classes[j]}"
        lines.append(f"  {kind:<9}  {place:<5}  {images[i].path} = {images[j].path} ({same})")
    return lines
