"""Evaluate a checkpoint, ours or a published one: Recall@K beside the published figures."""

import argparse

import dataset
import net
from dataset.transforms import Normalize
from proxy_anchor import checkpoint, console, device, evaluation, logbook, published, retrieval


def parse(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        parents=[dataset.options(training=False), net.options(training=False), device.options(), console.options()],
    )
    parser.add_argument("--resume", required=True, metavar="PATH", help="checkpoint to evaluate")
    parser.add_argument("--remark", default="", help="a name for the line of figures")
    args = parser.parse_args(argv)
    console.check_ranges(parser, args)
    if not net.accepts(args.model, args.image_size):
        parser.error(
            f"argument --image-size: {args.model} cannot take images of {args.image_size} pixels; multiples of 32 work"
        )
    return args


def evaluate(args: argparse.Namespace) -> dict[int, float]:
    gpu = device.select(args.gpu_id)
    print(device.describe(gpu))

    network = net.create(args.model, args.embedding_size, pretrained=None, l2_norm=bool(args.l2_norm)).to(gpu)
    matched = checkpoint.load(args.resume, network)
    print(f"Loaded {args.resume}: all {matched} tensors match.")
    normalize = Normalize(network.bgr).to(gpu)

    eval_sets = dataset.eval_sets(args.dataset, args.data_root, args.image_size, args.allow_partial)
    loaders = [dataset.eval_loader(images, args.batch_size, args.workers) for images in eval_sets]
    bars = [console.progress(loader, "embedding") for loader in loaders]
    ranks = evaluation.rank(network, *(device.feed(bar, gpu, normalize) for bar in bars))

    recalls = retrieval.recall_of_ranks(ranks, dataset.BENCHMARKS[args.dataset].KS)
    rows = {args.remark or "this checkpoint": recalls}
    if figures := published.RESULTS.get((args.dataset, args.model)):
        rows["published"] = {k: recall / 100 for k, recall in figures.items()}
    print(logbook.recall_table(rows))
    if alone := int((ranks < 0).sum()):
        print(f"{alone:,} of {len(ranks):,} queries have no image of their class to find; they count as misses.")
    return recalls


def main(argv=None):
    args = parse(argv)
    with console.errors_in_one_line("evaluate.py", args.debug):
        return evaluate(args)


if __name__ == "__main__":
    main()
