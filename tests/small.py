"""A ladder of a few optimiser steps per stage, for tests."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from unitstep import Recipe, recipe
from unitstep.data import pack

FOLDER = TemporaryDirectory(prefix="unitstep-tests-")  # until this process ends


@cache
def mini() -> str:
    """fashion-mini, decoded once: to load it takes 15 ms then and not a second."""
    folder = Path(FOLDER.name) / "mini"
    pack("fashion-mini", folder, size=28, channels=1)
    return str(folder)


def small(*steps: int, **changes: object) -> Recipe:
    """A ladder of a few optimiser steps per stage on fashion-mini."""
    shipped = recipe("fashion-mini", calibration_images=128)
    cnn, last = shipped.stages[0], shipped.stages[-1]
    stages = (
        replace(cnn, epochs=0.2, batch=64),
        *(replace(last, steps=t, epochs=0.07, batch=64, weight_bits=None, optimizer="adamw") for t in steps),
    )
    return replace(shipped, **{"data": mini(), "stages": stages, "dropout": 0.1, **changes})  # type: ignore[arg-type]
