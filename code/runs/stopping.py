"""Ends a run on a signal, but only after the current step, so that nothing is lost."""

import signal
import sys
from itertools import chain, repeat

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)  # SLURM can send SIGUSR1 some time before its limit


class Interrupted(Exception):
    """The run was stopped by the signal `signum`."""

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum


class Stop:
    """A context that records SIGTERM, SIGINT and SIGUSR1 instead of dying; a second SIGINT (Ctrl-C) ends at once.

    watch ends a loop over batches after a signal; check then raises Interrupted.
    """

    signum = 0  # the signal that this process received
    common_signum = 0  # the signal on which all processes stop

    def __enter__(self):
        self.previous = {signum: signal.signal(signum, self._record) for signum in SIGNALS}
        return self

    def __exit__(self, *error):
        for signum, handler in self.previous.items():
            signal.signal(signum, handler)

    def _record(self, signum, frame):
        from proxy_anchor import collectives

        # torchrun forwards a Ctrl-C twice.
        if self.signum == signum == signal.SIGINT and collectives.world_size() == 1:
            raise KeyboardInterrupt
        self.signum = signum
        if collectives.rank() == 0:
            print(f"{signal.Signals(signum).name}: stopping at the end of this step", file=sys.stderr, flush=True)

    def watch(self, batches):
        """Yield the batches until a signal was received during one of them.

        Several processes decide together after each batch. A process with fewer batches than another keeps taking part
        in these decisions.
        """
        from proxy_anchor import collectives

        missing = collectives.all_reduce_max(len(batches)) - len(batches)
        for batch in chain(batches, repeat(None, missing)):
            if batch is not None:
                yield batch
            self.common_signum = collectives.all_reduce_max(self.signum)
            if self.common_signum:
                return

    def check(self) -> None:
        """Raise Interrupted if watch ended a loop."""
        if self.common_signum:
            raise Interrupted(self.common_signum)
