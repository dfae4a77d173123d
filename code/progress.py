"""Progress bars: in a terminal, or as a plain line every half minute."""

import sys

from tqdm import tqdm

from proxy_anchor import collectives


class Bar(tqdm):
    """A progress bar that shows the loss."""

    def show_loss(self, loss: float) -> None:
        self.set_postfix(loss=f"{loss:.5g}", refresh=False)


def progress(batches, description: str) -> Bar:
    """A progress bar over the batches; where stderr is not a terminal, a plain line every half minute."""
    if collectives.rank() > 0:
        return Bar(batches, disable=True)
    if sys.stderr.isatty():
        return Bar(batches, description, leave=False, dynamic_ncols=True)
    return Bar(
        batches, description, leave=False, ncols=80, ascii=True, file=_Lines(), delay=30, mininterval=30, maxinterval=30
    )


class _Lines:
    """stderr for a tqdm bar, one line per state."""

    def write(self, text):
        if text := text.replace("\r", "").strip():
            sys.stderr.write(text + "\n")

    def flush(self):
        sys.stderr.flush()
