"""How one activation map is kept for the backward pass: projected, quantized, both, or as it is.

Shapes: N nodes, D features, R projected features, G block size in elements.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeGuard

import torch
from torch import Tensor

from iexact_runner.compression.bins import ClippedNormal, optimal_levels
from iexact_runner.kernels import block_ops, ops

# Bits of a map that is rounded to bfloat16, which no codes are made for.
BFLOAT16_BITS = 16


@dataclass(frozen=True)
class MapFormat:
    """Choices that hold for every map of a model; see ``CompressionConfig`` for the fields.

    ``bits`` may also be 16: bfloat16, between INT8 and the map as it is.

    ``optimal`` chooses the levels of each map for the size of its blocks, in place of ``levels``; uniform ones for a
    layer's input without projection, which the clipped normal does not describe (``docs/bins.md``).
    """

    bits: int | None
    kept_frac: float
    col_size: int
    levels: tuple[float, ...] | None
    max_block_size: int | None
    backend: str
    optimal: bool = False

    @property
    def references_features(self) -> bool:
        """The published layouts keep the features, compressed."""
        return False

    def keep(self, x: Tensor, *, seed: int | Tensor, project: bool) -> KeptMap:
        """Keeps a map (N, D); ``project`` allows the random projection, which only linear uses undo without bias."""
        columns = x.size(1)
        rank = kept_columns(columns, self.kept_frac) if project else columns
        stored = x
        if rank < columns:
            stored = x @ ops.rademacher(x, columns, rank, seed=seed, backend=self.backend)
        fits = rank < columns or not project
        return KeptMap(*self.encode(stored, seed=seed, columns=columns, normal=fits))

    def encode(
        self, stored: Tensor, *, seed: int | Tensor, columns: int | None = None, normal: bool = True
    ) -> tuple[MapLayout, tuple[Tensor, ...]]:
        """Quantizes what is stored (N, R) of a map with ``columns`` features, R if it is not projected.

        ``normal`` says that the clipped normal describes its values, for the choice of levels.
        """
        shape = (stored.size(0), stored.size(1) if columns is None else columns)
        layout = self._layout(shape, stored.size(1), stored.dtype, seed=seed, normal=normal)
        tensors: tuple[Tensor, ...] = (stored,)
        if self.bits == BFLOAT16_BITS:
            tensors = (stored.to(torch.bfloat16),)
        elif self.bits is not None:
            tensors = ops.quantize(
                stored,
                bits=self.bits,
                block_size=layout.block_size,
                levels=layout.levels,
                seed=seed,
                backend=self.backend,
            )
        return layout, _with_seed(tensors, seed)

    def encode_product(
        self, z: Tensor, matrix: Tensor, shift: Tensor, *, seed: int | Tensor
    ) -> tuple[MapLayout, tuple[Tensor, ...]]:
        """Quantizes z M + shift for z (N, D), M (D, R) and shift (R,); M (D,) multiplies columns."""
        if matrix.dim() == 1:
            return self.encode(torch.addcmul(shift, z, matrix), seed=seed)
        if not _has_codes(self.bits):
            return self.encode(torch.addmm(shift, z, matrix), seed=seed)
        layout = self._layout((z.size(0), matrix.size(1)), matrix.size(1), z.dtype, seed=seed, normal=True)
        tensors = block_ops.quantize_product(
            z,
            matrix,
            shift,
            bits=self.bits,
            block_size=layout.block_size,
            levels=layout.levels,
            seed=seed,
            backend=self.backend,
        )
        return layout, _with_seed(tensors, seed)

    def _layout(
        self, shape: tuple[int, ...], rank: int, dtype: torch.dtype, *, seed: int | Tensor, normal: bool
    ) -> MapLayout:
        block_size = block_size_for(rank, col_size=self.col_size, max_block_size=self.max_block_size)
        levels = self.levels
        if self.optimal and normal:
            # Not the minimum, which would be a symbol under torch.compile where the number of rows varies.
            count = shape[0] * rank
            levels = best_levels(self.bits, block_size if block_size < count else count)
        fixed_seed = 0 if isinstance(seed, Tensor) else seed
        return MapLayout(self.bits, levels, block_size, shape, rank, dtype, fixed_seed, self.backend)


@dataclass(frozen=True)
class MapLayout:
    """Everything about a kept map but its tensors, so that a node of the autograd graph can carry it freely."""

    bits: int | None
    levels: tuple[float, ...] | None
    block_size: int
    shape: tuple[int, ...]
    rank: int
    dtype: torch.dtype
    seed: int
    backend: str

    @property
    def projected(self) -> bool:
        """Whether the random projection was applied."""
        return self.rank < self.shape[1]

    @property
    def stored_type(self) -> str:
        """What an element is kept as, for people: ``int2``, or the type of the map."""
        if _has_codes(self.bits):
            return f"int{self.bits}"
        return str(self.dtype if self.bits is None else torch.bfloat16).removeprefix("torch.")

    @property
    def decodes_afresh(self) -> bool:
        """All but a map that is kept as it is."""
        rounded = self.bits is not None and not (self.bits == BFLOAT16_BITS and self.dtype == torch.bfloat16)
        return rounded or self.projected

    def independent(self) -> MapLayout:
        """This one: the error of a single estimate is of order variance / N where it stands twice."""
        return self

    def stored(self, tensors: tuple[Tensor, ...]) -> Tensor:
        """The (N, R) map that was stored, decoded."""
        if not _has_codes(self.bits):
            return tensors[0].to(self.dtype)
        return ops.dequantize(
            *tensors[:3],
            bits=self.bits,
            block_size=self.block_size,
            levels=self.levels,
            shape=(self.shape[0], self.rank),
            dtype=self.dtype,
            backend=self.backend,
        )

    def decode(self, tensors: tuple[Tensor, ...]) -> Tensor:
        """Unbiased estimate (N, D) of the map."""
        stored = self.stored(tensors)
        return stored @ self._projection(tensors, stored).T if self.projected else stored

    def weight_gradient(self, grad: Tensor, tensors: tuple[Tensor, ...]) -> Tensor:
        """grad^T x for grad (N, D_out): (D_out, D). Multiplies by P^T last, so no (N, D) map is ever rebuilt."""
        return self.weight_gradients([grad], tensors)[0]

    def weight_gradients(self, grads: Sequence[Tensor], tensors: tuple[Tensor, ...]) -> list[Tensor]:
        """:meth:`weight_gradient` of several gradients, from one decoding."""
        stored = self.stored(tensors).to(grads[0].dtype)
        products = [grad.T @ stored for grad in grads]
        return [product @ self._projection(tensors, stored).T for product in products] if self.projected else products

    def inner_product_factors(self, grad: Tensor, tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Two maps (N, R) whose rows' inner products are those of ``grad`` (N, D) with the map, unbiased."""
        stored = self.stored(tensors).to(grad.dtype)
        return (grad @ self._projection(tensors, stored) if self.projected else grad), stored

    @property
    def parts(self) -> int:
        """How many tensors the map is made of, not counting a seed."""
        return 3 if _has_codes(self.bits) else 1

    def _projection(self, tensors: tuple[Tensor, ...], stored: Tensor) -> Tensor:
        seed = tensors[self.parts] if len(tensors) > self.parts else self.seed
        return ops.rademacher(stored, self.shape[1], self.rank, seed=seed, backend=self.backend)


class Layout(Protocol):
    """How the backward pass gets at a kept map (N, D), in the terms that autograd functions need."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the map."""

    @property
    def stored_type(self) -> str:
        """What an element is kept as, for people."""

    @property
    def decodes_afresh(self) -> bool:
        """Whether :meth:`decode` returns memory of its own, which may be written over."""

    def independent(self) -> Layout:
        """How the same tensors give an estimate with an error of its own, or this layout if there is but one."""

    def decode(self, tensors: tuple[Tensor, ...]) -> Tensor:
        """The map, or an estimate of it."""

    def weight_gradient(self, grad: Tensor, tensors: tuple[Tensor, ...]) -> Tensor:
        """Product grad^T x for grad (N, C): (C, D)."""

    def weight_gradients(self, grads: Sequence[Tensor], tensors: tuple[Tensor, ...]) -> list[Tensor]:
        """:meth:`weight_gradient` of several gradients, from one decoding."""

    def inner_product_factors(self, grad: Tensor, tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Two maps whose rows' inner products are those of ``grad`` (N, D) with the map."""


@dataclass(frozen=True)
class DecodedLayout(ABC):
    """A layout that the backward pass decodes whole, and computes from what it decoded.

    Args:
        shape: of the map, (N, D).
        stored_type: what an element is kept as, for people.
    """

    shape: tuple[int, ...]
    stored_type: str

    @property
    def decodes_afresh(self) -> bool:
        """Whether :meth:`decode` returns memory of its own."""
        return True

    def independent(self) -> DecodedLayout:
        """There is but one estimate."""
        return self

    @abstractmethod
    def decode(self, tensors: tuple[Tensor, ...]) -> Tensor:
        """The map (N, D), or an estimate of it."""

    def weight_gradient(self, grad: Tensor, tensors: tuple[Tensor, ...]) -> Tensor:
        """Product grad^T x for grad (N, C): (C, D)."""
        return self.weight_gradients([grad], tensors)[0]

    def weight_gradients(self, grads: Sequence[Tensor], tensors: tuple[Tensor, ...]) -> list[Tensor]:
        """:meth:`weight_gradient` of several gradients, from one decoding."""
        decoded = self.decode(tensors).to(grads[0].dtype)
        return [grad.T @ decoded for grad in grads]

    def inner_product_factors(self, grad: Tensor, tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """``grad`` (N, D) and the map."""
        return grad, self.decode(tensors).to(grad.dtype)


@dataclass(frozen=True)
class ExactLayout(DecodedLayout):
    """The map itself."""

    @property
    def decodes_afresh(self) -> bool:
        """It is what others may hold."""
        return False

    def decode(self, tensors: tuple[Tensor, ...]) -> Tensor:
        """The one tensor."""
        return tensors[0]


def exact_map(x: Tensor) -> KeptMap:
    """A map (N, D) that is kept as it is."""
    return KeptMap(ExactLayout(tuple(x.shape), str(x.dtype).removeprefix("torch.")), (x,))


class Format(Protocol):
    """How each map of a model is kept."""

    @property
    def bits(self) -> int | None:
        """Bits of an element of the maps that the format does not describe; None keeps these as they are."""

    @property
    def references_features(self) -> bool:
        """Whether the features, which the caller holds anyway, are referenced instead of kept."""

    def keep(self, x: Tensor, *, seed: int | Tensor, project: bool) -> KeptMap:
        """Keeps a map (N, D), detached; ``project`` says that its uses are linear: it is the input of a product."""


class KeptMap(NamedTuple):
    """A kept map: its layout and the tensors that must be saved for the backward pass."""

    layout: Layout
    tensors: tuple[Tensor, ...]


def _has_codes(bits: int | None) -> TypeGuard[int]:
    """Whether elements of so many bits are codes, with a zero and a scale a block."""
    return bits is not None and bits != BFLOAT16_BITS


def _with_seed(tensors: tuple[Tensor, ...], seed: int | Tensor) -> tuple[Tensor, ...]:
    """A seed that is a tensor belongs to what is saved, like every tensor."""
    return (*tensors, seed) if isinstance(seed, Tensor) else tensors


def kept_columns(columns: int, kept_frac: float) -> int:
    """R = ceil(kept_frac * D), immune to the last bit of the product (0.07 * 100 is 7, not 8)."""
    return max(1, math.ceil(kept_frac * columns - 1e-9))


def block_size_for(columns: int, *, col_size: int, max_block_size: int | None) -> int:
    """G for a map with ``columns`` stored features: col_size rows, capped, in whole rows (spec of the reference)."""
    rows = max(1, col_size)
    if max_block_size is not None and rows > 1:
        rows = min(rows, max(1, round(min(rows * columns, max_block_size) / columns)))
    return rows * columns


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def best_levels(bits: int | None, block_size: int) -> tuple[float, ...] | None:
    """Levels of least variance for clipped normal values in blocks of ``block_size``; None if they are uniform."""
    # A block of one element is constant, and the two of a block of two lie on its ends: all levels are as good.
    if bits is None or bits == 1 or block_size <= 2:
        return None
    return optimal_levels(bits, distribution=ClippedNormal(block_size))


def levels_for(bits: int | None, alpha: float | str) -> tuple[float, ...] | None:
    """Levels of 2-bit codes whose first and last bins are ``alpha`` wide; None if they are uniform, or to be chosen."""
    if bits != 2 or alpha == 1.0 or isinstance(alpha, str):
        return None
    return (0.0, alpha, 3.0 - alpha, 3.0)
