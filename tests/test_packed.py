"""A packed data set gives the same training as the one it was made from."""

import shutil
from pathlib import Path

import pytest
import torch

from unitstep import packed
from unitstep.cli import main
from unitstep.data import load_test, load_train, pack

MINI = {"size": 28, "channels": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "mini"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "PART_BYTES", 2_000_000)
        pack("fashion-mini", out, **MINI)
    return out


def test_parts(folder: Path) -> None:
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["test-00000-of-00001.safetensors", *(f"train-{k:05}-of-00002.safetensors" for k in range(2))]
    assert all(path.stat().st_size <= 2_000_000 for path in folder.iterdir())


def test_the_same_images_in_the_same_order(folder: Path) -> None:
    ours, theirs = (load_train(source, **MINI) for source in (str(folder), "fashion-mini"))
    for mine, original in (
        *zip(ours, theirs, strict=True),
        [load_test(s, **MINI) for s in (str(folder), "fashion-mini")],
    ):
        assert mine.classes == original.classes
        assert torch.equal(mine.images, original.images)
        assert torch.equal(mine.labels, original.labels)
    (a, _), (b, _) = (next(split.batches(64, seed=3, augment="crop-flip")) for split in (ours[0], theirs[0]))
    assert torch.equal(a, b)


def test_the_package_s_set_is_not_a_folder_of_its_name(folder: Path, tmp_path: Path, monkeypatch) -> None:
    shutil.copytree(folder, tmp_path / "fashion-mini")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(packed, "read", None)
    load_test("fashion-mini", **MINI)


def test_a_part_is_missing(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "train-00001-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match=r"not all parts of the split 'train'.*\(1 are there\)"):
        load_train(str(copy), **MINI)
    (copy / "train-00000-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="not all parts of the split 'train'"):
        load_train(str(copy), **MINI)


def test_parts_of_another_packing(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    shutil.copy(copy / "train-00000-of-00002.safetensors", copy / "train-00000-of-00003.safetensors")
    with pytest.raises(ValueError, match="not all parts of the split 'train'"):
        load_train(str(copy), **MINI)


@pytest.mark.parametrize("content", [b"", b"\x08" * 100])
def test_a_damaged_part_is_named(folder: Path, tmp_path: Path, content: bytes) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "test-00000-of-00001.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"test-00000-of-00001\.safetensors is damaged or was not written by unitstep"):
        load_train(str(copy), **MINI)


@pytest.mark.parametrize("labels", [torch.tensor([0, -1]), torch.tensor([0, 2]), torch.tensor([0.0, 1.0])])
def test_labels_that_are_no_classes_are_refused(labels: torch.Tensor, tmp_path: Path) -> None:
    for split in ("train", "test"):
        packed.write(tmp_path, split, torch.zeros(2, 1, 4, 4, dtype=torch.uint8), labels, ("a", "b"))
    with pytest.raises(ValueError, match=r"labels that are not 0 to 1"):
        packed.read(tmp_path)


def test_long_names_of_classes_are_part_of_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "PART_BYTES", 100_000)
    images, labels = torch.zeros(100, 1, 64, 64, dtype=torch.uint8), torch.zeros(100, dtype=torch.int64)
    paths = packed.write(tmp_path, "train", images, labels, ['"quoted" name ' * 40] * 20)
    assert all(path.stat().st_size <= 100_000 for path in paths)


def test_another_size_and_random_crops_need_the_original(folder: Path) -> None:
    with pytest.raises(ValueError, match="1 channels and 28×28 pixels, but 3 and 32×32 are wanted"):
        load_train(str(folder), size=32, channels=3)
    with pytest.raises(ValueError, match="needs the original images"):
        load_train(str(folder), **MINI, augment="resized-crop-flip")


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["pack", "fashion-mini", "--size", "28", "--channels", "1", "--out", str(tmp_path / "out")]
    assert main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [Path(line.split()[0]).name[:5] for line in lines] == ["train", "test-"]
    assert main(command) == 1
    assert "is not empty: choose another folder" in capsys.readouterr().err
