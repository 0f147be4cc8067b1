"""Files that are written whole or not at all."""

import errno
import os
import re
import struct
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(path):
    """Yield a temporary path beside `path`; rename it to `path` when the block ends, delete it when the block fails.

    Raises OSError, with `path` as its file name, when the disk is full or the folder cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno and error.filename in (None, str(temporary)):  # a failed write names no file
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_file(path):
    """`atomic_path` as an open binary file, for torch.save: on a full disk that raises RuntimeError, this OSError."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        try:
            yield file
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def is_whole_archive(path) -> bool:
    """Whether the file is a zip archive, as torch.save writes, all of whose checksums are right; torch.load checks none.

    Raises OSError when the file cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, ValueError, struct.error, zlib.error):
        return False
    except OSError as error:
        if error.errno == errno.EINVAL:  # a damaged offset lies before the file's beginning
            return False
        raise


def cache_folder() -> Path | None:
    """The toolkit's folder in the user's cache, which is made if need be; None if there is none that can be written."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    folder = root / "enhanced-taylor-pruning"
    if not root.is_absolute():  # there is no home folder
        return None
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None


def remove_leftovers(folder):
    """Delete what `atomic_path` was writing into `folder` when its process was killed. No other process may write there."""
    for path in Path(folder).glob(".*.tmp*"):
        if re.fullmatch(r"\.(.+)\.\d+\.tmp(\.\w+)?", path.name):
            path.unlink()
