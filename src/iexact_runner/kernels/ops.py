"""The compression kernels as custom operators: what autograd functions call, and what ``torch.compile`` traces through.

An operator is declared once, by a function that tells the shapes and types of what it returns; the function of its name
does the work, on the backend for its tensors' device. The functions below take a seed as an int or a 0-d int64 tensor
and keyword-only options; arguments are checked by their callers. Formulas stand in
:mod:`iexact_runner.kernels.reference`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from iexact_runner.kernels import reference
from iexact_runner.kernels.backends import select

_LIBRARY = torch.library.Library("iexact", "DEF")
Shapes = TypeVar("Shapes", bound=Callable[..., Any])


def operator(*, call: Callable[..., Any] | None = None, writes: Sequence[str] = ()) -> Callable[[Shapes], Shapes]:
    """Makes a custom operator of this library of a function that tells the shapes and types of what it returns.

    Its annotations are the schema, its name is that of the operator and, after an underscore, of the kernel, which gets
    all arguments by name but ``backend``, by which it is chosen: ``auto`` where there is none. It has no gradient of
    its own: autograd functions call it, and called where autograd records a tensor's gradient it raises a RuntimeError.

    Args:
        call: starts the kernel where its arguments are others, given the module of the backend and the arguments.
        writes: names of the arguments that are written over.
    """

    def register(shapes: Shapes) -> Shapes:
        name, parameters = shapes.__name__.removeprefix("_"), tuple(inspect.signature(shapes).parameters)
        written = [parameters.index(each) for each in writes]

        def run(*arguments: Any) -> Any:
            if torch.is_grad_enabled() and any(
                isinstance(value, Tensor) and value.requires_grad for value in arguments
            ):
                raise RuntimeError(
                    f"iexact::{name} has no gradient: call it in an autograd function or torch.no_grad()"
                )
            # Tables and shapes arrive as lists, which no kernel could be cached by.
            values = (tuple(value) if isinstance(value, list) else value for value in arguments)
            named: dict[str, Any] = dict(zip(parameters, values, strict=True))
            kernels = select(named.pop("backend", "auto"), arguments[0].device)
            for place in written:  # autograd then notices if it has saved what is no longer there
                increment_version(arguments[place])
            return call(kernels, **named) if call else getattr(kernels, name)(**named)

        # Not by ``torch.library.custom_op``, whose Python around each call takes a GPU's host tens of microseconds.
        schema = torch.library.infer_schema(shapes, mutates_args=writes)
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        made = getattr(torch.ops.iexact, name).default
        torch.library.register_fake(made, shapes, lib=_LIBRARY)
        return made  # type: ignore[no-any-return]  # called as the function is

    return register


def seed_tensor(seed: int | Tensor, device: torch.device) -> Tensor:
    """A seed as a 0-d int64 tensor; an int is written on the device, which a copy to it would wait for."""
    if isinstance(seed, Tensor):
        return seed
    if isinstance(seed, WrittenSeed) and seed.tensor.device == device:
        return seed.tensor
    return torch.full((), seed, dtype=torch.int64, device=device)


class WrittenSeed(int):
    """A seed that is on a device already.

    Args:
        tensor: the seed, 0-d.
    """

    tensor: Tensor

    @classmethod
    def of(cls, seed: int, tensor: Tensor) -> WrittenSeed:
        """The seed whose tensor this is."""
        made = cls(seed)
        made.tensor = tensor
        return made


class RowSeed(int):
    """A seed for a run of rows of a larger map: rows here draw what the same rows draw there.

    Args:
        first_row: of the run; its place in the map, times the width, must be a multiple of 8 elements.
    """

    first_row: int

    @classmethod
    def of(cls, seed: int, first_row: int) -> RowSeed:
        """The seed of the rows from ``first_row`` on."""
        made = cls(seed)
        made.first_row = first_row
        return made


def row_offset(seed: int | Tensor, x: Tensor) -> int:
    """Elements of a larger map, as wide as ``x``, before the rows that the seed is for."""
    return seed.first_row * x.size(-1) if isinstance(seed, RowSeed) else 0


def packed_bytes(x: Tensor, count: int, bits: int = 1) -> Tensor:
    """Room for the packed codes of ``count`` elements, where ``x`` is."""
    return x.new_empty((count * bits + 7) // 8, dtype=torch.uint8)


@operator()
def _quantize(
    x: Tensor, bits: int, block_size: int, levels: list[float] | None, seed: Tensor, offset: int, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    count, dtype = x.numel(), reference.stored_dtype(x.dtype)
    blocks = (count + block_size - 1) // block_size
    return packed_bytes(x, count, bits), x.new_empty(blocks, dtype=dtype), x.new_empty(blocks, dtype=dtype)


def quantize(
    x: Tensor,
    *,
    bits: int,
    block_size: int,
    levels: tuple[float, ...] | None,
    seed: int | Tensor,
    backend: str,
    offset: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Packed codes, zero and scale of a map."""
    table = None if levels is None else list(levels)
    offset += row_offset(seed, x)
    return _quantize(x, bits, block_size, table, seed_tensor(seed, x.device), offset, backend)


@operator()
def _dequantize(
    packed: Tensor,
    zero: Tensor,
    scale: Tensor,
    bits: int,
    block_size: int,
    levels: list[float] | None,
    shape: list[int],
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    return packed.new_empty(shape, dtype=dtype)


def dequantize(
    packed: Tensor,
    zero: Tensor,
    scale: Tensor,
    *,
    bits: int,
    block_size: int,
    levels: tuple[float, ...] | None,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    backend: str,
) -> Tensor:
    """The decoded map."""
    table = None if levels is None else list(levels)
    return _dequantize(packed, zero, scale, bits, block_size, table, list(shape), dtype, backend)


@operator()
def _leaky_relu(x: Tensor, negative_slope: float, backend: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), packed_bytes(x, x.numel())


def leaky_relu(x: Tensor, *, negative_slope: float, backend: str) -> tuple[Tensor, Tensor]:
    """LeakyReLU and its packed mask."""
    return _leaky_relu(x.contiguous(), negative_slope, backend)


@operator()
def _leaky_relu_backward(grad: Tensor, packed_mask: Tensor, negative_slope: float, backend: str) -> Tensor:
    return grad.new_empty(grad.shape)


def leaky_relu_backward(grad: Tensor, mask: Tensor, *, negative_slope: float, backend: str) -> Tensor:
    """Gradient of :func:`leaky_relu`."""
    return _leaky_relu_backward(grad.contiguous(), mask, negative_slope, backend)


@operator()
def _dropout(x: Tensor, p: float, seed: Tensor, offset: int, backend: str) -> Tensor:
    return x.new_empty(x.shape)


def dropout(x: Tensor, *, p: float, seed: int | Tensor, backend: str, offset: int = 0) -> Tensor:
    """Dropout, and its own backward."""
    return _dropout(x.contiguous(), p, seed_tensor(seed, x.device), offset + row_offset(seed, x), backend)


@operator(call=lambda kernels, x, **options: kernels.dropout_mask(x.numel(), device=x.device, **options))
def _dropout_mask(x: Tensor, p: float, seed: Tensor, offset: int, backend: str) -> Tensor:
    return packed_bytes(x, x.numel())


def dropout_mask(x: Tensor, *, p: float, seed: int | Tensor, backend: str, offset: int = 0) -> Tensor:
    """Packed mask of what :func:`dropout` keeps of ``x``, of which only size and device are used."""
    return _dropout_mask(x, p, seed_tensor(seed, x.device), offset + row_offset(seed, x), backend)


@operator()
def _apply_dropout_mask(x: Tensor, packed_mask: Tensor, p: float, backend: str) -> Tensor:
    return x.new_empty(x.shape)


def keep_mask(count: int, *, p: float, seed: int | Tensor, device: torch.device) -> Tensor:
    """Boolean mask (count,) of what :func:`dropout` keeps of so many elements, drawn by the kernels of the device."""
    sized = torch.empty(1, device=device).expand(count)
    return reference.unpack(dropout_mask(sized, p=p, seed=seed, backend="auto"), count, 1).bool()


def apply_dropout_mask(x: Tensor, mask: Tensor, *, p: float, backend: str) -> Tensor:
    """Dropout from a stored mask, and its own backward."""
    return _apply_dropout_mask(x.contiguous(), mask, p, backend)


@operator()
def _leaky_relu_dropout(
    x: Tensor, negative_slope: float, p: float, seed: Tensor, offset: int, backend: str
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), packed_bytes(x, x.numel())


def leaky_relu_dropout(
    x: Tensor, *, negative_slope: float, p: float, seed: int | Tensor, backend: str, offset: int = 0
) -> tuple[Tensor, Tensor]:
    """LeakyReLU and dropout in one pass, and the packed mask of the former."""
    drawing = (p, seed_tensor(seed, x.device), offset + row_offset(seed, x))
    return _leaky_relu_dropout(x.contiguous(), negative_slope, *drawing, backend)


@operator()
def _leaky_relu_dropout_backward(
    grad: Tensor, packed_mask: Tensor, negative_slope: float, p: float, seed: Tensor, offset: int, backend: str
) -> Tensor:
    return grad.new_empty(grad.shape)


def leaky_relu_dropout_backward(
    grad: Tensor,
    mask: Tensor,
    *,
    negative_slope: float,
    p: float,
    seed: int | Tensor,
    backend: str,
    offset: int = 0,
) -> Tensor:
    """Gradient of :func:`leaky_relu_dropout`."""
    drawing = (p, seed_tensor(seed, grad.device), offset + row_offset(seed, grad))
    return _leaky_relu_dropout_backward(grad.contiguous(), mask, negative_slope, *drawing, backend)


@operator(
    call=lambda kernels, like, rows, columns, seed: kernels.rademacher(
        rows, columns, seed=seed, dtype=like.dtype, device=like.device
    )
)
def _rademacher(like: Tensor, rows: int, columns: int, seed: Tensor, backend: str) -> Tensor:
    return like.new_empty(rows, columns)


def rademacher(like: Tensor, rows: int, columns: int, *, seed: int | Tensor, backend: str) -> Tensor:
    """Random projection (rows, columns), of the type and on the device of ``like``."""
    return _rademacher(like, rows, columns, seed_tensor(seed, like.device), backend)
