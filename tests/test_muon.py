"""Orthogonalised steps: against the singular value decomposition and the equations."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from tests.small import small
from unitstep import Stage, ladder, train
from unitstep.muon import MOMENTUM, Muon, orthogonalised
from unitstep.rounding import round_weights_
from unitstep.runs import build_cnn, build_snn
from unitstep.whitening import whiten_


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (8, 8)])
def test_singular_values_become_one_and_directions_stay(shape):
    U = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    P, _, Qt = torch.linalg.svd(U, full_matrices=False)
    values = torch.logspace(0, -1.5, min(shape), dtype=torch.float64)
    for scale in (1.0, 1e-6, 1e6):
        X = orthogonalised(scale * P @ values.diag() @ Qt)
        inner = P.T @ X @ Qt.T
        assert (inner - inner.diag().diag()).abs().max() < 1e-9
        assert 0.65 < inner.diag().min() < inner.diag().max() < 1.25
    for scale in (0.0, 1e-40, 1e-28, 1e-24, 1e-20, 1e-15):  # of a layer that has fallen silent
        assert orthogonalised(scale * U.float()).abs().max() < 1


def test_two_steps_are_the_equations_and_the_rest_is_adamw():
    draw = torch.Generator().manual_seed(1)
    kernel, other = (nn.Parameter(torch.randn(shape, generator=draw)) for shape in ((4, 3, 3, 3), (5, 2)))
    twin, W, M = nn.Parameter(other.detach().clone()), kernel.detach().clone(), torch.zeros_like(kernel)
    mine = Muon([{"params": [other]}, {"params": [kernel], "orthogonal": True, "lr": 0.03}], lr=1e-2, weight_decay=0.3)
    adamw = torch.optim.AdamW([twin], lr=1e-2, weight_decay=0.3)
    for _ in range(2):
        kernel.grad, G = 2 * [torch.randn(kernel.shape, generator=draw)]
        other.grad = twin.grad = torch.randn(other.shape, generator=draw)
        mine.step()
        adamw.step()
        M = MOMENTUM * M + G
        W = math.sqrt(4) * W / W.norm() - 0.03 * orthogonalised((G + MOMENTUM * M).flatten(1)).view(W.shape)
        torch.testing.assert_close(kernel.detach(), W)
        assert torch.equal(other, twin)
        assert kernel.grad is G


@pytest.mark.parametrize("whiten", [False, True])
def test_kernels_in_front_of_batch_norms_take_them(whiten):
    for net, kernels in (("vgg-mini", 4), ("resnet20", 22)):
        r = small(1, net=net)
        snn = build_snn(r, build_cnn(r, 10))
        if whiten:
            whiten_(snn, torch.randint(256, (2, 1, 28, 28), dtype=torch.uint8), 1, fresh=False)
        round_weights_(snn, 8)
        *rest, normed = ladder._optimizer(snn, Stage(1, 1, 1e-3, "muon"), torch.device("cpu")).param_groups
        assert normed["times"] == 10
        assert [p.dim() for p in normed["params"]] == [4] * kernels
        assert [p.dim() for p in rest[0]["params"]] == [2]  # the readout
        assert sum(len(group["params"]) for group in (normed, *rest)) == len(list(snn.parameters()))


def test_without_norms_it_is_adamw_and_for_a_cnn_it_is_refused():
    snn = build_snn(small(1), nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2, 2)))
    kernels, vectors = ladder._optimizer(snn, Stage(1, 1, 1e-3, "muon"), torch.device("cpu")).param_groups
    assert len(kernels["params"]) == 2
    assert "orthogonal" not in kernels.keys() | vectors.keys()
    with pytest.raises(ValueError, match="muon is for spiking stages; for a CNN: nesterov"):
        Stage(None, 1, 0.1, "muon")


def test_a_kernel_of_two_modules_is_left_out():
    cnn = nn.Sequential()
    for _ in range(3):
        cnn.extend((nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), nn.ReLU()))
    cnn[6].weight = cnn[3].weight
    cnn.extend((nn.Flatten(), nn.Linear(3 * 16, 2)))
    snn = build_snn(small(1), cnn)
    (only,) = ladder._optimizer(snn, Stage(1, 1, 1e-3, "muon"), torch.device("cpu")).param_groups[-1]["params"]
    assert only is snn.get_parameter("0.weight")


def test_it_learns(unbroken, tmp_path):
    last = replace(small(1).stages[1], optimizer="muon", epochs=1.0)
    run = train(small(stages=(small().stages[0], last)), tmp_path / "run", cnn=unbroken)
    losses = [row["loss"] for row in run.log if row["stage"] == 1]
    assert losses[-1] < 0.85  # AdamW: 0.87
