"""Losses against those of torch on the same rows."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from conftest import assert_close
from iexact_runner import loss as loss_module
from iexact_runner.loss import loss_per_node, node_loss


def test_arxiv_loss_is_the_formula():
    scores, labels = torch.randn(20, 4), torch.randint(4, (20,))
    losses = F.cross_entropy(scores, labels, reduction="none")
    eps = 1 - math.log(2)
    assert_close(loss_per_node(scores, labels, kind="log_cross_entropy"), torch.log(eps + losses) - math.log(eps))
    assert_close(loss_per_node(scores, labels, kind="cross_entropy"), losses)


@pytest.mark.parametrize("chunk", [1, 30, 1 << 18], ids=["row by row", "several chunks", "one chunk"])
@pytest.mark.parametrize("kind", ["cross_entropy", "log_cross_entropy", "several labels"])
def test_value_and_gradient_are_those_of_torch(kind, chunk, monkeypatch):
    monkeypatch.setattr(loss_module, "CHUNK_ELEMENTS", chunk)
    nodes = torch.randperm(40)[:23]
    if kind == "several labels":
        labels, kind = torch.randint(2, (40, 6)).float(), "cross_entropy"
    else:
        labels = torch.randint(6, (40,))
    leaf = torch.randn(40, 6, requires_grad=True)
    expected = loss_per_node(leaf[nodes], labels[nodes], kind=kind).mean()
    (slope,) = torch.autograd.grad(3 * expected, leaf)
    actual = node_loss(leaf * 1, labels, nodes, kind=kind)
    (written,) = torch.autograd.grad(3 * actual, leaf)
    assert_close(actual, expected)
    assert_close(written, slope)
    assert (written.abs().sum(1) > 0).nonzero().flatten().tolist() == sorted(nodes.tolist())


def test_half_precision_scores_have_a_loss_in_float32():
    scores, labels, nodes = torch.randn(50, 3), torch.randint(3, (50,)), torch.arange(50)
    half = scores.half().requires_grad_()
    loss = node_loss(half * 1, labels, nodes, kind="cross_entropy")
    assert loss.dtype == torch.float32
    # Scaled as float16 training scales it, or its smallest entries would vanish.
    (slope,) = torch.autograd.grad(1024 * loss, half)
    full = scores.half().float().requires_grad_()
    (expected,) = torch.autograd.grad(1024 * F.cross_entropy(full, labels), full)
    assert slope.dtype == torch.float16
    assert_close(slope.float(), expected, tolerance=1e-3)


def test_gradient_takes_the_place_of_the_scores():
    leaf, labels, nodes = torch.randn(9, 3, requires_grad=True), torch.randint(3, (9,)), torch.arange(4)
    scores = leaf * 1
    arrived = []
    scores.register_hook(arrived.append)
    loss = node_loss(scores, labels, nodes, kind="cross_entropy")
    loss.backward(retain_graph=True)
    assert arrived[0].data_ptr() == scores.data_ptr() and torch.equal(scores, leaf.grad)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
