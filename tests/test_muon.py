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
    assert orthogonalised(torch.zeros(shape)).eq(0).all()  # of a layer that is silent


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
        r = small(1, net=net, whiten=whiten)
        snn = build_snn(r, build_cnn(r, 10))
        round_weights_(snn, 8)
        *rest, normed = ladder._optimizer(snn, Stage(1, 1, 1e-3, "muon"), torch.device("cpu")).param_groups
        assert normed["times"] == 10
        assert [p.dim() for p in normed["params"]] == [4] * kernels
        assert [p.dim() for p in rest[0]["params"]] == [2]  # the readout
        assert sum(len(group["params"]) for group in (normed, *rest)) == len(list(snn.parameters()))


def test_it_is_refused_where_there_is_no_norm(unbroken, tmp_path):
    with pytest.raises(ValueError, match="muon is for spiking stages; for a CNN: nesterov"):
        Stage(None, 1, 0.1, "muon")
    stages = (small().stages[0], replace(small(1).stages[1], optimizer="muon"))
    with pytest.raises(ValueError, match="norm fold leaves none: choose adamw, or norm keep"):
        small(stages=stages, norm="fold")
    bare = small(1)
    snn = build_snn(bare, nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="this network has none: begin a run with another"):
        ladder._optimizer(snn, stages[1], torch.device("cpu"))


def test_it_learns(unbroken, tmp_path):
    last = replace(small(1).stages[1], optimizer="muon", epochs=1.0)
    run = train(small(stages=(small().stages[0], last)), tmp_path / "run", cnn=unbroken)
    losses = [row["loss"] for row in run.log if row["stage"] == 1]
    assert losses[-1] < 0.9  # AdamW: 0.87
