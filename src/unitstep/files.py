"""Files that are written whole or not at all: aside, flushed to the disk, renamed; JSON, and tensors with JSON about
them in safetensors. Knows nothing of what they mean."""

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor


def check_writable(path: Path) -> None:
    """ValueError, before the work and not after it, if no file can be written at `path`; its folder is made."""
    path = path.resolve()  # as `write_whole`
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is {'a folder' if path.is_dir() else 'no ordinary file'}: name a file to be written")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}") from error


def write_whole(path: Path, data: bytes) -> None:
    """Write a file whole or not at all. OSError, with the old file untouched, if that fails."""
    path = path.resolve()  # the file that a link leads to
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


def remove_unfinished(path: Path) -> None:
    """Remove what processes that were killed while they wrote the file `path` have left beside it."""
    for aside in path.parent.glob(f".{path.name}.*"):
        aside.unlink(missing_ok=True)


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


def write_tensors(path: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    """A safetensors file, with `about` in its metadata."""
    own = {name: x.detach().cpu().clone(memory_format=torch.contiguous_format) for name, x in tensors.items()}
    write_whole(path, save(own, metadata={"unitstep": json.dumps(about)}))


def read_about(path: Path) -> dict[str, Any]:
    """What `write_tensors` was told about the tensors. ValueError, with the file's name, if it did not write them."""
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})["unitstep"])
    except (SafetensorError, ValueError, KeyError, OSError) as error:
        raise ValueError(
            f"{path} is damaged or was not written by unitstep ({error}); it was not loaded: move it away to go on"
        ) from error
    if not isinstance(about, dict):
        raise ValueError(f"{path} was not written by unitstep; it was not loaded: move it away to go on")
    return about


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors, about), as `write_tensors` was given them. ValueError, with the file's name, if it did not write
    them."""
    about = read_about(path)
    return load_file(path), about
