"""Kept tensors on the host: the same gradients to the last bit, and nothing left where they came from."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

from iexact_runner.config import MODEL_CONFIGS, CompressionConfig
from iexact_runner.config.presets import preset
from iexact_runner.errors import ConfigError
from iexact_runner.measure import PeakMemory, SavedTensors
from iexact_runner.nn import build_model, compress
from iexact_runner.schemes import offload
from iexact_runner.training import forward

NAMES = ("sage", "gcn", "gcn2", "gat", "deepergcn")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def every_map(monkeypatch):
    """Small graphs have small maps."""
    monkeypatch.setattr(offload, "LEAST_BYTES", 1 << 6)


def made(name, compression):
    config = MODEL_CONFIGS[name](name=name, num_layers=4, hidden_channels=16, dropout=0.5)
    torch.manual_seed(0)
    return build_model(config, in_channels=13, out_channels=3, compression=compression).train()


def gradient(name, compression, dataset):
    model = made(name, compression)
    scores = forward(model, dataset.x, model.build_graph(dataset.edge_index, dataset.num_nodes), seed=5)
    torch.nn.functional.cross_entropy(scores, dataset.y).backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("scheme", ["none", "plain", "recompute", "iexact", "lowrank", "lowrank_fine", "actnn"])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_the_same_to_the_last_bit(name, scheme, dataset, tmp_path):
    there = gradient(name, preset(scheme), dataset)
    away = gradient(name, preset(scheme, offload=True, offload_folder=str(tmp_path)), dataset)
    assert torch.equal(there, away)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("scheme", ["none", "recompute", "int4"])
def test_what_was_kept_is_on_the_host(scheme, dataset):
    def kept(compression):
        model = made("sage", compression)
        graph = model.build_graph(dataset.edge_index, dataset.num_nodes)
        with SavedTensors(model, excluded=[dataset.x, *graph.tensors()]) as saved:
            records = saved.kept(forward(model, dataset.x, graph, seed=1))
        return sum(record.bytes for record in records), sum(record.host_bytes for record in records)

    there, nothing = kept(preset(scheme))
    left, moved = kept(preset(scheme, offload=True))
    assert nothing == 0 and left + moved == there
    assert left < 0.2 * there


def test_the_peak_of_a_step_falls(dataset):
    def peak(compression):
        model = made("gcn", compression)
        graph = model.build_graph(dataset.edge_index, dataset.num_nodes)
        with PeakMemory(CPU) as memory:
            forward(model, dataset.x, graph, seed=1).sum().backward()
        return memory.bytes

    assert peak(preset("offload")) < 0.7 * peak(preset("none"))


def test_a_tensor_that_several_operations_save_moves_once(monkeypatch):
    counted = []
    real = offload.HostMap.new

    def new(*args, **kwargs):
        counted.append(args)
        return real(*args, **kwargs)

    monkeypatch.setattr(offload.HostMap, "new", new)
    weight = torch.randn(40, 40, requires_grad=True)
    features = torch.randn(40, 40)
    with offload.Offload([features], folder=None):
        h = features @ weight  # saves the features, which are held anyway
        out = (h.sin() * h.cos()).sum() + (h * h).sum()
    assert len(counted) == 3  # h, sin(h), cos(h)
    out.backward()
    expected = weight.detach().clone().requires_grad_()
    h = features @ expected
    ((h.sin() * h.cos()).sum() + (h * h).sum()).backward()
    assert torch.equal(weight.grad, expected.grad)


def test_a_tensor_that_is_written_to_between_is_moved_again():
    x = torch.full((64, 64), 2.0, requires_grad=True)
    with offload.Offload([], folder=None):
        h = x * 1.0
        a = (h * h.detach()).sum()
        with torch.no_grad():
            h.mul_(3.0)
        b = (h * h.detach()).sum()
    (a + b).backward()
    assert torch.equal(x.grad, torch.full_like(x, 2.0 + 6.0))


def test_hooks_further_out_see_what_is_held(dataset):
    """One call each way for every tensor, so that a count of what is saved stays true."""
    packed, unpacked = [], []

    def pack(tensor):
        packed.append(tensor)
        return tensor

    def unpack(tensor):
        unpacked.append(tensor)
        return tensor

    model = made("sage", preset("offload"))
    graph = model.build_graph(dataset.edge_index, dataset.num_nodes)
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        loss = forward(model, dataset.x, graph, seed=1).sum()
    loss.backward()
    moved = [tensor for tensor in packed if offload.is_offloaded(tensor)]
    assert moved and all(not tensor.requires_grad for tensor in moved) and unpacked


def test_a_folder_that_cannot_hold_the_files_is_one_line(dataset, tmp_path):
    missing = tmp_path / "missing"
    with pytest.raises(ConfigError) as raised:
        gradient("sage", preset("offload", offload_folder=str(missing)), dataset)
    assert str(raised.value).startswith(f"compression.offload_folder={missing}: cannot hold a file of 0 MiB: No such")


def test_a_compressed_module_moves_its_maps_too(dataset):
    def step(**fields):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(13, 64), nn.ReLU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 3))
        compress(model, "int4", seed=2, **fields)
        scores = model(dataset.x)
        held = [each for each in _saved(scores) if offload.is_offloaded(each)]
        scores.square().sum().backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()]), len(held)

    (there, none), (away, moved) = step(), step(offload=True)
    assert torch.equal(there, away) and none == 0 and moved >= 2


def _saved(scores):
    """Tensors that the nodes behind a tensor hand out."""
    pending, found = [scores.grad_fn], []
    while pending:
        node = pending.pop()
        if node is None:
            continue
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            found += [each for each in node.saved_tensors if each is not None]
        pending += [parent for parent, _ in node.next_functions]
    return found


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files as Linux lists them")
def test_no_file_stays_open(dataset):
    gradient("sage", preset("offload"), dataset)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        gradient("sage", preset("offload"), dataset)
    assert len(os.listdir("/proc/self/fd")) == before


def test_it_is_off_where_nothing_is_kept(dataset):
    model = made("sage", preset("offload"))
    graph = model.build_graph(dataset.edge_index, dataset.num_nodes)
    with torch.no_grad():
        assert forward(model, dataset.x, graph).isfinite().all()
    with offload.offloading(CompressionConfig(scheme="none"), [dataset.x]) as nothing:
        assert nothing is None
