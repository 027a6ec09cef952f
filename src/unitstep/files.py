"""Files that are written whole or not at all: aside, flushed to the disk, renamed. Knows nothing of what is in them."""

import contextlib
import json
import os
from pathlib import Path
from typing import Any


def write_whole(path: Path, data: bytes) -> None:
    """Write a file whole or not at all. OSError, with the old file untouched, if that fails."""
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(aside, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename too
    finally:
        os.close(folder)


def write_json(path: Path, value: Any) -> None:
    write_whole(path, (json.dumps(value, indent=1) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. ValueError, with the file's name, if it is anything else."""
    try:
        value = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is damaged or cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: it does not hold a JSON object")
    return value
