"""Rows of a map that one of several processes has: sums, samples and draws are those of the whole map."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from conftest import tiny_dataset
from iexact_runner.config import SAGEConfig
from iexact_runner.data.partitioned import PartitionedEdges, with_exact_messages
from iexact_runner.kernels import block_ops, ops, reference, sketch_ops
from iexact_runner.kernels.ops import RowSeed
from iexact_runner.parallel import messages
from iexact_runner.parallel.halo import Halo, Traffic
from iexact_runner.parallel.halo import _Rows as Gathered
from iexact_runner.parallel.messages import format_of
from iexact_runner.parallel.shard import WHOLE, DistributedShard, column_statistics, sampled_rows
from iexact_runner.problem import prepare
from iexact_runner.sampling.parallel import aligned_order
from parallel.processes import in_processes

NODES, WIDTH, CUTS = 1050, 24, (0, 400, 400, 1050)
ROWS = slice(400, 1050)
SEED = 11


def whole_map(dtype=torch.float32):
    return torch.randn(NODES, WIDTH, generator=torch.Generator().manual_seed(0)).to(dtype)


def test_sampled_rows_are_spread_over_the_map():
    rows = sampled_rows(1050, 100, device=torch.device("cpu"))
    assert rows.numel() == 100 and rows[0] == 0 and rows[-1] == 1039
    assert set(rows.diff().tolist()) == {10, 11}
    assert torch.equal(sampled_rows(5, 100, device=torch.device("cpu")), torch.arange(5))


def found_by_a_process(team):
    shard, x = DistributedShard(CUTS, team.rank), whole_map()[CUTS[team.rank] : CUTS[team.rank + 1]]
    running = [torch.zeros(WIDTH), torch.ones(WIDTH)]
    statistics = column_statistics(x, *running, 0.3, shard)
    model = nn.Linear(3, 2)
    model.weight.grad, model.bias.grad = torch.full((2, 3), float(team.rank)), None
    if team.rank == 1:  # which has no rows
        model.bias.grad = torch.ones(2)
    shard.sum_gradients(model.parameters())
    figures = (shard.sample(x, 100), shard.mean(x), *statistics, *running, model.weight.grad, model.bias.grad)
    return [figure.numpy() for figure in figures]


def test_sums_and_samples_are_those_of_the_whole_map():
    x, running = whole_map(), [torch.zeros(WIDTH), torch.ones(WIDTH)]
    statistics = column_statistics(x, *running, 0.3)
    expected = (WHOLE.sample(x, 100), WHOLE.mean(x), *statistics, *running, torch.full((2, 3), 3.0), torch.ones(2))
    for found in in_processes(3, found_by_a_process):
        assert np.array_equal(found[0], expected[0].numpy())  # the very rows
        for actual, right in zip(found[1:], expected[1:], strict=True):
            np.testing.assert_allclose(actual, right.numpy(), rtol=2e-6, atol=1e-6)


def statistics_of_a_process(team, dtype):
    shard, x = DistributedShard(CUTS, team.rank), whole_map(dtype)[CUTS[team.rank] : CUTS[team.rank + 1]]
    return [each.numpy() for each in column_statistics(x, None, None, 0.3, shard)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_statistics_of_other_types_are_no_less_exact_and_one_type_in_every_process(dtype):
    """One process has no rows, and so nothing of the map's type."""
    variance, mean = torch.var_mean(whole_map(dtype).double(), dim=0, correction=0)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    for found in in_processes(3, statistics_of_a_process, dtype):
        for actual, right in zip(found, (mean, variance), strict=True):
            assert actual.dtype == (np.float64 if dtype == torch.float64 else np.float32)
            np.testing.assert_allclose(actual, right.numpy(), rtol=tolerance, atol=tolerance)


def test_messages_of_a_graph_that_is_whole_are_exact_already():
    graph = prepare(tiny_dataset(), SAGEConfig(name="sage"), inductive=False, device=torch.device("cpu")).training.graph
    assert with_exact_messages(graph) is graph


CALLS = {
    "dropout": lambda x, seed, backend: [ops.dropout(x, p=0.3, seed=seed, backend=backend)],
    "leaky_relu_dropout": lambda x, seed, backend: ops.leaky_relu_dropout(
        x, negative_slope=0.0, p=0.3, seed=seed, backend=backend
    )[:1],
    "leaky_relu_dropout_backward": lambda x, seed, backend: [
        ops.leaky_relu_dropout_backward(x, signs(x), negative_slope=0.0, p=0.3, seed=seed, backend=backend)
    ],
    "normalize_relu_dropout": lambda x, seed, backend: block_ops.normalize_relu_dropout(
        x, *[torch.ones(WIDTH)] * 4, p=0.3, seed=seed, backend=backend
    )[:1],
    "gated_gradient": lambda x, seed, backend: [
        block_ops.gated_gradient(x, signs(x), x[:, :5], DIRECTIONS, *FACTORS, p=0.3, seed=seed, backend=backend)
    ],
    "decode_relu_dropout": lambda x, seed, backend: [
        block_ops.decode_relu_dropout(x[:, :5], DIRECTIONS, FACTORS[0], signs(x), p=0.3, seed=seed, backend=backend)
    ],
    "signs": lambda x, seed, backend: [round_trip(x, seed, backend)],
    "quantize": lambda x, seed, backend: [
        ops.quantize(x, bits=8, block_size=WIDTH, levels=None, seed=seed, backend=backend)[0].view(-1, WIDTH)
    ],
    "quantize_product": lambda x, seed, backend: [
        block_ops.quantize_product(
            x, torch.eye(WIDTH), torch.zeros(WIDTH), bits=8, block_size=WIDTH, levels=None, seed=seed, backend=backend
        )[0].view(-1, WIDTH)
    ],
}
DIRECTIONS, FACTORS = torch.randn(WIDTH, 5), (torch.ones(WIDTH), torch.zeros(WIDTH))


def signs(x):
    return reference.pack((x > 0).flatten().byte(), 1)


def round_trip(x, seed, backend):
    """Signs that dropout keeps, stored and read again: rows of bits."""
    sketch = (x[:, :5].contiguous(), DIRECTIONS, FACTORS[1], torch.full((WIDTH,), 0.5))
    options = {"exact": True, "p": 0.3, "seed": seed, "backend": backend}
    streams, counts = sketch_ops.pack_signs(signs(x), *sketch, **options)
    stream = sketch_ops.join_streams(streams, counts, capacity=streams.numel(), backend=backend)
    mask, wrong = sketch_ops.unpack_signs(stream, counts, *sketch, **options)
    assert not wrong
    return reference.unpack(mask, x.numel(), 1).view(x.shape)


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("name", CALLS)
def test_rows_draw_what_they_draw_in_the_whole_map(name, backend):
    x, call = whole_map(), CALLS[name]
    for expected, found in zip(
        call(x, RowSeed.of(SEED, 0), backend), call(x[ROWS], RowSeed.of(SEED, ROWS.start), backend), strict=True
    ):
        assert torch.equal(found, expected[ROWS])
    (other,) = call(x[ROWS], SEED, backend)
    assert not torch.equal(other, call(x, SEED, backend)[0][ROWS])


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_sums_of_rows_add_up_to_that_of_the_map(backend):
    x = (4 * whole_map()).round()
    coefficients, directions = x[:, :5], DIRECTIONS.round()

    def sums(rows):
        part = x[rows]
        drawing = {"p": 0.5, "seed": RowSeed.of(SEED, rows.start), "backend": backend}
        return block_ops.gated_sums(part, signs(part), coefficients[rows], directions, **drawing)

    assert torch.equal(sums(slice(0, 400)) + sums(ROWS), sums(slice(0, NODES)))


@pytest.mark.parametrize("rows", [1, 8, 64])
def test_parts_begin_with_whole_blocks(rows):
    parts = np.random.default_rng(0).integers(4, size=501)
    order = aligned_order(parts, 4, rows=rows)
    assert sorted(order.nodes.tolist()) == list(range(501)) and order.cuts[0] == 0 and order.cuts[-1] == 501
    assert all(cut % rows == 0 for cut in order.cuts[:-1])
    sizes = np.bincount(parts, minlength=4).cumsum()
    assert all(abs(cut - end) <= rows / 2 for cut, end in zip(order.cuts[1:-1], sizes[:-1], strict=True))
    assert aligned_order(np.zeros(5, int), 3, rows=8).cuts == (0, 5, 5, 5)


def exchanged(team, name, draws):
    """Rows 0 to 2 of the next process, as they come, many times over; and bytes of one exchange."""
    shard = DistributedShard([0, 40, 80], team.rank)
    x = torch.randn(40, 7, generator=torch.Generator().manual_seed(team.rank)) + 3
    first = 40 - shard.start
    halo = Halo.of(shard, torch.arange(first, first + 3), form=format_of(name, rank=3))
    scale = torch.full((40, 1), 2.0)
    total, squares = torch.zeros(3, 7, dtype=torch.float64), torch.zeros(3, 7, dtype=torch.float64)
    for draw in range(draws):
        halo.draws.begin(1000 * draw)
        rows = torch.cat([part for _, part in halo.exchange(x, scale)], dim=1)
        total += rows
        squares += rows.double().square()
    mean = total / draws
    return (2 * x[:3]).numpy(), mean.numpy(), (squares / draws - mean.square()).numpy(), halo.traffic.sent_bytes / draws


@pytest.mark.parametrize(
    ("messages", "row_bytes"),
    [("fp32", 28), ("bf16", 14), ("int8", 7 + 4), ("int4", 4 + 4), ("int2", 2 + 4), ("lowrank", 3 + 28 + 4)],
)
def test_rows_come_as_they_were_sent_on_average(messages, row_bytes):
    draws = 1 if messages in ("fp32", "bf16") else 4000
    found = in_processes(2, exchanged, messages, draws)
    assert all(sent == 3 * row_bytes for *_, sent in found)
    for (own, *_), (_, mean, variance, _) in zip(found, reversed(found), strict=True):
        if messages == "fp32":
            assert np.array_equal(mean, own)
        elif messages == "bf16":
            np.testing.assert_allclose(mean, own, rtol=2**-8)
        else:
            deviations = np.sqrt(np.maximum(variance, 1e-12) / draws)
            assert np.all(np.abs(mean - own) <= 5 * deviations + 2e-3)
            assert (variance > 0).mean() > 0.5


def test_a_process_alone_waits_for_nobody():
    halo = Halo.of(DistributedShard([0, 8], 0), torch.arange(0))
    assert [rows.shape for _, rows in halo.exchange(torch.ones(8, 3))] == [(0, 3)]
    assert halo.traffic == Traffic(sent_bytes=0, waiting_seconds=0.0, exchanges=1)


def test_low_rank_messages_hold_what_the_leading_directions_do(monkeypatch):
    """Of rows in more directions than travel, that is their projection, whatever runs of rows it is found in."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(90, 5, generator=generator) @ torch.randn(5, 24, generator=generator)
    rows += 0.01 * torch.randn(90, 24, generator=generator)
    counts, seeds = (30, 0, 60), iter(range(100))
    left, scales, right = torch.linalg.svd(rows, full_matrices=False)
    found = {}
    for chunk in (1, 8 << 20):
        monkeypatch.setattr(messages, "CHUNK_BYTES", chunk)
        for rank in (3, 5, 40):
            form = messages.LowRank(rank)
            message = form.encode(rows, counts, lambda: next(seeds))
            assert message.numel() == sum(form.length(count, 24) for count in counts)
            kept = min(rank, 24)
            found[rank] = form.decode(message, counts, 24, slice(None))
            expected = left[:, :kept] * scales[:kept] @ right[:kept]
            assert (found[rank] - expected).norm() < 0.01 * rows.norm()
            columns = form.decode(message, counts, 24, slice(8, 16))
            torch.testing.assert_close(columns, found[rank][:, 8:16])
    assert (found[3] - rows).norm() > 10 * (found[5] - rows).norm()


@pytest.mark.parametrize("name", ["fp32", "bf16", "int8", "int4", "lowrank"])
def test_a_share_of_the_rows_stands_for_all_on_average(name):
    rows = torch.randn(90, 6, generator=torch.Generator().manual_seed(0))
    form, counts, seeds, draws = format_of(name, rank=8, share=0.4), (31, 0, 59), itertools.count(), 3000
    index = torch.randperm(200, generator=torch.Generator().manual_seed(1))[:90]
    held = torch.zeros(200, 6)
    held[index] = rows / 2
    sent = Gathered(held, index, torch.full((200, 1), 2.0))
    total, squares = torch.zeros(90, 6), torch.zeros(90, 6)
    for _ in range(draws):
        message = form.encode(sent, counts, lambda: next(seeds))
        assert message.numel() == sum(form.length(count, 6) for count in counts)
        found = form.decode(message, counts, 6, slice(None))
        total += found
        squares += found.square()
    mean = total / draws
    deviations = ((squares / draws - mean.square()) / draws).sqrt()
    assert ((mean - rows).abs() <= 5 * deviations + 2e-3).all()
    came = found.abs().sum(1) > 0
    assert came[:31].sum() == 13 and came[31:].sum() == 24
    if name == "fp32":
        torch.testing.assert_close(found[:31][came[:31]], rows[:31][came[:31]] * 31 / 13)
        assert form.length(31, 6) == 13 * (4 + 6 * 4)
    torch.testing.assert_close(form.decode(message, counts, 6, slice(2, 5)), found[:, 2:5])


def test_what_travels_at_once_has_a_limit():
    halo = Halo(DistributedShard([0, 8], 0), torch.arange(0), (0,), (0,), most=100_000)
    runs = halo.column_runs(130)
    assert runs[0] == slice(0, 16) and runs[-1] == slice(128, 130) and len(runs) == 9
    assert replace(halo, most=0).column_runs(130) == [slice(0, 130)]
    assert replace(halo, most=10**9).column_runs(20) == [slice(0, 8), slice(8, 16), slice(16, 20)]


def test_edges_that_are_left_out_leave_the_halo():
    halos = [Halo(DistributedShard([0, 2], 0), torch.arange(0), (0,), (0,), most=most) for most in (1, 2)]
    edges = PartitionedEdges(torch.tensor([0, 2, 3]), torch.tensor([0, 1, 1]), None, *halos)
    left = edges.masked(torch.tensor([False, True, True]))
    assert left.offsets.tolist() == [0, 1, 2] and left.columns.tolist() == [1, 1]
    assert [left.halo, left.back] == halos
