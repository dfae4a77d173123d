"""Embed a folder of images on a cluster of Ray, into Parquet files for `search.py index --vectors`.

    pip install 'ray[data]' pyarrow
    python misc/embed_ray.py photos --resume best.pth --out vectors
    python search.py index --vectors vectors --out photos.index

It uses the cluster that `ray.init()` finds, see RAY_ADDRESS, or starts Ray on this machine. The photos, the checkpoint
and --out have to be on a disk that all machines share, under the same paths. The first run lists the images in --out,
in plan.jsonl. Each worker has a copy of the network; it decodes images in --cpus threads and embeds them, on a GPU with
--gpus 1. A file of --rows images is written completely or not at all: after a kill, the same command embeds the images
of those that are missing. An image that cannot be read has a row with the reason in the column `error`; `index` leaves
it out.
"""

import argparse
import json
import logging
import os
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from socket import gethostname
from tempfile import TemporaryDirectory

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import proxy_anchor
from dataset.files import BadFile
from dataset.folder import images_at
from proxy_anchor import cli
from proxy_anchor.api import ImageEmbedder
from proxy_anchor.files import lock_folder, printable, quantity, replacing
from proxy_anchor.index import entries, exchange
from proxy_anchor.spec import NetworkSpec
from proxy_anchor.vectors import comparable_array
from search import distinct

CODE = ("proxy_anchor.py", "code/**/*.py", "dataset/**/*.py", "net/**/*.py")  # what the workers import


class Embed:
    """A worker of Ray: it embeds the images of one file at a time. threads: that decode; batch: images per step."""

    def __init__(self, path: str, device: str, recorded: dict, threads: int, batch: int):
        self.load, self.batch = partial(load, path, device, **recorded), batch
        self.embedder: ImageEmbedder | None = None  # loaded for the first file: an error is then its result
        self.pool = ThreadPoolExecutor(threads)

    def __call__(self, row: dict) -> dict:
        """Write the file of a row of `plan`; returns its numbers of images and of errors.

        "problem" is an error that the user can mend, or "": Ray would show its traceback.
        """
        try:
            return self.write(**row) | {"problem": ""}
        except Exception as error:
            if (problem := cli.message(error)) is None:
                raise
            return {"images": 0, "errors": 0, "problem": problem}

    def write(self, file: str, plan: str, offset: int) -> dict:
        """Write a file: the images that the plan lists at this offset."""
        with open(plan, "rb") as lines:
            content = json.loads(lines.readline())
            lines.seek(offset)
            paths = json.loads(lines.readline())
        self.embedder = self.embedder or self.load()
        if self.embedder.identity != content["made"]["weights"]:
            raise BadFile(f"{self.embedder.path} was replaced while it was read: start again")
        (folder,) = content["folders"]
        if not (os.path.isdir(folder) and os.listdir(folder)):  # else all would count as unreadable
            raise FileNotFoundError(f"{folder} is gone or empty on {gethostname()}: mount its disk there")
        batches = [paths[start : start + self.batch] for start in range(0, len(paths), self.batch)]
        vectors, stamps, errors = [], [], []
        decoding = self.pool.map(self.read, batches[0])
        for following in [*batches[1:], []]:
            images, times, reasons = zip(*decoding)
            decoding = self.pool.map(self.read, following)  # while these are embedded
            vectors.append(self.run(images))
            stamps += times
            errors += reasons
        exchange.write(Path(file), content, [(paths, stamps, np.concatenate(vectors), errors)])
        return {"images": len(paths), "errors": len(paths) - errors.count(None)}

    def read(self, path: str) -> tuple[torch.Tensor | None, str, str | None]:
        """What the network sees of an image, its stamp, and why it cannot be read, with None for the first."""
        stamp = ""  # of a file that is gone
        try:
            stamp = entries.stamp([path])  # before the image is read, so that later changes are found
            return self.embedder.transform(self.embedder.read(path)), stamp, None
        except (OSError, ValueError) as error:
            return None, stamp, str(error)

    @torch.inference_mode()
    def run(self, images: tuple[torch.Tensor | None, ...]) -> np.ndarray:
        """The vectors (N, D) of images, as an index holds them; zeros for None."""
        vectors = np.zeros((len(images), self.embedder.spec.embedding_size), np.float32)
        seen = [image for image in images if image is not None]
        if seen:
            embeddings = self.embedder.run(torch.stack(seen).to(self.embedder.device))
            is_seen = [image is not None for image in images]
            vectors[is_seen] = comparable_array(embeddings, self.embedder.spec.distance)
        return vectors


def load(path: str, device: str = "cpu", **recorded) -> ImageEmbedder:
    """proxy_anchor.load, but photos are upright, as search.py sees them whatever the network was trained on."""
    embedder = proxy_anchor.load(path, device, **recorded)
    embedder.spec = replace(embedder.spec, orientation="upright")
    return embedder


def parse(argv=None) -> argparse.Namespace:
    parser = cli.Parser(prog="embed_ray.py", description=__doc__, formatter_class=cli.HelpFormatter)
    parser.add_argument("images", metavar="DIR", help="folder of images, subfolders included")
    parser.add_argument("--resume", required=True, metavar="PATH", help="checkpoint, or the folder of its run")
    parser.add_argument("--model", metavar="NAME", help="the network of a published checkpoint")
    parser.add_argument("--embedding-size", type=cli.integer(1), metavar="D", help="that of a published checkpoint")
    parser.add_argument("--out", required=True, type=cli.path, metavar="DIR", help="folder for the Parquet files")
    parser.add_argument("--rows", default=4096, type=cli.integer(1), metavar="N", help="images per file of a new --out")
    parser.add_argument("--batch-size", default=128, type=cli.integer(1), metavar="N", help="images per step")
    parser.add_argument("--workers", default=1, type=cli.integer(1), metavar="N", help="copies of the network")
    parser.add_argument("--cpus", default=1, type=cli.integer(1), metavar="N", help="threads of a worker that decode")
    parser.add_argument("--gpus", default=0, type=cli.integer(0, 1), metavar="N", help="GPUs of a worker: 0 or 1")
    return parser.parse_args(argv)


def plan(out: Path, images: str, rows: int, embedder: ImageEmbedder) -> list[dict]:
    """The files to write into `out`: the arguments of Embed.write.

    The first run lists the images, `rows` for each file; later ones continue from its list, whatever became of the
    images since: `search.py index --images` finds changes by the stamps. Raises ValueError if the folder is for other
    images or another network.
    """
    source, file = os.path.realpath(images), out / exchange.PLAN
    if not file.exists():
        if any(name != ".lock" for name in os.listdir(out)):
            raise ValueError(f"{out} is neither empty nor has a {exchange.PLAN}: choose another --out")
        write_plan(file, source, rows, embedder)
    with open(file, "rb") as lines:
        try:
            content, offset = json.loads(lines.readline()), lines.tell()
            made, folder = content["made"], content["folders"][0]
            spec = NetworkSpec.from_record(made["network"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} is damaged: choose another --out") from error
        if (made["weights"], spec) != (embedder.identity, embedder.spec):
            raise ValueError(
                f"{out} is for the vectors of another network ({made['checkpoint']}), not of {embedder.path}: choose "
                "another --out"
            )
        if folder != source:
            raise ValueError(f"{out} is for the images in {folder}, not in {source}: choose another --out")
        files = []
        for number, line in enumerate(lines):
            files.append({"file": str(out / f"{number:06}.parquet"), "plan": str(file), "offset": offset})
            offset += len(line)
    return files


def write_plan(file: Path, source: str, rows: int, embedder: ImageEmbedder) -> None:
    """Write a line with the record of the Parquet files, then a line with the paths of the images of each.

    Raises ValueError for a path that is no UTF-8, as Parquet holds no other.
    """
    paths = distinct(images_at(source))
    for path in paths:
        if path != path.encode(errors="replace").decode():
            raise ValueError(f"The name {printable(path)} is not UTF-8, which Parquet needs: rename the file")
    made = {
        "checkpoint": os.path.abspath(embedder.path),
        "weights": embedder.identity,
        "network": embedder.spec.to_record(),
        "by_folder": False,
    }
    threshold = embedder.calibration.at(len(paths)) if embedder.calibration else None
    with replacing(file) as temporary, open(temporary, "w") as lines:
        print(json.dumps(exchange.record(made, [source], None, threshold)), file=lines)
        for start in range(0, len(paths), rows):
            print(json.dumps(paths[start : start + rows]), file=lines)


def copy_code(folder: Path) -> None:
    """Copy what the workers import, and nothing else that is in the checkout, into a folder."""
    for source in (path for pattern in CODE for path in cli.ROOT.glob(pattern)):
        target = folder / source.relative_to(cli.ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)


def embed(args: argparse.Namespace) -> None:
    """Write the files that are missing."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else Ray reports to its makers
    os.environ.setdefault("RAY_DATA_LOG_LEVEL", "ERROR")
    try:
        import ray
    except ImportError as error:
        raise ImportError(f"ray cannot be imported ({error}): pip install 'ray[data]'") from error
    exchange.arrow()
    recorded = {"backbone": args.model, "embedding_size": args.embedding_size}
    embedder = load(args.resume, **recorded)
    out = Path(os.path.abspath(args.out))
    if not os.path.isdir(args.images):
        raise NotADirectoryError(f"{args.images} is no folder of images")
    out.mkdir(parents=True, exist_ok=True)
    with lock_folder(out, "choose another --out"):
        files = plan(out, args.images, args.rows, embedder)
        missing = [file for file in files if not os.path.exists(file["file"])]
        print(f"Files to write: {len(missing):,} of {len(files):,}", flush=True)
        if not missing:
            return
        with TemporaryDirectory() as folder:  # Ray sends all that is in it
            copy_code(Path(folder))
            ray.init(runtime_env={"working_dir": folder}, log_to_driver=False, logging_level=logging.ERROR)
        for flag, asked in (("CPU", args.cpus), ("GPU", args.gpus)):  # else Ray waits for such a machine
            most = max(node["Resources"].get(flag, 0) for node in ray.nodes() if node["Alive"])
            if asked > most:
                raise ValueError(f"--{flag.lower()}s {asked}: no machine of the cluster has more than {most:g}")
        ray.data.DataContext.get_current().enable_progress_bars = False
        device = "cuda" if args.gpus else "cpu"
        data = ray.data.from_items(missing, override_num_blocks=len(missing)).map(
            Embed,
            fn_constructor_args=(os.path.abspath(args.resume), device, recorded, args.cpus, args.batch_size),
            compute=ray.data.ActorPoolStrategy(size=min(args.workers, len(missing))),
            num_cpus=args.cpus,
            num_gpus=args.gpus,
        )
        images = errors = 0
        start = time.perf_counter()
        for done, row in enumerate(data.iter_rows(), start=len(files) - len(missing) + 1):
            if row["problem"]:
                raise RuntimeError(row["problem"])
            images, errors = images + row["images"], errors + row["errors"]
            print(
                f"{done:,} of {quantity(len(files), 'file')}; {quantity(images, 'image')} in "
                f"{time.perf_counter() - start:.1f} s, {errors:,} unreadable",
                flush=True,
            )


def main(argv=None) -> None:
    args = parse(argv)
    with cli.errors_in_one_line("embed_ray.py"):
        try:
            embed(args)
        except KeyboardInterrupt:
            print("Finished files are kept: the same command continues from here", file=sys.stderr)
            raise
        print(f"Next: python search.py index --vectors {args.out} --out photos.index")


if __name__ == "__main__":
    main()
