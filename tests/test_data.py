"""Sources, splits, batches, augmentation and every way a user's data can be wrong."""

import gc
import hashlib
import io
import itertools
import logging
import multiprocessing
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from huggingface_hub.utils.tqdm import are_progress_bars_disabled
from PIL import Image
from torch import Tensor

from unitstep import data
from unitstep.data import InMemory, Split, Streamed, load_test, load_train, mix, pack, shrunk
from unitstep.pictures import decode

Batches = list[tuple[Tensor, Tensor]]
SMALL: dict[str, Any] = {"size": 8, "channels": 3}


def same(a: Batches, b: Batches) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, v) and torch.equal(y, w) for (x, y), (v, w) in zip(a, b, strict=True)
    )


def checksums(split: InMemory) -> set[bytes]:
    return {hashlib.sha256(image.numpy().tobytes()).digest() for image in split.images}


def write_parquet(
    folder: Path,
    labels: Mapping[str, Sequence[int | None]],
    *,
    features: dict[str, Any] | None = None,
    images: Sequence[Any] | None = None,
    **columns: Sequence[Any],
) -> str:
    """A folder in hub layout: for each split one shard of tiny images, or of the given ones, with these labels."""
    folder.mkdir(exist_ok=True)
    for split, values in labels.items():
        pictures = [Image.new("RGB", (8, 8), (i, i, i)) for i in range(len(values))] if images is None else images
        content = {"image": pictures, "label": values, **{k: v[: len(values)] for k, v in columns.items()}}
        kinds = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"]), **(features or {})}
        content = {name: content[name] for name in kinds}
        with data._quiet(offline=False):
            table = datasets.Dataset.from_dict(content, features=datasets.Features(kinds))
            table.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return str(folder)


def write_images(folder: Path, *, train: int = 4, test: int = 2, size: tuple[int, int] = (10, 8)) -> str:
    """A folder of class folders with smooth random JPEGs."""
    noise = np.random.default_rng(0)
    for split, count in {"train": train, "test": test}.items():
        for name in ("cat", "dog"):
            (folder / split / name).mkdir(parents=True)
            for i in range(count):
                coarse = Image.fromarray(noise.integers(0, 256, (6, 8, 3), np.uint8))
                coarse.resize(size, Image.Resampling.BICUBIC).save(folder / split / name / f"{i}.jpg")
    return str(folder)


@pytest.fixture(scope="module")
def fashion() -> tuple[InMemory, InMemory]:
    train, val = load_train("fashion-mini", size=28, channels=1)
    assert isinstance(train, InMemory)
    assert isinstance(val, InMemory)
    return train, val


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_images(tmp_path_factory.mktemp("photos"), train=120, test=10, size=(640, 480))


# ----------------------------------------------------------------------------------------------------------- whole sets


def test_fashion_mini_is_balanced_and_disjoint(fashion: tuple[InMemory, InMemory]) -> None:
    train, val = fashion
    test = load_test("fashion-mini", size=28, channels=1)
    assert isinstance(test, InMemory)
    assert (len(train), len(val), len(test)) == (4800, 200, 1000)
    assert [s.labels.bincount().tolist() for s in (train, val, test)] == [[480] * 10, [20] * 10, [100] * 10]
    assert train.classes == val.classes == test.classes
    assert train.classes[0] == "T-shirt/top"
    assert train.shape == (1, 28, 28)
    assert train.images.dtype == torch.uint8
    assert train.labels.dtype == torch.int64
    assert not checksums(train) & checksums(val)
    assert train.fill == round(train.images.double().mean().item())


def test_fashion_mini_is_small_and_documented() -> None:
    folder = Path(data.__file__).with_name("fashion_mini")
    files = sorted(folder.iterdir())
    assert [file.name for file in files] == ["README.md", "test-00000-of-00001.parquet", "train-00000-of-00001.parquet"]
    assert sum(file.stat().st_size for file in files) < 2.6e6
    readme = files[0].read_text()
    assert "MIT" in readme
    assert "© 2017 Zalando SE" in readme
    assert all(hashlib.sha256(file.read_bytes()).hexdigest() in readme for file in files[1:])


def test_fashion_mini_is_part_of_fashion_mnist(data_folder: Path) -> None:
    full, mini = (load_test(s, size=28, channels=1) for s in (str(data_folder / "fashion_mnist"), "fashion-mini"))
    assert isinstance(full, InMemory)
    assert isinstance(mini, InMemory)
    assert full.classes == mini.classes
    assert len(checksums(mini)) == 1000
    assert checksums(mini) <= checksums(full)


def test_cifar10_validation(data_folder: Path) -> None:
    source = str(data_folder / "cifar10")
    train, val = load_train(source, size=32, channels=3)
    assert isinstance(train, InMemory)
    assert isinstance(val, InMemory)
    assert (len(train), len(val)) == (48000, 2000)
    assert val.labels.bincount().tolist() == [200] * 10
    assert not checksums(train) & checksums(val)
    again = load_train(source, size=32, channels=3)[1]
    assert same(list(val.batches(512)), list(again.batches(512)))


# -------------------------------------------------------------------------------------------------- batches in memory


def tagged(count: int) -> InMemory:
    """Images that are their own number, so that a batch tells where it came from."""
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 2, 3, 3).contiguous()
    return InMemory(images, torch.arange(count) % 2, ("even", "odd"))


def test_evaluation_sees_everything_in_order() -> None:
    batches = list(tagged(10).batches(4))
    assert [len(images) for images, _ in batches] == [4, 4, 2]
    assert torch.cat([images[:, 0, 0, 0] for images, _ in batches]).tolist() == list(range(10))
    assert torch.cat([labels for _, labels in batches]).tolist() == [0, 1] * 5
    assert same(list(tagged(10).batches(4, start=1)), batches[1:])


def test_training_shuffles_drops_the_rest_and_keeps_pairs() -> None:
    split = tagged(10)
    batches = list(split.batches(4, seed=1))
    seen = torch.cat([images[:, 0, 0, 0] for images, _ in batches])
    assert [len(images) for images, _ in batches] == [4, 4]
    assert split.steps(4) == 2
    assert len(seen.unique()) == 8
    assert torch.equal(seen % 2, torch.cat([labels for _, labels in batches]))
    assert not same(batches, list(split.batches(4, seed=2)))
    assert [len(images) for images, _ in split.batches(16, seed=1)] == [10]
    assert split.steps(16) == 1


@pytest.mark.parametrize("augment", ["none", "flip", "crop-flip"])
def test_resuming_in_memory_yields_the_tail(fashion: tuple[InMemory, InMemory], augment: str) -> None:
    split = fashion[1]
    whole = list(split.batches(32, seed=7, augment=augment))
    for start in range(len(whole) + 1):
        assert same(list(split.batches(32, seed=7, start=start, augment=augment)), whole[start:])


def test_batches_leave_the_global_generator_alone(photos: str, fashion: tuple[InMemory, InMemory]) -> None:
    before = torch.random.get_rng_state()
    next(fashion[0].batches(8, seed=0, augment="crop-flip"))
    next(load_train(photos, size=16, channels=3, augment="resized-crop-flip")[0].batches(8, seed=0))
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize(
    ("augment", "border", "padding"),
    [("flip", "mean", 0), ("crop-flip", "mean", 4), ("crop-flip", "mirror", 4), ("crop-flip", "mirror", 2)],
)
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 9, 12)])
def test_augmentation_against_one_image_at_a_time(
    augment: str, border: str, padding: int, shape: tuple[int, int, int]
) -> None:
    """The oracle: pad each image, cut, and mirror, with the draws documented for batch k."""
    noise = torch.Generator().manual_seed(0)
    images = torch.randint(256, (64, *shape), generator=noise, dtype=torch.uint8)
    split = InMemory(images, torch.arange(64), [str(i) for i in range(64)])
    split.fill = 99
    batches = split.batches(32, seed=5, augment=augment, border=border, padding=padding)
    for k, (batch, labels) in enumerate(batches):
        generator = torch.Generator().manual_seed(mix(5, k))
        flip = torch.randint(2, (32, 1), generator=generator).flatten().tolist()
        tops, lefts = torch.randint(2 * padding + 1, (2, 32, 1), generator=generator).flatten(1).tolist()
        assert {0, 1} == set(flip)
        for i, label in enumerate(labels.tolist()):
            filled = {"mode": "reflect"} if border == "mirror" else {"constant_values": 99}
            canvas = np.pad(images[label].numpy(), ((0, 0), (padding,) * 2, (padding,) * 2), **filled)
            cut = canvas[:, tops[i] : tops[i] + shape[1], lefts[i] : lefts[i] + shape[2]]
            assert (batch[i].numpy() == (cut[:, :, ::-1] if flip[i] else cut)).all()


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 9, 12)])
@pytest.mark.parametrize("side", [1, 4, 7])
def test_cutout_against_one_image_at_a_time(shape: tuple[int, int, int], side: int) -> None:
    """The oracle: what is shifted and mirrored as without it, then has a square painted over, cut off at the border."""
    noise = torch.Generator().manual_seed(0)
    images = torch.randint(256, (64, *shape), generator=noise, dtype=torch.uint8)
    split = InMemory(images, torch.arange(64), [str(i) for i in range(64)])
    split.fill = 99
    changes: dict[str, Any] = {"seed": 5, "augment": "crop-flip", "border": "mirror"}
    plain, cut = (list(split.batches(32, **changes, cutout=pixels)) for pixels in (0, side))
    for k, ((before, _), (after, _)) in enumerate(zip(plain, cut, strict=True)):
        generator = torch.Generator().manual_seed(mix(5, k))
        torch.randint(2, (32, 1), generator=generator)
        torch.randint(9, (2, 32, 1), generator=generator)
        down, across = (torch.randint(size, (32, 1), generator=generator).flatten().tolist() for size in shape[1:])
        for i in range(32):
            wanted = before[i].numpy().copy()
            top, left = down[i] - side // 2, across[i] - side // 2
            wanted[:, max(0, top) : top + side, max(0, left) : left + side] = 99
            assert (after[i].numpy() == wanted).all()


def test_shrunk_images_are_means_and_keep_their_range() -> None:
    images = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert shrunk(images, 32) is images
    small = shrunk(images, 16)
    assert (small.dtype, small.shape) == (torch.uint8, (3, 3, 16, 16))
    assert abs(small.float().mean() - images.float().mean()) < 1
    # of noise the 4×4 pixels that meet, weighted by 1, 3, 3, 1 both ways, leave 0.31 of the deviation; 2×2 would 0.5
    assert small.float().std() < 0.4 * images.float().std()
    for value in (0, 255):
        assert (shrunk(torch.full_like(images, value), 24) == value).all()


def test_moving_keeps_everything() -> None:
    split = tagged(10)
    moved = split.to("cpu")
    there, here = (list(s.batches(4, seed=1, augment="crop-flip")) for s in (moved, split))
    assert same(there, here)
    assert moved.fill == split.fill


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_do_not_depend_on_the_device(fashion: tuple[InMemory, InMemory]) -> None:
    here = list(fashion[1].batches(64, seed=3, augment="crop-flip"))
    there = [(x.cpu(), y.cpu()) for x, y in fashion[1].to("cuda").batches(64, seed=3, augment="crop-flip")]
    assert same(here, there)


def test_mix() -> None:
    assert mix(1, 2) == mix(1, 2) == 6288156900839449082
    assert len({mix(), mix(0), mix(1, 2), mix(2, 1), mix(12), mix(-1, 2), mix(2**80)}) == 7
    assert all(0 <= mix(i) < 2**63 for i in range(1000))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0}, "batch size must be at least 1"),
        ({"size": 4, "augment": "flip"}, "needs a seed"),
        ({"size": 4, "seed": 1, "augment": "mirror"}, "unknown augment 'mirror': choose one of none, flip"),
        ({"size": 4, "seed": 1, "augment": "resized-crop-flip"}, "load the set with augment='resized-crop-flip'"),
        ({"size": 4, "cutout": -1}, "padding and cutout must be 0 or more pixels, not 4 and -1"),
        ({"size": 4, "border": "black"}, "unknown border 'black': choose one of mean, mirror"),
        ({"size": 4, "border": "mirror", "padding": 99}, "99 pixels cannot be mirrored at the border of images of"),
        ({"size": 4, "start": 4}, "start=4 is not a batch of this pass: give 0 to 3"),
        ({"size": 4, "start": -1}, "start=-1"),
    ],
)
def test_wrong_batches_are_refused_at_the_call(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tagged(10).batches(**arguments)


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (torch.zeros(2, 1, 4, 4), [0, 1], "images must be uint8"),
        (torch.zeros(2, 4, 4, dtype=torch.uint8), [0, 1], "images must be uint8"),
        (torch.zeros(0, 1, 4, 4, dtype=torch.uint8), [], "N ≥ 1"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), [0], "labels must be 2 integers"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), [0.0, 1.0], "labels must be 2 integers"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), [0, 2], "label of row 1 is 2"),
    ],
)
def test_wrong_tensors_are_refused(images: Tensor, labels: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        InMemory(images, torch.tensor(labels), ("a", "b"))


# ------------------------------------------------------------------------------------------------------ streamed splits


@pytest.fixture(autouse=True)
def one_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "WORKERS", 1)


@pytest.fixture(scope="module")
def streamed(photos: str) -> Split:
    train, val = load_train(photos, size=32, channels=3, augment="resized-crop-flip")
    assert isinstance(train, Streamed)
    assert isinstance(val, Streamed)
    assert (len(train), len(val)) == (230, 10)
    assert train.shape == (3, 32, 32)
    assert val.labels.bincount().tolist() == [5, 5]
    return train


def test_streaming_does_not_depend_on_workers(streamed: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = list(streamed.batches(64, seed=3, augment="resized-crop-flip"))
    assert [len(images) for images, _ in whole] == [64, 64, 64]
    for workers in (0, 3):
        monkeypatch.setattr(data, "WORKERS", workers)
        assert same(list(streamed.batches(64, seed=3, augment="resized-crop-flip", start=1)), whole[1:])


def test_streamed_images_are_not_padded(streamed: Split) -> None:
    with pytest.raises(ValueError, match="cannot be padded and cropped: set augment to resized-crop-flip"):
        next(streamed.batches(8, seed=0, augment="crop-flip"))


def test_streamed_evaluation_resizes_and_crops(photos: str) -> None:
    test = load_test(photos, size=28, channels=3, augment="resized-crop-flip")
    assert isinstance(test, Streamed)
    images, labels = next(test.batches(20))
    assert labels.tolist() == [0] * 10 + [1] * 10
    with Image.open(Path(photos, "test", "cat", "0.jpg")) as photo:
        square = photo.crop((80, 0, 560, 480)).resize((32, 32), Image.Resampling.BICUBIC)
    oracle = np.asarray(square).astype(int)[2:30, 2:30]
    assert np.abs(images[0].permute(1, 2, 0).numpy() - oracle).max() <= 1
    assert same([next(test.batches(20, seed=1))], [next(test.batches(20, seed=1, augment="none"))])


def test_streamed_flip_is_evaluation_mirrored(photos: str) -> None:
    test = load_test(photos, size=16, channels=1, augment="resized-crop-flip")
    (plain, labels), (flipped, again) = next(test.batches(20, seed=2)), next(test.batches(20, seed=2, augment="flip"))
    mirrored = [torch.equal(b, a.flip(-1)) for a, b in zip(plain, flipped, strict=True)]
    kept = [torch.equal(b, a) for a, b in zip(plain, flipped, strict=True)]
    assert torch.equal(labels, again)
    assert all(m or k for m, k in zip(mirrored, kept, strict=True))
    assert 0 < sum(mirrored) < 20


def test_random_boxes_keep_to_their_limits() -> None:
    noise = torch.Generator().manual_seed(0)
    areas, aspects = [], []
    for width, height in [(640, 480), (300, 900), (1, 1), (1000, 2), (37, 37)] * 100:
        left, top, right, bottom = data._random_box(width, height, iter(torch.rand(22, generator=noise).tolist()))
        assert 0 <= left < right <= width
        assert 0 <= top < bottom <= height
        aspects.append((right - left) / (bottom - top))
        if width == 640:
            areas.append((right - left) * (bottom - top) / (width * height))
    assert min(aspects) >= 3 / 4 - 1e-9
    assert max(aspects) <= 4 / 3 + 1e-9
    assert 0.08 <= min(areas) < 0.2
    assert 0.8 < max(areas) <= 1


def test_dropping_an_iterator_ends_its_processes(streamed: Split) -> None:
    batches = streamed.batches(8, seed=0, augment="resized-crop-flip")
    next(batches)
    assert len(multiprocessing.active_children()) == 1
    del batches
    gc.collect()
    until = time.monotonic() + 10
    while multiprocessing.active_children() and time.monotonic() < until:
        time.sleep(0.05)
    assert not multiprocessing.active_children()


def test_streamed_is_chosen_by_memory(photos: str, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = 240 * 3 * 8 * 8  # all training images
    monkeypatch.setattr(data, "MEMORY_LIMIT", limit)
    assert isinstance(load_train(photos, **SMALL)[0], InMemory)
    monkeypatch.setattr(data, "MEMORY_LIMIT", limit - 1)
    assert isinstance(load_train(photos, **SMALL)[0], Streamed)
    assert isinstance(load_test(photos, **SMALL), Streamed)  # evaluated as validation is


def test_many_images_in_memory_are_decoded_by_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_images(tmp_path)
    here = list(load_train(source, **SMALL)[0].batches(4))
    monkeypatch.setattr(data, "MANY", 1)
    monkeypatch.setattr(data, "WORKERS", 2)
    assert same(here, list(load_train(source, **SMALL)[0].batches(4)))


# ------------------------------------------------------------------------------------------------------- kinds of image


def pixel(image: Image.Image, channels: int, kind: str = "PNG", **options: Any) -> list[int]:
    """The first pixel after encoding and decoding."""
    out = io.BytesIO()
    image.save(out, kind, **options)
    decoded = decode(out.getvalue(), channels)
    assert decoded.mode == ("L" if channels == 1 else "RGB")
    return [int(value) for value in np.asarray(decoded).reshape(-1, channels)[0]]


def test_kinds_of_image() -> None:
    assert pixel(Image.new("L", (4, 4), 77), 3) == [77, 77, 77]
    assert pixel(Image.new("L", (4, 4), 77), 1) == [77]
    assert pixel(Image.new("RGB", (4, 4), (255, 0, 0)), 1) == [76]
    assert pixel(Image.new("RGB", (4, 4), (10, 200, 30)).quantize(8), 3) == [10, 200, 30]
    assert pixel(Image.new("RGBA", (4, 4), (10, 20, 30, 255)), 3) == [10, 20, 30]
    assert pixel(Image.new("RGBA", (4, 4), (10, 20, 30, 0)), 3) == [255, 255, 255]
    assert pixel(Image.new("LA", (4, 4), (10, 0)), 1) == [255]
    assert pixel(Image.new("P", (4, 4), 0), 3, transparency=0) == [255, 255, 255]
    assert pixel(Image.new("1", (4, 4), 1), 1) == [255]
    assert pixel(Image.fromarray(np.full((4, 4), 257 * 123, np.uint16)), 1) == [123]
    assert pixel(Image.fromarray(np.full((4, 4), 257 * 123, np.uint16)), 3) == [123] * 3
    assert pixel(Image.fromarray(np.full((4, 4), 65535, np.int32)), 1, "TIFF") == [255]
    assert pixel(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), 3, "JPEG") == [255, 255, 255]
    with pytest.raises(ValueError, match="8 or 16 bits"):
        pixel(Image.new("F", (4, 4), 0.5), 1, "TIFF")
    with pytest.raises(ValueError, match="8 or 16 bits"):
        pixel(Image.fromarray(np.full((4, 4), 255, np.int32)), 1, "TIFF")
    assert pixel(Image.fromarray(np.full((4, 4), 200, np.uint16)), 1, "PPM") == [1]


def test_orientation_is_applied() -> None:
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    image = Image.new("L", (8, 8), 0)
    image.putpixel((7, 7), 200)
    assert pixel(image, 1, exif=exif) == [200]


def test_resizing_into_memory(tmp_path: Path) -> None:
    """Shorter side to the size, then the centre: of a wide image whose halves differ only outside the centre square."""
    wide = np.zeros((40, 120, 3), np.uint8)
    wide[:, :40], wide[:, 40:80], wide[:, 80:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    pictures = [Image.fromarray(wide), Image.fromarray(wide).transpose(Image.Transpose.ROTATE_90)] * 2
    source = write_parquet(tmp_path, {"train": [0, 0, 1, 1], "test": [0, 0, 1, 1]}, images=pictures)
    images, _ = next(load_test(source, **SMALL).batches(4))
    assert images.shape == (4, 3, 8, 8)
    assert (images[:, :, 2:-2, 2:-2] == torch.tensor([0, 255, 0])[:, None, None]).all()
    assert next(load_test(source, size=20, channels=1).batches(4))[0].shape == (4, 1, 20, 20)


def test_an_image_of_the_right_size_is_untouched(fashion: tuple[InMemory, InMemory]) -> None:
    from pyarrow import parquet

    table = parquet.read_table(Path(data.__file__).with_name("fashion_mini") / "test-00000-of-00001.parquet")
    raw = np.asarray(Image.open(io.BytesIO(table["image"][17].as_py()["bytes"])))
    images, labels = next(load_test("fashion-mini", size=28, channels=1).batches(18))
    assert (images[17, 0].numpy() == raw).all()
    assert int(labels[17]) == table["label"][17].as_py()


# ------------------------------------------------------------------------------------------------- sources and columns


def test_class_folders(tmp_path: Path) -> None:
    (tmp_path / "train" / "test").mkdir(parents=True)  # a class whose name is a split's
    source = write_images(tmp_path)
    for split in ("train", "test"):
        (tmp_path / split / "test").mkdir(exist_ok=True)
        for i in range(3):
            Image.new("L", (8, 8), i).save(tmp_path / split / "test" / f"{i}.png")
    train, val = load_train(source, **SMALL)
    assert train.classes == ("cat", "dog", "test")
    assert train.labels.bincount().tolist() == [3, 3, 2]
    assert val.labels.bincount().tolist() == [1, 1, 1]
    assert load_test(source, **SMALL).labels.bincount().tolist() == [2, 2, 3]


def test_a_folder_whose_name_is_a_pattern_is_itself(tmp_path: Path) -> None:
    for name, grey in (("set[1]", 0), ("set1", 255)):
        for split, label in itertools.product(("train", "test"), "ab"):
            (folder := tmp_path / name / split / label).mkdir(parents=True)
            for i in range(3):
                Image.new("L", (8, 8), grey).save(folder / f"{i}.png")
    assert next(load_test(str(tmp_path / "set[1]"), **SMALL).batches(6))[0].max() == 0
    (tmp_path / "other[1]").mkdir()
    (tmp_path / "a::b").mkdir()
    for folder, reason in ((tmp_path / "other[1]", r"has \*, \? or \["), (tmp_path / "a::b", "has ::")):
        with pytest.raises(ValueError, match=f"{reason} in its name"):
            load_test(str(folder), **SMALL)


def test_images_that_are_not_in_class_folders_are_refused(tmp_path: Path) -> None:
    source = write_images(tmp_path / "nested")
    (tmp_path / "nested/train/cat").rename(tmp_path / "nested/train/in")
    (tmp_path / "nested/train/cat").mkdir()
    (tmp_path / "nested/train/in").rename(tmp_path / "nested/train/cat/indoor")
    with pytest.raises(ValueError, match=r"train/cat/indoor is a folder in a class folder"):
        load_train(source, **SMALL)
    source = write_images(tmp_path / "named")
    for split in ("train", "test"):
        (tmp_path / "named" / split).rename(tmp_path / "named" / f"{split}ing")
    with pytest.raises(ValueError, match="has image files, but not in train/CLASS/ and test/CLASS/"):
        load_train(source, **SMALL)


def test_a_class_that_would_be_passed_over_is_noticed(tmp_path: Path) -> None:
    source = write_images(tmp_path)
    (tmp_path / "train/dog").rename(tmp_path / "train/__dog")
    with pytest.raises(ValueError, match=r"8 image files in train/CLASS/, of which 4 can be read"):
        load_train(source, **SMALL)


def test_files_beside_the_images_are_left_out(tmp_path: Path) -> None:
    source = write_images(tmp_path)
    plain, _ = load_train(source, **SMALL)
    for image in tmp_path.glob("*/*/*.jpg"):
        image.with_suffix(".txt").write_text("0 0.5 0.5 1 1")
    (tmp_path / "train/cat/metadata.csv").write_text("file_name,label\n0.jpg,7\n")
    (tmp_path / "val").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "val" / "unlabelled.png")
    with pytest.warns(UserWarning, match=r"14 files are no images by their names, or in no class"):
        beside, _ = load_train(source, **SMALL)
    assert torch.equal(plain.images, beside.images)
    assert beside.classes == ("cat", "dog")


def test_unlabelled_test_images_do_not_hide_a_labelled_split(tmp_path: Path) -> None:
    source = write_images(tmp_path)
    (tmp_path / "test").rename(tmp_path / "val")
    (tmp_path / "test").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "test" / "1.png")
    with pytest.warns(UserWarning, match=r"1 files are no images .*, or in no class folder, and were left out: test/1"):
        assert load_test(source, **SMALL).labels.tolist() == [0, 0, 1, 1]
    for split in ("train", "val"):
        (tmp_path / split).rename(tmp_path / f"{split}ing")
    with pytest.raises(ValueError, match="has image files, but not in train/CLASS/"):
        load_test(source, **SMALL)


def test_a_missing_shard_is_noticed(tmp_path: Path) -> None:
    source = write_parquet(tmp_path, {"train": [0, 1] * 2, "test": [0, 1]})
    (tmp_path / "train-00000-of-00001.parquet").rename(tmp_path / "train-00000-of-00002.parquet")
    with pytest.raises(ValueError, match=r"has 1 of the 2 shards of the split 'train'"):
        load_train(source, **SMALL)


def test_a_folder_with_a_question_mark_is_itself(tmp_path: Path) -> None:
    write_images(tmp_path / "photos", train=2)
    assert len(load_train(write_images(tmp_path / "photos?", train=6), **SMALL)[0]) == 10


def test_validation_split_stands_in_for_an_unlabelled_test_split(tmp_path: Path) -> None:
    labels = {"train": [0, 1] * 4, "validation": [1, 0, 1], "test": [-1, -1]}
    assert load_test(write_parquet(tmp_path, labels), **SMALL).labels.tolist() == [1, 0, 1]


def test_validation_of_uneven_classes(tmp_path: Path) -> None:
    source = write_parquet(tmp_path, {"train": [0] * 200 + [1] * 3, "test": [0, 1]})
    train, val = load_train(source, **SMALL)
    assert val.labels.bincount().tolist() == [4, 1]
    assert train.labels.bincount().tolist() == [196, 2]


def test_integer_labels_and_several_candidates(tmp_path: Path) -> None:
    features = {"label": datasets.Value("int32")}
    source = write_parquet(tmp_path / "ints", {"train": [0, 1, 2] * 3, "test": [2, 0, 1]}, features=features)
    assert load_train(source, **SMALL)[0].classes == ("0", "1", "2")
    assert load_test(source, **SMALL).labels.tolist() == [2, 0, 1]

    both = {"fine_label": datasets.ClassLabel(names=list("abc")), "coarse_label": datasets.ClassLabel(names=list("xy"))}
    source = write_parquet(
        tmp_path / "both",
        {"train": [0, 1] * 3, "test": [0, 1] * 3},
        features={"img": datasets.Image(), **both},
        img=[Image.new("L", (8, 8), 200)] * 6,
        fine_label=[0, 1, 2, 0, 1, 2],
        coarse_label=[0, 1, 0, 1, 0, 1],
    )
    with pytest.raises(ValueError, match=r"2 image columns \(candidates: image, img\).*\?image=COLUMN"):
        load_test(source, **SMALL)
    with pytest.raises(ValueError, match=r"\(candidates: label, fine_label, coarse_label\).*\?label=COLUMN"):
        load_test(f"{source}?image=img", **SMALL)
    with pytest.raises(ValueError, match="no label column 'finelabel'"):
        load_test(f"{source}?image=img&label=finelabel", **SMALL)
    with pytest.raises(ValueError, match=r"unknown choice in the source .* 'images'"):
        load_test(f"{source}?images=img", **SMALL)
    test = load_test(f"{source}?image=img&label=fine_label", **SMALL)
    assert test.labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert next(test.batches(1))[0].unique().tolist() == [200]


def test_of_fine_and_coarse_labels_the_fine_ones_are_taken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    fine, coarse = datasets.ClassLabel(names=list("abc")), datasets.ClassLabel(names=list("xy"))
    image = {"img": [Image.new("L", (8, 8))] * 6, "fine_label": [0, 1, 2] * 2, "coarse_label": [0, 1] * 3}
    features = datasets.Features({"img": datasets.Image(), "fine_label": fine, "coarse_label": coarse})
    table = datasets.Dataset.from_dict(image, features=features)
    monkeypatch.setattr(data, "_load", lambda place, config: {"train": table, "test": table})
    assert load_test("uoft-cs/cifar100", **SMALL).classes == ("a", "b", "c")
    assert load_test("a folder of its files", **SMALL).classes == ("a", "b", "c")
    assert load_test("uoft-cs/cifar100?label=coarse_label", **SMALL).classes == ("x", "y")


def test_loading_is_silent_and_changes_no_settings(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def settings() -> Iterator[Any]:
        yield datasets.are_progress_bars_disabled()
        yield are_progress_bars_disabled()
        yield datasets.config.HF_HUB_OFFLINE
        yield warnings.filters[:]
        yield from (logging.getLogger(name).level for name in ("datasets", "huggingface_hub"))

    before = list(settings())
    load_train(write_images(tmp_path), **SMALL)
    with pytest.raises(ValueError, match="no such folder"):
        load_train("./missing", **SMALL)
    assert list(settings()) == before
    assert capfd.readouterr() == ("", "")


# ------------------------------------------------------------------------------------------------------ users' mistakes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": 0, "channels": 1}, "size must be at least 1"),
        ({"size": 8, "channels": 2}, r"channels must be 1 \(grey\) or 3"),
        ({"size": 8, "channels": 1, "augment": "crop"}, "unknown augment 'crop'"),
        ({"size": 8, "channels": 1, "bad_images": "drop"}, "unknown bad_images 'drop'"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_train("fashion-mini", **arguments)


@pytest.mark.parametrize("source", ["./missing", "~/missing-folder", "/missing/folder", "a/b/c", ""])
def test_missing_folder(source: str) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        load_train(source, **SMALL)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "data.zip").touch()
    with pytest.raises(ValueError, match="is a file, not a folder"):
        load_train(str(tmp_path / "data.zip"), **SMALL)


def test_unreachable_hub_says_so_quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "_hub_answers", lambda: False)
    start = time.monotonic()
    with pytest.raises(ValueError, match=r"'uoft-cs/cifar10' is no folder here.*cannot be reached.*local folder"):
        load_train("uoft-cs/cifar10", **SMALL)
    assert time.monotonic() - start < 5


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot load the folder .*train/CLASS/"):
        load_train(str(tmp_path), **SMALL)
    for name in ("train/cat", "test/cat"):
        (tmp_path / name).mkdir(parents=True)
    with pytest.raises(ValueError, match="cannot load the folder"):
        load_train(str(tmp_path), **SMALL)


def test_damaged_parquet(tmp_path: Path) -> None:
    source = write_parquet(tmp_path, {"train": [0, 1] * 2, "test": [0, 1]})
    shard = tmp_path / "train-00000-of-00001.parquet"
    shard.write_bytes(shard.read_bytes()[:-20])
    with pytest.raises(ValueError, match="cannot load the folder"):
        load_train(source, **SMALL)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"train": [0, 1] * 2}, r"no labelled test split \(one of test.*found: train \(4 images, 4 labelled\)"),
        ({"test": [0, 1] * 2}, "no split named train; found: test"),
        ({"train": [0, 1] * 2, "test": [-1, -1]}, r"labelled test split .*test \(2 images, 0 labelled\)"),
        ({"train": [0, 1, 0, -1], "test": [0, 1]}, "split 'train' of .*row 3 is -1, but 2 classes are numbered 0 to 1"),
        ({"train": [0, 1] * 2, "test": [0, 1, None]}, "split 'test' of .*row 2 is -1"),
        ({"train": [0, 0, 1], "test": [0, 1]}, r"a class needs 2 training images.*'dog' \(1\)"),
    ],
)
def test_wrong_labels(tmp_path: Path, labels: dict[str, Sequence[int | None]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_train(write_parquet(tmp_path, labels), **SMALL)


def test_label_beyond_the_classes(tmp_path: Path) -> None:
    labels = {"train": [0, 1] * 2, "test": [0, 5]}
    source = write_parquet(tmp_path, labels, features={"label": datasets.Value("int64")})
    with pytest.raises(ValueError, match=r"split 'test' of .*row 1 is 5"):
        load_train(source, **SMALL)


def test_one_class(tmp_path: Path) -> None:
    source = write_parquet(
        tmp_path / "one", {"train": [0, 0], "test": [0]}, features={"label": datasets.ClassLabel(names=["cat"])}
    )
    with pytest.raises(ValueError, match="1 class, but telling classes apart needs at least 2"):
        load_train(source, **SMALL)
    for name in ("train/cat", "test/cat"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / name / "1.png")
    with pytest.raises(ValueError, match="1 class, but telling classes apart needs at least 2"):
        load_train(str(tmp_path), **SMALL)


def test_classes_of_shards_must_agree(tmp_path: Path) -> None:
    source = write_parquet(tmp_path, {"train": [0, 1] * 2})
    write_parquet(tmp_path, {"test": [0, 1]}, features={"label": datasets.ClassLabel(names=["dog", "cat"])})
    with pytest.raises(ValueError, match=r"classes of column 'label' do not agree.*\['dog', 'cat'\] in test-00000"):
        load_train(source, **SMALL)


def test_class_folders_must_agree(tmp_path: Path) -> None:
    source = write_images(tmp_path)
    (tmp_path / "test" / "dog").rename(tmp_path / "test" / "Dog")
    with pytest.raises(ValueError, match=r"too few in: 'Dog' \(0\)"):
        load_train(source, **SMALL)


@pytest.mark.parametrize("memory_limit", [2**30, 0])
def test_unreadable_images(tmp_path: Path, memory_limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "MEMORY_LIMIT", memory_limit)
    source = write_images(tmp_path, train=6, test=3)
    for name, content in {"train/cat/2.jpg": b"no image", "test/dog/1.jpg": b""}.items():
        (tmp_path / name).write_bytes(content)
    truncated = tmp_path / "train" / "dog" / "4.jpg"
    truncated.write_bytes(truncated.read_bytes()[:-200])

    with pytest.raises(ValueError, match=r"unreadable image: .*test/dog/1\.jpg .*bad_images='skip'"):
        list(load_test(source, **SMALL).batches(4))
    with pytest.raises(ValueError, match=r"unreadable image: .*train/(cat/2|dog/4)\.jpg"):
        [list(split.batches(4)) for split in load_train(source, **SMALL)]

    with pytest.warns(UserWarning, match=r"1 unreadable images were left out: .*test/dog/1\.jpg"):
        test = load_test(source, **SMALL, bad_images="skip")
    assert len(test) == 5
    assert torch.cat([labels for _, labels in test.batches(2)]).tolist() == test.labels.tolist() == [0, 0, 0, 1, 1]
    with pytest.warns(UserWarning, match="unreadable images were left out"):
        train, val = load_train(source, **SMALL, bad_images="skip")
    assert len(train) + len(val) == 10


def test_an_unreadable_image_in_parquet_is_named_by_its_row(tmp_path: Path) -> None:
    pictures = [Image.new("L", (8, 8)), {"bytes": b"no image", "path": None}, None]
    source = write_parquet(tmp_path, {"train": [0, 1, 1], "test": [0, 1, 1]}, images=pictures)
    with pytest.raises(ValueError, match="unreadable image: row 1 of split 'test'"):
        load_test(source, **SMALL)
    with pytest.warns(UserWarning, match="2 unreadable images were left out: row 1 of split 'test', row 2"):
        load_test(source, **SMALL, bad_images="skip")


def test_nothing_readable(tmp_path: Path) -> None:
    source = write_images(tmp_path)
    for file in (tmp_path / "test").rglob("*.jpg"):
        file.write_bytes(b"")
    with pytest.raises(ValueError, match="unreadable image"):
        load_test(source, **SMALL, bad_images="skip")


def test_a_set_that_cannot_be_packed_leaves_nothing(tmp_path: Path) -> None:
    source, out = write_images(tmp_path / "images"), tmp_path / "packed"
    next((tmp_path / "images" / "test").rglob("*.jpg")).write_bytes(b"no image")
    with pytest.raises(ValueError, match="unreadable image"):
        pack(source, out, size=8, channels=1)
    assert not out.exists()
    with pytest.warns(UserWarning, match="1 unreadable images were left out"):
        assert len(pack(source, out, size=8, channels=1, bad_images="skip")) == 2
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ValueError, match="is not empty: choose another folder"):
        pack(source, tmp_path / "file", size=8, channels=1, bad_images="skip")


@pytest.mark.filterwarnings("ignore")
def test_what_the_library_raises_is_said(tmp_path: Path) -> None:
    write_parquet(tmp_path / "script", {"train": [0, 1] * 2, "test": [0, 1]})
    (tmp_path / "script" / "script.py").write_text("")
    with pytest.raises(ValueError, match="cannot load the folder"):
        load_test(str(tmp_path / "script"), **SMALL)
    with pytest.raises(ValueError, match="~nobody-of-that-name/x"):
        load_test("~nobody-of-that-name/x", **SMALL)
