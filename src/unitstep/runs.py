"""The run folder: what one experiment leaves on disk, and how it is read back. Knows nothing of how training or
measuring is done.

A file is written whole or not at all: aside, flushed to the disk, renamed. Tensors are safetensors with a JSON text in
their metadata; no pickle is read or written. What is damaged or does not belong here is named in an error, never
loaded and never deleted.
"""

import contextlib
import fcntl
import json
import os
import platform
import subprocess
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from unitstep import nets
from unitstep.conversion import Spiking, spiking, trace
from unitstep.files import check_writable, read_about, read_json, read_tensors, write_json, write_tensors, write_whole
from unitstep.recipes import Recipe, Stage, differences, recipe_from_dict

SCHEMA = 1
LOGGED = {"stage", "epoch", "loss", "val_accuracy", "seconds"}  # that every version wrote into a row of the log


@dataclass(frozen=True)
class Finished:
    """A finished stage of a run: where its weights are and how it went."""

    index: int
    stage: Stage
    path: Path
    val_accuracy: float
    """Percent of the validation images, with the weights that were kept."""
    seconds: float
    """Training and validation, without interruptions."""
    classes: tuple[str, ...]


class Run:
    """A run folder, as it is on disk at this moment. ValueError if `path` is not a run folder or a file in it is
    damaged.

    recipe: the `Recipe` it was made by.  stages: the finished ones, in order.  trained: precision, device,
    versions, machine and commit that it was begun with, and with what it was `continued`, if that is not the same.
    measurement: the content of measure.json, or None.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not (self.path / "recipe.json").is_file():
            raise ValueError(
                f"{self.path} is not a run folder: it has no recipe.json (unitstep train RECIPE --out {self.path} "
                "makes one)"
            )
        self.about: dict[str, Any] = read_json(self.path / "recipe.json")
        try:
            self.recipe = recipe_from_dict(self.about["recipe"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.path / 'recipe.json'} is not the recipe of a run: {error}") from error

    @property
    def stages(self) -> tuple[Finished, ...]:
        return tuple(
            self.finished(index) for index in range(len(self.recipe.stages)) if self.stage_path(index).exists()
        )

    @property
    def trained(self) -> dict[str, Any]:
        begun = {key: self.about.get(key) for key in ("precision", "device", "versions", "machine", "commit")}
        return begun | ({"continued": self.about["continued"]} if "continued" in self.about else {})

    def goes_on(self, *, device: str) -> None:
        """Note in recipe.json where training goes on, if that is on another device or machine, with other versions or
        at another commit."""
        now, before = {"device": device, **provenance()}, [self.trained, *self.about.get("continued", [])]
        if not any(now.items() <= known.items() for known in before):
            self.about["continued"] = [*before[1:], now]
            write_json(self.path / "recipe.json", self.about)

    @property
    def measurement(self) -> dict[str, Any] | None:
        path = self.path / "measure.json"
        return read_json(path) if path.exists() else None

    @property
    def log(self) -> list[dict[str, Any]]:
        """One row per epoch: stage, epoch, loss, val_accuracy (None: not validated), lr, seconds, …"""
        path = self.path / "log.jsonl"
        try:
            rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
            if any(not isinstance(row, dict) or not row.keys() >= LOGGED for row in rows):
                raise ValueError(f"a row without {', '.join(sorted(LOGGED))}")
            return rows
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}; move it away to go on without it") from error

    def write_log(self, row: dict[str, Any]) -> None:
        """Append a row; one that was logged before a crash and is reached again takes the place of the first."""
        rows = [old for old in self.log if (old["stage"], old["epoch"]) != (row["stage"], row["epoch"])]
        write_whole(self.path / "log.jsonl", "".join(json.dumps(each) + "\n" for each in [*rows, row]).encode())

    def stage_path(self, index: int) -> Path:
        return self.path / f"{index}-{self.recipe.stages[index].name}.safetensors"

    @property
    def state_path(self) -> Path:
        return self.path / "state.safetensors"

    @property
    def samples_path(self) -> Path:
        """A few test images, and where the last network's first layers fired."""
        return self.path / "samples.safetensors"

    def finished(self, index: int) -> Finished:
        path = self.stage_path(index)
        info = self._check(path, read_about(path), index, "val_accuracy", "seconds", "classes")
        return Finished(
            index, self.recipe.stages[index], path, info["val_accuracy"], info["seconds"], tuple(info["classes"])
        )

    def save(self, path: Path, tensors: dict[str, Tensor], index: int, **info: Any) -> None:
        """Write tensors with the recipe, the stage's index and `info` in their metadata."""
        write_tensors(path, tensors, {"schema": SCHEMA, "recipe": self.recipe.to_dict(), "index": index, **info})

    def load(self, path: Path, index: int, *wanted: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What `save` wrote. ValueError if the file is damaged, belongs to another run or stage, or lacks what is
        `wanted` of its `info`."""
        self._check(path, read_about(path), index, *wanted)
        return read_tensors(path)

    def state_index(self) -> int | None:
        """Index of the stage that was interrupted, or None."""
        return int(read_about(self.state_path).get("index", -1)) if self.state_path.exists() else None

    def check_order(self) -> None:
        """ValueError if a finished stage is there whose start, the stage above it, is not."""
        there = [self.stage_path(index).exists() for index in range(len(self.recipe.stages))]
        if there != sorted(there, reverse=True):
            missing = there.index(False)
            later = [self.stage_path(index).name for index in range(missing, len(there)) if there[index]]
            raise ValueError(
                f"{self.path} has {', '.join(later)}, which began with {self.stage_path(missing).name}, and that "
                "is not there: put it back, or move those away too"
            )

    def check_images(self, classes: tuple[str, ...], number: int | None = None) -> None:
        """ValueError if what is here was trained on images of other classes, or on another number of them where the
        number of training images is given."""
        files = [path for index in range(len(self.recipe.stages)) if (path := self.stage_path(index)).exists()]
        index = self.state_index()
        if index is not None and index < len(self.recipe.stages) and not self.stage_path(index).exists():
            files.append(self.state_path)
        way_out = "name those by --data" + ("" if number is None else ", or train in another folder")
        for path in files:
            known = read_about(path)
            if (names := tuple(known.get("classes", classes))) != classes:
                raise ValueError(
                    f"these images have the classes {_some(classes)}, but {self.path} was trained on {_some(names)}: "
                    + way_out
                )
            if number is not None and known.get("images", number) != number:
                raise ValueError(
                    f"there are {number:,} training images, but {path} was trained on {known['images']:,}: {way_out}"
                )

    def _check(self, path: Path, info: dict[str, Any], index: int, *wanted: str) -> dict[str, Any]:
        try:
            same = recipe_from_dict(info["recipe"]) == self.recipe  # fields that came later have their defaults
        except (ValueError, KeyError, TypeError):
            same = False
        if not same or info.get("index") != index or not info.keys() >= set(wanted):
            raise ValueError(
                f"{path} does not belong to this run and stage; it was not loaded: move it away to train that stage "
                "again"
            )
        return info

    def net(self, index: int) -> nn.Module:
        """The trained network of stage `index`, in evaluation mode: the CNN for the first, else a `Spiking`."""
        path = self.stage_path(index)
        if not path.exists():
            raise ValueError(
                f"stage {self.recipe.stages[index].name} of {self.path} is not trained yet: unitstep train "
                f"--from {self.path} goes on with it"
            )
        tensors, info = self.load(path, index, "classes")
        return rebuild(self.recipe, len(info["classes"]), tensors, spikes=index > 0)


def _some(names: tuple[str, ...]) -> str:
    return ", ".join(names[:10]) + (f" … ({len(names)})" if len(names) > 10 else "")


def build_cnn(recipe: Recipe, classes: int) -> nn.Module:
    """The recipe's CNN, with weights drawn from its seed; a user's own with the weights that it is made with, behind
    the `Normalize` that turns pixels into its input."""
    r = recipe
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(r.seed)  # torch.manual_seed would seed the caller's GPUs, too
        if ":" in r.net:
            normalize = nets.Normalize(r.pixel_zero, r.pixel_scale)
            cnn = nets.imported(r.net).cpu()
            if own := [name for name, module in cnn.named_modules() if parametrize.is_parametrized(module)]:
                raise ValueError(
                    f"{r.net} computes the weights of {own[0]!r} from others, as weight_norm does; make them plain "
                    "before it returns: torch.nn.utils.parametrize.remove_parametrizations(module, 'weight')"
                )
            net: nn.Module = nn.Sequential(OrderedDict(normalize=normalize, cnn=cnn))
            if any(map(is_lazy, net.parameters())):  # until they are called, layers are of other types, too
                with contextlib.suppress(Exception), torch.no_grad():  # of the user's code: training says which
                    net.eval()(torch.zeros(1, r.channels, r.size, r.size, dtype=torch.uint8))
            if _needs_order(recipe, net):
                return net
        else:
            net = nets.build(
                r.net, classes=classes, channels=r.channels, size=r.size, batch_norm=r.norm != "none", pool=r.pool,
                dropout=r.dropout, zero_point=r.pixel_zero, scale=r.pixel_scale,
            )  # fmt: skip
    return _channels_last(net)


def _channels_last(net: nn.Module) -> nn.Module:
    """With kernels, and so values, in the memory format in which convolutions are fastest, if it has kernels yet."""
    if any(map(is_lazy, net.parameters())):
        return net
    moved: nn.Module = net.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return moved


def _needs_order(recipe: Recipe, cnn: nn.Module) -> bool:
    """Whether a user's network calls `view`, which it cannot in that format, or may do so, as it is not traced."""
    try:
        traced = trace(cnn, structure(recipe, cnn)["leaf_modules"])
    except ValueError:
        return True
    return any("view" in node.meta for node in traced.graph.nodes)


def build_snn(recipe: Recipe, cnn: nn.Module) -> Spiking:
    """The structure of the recipe's spiking network; its thresholds are not set."""
    snn = _channels_last(spiking(cnn, **structure(recipe, cnn)))
    assert isinstance(snn, Spiking)
    return snn


def structure(recipe: Recipe, cnn: nn.Module) -> dict[str, Any]:
    """What `spiking` needs to know of the recipe."""
    names = ("height", "initial", "readout", "norm", "max_pool", "approximate")
    modules = dict(cnn.named_modules())  # a user's own network is `cnn` in what `build_cnn` made
    leaves = tuple(f"cnn.{leaf}" if f"cnn.{leaf}" in modules else leaf for leaf in recipe.leaf_modules)
    return {name: getattr(recipe, name) for name in names} | {"leaf_modules": leaves}


def finding(recipe: Recipe) -> dict[str, Any]:
    """What `calibrate_` needs to know of the recipe, but for the steps."""
    return {name: getattr(recipe, name) for name in ("thresholds", "percentile", "scale", "calibration_steps")}


def rebuild(recipe: Recipe, classes: int, tensors: dict[str, Tensor], *, spikes: bool) -> nn.Module:
    """The network whose state dict `tensors` is, in evaluation mode: the recipe's CNN, or its `Spiking`. ValueError if
    they do not fit each other."""
    net = build_cnn(recipe, classes)
    if spikes:
        net = build_snn(recipe, net)
    try:
        net.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"these weights do not fit the network {recipe.net} as it is now: {error}") from error
    return net.eval()


def begun(path: Path) -> bool:
    """Whether `path` is a run folder in which something was trained."""
    trained = (*path.glob("[0-9]*-*.safetensors"), *path.glob("state.safetensors"))
    return bool(trained) and (path / "recipe.json").exists()


def open_run(out: str | Path, recipe: Recipe, **about: Any) -> Run:
    """The run folder `out`, made if it is not there. ValueError if something was trained there by another recipe, or if
    it cannot be written to."""
    path = Path(out)
    if begun(path):
        check_writable(path / "log.jsonl")
        run = Run(path)
        if changes := differences(run.recipe, replace(recipe, data=run.recipe.data)):  # images can be moved
            listed = "\n  ".join(changes)
            raise ValueError(
                f"{path} was made by another recipe (there → here); choose another folder, or the same recipe (a "
                f"converted CNN takes another by unitstep convert, in a new folder):\n  "
                f"{listed}"
            )
        return run
    try:
        path.mkdir(parents=True, exist_ok=True)
        strangers = [entry.name for entry in path.iterdir() if entry.suffix in (".safetensors", ".json", ".jsonl")]
        if "recipe.json" in strangers:
            Run(path)  # ValueError if it is another program's
        elif strangers:
            raise ValueError(f"{path} has no recipe.json but holds {', '.join(strangers)}: choose an empty folder")
        with locked(path):
            for name in ("log.jsonl", "measure.json", "conversion.json", "samples.safetensors"):  # of networks gone
                (path / name).unlink(missing_ok=True)
            write_json(path / "recipe.json", {"schema": SCHEMA, "recipe": recipe.to_dict(), **about, **provenance()})
    except OSError as error:
        raise ValueError(f"cannot write to the run folder {path}: {error.strerror or error}") from error
    return Run(path)


def load(run: Run | str | Path, steps: int = 1) -> Spiking:
    """The trained spiking network of the run's stage with that number of timesteps. ValueError if there is no such
    stage or it is not finished."""
    run = run if isinstance(run, Run) else Run(run)
    found = [index for index, stage in enumerate(run.recipe.stages) if stage.steps == steps]
    if not found or steps is None:
        there = ", ".join(str(stage.steps) for stage in run.recipe.stages[1:])
        raise ValueError(f"{run.path} has no stage of {steps} timesteps; its ladder is {there}")
    net = run.net(found[0])
    assert isinstance(net, Spiking)
    return net


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the run folder `path` against a second process. ValueError if one is at work in it."""
    handle = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"another process is at work in {path}: wait for it or stop it") from error
        yield
    finally:
        os.close(handle)


def provenance() -> dict[str, Any]:
    """Versions, machine and git commit: what a number needs to be repeated."""
    return {"versions": {name: version(name) for name in ("unitstep", "torch")} | {"python": platform.python_version()},
            "machine": machine(), "commit": _commit()}  # fmt: skip


def machine() -> dict[str, Any]:
    """Processor, its vector and matrix instructions, number of its cores, threads that torch uses, and graphics card if
    there is one."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "system": platform.system(),
        "cpu": cpu,
        "instructions": sorted(
            name
            for name, there in torch.cpu.get_capabilities().items()
            if there is True and name.startswith(("avx", "amx", "neon", "dot", "i8mm", "bf16", "sve", "sme"))
        ),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
    }


def _commit() -> str | None:
    """The commit of the source tree that this code runs from, with "+" if it was changed; None if it is an installed
    copy."""
    here = Path(__file__)
    ask = ["git", "-C", str(here.parent)]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        for question in (
            ["ls-files", "--error-unmatch", here.name],
            ["describe", "--always", "--abbrev=12", "--dirty=+"],
        ):
            done = subprocess.run([*ask, *question], capture_output=True, text=True, timeout=5, check=True)
        return done.stdout.strip()
    return None
