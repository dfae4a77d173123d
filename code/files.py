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
        free = shutil.disk_usage(path.parent).free
        raise OSError(
            f"{path} cannot be written ({' '.join(str(error).split())}); the disk has {free / 1e6:,.0f} MB free"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
