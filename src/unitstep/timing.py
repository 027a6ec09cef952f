"""How long calls take, when several are compared. Standard library only."""

import contextlib
import ctypes
import gc
import random
import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any, TypeVar

Name = TypeVar("Name", bound=Hashable)
CLEAR = Path("/proc/self/clear_refs")  # "5" lets the kernel's mark of the peak, VmHWM, start again


def race(calls: Mapping[Name, Callable[[], Any]], *, rounds: int, seconds: float) -> dict[Name, list[list[float]]]:
    """Seconds of each call, of all contenders, by rounds.

    In each round everyone has a turn of so many `seconds`, at least one call, and the order is another one: figures
    from one race compare, though the machine's speed may change meanwhile. The first call of a turn is not timed:
    threads of the one before may still spin. Before the first round everyone is called once, to compile and allocate.
    """
    for call in calls.values():
        call()
    found: dict[Name, list[list[float]]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name in random.Random(turn).sample(list(calls), len(calls)):
            call, spent = calls[name], list[float]()
            call()
            until = time.perf_counter() + seconds
            while not spent or time.perf_counter() < until:
                started = time.perf_counter()
                call()
                spent.append(time.perf_counter() - started)
            found[name].append(spent)
    return found


def peak_memory(call: Callable[[], Any]) -> int | None:
    """Bytes of this process's memory that a call needs beyond what was there before it, at its peak; None if the
    system does not say. To be asked of the first call: what allocators keep afterwards is there already."""
    try:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # give back what is free
        CLEAR.write_text("5")
        before = _status("VmRSS")
        call()
        return max(0, _status("VmHWM") - before)
    except (OSError, KeyError, AttributeError):
        return None


def forget_peak() -> None:
    """Let `peak` start again from the memory of this moment, where the system can do that."""
    with contextlib.suppress(OSError):
        CLEAR.write_text("5")


def peak() -> int | None:
    """Bytes: the most memory that this process has had since `forget_peak`; None if the system does not say."""
    try:
        return _status("VmHWM")
    except (OSError, KeyError):
        return None


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise KeyError(field)
