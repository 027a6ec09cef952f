"""Where images come from: sources, columns, splits, decoding, batches and augmentation; nothing about nets, neurons,
normalisation or recipes.

An image is uint8 from the file to the batch. A set that fits lives as one tensor on the device (`InMemory`); a larger
one is decoded on the way by worker processes (`Streamed`). Batches are a pure function of (split, seed, position).
"""

from __future__ import annotations

import copy
import glob
import hashlib
import logging
import math
import os
import re
import sys
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, final
from urllib.parse import parse_qsl
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad
from torch.utils.data import DataLoader, Dataset

from unitstep import packed
from unitstep.pictures import Box, centre_box, decode, resized

AUGMENTATIONS = ("none", "flip", "crop-flip", "resized-crop-flip")
BORDERS = ("mean", "mirror")
EVALUATION_ZOOM = 256 / 224  # streamed evaluation: shorter side over crop side
MANY = 10_000  # an in-memory set of at least so many images is decoded by worker processes
WORKERS = min(8, len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1)
MEMORY_LIMIT = 4 * 2**30  # bytes of a decoded split; larger ones are streamed

_EMBEDDED = {"fashion-mini": "fashion_mini"}
_TEST_NAMES = ("test", "validation", "valid", "val")
_LABEL_NAMES = ("label", "labels", "fine_label", "coarse_label", "target", "class")


def load_train(
    source: str,
    *,
    size: int,
    channels: int,
    augment: str = "none",
    bad_images: Literal["refuse", "skip"] = "refuse",
) -> tuple[Split, Split]:
    """Load the split `train` of a source as (train, validation).

    Validation is a class-balanced 4 % of the training images: the same number of each class (at least one, at most half
    of what the class has), chosen by a generator with seed 0, so it is the same in every run.

    `source` is `fashion-mini` (ships with the package); or a folder of parquet shards in hub layout
    (`train-00000-of-00004.parquet`, `test-…`); or a folder that `pack` made; or a folder of class folders
    (`DIR/train/cat/1.jpg`, `DIR/test/…`); or a Hugging Face hub name (`uoft-cs/cifar10`). The image and the label
    column are found by their types; where there are several, the source says which: `PATH?image=img&label=fine_label`
    (`config=NAME` picks a hub configuration).
    The test split is the first of test, validation, valid, val that has labels. It must exist here already.

    Every image becomes uint8 [`channels`, `size`, `size`]: the shorter side is resized to `size` pixels (bicubic,
    antialiased), then the centre is cut out. Grey is repeated for 3 channels, colour becomes luma for 1; transparent
    pixels lie on white; 16 bits are rounded to 8; EXIF orientation is applied.

    A set is streamed instead of held in memory if `augment` is "resized-crop-flip", or if a split of it would take more
    than 4 GiB; then evaluation resizes the shorter side to round(size·256/224) before the centre crop.

    `bad_images`: "refuse" raises at the first unreadable image (streamed: when its batch is read); "skip" leaves them
    out and warns (streamed: costs one pass over all images now).
    Up to eight processes decode a streamed set, or an in-memory one of at least 10,000 images. Off Linux they import
    the main script again, so it needs its `if __name__ == "__main__"`.

    Errors: ValueError for whatever is wrong with the arguments or the source, with the way out.
    """
    opened = _open(source, size, channels, augment, bad_images)
    labels = opened.labels["train"]
    held = _held_out(labels, opened.classes, source)
    return opened.split("train", (~held).nonzero().flatten()), opened.split("train", held.nonzero().flatten())


def load_test(
    source: str,
    *,
    size: int,
    channels: int,
    augment: str = "none",
    bad_images: Literal["refuse", "skip"] = "refuse",
) -> Split:
    """Load the test split of a source: the first of test, validation, valid, val that has labels.

    Arguments and errors are those of `load_train`. `augment` is the recipe's: it augments nothing here, but
    decides, as in `load_train`, how images are resized for evaluation.
    """
    opened = _open(source, size, channels, augment, bad_images)
    return opened.split(opened.test, torch.arange(len(opened.labels[opened.test])))


def pack(
    source: str,
    out: str | Path,
    *,
    size: int,
    channels: int,
    bad_images: Literal["refuse", "skip"] = "refuse",
) -> list[Path]:
    """Decode a source once and write it to the folder `out` as tensor files of at most 60 MB; returns their paths.

    The folder is a source itself, for images of this size and number of channels: training takes the same images from
    it in the same order (unless images were skipped), and needs neither `datasets` nor a decoder. Arguments and errors
    are those of `load_train`; ValueError also if `out` holds something, or if the set is too large for memory.
    """
    folder = Path(out)
    opened = _open(source, size, channels, "none", bad_images)
    if isinstance(opened, _Opened) and opened.streamed:
        raise ValueError(f"{source!r} is too large for memory at {size}×{size} pixels; only smaller sets can be packed")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is not empty: choose another folder")
    parts = {  # all is decoded before anything is written
        name: opened.split(split, torch.arange(len(opened.labels[split])))
        for name, split in (("train", "train"), ("test", opened.test))
    }
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, part in parts.items():
        assert isinstance(part, InMemory)
        paths += packed.write(folder, name, part.images, part.labels, part.classes)
    return paths


def mix(*numbers: int) -> int:
    """Mix integers of any size and sign into one seed, 0 ≤ seed < 2^63: BLAKE2b of their decimal text with commas.

    The same on every machine; `mix(1, 2)`, `mix(2, 1)` and `mix(12)` have nothing to do with one another.
    """
    text = ",".join(str(int(number)) for number in numbers)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


class _Changes(NamedTuple):
    """How images are changed at random: the arguments of `Split.batches`."""

    augment: str
    padding: int
    border: str
    cutout: int


class Split(ABC):
    """The labelled images of one split, and how batches of them are made. Abstract: `InMemory` or `Streamed`.

    `classes`: names, K ≥ 2; `labels`: int64 [N], 0 ≤ label < K; `shape`: (C, H, W) of a batch's images;
    `short`: pixels that an image's shorter side is resized to before the centre is cut out for evaluation.
    """

    classes: tuple[str, ...]
    labels: Tensor
    shape: tuple[int, int, int]
    short: int

    def __len__(self) -> int:
        return len(self.labels)

    def steps(self, size: int) -> int:
        """Number of training batches in one pass: N // size, at least 1."""
        return max(1, len(self) // _positive(size, "batch size"))

    def batches(
        self,
        size: int,
        *,
        seed: int | None = None,
        start: int = 0,
        augment: str = "none",
        padding: int = 4,
        border: str = "mean",
        cutout: int = 0,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (images uint8 [B, C, H, W], labels int64 [B]) of one pass over the split, from batch `start` on.

        Without a seed: all images in order, the last batch smaller, never augmented. With a seed: a random order, and
        `steps(size)` batches; the rest of N / size is dropped, and a split smaller than a batch is one batch.
        Both are pure functions of (seed, position): starting at batch k yields what a full pass yields from there.
        The order comes from a CPU generator seeded with `mix(seed)`, so it is the same on every device.
        padding: pixels added on each side of images in memory before "crop-flip" cuts; border: what they are, "mean"
        (the split's mean pixel) or "mirror" (the image, mirrored at its outermost pixels).  cutout: side of a square,
        in pixels, that is painted over with the mean pixel, around a random pixel of each augmented image.

        Errors: ValueError for an unknown augmentation or border, an augmentation without a seed, or a size, start or
        padding out of range.
        """
        _positive(size, "batch size")
        _one_of(augment, AUGMENTATIONS, "augment")
        _one_of(border, BORDERS, "border")
        if seed is None and augment != "none":
            raise ValueError(f"augment={augment!r} needs a seed; batches without a seed are for evaluation")
        if padding < 0 or cutout < 0:
            raise ValueError(f"padding and cutout must be 0 or more pixels, not {padding} and {cutout}")
        if border == "mirror" and padding >= min(self.shape[1:]):
            raise ValueError(f"{padding} pixels cannot be mirrored at the border of images of {self.shape[1:]} pixels")
        if seed is None:
            order = torch.arange(len(self))
        else:
            order = torch.randperm(len(self), generator=_generator(seed))[: self.steps(size) * size]
        batches = order.split(size)
        if not 0 <= start <= len(batches):
            raise ValueError(f"start={start} is not a batch of this pass: give 0 to {len(batches)}")
        return self._read(batches[start:], seed, start, _Changes(augment, padding, border, cutout))

    @abstractmethod
    def to(self, device: torch.device | str) -> Split:
        """A split like this one whose batches are on `device`."""

    @abstractmethod
    def _read(
        self, batches: Sequence[Tensor], seed: int | None, start: int, changes: _Changes
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the images at each of `batches` (int64 [B], positions in the split; the first is batch `start`)."""


@final
class InMemory(Split):
    """A split held as one tensor: `images` uint8 [N, C, H, W], `labels` integers [N], names of `classes`.

    Augmentation works on whole batches, on their device; batch k draws from a CPU generator seeded with `mix(seed, k)`.
    "flip" mirrors each image with probability 1/2; "crop-flip" also shifts it by up to `padding` pixels both ways.
    Pixels are not normalised yet, so with border "mean" what comes in from outside has the value `fill`, the split's
    mean pixel, rounded (one integer for all channels). "resized-crop-flip" needs the large images: only a
    `Streamed` split has it.

    Errors: ValueError if the parts do not fit together.
    """

    def __init__(self, images: Tensor, labels: Tensor, classes: Sequence[str]) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.numel() == 0:
            raise ValueError(f"images must be uint8 [N, C, H, W] with N ≥ 1, not {images.dtype} {list(images.shape)}")
        if labels.shape != images.shape[:1] or labels.is_floating_point():
            raise ValueError(f"labels must be {len(images)} integers, not {labels.dtype} {list(labels.shape)}")
        self.images, self.labels, self.classes = images, labels.long(), tuple(classes)
        self.shape = (images.shape[1], images.shape[2], images.shape[3])
        self.short = images.shape[3]
        self.fill = round(images.cpu().numpy().mean(dtype=np.float64))
        _check_classes(self.classes, "these images")
        _check_labels(self.labels, self.classes, "these images")

    def to(self, device: torch.device | str) -> InMemory:
        moved = copy.copy(self)
        moved.images, moved.labels = self.images.to(device), self.labels.to(device)
        return moved

    def _read(
        self, batches: Sequence[Tensor], seed: int | None, start: int, changes: _Changes
    ) -> Iterator[tuple[Tensor, Tensor]]:
        if changes.augment == "resized-crop-flip":
            raise ValueError(
                f"images in memory have no {changes.augment!r}: load the set with augment={changes.augment!r}"
            )
        if not batches:
            return iter(())
        order = torch.cat(list(batches)).to(self.images.device)  # at once: a copy per batch would wait for the device
        rows = order.split(len(batches[0]))
        return (self._batch(those, seed, k, changes) for k, those in enumerate(rows, start))

    def _batch(self, rows: Tensor, seed: int | None, position: int, changes: _Changes) -> tuple[Tensor, Tensor]:
        images = self.images[rows]
        if seed is not None and changes.augment != "none":
            by = changes.padding if changes.augment == "crop-flip" else 0
            fill = self.fill if changes.border == "mean" else None
            generator = _generator(seed, position)
            images = _shift_and_flip(images, by, fill, generator)
            if changes.cutout:
                images = _cut_out(images, changes.cutout, self.fill, generator)
        return images, self.labels[rows]


@final
class Streamed(Split):
    """A split whose images are decoded on the way, by other processes; made by `load_train` and `load_test`.

    Evaluation, and training with augment="none": shorter side to round(size·256/224), then the centre crop.
    "flip" mirrors each image with probability 1/2. "resized-crop-flip" cuts out a random box (8–100 % of the area,
    aspect ratio 3/4–4/3, log-uniform), resizes it to size×size, and flips. The image in row i draws from a generator
    seeded with `mix(seed, i)`: the number of workers and the start change nothing.
    `labels` stay on the CPU; batches are sent to the device. An iterator that is dropped ends its processes.

    Errors while reading: ValueError that names the first unreadable image, or for "crop-flip" or a cutout.
    """

    def __init__(self, reader: _Reader, rows: Tensor, labels: Tensor, classes: tuple[str, ...]) -> None:
        self.labels, self.classes = labels, classes
        self.shape = (reader.channels, reader.size, reader.size)
        self.short = reader.short
        self._reader, self._rows, self._device = reader, rows, torch.device("cpu")

    def to(self, device: torch.device | str) -> Streamed:
        moved = copy.copy(self)
        moved._device = torch.device(device)
        return moved

    def _read(
        self, batches: Sequence[Tensor], seed: int | None, start: int, changes: _Changes
    ) -> Iterator[tuple[Tensor, Tensor]]:
        if changes.cutout:
            raise ValueError("images that are streamed have no cutout: set it to 0")
        if changes.augment == "crop-flip":
            raise ValueError(
                "images that are streamed, as sets of more than 4 GiB are, cannot be padded and cropped: set augment "
                "to resized-crop-flip, flip or none"
            )
        jobs = (_Job(self._rows[positions].tolist(), seed, changes.augment) for positions in batches)
        pin = self._device.type == "cuda"
        decoded = _decode_all(self._reader, jobs, min(WORKERS, len(batches)), pin)
        for positions, (images, bad) in zip(batches, decoded, strict=True):
            if bad:
                raise _unreadable(bad)
            yield images.to(self._device, non_blocking=pin), self.labels[positions].to(self._device)


# --------------------------------------------------------------------------------------------- arguments and randomness


def _positive(number: int, what: str) -> int:
    if number < 1:
        raise ValueError(f"{what} must be at least 1, not {number}")
    return number


def _one_of(value: str, known: Sequence[str], what: str) -> None:
    if value not in known:
        raise ValueError(f"unknown {what} {value!r}: choose one of {', '.join(known)}")


def _generator(*numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(mix(*numbers))


# ----------------------------------------------------------------------------------------- opening a source: `datasets`


@dataclass(frozen=True)
class _Opened:
    """A checked source: its splits as tables of encoded images, the labels, and how images are to be read."""

    tables: Mapping[str, Any]  # split → datasets.Dataset in arrow format, image column only
    labels: Mapping[str, Tensor]  # split → int64 [N]
    test: str
    classes: tuple[str, ...]
    image: str
    size: int
    channels: int
    streamed: bool
    bad_images: str

    def split(self, name: str, rows: Tensor) -> Split:
        """The given rows (int64 [N]) of a split, decoded if it is to live in memory."""
        short = round(self.size * EVALUATION_ZOOM) if self.streamed else self.size
        reader = _Reader(self.tables[name], self.image, name, self.size, self.channels, short)
        shape = (0 if self.streamed else len(rows), self.channels, self.size, self.size)
        images = torch.empty(shape, dtype=torch.uint8)
        bad: dict[int, _Fault] = {}
        if not self.streamed or self.bad_images == "skip":  # read every image once
            jobs = (_Job(chunk.tolist()) for chunk in rows.split(256))
            done = 0
            for decoded, faults in _decode_all(reader, jobs, WORKERS if len(rows) >= MANY or self.streamed else 0):
                if faults and self.bad_images == "refuse":
                    raise _unreadable(faults)
                bad.update(faults)
                if not self.streamed:
                    images[done : done + len(decoded)] = decoded
                    done += len(decoded)
            rows = rows[[row not in bad for row in rows.tolist()]]
        if len(rows) == 0:
            raise _unreadable(bad)
        if bad:
            some = ", ".join(fault.name for fault in list(bad.values())[:5])
            warnings.warn(f"{len(bad)} unreadable images were left out: {some}", stacklevel=2)
        labels = self.labels[name][rows]
        if self.streamed:
            return Streamed(reader, rows, labels, self.classes)
        return InMemory(images[: len(rows)], labels, self.classes)


@dataclass(frozen=True)
class _Packed:
    """A source that `pack` wrote: the same, already decoded."""

    parts: Mapping[str, packed.Part]
    test: str = "test"

    @property
    def labels(self) -> Mapping[str, Tensor]:
        return {name: part.labels for name, part in self.parts.items()}

    @property
    def classes(self) -> tuple[str, ...]:
        return self.parts["train"].classes

    def split(self, name: str, rows: Tensor) -> Split:
        part = self.parts[name]
        return InMemory(part.images[rows], part.labels[rows], part.classes)


def _open(source: str, size: int, channels: int, augment: str, bad_images: str) -> _Opened | _Packed:
    _positive(size, "size")
    _one_of(augment, AUGMENTATIONS, "augment")
    _one_of(bad_images, ("refuse", "skip"), "bad_images")
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 (grey) or 3 (colour), not {channels}")

    if source not in _EMBEDDED and packed.is_packed(folder := Path(os.path.expanduser(source))):
        parts = packed.read(folder)
        if (shape := tuple(parts["train"].images.shape[1:])) != (channels, size, size):
            raise ValueError(
                f"{source!r} holds images of {shape[0]} channels and {shape[1]}×{shape[2]} pixels, but {channels} and "
                f"{size}×{size} are wanted: pack the original anew"
            )
        if augment == "resized-crop-flip":
            raise ValueError(f"{source!r} is packed, but augment={augment!r} needs the original images")
        return _Packed(parts)
    place, _, query = source.partition("?") if not Path(source).is_dir() else (source, "", "")
    choice = dict(parse_qsl(query, keep_blank_values=True))
    for key in choice:
        _one_of(key, ("image", "label", "config"), f"choice in the source {source!r}:")
    tables = _load(place, choice.get("config"))
    features = next(iter(tables.values())).features
    image = _image_column(features, choice.get("image"), source)
    label = _label_column(features, choice.get("label"), source)

    labels = {name: _labels(table, label) for name, table in tables.items()}
    test = next((name for name in _TEST_NAMES if name in labels and bool((labels[name] >= 0).any())), None)
    if len(labels.get("train", ())) == 0 or test is None:
        found = ", ".join(f"{n} ({len(x)} images, {int((x >= 0).sum())} labelled)" for n, x in labels.items())
        missing = "split named train" if test else f"labelled test split (one of {', '.join(_TEST_NAMES)})"
        raise ValueError(
            f"{source!r} has no {missing}; found: {found}. "
            "Name the shards train-….parquet and test-….parquet, or the folders train/CLASS and test/CLASS"
        )
    names = getattr(features[label], "names", None) or [str(k) for k in range(int(labels["train"].max()) + 1)]
    classes = tuple(names)
    _check_classes(classes, repr(source))
    for name in ("train", test):
        _check_labels(labels[name], classes, f"split {name!r} of {source!r}")

    largest = max(len(labels["train"]), len(labels[test])) * channels * size * size
    streamed = augment == "resized-crop-flip" or largest > MEMORY_LIMIT
    images = {name: tables[name].select_columns([image]).with_format("arrow") for name in ("train", test)}
    return _Opened(images, labels, test, classes, image, size, channels, streamed, bad_images)


def _load(place: str, config: str | None) -> Mapping[str, Any]:
    """All splits of a place, as `datasets.Dataset`s by name."""
    import datasets
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder
    from pyarrow.lib import ArrowException

    folder = Path(__file__).with_name(_EMBEDDED[place]) if place in _EMBEDDED else Path(os.path.expanduser(place))
    local = place != "" and folder.is_dir()
    pathlike = place == "" or place[0] in "./~" or place.count("/") > 1 or "\\" in place
    if not local and (pathlike or folder.is_file()):
        found = "is a file, not a folder" if folder.is_file() else "no such folder"
        raise ValueError(f"{place!r}: {found}. Give a folder of parquet shards or of class folders, or a hub name")
    path = str(folder.resolve()) if local else place
    if local and "::" in path:
        raise ValueError(f"{place!r} has :: in its name, which means something else to `datasets`: rename the folder")
    options: dict[str, Any] = {"path": path, "name": config}
    counts = _class_folders(folder, place) if local else {}
    splits = [name for name in ("train", *_TEST_NAMES) if local and (folder / name).is_dir()]
    if counts:
        files = {name: f"{glob.escape(path)}/{name}/*/*" for name in counts}
        options = {"path": "imagefolder", "data_files": files, "drop_labels": False}
        options["metadata_filenames"] = ["/"]  # no file has that name: labels are folders
    elif "train" in splits:  # literal split names: something else may be called train, too
        options["data_files"] = {name: f"{glob.escape(path)}/{name}/**" for name in splits}
    elif local and glob.has_magic(path):
        raise ValueError(
            f"{place!r} has *, ? or [ in its name, which `datasets` takes for a pattern: rename the folder"
        )
    try:
        with _quiet(offline=not local and not _hub_answers()):
            builder = datasets.load_dataset_builder(**options)
            tables = datasets.load_dataset(**options)
    except ConnectionError as error:
        raise ValueError(
            f"{place!r} is no folder here, so the Hugging Face hub was tried, but it cannot be reached ({error}). "
            "Connect, or give a local folder: parquet shards or class folders work as well"
        ) from error
    except (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError, BadZipFile, ArrowException) as error:
        what = "the folder" if local else f"from the Hugging Face hub (there is no such folder in {Path.cwd()})"
        raise ValueError(
            f"cannot load {what} {place!r}: {error}{f' ({error.__cause__})' if error.__cause__ else ''}. "
            "Wanted: train-….parquet and test-….parquet, or image files in train/CLASS/ and test/CLASS/"
        ) from error
    if local:
        _check_shards(builder.config.data_files or {}, tables, place)
        if "train" not in splits and isinstance(builder, ImageFolder):  # split names are then taken from anywhere
            raise ValueError(f"{place!r} has image files, but not in train/CLASS/ and test/CLASS/: move them there")
    for name, number in counts.items():
        if len(tables[name]) != number:
            raise ValueError(
                f"{place!r} has {number} image files in {name}/CLASS/, of which {len(tables[name])} can be read: "
                "names that begin with . or __ and links to folders are passed over; rename or copy what they are"
            )
    return dict(tables)


def _class_folders(folder: Path, place: str) -> dict[str, int]:
    """The number of image files in SPLIT/CLASS/ of `folder`, for each split that has class folders; empty if train has
    none. ValueError if there are folders in a class folder; a warning of other files."""
    from datasets.packaged_modules.imagefolder.imagefolder import ImageFolder

    counts, others = dict[str, int](), list[str]()
    for split in ("train", *_TEST_NAMES):
        others += [f"{split}/{file.name}" for file in sorted(folder.glob(f"{split}/[!.]*")) if file.is_file()]
        for of_class in sorted(folder.glob(f"{split}/*/")):
            if of_class.name == "__MACOSX":
                continue
            with os.scandir(of_class) as entries:
                inside = sorted(entries, key=lambda entry: entry.name)
            for entry in inside:
                if entry.name.startswith((".", "__")):
                    continue
                if entry.is_dir():
                    raise ValueError(
                        f"{place!r}: {split}/{of_class.name}/{entry.name} is a folder in a class folder, and would be "
                        "taken for a class: images must lie directly in SPLIT/CLASS/"
                    )
                if Path(entry.name).suffix.lower() in ImageFolder.EXTENSIONS:
                    counts[split] = counts.get(split, 0) + 1
                else:
                    others.append(f"{split}/{of_class.name}/{entry.name}")
    if "train" not in counts:
        return {}
    if others:
        warnings.warn(
            f"{place!r}: {len(others)} files are no images by their names, or in no class folder, and were left out: "
            f"{', '.join(others[:5])}",
            stacklevel=2,
        )
    return counts


def _check_shards(files: Mapping[str, Iterable[str]], tables: Mapping[str, Any], place: str) -> None:
    """Refuse parquet shards that are not all there, or whose class names differ: `datasets` would read them all with
    the first shard's names."""
    from datasets import Features
    from pyarrow.parquet import read_schema

    for name, table in tables.items():
        shards = [str(file) for file in files.get(name, ()) if str(file).endswith(".parquet")]
        numbers = [found for file in shards if (found := re.search(r"-(\d{5})-of-(\d{5})\.parquet$", file))]
        if numbers and (there := {int(found[1]) for found in numbers}) != set(range(total := int(numbers[0][2]))):
            raise ValueError(
                f"{place!r} has {len(there)} of the {total} shards of the split {name!r}: copy the others, too"
            )
        for file in shards:
            own = Features.from_arrow_schema(read_schema(file))
            for column, feature in table.features.items():
                ours, theirs = getattr(feature, "names", None), getattr(own.get(column), "names", None)
                if ours and theirs and ours != theirs:
                    raise ValueError(
                        f"{place!r}: classes of column {column!r} do not agree between shards: {ours} in the first, "
                        f"{theirs} in {Path(file).name}. Write all shards with the same class names in the same order"
                    )


def _hub_answers() -> bool:
    """Whether the hub can be reached, known in seconds; `datasets` itself would retry for half a minute."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=5)
    except Exception:  # whatever the http client of this version raises; offline, a cached data set still loads
        return False
    return True


@contextmanager
def _quiet(offline: bool) -> Iterator[None]:
    """No progress bars, log lines or warnings of the Hugging Face libraries; all settings are put back afterwards."""
    import datasets
    import huggingface_hub.utils

    with warnings.catch_warnings(), ExitStack() as undo:
        warnings.simplefilter("ignore")
        for bars in (datasets.utils, huggingface_hub.utils):
            if not bars.are_progress_bars_disabled():
                bars.disable_progress_bars()
                undo.callback(bars.enable_progress_bars)
        for logger in map(logging.getLogger, ("datasets", "huggingface_hub")):
            undo.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL)
        undo.callback(setattr, datasets.config, "HF_HUB_OFFLINE", datasets.config.HF_HUB_OFFLINE)
        datasets.config.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE or offline
        yield


def _image_column(features: Mapping[str, Any], chosen: str | None, source: str) -> str:
    from datasets import Image as ImageFeature

    columns = [name for name, feature in features.items() if isinstance(feature, ImageFeature)]
    return _pick(columns, chosen, "image", source, features)


def _label_column(features: Mapping[str, Any], chosen: str | None, source: str) -> str:
    from datasets import ClassLabel

    classes = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    integers = [name for name, feature in features.items() if "int" in getattr(feature, "dtype", "")]
    columns = classes or [name for name in integers if name in _LABEL_NAMES]
    if chosen is None and columns == ["fine_label", "coarse_label"]:  # CIFAR-100
        columns = columns[:1]
    return _pick(columns if chosen is None else classes + integers, chosen, "label", source, features)


def _pick(columns: list[str], chosen: str | None, kind: str, source: str, features: Mapping[str, Any]) -> str:
    if chosen in columns:
        return chosen
    if chosen is None and len(columns) == 1:
        return columns[0]
    way_out = f"choose one with {source.partition('?')[0]}?{kind}=COLUMN"
    if not columns:
        way_out = f"it needs one, {'of images' if kind == 'image' else 'of class numbers'}; "
        way_out += "a folder needs images in two or more class folders, all equally deep: train/CLASS/1.jpg"
    listed = ", ".join(dict.fromkeys(columns)) or f"none among {', '.join(features)}"
    problem = f"no {kind} column {chosen!r}" if chosen is not None else f"{len(columns)} {kind} columns"
    raise ValueError(f"{source!r} has {problem} (candidates: {listed}): {way_out}")


def _labels(table: Any, column: str) -> Tensor:
    """int64 [N]; a missing label is −1."""
    return torch.tensor(table.data.column(column).cast("int64").fill_null(-1).to_numpy())


def _check_classes(classes: Sequence[str], where: str) -> None:
    if len(classes) < 2:
        raise ValueError(f"{where}: {len(classes)} class, but telling classes apart needs at least 2")


def _check_labels(labels: Tensor, classes: Sequence[str], where: str) -> None:
    wrong = ((labels < 0) | (labels >= len(classes))).nonzero().flatten()
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(
            f"{where}: the label of row {row} is {int(labels[row])}, but {len(classes)} classes are numbered 0 to "
            f"{len(classes) - 1} ({len(wrong)} such rows). Correct the labels or remove the rows"
        )


def _held_out(labels: Tensor, classes: Sequence[str], source: str) -> Tensor:
    """bool [N]: the validation images, 4 % of all, as many of each class as of any other."""
    counts = labels.bincount(minlength=len(classes))
    if int(counts.min()) < 2:
        few = [f"{name!r} ({n})" for name, n in zip(classes, counts.tolist(), strict=True) if n < 2]
        raise ValueError(
            f"{source!r}: a class needs 2 training images, one of them for validation; "
            f"too few in: {', '.join(few[:10])}. Add images, or drop the class; "
            "class folders must have the same names in train and test"
        )
    quota = (counts // 2).clamp(max=max(1, round(0.04 * len(labels) / len(classes))))
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    by_class = shuffled[labels[shuffled].argsort(stable=True)]  # class 0 in random order, then class 1, …
    rank = torch.arange(len(labels)) - (counts.cumsum(0) - counts).repeat_interleave(counts)
    held = torch.zeros(len(labels), dtype=torch.bool)
    held[by_class[rank < quota.repeat_interleave(counts)]] = True
    return held


# ------------------------------------------------------------------------------------------------ decoding and geometry


@dataclass(frozen=True)
class _Job:
    """A batch to decode: rows of the table, and what to do to them."""

    rows: list[int]
    seed: int | None = None
    augment: str = "none"


class _Fault(NamedTuple):
    """An unreadable image: its path, or its split and row, and what the decoder said."""

    name: str
    why: str


@dataclass(frozen=True)
class _Reader(Dataset[tuple[Tensor, dict[int, _Fault]]]):
    """Decodes batches of a split; what DataLoader workers hold. `reader[job]` is (readable images, faults by row)."""

    table: Any
    column: str
    split: str
    size: int
    channels: int
    short: int  # evaluation: pixels of the resized image's shorter side

    def __getitem__(self, job: _Job) -> tuple[Tensor, dict[int, _Fault]]:
        images = np.empty((len(job.rows), self.size, self.size, self.channels), np.uint8)
        good = 0
        bad: dict[int, _Fault] = {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on odd files
            for row, value in zip(job.rows, self.table[job.rows][self.column].to_pylist(), strict=True):
                try:
                    images[good] = self._pixels(value, row, job)
                except Exception as error:  # Pillow raises anything on a broken file
                    inside = value is None or value["bytes"] is not None or value["path"] is None
                    name = f"row {row} of split {self.split!r}" if inside else value["path"]
                    bad[row] = _Fault(name, f"{type(error).__name__}: {error}")
                else:
                    good += 1
        return torch.from_numpy(images[:good]).permute(0, 3, 1, 2).contiguous(), bad

    def _pixels(self, value: Any, row: int, job: _Job) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """uint8 [H, W, C] of one image, resized and augmented."""
        image = decode(value["path"] if value["bytes"] is None else value["bytes"], self.channels)
        box, flip = centre_box(image.width, image.height, self.size / self.short), False
        if job.seed is not None and job.augment != "none":
            draws = iter(torch.rand(23, generator=_generator(job.seed, row)).tolist())
            flip = next(draws) < 0.5
            if job.augment != "flip":
                box = _random_box(image.width, image.height, draws)
        pixels = resized(image, self.size, box)
        return pixels[:, ::-1] if flip else pixels


def _decode_all(
    reader: _Reader, jobs: Iterable[_Job], workers: int, pin: bool = False
) -> Iterator[tuple[Tensor, dict[int, _Fault]]]:
    """Decode the jobs in order. Workers run one thread each (DataLoader sees to it), touch no device, and end when this
    generator is closed or dropped."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # more workers than cores; forking a process that has threads
        loader = iter(
            DataLoader(
                reader,
                batch_size=None,
                sampler=jobs,
                num_workers=workers,
                multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
                pin_memory=pin,
                generator=torch.Generator(),  # else it would draw from the global one
            )
        )
    yield from loader


def _unreadable(faults: Mapping[int, _Fault]) -> ValueError:
    name, why = next(iter(faults.values()))
    way_out = "Repair or remove it, or leave such images out with bad_images='skip' (--bad-images skip)"
    return ValueError(f"unreadable image: {name} ({why}). {way_out}")


def _random_box(width: int, height: int, draws: Iterator[float]) -> Box:
    """A box of 8–100 % of the area and aspect ratio 3/4–4/3, from 2 draws for its place and 2 for each try at its size;
    if none of the tries fits, the largest one allowed."""
    across, down = next(draws), next(draws)
    box = min(width, height * 4 / 3), min(height, width * 4 / 3)
    for area, aspect in zip(draws, draws, strict=True):
        pixels, ratio = width * height * (0.08 + 0.92 * area), (4 / 3) ** (2 * aspect - 1)
        tried = math.sqrt(pixels * ratio), math.sqrt(pixels / ratio)
        if tried[0] <= width and tried[1] <= height:
            box = tried
            break
    left, top = across * (width - box[0]), down * (height - box[1])
    return left, top, min(left + box[0], width), min(top + box[1], height)


def _shift_and_flip(images: Tensor, padding: int, fill: int | None, generator: torch.Generator) -> Tensor:
    """Pad uint8 [B, C, H, W] with `fill`, or with their mirror image, cut an H×W window at random out of each image,
    mirror half of them."""
    count, _, height, width = images.shape
    device = images.device
    flip = torch.randint(2, (1, count, 1), generator=generator)
    drawn = torch.cat([flip, torch.randint(2 * padding + 1, (2, count, 1), generator=generator)])
    flip, top, left = _sent(drawn, device)
    flip = flip.bool()
    across = torch.arange(width, device=device)
    rows = top + torch.arange(height, device=device)  # [B, H], in the padded image
    columns = left + torch.where(flip, across.flip(0), across)  # [B, W]
    if fill is None:  # rows −2, −1, 0 … H−1, H, H+1 of an image are its rows 2, 1, 0 … H−1, H−2, H−3
        rows = (height - 1) - ((height - 1) - (rows - padding).abs()).abs()
        columns = (width - 1) - ((width - 1) - (columns - padding).abs()).abs()
    else:
        images = pad(images, (padding,) * 4, value=fill)
    return _take(_take(images, rows).transpose(2, 3), columns).transpose(2, 3)


def _cut_out(images: Tensor, side: int, fill: int, generator: torch.Generator) -> Tensor:
    """Paint over, in each of uint8 [B, C, H, W], what lies in a square of side×side pixels around a random pixel.
    Source: DeVries and Taylor, arXiv 1708.04552."""
    count, _, *shape = images.shape
    inside = []
    for size in shape:
        middle = _sent(torch.randint(size, (count, 1), generator=generator), images.device)
        first = middle - side // 2
        place = torch.arange(size, device=images.device)
        inside.append((place >= first) & (place < first + side))
    down, across = inside
    return images.masked_fill((down[:, :, None] & across[:, None])[:, None], fill)


def shrunk(images: Tensor, size: int) -> Tensor:
    """Images uint8 [B, C, H, W] → uint8 [B, C, size, size], by antialiased bilinear interpolation; as they are if they
    have that size."""
    if images.shape[2:] == (size, size):
        return images
    pixels = interpolate(images.float(), (size, size), mode="bilinear", antialias=True)
    return pixels.round().to(torch.uint8)  # between those that it has interpolated: from 0 to 255


def _sent(drawn: Tensor, device: torch.device) -> Tensor:
    """On the device; the host does not wait until it has done all before."""
    return drawn.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else drawn


def _take(x: Tensor, index: Tensor) -> Tensor:
    """[B, C, N, M], index [B, n] → [B, C, n, M]: of each image the rows with those numbers. Whole rows are copied,
    which is twenty times as fast as single pixels."""
    first = x.shape[2] * torch.arange(x.shape[0] * x.shape[1], device=x.device).view(*x.shape[:2], 1)
    rows = x.reshape(-1, x.shape[3]).index_select(0, (first + index[:, None]).flatten())
    return rows.view(*x.shape[:2], -1, x.shape[3])
