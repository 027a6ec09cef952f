"""One page about runs: how accurate, how fast, what it costs, how it came about. Reads the files of run folders, and
runs nothing again.

Runs of one recipe with other seeds are a group, shown as mean and spread; details are of a group's first run.
"""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from unitstep import energy
from unitstep.figures import energies, figures_of, latency, over_steps
from unitstep.files import check_writable, write_whole
from unitstep.groups import Group, cell, name_of, of_steps, read_groups, trained_on
from unitstep.runs import Run
from unitstep.tables import tables_of

Format = Literal["html", "md"]


def report(
    runs: Sequence[Run | str | Path],
    out: str | Path,
    *,
    format: Format | None = None,
    pj: tuple[float, float] | None = None,
) -> Path:
    """Write a page about `runs` to the file `out`: HTML in one file that needs no network, or Markdown with the tables.

    format: html or md; None: md if the name of `out` ends so, else html.
    pj: a further energy model, of your own figures: picojoules of a multiply-accumulate and of an accumulation.
    ValueError if a run has not been measured, a file of it is damaged, or the runs are of different images, so that
    their accuracies do not compare.
    """
    out = Path(out)
    format = format or ("md" if out.suffix == ".md" else "html")
    if format not in ("html", "md"):
        raise ValueError(f"format must be html or md, not {format!r}")
    groups = read_groups(runs)
    models = energy.MODELS | ({"own": energy.own(*pj)} if pj else {})
    sections = [_section(group, models) for group in groups]
    text = _html(groups, sections) if format == "html" else _markdown(sections)
    check_writable(out)
    write_whole(out, text.encode())
    return out


# --------------------------------------------------------------------------------------------------------------- words


def _verdict(group: Group) -> str:
    """The result in a sentence, with its numbers."""
    recipe = group.runs[0].recipe
    what = f"{recipe.net} on {Path(group.first['data']['source']).name}"
    stages = {row["steps"]: row for row in group.stages}
    steps = [each for each in stages if each is not None]
    if not steps:
        return f"{what}. Only the CNN has been trained and measured so far."
    least = min(steps)
    accuracy, spread = stages[least]["test_accuracy"]
    last = of_steps(group.first, least)
    text = (
        f"{what}. At {name_of(least)}, {cell(accuracy, 2, spread)} % of {last['test_images']:,} test images are right"
    )
    if spread is None:
        text += " (95 %: {:.2f} – {:.2f})".format(*last["test_interval"])
    text += f", with {stages[least]['spikes_per_neuron'][0]:.3f} spikes per neuron"
    if None in stages:
        cnn = stages[None]["test_accuracy"][0]
        text += f"; the CNN has {cnn:.2f} %. "
        close = [each for each in steps if stages[each]["test_accuracy"][0] > cnn - 1]
        text += (
            f"The smallest T that loses less than 1 point is {min(close)}."
            if close
            else "Every T loses 1 point or more."
        )
    else:
        text += "."
    if last["operations"]:
        full, short, moved = (energy.total(last, energy.MODELS[name]) for name in ("exact", "int8", "memory"))
        whose = "Its" if len(group.runs) == 1 else f"{group.runs[0].path.name}'s"
        text += (
            f" {whose} operations, every spike counted, and their memory traffic would cost "
            f"{_times(moved.cnn_int8, moved.snn)} energy than those of the CNN in 8 bits; without memory "
            f"{_times(short.cnn_int8, short.snn)}, and {_times(full.cnn_fp32, full.snn)} than the CNN in fp32: at "
            "figures for 45 nm, not measured."
        )
    return text


def _grey(counts: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    """Numbers of spikes, uint8, as 0, black, to 255, white, for the most."""
    return (counts.astype(np.uint16) * 255 // max(1, int(counts.max()))).astype(np.uint8)


def _times(rival: float, ours: float) -> str:
    return f"{rival / ours:.1f} times less" if rival >= ours else f"{ours / rival:.1f} times more"


def health(found: dict[str, Any]) -> list[str]:
    """What is wrong with the layers of a measured run, a sentence each; empty if nothing is."""
    said = []
    for stage in found["stages"]:
        for layer in stage["layers"]:
            at = f"{layer['name']} at {name_of(stage['steps'])}"
            if layer["rate"] == 0:
                said.append(f"{at} never fires: nothing reaches what is behind it. A lower threshold would let it.")
            elif layer["dead_channels"] > 0.1:
                said.append(
                    f"{at}: {100 * layer['dead_channels']:.0f} % of the channels never fire; they could be removed."
                )
            if layer["saturated_channels"] > 0.02:
                said.append(
                    f"{at}: {100 * layer['saturated_channels']:.0f} % of the channels always fire, and say nothing."
                )
            if layer["surrogate"] < 0.1:
                said.append(
                    f"{at}: only {100 * layer['surrogate']:.0f} % of the membranes are within reach of the surrogate "
                    "gradient; it hardly learns."
                )
    return said


# --------------------------------------------------------------------------------------------------------------- pages


def _section(group: Group, models: Mapping[str, energy.Model]) -> dict[str, Any]:
    """What is said and shown of a group. ValueError if numbers are not there."""
    try:
        return {
            "group": group, "verdict": _verdict(group), "health": health(group.first),
            "tables": tables_of(group, models), "figures": figures_of(group), "energies": energies(group, models),
            "provenance": _provenance(group),
        }  # fmt: skip
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        run = group.runs[0]
        raise ValueError(
            f"{run.path / 'measure.json'} is damaged or of another version ({error!r}): unitstep measure {run.path} "
            "writes it again"
        ) from error


def _html(groups: list[Group], sections: list[dict[str, Any]]) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from plotly.offline import get_plotlyjs

    environment = Environment(loader=PackageLoader("unitstep", "."), autoescape=True, undefined=StrictUndefined)
    environment.policies["json.dumps_kwargs"] = {"sort_keys": False, "ensure_ascii": False}
    for section, group in zip(sections, groups, strict=True):
        section["samples"] = _samples(group.runs[0], group.first)
    page = environment.get_template("report.html")
    return page.render(sections=sections, plotly=get_plotlyjs(), overview=over_steps(groups), latency=latency(groups))


def _markdown(sections: list[dict[str, Any]]) -> str:
    parts = []
    for section in sections:
        parts.append(f"# {section['group'].name}\n\n{section['verdict']}\n")
        if len(runs := section["group"].runs) > 1:
            parts.append(f"What is not a mean over seeds is of {runs[0].path.name}, the first of them.\n")
        parts += [table.markdown() for table in section["tables"]]
        parts += [f"- {sentence}\n" for sentence in section["health"]]
        parts.append("\n".join(f"- {key}: {value}" for key, value in section["provenance"]) + "\n")
    return "\n".join(parts)


def _provenance(group: Group) -> list[tuple[str, str]]:
    found, trained = group.first, group.first["trained"]
    recipe = group.runs[0].recipe
    versions = ", ".join(f"{name} {number}" for name, number in (trained["versions"] or {}).items())
    epochs = ", ".join(f"{name_of(stage.steps)} {stage.epochs:g}" for stage in recipe.stages)

    def each(commits: Iterable[str | None]) -> str:
        return ", ".join(dict.fromkeys(map(str, commits)))

    return [
        ("recipe", recipe.name), ("network", recipe.net), ("images", Path(found["data"]["source"]).name),
        ("epochs", epochs),
        ("seeds", ", ".join(str(run.recipe.seed) for run in group.runs)),
        ("trained on", trained_on(trained)), ("versions", versions),
        ("commit", each(found["trained"]["commit"] for found in group.measured)),
        ("measured with commit", each(found["commit"] for found in group.measured)),
        ("folders", ", ".join(run.path.name for run in group.runs)),
    ]  # fmt: skip


def _samples(run: Run, found: dict[str, Any]) -> list[dict[str, Any]]:
    """The images of samples.safetensors and where their first layers fired, as data URLs; empty without that file."""
    classes = found["data"]["classes"]
    if not run.samples_path.exists():
        return []
    tensors, _ = run.load(run.samples_path, found["stages"][-1]["index"])
    shown = []
    for number, image in enumerate(tensors["images"].numpy()):
        maps = []
        for key in (key for key in tensors if key.startswith("spikes.")):
            spikes = tensors[key][number].numpy()
            tiles = np.pad(spikes, ((0, 0), (0, 1), (0, 1)))  # a dark line between channels
            tiles = np.concatenate(
                [np.concatenate(list(row), 1) for row in np.array_split(tiles, max(1, len(tiles) // 4))], 0
            )
            maps.append({"name": key.removeprefix("spikes."), "url": _png(_grey(tiles))})
        right, said = (classes[int(tensors[key][number])] for key in ("labels", "predictions"))
        shown.append({"url": _png(image.transpose(1, 2, 0).squeeze()), "label": right, "said": said, "maps": maps})
    return shown


def _png(pixels: "np.ndarray[Any, Any]") -> str:
    file = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
