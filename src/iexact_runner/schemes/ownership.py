"""Gradients that a backward pass may overwrite: those that nobody else holds.

Autograd accumulates gradients in place by the same rule, from the same counts. A hook, ``retain_grad`` or another
branch of the graph that holds a gradient raises a count, and the gradient is left as it is.
"""

from __future__ import annotations

import functools
import sys
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

# Of Python's references to a tensor, C++'s to it, and both to its memory.
Holders = tuple[int, int, int]


def sole_owner(grad: Tensor) -> bool:
    """Whether a gradient, an argument of a ``once_differentiable`` backward that calls this, may be overwritten.

    To be asked in a statement of its own: in the midst of a call, what is passed along counts as another holder.
    """
    if type(grad) is not Tensor or torch.compiler.is_compiling() or not hasattr(grad, "_use_count"):
        return False
    counts = zip(_holders(grad), _fewest_holders(), strict=True)
    return grad.is_contiguous() and grad.data_ptr() != 0 and all(own <= fewest for own, fewest in counts)


def _holders(grad: Tensor) -> Holders:
    memory = grad.untyped_storage()
    in_cpp = cast(Any, grad)._use_count()  # which torch's stubs lack
    return sys.getrefcount(grad), in_cpp, torch._C._storage_Use_Count(memory._cdata)


@functools.cache
def _fewest_holders() -> Holders:
    """The counts of a gradient that only its backward holds, measured rather than known: they vary with versions."""
    found: list[Holders] = []

    class Probe(Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x + 1

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            found.append(_counted(grad))
            return grad * 2

    def _counted(grad: Tensor) -> Holders:  # as deep as sole_owner is
        return _holders(grad)

    with torch.enable_grad():
        x = torch.zeros(2, requires_grad=True)
        twice = Probe.apply(Probe.apply(x))
        torch.autograd.grad(twice, x, torch.ones(2))
    return found[-1]
