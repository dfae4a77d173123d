"""Weights & Biases, where there are credentials for it."""

import netrc
import os
from pathlib import Path
from urllib.parse import urlparse

SHOWN = 200  # characters of an error of wandb
# What we would set where the user has not, by these variables of wandb.
VARIABLES = {
    "project": "WANDB_PROJECT",
    "notes": "WANDB_NOTES",
    "dir": "WANDB_DIR",
    "id": "WANDB_RUN_ID",
    "resume": "WANDB_RESUME",
}


def has_credentials() -> bool:
    """Whether wandb would find an API key, in the environment or in the netrc file, without asking for one."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, ValueError, netrc.NetrcParseError):  # ValueError: no URL, or not UTF-8
        return False


def start(mode: str | None, log_dir: Path, project: str, name: str, config: dict, run_id: str | None = None):
    """A wandb run, which continues that of run_id if given, or None if the mode is disabled.

    Mode None: WANDB_MODE, else online with credentials, else disabled. What the user's VARIABLES say comes first.
    Raises ValueError for online without credentials, for which wandb would ask, and RuntimeError if wandb fails.
    """
    if mode is None:
        mode = os.environ.get("WANDB_MODE") or ("online" if has_credentials() else "disabled")
    if mode == "disabled":
        return None
    if mode == "online" and not has_credentials():
        raise ValueError("wandb has no credentials to go online with: run `wandb login`, or choose --wandb offline")
    import wandb  # slow to import, and not everyone has it

    log_dir.mkdir(parents=True, exist_ok=True)
    resume = "allow" if run_id and mode == "online" else None
    settings = {"project": project, "notes": name, "dir": str(log_dir), "id": run_id, "resume": resume}
    settings = {name: value for name, value in settings.items() if not os.environ.get(VARIABLES[name])}
    try:
        return wandb.init(mode=mode, config=config, **settings)
    except (wandb.errors.Error, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:SHOWN]
        raise RuntimeError(f"wandb does not start: {reason}. Choose --wandb offline or disabled") from error
