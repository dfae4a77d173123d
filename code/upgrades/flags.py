"""The flags of the upgrades, with their published settings."""

import argparse

from proxy_anchor import cli

OFF = {"synthesis": 0.0, "self_distill": 0.0, "threshold_margin": 0.0, "average_weights": 0.0}  # as published in 2020


def options() -> argparse.ArgumentParser:
    """Command-line flags of the upgrades; 0 turns each off."""
    parser = argparse.ArgumentParser(add_help=False)
    group = parser.add_argument_group("upgrades of Proxy-Anchor, see docs/upgrades.md")

    def add(flag, value, metavar, kind, text):
        group.add_argument(flag, nargs="?", const=value, default=0.0, type=kind, metavar=metavar, help=text)

    add(
        "--synthesis",
        1.0,
        "RATIO",
        cli.share(0),
        "Proxy Synthesis: mix RATIO synthetic images per image, with classes of their own; RATIO: 1 if the flag is "
        "given without one (default: off)",
    )
    add(
        "--self-distill",
        1.0,
        "WEIGHT",
        cli.not_negative,
        "add the cross-entropy between the similarities in the batch and those of the network's averaged weights; "
        "WEIGHT: 1 if the flag is given without one (default: off)",
    )
    add(
        "--threshold-margin",
        1.0,
        "WEIGHT",
        cli.not_negative,
        "add the threshold-consistent margin loss, which draws the similarities of all classes to one threshold; "
        "WEIGHT: 1 if the flag is given without one (default: off)",
    )
    add(
        "--average-weights",
        0.99,
        "DECAY",
        cli.number(lambda value: 0 <= value < 1, "not a decay, from 0 to less than 1"),
        "evaluate, and save as the best, an exponential moving average of the weights over the steps; DECAY: 0.99 if "
        "the flag is given without one (default: off)",
    )
    return parser


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End with a usage error for what cannot be combined."""
    if args.synthesis and args.loss != "Proxy_Anchor":
        parser.error("argument --synthesis: it mixes the proxies of Proxy_Anchor: leave it out with any other --loss")
    if args.self_distill and args.batch_size < 2:
        parser.error("argument --self-distill: it compares the images of a batch: choose --batch-size 2 or more")


def in_words(args: argparse.Namespace) -> str:
    """The upgrades of a run in the name of its folder."""
    return "".join(f"_{name.replace('_', '-')}{getattr(args, name):g}" for name in OFF if getattr(args, name))
