"""Rows that travel as differences to what the receiver has: what comes, what both sides keep, where runs go on."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from conftest import tiny_dataset
from iexact_runner.cli import compose_config
from iexact_runner.data.partitioned import begin_epoch, frozen_messages, halo_of
from iexact_runner.errors import ConfigError
from iexact_runner.parallel.halo import Halo, Known
from iexact_runner.parallel.messages import format_of
from iexact_runner.parallel.shard import DistributedShard
from iexact_runner.sampling.parallel import in_parts, parallel_problem
from iexact_runner.training import Optimization, evaluate, train_epochs, training_loss
from parallel.processes import in_processes
from parallel.test_gradients import build_, figures

FORMATS = ("bf16", "int8", "int4", "int2", "lowrank")


def maps(rank, epoch, *, moves):
    """Rows (40, 13) of a process that move a little from epoch to epoch, and a second map of another width."""
    generator = torch.Generator().manual_seed(rank)
    first, way = torch.randn(2, 40, 13, generator=generator)
    x = first + 3 + moves * epoch * way
    return x, x[:, :5] * 2


def exchanged(team, name, epochs, moves=0.0, frozen=(), interval=1000):
    """Rows 0 to 2 of the next process in each epoch, from both exchanges; what both sides keep; and bytes."""
    shard = DistributedShard([0, 40, 80], team.rank)
    first = 40 - shard.start
    options = {"form": format_of(name, rank=3), "known": Known(interval)}
    halo = Halo.of(shard, torch.arange(first, first + 3), **options)
    assert halo.known is not None
    found, sent = [], []
    for epoch in range(1, epochs + 1):
        halo.known.begin_epoch(epoch)
        halo.known.frozen = epoch in frozen
        halo.begin_pass(1000 * (epoch if interval > epochs else 1))
        before = halo.traffic.sent_bytes
        rows = [torch.cat([part for _, part in halo.exchange(x)], dim=1) for x in maps(team.rank, epoch, moves=moves)]
        found.append(torch.cat(rows, dim=1).numpy())
        sent.append(halo.traffic.sent_bytes - before)
    return found, [[part.numpy() for part in both] for both in halo.known.rows], sent


def rows_of(rank, epoch, moves):
    return torch.cat([x[:3] for x in maps(rank, epoch, moves=moves)], dim=1).numpy()


@pytest.mark.parametrize("name", FORMATS)
def test_rows_that_stay_come_ever_nearer(name):
    ours, theirs = in_processes(2, exchanged, name, 12)
    for (found, *_), rank in ((ours, 1), (theirs, 0)):
        errors = [np.abs(rows - rows_of(rank, 1, 0.0)).max() for rows in found]
        assert errors[0] > 1e-3 and errors[-1] < 0.05 * errors[0]
        assert errors[-1] < 1e-6 or name == "int2"


@pytest.mark.parametrize("name", FORMATS)
def test_both_sides_keep_the_same_rows_and_bytes_are_those_of_rows(name):
    ours, theirs = in_processes(2, exchanged, name, 3, 0.1)
    for one, other in ((ours, theirs), (theirs, ours)):
        for (sent, _), (_, came) in zip(one[1], other[1], strict=True):
            assert np.array_equal(sent, came) and np.abs(came).max() > 1
        assert np.array_equal(np.concatenate([came for _, came in one[1]], axis=1), one[0][-1])
    form = format_of(name, rank=3)
    length = sum(form.length(3, width) for width in (13, 5)) * (2 if name == "bf16" else 1)
    assert ours[2] == theirs[2] == [length] * 3


def test_what_is_known_is_not_rounded_to_the_type_of_a_map():
    halo = Halo.of(DistributedShard([0, 8], 0), torch.arange(0), form=format_of("int4", rank=3), known=Known(5))
    assert [rows.dtype for _, rows in halo.exchange(torch.ones(8, 3, dtype=torch.bfloat16))] == [torch.bfloat16]
    assert [part.dtype for both in halo.known.rows for part in both] == [torch.float32] * 2


def test_rows_travel_whole_where_an_interval_begins():
    ours, _ = in_processes(2, exchanged, "int4", 7, 0.0, (), 3)
    # The seeds are those of the first epoch throughout, so rows that travel whole come as they did there.
    assert all(np.array_equal(ours[0][0], ours[0][epoch]) for epoch in (3, 6))
    assert not any(np.array_equal(ours[0][0], ours[0][epoch]) for epoch in (1, 2, 4, 5))


def test_a_pass_that_is_taken_again_finds_what_the_first_one_found():
    plain, _ = in_processes(2, exchanged, "int2", 3, 0.1)
    again, _ = in_processes(2, exchanged, "int2", 3, 0.1, (3,))
    assert np.array_equal(plain[0][2], again[0][2])
    assert all(
        not np.array_equal(a, b)
        for one, other in zip(plain[1], again[1], strict=True)
        for a, b in zip(one, other, strict=True)
    )


def passes(team, dataset, overrides):
    """How far losses are off in passes at the same weights, the last two frozen; bytes that are held; rows; scores."""
    config = compose_config("dataset=digits", "parallel=graph", "parallel.partition=label_propagation", *overrides)
    exact = replace(config, messages=replace(config.messages, forward="fp32", delta=False))
    ordered = in_parts(dataset, config, team)
    problem, expected = (parallel_problem(ordered, each, team, torch.device("cpu"))[0] for each in (config, exact))
    model = build_(config, problem).train()
    graph, before = problem.training.graph, sum(part.nbytes for part in problem.tensors())

    def loss(of, seed):
        shard = of.training.shard
        found = training_loss(model, of, kind="cross_entropy", precision="float32", seed=3, map_seed=seed)
        return shard.sum_(found.detach()).item()

    begin_epoch(graph, 1)
    deviations = [loss(problem, 5 + number) - loss(expected, 5) for number in range(6)]
    with frozen_messages(graph):
        deviations += [loss(problem, seed) - loss(expected, 5) for seed in (50, 50)]
    held = sum(part.nbytes for part in problem.tensors()) - before
    halo = halo_of(graph)
    return deviations, held, (halo.rows.numel(), halo.size), evaluate(model, problem) == evaluate(model, expected)


@pytest.mark.parametrize("model", ["sage", "gcn", "gcn2", "gat", "graphconv"])
def test_every_model_sends_differences(model):
    dataset = tiny_dataset(nodes=401)
    fields = [f"model={model}", "parallel.parts=2", "compression=none", "messages.forward=int4", "messages.delta=true"]
    for deviations, held, (sent, came), same_scores in in_processes(2, passes, dataset, fields):
        assert abs(deviations[0]) > 1e-5 and deviations[6] == deviations[7]
        assert max(map(abs, deviations[5:])) < max(1e-6, 0.01 * abs(deviations[0]))
        assert held > 0 and held % (4 * (sent + came)) == 0
        assert same_scores


def test_fidelity_takes_differences_to_the_messages_of_earlier_epochs():
    dataset = tiny_dataset(nodes=401)
    fields = ["model=sage", "parallel.parts=2", "fidelity.draws=3", "compression=none", "messages.forward=int4"]
    fields += ["model.dropout=0", "fidelity.epochs=[5]"]
    (whole, *_), (delta, *_), (restarted, *_) = (
        in_processes(2, figures, dataset, [*fields, *more])
        for more in ((), ("messages.delta=true",), ("messages.delta=true", "messages.delta_interval=5"))
    )
    assert 0 < delta[0] < whole[0] / 2
    assert restarted == whole


def losses(team, dataset, overrides, cuts):
    """Losses of ten epochs, by processes that begin anew after some of them as a resumed run does."""
    config = compose_config("dataset=digits", "parallel=graph", "parallel.partition=label_propagation", *overrides)
    config = replace(config, training=replace(config.training, epochs=10))
    ordered, found = in_parts(dataset, config, team), []
    for begun, end in zip([0, *cuts], [*cuts, 10], strict=True):
        problem, _ = parallel_problem(ordered, config, team, torch.device("cpu"))
        if not begun:
            model = build_(config, problem)
            optimization = Optimization(model, config.training)
        for epoch in train_epochs(model, problem, optimization, seed=3, done=begun):
            found.append(epoch.loss)
            if epoch.number == end:
                break
    return found


def test_a_run_goes_on_where_rows_travel_whole():
    dataset = tiny_dataset(nodes=401)
    fields = ["model=sage", "parallel.parts=2", "messages.forward=int4", "messages.delta=true"]
    fields.append("messages.delta_interval=3")
    whole, cut, elsewhere = (in_processes(2, losses, dataset, fields, cuts)[0] for cuts in ([], [3, 6], [4]))
    assert cut == whole and elsewhere[:4] == whole[:4] and elsewhere[4] != whole[4]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], r"messages.delta=true: must be false with messages.forward=fp32"),
        (["messages.forward=int4", "messages.delta_interval=0"], r"messages.delta_interval=0: must be 1 or more"),
        (["messages.forward=int4", "compression=recompute"], r"messages.delta=true: must be false under"),
        (["messages.forward=int4", "parallel.halo_sample=0.5"], r"messages.delta=true: must be false where"),
    ],
)
def test_what_differences_do_not_go_with(overrides, message):
    with pytest.raises(ConfigError, match=message):
        compose_config("dataset=digits", "parallel=graph", "messages.delta=true", *overrides)
