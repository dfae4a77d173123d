"""Time an answer on the page of search.py serve, from the uploaded photograph to its HTML with ten thumbnails.

python benchmarks/page_time.py PHOTOS [--images 10000] [--model tf_efficientnet_lite0] [--rounds 50]

The index has random vectors of the photographs in a folder, each many times; the thumbnails are drawn anew.
"""

import argparse
import itertools
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import search
from benchmarks.timing import print_row
from dataset.files import read_thumbnail
from dataset.folder import images_at
from proxy_anchor.api import Search
from proxy_anchor.index.page import Answers
from proxy_anchor.index.store import Index


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photographs", help="folder of them")
    parser.add_argument("--images", type=int, default=10000, help="in the index")
    parser.add_argument("--model", default="tf_efficientnet_lite0")
    parser.add_argument("--rounds", type=int, default=50)
    args = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder, question = os.path.join(temporary, "index"), os.path.join(temporary, "question.jpg")
        backbone = ["--backbone-only", "--model", args.model, "--pretrained", "none"]
        search.main(["index", *backbone, "--images", args.photographs, "--out", folder, "--workers", "0"])
        index = Index.open(Path(folder))
        paths = [os.path.abspath(path) for path in images_at(args.photographs)]
        names = (
            os.path.join(os.path.dirname(path), "./" * n, os.path.basename(path))
            for n in itertools.count(1)
            for path in paths
        )
        stamps = dict.fromkeys(itertools.islice(names, max(0, args.images - len(paths))), "")
        index.add(stamps, torch.randn(len(stamps), index.size))
        index = index.finish()
        answers = Answers(Search(folder), read_thumbnail, 10)
        answers.search.embedder(paths[:1])  # the first call loads libraries
        seconds = []
        for path in itertools.islice(itertools.cycle(paths), args.rounds):
            answers.picture.cache_clear()
            shutil.copy(path, question)
            start = time.perf_counter()
            answers.ask([question], answers.start)
            seconds.append(time.perf_counter() - start)
    print(f"{len(index.images):,} images, {index.size} dimensions, {args.model}, {torch.get_num_threads()} threads")
    print_row("median answer", f"{statistics.median(seconds):.3f} s")
    print_row("slowest answer", f"{max(seconds):.3f} s")


if __name__ == "__main__":
    main()
