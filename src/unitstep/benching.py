"""How fast a one-timestep network runs, against the CNN that it came from and against other libraries: everything in
one interleaved run, since figures from different runs do not compare. Knows nothing of training or accuracy.

The network is VGG16's thirteen convolutions with batch norm and one linear layer, for 32×32 pixels, with random
weights: what it computes does not matter to the clock. All take raw uint8 images and return logits.
"""

import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime
import torch
from onnxruntime import quantization
from torch import Tensor, nn

from unitstep import nets
from unitstep.calibration import to_spiking
from unitstep.exporting import INPUT, onnx_of, to_onnx
from unitstep.peers import PEERS, installed
from unitstep.running import open_model
from unitstep.runs import provenance
from unitstep.speed import TITLES
from unitstep.timing import race

NET, CLASSES, SIZE = "vgg16-conv", 10, 32
BATCHES, ROUNDS, SECONDS = (1, 64), 9, 0.5  # images at a time; rounds over all; seconds for each in a round
LIBRARIES = ("torch", "onnx", "onnxruntime", "openvino", "snntorch", "spikingjelly", "norse", "unitstep")
UNITSTEP, CNN = "unitstep T=1 int8", "CNN"

Call = Callable[[Tensor], Any]


def bench_deploy(*, threads: tuple[int, ...] = (2, 1), progress: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Run all contenders on the processor, and return the record: speeds, file sizes, seconds of the export, versions,
    machine. ValueError if a library that takes part is not installed."""
    tell = progress or (lambda _: None)
    versions = dict(installed(LIBRARIES))
    torch.manual_seed(0)
    images = torch.randint(256, (max(BATCHES), 3, SIZE, SIZE), dtype=torch.uint8)
    cnn = nets.build(NET, classes=CLASSES)
    with torch.no_grad():
        cnn.train()(images)  # statistics for the batch norms
    cnn.eval().requires_grad_(False)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of all the libraries
        tell("export")
        files = _Files(cnn, images, Path(folder))
        for count in threads:
            for batch in BATCHES:
                tell(f"batch {batch}, {count} threads")
                rows += _race(files, cnn, images[:batch], count)
        sizes = {path.name: path.stat().st_size for path in (files.cnn, files.cnn_int8, files.snn)}
    return {
        "schema": 1, "net": NET, "size": SIZE, "speeds": rows, "bytes": sizes, "export_seconds": files.seconds,
        "cnn_parameters": sum(parameter.numel() for parameter in cnn.parameters()), "seconds_per_round": SECONDS,
        **provenance(), "versions": versions,
    }  # fmt: skip


class _Files:
    """The networks as ONNX files."""

    def __init__(self, cnn: nn.Module, images: Tensor, folder: Path) -> None:
        self.cnn, self.cnn_int8, self.snn = (folder / f"{name}.onnx" for name in ("cnn", "cnn-int8", "snn-int8"))
        self.cnn.write_bytes(onnx_of(cnn, images).SerializeToString())
        once = SimpleNamespace(get_next=partial(next, iter([{INPUT: images.numpy()}]), None))
        quantization.quantize_static(
            self.cnn, self.cnn_int8, once, per_channel=True,
            activation_type=quantization.QuantType.QUInt8, weight_type=quantization.QuantType.QInt8,
        )  # fmt: skip
        snn = to_spiking(cnn, images, steps=1, percentile=90)
        started = time.perf_counter()
        to_onnx(snn, self.snn, images.repeat(16, 1, 1, 1)[:1000])
        self.seconds = time.perf_counter() - started


def _race(files: _Files, cnn: nn.Module, images: Tensor, threads: int) -> list[dict[str, Any]]:
    """All contenders at one batch size and number of threads: images per second in each round, and their median."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            rows = []
            calls = {name: partial(call, images) for name, call in _contenders(files, cnn, threads)}
            for name, turns in race(calls, rounds=ROUNDS, seconds=SECONDS).items():
                rounds = [len(images) * len(turn) / sum(turn) for turn in turns]
                about = {"name": name, "batch": len(images), "threads": threads}
                rows.append(about | {"rounds": rounds, "median": statistics.median(rounds)})
            return rows
    finally:
        torch.set_num_threads(before)


def _contenders(files: _Files, cnn: nn.Module, threads: int) -> Iterator[tuple[str, Call]]:
    last = cnn.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def bf16(images: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return last(images)  # type: ignore[no-any-return]

    yield f"{CNN} PyTorch fp32", last
    yield f"{CNN} PyTorch bf16", bf16
    yield f"{CNN} torch.compile fp32", torch.compile(last, dynamic=False)
    yield f"{CNN} ONNX Runtime fp32", _plain_onnxruntime(files.cnn, threads)
    yield f"{CNN} ONNX Runtime int8", _plain_onnxruntime(files.cnn_int8, threads)
    yield f"{CNN} OpenVINO", _plain_openvino(files.cnn, threads)
    yield f"{CNN} OpenVINO int8", _plain_openvino(files.cnn_int8, threads)
    for title, peer in PEERS.items():
        for steps in (1, 5):
            yield f"{title} T={steps}", peer(cnn, steps).eval()
    for runtime, title in TITLES.items():
        model = open_model(files.snn, runtime, threads=threads)
        yield f"{UNITSTEP} {title}", lambda images, model=model: model(images.numpy())  # type: ignore[misc]


def _plain_onnxruntime(path: Path, threads: int) -> Call:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {INPUT: images.numpy()})


def _plain_openvino(path: Path, threads: int) -> Call:
    import openvino

    core = openvino.Core()
    compiled = core.compile_model(core.read_model(path), "CPU", {"INFERENCE_NUM_THREADS": threads})
    return lambda images: compiled(images.numpy())


def table(record: dict[str, Any]) -> str:
    """A record as Markdown: images per second, and in brackets times the CNN in PyTorch fp32."""
    medians = {(row["name"], row["batch"], row["threads"]): row["median"] for row in record["speeds"]}
    base = f"{CNN} PyTorch fp32"
    found = {(n, b, t): f"{x:,.0f} ({x / medians[base, b, t]:.1f}×)" for (n, b, t), x in medians.items()}
    columns = sorted({(t, b) for _, b, t in found}, reverse=True)
    title = " | ".join(f"batch {b}, {t} thread{'s' * (t > 1)}" for t, b in columns)
    lines = [f"| | {title} |", f"|---{'|---:' * len(columns)}|"]
    for name in dict.fromkeys(name for name, _, _ in found):
        lines.append(f"| {name} | {' | '.join(found[name, b, t] for t, b in columns)} |")
    return "\n".join(lines) + "\n"
