"""Files that are replaced completely or not at all."""

import os
import shutil
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path):
    """Yields a path beside `path` to write to; at the end the file is flushed and takes the place of `path`.

    Raises OSError, naming the file, if it cannot be written; the old file is then still there.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError
        if path.parent.is_dir():
            cause = f"the disk has {shutil.disk_usage(path.parent).free / 1e6:,.0f} MB free"
        else:
            cause = f"there is no folder {path.parent}"
        raise OSError(f"{path} cannot be written ({' '.join(str(error).split())}); {cause}") from error
    finally:
        temporary.unlink(missing_ok=True)
