"""What an exported network sees in image files. Imports no torch, and nothing of training."""

import itertools
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from unitstep.pictures import Pixels, centre_box, decode, resized
from unitstep.running import Array, Model

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})  # taken from a folder
BATCH = 32
SHIPPED = Path(__file__).parent / "models" / "cifar10-t1-int8.onnx"  # comes with the package


@dataclass(frozen=True)
class Prediction:
    """One image: its likeliest classes with their probabilities, the softmax of the logits, or why it was not read."""

    path: Path
    classes: tuple[tuple[str, float], ...] = ()
    error: str | None = None


def images_in(places: Sequence[str | Path]) -> list[Path]:
    """The image files that are meant: files as they are, folders with all below them, in order of their names.
    ValueError if a place is not there or a folder has no images."""
    found: list[Path] = []
    for place in map(Path, places):
        if not place.exists():
            raise ValueError(f"{place} is not there")
        files = (path for path in place.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
        below = sorted(files) if place.is_dir() else [place]
        if not below:
            raise ValueError(f"{place} has no images ({', '.join(sorted(SUFFIXES))})")
        found += below
    return found


def predict(paths: Iterable[Path], model: Model, *, top: int = 5) -> Iterator[Prediction]:
    """Yield a `Prediction` for each image file, in order: resized and cropped as the network's test images were.

    top: how many classes, 1 or more. An image that cannot be read is a `Prediction` with an error. ValueError if the
    model does not take raw pixels.
    """
    if top < 1:
        raise ValueError(f"top must be 1 or more classes, not {top}")
    about = model.about
    if about.get("pixels") != "uint8" or len(about.get("input", ())) != 3:
        raise ValueError("this model does not take raw pixels, so images cannot be made into its input")
    channels, size, _ = about["input"]
    if channels not in (1, 3):
        raise ValueError(f"this model takes images of {channels} channels, but image files have 1, grey, or 3, colours")
    short, names = about.get("short", size), about.get("classes")
    paths = iter(paths)
    while batch := list(itertools.islice(paths, BATCH)):
        read = [_pixels(path, channels, size, short) for path in batch]
        good = [pixels for pixels in read if not isinstance(pixels, str)]
        logits: Iterator[Array] = iter(model(np.stack(good).transpose(0, 3, 1, 2))[0] if good else [])
        for path, pixels in zip(batch, read, strict=True):
            if isinstance(pixels, str):
                yield Prediction(path, error=pixels)
                continue
            row = next(logits).astype(np.float64)
            shares = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
            likeliest = np.argsort(-shares)[:top]
            yield Prediction(path, tuple((names[i] if names else str(i), float(shares[i])) for i in likeliest))


def _pixels(path: Path, channels: int, size: int, short: int) -> Pixels | str:
    """uint8 [size, size, C], or why not."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on odd files; above twice its limit it refuses
            image = decode(path, channels)
            return resized(image, size, centre_box(image.width, image.height, size / short))
    except Exception as error:  # Pillow raises anything on a broken file
        return f"{type(error).__name__}: {error}"
