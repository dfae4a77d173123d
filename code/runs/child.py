"""Runs a command as a child process that receives this process's signals and does not outlive it."""

import ctypes
import signal
import subprocess
import sys

from proxy_anchor.runs.stopping import SIGNALS, Interrupted

PR_SET_PDEATHSIG = 1  # of Linux


def run(command: list[str]) -> int:
    """Run the command to its end and return its exit status, or 128 + the signal that killed it.

    SIGTERM, SIGINT and SIGUSR1 are passed on once each: the child has its own session, so a terminal's Ctrl-C does not
    reach it twice. Raises Interrupted after the child has ended if one came.
    """
    received: list[int] = []
    child = None

    def forward(signum, frame):
        received.append(signum)
        if child:
            child.send_signal(signum)

    libc = ctypes.CDLL(None) if sys.platform == "linux" else None

    def end_with_parent():  # also on SIGKILL (Linux only; elsewhere the run's lock blocks a second start)
        if libc:
            libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)

    previous = {signum: signal.signal(signum, forward) for signum in SIGNALS}
    try:
        child = subprocess.Popen(command, start_new_session=True, preexec_fn=end_with_parent)
        if received:  # before the child existed
            child.send_signal(received[0])
        status = child.wait()
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)
    if received:
        raise Interrupted(received[0])
    return status if status >= 0 else 128 - status
