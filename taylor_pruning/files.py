"""Files that are written whole or not at all."""

import errno
import os
import re
import struct
import zipfile
import zlib
from contextlib import contextmanager
from pathlib import Path

from taylor_pruning.errors import InputError
from taylor_pruning.options import check_argument


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
    """`atomic_path` as an open binary file, for torch.save.

    On a full disk and on Ctrl-C torch.save raises RuntimeError, because it then cannot end its archive; this raises OSError
    and KeyboardInterrupt.
    """
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        try:
            yield file
        except RuntimeError as error:
            cause = error
            while cause is not None and not isinstance(cause, (OSError, KeyboardInterrupt)):
                cause = cause.__context__
            if cause is None:
                raise
            raise cause from None


def user_path(text: str | Path) -> Path:
    """The path with the home folder for ~, also where the shell leaves it, as in --output-dir=~/runs.

    Raises InputError where there is no such user, and for what no path can hold.
    """
    if "\0" in str(text):
        raise InputError(f"{text!r} is no path: it holds a zero byte; give the path of a file or folder")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise InputError(f"{text}: there is no home folder for ~; write ./{text} for a file of that name") from error


def input_file(path: str | Path, name: str) -> Path:
    """The path of a file that will be read, called `name`. Raises InputError if it is no path."""
    if not isinstance(path, (str, os.PathLike)):
        raise InputError(f"{name} is of type {type(path).__name__}; give the path of a file")
    return user_path(path)


def output_file(path: str | Path, name: str) -> Path:
    """The path of a file that will be written, called `name`. Raises InputError where no file can be."""
    file = input_file(path, name)
    if file.is_dir():
        raise InputError(f"{name} {file} is a folder; give the path of a file")
    if not file.parent.is_dir():
        raise InputError(f"{name} {file} cannot be written, as there is no folder {file.parent}; make it first")
    return file


def checkpoint_file(path: str | Path | None, resume: bool) -> Path | None:
    """The path of a checkpoint that will be written, None where there is none. Raises InputError where no file can be."""
    check_argument("resume", resume, bool)
    if path is None and resume:
        raise InputError("resume=True needs checkpoint=, the file to continue from")
    return None if path is None else output_file(path, "the checkpoint")


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
