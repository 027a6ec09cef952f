"""A data set as a few tensor files: images as uint8, decoded and resized, for machines that lack the libraries or the
time to read the original. Knows nothing of where the images came from.

A packed folder holds `train-00000-of-00003.safetensors`, …, `test-…`; each part has the tensors `images` uint8
[n, C, H, W] and `labels` int64 [n], and as metadata the names of the classes.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from unitstep.files import read_tensors, write_tensors

PART_BYTES = 60_000_000  # a part is at most so large
SCHEMA = 1
PARTS = "{}-?????-of-?????.safetensors"


class Part(NamedTuple):
    """A split as it is packed."""

    images: Tensor
    """uint8 [N, C, H, W]."""
    labels: Tensor
    """int64 [N]."""
    classes: tuple[str, ...]


def is_packed(folder: Path) -> bool:
    return any(True for split in ("train", "test") for _ in folder.glob(PARTS.format(split)))


def write(folder: Path, split: str, images: Tensor, labels: Tensor, classes: Sequence[str]) -> list[Path]:
    """Write a split in parts of at most PART_BYTES; returns their paths.

    images: uint8 [N, C, H, W].  labels: int64 [N].
    """
    about = {"schema": SCHEMA, "classes": list(classes)}
    header = 2 * len(json.dumps(about)) + 1024  # quotes in it are escaped
    rows = max(1, (PART_BYTES - header) // (images[0].numel() + 8))
    count = -(-len(images) // rows)
    paths = []
    for number, (part, of) in enumerate(zip(images.split(rows), labels.split(rows), strict=True)):
        paths.append(folder / f"{split}-{number:05}-of-{count:05}.safetensors")
        write_tensors(paths[-1], {"images": part, "labels": of}, about)
    return paths


def read(folder: Path) -> dict[str, Part]:
    """The splits "train" and "test" of a packed folder. ValueError if a part is missing, damaged or of another set."""
    splits = {}
    for split in ("train", "test"):
        paths = sorted(folder.glob(PARTS.format(split)))
        wanted = [f"{split}-{number:05}-of-{len(paths):05}.safetensors" for number in range(len(paths))]
        if not paths or [path.name for path in paths] != wanted:
            raise ValueError(
                f"{folder} has not all parts of the split {split!r}, or parts of several packings ({len(paths)} are "
                "there): unitstep pack makes them anew"
            )
        parts = [_read(path) for path in paths]
        if len({(part.classes, part.images.shape[1:]) for part in parts}) != 1:
            raise ValueError(f"{folder}: the parts of the split {split!r} are of different data sets")
        images, labels = (torch.cat(tensors) for tensors in list(zip(*parts, strict=True))[:2])
        splits[split] = Part(images, labels, parts[0].classes)
    if splits["train"].classes != splits["test"].classes:
        raise ValueError(f"{folder}: train and test have different classes")
    return splits


def _read(path: Path) -> Part:
    tensors, about = read_tensors(path)
    try:
        images, labels = tensors["images"], tensors["labels"]
        if images.dtype != torch.uint8 or images.dim() != 4 or labels.shape != images.shape[:1]:
            raise ValueError(f"images of shape {list(images.shape)}, labels of shape {list(labels.shape)}")
        classes = tuple(about["classes"])
        if labels.dtype != torch.int64 or not ((labels >= 0) & (labels < len(classes))).all():
            raise ValueError(f"labels that are not 0 to {len(classes) - 1}")
        return Part(images, labels, classes)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged or was not written by unitstep pack ({error})") from error
