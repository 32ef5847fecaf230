"""A gradient is overwritten where nobody else holds it, and only there."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from iexact_runner.schemes.ownership import sole_owner


class Doubled(Function):
    """2 x, whose backward pass says whether it may overwrite the gradient, and does so."""

    answers: list[bool] = []

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        spare = sole_owner(grad)
        Doubled.answers.append(spare)
        return grad.mul_(2) if spare else 2 * grad


def backward(function):
    """Answers from the last function to the first, and the gradient of what comes first."""
    Doubled.answers.clear()
    x = torch.ones(3, 4, requires_grad=True)
    function(x).sum().backward()
    return list(Doubled.answers), x.grad


def scaled(x):
    return x * 3.0  # its gradient is a tensor of its own, which that of a sum is not


def test_a_chain_is_overwritten_and_what_a_sum_expands_is_not():
    answers, grad = backward(lambda x: scaled(Doubled.apply(Doubled.apply(x))))
    assert answers == [True, True] and torch.equal(grad, torch.full((3, 4), 12.0))
    answers, grad = backward(lambda x: Doubled.apply(Doubled.apply(x)))
    assert answers == [False, True] and torch.equal(grad, torch.full((3, 4), 4.0))


def test_the_gradient_that_the_caller_gives_is_left():
    given, x = torch.ones(3, 4), torch.ones(3, 4, requires_grad=True)
    Doubled.answers.clear()
    Doubled.apply(x).backward(given)
    assert Doubled.answers == [False] and torch.equal(given, torch.ones(3, 4))


HELD = {
    "tensor hook": lambda held, y: y.register_hook(lambda grad: held.append(grad)),
    "alias in a hook": lambda held, y: y.register_hook(lambda grad: held.append(grad.detach())),
    "view in a hook": lambda held, y: y.register_hook(lambda grad: held.append(grad[0])),
    "node hook": lambda held, y: y.grad_fn.register_prehook(lambda grads: held.append(grads[0])),
}


@pytest.mark.parametrize("name", HELD)
def test_a_gradient_that_somebody_holds_is_left(name):
    held = []

    def function(x):
        y = Doubled.apply(x)
        HELD[name](held, y)
        return scaled(y)

    answers, grad = backward(function)
    assert answers == [False] and torch.equal(grad, torch.full((3, 4), 6.0))
    assert (held[0] == 3).all()


def test_a_gradient_that_is_retained_stays_what_it_was():
    held = []

    def function(x):
        held.append(Doubled.apply(x))
        held[0].retain_grad()
        return scaled(held[0])

    _, grad = backward(function)
    assert torch.equal(grad, torch.full((3, 4), 6.0)) and (held[0].grad == 3).all()


def test_a_hook_that_keeps_nothing_costs_nothing():
    def function(x):
        y = Doubled.apply(x)
        y.register_hook(lambda grad: None)
        return scaled(y)

    assert backward(function)[0] == [True]


def test_branches_that_share_a_gradient_get_what_is_theirs():
    answers, grad = backward(lambda x: scaled(Doubled.apply(x) + Doubled.apply(x)))
    # The second to run is the last to hold it.
    assert answers == [False, True] and torch.equal(grad, torch.full((3, 4), 12.0))


def test_what_is_not_contiguous_is_left():
    assert backward(lambda x: scaled(Doubled.apply(x).t()))[0] == [False]


def test_gradients_of_a_module_hook_are_left():
    class Layer(nn.Module):
        def forward(self, x):
            return Doubled.apply(x)

    held, layer = [], Layer()
    layer.register_full_backward_hook(lambda module, grad_in, grad_out: held.append((grad_in[0], grad_out[0])))
    answers, grad = backward(lambda x: scaled(layer(Doubled.apply(x))))
    assert torch.equal(grad, torch.full((3, 4), 12.0))
    (grad_in, grad_out) = held[0]
    assert (grad_in == 6).all() and (grad_out == 3).all()
