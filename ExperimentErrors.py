"""What a user can mend (`InputError`), and files that are written whole or not at all (`atomic_path`)."""

import os
from contextlib import contextmanager
from pathlib import Path


class InputError(ValueError):
    """Wrong input; the message says in one line what is wrong and what to do. The runners exit with code 2 on it."""


@contextmanager
def atomic_path(path):
    """Yield a temporary path beside `path`; rename it to `path` when the block ends, delete it when the block fails."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
