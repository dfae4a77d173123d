"""A run: the remaining epochs and the results so far; a signal stops it with everything saved."""

import shlex
import sys
import time
import traceback
from contextlib import ExitStack, contextmanager, suppress

import torch

from proxy_anchor import collectives, metrics
from proxy_anchor.evaluation import Result
from proxy_anchor.files import printable
from proxy_anchor.progress import progress
from proxy_anchor.runs import logbook, resuming, run_folders
from proxy_anchor.runs.logbook import Logbook
from proxy_anchor.runs.stopping import Interrupted, Stop
from proxy_anchor.weights import digest


class Run:
    """A context that continues a stopped run where it stopped, and saves everything when a signal stops it.

    parts: what last.pth holds besides the network, each with a state_dict; among them the "optimizer" and the
    "scheduler", which is stepped at the end of an epoch. by: the metric that tells which epoch is the best. evaluated:
    the network that the results are of, and that is saved after the best epoch, if it is not the one that trains.
    Raises ValueError on entering where last.pth does not fit.
    """

    def __init__(self, log: Logbook, network: torch.nn.Module, by: str = "R@1", *, evaluated=None, **parts):
        self.log, self.network, self.by, self.parts = log, network, by, parts
        self.evaluated = evaluated or network
        self.stop = Stop()
        self.remark = ""  # on the last evaluation
        self.start = time.perf_counter()
        self.progress: dict = {"epoch": 0, "losses": [], "seconds": 0.0, "rows": []}  # of metrics.csv, one per epoch

    def __enter__(self):
        with ExitStack() as contexts:
            contexts.enter_context(self.log)
            contexts.enter_context(self.stop)
            contexts.push(self._save_on_error)
            if self.log.resumes:
                self.progress = resuming.load(self.log.folder / run_folders.LAST, self.network, self.parts)
                # A no-op without gradients; the scheduler warns if no step came before it.
                self.parts["optimizer"].step()
                self.log.resume(self.progress)
                if self.rows and not self.losses and self.best is self.rows[-1]:  # maybe killed before it was saved
                    self.log.save_best(self.best, self.evaluated)
            self.contexts = contexts.pop_all()
        return self

    def __exit__(self, *error):
        return self.contexts.__exit__(*error)

    def _save_on_error(self, kind, error, trace):
        if isinstance(error, Interrupted):
            self.progress["seconds"] = time.perf_counter() - self.start
            self.log.save_last(self.network, self.parts, self.progress)
        elif isinstance(error, Exception):
            path = self.log.folder / run_folders.ERROR
            with suppress(OSError), open(path, "a", errors="backslashreplace") as file:  # of several processes too
                traceback.print_exception(error, file=file)

    @property
    def rows(self) -> list[dict]:
        return self.progress["rows"]

    @property
    def losses(self) -> list[float]:
        """The losses of the steps of this epoch."""
        return self.progress["losses"]

    @property
    def best(self) -> dict:
        return metrics.best(self.rows, self.by)

    @property
    def backbone(self) -> dict | None:
        """The metrics of the backbone alone, if they were measured."""
        return run_folders.read_backbone(self.log.folder)

    def measure_backbone(self, evaluate) -> None:
        """Evaluate the backbone alone, before the first step; evaluate() -> Result."""
        at_start = self.progress["epoch"] == 0 and not self.losses
        if at_start and collectives.from_rank_zero(lambda: self.backbone is None):  # the others may not see the file
            self.log.log_backbone(evaluate().metrics)

    def epochs(self, count: int):
        """Yield the numbers of the epochs that remain of `count`."""
        for epoch in range(self.progress["epoch"], count):
            self.start = time.perf_counter() - self.progress["seconds"]
            yield epoch

    def batches(self, loader):
        """The epoch's batches from the step where it stopped, with a progress bar, up to a signal."""
        epoch = self.progress["epoch"]
        loader.batch_sampler.set_epoch(epoch, done=len(self.losses))
        images = len(loader) * collectives.shard_sizes(loader.batch_sampler.images_per_batch)[collectives.rank()]
        self.bar = progress(loader, f"epoch {epoch}", images)
        return self.stop.watch(self.bar)

    def show_loss(self, loss: float) -> None:
        self.bar.show_loss(loss)

    def end_epoch(self, loss: float, result: Result) -> None:
        """Log the epoch, save the state of the run, and the network if it is the best so far."""
        epoch, scheduler = self.progress["epoch"], self.parts["scheduler"]
        row = {"epoch": epoch, "loss": loss, "lr": scheduler.get_last_lr()[0]}
        self.rows.append(row | {"seconds": round(time.perf_counter() - self.start, 2)} | result.metrics)
        self.remark = result.remark()
        scheduler.step()
        self.progress |= {"epoch": epoch + 1, "losses": [], "seconds": 0.0}
        self.log.log_epoch(self.rows)
        if self.best is self.rows[-1]:
            self.log.save_classes(epoch, result.by_class())
            self.progress["best"] = digest(self.evaluated.state_dict())  # by which its checkpoint is known
        # In this order: from last.pth the best can be saved again, should the run be killed in between.
        self.log.save_last(self.network, self.parts, self.progress)
        if self.best is self.rows[-1]:
            self.log.save_best(self.best, self.evaluated)

    def summary(self, data_flags: list[str]) -> str:
        """A table of the backbone alone, the best epoch and the last one, and the next command.

        data_flags: those by which evaluate.py finds the data.
        """
        best, last = self.best, self.rows[-1]
        ends = {f"best epoch ({best['epoch']})": best, f"last epoch ({last['epoch']})": last}
        rows = {name: metrics.metrics_only(row) for name, row in ends.items()}
        remark = self.remark
        if backbone := self.backbone:
            rows = {logbook.BACKBONE: backbone} | rows
            if metrics.plain(last)["R@1"] < metrics.plain(backbone)["R@1"]:
                remark += "Training made it worse: the last epoch is below the untrained backbone. "
                remark += "Try fewer epochs or a lower --lr.\n"
        text = f"{metrics.table(rows)}\n{remark}The best network is in {printable(str(self.log.folder))}"
        if metrics.prefix(last):  # of a fold, whose test set stays untouched, or of a network trained on all classes
            return text
        command = shlex.join(["python", "evaluate.py", *data_flags, "--resume", str(self.log.folder)])
        return f"{text}\nNext: {printable(command)} --report report"


@contextmanager
def ending(script: str):
    """A context for a training: one line says that the run had finished before, or that it was interrupted."""
    try:
        yield
    except run_folders.Finished as finished:
        print(finished)
    except Interrupted as interruption:
        print(f"{script}: {interruption}; everything is saved, --resume auto continues from here", file=sys.stderr)
        sys.exit(128 + interruption.signum)
