"""A ladder of a few optimiser steps per stage, for tests."""

from dataclasses import replace

from unitstep import Recipe, recipe


def small(*steps: int, **changes: object) -> Recipe:
    """A ladder of a few optimiser steps per stage on fashion-mini."""
    shipped = recipe("fashion-mini", calibration_images=128)
    cnn, last = shipped.stages[0], shipped.stages[-1]
    stages = (
        replace(cnn, epochs=0.2, batch=64),
        *(replace(last, steps=t, epochs=0.07, batch=64, weight_bits=None) for t in steps),
    )
    return replace(shipped, **{"stages": stages, "dropout": 0.1, **changes})  # type: ignore[arg-type]
