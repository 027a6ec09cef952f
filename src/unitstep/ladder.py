"""The training: how one stage is fitted, and how each stage starts from the one above, from the CNN down to one
timestep. Knows nothing of screens.

All randomness of an optimiser step is a function of (seed, stage, step): images, augmentation and dropout. So a run
that was stopped anywhere, and goes on, is the run that was never stopped (on a GPU as nearly as two runs there are the
same, since its kernels add in any order).
"""

import contextlib
import math
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrize import is_parametrized

from unitstep.calibration import calibrate_, record, to_spiking, watching
from unitstep.conversion import Spiking
from unitstep.data import Split, load_train, mix, shrunk
from unitstep.evaluation import accuracy, choose_device, forward
from unitstep.files import remove_unfinished, write_json
from unitstep.fusing import BATCH_NORMS, called_once, module_of, per_channel, refuse_hooks
from unitstep.muon import Muon
from unitstep.neuron import LIF, clamp_, compiled, compiler_available
from unitstep.quantizing import centre_thresholds_
from unitstep.recipes import Recipe, Stage
from unitstep.recomputing import recomputing
from unitstep.replaying import Replayed
from unitstep.rounding import round_weights_
from unitstep.runs import (
    SCHEMA,
    Run,
    begun,
    build_cnn,
    build_snn,
    finding,
    locked,
    open_run,
    rebuild,
    structure,
)
from unitstep.timing import forget_peak, peak
from unitstep.whitening import plain_state, whiten_

CHECKPOINT_SECONDS = 60.0  # at most so much work is lost by a crash
COMPILE_FROM = 1e9  # neuron updates in a stage from which compiling the neurons pays for itself
TEMPERATURE = 2.0  # of distillation
ORTHOGONAL = 10.0  # times the learning rate, for orthogonalised steps
BF16_FROM = 1.3  # times as fast as fp32 from which bf16 is taken


@dataclass(frozen=True)
class Progress:
    """Where training is: given to the `progress` callback at every step."""

    index: int
    stage: Stage
    step: int
    total: int
    """Optimiser steps of the stage: done so far, and in all."""
    loss: float | None = None
    best: float | None = None
    """Percent of the validation images, with the weights that would be kept: the best or the last so far."""
    seconds: float = 0.0
    done: bool = False
    """The stage is finished and its weights are written."""


@contextlib.contextmanager
def _sigint() -> Iterator[threading.Event]:
    """Within this context the first SIGINT sets the event; a second one interrupts at once, as usual."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    usual = signal.getsignal(signal.SIGINT)

    def note(*_: Any) -> None:
        event.set()
        signal.signal(signal.SIGINT, usual)

    signal.signal(signal.SIGINT, note)
    try:
        yield event
    finally:
        signal.signal(signal.SIGINT, usual)


def train(
    recipe: Recipe,
    out: str | Path,
    *,
    data: str | None = None,
    cnn: Run | str | Path | None = None,
    device: str = "auto",
    precision: str = "auto",
    compile: Literal["auto", "off"] = "auto",
    time_limit: float | None = None,
    max_loss: float | None = None,
    bad_images: Literal["refuse", "skip"] = "refuse",
    progress: Callable[[Progress], None] | None = None,
) -> Run:
    """Train all stages of `recipe` in the run folder `out`, or go on with what is there; returns the run as far as it
    got.

    data: where the images are, if not where the recipe says. A run goes on with the same images at another place.
    cnn: a run whose trained CNN is taken over, so that several ladders start from the same one; its seconds come with
    it.
    device: auto, cpu, cuda.  precision: auto, fp32, bf16 (mixed: weights, membranes, evaluation stay fp32).
    compile: auto fuses the neurons by torch.compile where a compiler is there and the stage is long enough to gain; on
    a GPU it also records a step once and replays it.
    time_limit: minutes after which it stops, with a saved state.  max_loss: percentage points of validation accuracy;
    the ladder ends at the first T that loses more than that against the CNN.  bad_images: refuse or skip unreadable
    ones. Raises ValueError for a user's mistake, FloatingPointError if the loss is not finite, KeyboardInterrupt after
    SIGINT once the state is saved.
    """
    started = time.monotonic()
    for name, limit, unit in (("time_limit", time_limit, "minutes"), ("max_loss", max_loss, "percentage points")):
        if limit is not None and not limit >= 0:  # so of nan, too
            raise ValueError(f"{name} must be 0 or more {unit}, not {limit:g}")
    if compile not in ("auto", "off"):
        raise ValueError(f"compile must be auto or off, not {compile!r}")
    where = choose_device(device)
    if data is not None:
        recipe = replace(recipe, data=data)
    if precision == "auto" and begun(Path(out)):
        precision = Run(out).about.get("precision", "auto")  # a run goes on as it was begun
    amp = _precision(precision, where)
    run = open_run(out, recipe, precision="bf16" if amp else "fp32", device=where.type)
    if (chosen := run.about.get("precision", "fp32")) != ("bf16" if amp else "fp32"):
        raise ValueError(f"{run.path} was begun in {chosen} and goes on only so: leave --precision at auto")
    end = math.inf if time_limit is None else started + 60 * time_limit
    with locked(run.path), _sigint() as interrupted:
        for path in (run.state_path, *map(run.stage_path, range(len(recipe.stages)))):
            remove_unfinished(path)
        run.check_order()
        train_split, val_split = load_train(
            recipe.data, size=recipe.size, channels=recipe.channels, augment=recipe.augment, bad_images=bad_images
        )
        train_split, val_split = train_split.to(where), val_split.to(where)
        if cnn is not None and run.stage_path(0).exists() and not isinstance(cnn, Run) and not Path(cnn).exists():
            warnings.warn(f"{cnn} is gone; {run.path} goes on with the CNN that it has", stacklevel=2)
        elif cnn is not None:
            _take_cnn(run, cnn if isinstance(cnn, Run) else Run(cnn), val_split, where)
        run.check_images(train_split.classes, len(train_split))

        def stop() -> bool:
            return interrupted.is_set() or time.monotonic() > end

        reference: float | None = None
        for index, stage in enumerate(recipe.stages):
            if not run.stage_path(index).exists():
                run.goes_on(device=where.type)
                try:
                    fit = _Fit(
                        run, index, train_split, val_split, where, amp, progress or (lambda _: None), compile != "off"
                    )
                    with compiled(_pays(compile, fit.net, stage, train_split, where)):
                        finished = fit.climb(stop)
                except RuntimeError as error:
                    if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
                        raise
                    raise ValueError(
                        f"stage {stage.name} does not fit into the memory. In a new folder (--cnn "
                        f"{run.path} takes a finished CNN over), what takes less: a batch in more parts "
                        f"(--stages.{index}.accumulate, now {stage.accumulate}), a smaller --stages.{index}.batch, "
                        f"fewer --calibration-images, or, at several timesteps, --stages.{index}.recompute"
                    ) from error
                del fit.replayed, fit  # which hold each other, and the GPU's memory
                if not finished or (index + 1 < len(recipe.stages) and stop()):
                    if interrupted.is_set():
                        raise KeyboardInterrupt
                    return run
            accuracy = run.finished(index).val_accuracy
            reference = accuracy if reference is None else reference
            if max_loss is not None and reference - accuracy > max_loss:
                break
    return run


def _take_cnn(run: Run, source: Run, val: Split, device: torch.device) -> None:
    """Write the CNN of `source` as the first stage of `run`. ValueError if it is not trained, or another network, or
    for other classes, or if `run` has one already that is not the same."""
    if not source.stage_path(0).exists():
        raise ValueError(f"{source.path} has no trained CNN to start from: unitstep train goes on with it")
    tensors, info = source.load(source.stage_path(0), 0)
    source.check_images(val.classes)
    alike = ("net", "size", "channels", "pool", "pixel_zero", "pixel_scale")
    if other := [name for name in alike if getattr(source.recipe, name) != getattr(run.recipe, name)]:
        raise ValueError(f"the CNN of {source.path} is not this recipe's network: other {', '.join(other)}")
    try:
        net = rebuild(run.recipe, len(val.classes), tensors, spikes=False)
    except ValueError as error:
        raise ValueError(f"the CNN of {source.path} is not this recipe's network: {error}") from error
    if run.stage_path(0).exists():
        there, _ = run.load(run.stage_path(0), 0)
        if not all(torch.equal(tensor, there[name]) for name, tensor in tensors.items()):
            raise ValueError(
                f"{run.path} has a CNN already, and it is not that of {source.path}: choose another folder, or leave "
                "--cnn out"
            )
        return
    net.to(device)
    found = accuracy(net, val, None, device)  # of these images, which may not be those that `source` was validated on
    run.save(run.stage_path(0), tensors, 0, val_accuracy=found, seconds=info["seconds"], classes=val.classes)


@dataclass(frozen=True)
class Converted:
    """A user's CNN as the first stage of a run, and what conversion alone makes of it."""

    run: Run
    snn: Spiking
    """With thresholds found and its `.report`, at the number of steps of the run's first spiking stage."""
    images: Tensor
    """Those that thresholds were found on, uint8 [B, C, H, W]."""
    cnn_accuracy: float
    accuracy: float
    """Percent of the validation images: of the CNN, and of `snn` without any training."""


def convert(
    recipe: Recipe,
    out: str | Path,
    *,
    weights: str | Path | None = None,
    device: str = "auto",
    precision: str = "auto",
    bad_images: Literal["refuse", "skip"] = "refuse",
) -> Converted:
    """Make a run folder `out` whose CNN is the user's own, `recipe.net` = "package.module:function", and convert it.

    weights: a safetensors file with its state dict; None: it has its weights when it is made.  precision: of the
    training to come. Writes the CNN as the
    finished first stage, and conversion.json: the report, and the validation accuracies before and after. `train` with
    the same recipe and folder goes on with the spiking stages. Raises ValueError for a user's mistake; nothing is
    written then.
    """
    where, path = choose_device(device), Path(out)
    chosen = "bf16" if _precision(precision, where) else "fp32"
    if begun(path):
        raise ValueError(f"{path} is a run already: go on with unitstep train --from {path}, or choose another folder")
    if len(recipe.stages) < 2:
        raise ValueError("the recipe has no spiking stage to convert for")
    if not recipe.data:
        raise ValueError("images are needed to find thresholds and to train on: give --data FOLDER_OR_HUB_NAME")
    split, val = load_train(
        recipe.data, size=recipe.size, channels=recipe.channels, augment=recipe.augment, bad_images=bad_images
    )
    cnn = build_cnn(recipe, len(split.classes)).to(where).eval()
    if weights is not None:
        load_weights_(cnn.get_submodule("cnn") if ":" in recipe.net else cnn, weights)
    images, val = calibration_images(recipe, split).to(where), val.to(where)
    _check_output(recipe, cnn, split.classes)
    steps = recipe.stages[1].steps or 1
    snn = to_spiking(cnn, images, steps=steps, **structure(recipe, cnn), **finding(recipe))
    before, after = accuracy(cnn, val, None, where), accuracy(snn, val, steps, where)
    run = open_run(path, recipe, precision=chosen, device=where.type)
    run.save(run.stage_path(0), cnn.state_dict(), 0, val_accuracy=before, seconds=0.0, classes=split.classes)
    found = {"steps": steps, "val_images": len(val), "cnn_val_accuracy": before, "val_accuracy": after}
    write_json(path / "conversion.json", {"schema": SCHEMA, **found, "report": snn.report.to_dict()})
    return Converted(run, snn, images, before, after)


def _check_output(recipe: Recipe, cnn: nn.Module, classes: tuple[str, ...]) -> None:
    """ValueError if a user's CNN does not give logits [B, classes] of the recipe's images."""
    where = next(cnn.buffers()).device
    try:
        with torch.no_grad(), torch.random.fork_rng(_gpus(where)):
            _seed(recipe.seed, where)  # also of weights that are made at the first call
            images = torch.randint(256, (2, recipe.channels, recipe.size, recipe.size), dtype=torch.uint8)
            logits = forward(cnn.eval(), images.to(where), None)
    except Exception as error:  # whatever the user's code raises
        raise ValueError(
            f"{recipe.net} fails on images of {recipe.channels}×{recipe.size}×{recipe.size}: {error}. --size, "
            "--channels, --pixel-zero and --pixel-scale must be those that it was made for"
        ) from error
    if not isinstance(logits, Tensor) or logits.shape != (2, len(classes)):
        shape = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"{recipe.net} gives {shape} for 2 images, but logits of the {len(classes)} classes of {recipe.data!r} are "
            "wanted"
        )
    if (logits >= 0).all() and (logits.sum(1) - 1).abs().max() < 1e-3 and not torch.equal(logits[0], logits[1]):
        raise ValueError(
            f"{recipe.net} gives probabilities: it ends in a softmax. Let it return the logits before it; training and "
            "prediction take the softmax themselves"
        )


def _sizes(recipe: Recipe, stage: Stage, net: nn.Module, classes: int, *, warn: bool) -> tuple[int, ...]:
    """Heights and widths, in pixels, of the stage's training images; full size alone if `net` does not take all of the
    smaller ones."""
    sizes = tuple(max(1, round(share * recipe.size)) for share in stage.sizes or (1,))
    for size in sizes[:-1]:
        images = torch.zeros(2, recipe.channels, size, size, dtype=torch.uint8, device=next(net.buffers()).device)
        try:
            with torch.no_grad():
                shape = list(forward(net.eval(), images, stage.steps).shape)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever the user's code raises
            shape, why = [], f"{type(error).__name__}: {error}"
        else:
            why = f"of 2 images it makes {shape}"
        if shape != [2, classes]:
            if warn:
                warnings.warn(
                    f"{recipe.net} takes no images of {size}×{size} pixels ({why}): stage {stage.name} is trained at "
                    f"{recipe.size}×{recipe.size} throughout, which takes longer. A network takes smaller images if it "
                    "pools to a fixed size, as nn.AdaptiveAvgPool2d(1) does, before it flattens",
                    stacklevel=2,
                )
            return (recipe.size,)
    return sizes


def load_weights_(net: nn.Module, path: str | Path) -> None:
    """Load a safetensors file with exactly the tensors of `net`'s state dict. ValueError if it is anything else."""
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is not a safetensors file that can be read ({error}). From a .pt file with a state dict: "
            'safetensors.torch.save_file(torch.load("weights.pt", weights_only=True), "weights.safetensors")'
        ) from error
    try:
        net.load_state_dict(tensors)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit the network: {error}") from error


def calibration_images(recipe: Recipe, split: Split) -> Tensor:
    """The augmented training images, uint8 [B, C, H, W], that the recipe's thresholds are found on. Without cutout,
    which hides a part of the currents."""
    size = min(recipe.calibration_images, len(split))
    batches = split.batches(
        size, seed=mix(recipe.seed, 1, -1), augment=recipe.augment, padding=recipe.padding, border=recipe.border
    )
    return next(batches)[0]


class _Fit:
    """One stage in training: network, optimiser, position, weights to be kept so far (`best`)."""

    def __init__(
        self,
        run: Run,
        index: int,
        train: Split,
        val: Split,
        device: torch.device,
        amp: bool,
        progress: Callable[[Progress], None],
        replay: bool,
    ) -> None:
        self.run, self.index, self.stage, self.progress = run, index, run.recipe.stages[index], progress
        _ = run.log  # a damaged one is refused before an epoch is trained for it
        self.train, self.val, self.device, self.amp = train, val, device, amp
        self.per_epoch = train.steps(self.stage.batch)
        self.total = max(1, round(self.stage.epochs * self.per_epoch))
        self.step, self.seconds = 0, 0.0
        self.best_accuracy, self.best = -1.0, dict[str, Tensor]()
        self.losses: list[Tensor] = []  # of the epoch so far; on the device, so that no step waits for the last
        state = self._saved_state()
        net = self._start(fresh=state is None)
        self.net = net.to(device)
        self.sizes = _sizes(run.recipe, self.stage, self.net, len(train.classes), warn=state is None)
        if run.recipe.whiten:
            images = calibration_images(run.recipe, train)
            given = () if self.stage.steps is None else (1,)  # step; pixels are the same at each
            whiten_(self.net, images, *given, fresh=index == 0 and ":" not in run.recipe.net)
        if self.stage.weight_bits is not None:
            if self.stage.steps == 1 and isinstance(self.net, Spiking):
                refuse_hooks(self.net)  # as the end of the stage would
            round_weights_(self.net, self.stage.weight_bits)
        self.trained = recomputing(self.net) if self.stage.recompute and isinstance(self.net, Spiking) else self.net
        self.teacher = run.net(0).requires_grad_(False).to(device) if self.stage.distillation else None
        self.optimizer = _optimizer(self.net, self.stage, device)
        if state is not None:
            self._restore(*state)
        # to recompute, the state of random numbers is read between kernels
        recorded = replay and device.type == "cuda" and not self.stage.recompute
        self.replayed = Replayed(self._compute) if recorded else None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        forget_peak()

    def _start(self, *, fresh: bool) -> nn.Module:
        """The network as the stage begins: weights from the seed, or those of the stage above; thresholds are
        calibrated once, for the first spiking stage."""
        if self.index == 0:
            if self.stage.epochs == 0:
                raise ValueError(
                    f"{self.run.path} has no CNN and the recipe does not train one: unitstep convert puts it there"
                )
            cnn = build_cnn(self.run.recipe, len(self.train.classes))
            if ":" in self.run.recipe.net:
                _check_output(self.run.recipe, cnn, self.train.classes)
            if len(self.run.recipe.stages) > 1:
                build_snn(self.run.recipe, cnn)  # a network that does not convert is not trained first
            return cnn
        above = self.run.net(self.index - 1)
        recipe = self.run.recipe
        if self.index > 1:
            if fresh:
                self._warn_of_silence(above)
            return above
        snn = build_snn(recipe, above)
        if fresh:
            images = calibration_images(recipe, self.train)
            steps, options = self.stage.steps or 1, finding(recipe)
            calibrate_(snn.to(self.device), images, steps=steps, refresh_norms=True, **options)
        return snn

    def _warn_of_silence(self, snn: nn.Module) -> None:
        """Say so if spikes vanish on the way from the stage above to this number of timesteps: without them nothing
        learns."""
        assert isinstance(snn, Spiking)
        images = calibration_images(self.run.recipe, self.train)[:64]
        with torch.no_grad(), record(snn.to(self.device)) as seen:
            forward(snn.eval(), images, self.stage.steps)
        silent = [name for name, layer in seen.items() if not layer.spikes.any()]
        if silent:
            warnings.warn(
                f"stage {self.stage.name} starts with layers that never fire ({', '.join(silent)}), so that it can "
                "hardly learn: put a rung between it and the one above, or go straight to it from the CNN, which finds "
                "thresholds for it",
                stacklevel=2,
            )

    def climb(self, stop: Callable[[], bool]) -> bool:
        """Train until the stage is finished and its file is written, or until `stop()`: then the state is saved and
        False returned."""
        recipe = self.run.recipe
        checkpoint = time.monotonic()
        self.since = self.step, checkpoint  # when this epoch, or what is left of it, began
        with torch.random.fork_rng(_gpus(self.device)):
            while self.step < self.total:
                epoch, position = divmod(self.step, self.per_epoch)
                order = mix(recipe.seed, self.index, epoch)
                batches = self.train.batches(
                    self.stage.batch, seed=order, start=position, augment=recipe.augment, padding=recipe.padding,
                    border=recipe.border, cutout=recipe.cutout,
                )  # fmt: skip
                clock = time.monotonic()
                for images, labels in batches:
                    self._optimise(images, labels)
                    if self.step % self.per_epoch == 0 or self.step == self.total:
                        self._end_epoch(epoch + 1, clock)
                    now = time.monotonic()
                    self.seconds, clock = self.seconds + now - clock, now
                    self._tell()
                    if self.step == self.total:
                        break
                    if (stopping := stop()) or now - checkpoint > CHECKPOINT_SECONDS:
                        self._save_state()
                        checkpoint = clock = time.monotonic()
                    if stopping:
                        return False
        if self.stage.weight_bits is not None and self.stage.steps == 1:
            snn = rebuild(recipe, len(self.train.classes), self.best, spikes=True)
            centre_thresholds_(snn, torch.zeros(1, *self.train.shape, dtype=torch.uint8))  # type: ignore[arg-type]
            self.best = snn.state_dict()
        self.run.save(
            self.run.stage_path(self.index), self.best, self.index, val_accuracy=self.best_accuracy,
            seconds=round(self.seconds, 3), classes=self.train.classes, images=len(self.train),
        )  # fmt: skip
        self.run.state_path.unlink(missing_ok=True)
        self._tell(done=True)
        return True

    def _optimise(self, images: Tensor, labels: Tensor) -> None:
        """One optimiser step on images uint8 [B, C, H, W] and labels [B]."""
        _seed(mix(self.run.recipe.seed, self.index, self.step, 0), self.device)  # dropout
        for group in self.optimizer.param_groups:
            lr = group["times"] * learning_rate(self.stage, self.step, self.total)
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(lr)
            else:
                group["lr"] = lr
        before, now = (training_size(self.sizes, step, self.total) for step in (self.step - 1, self.step))
        if self.replayed and now != before:  # another computation
            self.replayed = Replayed(self._compute)
        loss = self.replayed(images, labels) if self.replayed else self._compute(images, labels)
        self.losses.append(loss)
        self.step += 1
        if self.device.type == "cpu" and not loss.isfinite():
            self._check_finite()

    def _compute(self, images: Tensor, labels: Tensor) -> Tensor:
        """What an optimiser step computes, from images and labels to new weights; returns the loss."""
        self.net.train()
        self.optimizer.zero_grad(set_to_none=True)
        total = torch.zeros((), device=self.device)
        parts = min(self.stage.accumulate, len(images))
        size = training_size(self.sizes, self.step, self.total)
        for part, target in zip(images.chunk(parts), labels.chunk(parts), strict=True):
            wanted = None
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
                if self.teacher is not None:
                    wanted = forward(self.teacher, part, None).float()
                with counted(self.net, self.stage.spike_penalty > 0) as spikes:
                    logits = forward(self.trained, shrunk(part, size), self.stage.steps)
            loss = loss_of(logits.float(), target, self.stage, wanted)
            if spikes:
                loss = loss + self.stage.spike_penalty * spikes_per_neuron(spikes, len(part))
            loss = loss * (len(part) / len(images))
            loss.backward()
            total += loss.detach()
        self.optimizer.step()
        clamp_(self.net)
        return total

    def _check_finite(self) -> None:
        """FloatingPointError, naming the first bad step, if a loss of this epoch or a weight is not finite. Checked
        before anything is written, so the files are from before it."""
        bad = [not math.isfinite(loss) for loss in torch.stack(self.losses).tolist()] if self.losses else []
        weights = all(parameter.isfinite().all() for parameter in self.net.parameters())
        if any(bad) or not weights:
            step = self.step - len(bad) + bad.index(True) + 1 if any(bad) else self.step
            raise FloatingPointError(
                f"{'the loss is' if any(bad) else 'weights are'} not finite in stage {self.stage.name} at step {step} "
                f"of {self.total}; the files in {self.run.path} are from before it. In a new folder, a lower learning "
                f"rate of this stage helps most often (--stages.N.lr, now {self.stage.lr})"
            )

    def _end_epoch(self, epoch: int, clock: float) -> None:
        """Validate if it is time for it, and keep the weights then if they are the best so far (on a tie the later
        ones) or the last count; log. clock: when the epoch's last step began."""
        self._check_finite()  # waits for the device
        trained = time.monotonic()
        images = (self.step - self.since[0]) * min(self.stage.batch, len(self.train))
        loss = torch.stack(self.losses).mean().item()
        self.losses = []
        val: float | None = None
        if epoch % self.stage.validate_every == 0 or self.step == self.total:
            val = accuracy(self.net, self.val, self.stage.steps, self.device)
        validated = time.monotonic()
        if val is not None and (val >= self.best_accuracy or self.stage.keep == "last"):
            self.best_accuracy = val
            self.best = {name: tensor.detach().cpu().clone() for name, tensor in plain_state(self.net).items()}
        row = {
            "stage": self.index,
            "name": self.stage.name,
            "epoch": epoch,
            "step": self.step,
            "loss": round(loss, 5),
            "val_accuracy": val,
            "lr": float(self.optimizer.param_groups[0]["lr"]),
            "size": training_size(self.sizes, (epoch - 1) * self.per_epoch, self.total),  # of the epoch's first images
            "seconds": round(self.seconds + validated - clock, 1),
            "images_per_second": round(images / (trained - self.since[1]), 1),  # without validation
            "val_seconds": round(validated - trained, 3),
            # bytes of the stage so far, at their peak: on a GPU what torch had allocated there, else of this process
            "memory": torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else peak(),
        }
        if isinstance(self.net, Spiking):
            row["thresholds"] = [round(lif.threshold.mean().item(), 5) for lif in self.net.lifs.values()]
            row["leaks"] = [round(lif.leak.item(), 5) for lif in self.net.lifs.values()]
        self.run.write_log(row)
        self.since = self.step, time.monotonic()

    def _tell(self, *, done: bool = False) -> None:
        loss = self.losses[-1].item() if self.losses and (self.device.type == "cpu" or self.step % 50 == 0) else None
        best = self.best_accuracy if self.best else None
        self.progress(Progress(self.index, self.stage, self.step, self.total, loss, best, self.seconds, done))

    def _save_state(self) -> None:
        """Everything that the next step depends on, in one file: weights, optimiser, position, weights to be kept."""
        self._check_finite()
        tensors = {f"model.{name}": tensor for name, tensor in self.net.state_dict().items()}
        tensors |= {f"best.{name}": tensor for name, tensor in self.best.items()}
        for number, values in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{key}": value for key, value in values.items() if value is not None}
        info = {
            "step": self.step,
            "seconds": self.seconds,
            "best_accuracy": self.best_accuracy,
            "losses": [loss.item() for loss in self.losses],
            "classes": self.train.classes,
            "images": len(self.train),
        }
        self.run.save(self.run.state_path, tensors, self.index, **info)

    def _saved_state(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        index = self.run.state_index()
        if index is None or index < self.index:  # of a stage that was finished just before a crash
            return None
        return self.run.load(self.run.state_path, self.index)

    def _restore(self, tensors: dict[str, Tensor], info: dict[str, Any]) -> None:
        self.net.load_state_dict(_under("model.", tensors))
        self.best = _under("best.", tensors)
        self.step, self.seconds, self.best_accuracy = info["step"], info["seconds"], info["best_accuracy"]
        self.losses = [torch.tensor(loss, device=self.device) for loss in info["losses"]]
        state: dict[int, dict[str, Tensor]] = {}
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        for name, tensor in _under("optimizer.", tensors).items():
            number, key = name.split(".")
            like = parameters[int(number)]
            value = torch.empty_like(like).copy_(tensor) if tensor.shape == like.shape and key != "step" else tensor
            state.setdefault(int(number), {})[key] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def loss_of(logits: Tensor, labels: Tensor, stage: Stage, wanted: Tensor | None) -> Tensor:
    """Mean loss of logits [B, K] at labels [B]; wanted: the CNN's logits, where the stage has distillation d::

        (1 − d)·cross-entropy(labels, with smoothing) + d·τ²·KL(softmax(wanted/τ) ‖ softmax(logits/τ)),  τ = 2

    Source: Hinton et al., arXiv 1503.02531.
    """
    loss = F.cross_entropy(logits, labels, label_smoothing=stage.label_smoothing)
    if wanted is None:
        return loss
    ours, theirs = (F.log_softmax(x / TEMPERATURE, 1) for x in (logits, wanted))
    apart = TEMPERATURE**2 * F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
    return (1 - stage.distillation) * loss + stage.distillation * apart


@contextlib.contextmanager
def counted(net: nn.Module, enabled: bool) -> Iterator[list[Tensor]]:
    """The spikes of all neurons of `net` that are called within, one tensor [T·B, …] of 0 and 1 per layer, with their
    surrogate gradients."""
    spikes: list[Tensor] = []

    def note(_name: str, lif: LIF, _args: Any, _kwargs: Any, out: Tensor) -> None:
        V = per_channel(lif.threshold, out.dim())
        spikes.append(out / V if lif.height == "threshold" else out)

    with watching(net.lifs if enabled and isinstance(net, Spiking) else {}, note):
        yield spikes


def spikes_per_neuron(spikes: list[Tensor], images: int) -> Tensor:
    """Σ spikes / (neurons · images), over all layers and timesteps; of what `counted` gave for so many images."""
    neurons = sum(layer[0].numel() for layer in spikes)
    return torch.stack([layer.sum(dtype=torch.float32) for layer in spikes]).sum() / (neurons * images)


def learning_rate(stage: Stage, step: int, total: int) -> float:
    """The rate of optimiser step `step` (from 0) of `total`: a linear rise over `warmup`, then a division at each
    milestone, or a linear fall to 0."""
    done = step / total
    if done < stage.warmup:
        return stage.lr * (step + 1) / math.ceil(stage.warmup * total)
    if stage.milestones:
        return stage.lr / stage.factor ** sum(done >= milestone for milestone in stage.milestones)
    return stage.lr * (1 - done) / (1 - stage.warmup)


def training_size(sizes: tuple[int, ...], step: int, total: int) -> int:
    """Side of the images at optimiser step `step` (from 0) of `total`: each of `sizes` for an equal part."""
    return sizes[((step + 1) * len(sizes) - 1) // total]


def _optimizer(net: nn.Module, stage: Stage, device: torch.device) -> torch.optim.Optimizer:
    """Weight decay acts on matrices and kernels alone: thresholds, leaks, biases and batch norms are scales, not
    weights. One kernel updates all (`fused`); on a GPU the learning rate is there, too."""
    gpu = device.type == "cuda"
    normed = _before_norms(net) if stage.optimizer == "muon" else []
    taken = {*map(id, normed)}
    parameters = [p for p in net.parameters() if id(p) not in taken]
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": stage.weight_decay, "times": 1.0},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0, "times": stage.vector_lr},
        {"params": normed, "orthogonal": True, "times": ORTHOGONAL},
    ]
    for group in groups:
        group["lr"] = torch.tensor(stage.lr, device=device) if gpu else stage.lr
    groups = [group for group in groups if group["params"]]
    if stage.optimizer in ("sgd", "nesterov"):
        return torch.optim.SGD(groups, momentum=0.9, nesterov=stage.optimizer == "nesterov", fused=True)
    if stage.optimizer == "adam-amsgrad":
        return torch.optim.Adam(groups, amsgrad=True, fused=True, capturable=gpu)
    kind = Muon if stage.optimizer == "muon" else torch.optim.AdamW
    return kind(groups, fused=True, capturable=gpu)


def _before_norms(net: nn.Module) -> list[nn.Parameter]:
    """The kernels of `net`, a `Spiking`, whose outputs go to a batch norm and nowhere else, so that their lengths mean
    nothing; as they are trained, which may be in other coordinates."""
    assert isinstance(net, Spiking)
    uses = Counter(id(parameter) for _, parameter in net.named_parameters(remove_duplicate=False))
    found = []
    for node in net.graph.nodes:
        layer = module_of(net, node)
        to_norms = (isinstance(module_of(net, user), BATCH_NORMS) for user in node.users)
        if isinstance(layer, nn.Conv2d | nn.Conv1d) and layer.groups == 1 and called_once(net, node) and all(to_norms):
            kernel: Any = layer.parametrizations.weight.original if is_parametrized(layer) else layer.weight  # type: ignore[union-attr]
            found += [kernel] if uses[id(kernel)] == 1 else []
    return found


def _pays(choice: str, net: nn.Module, stage: Stage, train: Split, device: torch.device) -> bool:
    """Whether the stage's neurons are worth compiling."""
    if choice == "off" or not isinstance(net, Spiking) or stage.steps is None:
        return False
    with torch.no_grad(), record(net) as seen:
        net.eval()(torch.zeros(1, *train.shape, dtype=torch.uint8, device=device), 1)
    neurons = sum(layer.spikes.numel() for layer in seen.values())
    pays = neurons * stage.steps * stage.epochs * len(train) > COMPILE_FROM
    if pays and not compiler_available(device):
        warnings.warn(
            "there is no C++ compiler here (g++), no Python.h (Debian: python3-dev), or no Triton for the GPU: neurons "
            "are not fused by torch.compile, which gives the same results and takes longer, the more so the more "
            "timesteps",
            stacklevel=2,
        )
        return False
    return pays


def _gpus(device: torch.device) -> list[torch.device]:
    """Whose random numbers `_seed` changes beside the processor's."""
    return [device] if device.type == "cuda" else []


def _seed(seed: int, device: torch.device) -> None:
    """Seed the processor's random numbers and those of `device`. (torch.manual_seed would seed all GPUs.)"""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


def _precision(name: str, device: torch.device) -> bool:
    """Whether to train in bf16. auto: on GPUs that have it, and on processors that have it where a trial is 1.3 times
    as fast in it."""
    if name not in ("auto", "fp32", "bf16"):
        raise ValueError(f"precision must be auto, fp32 or bf16, not {name!r}")
    able = torch.cpu.get_capabilities()
    if name == "fp32" or (
        name == "auto" and device.type == "cpu" and not (able.get("amx_bf16") or able.get("avx512_bf16"))
    ):
        return False
    if device.type == "cuda":
        return name == "bf16" or torch.cuda.is_bf16_supported(including_emulation=False)
    faster = _bf16_speed()
    if name == "bf16" and faster is None:
        raise ValueError(
            "bf16 matrix products crash on this processor, as they do where a virtual machine announces AMX but hides "
            "its tile sizes (CPUID leaf 0x1D): set the environment variable ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16, or "
            "begin a run with --precision fp32"
        )
    return name == "bf16" or (faster is not None and faster > BF16_FROM)


_TRIAL = """
import time
import torch
from torch.nn.functional import conv2d

def seconds(dtype):
    x = torch.ones(32, 64, 16, 16, dtype=dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    w = torch.ones(64, 64, 3, 3, dtype=dtype, requires_grad=True)
    started = time.perf_counter()
    conv2d(x, w, padding=1).sum().backward()
    return time.perf_counter() - started

torch.ones(64, 64, dtype=torch.bfloat16) @ torch.ones(64, 64, dtype=torch.bfloat16)
pairs = [(seconds(torch.float32), seconds(torch.bfloat16)) for _ in range(5)]
print(min(fp32 for fp32, _ in pairs) / min(bf16 for _, bf16 in pairs))
"""


def _bf16_speed() -> float | None:
    """How many times faster than in fp32 a convolution, forward and backward, is in bf16; None if bf16 crashes, 0 if it
    cannot be tried. In another process, since an illegal instruction would end this one; -P: without modules of the
    current folder."""
    tried = subprocess.run([sys.executable, "-P", "-c", _TRIAL], capture_output=True, text=True)
    if tried.returncode > 0:
        reason = (tried.stderr.strip().splitlines() or ["no reason given"])[-1]
        warnings.warn(f"whether bf16 is faster here could not be tried ({reason})", stacklevel=2)
        return 0.0
    return float(tried.stdout.split()[-1]) if tried.returncode == 0 else None  # libraries may print before it
