"""What all tests share: one thread, a cache that leaves nothing behind, and the folder of full data sets."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from unitstep import Run

CACHE = tempfile.mkdtemp(prefix="unitstep-tests-")
os.environ["HF_HOME"] = CACHE  # before anything imports datasets, which reads it once
os.environ["HF_DATASETS_CACHE"] = str(Path(CACHE, "datasets"))
os.environ["HF_HUB_CACHE"] = str(Path(CACHE, "hub"))
torch.set_num_threads(1)  # two threads on busy cores are many times slower


def pytest_unconfigure() -> None:
    shutil.rmtree(CACHE, ignore_errors=True)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder that holds `cifar10/` and `fashion_mnist/`: $UNITSTEP_DATA, by default ../shared/data."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("UNITSTEP_DATA", default))
    if not all((folder / name).is_dir() for name in ("cifar10", "fashion_mnist")):
        pytest.skip(f"no cifar10/ and fashion_mnist/ in {folder}: set UNITSTEP_DATA to the folder that holds them")
    return folder


@pytest.fixture(scope="session", autouse=True)
def trial_of_bf16() -> Iterator[Callable[[], float | None]]:
    """`precision="auto"` means fp32 in tests, whatever a trial would find on this machine. Gives the trial."""
    from unitstep import ladder

    trial = ladder._bf16_speed
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ladder, "_bf16_speed", lambda: 0.0)
        yield trial


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> "Run":
    """A run of CNN, T=2 and T=1 that nothing interrupted. Not to be changed: copy it."""
    from tests.small import small
    from unitstep import train

    return train(small(2, 1), tmp_path_factory.mktemp("unbroken"))
