"""The peak tracker, and the discipline it shows: few maps alive beside what is kept."""

from __future__ import annotations

import ctypes
import itertools
from contextlib import suppress

import pytest
import torch
import torch.nn.functional as F

from conftest import projected
from iexact_runner.config import CompressionConfig, DeeperGCNConfig, GATConfig, GCN2Config, GCNConfig, SAGEConfig
from iexact_runner.measure.peak import PeakMemory, record_allocations
from iexact_runner.nn import MODELS, build_model

NODES, WIDTH, CLASSES = 6000, 64, 8
MAP = 4 * NODES * WIDTH
CPU = torch.device("cpu")


def test_peak_is_the_most_at_one_moment():
    resident = torch.zeros(1000)
    with PeakMemory(CPU) as peak:
        first = resident + 1
        second = first + 1
        del first
        third = second + 1
        del second
    assert third.numel() == 1000
    assert 8000 <= peak.bytes < 9000


def test_peak_on_a_gpu_is_that_of_the_context_alone(monkeypatch):
    """Neither a higher one before it, nor what was allocated before."""
    memory = {"now": 300, "most": 900}

    def reset(device):
        memory["most"] = memory["now"]

    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: memory["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: memory["most"])
    with PeakMemory(torch.device("cuda")) as peak:
        memory["most"] = 450
    assert peak.bytes == 150
    with PeakMemory(torch.device("cuda")) as peak:
        pass
    assert peak.bytes == 0


def test_memory_inside_of_operators_counts():
    x = torch.zeros(1000, 100)
    with PeakMemory(CPU) as peak:
        total = (x.double() + 1).sum().item()
    assert total == 100_000
    assert peak.bytes >= 2 * 800_000


def test_a_peak_is_recorded_when_the_work_fails():
    peak = PeakMemory(CPU)
    with pytest.raises(RuntimeError, match="no"), peak:
        kept = torch.zeros(1000)
        raise RuntimeError("no")
    assert kept.numel() == 1000 and peak.bytes >= 4000


def test_nothing_is_printed(capfd):
    """Also if what was there before is released, of which torch would warn; other warnings stay on."""
    level = ctypes.c_int.in_dll(ctypes.CDLL(torch._C.__file__), "FLAGS_caffe2_log_level")
    usual = level.value
    for error in (None, RuntimeError):
        before = torch.zeros(1000)
        with suppress(RuntimeError), PeakMemory(CPU):
            del before
            if error is not None:
                raise error
    assert capfd.readouterr() == ("", "") and level.value == usual


@pytest.fixture(scope="module")
def graph():
    generator = torch.Generator().manual_seed(0)
    edges = torch.randint(NODES, (2, 2 * NODES), generator=generator)
    edges = torch.unique(torch.cat([edges, edges.flip(0)], dim=1), dim=1).int()
    x = torch.randn(NODES, WIDTH, generator=generator)
    return edges, x, torch.randint(CLASSES, (NODES,), generator=generator)


def maps_alive(config, compression, graph):
    """Most maps of hidden width that one training step holds at a moment; what is kept compressed is smaller."""
    edges, x, y = graph
    operator = MODELS[config.name].build_graph(edges, NODES)
    model = build_model(config, in_channels=WIDTH, out_channels=CLASSES, compression=compression).train()

    def step():
        F.cross_entropy(model(x, operator, seed=1), y).backward()

    step()  # gradients of the weights, and compiled kernels, are there already
    with record_allocations() as changes:
        step()
    return max(itertools.accumulate((change > 0) - (change < 0) for change in changes if abs(change) >= 0.9 * MAP))


FIELDS = dict(num_layers=3, hidden_channels=WIDTH, dropout=0.5)
LAYOUTS = {
    "published": projected(bits=2, kept_frac=0.125, col_size=64, max_block_size=1024, store_dropout_mask=True),
    "shared": projected(bits=2, kept_frac=0.125, share_maps=True),
    "int8": projected(bits=8),
    "lowrank": CompressionConfig(scheme="lowrank", bits=4, rank=8, col_size=4, share_maps=True),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    ("config", "most"),
    [
        (SAGEConfig(name="sage", **FIELDS), 3),
        (SAGEConfig(name="sage", residual=True, **FIELDS), 3),
        (SAGEConfig(name="sage", batch_norm=False, **FIELDS), 3),
        (GCNConfig(name="gcn", **FIELDS), 3),
        (GCNConfig(name="gcn", residual=True, **FIELDS), 3),
        # One more for the initial map that all layers add.
        (GCN2Config(name="gcn2", **FIELDS), 4),
        (GATConfig(name="gat", heads=2, **(FIELDS | {"hidden_channels": WIDTH // 2})), 4),
        # The sum that runs past all layers, beside those of a GAT layer.
        (DeeperGCNConfig(name="deepergcn", **FIELDS), 5),
    ],
    ids=["sage", "sage-residual", "sage-no-norm", "gcn", "gcn-residual", "gcn2", "gat", "deepergcn"],
)
def test_few_maps_are_alive_at_any_moment(config, most, layout, graph):
    pytest.importorskip("numba")  # the reference kernels are plain PyTorch, with its temporaries
    assert maps_alive(config, LAYOUTS[layout], graph) <= most
