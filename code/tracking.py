"""Weights & Biases, where there are credentials for it."""

import netrc
import os
from pathlib import Path
from urllib.parse import urlparse


def has_credentials() -> bool:
    """Whether wandb would find an API key, in the environment or in the netrc file, without asking for one."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def start(mode: str | None, log_dir: Path, project: str, name: str, config: dict, run_id: str | None = None):
    """A wandb run, which continues that of run_id if given, or None if the mode is disabled.

    Mode None: WANDB_MODE, else online with credentials, else disabled.
    Raises ValueError for online without credentials, for which wandb would ask, and RuntimeError if wandb fails.
    """
    if mode is None:
        mode = os.environ.get("WANDB_MODE") or ("online" if has_credentials() else None)
        if mode is None:
            print("wandb has no credentials here (wandb login): logging only to the run's folder.")
    if mode in (None, "disabled"):
        return None
    if mode == "online" and not has_credentials():
        raise ValueError("wandb has no credentials to go online with: run `wandb login`, or choose --wandb offline")
    import wandb  # slow to import, and not everyone has it

    log_dir.mkdir(parents=True, exist_ok=True)
    resume = "allow" if run_id and mode == "online" else None
    try:
        return wandb.init(
            project=project, notes=name, dir=str(log_dir), mode=mode, config=config, id=run_id, resume=resume
        )
    except wandb.errors.Error as error:
        raise RuntimeError(f"wandb does not start: {error}. Choose --wandb offline or disabled") from error
