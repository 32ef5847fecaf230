"""The measurement against graphs whose memory is known by hand."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from torch import nn

from conftest import FP32, projected
from iexact_runner.config import SAGEConfig
from iexact_runner.data.graph import mean_adjacency
from iexact_runner.measure import SavedTensors, Throughput, peak_mib, reset_peak, time_epochs, total_bytes
from iexact_runner.nn import build_model
from iexact_runner.nn.baseline import PyGBaseline, baseline_graph


def kept(model, x):
    with SavedTensors(model, excluded=[x]) as saved:
        return saved.kept(model(x))


def test_known_chain_is_counted_tensor_by_tensor():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    records = kept(model, torch.randn(10, 4))
    # ReLU keeps its output, which the second layer keeps too: one storage. The input is excluded.
    assert [(record.shape, record.bytes) for record in records] == [((10, 8), 320)]


def test_storage_counts_once_and_whole():
    class Doubled(nn.Module):
        def forward(self, x):
            h = x * 1.0
            return h.exp().sum() + (h[:2].sin() * 1.0).sum() + h.cos().sum()

    x = torch.randn(10, 4, requires_grad=True)
    records = kept(Doubled(), x)
    # exp keeps its result; sin and cos keep h, one of them a slice of its storage.
    assert sorted(record.bytes for record in records) == [160, 160]


def test_what_is_freed_before_the_output_does_not_count():
    class Wasteful(nn.Module):
        def forward(self, x):
            (x * 2.0).exp()  # its graph dies here
            return (x * 3.0).sin()

    records = kept(Wasteful(), torch.randn(10, 4, requires_grad=True))
    assert [record.bytes for record in records] == [160]


def test_a_backward_pass_frees_what_it_has_used():
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(10, 4)
    with SavedTensors(model, excluded=[x]) as saved:
        out = model(x)
    assert len(saved.kept(out)) == 1 and len(saved._alive()) > 1
    out.sum().backward()
    assert not saved._alive()


def test_layers_are_named_by_their_module():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(3, 3)
            self.last = nn.Linear(3, 1)

        def forward(self, x):
            return self.last(torch.tanh(self.first(x)))

    records = kept(Net(), torch.randn(5, 3))
    assert [(record.layer, record.op) for record in records] == [("model", "TanhBackward0")]


def test_hooks_leave_with_the_context_even_after_an_error():
    class Failing(nn.Module):
        def forward(self, x):
            raise RuntimeError("no")

    with pytest.raises(RuntimeError, match="no"), SavedTensors(nn.Linear(1, 1), excluded=[]):
        Failing()(torch.ones(1))
    assert not nn.modules.module._global_forward_pre_hooks and not nn.modules.module._global_forward_hooks


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_fp32_keeps_what_plain_pyg_modules_keep(dataset, dropout):
    config = SAGEConfig(name="sage", num_layers=3, hidden_channels=16, dropout=dropout)
    model = build_model(config, in_channels=13, out_channels=3, compression=FP32)
    graph = mean_adjacency(dataset.edge_index, dataset.num_nodes)
    with SavedTensors(model, excluded=[dataset.x, *graph.tensors()]) as saved:
        ours = saved.kept(model(dataset.x, graph))
    baseline = PyGBaseline(config, in_channels=13, out_channels=3)
    operator = baseline_graph(graph, config)
    with SavedTensors(baseline, excluded=[dataset.x, operator]) as saved:
        theirs = saved.kept(baseline(dataset.x, operator))
    totals = [sum(record.bytes for record in records) for records in (ours, theirs)]
    assert totals[0] == pytest.approx(totals[1], rel=0.03)


@pytest.mark.parametrize("share_maps", [False, True])
def test_fp32_column_of_a_compressed_run_is_what_fp32_keeps(dataset, share_maps):
    """The list says what plain modules would keep in place of each map; on the published layout that adds up."""
    config = SAGEConfig(name="sage", num_layers=3, hidden_channels=16, dropout=0.5)
    graph = mean_adjacency(dataset.edge_index, dataset.num_nodes)
    totals = []
    for compression, column in (
        (FP32, "bytes"),
        (projected(bits=2, kept_frac=0.5, store_dropout_mask=True, share_maps=share_maps), "bytes_fp32"),
    ):
        model = build_model(config, in_channels=13, out_channels=3, compression=compression)
        with SavedTensors(model, excluded=[dataset.x, *graph.tensors()]) as saved:
            records = saved.kept(model(dataset.x, graph, seed=0))
        totals.append(sum(getattr(record, column) for record in records))
    if share_maps:  # three aggregated maps fewer, one of them (N, 13)
        totals[1] += dataset.num_nodes * 4 * (13 + 2 * 16)
    assert totals[0] == totals[1]


def test_total_bytes_counts_shared_storages_once_and_sparse_matrices_whole(dataset):
    x = torch.zeros(10)
    assert total_bytes([x, x[2:5], x.view(2, 5)]) == 40
    graph = mean_adjacency(dataset.edge_index, dataset.num_nodes)
    edges = dataset.edge_index.size(1)
    assert total_bytes([graph.matrix.tensor()]) == 4 * (dataset.num_nodes + 1) + 8 * edges


def test_throughput_figures():
    figures = Throughput.of([0.5, 0.25, 1.0, 0.1, 0.2], warmup_epochs=2).to_dict()
    assert figures["epochs_per_second"]["median"] == 4.0
    assert figures["epochs_per_second"]["p20"] == pytest.approx(1.8)
    assert figures["epochs_per_second"]["p80"] == pytest.approx(6.0)
    assert (figures["warmup_epochs"], figures["timed_epochs"]) == (2, 5)
    assert Throughput.of([2.0], warmup_epochs=0).to_dict()["epochs_per_second"] == {
        "median": 0.5,
        "p20": 0.5,
        "p80": 0.5,
    }


@pytest.mark.parametrize(
    ("seconds", "max_seconds", "expected"),
    [(0.01, 20, (4, 6)), (4.0, 20, (2, 5)), (10.0, 12, (1, 3))],
    ids=["all epochs", "budget", "three at least"],
)
def test_timing_stops_at_its_budget(seconds, max_seconds, expected):
    figures = time_epochs(lambda: seconds, warmup_epochs=4, timed_epochs=6, max_seconds=max_seconds)
    assert (figures.warmup_epochs, figures.timed_epochs) == expected


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the resident set is counted on Linux")
def test_peak_of_an_earlier_run_does_not_count():
    """400 MB written and freed before the reset do not appear in the peak after it, 200 MB written then do."""
    device = torch.device("cpu")
    gc.collect()  # what tests before it left would be given up at any time
    reset_peak(device)
    before = peak_mib(device)["peak_resident_mib"]
    torch.ones(100_000_000).sum()
    raised = peak_mib(device)["peak_resident_mib"]
    reset_peak(device)
    after = peak_mib(device)["peak_resident_mib"]
    torch.ones(50_000_000).sum()
    assert raised - before == pytest.approx(400e6 / 2**20, rel=0.1)
    assert after - before < 100
    assert peak_mib(device)["peak_resident_mib"] - after == pytest.approx(200e6 / 2**20, rel=0.1)
