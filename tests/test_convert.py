"""A user's own CNN becomes a run: `unitstep convert`, then `unitstep train --from`."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from unitstep import Run, load
from unitstep.cli import main
from unitstep.ladder import convert
from unitstep.recipes import OWN

NET = """
import torch
from torch import nn
from torch.nn import functional as F


class Net(nn.Module):
    def __init__(self, classes=10):
        super().__init__()
        self.a, self.b = nn.Conv2d(1, 8, 3, 2, 1), nn.Conv2d(8, 16, 3, 2, 1)
        self.relu = nn.ReLU(inplace=True)
        self.fc = nn.Linear(16, classes)

    def forward(self, x):
        x = self.relu(self.b(self.relu(self.a(x))))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class Gated(Net):
    def forward(self, x):
        x = self.relu(self.a(x))
        x = F.silu(self.b(x * torch.sigmoid(x)))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


def build():
    torch.manual_seed(0)
    return Net()


def eleven():
    return Net(11)


class Gate(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else 0 * x


class Branching(Net):
    def __init__(self):
        super().__init__()
        self.gate = Gate()

    def forward(self, x):
        return super().forward(self.gate(x))


class Soft(Net):
    def forward(self, x):
        return super().forward(x).softmax(1)


def soft():
    return Soft()


def normed():
    net = Net()
    torch.nn.utils.parametrizations.weight_norm(net.a)
    return net


class Twice(Net):
    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(self.a, self.relu)

    def forward(self, x):
        x = self.relu(self.b(self.features(x)))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.LazyConv2d(8, 3, 2), nn.LazyBatchNorm2d(), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.LazyLinear(10)
        )

    def forward(self, x):
        return F.log_softmax(self.net(x), 1)


class Viewing(nn.Module):
    # as tutorials flatten, which is impossible where values lie in memory in another order
    def __init__(self):
        super().__init__()
        self.a, self.b, self.fc = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 16, 3, 2, 1), nn.Linear(16 * 49, 10)

    def forward(self, x):
        x = F.relu(self.b(F.relu(self.a(x))))
        return self.fc(x.view(x.size(0), -1))


def broken():
    raise RuntimeError("no licence")


gated, branching, twice, viewing, lazy = Gated, Branching, Twice, Viewing, Lazy
number = 3
"""
FASHION = ["--data", "fashion-mini", "--size", "28", "--channels", "1", "--threads", "1", "--calibration-images", "64"]
SHORT = [part for index in range(1, 6) for part in (f"--stages.{index}.epochs", "0.02")]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of a user who has mynet.py in it."""
    (tmp_path / "mynet.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")  # else the report is as narrow as the terminal
    monkeypatch.setattr(sys, "path", [*sys.path])
    sys.modules.pop("mynet", None)
    return tmp_path


def test_own_cnn_from_conversion_to_one_timestep(folder, capsys, monkeypatch):
    sys.path.append(str(folder))
    from mynet import Net

    torch.manual_seed(1)
    cnn = Net()
    save_file(cnn.state_dict(), folder / "w.safetensors")
    arguments = ["convert", "mynet:build", "--weights", "w.safetensors", "--out", "runs/mine", *FASHION, *SHORT]
    assert main(arguments) == 0
    printed = capsys.readouterr()
    assert "cnn_relu_1" in printed.out
    assert "by conversion alone at T = 5" in printed.out
    assert "unitstep train --from runs/mine" in printed.err
    assert (folder / "runs/mine/currents.png").read_bytes().startswith(b"\x89PNG")
    found = json.loads((folder / "runs/mine/conversion.json").read_text())
    assert [row["became"] for row in found["report"]["rows"]].count("neuron") == 2
    assert found["report"]["steps"] == 5
    stored = Run("runs/mine").net(0).state_dict()
    assert all(torch.equal(stored[f"cnn.{name}"], tensor) for name, tensor in cnn.state_dict().items())
    assert Run("runs/mine").recipe.net == "mynet:build"

    assert main(["train", "--from", "runs/mine", "--threads", "1"]) == 0
    assert [stage.stage.name for stage in Run("runs/mine").stages] == ["cnn", "t5", "t4", "t3", "t2", "t1"]
    assert main(["measure", "runs/mine", "--threads", "1", "--no-speed"]) == 0
    assert "T = 1" in capsys.readouterr().out
    assert load("runs/mine", steps=1)(torch.zeros(2, 1, 28, 28, dtype=torch.uint8)).shape == (2, 10)

    assert main(["train", "--from", "runs/mine", "--out", "runs/other"]) == 1
    assert "leave out --out" in capsys.readouterr().err
    assert not Path("runs/other").exists()
    assert main(arguments) == 1
    assert "is a run already: go on with unitstep train --from" in capsys.readouterr().err
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(folder)])
    sys.modules.pop("mynet")
    gone = r"'mynet:build' cannot be made: ModuleNotFoundError: No module named 'mynet'.*must be importable"
    with pytest.raises(ValueError, match=gone):
        load("runs/mine", steps=1)


def test_train_from_goes_on_with_any_run(unbroken, tmp_path, capsys):
    assert main(["train", "--from", str(unbroken.path)]) == 0
    assert "is done" in capsys.readouterr().err
    assert main(["train", "--from", str(unbroken.path), "--seed", "5"]) == 1
    assert "seed: 0 → 5" in capsys.readouterr().err
    assert main(["train", "--from", str(tmp_path)]) == 1
    assert "is not a run folder" in capsys.readouterr().err


def test_what_does_not_convert_is_shown_in_the_report_and_nothing_is_written(folder, capsys):
    assert main(["convert", "mynet:gated", "--out", "runs/gated", *FASHION]) == 1
    printed = capsys.readouterr()
    assert "3 operations do not convert" in printed.err
    for line in ("sigmoid", "mul", "silu"):
        assert "refused" in next(row for row in printed.out.splitlines() if row.startswith(line))
    assert "mynet.py:22" in printed.out
    assert not (folder / "runs").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["convert", "mynet:eleven", *FASHION], "gives [2, 11] for 2 images, but logits of the 10 classes"),
        (["convert", "mynet:nothing", *FASHION], "has no attribute 'nothing'"),
        (["convert", "mynet:number", *FASHION], "'int' object is not callable"),
        (["convert", "mynet:broken", *FASHION], "cannot be made: RuntimeError: no licence"),
        (["convert", "mynet:normed", *FASHION], "computes the weights of 'a' from others, as weight_norm does"),
        (["convert", "mynet:soft", *FASHION], "gives probabilities: it ends in a softmax"),
        (["convert", "mynet:build", "--data", "fashion-mini"], "fails on images of 3×32×32"),
        (["convert", "mynet:build", "--size", "28", "--channels", "1"], "give --data"),
        (["convert", "mynet:build", *FASHION, "--weights", "mynet.py"], "is not a safetensors file"),
        (["convert", "mynet:build", *FASHION, "--weights", "none"], "none is not a safetensors file"),
        (["convert", "mynet:build", *FASHION, "--weights", "wrong.safetensors"], "does not fit the network"),
        (["convert", "mynet:build", *FASHION, "--leaf-modules", "c"], "no module named 'c'"),
    ],
)
def test_errors_say_what_is_wrong(folder, capsys, arguments, message):
    save_file({"x": torch.zeros(1)}, folder / "wrong.safetensors")
    assert main([*arguments, "--out", "runs/x"]) == 1
    assert message in capsys.readouterr().err
    assert not (folder / "runs").exists()


def test_probabilities_are_not_trained_on(folder, capsys):
    assert main(["train", "fashion-mini", "--net", "mynet:soft", "--out", "runs/x"]) == 1
    assert "gives probabilities: it ends in a softmax" in capsys.readouterr().err


@pytest.mark.parametrize("net", ["viewing", "lazy"])
def test_a_network_as_tutorials_write_them_goes_all_the_way(folder, net):
    given = ["--size", "28", "--channels", "3", "--threads", "1"]
    epochs = ["--stages.0.epochs", "0.02", *SHORT]
    assert main(["train", "fashion-mini", "--net", f"mynet:{net}", "--out", "runs/x", *given, *epochs]) == 0
    assert main(["measure", "runs/x", "--threads", "1", "--no-speed"]) == 0
    assert Run("runs/x").measurement["stages"][-1]["steps"] == 1
    for form in ("int8", "float"):
        arguments = ["export", "runs/x", "--form", form, "--out", f"{form}.onnx", "--images", "64", "--threads", "1"]
        assert main(arguments) == 0
    arguments = ["convert", f"mynet:{net}", "--data", "fashion-mini", "--out", "runs/y", *given, *SHORT]
    assert main([*arguments, "--calibration-images", "64"]) == 0


def test_what_does_not_convert_is_not_trained_first(folder, capsys):
    assert main(["train", "fashion-mini", "--net", "mynet:gated", "--out", "runs/x"]) == 1
    assert "3 operations do not convert" in capsys.readouterr().err
    assert not Run("runs/x").log


def test_a_leaf_module_has_the_name_it_has_in_the_users_network(folder, capsys):
    arguments = ["convert", "mynet:branching", *FASHION, "--out", "runs/branching"]
    assert main(arguments) == 1
    assert "leaf_modules=('cnn.gate',)" in capsys.readouterr().err
    assert main([*arguments, "--leaf-modules", "gate"]) == 0
    assert "kept whole as a leaf module" in capsys.readouterr().out


def test_a_module_may_have_two_names(folder):
    sys.path.append(str(folder))
    assert main(["convert", "mynet:twice", *FASHION, *SHORT, "--out", "runs/twice"]) == 0
    state = Run("runs/twice").net(0).state_dict()
    assert torch.equal(state["cnn.a.weight"], state["cnn.features.0.weight"])


def test_a_network_that_has_changed_is_named(folder):
    sys.path.append(str(folder))
    assert main(["convert", "mynet:build", *FASHION, *SHORT, "--out", "runs/mine"]) == 0
    (folder / "mynet.py").write_text(NET.replace("nn.Conv2d(1, 8, 3, 2, 1)", "nn.Conv2d(1, 8, 5, 2, 2)"))
    sys.modules.pop("mynet")
    importlib.invalidate_caches()
    with pytest.raises(ValueError, match="do not fit the network mynet:build as it is now"):
        Run("runs/mine").net(0)


def test_usage_without_a_network(capsys):
    assert main(["convert"]) == 2
    assert main(["convert", "mynet"]) == 2
    assert "MODULE:FUNCTION" in capsys.readouterr().err


def test_a_recipe_without_cnn_epochs_needs_a_converted_cnn(folder):
    from unitstep import train

    sys.path.append(str(folder))
    recipe = replace(OWN, net="mynet:build", data="fashion-mini", size=28, channels=1)
    with pytest.raises(ValueError, match="has no CNN and the recipe does not train one: unitstep convert"):
        train(recipe, folder / "run")
    with pytest.raises(ValueError, match="has no spiking stage"):
        convert(replace(recipe, stages=recipe.stages[:1]), folder / "other")
