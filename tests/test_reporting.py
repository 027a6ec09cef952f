"""The report: its tables, what it refuses, and the page in a real browser."""

import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from unitstep import Run, measure_run, report
from unitstep.reporting import _grey, health

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# Run in the page after it has drawn, in place of a person: what it finds out becomes the page's title.
VISIT = """
<script>addEventListener("load", async () => {
  const plots = [...document.querySelectorAll(".plot")], seen = {};
  seen.drawn = plots.map(plot => plot.querySelectorAll(".trace, .hm, .point, .scatterlayer path").length);
  seen.wide = document.documentElement.scrollWidth > innerWidth;
  Plotly.Fx.hover("overview", [{ curveNumber: 0, pointNumber: 0 }]);
  seen.hover = document.querySelector("#overview .hovertext")?.textContent;
  const energies = () => document.getElementById("layers0").data.map(trace => trace.y.join());
  const before = energies(), model = document.getElementById("model");
  model.value = "memory"; model.dispatchEvent(new Event("change"));
  seen.switched = energies().every((y, i) => y !== before[i]);
  seen.about = document.getElementById("about").textContent;
  HTMLAnchorElement.prototype.click = function () { seen.download = this.download; };
  document.querySelector(".csv").click();
  seen.requests = performance.getEntriesByType("resource").map(entry => entry.name);
  seen.requests = seen.requests.filter(name => !/^(data|blob):/.test(name));
  const widths = () => plots.map(plot => plot.querySelector("svg").clientWidth);
  const tables = () => document.querySelectorAll("details:not([open])").length;
  const shown = [widths(), tables()];
  dispatchEvent(new Event("beforeprint"));
  seen.paper = [Math.max(...widths()), tables()];
  dispatchEvent(new Event("afterprint"));
  seen.back = JSON.stringify(shown) == JSON.stringify([widths(), tables()]);
  seen.errors = window.errors;
  document.title = JSON.stringify(seen);
});</script></body>"""
ERRORS = """<head><script>window.errors = []; addEventListener("error", event => errors.push(event.message));
const say = console.error; console.error = (...words) => { errors.push(words.join(" ")); say(...words); };</script>"""


@pytest.fixture(scope="module")
def measured(unbroken, tmp_path_factory):
    run = Run(shutil.copytree(unbroken.path, tmp_path_factory.mktemp("report") / "run"))
    measure_run(run, device="cpu")
    found = run.measurement
    row = {"name": "CNN", "steps": None, "runtime": "PyTorch", "p50": 0.001, "p99": 0.002, "batch": 16}
    found["speed"] = [row | {"images_per_second": 4000.0, "memory": None}]
    (run.path / "measure.json").write_text(json.dumps(found))
    return run


def copied(run, folder, change):
    """A copy of `run` with something changed in its measure.json, and of that recipe throughout."""
    made = Run(shutil.copytree(run.path, folder))
    found = made.measurement
    change(found)
    (made.path / "measure.json").write_text(json.dumps(found))
    about = json.loads((made.path / "recipe.json").read_text())
    (made.path / "recipe.json").write_text(json.dumps(about | {"recipe": found["recipe"]}))
    other, last = Run(folder), run.stages[-1].index
    if run.samples_path.exists():
        other.save(other.samples_path, run.load(run.samples_path, last)[0], last)
    return other


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium to open the page in")
@pytest.mark.parametrize("width", [390, 1440])
def test_the_page_in_a_browser(measured, width, tmp_path):
    page = report([measured], tmp_path / "report.html").read_text()
    page = page.replace("<head>", ERRORS, 1).replace("</body>", VISIT)
    (tmp_path / "visited.html").write_text(page)
    frame = tmp_path / "frame.html"  # a window has a least width, a frame has not
    frame.write_text(
        f'<iframe src="visited.html" style="width:{width}px;height:900px"></iframe><script>setInterval(() => {{ '
        "document.title = frames[0].document.title; }, 50);</script>"
    )
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files", "--dump-dom"]
    done = subprocess.run(
        [CHROMIUM, *options, "--virtual-time-budget=10000", f"--user-data-dir={tmp_path / 'profile'}", frame.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    title = re.search(r"<title>(\{.*?)</title>", done.stdout, re.DOTALL)
    assert title, done.stdout[-2000:] + done.stderr[-2000:]
    seen = json.loads(html.unescape(title[1]))
    assert seen["errors"] == []
    assert seen["requests"] == []
    assert len(seen["drawn"]) == 11
    assert 0 not in seen["drawn"]
    assert not seen["wide"]
    assert seen["paper"] == [320, 0]  # two columns on a page, and no table folded away
    assert seen["back"]
    assert re.search(r"T = 2: \d+\.\d\d %", seen["hover"])
    assert seen["switched"]
    assert seen["about"].startswith("The int8 model and the traffic")
    assert seen["download"] == "fashion-mini-Stages.csv"


def test_the_tables_as_markdown(measured, tmp_path):
    text = report([measured], tmp_path / "report.md", format="md").read_text()
    found = measured.measurement["stages"][-1]
    assert f"| T = 1 | {found['val_accuracy']:.2f} | {found['test_accuracy']:.2f} |" in text
    assert f"{found['operations'][0]['macs']:,}" in text
    assert "| CNN, PyTorch | 1.00 | 2.00 | 4,000 | 16 |  |" in text
    assert "- seeds: 0" in text


def test_energy_by_your_own_figures(measured, tmp_path):
    text = report([measured], tmp_path / "report.md", format="md", pj=(2.5, 0.5)).read_text()
    assert (
        "in the spiking network 2.5 pJ for a multiply-accumulate and 0.5 for an accumulation; but in the CNNs 4.6"
        in text
    )
    assert "| T = 1, own |" in text
    assert "<option>own</option>" in report([measured], tmp_path / "a.html", pj=(2.5, 0.5)).read_text()


def test_training_cost_from_a_log_and_from_one_of_an_older_version(measured, tmp_path):
    run = copied(measured, tmp_path / "run", lambda found: None)
    row = {"stage": 0, "epoch": 1, "step": 5, "loss": 1.0, "val_accuracy": 50.0, "lr": 0.1, "seconds": 2.0}
    added = {"images_per_second": 100.0, "val_seconds": run.stages[0].seconds / 4, "memory": 300_000_000}
    rows = [row | added | {"size": 14, "val_accuracy": None}, row | {"stage": 1}]  # the second is of an older version
    (run.path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = report([run], tmp_path / "report.md", format="md").read_text()
    assert "A stage that begins with smaller images" in text
    assert '"y": [null]' in report([run], tmp_path / "report.html").read_text()
    first, second = (stage.seconds for stage in run.stages[:2])
    assert f"| CNN | 0.2 | 100 | {first:.0f} | 25 | 300 |" in text
    assert f"| T = 2 | 0.07 |  | {second:.0f} |  |  |" in text
    (run.path / "1-t2.safetensors").unlink()
    half = copied(run, tmp_path / "half", lambda found: found["stages"].__delitem__(slice(1, None)))
    assert "| T = 2 | 1, not finished |  | 2 |  |  |" in report([half], tmp_path / "a.md", format="md").read_text()


def test_latency_at_equal_accuracy(measured, tmp_path):
    def row(strategy, initial, steps, accuracy, latency=None):
        return {"strategy": strategy, "initial": initial, "steps": steps, "accuracy": accuracy, "latency": latency}

    rows = [
        row("maximum", 0.0, 1, 10.0), row("maximum", 0.0, 64, 90.0, 0.064), row("maximum", 0.5, 8, 60.0),
        row("maximum", 0.5, 16, 90.5, 0.01), row("least squares", 0.0, 32, 70.0), row("least squares", 0.5, 16, 80.0),
        row("rate code", 0.0, 128, 90.0),
    ]  # fmt: skip
    about = {"steps": 1, "images": 500, "accuracy": 90.0, "cnn_accuracy": 91.0, "latency": 0.002, "seconds": 60.0}
    run = copied(measured, tmp_path / "run", lambda found: found.update(conversion_alone=about | {"rows": rows}))
    text = report([run], tmp_path / "report.md", format="md").read_text()
    assert "| this run | 1 | 90.00 | 2.00 | 1.0 |" in text
    assert "| its CNN, not spiking |  | 91.00 |  |  |" in text
    assert "| maximum, initial 0.5 | 16 | 90.50 | 10.00 | 5.0 |" in text
    assert "| least squares, initial 0.5 | not within 16 | 80.00 |  |  |" in text
    assert "| rate code | 128 | 90.00 |  |  |" in text
    assert "Conversion alone, from half a threshold" in report([run], tmp_path / "report.html").read_text()
    text = report([measured], tmp_path / "without.md", format="md").read_text()
    assert "Latency at equal accuracy" not in text


def test_seeds_of_one_recipe_are_a_mean_with_its_spread(measured, tmp_path):
    def other(found):
        found["recipe"]["seed"] = 1
        found["stages"][-1]["test_accuracy"] += 2

    runs = [measured, copied(measured, tmp_path / "other", other)]
    text = report(runs, tmp_path / "report.md", format="md").read_text()
    accuracy = measured.measurement["stages"][-1]["test_accuracy"] + 1
    assert f"{accuracy:.2f} ± 1.41" in text
    assert text.count("## Stages") == 1
    with pytest.raises(ValueError, match="has the recipe and the seed, 0, of another"):
        report([measured, copied(measured, tmp_path / "same", lambda found: None)], tmp_path / "r.md", format="md")


def test_numbers_of_spikes_are_greys():
    assert _grey(np.array([0, 1, 2, 4], np.uint8)).tolist() == [0, 63, 127, 255]


def test_a_measurement_of_another_run_is_refused(measured, tmp_path):
    made = Run(shutil.copytree(measured.path, tmp_path / "made"))
    found = json.loads((made.path / "measure.json").read_text())
    found["recipe"]["dropout"] = 0.3
    (made.path / "measure.json").write_text(json.dumps(found))
    with pytest.raises(ValueError, match="is of another run: unitstep measure"):
        report([made], tmp_path / "out.html")


def test_other_recipes_stand_beside_each_other(measured, tmp_path):
    def other(found):
        found["recipe"]["dropout"] = 0.3

    runs = [measured, copied(measured, tmp_path / "other", other)]
    text = report(runs, tmp_path / "report.html").read_text()
    assert text.count('<p class="verdict">') == 2
    assert "fashion-mini, other" in text


def test_half_a_run_shows_what_is_there(measured, tmp_path):
    def half(found):
        del found["stages"][2:]

    run = copied(measured, tmp_path / "half", half)
    (run.path / "samples.safetensors").unlink()
    text = report([run], tmp_path / "half.md", format="md").read_text()
    assert "| T = 1 | not measured yet |" in text
    assert "vgg-mini on fashion-mini. At T = 2, " in text
    (run.path / "2-t1.safetensors").unlink()
    assert "| T = 1 | not trained yet |" in report([run], tmp_path / "half.md", format="md").read_text()

    def less(found):
        del found["stages"][1:]

    run = copied(run, tmp_path / "less", less)
    page = report([run], tmp_path / "less.html").read_text()
    assert "Only the CNN" in page
    assert "every layer fires" not in page


def test_what_cannot_be_shown_is_told(measured, unbroken, tmp_path):
    with pytest.raises(ValueError, match="has not been measured: unitstep measure"):
        report([unbroken], tmp_path / "a.html")
    with pytest.raises(ValueError, match="give at least one run"):
        report([], tmp_path / "a.html")
    with pytest.raises(ValueError, match="not a run folder"):
        report([tmp_path], tmp_path / "a.html")
    with pytest.raises(ValueError, match="format must be html or md"):
        report([measured], tmp_path / "a.html", format="pdf")
    others = copied(measured, tmp_path / "others", lambda found: found["data"].update(test_images=5))
    with pytest.raises(ValueError, match=r"other images \(5 of 10 classes\).*a report for each data set"):
        report([measured, others], tmp_path / "a.html")
    old = copied(measured, tmp_path / "old", lambda found: found["stages"][0].pop("confusion"))
    with pytest.raises(ValueError, match=r"another version.*unitstep measure"):
        report([old], tmp_path / "a.html")
    part = copied(measured, tmp_path / "part", lambda found: found["stages"][0].pop("test_interval"))
    with pytest.raises(ValueError, match=r"part/measure\.json is damaged"):
        report([part], tmp_path / "a.html")
    deep = copied(measured, tmp_path / "deep", lambda found: found["stages"][-1]["layers"][0].pop("surrogate"))
    with pytest.raises(
        ValueError, match=r"deep/measure\.json is damaged or of another version \(KeyError\('surrogate'"
    ):
        report([deep], tmp_path / "a.html")
    cut = copied(measured, tmp_path / "cut", lambda found: None)
    samples = cut.path / "samples.safetensors"
    samples.write_bytes(samples.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"samples\.safetensors is damaged"):
        report([cut], tmp_path / "a.html")
    (cut.path / "log.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"log\.jsonl is damaged"):
        report([cut], tmp_path / "a.html")
    empty = copied(measured, tmp_path / "empty", lambda found: found.pop("stages"))
    with pytest.raises(ValueError, match=r"measure\.json is damaged"):
        report([empty], tmp_path / "a.html")
    (empty.path / "measure.json").write_text("{")
    with pytest.raises(ValueError, match=r"measure\.json"):
        report([empty], tmp_path / "a.html")
    assert not (tmp_path / "a.html").exists()


def test_health_in_words():
    good = {"name": "relu1", "rate": 0.2, "dead_channels": 0.0, "saturated_channels": 0.0, "surrogate": 0.5}
    layers = [
        good, good | {"name": "relu2", "dead_channels": 0.31}, good | {"name": "relu3", "rate": 0, "dead_channels": 1},
        good | {"name": "relu4", "saturated_channels": 0.5}, good | {"name": "relu5", "surrogate": 0.01},
    ]  # fmt: skip
    said = health({"stages": [{"steps": 1, "layers": layers}]})
    assert [sentence.split(" ")[0].rstrip(":") for sentence in said] == ["relu2", "relu3", "relu4", "relu5"]
    assert said[0].startswith("relu2 at T = 1: 31 % of the channels never fire")


def test_a_processor_is_named_in_a_machine_with_a_graphics_card_too(measured, tmp_path):
    def of(device):
        def change(found):
            found["machine"] |= {"cpu": "Hand", "threads": 3, "gpu": "Big Card"}
            found["trained"] |= {"machine": found["machine"], "device": device}
            found["device"] = device

        run = copied(measured, tmp_path / device, change)
        return report([run], tmp_path / "a.md", format="md").read_text()

    assert "On Hand, 3 threads; interleaved.\n" in (text := of("cpu"))
    assert "- trained on: Hand, 3 threads, " in text
    assert "On Big Card; interleaved. Exported files: on Hand, 3 threads.\n" in (text := of("cuda"))
    assert "- trained on: Big Card, " in text
