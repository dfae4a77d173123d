"""Embed a folder of images on a cluster of Ray, into Parquet files for `search.py index --vectors`.

    pip install 'ray[data]' pyarrow
    python misc/embed_ray.py photos --resume best.pth --out vectors
    python search.py index --vectors vectors --out photos.index

It uses the cluster that `ray.init()` finds, see RAY_ADDRESS, or starts Ray on this machine. The photos, the checkpoint
and --out have to be on a disk that all machines share, under the same paths. Each worker has a copy of the network; it
decodes images in --cpus threads and embeds them, on a GPU with --gpus 1. A file of --rows images is written completely
or not at all: after a kill, the same command embeds the images of those that are missing. An image that cannot be read
has a row with the reason in the column `error`; `index` leaves it out.
"""

import argparse
import hashlib
import json
import logging
import os
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import proxy_anchor
from dataset.folder import images_at
from proxy_anchor import cli
from proxy_anchor.api import ImageEmbedder
from proxy_anchor.index import entries, exchange
from proxy_anchor.vectors import comparable
from search import canonical

REPOSITORY = Path(__file__).resolve().parent.parent
NOT_SENT = ["/data", "/logs", "/types", ".git", ".venv", "*_cache"]  # to the workers, with the code


class Embed:
    """A worker of Ray: it embeds the images of one file at a time. threads: that decode; batch: images per step."""

    def __init__(self, path: str, device: str, recorded: dict, threads: int, batch: int):
        self.embedder, self.batch = load(path, device, **recorded), batch
        self.pool = ThreadPoolExecutor(threads)

    def __call__(self, row: dict) -> dict:
        """Write the file of a row {"file", "content", "entries"}; returns its numbers of images and of errors."""
        content, stamps = json.loads(row["content"]), json.loads(row["entries"])
        if self.embedder.identity != content["made"]["weights"]:
            raise ValueError(f"{self.embedder.path} was replaced while it was read: start again")
        paths = list(stamps)
        seen, errors = zip(*self.pool.map(self.read, paths))
        good = [image for image in seen if image is not None]
        vectors = np.zeros((len(paths), self.embedder.spec.embedding_size), np.float32)
        if good:
            batches = [self.run(good[start : start + self.batch]) for start in range(0, len(good), self.batch)]
            vectors[[error is None for error in errors]] = np.concatenate(batches)
        exchange.write(Path(row["file"]), content, [(paths, list(stamps.values()), vectors, list(errors))])
        return {"images": len(paths), "errors": len(paths) - len(good)}

    def read(self, path: str) -> tuple[torch.Tensor | None, str | None]:
        """What the network sees of an image, or why it cannot be read."""
        try:
            return self.embedder.transform(self.embedder.read(path)), None
        except (OSError, ValueError) as error:
            return None, str(error)

    @torch.inference_mode()
    def run(self, images: list[torch.Tensor]) -> np.ndarray:
        """The vectors (N, D) of images, as an index holds them."""
        embeddings = self.embedder.run(torch.stack(images).to(self.embedder.device))
        return comparable(embeddings, self.embedder.spec.distance).float().cpu().numpy()


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
    parser.add_argument("--rows", default=4096, type=cli.integer(1), metavar="N", help="images per file")
    parser.add_argument("--batch-size", default=128, type=cli.integer(1), metavar="N", help="images per step")
    parser.add_argument("--workers", default=1, type=cli.integer(1), metavar="N", help="copies of the network")
    parser.add_argument("--cpus", default=1, type=cli.integer(1), metavar="N", help="threads of a worker that decode")
    parser.add_argument("--gpus", default=0, type=cli.integer(0, 1), metavar="N", help="GPUs of a worker: 0 or 1")
    return parser.parse_args(argv)


def plan(args: argparse.Namespace, embedder: ImageEmbedder) -> dict[Path, dict]:
    """{file: row of Embed} for all images. The name of a file has a digest of what is to be in it.

    Raises ValueError if --out holds Parquet files of other images, or by another network.
    """
    source = os.path.realpath(args.images)
    stamps = {path: entries.stamp([path]) for path in map(canonical, images_at(source))}
    made = {
        "checkpoint": os.path.abspath(embedder.path),
        "weights": embedder.identity,
        "network": embedder.spec.to_record(),
        "by_folder": False,
    }
    threshold = embedder.calibration.at(len(stamps)) if embedder.calibration else None
    content = json.dumps(exchange.record(made, [source], None, threshold))
    rows, listed = {}, list(stamps.items())
    for number, start in enumerate(range(0, len(listed), args.rows)):
        block = json.dumps(dict(listed[start : start + args.rows]))
        digest = hashlib.sha256(f"{content}{block}".encode()).hexdigest()[:16]
        file = Path(os.path.abspath(args.out)) / f"{number:06}-{digest}.parquet"
        rows[file] = {"file": str(file), "content": content, "entries": block}
    if others := {*Path(args.out).glob("*.parquet")} - {Path(args.out) / file.name for file in rows}:
        raise ValueError(
            f"{min(others)} is of other images, or of another network, --rows or threshold: choose another --out, or "
            "delete it"
        )
    return rows


def embed(args: argparse.Namespace) -> None:
    """Write the files that are missing."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # else Ray reports to its makers
    try:
        import ray
    except ImportError as error:
        raise ImportError(f"ray cannot be imported ({error}): pip install 'ray[data]'") from error
    exchange.arrow()
    recorded = {"backbone": args.model, "embedding_size": args.embedding_size}
    rows = plan(args, load(args.resume, **recorded))
    os.makedirs(args.out, exist_ok=True)
    missing = [row for file, row in rows.items() if not file.exists()]
    print(f"{len(rows) - len(missing):,} of {len(rows):,} files are there", flush=True)
    if not missing:
        return
    for name in ("ray", "ray.data"):
        logging.getLogger(name).setLevel(logging.ERROR)
    code = {"working_dir": str(REPOSITORY), "excludes": NOT_SENT}
    ray.init(runtime_env=code, log_to_driver=False, logging_level=logging.ERROR)
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
    for done, row in enumerate(data.iter_rows(), start=len(rows) - len(missing) + 1):
        images, errors = images + row["images"], errors + row["errors"]
        seconds = time.perf_counter() - start
        print(
            f"{done:,} of {len(rows):,} files; {images:,} images in {seconds:.1f} s, {errors:,} unreadable", flush=True
        )


def main(argv=None) -> None:
    args = parse(argv)
    with cli.errors_in_one_line("embed_ray.py"):
        embed(args)


if __name__ == "__main__":
    main()
