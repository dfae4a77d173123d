"""Search images by their content: build an index with a network, then find the neighbours of other images."""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import dataset
import net
from dataset.files import REMEDIES, BadFile, is_hidden, read_image, read_thumbnail
from dataset.folder import images_at, images_directly_in
from proxy_anchor import cli, figures, hardware
from proxy_anchor.files import printable, quantity
from proxy_anchor.index import flags
from proxy_anchor.spec import MEASURES, ORIENTATIONS, NetworkSpec

if TYPE_CHECKING:  # functions import them, with torch: --help does not wait for them
    import torch
    from PIL import Image

    from proxy_anchor.api import Answer, Search
    from proxy_anchor.embedding import Embedder
    from proxy_anchor.index.exchange import VectorFiles
    from proxy_anchor.index.store import Index

BLOCK = 2**14  # images that are embedded before they are written
AS_STORED = (
    "This index was built from photos as stored, without EXIF rotation, and stays that way; build a new index to have "
    "them upright"
)
NPROBES = (1, 4, 16, 64)  # those that recall is printed for; 1 is FAISS's default
EXAMPLES = """examples:
  index a folder of photos, and search it:
    python search.py index --resume logs/logs_cub/RUN --images photos --out photos.index
    python search.py query --index photos.index new.jpg --save neighbours.png
  before anything is trained, with a pretrained backbone:
    python search.py index --backbone-only --model resnet50 --images photos --out photos.index
  with several photos of each thing, in one folder per thing:
    python search.py index --resume logs/logs_cub/RUN --images things --by-folder --out things.index
    python search.py query --index things.index --by-folder new
  sort photos into things that nobody has labelled, of an index or of a folder:
    python search.py group photos.index --out groups.csv --page groups.html
    python search.py group photos --backbone-only --model resnet50 --things 20 --out groups.csv
  vectors for another engine, or from files that were embedded apart:
    python search.py export photos.index vectors.parquet
    python search.py index --vectors vectors --out photos.index
  ask on a page, in a browser on this machine:
    python search.py serve --index photos.index
"""
OF_DATASETS = ("--dataset", "--data-root", "--test-classes", "--allow-partial", "--cache")


def parse(argv=None) -> argparse.Namespace:
    parser: argparse.ArgumentParser = cli.Parser(
        prog="search.py", description=__doc__, epilog=EXAMPLES, allow_abbrev=False, formatter_class=cli.HelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="index|query|serve|group|export")
    form: dict[str, Any] = {"allow_abbrev": False, "formatter_class": cli.HelpFormatter, "epilog": EXAMPLES}
    make = commands.add_parser(
        "index",
        help="embed images into an index",
        usage="search.py index (--resume PATH | --backbone-only) (--images DIR | --split NAME) --out INDEX "
        "[--flag value ...]\n       search.py index --vectors PARQUET-OR-DIR --out INDEX [--flag value ...]\n"
        "       search.py index --vectors NPY --paths FILE --resume PATH --out INDEX ...",
        parents=[
            flags.index_options(),
            data := dataset.options(training=False, without=("--cache",)),
            net.options(training=False),
            hardware.options(without=("--compile",), several=False),
        ],
        description="Embed images into an index, with a checkpoint or a pretrained backbone. Run it again to embed "
        "those that are new or have changed, and to drop those whose files are gone.",
        **form,
    )
    commands.add_parser(
        "query",
        help="find the neighbours of images",
        usage="search.py query --index INDEX [--flag value ...] IMAGE [IMAGE ...]",
        parents=[flags.query_options()],
        description="Print the images of an index that are most similar to each of yours.",
        **form,
    )
    sort = commands.add_parser(
        "group",
        help="sort images into things",
        usage="search.py group INDEX --out CSV [--flag value ...]\n"
        "       search.py group DIR (--resume PATH | --backbone-only) --out CSV [--flag value ...]",
        parents=[
            flags.group_options(),
            images := dataset.options(training=False, without=OF_DATASETS),
            network := net.options(training=False),
            device := hardware.options(without=("--compile",), several=False),
        ],
        description="Sort images into things that nobody has labelled.",
        **form,
    )
    commands.add_parser(
        "serve",
        help="open a page to ask",
        usage="search.py serve --index INDEX [--flag value ...]",
        parents=[flags.serve_options()],
        description="Serve a page, for a browser on this machine alone: drop photographs and see what they show.",
        **form,
    )
    commands.add_parser(
        "export",
        help="write the vectors to a Parquet file",
        usage="search.py export INDEX PARQUET [--resume PATH]",
        parents=[flags.export_options()],
        description="Write the paths and vectors of an index to a Parquet file, for other engines, or for `search.py "
        "index --vectors`.",
        **form,
    )
    args = parser.parse_args(argv)
    if args.command == "group":
        args.spec = None
        if args.resume or given(args, network):
            read_network(parser, sort, args)
        elif ignored := [*given(args, images), *given(args, device)]:
            sort.error(
                f"argument {ignored[0]}: it is for a folder of images, which needs --resume or --backbone-only; an "
                "index needs no network"
            )
    if args.command == "index" and args.vectors:
        args.spec = None
        is_numpy = args.vectors.endswith(".npy")
        if args.images or args.split or args.by_folder or args.moved_from:
            make.error("argument --vectors: not with --images, --split, --by-folder or --moved-from")
        if ignored := [*given(args, data), *given(args, device)]:
            make.error(f"argument {ignored[0]}: it is for images, and --vectors reads none")
        if is_numpy and not args.paths:
            make.error(f"argument --vectors: {args.vectors} needs --paths, a file with the path of each vector")
        if args.paths and not is_numpy:
            make.error("argument --paths: it is for a .npy file of --vectors")
        if is_numpy or args.resume or given(args, network):
            read_network(parser, make, args)
    elif args.command == "index":
        read_network(parser, make, args, dataset.crop_of(args.dataset) if args.split else None)
        if bool(args.images) == bool(args.split):
            parser.error("one of --images, --split or --vectors is required")
        if args.paths:
            parser.error("argument --paths: it is for a .npy file of --vectors")
        if args.images and (ignored := [flag for flag in given(args, data) if flag in OF_DATASETS]):
            parser.error(f"argument {ignored[0]}: it is for --split")
        if args.split:
            dataset.check_arguments(parser, args, args.dataset)
            if args.calibrate:
                parser.error(
                    "argument --calibrate: the folders of a dataset are not its classes: use evaluate.py --calibrate, "
                    "which records the threshold in the checkpoint"
                )
    return args


def given(args: argparse.Namespace, parser: argparse.ArgumentParser) -> list[str]:
    """The flags of a parser that the arguments do not have at their defaults."""
    defaults = vars(parser.parse_args([]))
    return [f"--{name.replace('_', '-')}" for name, value in defaults.items() if getattr(args, name) != value]


def read_network(
    parser: argparse.ArgumentParser, command: argparse.ArgumentParser, args: argparse.Namespace, crop=None
) -> None:
    """Open the checkpoint of a command line, if any, and add it and the network's spec; crop: as in net.spec_of."""
    net.check_weights(command, args)
    from proxy_anchor.checkpoint import Checkpoint, in_run

    with cli.errors_in_one_line("search.py"):
        path = in_run(args.resume) if args.resume else None
        checkpoint = Checkpoint(path) if path else None
    args.resume, args.checkpoint = path, checkpoint
    args.spec = net.spec_of(parser, args, checkpoint.spec if checkpoint else None, crop)


def update_index(args: argparse.Namespace) -> None:
    """Embed the images that are new or have changed since they were indexed, and drop those whose files are gone.

    With --vectors, files hold the embeddings, and no entry that they lack is dropped.
    """
    from proxy_anchor.index.store import EXACT, IMAGES, Index, lock
    from proxy_anchor.thresholds.identification import describe

    source = open_vectors(args) if args.vectors else Images(args)
    folder = Path(args.out)
    shown = printable(str(folder))
    if args.moved_from and not (folder / IMAGES).exists():
        raise FileNotFoundError(f"There is no index in {folder} whose images could have moved: leave out --moved-from")
    with lock(folder):
        index = Index.open(folder) if (folder / IMAGES).exists() else None
        if index and not index.is_empty:
            source.check(index)
            index.check(source.made, args.index_factory, args.dtype)
        else:
            index = Index.new(folder, source.made, args.index_factory or EXACT, args.dtype or "float32")
        for remark in source.remarks:
            print(remark)
        if not len(index.images):  # also after an interruption
            index.calibration = source.calibration
        elif source.calibration not in (None, index.calibration) and not args.calibrate:
            print(f"The threshold of the files is left out, as {shown} has other images: --calibrate chooses one")
        moved = 0
        if args.moved_from:
            (new_folder,) = source.folders
            moved = index.move(canonical(args.moved_from), new_folder, source.stamps)
        keep_all = bool(args.vectors) and not args.drop_missing
        presence = Presence(source.stamps, index.folders, args.drop_missing, keep_all)
        new, changed, deleted, done = index.compare(source.stamps, presence.of)
        is_known = source.folders <= {*index.folders}
        index.folders = sorted({*index.folders, *source.folders})
        kind = "folders" if source.made["by_folder"] else "images"
        if len(index.images):
            held = f"{len(index.images):,} {kind}"
            print(f"Updating {shown}, which holds {held}; new: {new:,}, changed: {changed:,}, deleted: {deleted:,}")
        else:
            print(f"Building {shown} of {new:,} {kind}")
        for missing, entries_there in presence.missing.items():
            print(
                f"{printable(missing)} is gone or empty: its {kind} ({entries_there:,}) stay. --drop-missing drops "
                "them; if they have moved, --moved-from keeps their vectors"
            )
        if moved:
            print(f"{moved:,} {kind} have moved: those that are the same keep their vectors")
        if done:
            print(f"{done:,} of these were embedded before the interruption")
        try:
            done += source.add_to(index)
            if done or changed or deleted or moved:
                index = index.finish()
                print(f"Indexed {done:,} {kind}")
                if index.factory != EXACT:
                    print_recall(index)
            elif not is_known:
                index.describe()
        except KeyboardInterrupt:
            print("Embedded images are saved: the same command continues from here", file=sys.stderr)
            raise
        if args.calibrate:
            calibration = index.calibrate(args.calibrate)
            index.describe()
            print(describe(calibration), end="")


class Images:
    """The images of a command line, or their folders, to be embedded into an index; see VectorFiles.

    A checkpoint or a backbone is loaded at once; the images are listed when their stamps are asked for.
    """

    calibration = None

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.network, path, identity = open_network(args)
        upright = not args.split or getattr(dataset.ALL[args.dataset], "UPRIGHT", True)
        self.made = made_by(args, path, identity, ORIENTATIONS[upright])
        source = os.path.realpath(args.images or args.data_root)
        self.folders = {source if os.path.isdir(source) else os.path.dirname(source)}
        self.remarks: list[str] = []
        self._by_folder: dict[str, list[str]] = {}

    def check(self, index: Index) -> None:
        """Remark on an index without EXIF rotation."""
        if self.made["network"]["orientation"] == "upright" and not index.is_upright:
            self.remarks = [AS_STORED]

    @cached_property
    def stamps(self) -> dict[str, str | None]:
        """{entry: stamp}, taken before the images are read, so later changes are detected next time."""
        from proxy_anchor.index import entries

        paths = paths_to_index(self.args)
        self._by_folder = entries.group(paths) if self.args.by_folder else {}
        return {entry: entries.stamp(self._images_of(entry)) for entry in self._by_folder or paths}

    def _images_of(self, entry: str) -> list[str]:  # a list for each image would take memory
        return self._by_folder.get(entry, [entry])

    def add_to(self, index: Index) -> int:
        """Embed the entries that have a stamp, block by block, and save each block; returns how many could be read."""
        from proxy_anchor.api import runtime
        from proxy_anchor.embedding import Embedder
        from proxy_anchor.index import entries

        args = self.args
        new = {entry: stamp for entry, stamp in self.stamps.items() if stamp is not None}
        if not new:
            return 0
        embedder = Embedder(self.network, hardware.select(args.gpu_id), args.amp)
        if index.is_empty:
            index.runtime = runtime(embedder)
            index.describe()
        elif warn_of_drift(index, embedder) == "":
            index.runtime = runtime(embedder)
        else:  # some vectors are of other versions than the rest, or nothing could be compared
            index.runtime = {}
        seen = added = 0
        for block in entries.blocks(((entry, self._images_of(entry)) for entry in new), BLOCK):
            images = dataset.unlabelled([image for paths in block.values() for image in paths], index.spec)
            if args.skip_bad_images:
                dataset.leave_out_bad([images], args.workers)
            if len(images):
                vectors = embed(embedder, images, args.batch_size, args.workers)
                embedded, embeddings = entries.embeddings_of(block, images.paths, vectors, index.distance)
                index.add({entry: new[entry] for entry in embedded}, embeddings)
                added += len(embedded)
            seen += len(block)
            if seen < len(new):
                print(f"{seen:,} of {len(new):,} are done", flush=True)
        return added


def open_vectors(args: argparse.Namespace) -> VectorFiles:
    """The vectors of the command line. Raises ValueError if its network, if any, is not theirs."""
    from proxy_anchor.index.exchange import NumpyFile, ParquetFiles, read_paths

    file = Path(args.vectors)
    if args.paths:
        paths = [canonical(path) for path in read_paths(Path(args.paths))]
        _, path, identity = open_network(args)
        return NumpyFile(file, paths, made_by(args, path, identity, args.spec.orientation))
    vectors = ParquetFiles(file)
    if args.spec:
        _, path, identity = open_network(args)
        vectors.set_checkpoint(path, identity, args.spec)
    try:
        net.check(vectors.spec)
    except ValueError as error:
        raise ValueError(f"{file} is damaged, or of another version: {error}") from error
    return vectors


def made_by(args: argparse.Namespace, path: str, identity: str, orientation: str) -> dict:
    """What an index records of the network of the command line, see Index."""
    spec = replace(args.spec, orientation=orientation)
    return {"checkpoint": path, "weights": identity, "network": spec.to_record(), "by_folder": args.by_folder}


def export(args: argparse.Namespace) -> None:
    """Write an index to a Parquet file."""
    from proxy_anchor.index import calibrations, exchange
    from proxy_anchor.index.store import Index

    exchange.arrow()
    index = Index.open_complete(Path(args.index))
    calibration, reason = calibrations.to_export(index, args.resume)
    exchange.export(index, Path(args.out), calibration)
    print(f"Saved {quantity(len(index.images), 'vector')} to {printable(args.out)}")
    if not calibration:
        print(f"No threshold is recorded: {reason}")


def open_network(args: argparse.Namespace) -> tuple[torch.nn.Module, str, str]:
    """The network of a command line, the path of its weights, or their name, and their identity."""
    from proxy_anchor import api

    weights = args.resume or args.pretrained
    path = weights if args.backbone_only and weights in net.NOT_FILES else os.path.abspath(weights)
    network, identity = api.open_network(args.spec, path, args.checkpoint)
    if args.backbone_only:
        print(network.model.remark, end="", file=sys.stderr)
    return network, path, identity


def print_recall(index: Index) -> None:
    """Print the share of the nearest images that the index finds, for several nprobe if its kind has cells."""
    from proxy_anchor.index.store import RECALL_AT

    for nprobe in [nprobe for nprobe in NPROBES if nprobe <= index.cells] or [0]:
        if nprobe:
            index.set_nprobe(nprobe)
        setting = f" with --nprobe {nprobe}" if nprobe else ""
        print(f"{index.factory} finds {index.recall():.1%} of the {RECALL_AT} nearest images{setting}")


def paths_to_index(args: argparse.Namespace) -> list[str]:
    """The paths of the images, see distinct."""
    if args.split:
        choice = {"allow_partial": args.allow_partial, "test_classes": args.test_classes}
        paths = dataset.load(args.dataset, args.data_root, args.split, **choice).paths
    else:
        paths = images_at(args.images)
    return distinct(paths)


def distinct(paths: Iterable[str]) -> list[str]:
    """The canonical paths of images, each once, even if an image is reached in two ways.

    They are absolute, as a query may come from any working directory.
    """
    return list(dict.fromkeys(map(canonical, paths)))


def canonical(path: str) -> str:
    """The absolute path of a file, through no linked folder; a link to a file is a file."""
    folder, name = os.path.split(os.path.abspath(path))
    return os.path.join(real_folder(folder), name)


@lru_cache
def real_folder(folder: str) -> str:
    return os.path.realpath(folder)


class Presence:
    """Whether indexed images still exist.

    What is in a folder that is gone as a whole, or empty, counts as present: its disk may not be mounted. So does a
    link to a file in such a folder.
    stamps: of what is to be indexed now. folders: those whose images were indexed, [] where an older index does not
    say so. keep_all: whether all others count as present. missing: {folder that is gone or empty: how many entries are
    in it}.
    """

    def __init__(self, stamps: dict, folders: list[str], drop_missing: bool, keep_all: bool):
        self.stamps, self.folders, self.drop_missing, self.keep_all = stamps, folders, drop_missing, keep_all
        self.missing: Counter[str] = Counter()

    def of(self, entry: str) -> bool:
        if canonical(entry) in self.stamps:  # it was indexed through a linked folder
            return False
        if self.keep_all or has_images(entry):
            return True
        missing = None if self.drop_missing else self.missing_folder(entry)
        self.missing.update([missing] if missing else [])
        return missing is not None

    def missing_folder(self, entry: str) -> str | None:
        """A folder that a missing entry, or the file that it links to, was indexed with, if that is gone or empty."""
        from proxy_anchor.index import entries

        for path in dict.fromkeys((entry, os.path.realpath(entry))):
            indexed = [folder for folder in self.folders if entries.within(path, folder)]
            for folder in indexed or [os.path.dirname(path)]:
                if not os.path.isdir(folder) or all(map(is_hidden, os.listdir(folder))):
                    return folder
        return None


def has_images(entry: str) -> bool:
    """Whether an entry's file exists, or an image in its folder."""
    return os.path.isfile(entry) or bool(images_directly_in(entry))


def embed(embedder: Embedder, images: dataset.ImageDataset, batch_size: int, workers: int) -> torch.Tensor:
    """The embeddings (N, D) of images."""
    return embedder.embed(dataset.eval_loader(images, batch_size, workers)).vectors


def query(args: argparse.Namespace) -> None:
    """Print the neighbours of each image, or of each folder's mean."""
    from proxy_anchor.api import BATCH
    from proxy_anchor.index import entries
    from proxy_anchor.index.answers import to_json, to_table

    paths = images_at(*args.images)
    search = open_search(args)
    index = search.index
    images = dataset.unlabelled(paths, index.spec)
    check_save(args.save, images.paths, index)
    workers = dataset.WORKERS if len(images) > BATCH else 0
    bad = images.find_bad(workers)
    images.leave_out(bad)
    if not len(images):
        raise BadFile("; ".join(bad.values()))
    for reason in bad.values():
        print(printable(reason), file=sys.stderr)
    limit, remark = threshold_in_use(args, search)
    search.threshold = limit
    names, vectors = images.paths, embed(search.embedder.run, images, BATCH, workers)
    if args.by_folder:
        names, vectors = entries.embeddings_of(entries.group(names), names, vectors, index.distance)
    answers = search.answer(names, vectors, args.neighbours)
    if remark:
        print(remark, file=sys.stderr)
    if args.json:
        print(to_json(answers, bad, limit, index.measure))
    else:
        print(to_table(answers, limit, index.measure))
    if args.save:
        draw(answers, limit, index, Path(args.save))
    if bad:
        sys.exit(1)  # as for one image alone


def open_search(args: argparse.Namespace) -> Search:
    """The index of a command line and its network; remarks on them go to stderr."""
    from proxy_anchor.api import Search

    search = Search(args.index, hardware.select(0), checkpoint=args.resume, nprobe=args.nprobe)
    if search.index.spec.backbone_only:
        print(search.embedder.network.model.remark, end="", file=sys.stderr)
    if not search.index.records_orientation:
        print(AS_STORED, file=sys.stderr)
    warn_of_drift(search.index, search.embedder.run)
    return search


def warn_of_drift(index: Index, embedder: Embedder) -> str | None:
    """Print the warning of check_drift, if there is one, and return it."""
    from proxy_anchor.api import check_drift

    if warning := check_drift(index, embedder):
        print(printable(warning), file=sys.stderr)
    return warning


def serve(args: argparse.Namespace) -> None:
    """Serve the page to ask, until it is interrupted."""
    from proxy_anchor.index import page

    page.gradio()  # first: the network takes longer
    search = open_search(args)
    thumbnail = partial(read_thumbnail_of, upright=search.index.is_upright)
    answers = page.Answers(search, thumbnail, args.neighbours)
    name = printable(os.path.basename(os.path.abspath(args.index)))
    page.serve(answers, name, [*REMEDIES], args.port)


def draw(answers: list[Answer], limit: float | None, index: Index, file: Path) -> None:
    """Draw each query with its matches; an indexed query is left out of its own row."""
    from proxy_anchor.index.answers import unit

    rows = []
    for query, _, matches, *_ in answers:
        kind = "query" if matches or limit is None else "no match"
        others = [
            (path, f"{unit(index.measure)}{value:.3f}\n{folder_of(path)}")
            for path, value in matches
            if path != os.path.abspath(query)
        ]
        rows.append([(query, f"{kind}\n{folder_of(query)}"), *others])
    figures.draw_images(rows, lambda entry: read_entry(entry, index.is_upright), file)
    print(f"Saved {file}", file=sys.stderr)


def check_save(file: str | None, queries: list[str], index: Index) -> None:
    """Raise FileExistsError if the picture would be written over a query or an indexed image, also through a link."""
    if not file or not os.path.exists(file):
        return
    if any(os.path.samefile(file, path) for path in queries if os.path.exists(path)):
        raise FileExistsError(f"--save {file} would overwrite a query: choose another name")
    targets = {canonical(os.path.abspath(file)), os.path.realpath(file)}
    if index.made["by_folder"]:
        targets = set(map(os.path.dirname, targets))
    if any(path in targets for path, _ in index.images):
        raise FileExistsError(f"--save {file} would overwrite an indexed image: choose another name")


def threshold_in_use(args: argparse.Namespace, search: Search) -> tuple[float | None, str]:
    """The threshold of the command line, or that of the index or its checkpoint with a line on it."""
    from proxy_anchor.index.calibrations import threshold_for_queries

    if args.threshold is None:
        return threshold_for_queries(search, args.by_folder)
    search.calibration = None  # it is not read, and may be one of an earlier version
    return None if args.threshold == "none" else args.threshold, ""


def read_entry(entry: str, upright: bool) -> torch.Tensor:
    """An image or, of a folder, the first one in it."""
    return read_image(first_image(entry), upright)


def read_thumbnail_of(entry: str, size: int, upright: bool) -> Image.Image:
    """A thumbnail of an image or, of a folder, of the first one in it."""
    return read_thumbnail(first_image(entry), size, upright)


def first_image(entry: str) -> str:
    """The path of an image or, of a folder, of the first one in it; its own if there is none."""
    return next(iter(images_directly_in(entry)), entry)


def folder_of(entry: str) -> str:
    """The name of an image's folder, usually the name of its class, or of this folder."""
    path = Path(os.path.abspath(entry))
    return printable(path.name if path.is_dir() else path.parent.name)


class Unlabelled(NamedTuple):
    """Images to sort into things, or folders, as the noun says.

    Their paths, embeddings (N, D) and network, and the threshold, None with --things.
    """

    paths: list[str]
    noun: str
    vectors: torch.Tensor
    spec: NetworkSpec
    threshold: float | None


def group(args: argparse.Namespace) -> None:
    """Sort images into things, and write the thing of each to a file and, if asked for, a page."""
    from proxy_anchor.index import clustering
    from proxy_anchor.report import sheets

    paths, noun, vectors, spec, limit = embed_folder(args) if args.spec else read_index(args)
    labels = clustering.things(vectors, spec.distance, limit, args.things)
    things = [[paths[row] for row in rows] for rows in clustering.members(labels, vectors, spec.distance)]
    count = f"{quantity(len(labels), noun)}: {clustering.summary(labels, noun)}"
    print(count + ("" if limit is None else f", by {MEASURES[spec.distance]} {limit:.4f}"))
    sheets.write_table(Path(args.out), things)
    print(f"Saved {printable(args.out)}")
    if args.page:
        thumbnail = partial(read_thumbnail_of, upright=spec.orientation == "upright")
        sheets.write(Path(args.page), count, things, noun, thumbnail, Path(args.out).name)
        print(f"Saved {printable(args.page)}")


def embed_folder(args: argparse.Namespace) -> Unlabelled:
    """The images of a folder, as the network of the command line sees them."""
    from proxy_anchor.embedding import Embedder
    from proxy_anchor.index.calibrations import threshold_for_groups
    from proxy_anchor.index.store import IMAGES

    if (Path(args.images) / IMAGES).is_file():
        raise ValueError(f"{args.images} is an index, which needs no network: leave out --resume and --backbone-only")
    limit = args.threshold
    if needs_threshold(args):
        limit = threshold_for_groups(args.checkpoint.calibration if args.checkpoint else None, args.images)
    network, _, _ = open_network(args)
    spec = replace(args.spec, orientation="upright")
    images = dataset.unlabelled(distinct(images_at(args.images)), spec)
    if args.skip_bad_images:
        dataset.leave_out_bad([images], args.workers)
    embedder = Embedder(network, hardware.select(args.gpu_id), args.amp)
    vectors = embed(embedder, images, args.batch_size, args.workers).cpu()
    return Unlabelled(images.paths, "image", vectors, spec, limit)


def read_index(args: argparse.Namespace) -> Unlabelled:
    """The entries of an index; its checkpoint is read only if its threshold is needed."""
    import torch

    from proxy_anchor.index import calibrations
    from proxy_anchor.index.store import IMAGES, Index

    folder = Path(args.images)
    if not (folder / IMAGES).is_file():
        raise FileNotFoundError(
            f"There is no index in {folder}: for a folder of images, give a network, --resume or --backbone-only"
        )
    index = Index.open_complete(folder)
    limit = args.threshold
    if needs_threshold(args):
        limit = calibrations.threshold_for_groups(calibrations.for_groups(index), args.images)
    noun = "folder" if index.made["by_folder"] else "image"
    vectors = torch.from_numpy(index.images.vectors.copy())
    return Unlabelled([path for path, _ in index.images], noun, vectors, index.spec, limit)


def needs_threshold(args: argparse.Namespace) -> bool:
    """Whether the command line leaves the threshold of `group` to a calibration."""
    return not args.things and args.threshold is None


def main(argv=None):
    args = parse(argv)
    commands = {"index": update_index, "query": query, "serve": serve, "group": group, "export": export}
    with cli.errors_in_one_line("search.py"):
        commands[args.command](args)


if __name__ == "__main__":
    main()
