"""A ladder of a few optimiser steps per stage, for tests."""

import os
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

from unitstep import Recipe, recipe
from unitstep.data import pack


@cache
def mini() -> str:
    """fashion-mini, decoded once: to load it takes 15 ms then and not a second."""
    folder = str(Path(mkdtemp(dir=os.environ["HF_HOME"]), "fashion-mini"))  # HF_HOME is conftest's, and removed
    pack("fashion-mini", folder, size=28, channels=1)
    return folder


def small(*steps: int, **changes: object) -> Recipe:
    """A ladder of a few optimiser steps per stage on fashion-mini."""
    shipped = recipe("fashion-mini", calibration_images=128)
    cnn, last = shipped.stages[0], shipped.stages[-1]
    stages = (
        replace(cnn, epochs=0.2, batch=64),
        *(replace(last, steps=t, epochs=0.07, batch=64, weight_bits=None, optimizer="adamw") for t in steps),
    )
    data = changes.get("data") or mini()
    return replace(shipped, **{"data": data, "stages": stages, "dropout": 0.1, **changes})  # type: ignore[arg-type]
