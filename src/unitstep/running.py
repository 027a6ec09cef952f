"""Exported files in ordinary runtimes: ONNX Runtime and OpenVINO. Imports no torch, and knows nothing of how a file was
made."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np

Array = np.ndarray[Any, Any]
Run = Callable[[Array], list[Array]]
Runtime = Literal["onnxruntime", "openvino"]
KEY = "unitstep"  # of the metadata


class Model:
    """An exported network: `model(images)` gives its outputs, the logits first.

    images: [N, C, H, W] in the type that the file asks for, uint8 of raw pixels if it is in integers; ValueError for
    others. `about` is what the file says of itself: recipe, steps, classes, …
    """

    def __init__(self, run: Run, about: dict[str, Any]) -> None:
        self._run, self.about = run, about

    def __call__(self, images: Array) -> list[Array]:
        shape, kind = list(self.about.get("input", images.shape[1:])), self.about.get("pixels", str(images.dtype))
        if [*images.shape[1:]] != shape or str(images.dtype) != kind:
            raise ValueError(
                f"this model takes images [N, {', '.join(map(str, shape))}] in {kind}, not {list(images.shape)} in "
                f"{images.dtype}"
            )
        return self._run(images)


def open_model(source: str | Path | bytes, runtime: Runtime = "onnxruntime", *, threads: int | None = None) -> Model:
    """An exported ONNX file, or its bytes, ready to run on the processor.

    threads: None is the runtime's own choice. ValueError if it is no file that unitstep exported, is damaged, or the
    runtime is not known or not installed.
    """
    if runtime not in ("onnxruntime", "openvino"):
        raise ValueError(f"runtime must be onnxruntime or openvino, not {runtime!r}")
    if threads is not None and threads < 1:
        raise ValueError(f"threads must be 1 or more, not {threads}")
    import onnx  # not for everyone who imports this module

    name = "the model" if isinstance(source, bytes) else str(source)
    try:
        content = source if isinstance(source, bytes) else Path(source).read_bytes()
    except OSError as error:
        raise ValueError(f"cannot read {name}: {error.strerror or error}") from error
    try:
        about = json.loads({entry.key: entry.value for entry in onnx.load_from_string(content).metadata_props}[KEY])
        run = _onnxruntime(content, threads) if runtime == "onnxruntime" else _openvino(content, threads)
    except ImportError as error:
        raise ValueError(f"{runtime} is not installed here ({error}): pip install {runtime}") from error
    except (KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{name} is an ONNX file, but not one that unitstep exported") from error
    except Exception as error:  # each library has its own
        raise ValueError(f"{name} is damaged or is no ONNX file ({first_line(error)})") from error
    if about.get("form") == "int8" and about.get("format", 1) < 2:
        raise ValueError(
            f"{name} was written by an earlier unitstep, whose integers are wrong on some processors: export it again"
        )
    return Model(run, about)


def first_line(error: Exception) -> str:
    """The first line of a library's message, which can have very many; the kind of error if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def _onnxruntime(content: bytes, threads: int | None) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    given = session.get_inputs()[0].name
    return lambda images: session.run(None, {given: images})


def _openvino(content: bytes, threads: int | None) -> Run:
    import openvino

    core = openvino.Core()
    options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": "f32"}  # of what is not in integers
    if threads is not None:
        options["INFERENCE_NUM_THREADS"] = threads
    compiled = core.compile_model(core.read_model(content), "CPU", options)
    return lambda images: list(compiled(images).values())
