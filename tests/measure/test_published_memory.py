"""Kept memory at the true size of ogbn-arxiv against the figures of section 5 of the specification."""

from __future__ import annotations

import pytest
import torch

from iexact_runner.cli import compose_config
from iexact_runner.data import load_dataset
from iexact_runner.loss import loss_per_node, node_loss
from iexact_runner.measure import MIB, SavedTensors
from iexact_runner.nn import build_model
from iexact_runner.problem import prepare

FORMULA = {0: 29.72, 2: 27.13, 4: 25.84, 8: 25.19, 16: 24.95, 32: 24.83, 64: 24.77}


@pytest.fixture(scope="module")
def problem():
    config = compose_config("dataset=synthetic_arxiv")
    return prepare(load_dataset(config.dataset), config.model, inductive=False, device=torch.device("cpu"))


def kept_mib(problem, *overrides):
    """MiB kept by the model, and what the list says plain FP32 keeps."""
    config = compose_config("dataset=synthetic_arxiv", *overrides)
    model = build_model(config.model, in_channels=128, out_channels=40, compression=config.compression)
    view = problem.training
    with SavedTensors(model, excluded=problem.tensors()) as saved:
        scores = model(view.x, view.graph, seed=0)
        kept = saved.kept(scores)
    total = sum(record.bytes for record in kept)
    return total / MIB, sum(record.bytes_fp32 for record in kept) / MIB


def test_sizes_are_the_published_ones(problem):
    assert problem.whole.x.shape == (169_343, 128) and problem.num_classes == 40
    assert problem.whole.graph.matrix.columns.numel() == 2_315_598
    assert (problem.whole.train.numel(), problem.val.numel(), problem.test.numel()) == (90_941, 29_799, 48_603)


@pytest.mark.parametrize("col_size", FORMULA)
def test_int2_keeps_what_the_formula_says(problem, col_size):
    saved, fp32 = kept_mib(problem, "compression=iexact", f"compression.col_size={col_size}")
    assert saved == pytest.approx(FORMULA[col_size], rel=0.001)
    assert fp32 == pytest.approx(910, rel=0.001)


def test_loss_keeps_nothing_beside_the_output_where_the_usual_one_keeps_as_much_as_published(problem):
    view = problem.training
    scores = torch.randn(view.x.size(0), 40, requires_grad=True)
    model = torch.nn.Identity()

    def kept(loss):
        with SavedTensors(model, excluded=[scores, *problem.tensors()]) as saved:
            return sum(record.bytes for record in saved.kept(loss())) / MIB

    def naive():
        return loss_per_node(scores[view.train], view.y[view.train], kind="log_cross_entropy").mean()

    assert kept(naive) == pytest.approx(14.9, rel=0.01)
    assert kept(lambda: node_loss(scores, view.y, view.train, kind="log_cross_entropy")) == 0.0


def test_exact_is_one_block_a_row(problem):
    assert kept_mib(problem, "compression=exact")[0] == pytest.approx(FORMULA[0], rel=0.001)


def test_fp32_keeps_what_plain_modules_keep(problem):
    assert kept_mib(problem, "compression=plain")[0] == pytest.approx(910, rel=0.001)
