"""NIR files, read and run by other libraries: the same spikes."""

import subprocess
import sys
from collections import OrderedDict

import numpy as np
import pytest
import torch
from torch import nn

from tests.test_exporting import IMAGES, SHIFTED, SMALL, ReadsItsSize, spiking, with_leaf
from tests.test_fusing import EACH, ONE
from unitstep import nets, pretrained, record, to_nir, to_spiking
from unitstep.data import load_test
from unitstep.nets import Normalize

nir = pytest.importorskip("nir", reason="NIR needs nir (the nir extra)")


def by_snntorch(path):
    from snntorch.import_nir import import_from_nir

    net = import_from_nir(nir.read(path))
    for module in net.modules():
        if hasattr(module, "init_hidden"):  # its IF would return the membrane too
            module.init_hidden = True
    return net


def by_spikingjelly(path):
    from spikingjelly.activation_based.nir_exchange import import_from_nir

    return import_from_nir(path, dt=1.0)  # it reads r·dt = 1


def by_norse(path):
    norse = pytest.importorskip("norse.torch", reason="norse is not installed (pip install --no-deps norse)")
    return norse.from_nir(nir.read(path), dt=1.0)


def by_sinabs(path):
    pytest.importorskip("sinabs", reason="sinabs is not installed (pip install --no-deps sinabs pbr)")
    import sinabs.activation
    import sinabs.nir

    net = sinabs.nir.from_nir(nir.read(path), batch_size=256)
    for module in net.modules():
        if hasattr(module, "spike_fn"):  # else a neuron far above its threshold fires twice
            module.spike_fn = sinabs.activation.SingleSpike
    return net


PEERS = {  # and the pools that they read
    "snntorch": (by_snntorch, "mean"),
    "spikingjelly": (by_spikingjelly, "mean"),
    "norse": (by_norse, "sum"),
    "sinabs": (by_sinabs, "sum"),
}


def spikes_of(net, images, names):
    """Logits, and by name the spikes of each neuron layer of a peer's module."""
    seen = {}

    def note(name):
        def hook(module, inputs, output):
            seen.setdefault(name, (output[0] if isinstance(output, tuple) else output) != 0)

        return hook

    hooks = [net.get_submodule(name).register_forward_hook(note(name)) for name in names]
    with torch.no_grad():
        output = net(images)
    for hook in hooks:
        hook.remove()
    return output[0] if isinstance(output, tuple) else output, seen


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of theirs
@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("kind", ["shipped", "max pools", "threshold per channel"])
def test_other_libraries_read_it_and_have_the_same_spikes(kind, peer, tmp_path):
    images = load_test("fashion-mini", size=28, channels=1).images[:256]
    snn = pretrained("fashion-mini-t1")
    if kind != "shipped":
        torch.manual_seed(0)
        pool = "max" if kind == "max pools" else "avg"
        cnn = nets.build("vgg-mini", classes=10, channels=1, size=28, pool=pool, zero_point=(73,)).eval()
        snn = to_spiking(cnn, images, steps=1, **(EACH if kind == "threshold per channel" else ONE))
    path = tmp_path / "net.nir"
    read, pools = PEERS[peer]
    to_nir(snn, path, images, pools=pools)
    with torch.no_grad(), record(snn) as wanted:
        expected = snn(images)
    logits, seen = spikes_of(read(path), snn.get_submodule("normalize")(images), list(snn.lifs))
    for name, layer in wanted.items():
        assert (seen[name] != layer.spikes[0]).sum() <= 3, name  # of neurons at their thresholds
    assert (logits.argmax(1) != expected.argmax(1)).sum() <= 1


def test_every_architecture_is_written_or_refused_by_name(tmp_path):
    cnn = nets.build("resnet20", classes=3, size=12)
    with pytest.raises(ValueError, match=r"NIR has no form of these operations: add add$"):
        to_nir(to_spiking(cnn, IMAGES, steps=1, **ONE), tmp_path / "net.nir", IMAGES)
    odd = spiking(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.PixelShuffle(2), nn.Flatten(), nn.Linear(800, 5))
    with pytest.raises(ValueError, match="PixelShuffle"):
        to_nir(odd, tmp_path / "net.nir", IMAGES)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("pools", ["mean", "sum"])
def test_heights_that_meet_no_weights_are_written(pools, tmp_path):
    """A network that ends in spikes: what they are worth, for each channel, is a node of its own."""
    layers = [nn.Conv2d(3, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    snn = spiking(*layers, **EACH)
    graph = to_nir(snn, tmp_path / "net.nir", IMAGES, pools=pools)
    kinds = [type(node).__name__ for node in graph.nodes.values()]
    assert kinds.count("Scale") == 1
    conv, fire, scale = (
        next(n for n in graph.nodes.values() if type(n).__name__ == k) for k in ("Conv2d", "IF", "Scale")
    )
    with torch.no_grad():
        x = nets.Normalize((121,), (1 / 64,))(IMAGES)
        current = nn.functional.conv2d(x, torch.from_numpy(conv.weight), torch.from_numpy(conv.bias))
        counts = (current > torch.from_numpy(fire.v_threshold)).float().mean((2, 3), keepdim=True)
        given = counts * (100 if pools == "sum" else 1) * torch.from_numpy(scale.scale)
        np.testing.assert_allclose(given.flatten(1), snn(IMAGES), rtol=1e-5)


def test_grouped_convolutions_are_written_as_whole_ones(tmp_path):
    grouped = nn.Conv2d(8, 12, 3, groups=4)
    snn = spiking(nn.Conv2d(3, 8, 3), nn.ReLU(), grouped, nn.ReLU(), nn.Flatten(), nn.Linear(768, 5), **ONE)
    to_nir(snn, tmp_path / "net.nir", IMAGES)
    conv = [node for node in nir.read(tmp_path / "net.nir").nodes.values() if isinstance(node, nir.Conv2d)][1]
    x = torch.rand(2, 8, 10, 10)
    V = list(snn.lifs.values())
    ours = (grouped(x) - grouped.bias.view(-1, 1, 1)) * (V[0].threshold / V[1].threshold)
    found = nn.functional.conv2d(x, torch.from_numpy(conv.weight))
    torch.testing.assert_close(found, ours, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["input", "output"])
def test_a_layer_may_be_called_as_the_ends_of_the_graph_are(name, tmp_path):
    cnn = nets.build("vgg-mini", classes=10, size=12)
    layers = {name if key == "readout" else key: module for key, module in cnn.named_children()}
    snn = to_spiking(nn.Sequential(OrderedDict(layers)).eval(), IMAGES, steps=1)
    graph = to_nir(snn, tmp_path / "net.nir", IMAGES)
    last = dict(edge[::-1] for edge in graph.edges)["output"]
    assert graph.nodes[last].weight.shape[0] == 10
    assert len(graph.edges) == len(graph.nodes) - 1


def test_a_sum_pool_at_the_end_is_refused(tmp_path):
    odd = spiking(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 5, 1), nn.AvgPool2d(12), nn.Flatten())
    with pytest.raises(ValueError, match="write mean pools"):
        to_nir(odd, tmp_path / "net.nir", IMAGES, pools="sum")


def test_a_normalisation_behind_something_else_is_refused(tmp_path):
    """It is not what the graph's input could be taken behind."""
    cnn = nn.Sequential(nn.AvgPool2d(2), Normalize((121,), (1 / 64,)), nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten())
    snn = to_spiking(nn.Sequential(*cnn, nn.Linear(128, 5)).eval(), IMAGES.float(), steps=1)
    with pytest.raises(ValueError, match="NIR has no form of these operations: Normalize _1"):
        to_nir(snn, tmp_path / "net.nir", IMAGES.float())


def test_more_than_one_timestep_is_refused_with_the_reason(tmp_path):
    with pytest.raises(ValueError, match="no soft reset"):
        to_nir(spiking(*SMALL), tmp_path / "net.nir", IMAGES, steps=2)


def test_it_is_made_of_the_standards_nodes(tmp_path):
    to_nir(spiking(*SMALL), tmp_path / "net.nir", IMAGES)
    graph = nir.read(tmp_path / "net.nir")
    kinds = [type(node).__name__ for node in graph.nodes.values()]
    assert sorted(kinds) == ["Affine", "AvgPool2d", "Conv2d", "Conv2d", "Flatten", "IF", "IF", "Input", "Output"]


def test_without_nir_it_says_how_to_get_it(tmp_path):
    code = (
        "import sys; sys.modules['nir'] = None; import torch; from tests.test_exporting import *; "
        "from unitstep import to_nir; to_nir(spiking(*SMALL), 'net.nir', IMAGES)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "pip install nir" in done.stderr


def test_a_network_that_reads_the_number_of_its_images(tmp_path):
    images = torch.randint(256, (8, 3, 12, 12), dtype=torch.uint8)
    to_nir(to_spiking(ReadsItsSize().eval(), images, steps=1), tmp_path / "a.nir", images)


@pytest.mark.parametrize("layer", SHIFTED)
def test_leaves_that_are_more_than_their_class_of_torch_are_refused(layer, tmp_path):
    with pytest.raises(ValueError, match=f"NIR has no form of these operations: {type(layer).__name__} _3"):
        to_nir(with_leaf(layer), tmp_path / "net.nir", IMAGES)


def test_other_precisions_are_refused_by_name(tmp_path):
    with pytest.raises(ValueError, match=r"weights are torch.bfloat16.*snn.float\(\)"):
        to_nir(spiking(*SMALL).bfloat16(), tmp_path / "net.nir", IMAGES)
