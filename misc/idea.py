"""Draw the idea of the Proxy-Anchor loss from a real run: a network learns four letters on the unit circle.

python misc/idea.py --save misc/idea.svg --save misc/idea.png

The embeddings have two dimensions, so the picture shows the embeddings of a batch and the proxies completely. The width
of an arrow is the derivative of the loss by the similarity of the embedding and the proxy.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dataset
import net
from dataset import transforms
from proxy_anchor import cli, figures, loss_registry, training
from proxy_anchor.blocked import ProxyAnchorFunction
from proxy_anchor.runs import randomness

LETTERS, ANCHOR = "AMST", 2  # the classes, and the one whose proxy has arrows
SHOWN = 7  # images per class
EARLY, STEPS = 2, 60
SEED = 715  # its initial proxies are far from each other
PULL, PUSH, OTHER = figures.STRONG[0], figures.STRONG[1], figures.QUIET


def read_letters(root: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Images of the letters, uint8 (N, 3, 32, 32), and their classes (N,)."""
    images = dataset.load("glyphs", root, "train", transforms.Evaluation(32))
    names = [images.classes[label] for label in images.labels]
    chosen = [i for i, name in enumerate(names) if name in LETTERS]
    return torch.stack([images[i][0] for i in chosen]), torch.tensor([LETTERS.index(names[i]) for i in chosen])


def train(images: torch.Tensor, labels: torch.Tensor, steps: list[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Embeddings (N, 2) of the images and proxies (C, 2), of unit length, after these numbers of steps."""
    torch.set_num_threads(1)  # sums in one order
    randomness.seed(SEED)
    network = net.create("resnet18", 2, bn_freeze=False)
    randomness.seed(SEED)
    criterion = loss_registry.create("Proxy_Anchor", len(LETTERS), 2)
    optimizer = training.create_optimizer("adamw", network, criterion, 1e-4, 1e-4)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    x = network.normalize(images)
    moments = []
    for step in range(max(steps) + 1):
        if step in steps:
            network.train()  # the mode in which the loss is computed
            with torch.no_grad():
                moments.append((network(x), torch.nn.functional.normalize(criterion.proxies)))
        training.train_one_epoch(
            network, lambda x, y: criterion(network(x), y), [(x, labels)], optimizer, scaler, step, [network, criterion]
        )
    return moments


def slopes(embeddings: torch.Tensor, proxies: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The loss's derivative (N, C) by the similarity of each embedding and each proxy.

    The loss depends on embeddings only through their products with the proxies. With unit vectors as proxies, these
    products are the embedding's coordinates, and autograd computes the derivative by the coordinates.
    """
    similarities = (embeddings @ proxies.T).requires_grad_()
    units = torch.eye(len(proxies))
    weights = torch.ones(len(units), 1)
    loss = ProxyAnchorFunction.apply(similarities, units, labels, 0.1, 32.0, labels, weights, len(units))
    return torch.autograd.grad(loss, similarities)[0]


def draw(images, labels, moments, path: Path) -> None:
    """Draw two moments (embeddings, proxies): the early one with the arrows of one proxy, the late one without."""
    with figures.picture(path, 9.6, 4.8) as figure:
        early, late = figure.subplots(1, 2)
        for ax, (embeddings, proxies) in zip((early, late), moments):
            draw_circle(ax, images, labels, embeddings, proxies)
        embeddings, proxies = moments[0]
        draw_arrows(early, embeddings, proxies[ANCHOR], slopes(embeddings, proxies, labels)[:, ANCHOR], labels)
        early.set_title(f"step {EARLY}: what one proxy does to a batch", loc="center")
        late.set_title(f"step {STEPS}: every image is at the proxy of its class", loc="center")
        late.text(0, 0, "proxies: one per class,\nlearned with the network", color=OTHER, ha="center", va="center")


def draw_circle(ax, images, labels, embeddings, proxies) -> None:
    """Draw the unit circle with the proxies, a point for each embedding, and its image outside the circle."""
    from matplotlib.patches import Circle, Rectangle

    ax.add_patch(Circle((0, 0), 1, fill=False, color=figures.GRID, linewidth=2, zorder=0))
    size = 0.17
    radii, angles = np.meshgrid(1.24 + 0.19 * np.arange(5), np.linspace(0, 2 * np.pi, 180, endpoint=False))
    places = np.stack([radii * np.cos(angles), radii * np.sin(angles)], axis=-1).reshape(-1, 2)
    for image, label, x in zip(images, labels, embeddings.numpy()):
        color = PULL if label == ANCHOR else OTHER
        ax.plot(*x, "o", color=color, markersize=4, zorder=4)
        place = places[((places - x) ** 2).sum(axis=1).argmin()]  # the nearest with room
        places = places[abs(places - place).max(axis=1) > 1.08 * size]
        left, bottom = place - size / 2
        ax.imshow(image.permute(1, 2, 0).numpy(), extent=(left, left + size, bottom, bottom + size), zorder=2)
        ax.add_patch(Rectangle((left, bottom), size, size, fill=False, edgecolor=color, linewidth=1.2, zorder=3))
    for c, proxy in enumerate(proxies):
        ax.add_patch(Circle(proxy.tolist(), 0.115, color=PULL if c == ANCHOR else OTHER, ec="white", lw=2, zorder=6))
        ax.text(*proxy, LETTERS[c], color="white", fontsize=13, fontweight="bold", ha="center", va="center", zorder=7)
    ax.set(xlim=(-1.7, 1.7), ylim=(-1.6, 1.6), aspect="equal")
    ax.axis("off")


def draw_arrows(ax, embeddings, proxy, weights, labels) -> None:
    """Draw arrows of embeddings towards the proxy of their class and away from it, with widths by weight."""
    from matplotlib.patches import FancyArrowPatch
    from matplotlib.path import Path as Line

    for x, weight, label in zip(embeddings, (weights / weights.abs().max()).abs().tolist(), labels):
        form = {"arrowstyle": "-|>", "mutation_scale": 6 + 10 * weight, "linewidth": 0.6 + 4.4 * weight, "zorder": 5}
        if label == ANCHOR:
            ends = {"posA": x.tolist(), "posB": proxy.tolist(), "shrinkA": 2, "shrinkB": 12}
            ax.add_patch(FancyArrowPatch(**ends, **form, color=PULL, alpha=0.4 + 0.6 * weight))
        elif weight > 0.01:  # along the circle, because embeddings stay on it
            angle, of_proxy = (np.arctan2(*point.flip(0).tolist()) for point in (x, proxy))
            arc = angle + np.sign(np.sin(angle - of_proxy)) * np.linspace(0, 0.15 + 0.4 * weight, 20)
            line = Line(np.stack([np.cos(arc), np.sin(arc)], axis=1))
            ax.add_patch(FancyArrowPatch(path=line, **form, color=PUSH, fill=False, alpha=0.4 + 0.6 * weight))
    for x, y, text, color in (
        (-0.24, 0.3, "push: all others,\nthe nearest the most", PUSH),
        (0.2, -0.2, "pull: images of its class,\nthe farthest the most", PULL),
    ):
        back = {"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1}
        ax.text(x, y, text, color=color, ha="center", va="center", fontweight="bold", bbox=back, zorder=8)


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data-root",
        default=str(dataset.DATA_ROOT),
        metavar="DIR",
        help="folder of the datasets; glyphs is drawn if it is missing",
    )
    parser.add_argument(
        "--save", action="append", required=True, metavar="FILE", help="the picture; may be given several times"
    )
    args = parser.parse_args(argv)
    with cli.errors_in_one_line("idea.py"):
        images, labels = read_letters(args.data_root)
        moments = train(images, labels, [EARLY, STEPS])
        shown = torch.cat([torch.where(labels == c)[0][:: 16 // SHOWN][:SHOWN] for c in range(len(LETTERS))])
        moments = [(embeddings[shown], proxies) for embeddings, proxies in moments]
        for path in args.save:
            draw(images[shown], labels[shown], moments, Path(path))
            print(f"The picture is {path}")


if __name__ == "__main__":
    main()
