"""The Python of the README and of the docs runs as it stands; tables are those of the records."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.controls import table as controls_table
from benchmarks.conversion import table as conversion_table
from benchmarks.counting import table as counting_table
from benchmarks.optimizers import table as optimizers_table
from benchmarks.record import RECORDS, table
from benchmarks.results import PAGE, page, records
from benchmarks.training_profile import table as profile_table
from unitstep.benching import table as deploy_table
from unitstep.predicting import SHIPPED
from unitstep.recipes import RUN_TO_THE_END, differences, recipe, recipe_from_dict, without_folder
from unitstep.training_speed import table as training_table

README = Path(__file__).resolve().parents[1] / "README.md"
SHOWN = ("fashion-mini", "cifar10-quick", "cifar10-quick-long")  # ladders whose tables are in the README
CONVERSION, DEPLOY = (README.parent / "docs" / f"{name}.md" for name in ("conversion", "deploy"))


def snippets(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)


SNIPPETS = snippets(README) + snippets(CONVERSION) + snippets(DEPLOY)


def test_there_are_snippets():
    assert len(SNIPPETS) == 4


@pytest.mark.parametrize("snippet", SNIPPETS)
def test_snippet(snippet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(SHIPPED, "model.onnx")
    Image.new("RGB", (40, 30), "red").save("photo.jpg")
    exec(compile(snippet, "documentation", "exec"), {"__name__": "__main__"})


@pytest.mark.parametrize("name", sorted(RUN_TO_THE_END))
def test_a_record_is_of_the_recipe_as_it_is(name):
    recorded = recipe_from_dict(records()[name]["runs"][0]["recipe"])
    this = without_folder(recipe(name))
    assert differences(replace(recorded, name=name, seed=this.seed), this) == []


def test_tables_are_those_of_the_records():
    conversion = json.loads((RECORDS / "conversion.json").read_text())
    assert conversion_table(conversion) == CONVERSION.with_name("conversion-table.md").read_text()
    assert deploy_table(json.loads((RECORDS / "deploy.json").read_text())) in README.read_text()
    assert deploy_table(json.loads((RECORDS / "deploy-avx2.json").read_text())) in DEPLOY.read_text()
    controls = json.loads((RECORDS / "controls.json").read_text())["rows"]
    assert controls_table(controls) == CONVERSION.with_name("controls-table.md").read_text()
    counting = json.loads((RECORDS / "counting.json").read_text())
    assert counting_table(counting) == CONVERSION.with_name("counting-table.md").read_text()
    optimizers = json.loads((RECORDS / "optimizers.json").read_text())["rows"]
    assert optimizers_table(optimizers) == CONVERSION.with_name("optimizers-table.md").read_text()
    training = json.loads((RECORDS / "training-speed.json").read_text())
    assert training_table(training) == CONVERSION.with_name("training-speed-table.md").read_text()
    profile = json.loads((RECORDS / "training-profile.json").read_text())["rows"]
    assert profile_table(profile) == CONVERSION.with_name("training-profile.md").read_text()
    ladders = records()
    assert ladders.keys() == RUN_TO_THE_END
    assert [name for name in SHOWN if table(ladders[name]) not in README.read_text()] == []
    assert page(ladders) == PAGE.read_text()


def test_figures_in_sentences_are_those_of_the_record_and_of_the_card():
    text = README.read_text()
    vgg16 = records()["cifar10-vgg16-conv"]["runs"][0]["stages"][-1]
    assert f"`cifar10-vgg16-conv`, reach {vgg16['test_accuracy']:.2f} %" in text
    card = SHIPPED.parent / "cifar10-t1.md"
    in_integers = re.search(r"\| accuracy \| (\d\d\.\d\d) % of the 10,000 test images", card.read_text())
    assert in_integers
    assert f"integers T = 1 has {in_integers[1]} %" in text
    assert f"`cifar10-quick-long`, {in_integers[1]} % in integers" in text
