"""Which calibration and which threshold an index goes by, and why there is none."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from proxy_anchor.checkpoint import Checkpoint, in_run
from proxy_anchor.files import printable

if TYPE_CHECKING:
    from proxy_anchor.api import Search
    from proxy_anchor.index.store import Index
    from proxy_anchor.spec import Calibration


def threshold_for_queries(search: Search, by_folder: bool) -> tuple[float | None, str]:
    """The threshold of an index or of its checkpoint, and a line on it, or on why it is None.

    by_folder: whether the queries are folders. A calibration for other queries is taken out of the search.
    """
    index = search.index
    asked, held = ("folders" if of_folders else "images" for of_folders in (by_folder, index.made["by_folder"]))
    if asked != held:
        search.calibration = None
        return None, f"There is no threshold for {asked} among {held}, so no query can be refused: give --threshold"
    calibration = index.calibration if by_folder else search.calibration
    if not calibration:
        return None, (
            "There is no threshold for this index, so no query can be refused: give --threshold or, if each folder of "
            "the index shows one thing, run `search.py index` again with --calibrate"
        )
    size = len(index.images)
    limit = calibration.at(size)
    return limit, f"Threshold for {size:,} {held}: {index.measure} {limit:.4f}; {calibration.promise(size)}"


def for_groups(index: Index) -> Calibration | None:
    """The calibration with the threshold to sort an index by: its own or that of its checkpoint; None without one.

    Raises ValueError for an index of folders, and FileNotFoundError if the checkpoint is gone.
    """
    path = index.made["checkpoint"]
    if index.made["by_folder"]:
        raise ValueError(
            f"{index.folder} is an index of folders, which has no threshold to sort by: give --things N or "
            "--threshold T"
        )
    if index.spec.backbone_only or (index.calibration and index.calibration.groups is not None):
        return index.calibration
    if not os.path.exists(path):
        raise FileNotFoundError(
            f"The checkpoint {path} of {index.folder} is gone, so its threshold cannot be read: give --things N or "
            "--threshold T"
        )
    return of_checkpoint(index, path)


def threshold_for_groups(calibration: Calibration | None, images: str) -> float:
    """The threshold to sort images by, a folder or an index of this name. Raises ValueError without any."""
    if calibration is None or calibration.groups is None:
        raise ValueError(
            f"There is no threshold to sort {images} by: give --things N or --threshold T, or record one with "
            "evaluate.py --calibrate or, if each folder of an index shows one thing, with `search.py index --calibrate`"
        )
    return calibration.groups


def to_export(index: Index, resume: str | None) -> tuple[Calibration | None, str]:
    """The calibration for images in an index, and why there is none; resume: the checkpoint, if it has moved.

    Raises ValueError if the calibration of a checkpoint would not be used.
    """
    by_folder, recorded = index.made["by_folder"], index.made["checkpoint"]
    if resume and (by_folder or index.spec.backbone_only or index.calibration):
        raise ValueError(f"{index.folder} does not use the threshold of a checkpoint: leave out --resume")
    if by_folder:
        return None, "that of an index by folder is for folders, not for images"
    reason = "run the `search.py index` command with --calibrate, if each folder shows one thing, and export again"
    if index.spec.backbone_only or index.calibration:
        return index.calibration, reason
    if not resume and not os.path.exists(recorded):
        return None, f"the checkpoint {printable(recorded)} is gone: give its new path with --resume"
    path = in_run(resume) if resume else recorded
    return of_checkpoint(index, path), f"{reason}; or `evaluate.py --calibrate` first"


def of_checkpoint(index: Index, path: str) -> Calibration | None:
    """That of the checkpoint of an index of images; None without one. Raises ValueError if it is another checkpoint."""
    checkpoint = Checkpoint(path)
    index.check({"weights": checkpoint.identity, "network": index.spec.to_record(), "checkpoint": path})
    return checkpoint.calibration
