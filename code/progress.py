"""Progress bars: in a terminal, or as a plain line every half minute."""

import sys
from typing import Any

from tqdm import tqdm

from proxy_anchor import collectives


class Bar(tqdm):
    """A progress bar over images, or over batches of them, which can show the loss."""

    def __iter__(self):
        for item in self.iterable:
            yield item
            self.update(len(item[0]) if self.batched else 1)
        self.close()

    def show_loss(self, loss: float) -> None:
        self.set_postfix(loss=f"{loss:.5g}", refresh=False)


def progress(items, description: str, images: int | None = None, unit: str = "img") -> Bar:
    """A progress bar over items; where stderr is not a terminal, a plain line every half minute.

    images: where the items are batches (images, labels), how many images they hold. Where several processes share the
    work, only the first shows a bar, over its own share of the images.
    """
    settings: dict[str, Any] = {"desc": description, "total": images, "unit": unit, "leave": False}
    if collectives.rank() > 0:
        settings |= {"disable": True}
    elif sys.stderr.isatty():
        settings |= {"dynamic_ncols": True}
    else:
        settings |= {"ncols": 80, "ascii": True, "file": _Lines(), "delay": 30, "mininterval": 30, "maxinterval": 30}
    bar = Bar(items, **settings)
    bar.batched = images is not None
    return bar


class _Lines:
    """stderr for a tqdm bar, one line per state."""

    def write(self, text):
        if text := text.replace("\r", "").strip():
            sys.stderr.write(text + "\n")

    def flush(self):
        sys.stderr.flush()
