"""A budget dealt by several processes together: one plan, which each of them keeps."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from conftest import tiny_dataset
from iexact_runner.analysis.budgets import TrainingTrial, plan_training
from iexact_runner.cli import compose_config
from iexact_runner.data.partitioned import halo_of
from iexact_runner.errors import ConfigError
from iexact_runner.measure import MIB
from iexact_runner.sampling.parallel import in_parts, parallel_problem
from parallel.processes import in_processes
from parallel.test_gradients import A_CODE, build_

FIELDS = ("parallel=graph", "parallel.partition=label_propagation", "parallel.parts=3", "compression=auto")


def planned(team, dataset, overrides, trials):
    """A plan, what each process keeps under it, its gradient and the exact one; and the gradient under a given plan."""
    config = compose_config("dataset=digits", *FIELDS, *overrides)
    problem, _ = parallel_problem(in_parts(dataset, config, team), config, team, torch.device("cpu"))
    model = build_(config, problem)
    plan = plan_training(model, problem, config, seed=3, trials=trials)
    own = TrainingTrial(model, problem, config, seed=3)
    exact, (found, kept) = own.exact(len(plan.maps)), own.gradient(plan.directions())
    choices = [choice.state() for choice in plan.choices()]
    return choices, (kept, plan.budget), (found - exact).norm().item() / exact.norm().item(), found.numpy()


@pytest.mark.parametrize(("model", "sizes"), [("sage", (2, 3)), ("gcn", (2,)), ("gcn2", (2,)), ("gat", (3,))])
def test_processes_make_one_plan_and_none_keeps_more(model, sizes):
    dataset, fields = tiny_dataset(nodes=601), [f"model={model}", "compression.budget=0.2", "model.num_layers=3"]
    (alone,) = in_processes(1, planned, dataset, fields, 6)
    # Two processes have one part and two: the budget is of the one that needs most.
    for size in sizes:
        first, *others = in_processes(size, planned, dataset, fields, 6)
        for each in others:
            assert each[0] == first[0] and np.array_equal(each[3], first[3])
        kept, budget = first[1]
        assert 0.6 * budget < kept <= budget and first[2] < 2 * alone[2] + 0.01


def test_a_plan_of_one_process_means_the_same_in_several():
    """With the budget of a whole graph in MiB the choices may differ, with all of it there is only one."""
    dataset, fields = tiny_dataset(nodes=601), ["model=sage", "compression.budget_mib=50"]
    (alone,) = in_processes(1, planned, dataset, fields, 0)
    for found in in_processes(3, planned, dataset, fields, 0):
        assert found[0] == alone[0] and found[1][0] < 50 * MIB
        assert np.linalg.norm(found[3] - alone[3]) <= A_CODE * np.linalg.norm(alone[3]) and found[2] < 1e-5


def test_what_fits_is_not_known_for_several():
    with pytest.raises(ConfigError, match=r"^compression.budget=fit: parallel=graph needs what each process may keep"):
        compose_config("dataset=digits", *FIELDS)
    with pytest.raises(ConfigError, match=r"^compression.budget=.* MiB: a step keeps at least"):
        in_processes(2, planned, tiny_dataset(nodes=401), ["compression.budget=1.0e-4"], 0)


def known_after_a_plan(team, dataset):
    fields = ("compression.budget=0.2", "messages.forward=int4", "messages.delta=true")
    config = compose_config("dataset=digits", *FIELDS, *fields)
    problem, _ = parallel_problem(in_parts(dataset, config, team), config, team, torch.device("cpu"))
    plan_training(build_(config, problem), problem, config, seed=3, trials=0)
    known = halo_of(problem.training.graph).known
    return known.frozen, [part.count_nonzero().item() for both in known.rows for part in both]


def test_steps_that_are_tried_leave_what_differences_are_to():
    for frozen, written in in_processes(2, known_after_a_plan, tiny_dataset(nodes=401)):
        assert not frozen and written and not any(written)
