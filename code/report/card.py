"""The model card of an exported file: what it is, its results, and how to use it."""

from pathlib import Path

from proxy_anchor.files import printable, sha256
from proxy_anchor.runs import run_folders
from proxy_anchor.spec import Calibration

SETTINGS = ("dataset", "model", "pretrained", "loss", "epochs", "batch_size", "optimizer", "lr", "seed")
MARK = "whose weights have the sha256"  # cards are recognized by it
LOAD = {
    ".onnx": """import json, numpy, onnxruntime
session = onnxruntime.InferenceSession("{name}")
record = json.loads(session.get_modelmeta().custom_metadata_map["record"])
images = numpy.zeros((1, 3, {size}, {size}), numpy.uint8)  # yours, see Input
(embeddings,) = session.run(None, {{"images": images}})  # (1, {dimensions})
""",
    ".safetensors": """import torch
from PIL import Image
# proxy-anchor: a checkout of the repository that wrote this file
network, transform = torch.hub.load("proxy-anchor", "embedding", checkpoint="{name}", source="local")
embeddings = network(transform(Image.new("RGB", (640, 480)))[None])  # (1, {dimensions}); your image instead
""",
}
TURNED = {
    "upright": "Training images were rotated upright, as their EXIF orientation says. Rotate your own photos too.",
    "stored": "Training images were read as stored, ignoring EXIF orientation. Rotate your own photos upright.",
}


def path(file: Path) -> Path:
    """Path of the model card: one per stem, next to the file; the last export wins."""
    return file.with_name(f"{file.stem}-card.md")


def check(file: Path) -> None:
    """Raise FileExistsError where the card of a file would replace something that is not a card."""
    if path(file).exists() and MARK.encode() not in path(file).read_bytes():
        raise FileExistsError(f"{path(file)} exists and is not a card of export.py: choose another --out")


def text(file: Path, record: dict, measured: str, license: str, checkpoint: str) -> str:
    """The card as Markdown. measured: results of export.py, "" for none; license: of the pretrained weights."""
    network, recipe, pixels = record["network"], record["preprocessing"], record["normalization"]
    size, dimensions, resize = network["image_size"], network["embedding_size"], recipe["resize"]
    cosine = network.get("distance", "cosine") == "cosine"
    unit = "of unit length, to compare by cosine similarity" if cosine else "to compare by Euclidean distance"
    resized = f"its shorter side to {resize}" if isinstance(resize, int) else f"to {resize[1]} x {resize[0]}"
    values = f"{pixels['channels']} from 0 to {pixels['largest']}, mean {pixels['mean']}, std {pixels['std']}"
    inside = "The file does this" if file.suffix != ".safetensors" else "The network of torch.hub, below, does this"
    turned = TURNED[network.get("orientation", "stored")]
    threshold = Calibration.from_record(record["threshold"]).text() if "threshold" in record else "none"
    config, results = training(Path(checkpoint))
    if config.get("pretrained") == "none":
        license = "none were used"
    return f"""# {file.name}

Maps an image to {dimensions} numbers, {unit}: images of the same class get similar vectors, including
classes that it was not trained on.

Exported from `{Path(checkpoint).name}`, {MARK} {record["source"]}, as {record["weights"]}.
The sha256 of the file itself is {sha256(file)}.

## Results

{measured or "Not measured: the export was checked on unlabelled images."}

{results or "Training results are unknown: the files of the run are not next to the checkpoint."}

## Network

* Backbone: {network["model"]}
* License of its pretrained weights: {license}
* Training: {", ".join(f"{name} {value}" for name, value in config.items()) or "not known"}

## Input

{turned}

Decoded images, uint8 RGB, (N, 3, {size}, {size}) for any N, which you resize and crop: each image {resized} pixels
({recipe["interpolation"]}, antialiased, rounded to uint8), then the central {size} x {size}.

The pixels are then normalized: {values}. {inside}.

## Loading

```python
{LOAD[file.suffix].format(name=file.name, size=size, dimensions=dimensions)}```

## Intended use and limits

For retrieving images of the same class, among images like the training images. Measure it on your own data before you
rely on it; the results above hold only for the named dataset. It is not intended to identify people, and it has the
biases of its training images. Similarities are not probabilities. Recorded threshold for a
match, by the size of the gallery: {threshold}.

Made with {", ".join(f"{name} {version}" for name, version in record["versions"].items())}.
"""


def table(rows: dict[str, dict[str, float]]) -> str:
    """Metrics in percent as a table of Markdown, a line for each name of rows."""
    columns = list(next(iter(rows.values())))
    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    lines += [[name, *(f"{100 * row[column]:.2f}" for column in columns)] for name, row in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def training(checkpoint: Path) -> tuple[dict, str]:
    """The settings of the run that wrote a checkpoint and a sentence on its results, if its files lie beside it."""
    results, config = checkpoint.with_name(f"{checkpoint.stem}_results.txt"), checkpoint.with_name(run_folders.CONFIG)
    if not checkpoint.stem.endswith("_best") or not results.is_file() or not config.is_file():
        return {}, ""
    settings = run_folders.read_config(checkpoint.parent)
    if "loss" in settings:  # without the path of a file
        settings["loss"] = str(settings["loss"]).rpartition(":")[2]
    listed = ", ".join(map(printable, results.read_text().splitlines()))
    return (
        {name: printable(str(settings[name])) for name in SETTINGS if name in settings},
        f"Measured during training, not by the export: {listed} (percent; {results.name}).",
    )
