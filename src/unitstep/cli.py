"""The command line: one verb for each thing a user does. Everything it does, the Python API does without it; only this
module prints.

Exit codes: 0 done, 1 an error (told in one sentence), 2 wrong usage, 3 stopped at the time limit and 130 by SIGINT:
the same command goes on.
"""

import io
import os
import shlex
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from unitstep.recipes import OWN, RECIPES, RUN_TO_THE_END, Recipe, recipe

if TYPE_CHECKING:
    from rich.console import Console

    from unitstep.ladder import Progress
    from unitstep.tables import Table

USAGE = """\
usage: unitstep VERB …      (unitstep VERB --help tells more)

  recipes                       list the experiments that come with unitstep
  train RECIPE --out RUN        train a CNN and take it down the ladder to one timestep, or go on with a stopped run
  convert MODULE:FUNCTION …     make your own trained CNN the start of a run, and say what becomes of each layer
  train --from RUN              go on with a run: the spiking stages of your own CNN, or a stopped run
  pack IMAGES --out FOLDER      decode a data set once, into a few tensor files that train and measure take as --data
  measure RUN                   evaluate every stage of a run once on the test images: accuracy, spikes, energy, speed
  report RUN … --out PAGE       one HTML page about runs that have been measured
  export RUN --out FILE.onnx    write a run's network for ordinary runtimes, and prove that it is the same network
  predict IMAGES                say what an exported network, or the shipped one, sees in image files
  bench deploy                  time a one-timestep network in ordinary runtimes against CNNs and other libraries
  bench train                   time training at T timesteps, and its memory, against CNNs and other libraries
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code."""
    verb, *rest = [*(sys.argv[1:] if arguments is None else arguments)] or ["--help"]
    plain: dict[str, Callable[..., int]] = {
        "recipes": recipes, "pack": pack, "measure": measure, "report": report, "export": export, "predict": predict,
    }  # fmt: skip
    verbs: Mapping[str, Callable[[list[str]], int]] = {
        "train": _train, "convert": _convert, "bench": _bench, "-h": _usage, "--help": _usage, "--version": _version,
    } | {name: partial(_call, f"unitstep {name}", function) for name, function in plain.items()}  # fmt: skip
    if verb not in verbs:
        sys.stderr.write(f"unitstep: no verb {verb!r}\n\n{USAGE}")
        return 2
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)  # where a user's own network may be imported from
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files, and arrows, that its encoding has not
    try:
        with _plain_warnings():
            code = verbs[verb](rest)
            sys.stdout.flush()
            return code
    except BrokenPipeError:  # who read the output wants no more of it; nor should Python flush the rest at its end
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, FloatingPointError, OSError) as error:
        sys.stderr.write(f"unitstep: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("unitstep: interrupted\n")
        return 130


def _call(name: str, verb: Callable[..., int], arguments: list[str]) -> int:
    """Call `verb` with what the arguments say; its signature and docstring are the command's options and help."""
    import tyro

    return tyro.cli(verb, prog=name, args=arguments)


def _usage(arguments: list[str]) -> int:
    sys.stdout.write(USAGE)
    return 0


def _version(arguments: list[str]) -> int:
    from importlib.metadata import version

    sys.stdout.write(f"unitstep {version('unitstep')}\n")
    return 0


@contextmanager
def _plain_warnings() -> Iterator[None]:
    """A warning is for the user: one line, without the place in our source."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: _say(f"unitstep: warning: {message}")
        yield


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


def _console() -> "Console":
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def _use(threads: int | None) -> None:
    """Let torch compute on that many CPU threads; None leaves it as it is."""
    if threads is None:
        return
    if threads < 1:
        raise ValueError(f"--threads must be 1 or more, not {threads}")
    import torch

    torch.set_num_threads(threads)


def recipes() -> int:
    """List the recipes that come with unitstep."""
    from rich.table import Column, Table

    table = Table(
        Column("recipe", no_wrap=True), "network", "ladder", "epochs", "norm", "run", box=None, pad_edge=False
    )
    for name, shipped in RECIPES.items():
        ladder = "→".join(stage.name.removeprefix("t") for stage in shipped.stages)
        epochs = " ".join(f"{stage.epochs:g}" for stage in shipped.stages)
        table.add_row(name, shipped.net, ladder, epochs, shipped.norm, "yes" if name in RUN_TO_THE_END else "not run")
    _console().print(table)
    return 0


def _train(arguments: list[str]) -> int:
    import tyro

    known = f"RECIPE is one of: {', '.join(RECIPES)}"
    usage = f"usage: unitstep train RECIPE --out RUN …, or: unitstep train --from RUN\n{known}"
    if arguments and arguments[0] in ("-h", "--help"):
        sys.stdout.write(f"{known}.\nThe defaults below are those of fashion-mini.\n\n")
        arguments = ["fashion-mini", "--help"]
    name, *options = arguments or [""]
    if name == "--from" and options:
        from unitstep.runs import Run

        path, *options = options
        if any(option.split("=")[0] == "--out" for option in options):
            raise ValueError(
                "train --from goes on in RUN itself: leave out --out; another ladder from its CNN is made by unitstep "
                f"train RECIPE --out NEW --cnn {path}, or from your own by unitstep convert again"
            )
        name, shipped, options = f"--from {path}", Run(path).recipe, [*options, "--out", path]
    elif not name or name.startswith("-"):
        _say(usage)
        return 2
    else:
        shipped = recipe(name)

    def train(
        out: Path,
        recipe: Annotated[Recipe, tyro.conf.arg(name="")] = shipped,
        cnn: Path | None = None,
        device: Literal["auto", "cpu", "cuda"] = "auto",
        precision: Literal["auto", "fp32", "bf16"] = "auto",
        compile: Literal["auto", "off"] = "auto",
        time_limit: float | None = None,
        max_loss: float | None = None,
        bad_images: Literal["refuse", "skip"] = "refuse",
        threads: int | None = None,
    ) -> int:
        """Train a CNN and take it down the ladder to one timestep. The same command goes on with a stopped run.

        Args:
            out: Folder of the run; made if it is not there.
            recipe: The experiment.
            cnn: A run whose trained CNN is taken over; None: it is trained.
            device: Where to train; auto takes a GPU if there is one.
            precision: bf16 is mixed precision; auto uses it where the hardware is faster in it.
            compile: Fuse the neurons by torch.compile; auto does so where a compiler is there and the stage is long
                enough to gain. On a GPU, off also launches every kernel of a step by itself, in place of all at once.
            time_limit: Minutes after which training stops; the same command goes on.
            max_loss: Percentage points of validation accuracy: the ladder ends at the first T that loses more than
                that against the CNN.
            bad_images: What to do with images that cannot be read.
            threads: CPU threads to use; None: all cores.
        """
        from unitstep import ladder

        _use(threads)
        again = shlex.join(["unitstep", "train", *arguments])
        try:
            with _bars() as bars:
                run = ladder.train(
                    recipe, out, cnn=cnn, device=device, precision=precision, compile=compile, time_limit=time_limit,
                    max_loss=max_loss, bad_images=bad_images, progress=bars.training,
                )  # fmt: skip
        except KeyboardInterrupt:
            _say(f"interrupted; to go on: {again}")
            return 130
        stages = run.stages
        unfinished = len(run.recipe.stages) - len(stages)
        lost = [(stage.stage.name, stages[0].val_accuracy - stage.val_accuracy) for stage in stages]
        ends = [(name, loss) for name, loss in lost if max_loss is not None and loss > max_loss]
        if unfinished and ends:
            _say(f"the ladder ends at {ends[0][0]}, which loses {ends[0][1]:.2f} points against the CNN")
        elif unfinished:
            _say(f"stopped at the time limit; to go on: {again}")
            return 3
        there = "" if recipe.data == run.recipe.data else f" --data {shlex.quote(recipe.data)}"
        _say(
            f"{run.path} is done; its accuracy on the test images: unitstep measure {shlex.quote(str(run.path))}{there}"
        )
        return 0

    return _call(f"unitstep train {name}", train, options)


def _convert(arguments: list[str]) -> int:
    import tyro

    if not arguments or ":" not in arguments[0]:
        if not arguments or arguments[0] not in ("-h", "--help"):
            _say("usage: unitstep convert MODULE:FUNCTION --weights FILE.safetensors --data IMAGES --out RUN …")
            return 2
        arguments = ["package.module:function", "--help"]
    net, *options = arguments
    own = replace(OWN, net=net)

    def convert(
        out: Path,
        recipe: Annotated[Recipe, tyro.conf.arg(name="")] = own,
        weights: Path | None = None,
        device: Literal["auto", "cpu", "cuda"] = "auto",
        precision: Literal["auto", "fp32", "bf16"] = "auto",
        bad_images: Literal["refuse", "skip"] = "refuse",
        threads: int | None = None,
    ) -> int:
        """Make your own trained CNN the first stage of a run, convert it, and print what became of each operation.

        FUNCTION of MODULE is called without arguments and returns the CNN. Its input is (pixel − zero)·scale, set by
        --pixel-zero and --pixel-scale for pixels from 0 to 255 (default: pixel / 255). The run's spiking stages are
        then trained by unitstep train --from RUN.

        Args:
            out: Folder of the run; made if it is not there.
            recipe: The experiment; its CNN is not trained.
            weights: Safetensors file with the CNN's state dict; None: FUNCTION gives it its weights.
            device: Where to compute; auto takes a GPU if there is one.
            precision: Of the training to come: bf16 is mixed precision; auto uses it where the hardware is
                faster in it.
            bad_images: What to do with images that cannot be read.
            threads: CPU threads to use; None: all cores.
        """
        import torch

        from unitstep import ladder
        from unitstep.calibration import record
        from unitstep.conversion import ConversionError
        from unitstep.drawing import draw_currents

        _use(threads)
        try:
            made = ladder.convert(
                recipe, out, weights=weights, device=device, precision=precision, bad_images=bad_images
            )
        except ConversionError as error:
            sys.stdout.write(f"{error.report}\n")
            raise
        steps = made.run.recipe.stages[1].steps or 1
        picture = made.run.path / "currents.png"
        with record(made.snn) as spikes, torch.no_grad():
            made.snn.eval()(made.images[:64], steps)
        draw_currents(spikes, picture)
        sys.stdout.write(
            f"{made.snn.report}\n"
            f"validation: CNN {made.cnn_accuracy:.2f} %, by conversion alone at T = {steps} {made.accuracy:.2f} %\n"
            f"input currents against thresholds: {picture}\n"
        )
        _say(f"to train its spiking stages: unitstep train --from {shlex.quote(str(made.run.path))}")
        return 0

    return _call(f"unitstep convert {net}", convert, options)


def pack(
    source: str,
    /,
    out: Path,
    size: int = 32,
    channels: Literal[3, 1] = 3,
    bad_images: Literal["refuse", "skip"] = "refuse",
) -> int:
    """Decode a data set once and write it as tensor files of at most 60 MB. The folder serves as --data on machines
    without the original, as long as size and channels are the recipe's.

    Args:
        source: A folder of class folders or of parquet files, or a Hugging Face hub name.
        out: Folder for the files; must be empty or absent.
        size: Height and width, in pixels.
        channels: 3 for colour, 1 for grey.
        bad_images: What to do with images that cannot be read.
    """
    from unitstep import data

    for path in data.pack(source, out, size=size, channels=channels, bad_images=bad_images):
        sys.stdout.write(f"{path}  {path.stat().st_size / 1e6:.1f} MB\n")
    return 0


def measure(
    run: Path,
    /,
    data: str | None = None,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    bad_images: Literal["refuse", "skip"] = "refuse",
    pj: tuple[float, float] | None = None,
    speed: bool = True,
    curve: bool = False,
    threads: int | None = None,
) -> int:
    """Evaluate every finished stage of a run once on the test images; writes measure.json and prints accuracies,
    spikes, operations, and energy by several models.

    Args:
        run: Folder of the run.
        data: Where the images are, if no longer where the run's recipe says.
        device: Where to evaluate; auto takes a GPU if there is one.
        bad_images: What to do with images that cannot be read.
        pj: A further energy model, of your own figures: picojoules of a multiply-accumulate and of an accumulation.
        speed: Time the networks, too, in PyTorch and in the runtimes that are installed; nothing else should run.
        curve: Find how many timesteps the CNN needs by conversion alone, by each threshold strategy and with a
            rate code, for what the last network reaches; on validation images, in up to a quarter of an hour.
        threads: CPU threads to use; None: all cores.
    """
    from unitstep import energy, measurement
    from unitstep.groups import read_groups
    from unitstep.tables import equal_table, ratio_table, speed_table, stage_table

    models = energy.MODELS | ({"own": energy.own(*pj)} if pj else {})

    _use(threads)
    with _bars() as bars:
        measurement.measure_run(
            run, data=data, device=device, bad_images=bad_images, speed=speed, curve=curve,
            progress=bars.update,
        )  # fmt: skip
    (group,) = read_groups([run])
    for table in (stage_table(group), ratio_table(group, models), speed_table(group), equal_table(group)):
        _show(table)
    return 0


def report(
    runs: tuple[Path, ...],
    /,
    out: Path,
    format: Literal["html", "md"] | None = None,
    pj: tuple[float, float] | None = None,
) -> int:
    """Write one page about runs that have been measured: a file that works offline. Nothing is run again.

    Args:
        runs: Folders of runs, of the same images. Runs of one recipe with other seeds are shown as mean and spread.
        out: The file, overwritten if it is there.
        format: html, or md for the tables as Markdown; None: md if the file's name ends so, else html.
        pj: A further energy model, of your own figures: picojoules of a multiply-accumulate and of an accumulation.
    """
    from unitstep import reporting

    _say(f"{reporting.report(runs, out, format=format, pj=pj)} is written")
    return 0


def export(
    run: Path,
    /,
    out: Path,
    to: Literal["onnx", "nir"] = "onnx",
    form: Literal["auto", "int8", "float"] = "auto",
    steps: int = 1,
    images: int = 1000,
    pools: Literal["mean", "sum"] = "mean",
    data: str | None = None,
    bad_images: Literal["refuse", "skip"] = "refuse",
    threads: int | None = None,
) -> int:
    """Write the network of one stage of a run as an ONNX file, run that file on validation images, and print how it
    differs from the network. A file that is not the network is not written. Or write it as a NIR graph, for
    neuromorphic software and chips.

    Args:
        run: Folder of the run.
        out: The file, overwritten if it is there.
        to: onnx for ordinary runtimes; nir for one timestep on neuromorphic ones.
        form: Of an ONNX file: int8 is integer arithmetic from the pixels to the last spikes, for one timestep;
            float is for any number of timesteps; auto is int8 for one timestep.
        steps: Timesteps of the stage.
        images: Validation images on which the file and the network are compared.
        pools: Average pools in a NIR graph: mean as snnTorch and SpikingJelly read them, sum as Norse and sinabs
            do.
        data: Where the images are, if no longer where the run's recipe says.
        bad_images: What to do with images that cannot be read.
        threads: CPU threads to use; None: all cores.
    """
    from unitstep.data import load_train
    from unitstep.exporting import describe, to_onnx
    from unitstep.runs import Run, load
    from unitstep.tables import Table

    _use(threads)
    if images < 1:
        raise ValueError(f"--images must be 1 or more, not {images}")
    trained = Run(run)
    snn, r = load(trained, steps), trained.recipe
    _, val = load_train(data or r.data, size=r.size, channels=r.channels, augment=r.augment, bad_images=bad_images)
    trained.check_images(val.classes)
    shown, labels = next(val.batches(images))
    if to == "nir":
        if form != "auto":
            raise ValueError(f"--form {form} is of ONNX files: leave it out with --to nir")
        from unitstep.neuromorphic import to_nir

        graph = to_nir(snn, out, shown, steps=steps, pools=pools)
        kinds = Counter(type(node).__name__ for node in graph.nodes.values())
        sys.stdout.write(f"{out}: {', '.join(f'{count} {kind}' for kind, count in kinds.items())}\n")
        return 0
    chosen = None if form == "auto" else form
    parity = to_onnx(snn, out, shown, labels, steps=steps, form=chosen, about=describe(r, val))
    rows = [
        (layer.name, str(layer.neurons), f"{layer.differ} of {layer.neurons * parity.images * parity.steps}")
        for layer in parity.layers
    ]
    _show(Table("Compared", ("layer", "neurons", "spikes that differ"), rows))
    against = " with its weights rounded to 8 bits" if parity.form == "int8" else ""
    sys.stdout.write(
        f"{parity.images} validation images in ONNX Runtime. Spikes and logits are compared with the network"
        f"{against}; largest difference of a logit {parity.logits:.2g}\n"
        f"accuracy: the network {parity.accuracy:.2f} %, the file {parity.file_accuracy:.2f} %; "
        f"other predictions: {parity.changed}\n"
    )
    for name, why in parity.in_float.items():
        sys.stdout.write(f"{name} stays in floating point: {why}\n")
    lost = (parity.accuracy or 0) - (parity.file_accuracy or 0)
    if parity.form == "int8" and lost > 0.3:
        option = "--thresholds percentile " if r.heights_per_channel else ""
        option += "--stages.N.weight_bits 8, N being its last stage"
        _say(
            f"8-bit weights cost {lost:.2f} points here: take --form float, or train a new run with them: the same "
            f"command as for {run}, another --out, and {option}"
        )
    if r.stages[-1].weight_bits is not None and parity.rounded:
        _say(
            f"{', '.join(parity.rounded)}: rounded once more, since factors of single inputs are in these weights, "
            "so that the file is near to the trained network and not the same"
        )
    _say(f"{out}: {parity.form}, {out.stat().st_size / 1e6:.2f} MB")
    return 0


def predict(
    images: tuple[Path, ...],
    /,
    model: Path | None = None,
    runtime: Literal["onnxruntime", "openvino"] = "onnxruntime",
    top: int = 3,
    json: bool = False,
    threads: int | None = None,
) -> int:
    """Say what an exported network sees in image files: classes and their probabilities.

    Args:
        images: Image files, and folders of them.
        model: File that unitstep export wrote; None: the CIFAR-10 network that comes with the package.
        runtime: What runs it.
        top: How many classes to show.
        json: Print one JSON object per image instead of a table.
        threads: CPU threads to use; None: the runtime's own choice.
    """
    from json import dumps

    from rich.console import Console
    from rich.progress import Progress

    from unitstep import predicting
    from unitstep.running import open_model

    if not images:
        raise ValueError("give image files or folders: unitstep predict photo.jpg")
    network = open_model(model or predicting.SHIPPED, runtime, threads=threads)
    if model is None:
        names = ", ".join(network.about["classes"])
        _say(f"unitstep: no --model is given, so the CIFAR-10 network of the package answers; it knows {names}")
    paths = predicting.images_in(images)
    width, failed = max(len(str(path)) for path in paths), 0
    found = predicting.predict(paths, network, top=top)
    shown = len(paths) > predicting.BATCH and sys.stderr.isatty()
    # lines that go to a file or a pipe while the bar shows must not be taken to its console, others must
    here = sys.stdout.isatty()
    with Progress(console=Console(stderr=not here), disable=not shown, redirect_stdout=here) as bar:
        for answer in bar.track(found, len(paths), description=""):
            if answer.error is not None:
                failed += 1
                _say(f"unitstep: {answer.path} was left out: {answer.error}")
            elif json:
                sys.stdout.write(dumps({"path": str(answer.path), "classes": dict(answer.classes)}) + "\n")
            else:
                likely = "  ".join(f"{name} {100 * share:.1f} %" for name, share in answer.classes)
                sys.stdout.write(f"{answer.path!s:{width}}  {likely}\n")
    return 1 if failed else 0


def _bench(arguments: list[str]) -> int:
    def deploy(out: Path | None = None) -> int:
        """Time the one-timestep network as it is exported against the CNN it came from and against other libraries, in
        one interleaved run of about ten minutes. Nothing else should run meanwhile.

        Args:
            out: JSON file for the record.
        """
        from unitstep import benching
        from unitstep.files import check_writable, write_json

        if out is not None:
            check_writable(out)
        record = benching.bench_deploy(progress=_say)
        sys.stdout.write(benching.table(record))
        if out is not None:
            write_json(out, record)
        return 0

    def train(
        out: Path | None = None,
        nets: tuple[str, ...] = ("vgg16-conv", "resnet20"),
        steps: tuple[int, ...] = (1, 3, 5),
        batch: int = 32,
        precisions: tuple[Literal["bf16", "fp32"], ...] = ("bf16", "fp32"),
        threads: tuple[int, ...] = (2, 1),
        rounds: int = 3,
    ) -> int:
        """Time training steps of spiking networks, and take their memory, against other libraries and against the CNN
        on T times as many images, interleaved: about half an hour. Nothing else should run meanwhile.

        Args:
            out: JSON file for the record; what is in it already is not run again.
            nets: Networks, by their names in recipes.
            steps: Timesteps T.
            batch: Images per step.
            precisions: bf16 is mixed precision.
            threads: CPU threads.
            rounds: Turns of each contender, of which the median is taken.
        """
        from unitstep import training_speed
        from unitstep.files import check_writable

        if out is not None:
            check_writable(out)
        record = training_speed.bench_train(
            names=nets, steps=steps, batch=batch, precisions=precisions, threads=threads, rounds=rounds, out=out,
            progress=_say,
        )  # fmt: skip
        sys.stdout.write(training_speed.table(record))
        return 0

    races: dict[str, Callable[..., int]] = {"deploy": deploy, "train": train}
    if not arguments or arguments[0] not in races:
        _say("usage: unitstep bench deploy|train [--out RECORD.json] …")
        return 0 if arguments and arguments[0] in ("-h", "--help") else 2
    return _call(f"unitstep bench {arguments[0]}", races[arguments[0]], arguments[1:])


def _show(table: "Table | None") -> None:
    """Print one of a report's tables."""
    if table is None or not table.rows:
        return
    from rich.table import Column
    from rich.table import Table as RichTable

    columns = [Column(table.columns[0], no_wrap=True), *(Column(name, justify="right") for name in table.columns[1:])]
    shown = RichTable(
        *columns, box=None, pad_edge=False, title=table.title, title_justify="left", title_style="bold",
        caption=table.note + "\n", caption_justify="left",
    )  # fmt: skip
    for row in table.rows:
        shown.add_row(*row)
    _console().print(shown)


class _bars:
    """Progress bars on a terminal; elsewhere one line when a stage is done."""

    def __init__(self) -> None:
        from rich import progress

        fields = (
            progress.TextColumn("{task.description:>4}"), progress.BarColumn(), progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[note]}"), progress.TimeElapsedColumn(), progress.TimeRemainingColumn(),
        )  # fmt: skip
        self.progress = progress.Progress(*fields, console=_console(), disable=not sys.stdout.isatty())
        self.tasks: dict[str, Any] = {}
        self.losses: dict[str, str] = {}

    def __enter__(self) -> "_bars":
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def update(self, name: str, done: int, total: int, note: str = "") -> None:
        if name not in self.tasks:
            self.tasks[name] = self.progress.add_task(name, total=total, note=note)
        self.progress.update(self.tasks[name], completed=done, note=note)

    def training(self, now: "Progress") -> None:
        best = "" if now.best is None else f"validation {now.best:.2f} %"
        if now.loss is not None:  # a GPU tells it now and then
            self.losses[now.stage.name] = f"loss {now.loss:.3f}"
        self.update(now.stage.name, now.step, now.total, f"{self.losses.get(now.stage.name, ''):10} {best}")
        if now.done and self.progress.disable:
            sys.stdout.write(f"{now.stage.name}: validation {now.best:.2f} %, {now.seconds:.0f} s\n")
