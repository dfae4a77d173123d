"""Signals that end a run, at a moment when nothing is lost: the end of a step."""

import signal
import sys
from itertools import chain, repeat

from proxy_anchor import collectives

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # SLURM can send SIGUSR1 some time before its limit


class Interrupted(Exception):
    """The run was told to stop by the signal `signum`."""

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


class Stop:
    """As a context: SIGTERM, SIGINT and SIGUSR1 are noted instead of killing. A second SIGINT (Ctrl-C) ends at once.

    after_each ends a loop over batches at a signal; check then raises Interrupted.
    """

    signum = 0  # that came to this process
    agreed = 0  # on which all processes stop

    def __enter__(self):
        self.previous = {signum: signal.signal(signum, self._note) for signum in SIGNALS}
        return self

    def __exit__(self, *error):
        for signum, handler in self.previous.items():
            signal.signal(signum, handler)

    def _note(self, signum, frame):
        # torchrun passes a Ctrl-C on twice.
        if self.signum == signum == signal.SIGINT and collectives.world_size() == 1:
            raise KeyboardInterrupt
        self.signum = signum
        if collectives.rank() == 0:
            print(f"{signal.Signals(signum).name}: stopping at the end of this step", file=sys.stderr, flush=True)

    def after_each(self, batches):
        """Yield the batches, up to the first that ends with a signal noted.

        Where several processes share the work, they agree on it at each batch; one that has fewer of them than another
        takes part until that one has done its last.
        """
        missing = collectives.all_reduce_max(len(batches)) - len(batches)
        for batch in chain(batches, repeat(None, missing)):
            if batch is not None:
                yield batch
            self.agreed = collectives.all_reduce_max(self.signum)
            if self.agreed:
                return

    def check(self) -> None:
        """Raise Interrupted if a loop was ended."""
        if self.agreed:
            raise Interrupted(self.agreed)
