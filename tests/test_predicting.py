"""What an exported network sees in image files, without torch."""

import json
import os
import pty
import re
import subprocess
import sys
from ast import literal_eval

import numpy as np
import pytest
import torch
from PIL import Image

from unitstep import pretrained
from unitstep.cli import main
from unitstep.data import load_test
from unitstep.exporting import to_onnx
from unitstep.predicting import SHIPPED, images_in, predict
from unitstep.running import open_model

NAMES = [f"class {number}" for number in range(10)]


@pytest.fixture(scope="module")
def test_images():
    return load_test("fashion-mini", size=28, channels=1)


@pytest.fixture(scope="module")
def model(tmp_path_factory, test_images):
    path = tmp_path_factory.mktemp("model") / "fashion.onnx"
    to_onnx(pretrained("fashion-mini-t1"), path, test_images.images[:20], about={"classes": NAMES, "short": 28})
    return path


def test_an_image_file_is_seen_as_the_data_set_sees_it(model, test_images, tmp_path):
    for number in range(40):  # more than a batch
        Image.fromarray(test_images.images[number, 0].numpy()).save(tmp_path / f"{number:02}.png")
    found = list(predict(images_in([tmp_path]), open_model(model), top=2))
    logits = torch.from_numpy(open_model(model)(test_images.images[:40].numpy())[0]).double()
    for answer, row in zip(found, logits.softmax(1), strict=True):
        shares, order = row.sort(descending=True)
        assert [name for name, _ in answer.classes] == [NAMES[i] for i in order[:2]]
        np.testing.assert_allclose([share for _, share in answer.classes], shares[:2])


@pytest.mark.parametrize(("mode", "size"), [("RGB", (300, 200)), ("RGBA", (28, 28)), ("P", (5, 90)), ("L", (1, 1))])
@pytest.mark.parametrize("suffix", ["png", "webp"])
def test_any_size_and_mode_is_taken(model, mode, size, suffix, tmp_path):
    Image.new(mode, size).save(tmp_path / f"a.{suffix}")
    (answer,) = predict(images_in([tmp_path]), open_model(model))
    assert len(answer.classes) == 5


def test_a_broken_image_is_named_and_left_out(model, tmp_path, capsys):
    Image.new("L", (40, 40), 200).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes((tmp_path / "good.png").read_bytes()[:40])
    (tmp_path / "notes.txt").write_text("not meant")
    assert main(["predict", str(tmp_path), "--model", str(model), "--json"]) == 1
    printed = capsys.readouterr()
    assert [json.loads(line)["path"] for line in printed.out.splitlines()] == [str(tmp_path / "good.png")]
    assert "bad.png was left out: " in printed.err


def test_lines_go_to_the_file_while_the_bar_shows_in_the_terminal(model, tmp_path):
    for number in range(40):
        Image.new("L", (28, 28), number).save(tmp_path / f"{number:02}.png")
    terminal, inside = pty.openpty()
    command = [sys.executable, "-m", "unitstep", "predict", str(tmp_path), "--model", str(model)]
    found = subprocess.run(command, stdout=subprocess.PIPE, stderr=inside, check=True)
    os.close(inside)
    assert len(found.stdout.splitlines()) == 40
    assert b"100%" in os.read(terminal, 10_000)
    os.close(terminal)


def test_a_huge_image_is_left_out(model, tmp_path):
    Image.new("1", (20_000, 20_000)).save(tmp_path / "huge.png")
    (answer,) = predict(images_in([tmp_path]), open_model(model))
    assert "DecompressionBomb" in answer.error


def test_mistakes_are_told(model, tmp_path, capsys):
    Image.new("L", (40, 40)).save(tmp_path / "a.png")
    (tmp_path / "empty").mkdir()
    for arguments, message in (
        ([str(tmp_path / "b.png"), "--model", str(model)], "b.png is not there"),
        ([str(tmp_path / "empty"), "--model", str(model)], "has no images"),
        ([str(tmp_path / "a.png"), "--model", str(tmp_path / "a.png")], "damaged or is no ONNX file"),
        (["--model", str(model)], "give image files or folders"),
    ):
        assert main(["predict", *arguments]) == 1
        assert message in capsys.readouterr().err


def test_prediction_needs_no_torch(model, tmp_path):
    Image.new("L", (40, 40)).save(tmp_path / "a.png")
    code = (
        "import sys; from unitstep.cli import main; "
        f"assert main(['predict', {str(tmp_path)!r}, '--model', {str(model)!r}]) == 0; "
        "print({name.split('.')[0] for name in sys.modules} & {'torch', 'datasets', 'safetensors'}); "
        "print(sorted(name for name in sys.modules if name.startswith('unitstep.')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *_, foreign, ours = done.stdout.splitlines()
    assert foreign == "set()"
    assert set(literal_eval(ours)) == {
        f"unitstep.{name}" for name in ("cli", "pictures", "predicting", "recipes", "running")
    }
    assert done.stdout.startswith(str(tmp_path / "a.png"))


def test_without_a_model_it_is_the_one_that_comes_with_the_package(tmp_path, capsys):
    Image.new("RGB", (320, 240), (90, 140, 230)).save(tmp_path / "sky.png")
    lines = []
    for runtime in ("onnxruntime", "openvino"):
        assert main(["predict", str(tmp_path / "sky.png"), "--runtime", runtime, "--top", "10"]) == 0
        printed = capsys.readouterr()
        assert "the CIFAR-10 network of the package answers; it knows airplane, automobile" in printed.err
        lines.append(printed.out)
    assert lines[0] == lines[1]
    assert all(name in lines[0] for name in open_model(SHIPPED).about["classes"])


def test_the_shipped_network_knows_what_its_card_says(data_folder, tmp_path, capsys):
    test = load_test(str(data_folder / "cifar10"), size=32, channels=3)
    model = open_model(SHIPPED)
    right = (model(test.images[:1000].numpy())[0].argmax(1) == test.labels[:1000].numpy()).mean()
    stated = float(re.search(r"\| accuracy \| ([\d.]+) %", SHIPPED.with_name("cifar10-t1.md").read_text())[1])
    assert abs(100 * right - stated) < 3  # of 1,000 images
    assert model.about["classes"] == list(test.classes)
    Image.fromarray(test.images[0].permute(1, 2, 0).numpy()).resize((320, 240)).save(tmp_path / "a.jpg")
    assert main(["predict", str(tmp_path / "a.jpg"), "--top", "1"]) == 0  # without --model
    printed = capsys.readouterr().out  # read once: it empties
    assert any(name in printed for name in test.classes)


def test_a_folder_named_like_an_image_and_wrong_numbers(model, tmp_path):
    (tmp_path / "x.png").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "x.png" / "y.png")
    assert [path.name for path in images_in([tmp_path])] == ["y.png"]
    with pytest.raises(ValueError, match="top must be 1 or more"):
        next(predict(images_in([tmp_path]), open_model(SHIPPED), top=0))
    for runtime in ("onnxruntime", "openvino"):
        with pytest.raises(ValueError, match="threads must be 1 or more, not -1"):
            open_model(SHIPPED, runtime, threads=-1)
