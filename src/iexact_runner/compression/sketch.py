"""Maps kept as coefficients in a few adaptive directions, and the masks that make an activation of them again.

For a map z (N, D) with column means m and directions V (D, R), the leading eigenvectors of its covariance, kept are the
coefficients c = (z - m) V, each column divided by its deviation and quantized block-wise; z~ = c~ V^T + m. What was
learned from c for one use serves every other: see ``docs/lowrank.md``.

Shapes: N nodes, D features, R directions.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, cast

import torch
from torch import Tensor

from iexact_runner.compression.coefficients import CoefficientFormat
from iexact_runner.compression.directions import coefficients_of, per_feature
from iexact_runner.compression.maps import Layout, MapFormat
from iexact_runner.compression.signs import Decoded, Room, SignLayout
from iexact_runner.kernels import block_ops, ops
from iexact_runner.kernels.reference import dropout_factor

# Elements of a map that are decoded at once, in runs of whole rows whose masks begin with a byte.
CHUNK_ELEMENTS = 1 << 18
# The same on a GPU: 16 MiB of float32 stay in its cache, and each run is worth a launch.
GPU_CHUNK_ELEMENTS = 1 << 22
LEAST_CHUNK_ROWS = 64


class Coefficients(Protocol):
    """How the coefficients (N, R) of a sketch are kept."""

    @property
    def parts(self) -> int:
        """How many tensors they are made of."""

    @property
    def stored_type(self) -> str:
        """What they are kept as, for people."""

    def stored(self, tensors: tuple[Tensor, ...]) -> Tensor:
        """The coefficients, decoded."""


class _Chunked(ABC):
    """A kept map that is decoded in runs of rows, so that a product with it never builds it."""

    shape: tuple[int, ...]

    @property
    def decodes_afresh(self) -> bool:
        """It is decoded into memory of its own."""
        return True

    def independent(self) -> Layout:
        """This one: it has one estimate."""
        return cast(Layout, self)

    @abstractmethod
    def chunks(self, tensors: tuple[Tensor, ...]) -> Iterator[tuple[slice, Tensor]]:
        """Runs of rows, and the map there."""

    def decode(self, tensors: tuple[Tensor, ...]) -> Tensor:
        """The map (N, D)."""
        decoded: Tensor | None = None
        for part, piece in self.chunks(tensors):
            decoded = piece.new_empty(self.shape) if decoded is None else decoded
            decoded[part] = piece
        return tensors[0].new_empty(self.shape) if decoded is None else decoded

    def weight_gradient(self, grad: Tensor, tensors: tuple[Tensor, ...]) -> Tensor:
        """Product grad^T x for grad (N, C): (C, D)."""
        return self.weight_gradients([grad], tensors)[0]

    def weight_gradients(self, grads: Sequence[Tensor], tensors: tuple[Tensor, ...]) -> list[Tensor]:
        """:meth:`weight_gradient` of several gradients, from one decoding."""
        gradients = [grad.new_zeros(grad.size(1), self.shape[1]) for grad in grads]
        for part, piece in self.chunks(tensors):
            for gradient, grad in zip(gradients, grads, strict=True):
                gradient.addmm_(grad[part].T, piece.to(grad.dtype))
        return gradients

    def inner_product_factors(self, grad: Tensor, tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Two maps whose rows' inner products are those of ``grad`` (N, D) with the map."""
        return grad, self.decode(tensors).to(grad.dtype)

    def _row_chunks(self, device: torch.device) -> Iterator[slice]:
        nodes, width = self.shape
        elements = CHUNK_ELEMENTS if device.type == "cpu" else GPU_CHUNK_ELEMENTS
        # A multiple of 8 rows: masks then begin with a byte. Products of a few rows alone are slow.
        rows = max(LEAST_CHUNK_ROWS, elements // max(1, width) // 8 * 8)
        return (slice(start, min(start + rows, nodes)) for start in range(0, nodes, rows))


@dataclass(frozen=True)
class SketchLayout(_Chunked):
    """An activation dropout(ReLU(z)) of a map z that is kept as a sketch.

    Its tensors are those of the coefficients, the directions with all scales, the shift (D,), from which |z~| on
    the sketch is sure of signs (D,) if it gives any, those of the signs if ReLU came after, and the seed if it is one.

    Args:
        coefficients: how the coefficients (N, R) are kept.
        shape: (N, D).
        gives_signs: whether the sketch gives the signs that it is sure of.
        signs: how the signs of z are kept; None if no ReLU came after the sketch.
        dropout: rate of the dropout after it.
        seed: of its mask; None if it is a tensor.
        backend: who runs the kernels.
        residual: k, if the last 2 k directions are two random sketches of what the others miss, k each.
        half: which of the two to decode with, 0 or 1; None takes their mean, which has half the variance.
        room: for the signs, from pass to pass.
        decoded: what the backward pass needs more than once; None decodes anew.
    """

    coefficients: Coefficients
    shape: tuple[int, ...]
    gives_signs: bool = False
    signs: SignLayout | None = None
    dropout: float = 0.0
    seed: int | None = 0
    backend: str = "auto"
    residual: int = 0
    half: int | None = None
    room: Room | None = None
    decoded: Decoded | None = None

    @property
    def stored_type(self) -> str:
        """What a coefficient is kept as."""
        return self.coefficients.stored_type

    @property
    def parts(self) -> int:
        """How many tensors the map is made of, before those of its signs."""
        return self.coefficients.parts + 2 + self.gives_signs

    def independent(self) -> SketchLayout:
        """The other half, whose error has nothing to do with that of this one."""
        return self if self.half is None else replace(self, half=1 - self.half)

    def factors(self, tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Coefficients c (N, R) and directions V, (D, R) or (D,): the map before its shift and ReLU is c V^T."""
        parts = self.coefficients.parts
        directions = tensors[parts]
        if self.half is not None:
            weights = directions.new_ones(directions.size(1))
            weights[-2 * self.residual : -self.residual] = 2.0 * (1 - self.half)
            weights[-self.residual :] = 2.0 * self.half
            directions = directions * weights
        return self.coefficients.stored(tensors[:parts]).float(), directions

    def with_signs(
        self, tensors: tuple[Tensor, ...], mask: Tensor, *, exact: bool, p: float, seed: int | Tensor
    ) -> tuple[SketchLayout, tuple[Tensor, ...]]:
        """This sketch of a map z and what is kept of the packed mask of ReLU(z), which dropout of rate p follows."""
        signs = SignLayout(self.gives_signs, exact, p, self.backend)
        signed = replace(self, signs=signs, decoded=Decoded.new())
        if not self.gives_signs:
            return signed, (*tensors, mask)
        coefficients = self.coefficients.stored(tensors[: self.coefficients.parts]).float()
        kept = signs.keep(mask, coefficients, *tensors[self.coefficients.parts : self.parts], seed=seed, room=self.room)
        return signed, (*tensors, *kept)

    def mask(self, tensors: tuple[Tensor, ...], seed: int | Tensor) -> Tensor:
        """The packed mask of ReLU, of which nothing is set where dropout drops if ``signs.dropped``."""
        assert self.signs is not None
        stored = tensors[self.parts : self.parts + self.signs.parts]
        if not self.gives_signs:
            return stored[0]
        if self.decoded is not None and self.decoded.mask is not None:
            return self.decoded.mask
        mask = self.signs.mask(stored, *self.factors(tensors), *tensors[self.parts - 2 : self.parts], seed=seed)
        if self.decoded is not None:
            self.decoded.mask = mask
        return mask

    def chunks(self, tensors: tuple[Tensor, ...]) -> Iterator[tuple[slice, Tensor]]:
        """Runs of rows, and the activation there."""
        shift, p = tensors[self.coefficients.parts + 1], self.dropout
        seed = tensors[-1] if self.seed is None else self.seed
        signs = None if self.signs is None else self.mask(tensors, seed)
        drawn, offset = ops.seed_tensor(seed, shift.device), ops.row_offset(seed, shift)
        coefficients, directions = self.factors(tensors)
        if self.signs is not None and self.signs.dropped:
            factor, p = dropout_factor(p), 0.0
            directions, shift = directions * factor, shift * factor
        for part in self._row_chunks(shift.device):
            first, last = part.start * self.shape[1], part.stop * self.shape[1]
            mask = None if signs is None else signs[first // 8 : (last + 7) // 8]
            yield (
                part,
                block_ops.decode_relu_dropout(
                    coefficients[part],
                    directions,
                    shift,
                    mask,
                    p=p,
                    seed=drawn,
                    offset=offset + first,
                    backend=self.backend,
                ),
            )


@dataclass(frozen=True)
class ResidentLayout(_Chunked):
    """Features that are there anyway, with dropout regenerated from its seed: exact, and nothing is kept.

    Its tensors are the features, and the seed if it is a tensor. The fields are those of :class:`SketchLayout`.
    """

    shape: tuple[int, ...]
    dropout: float = 0.0
    seed: int | None = 0
    backend: str = "auto"

    @property
    def stored_type(self) -> str:
        """Nothing is stored."""
        return "resident"

    def chunks(self, tensors: tuple[Tensor, ...]) -> Iterator[tuple[slice, Tensor]]:
        """Runs of rows, and the features there."""
        features, *rest = tensors
        seed = rest[-1] if self.seed is None else self.seed
        drawn, offset = ops.seed_tensor(seed, features.device), ops.row_offset(seed, features)
        for part in self._row_chunks(features.device):
            piece, first = features[part], part.start * self.shape[1]
            if self.dropout:
                piece = ops.dropout(piece, p=self.dropout, seed=drawn, offset=offset + first, backend=self.backend)
            yield part, piece

    def weight_gradients(self, grads: Sequence[Tensor], tensors: tuple[Tensor, ...]) -> list[Tensor]:
        """Products grad^T x for grad (N, C): (C, D); each at once where the features are used as they are."""
        if self.dropout or grads[0].dtype != tensors[0].dtype:
            return super().weight_gradients(grads, tensors)
        return [grad.T @ tensors[0] for grad in grads]


@dataclass(frozen=True)
class ProductLayout(_Chunked):
    """The product x W^T of a kept activation, multiplied again where it is needed.

    Its tensors are those of x, and W (C, D).

    Args:
        source: how x is kept.
        shape: (N, C).
    """

    source: Layout
    shape: tuple[int, ...]

    @property
    def stored_type(self) -> str:
        """What the activation is kept as."""
        return self.source.stored_type

    def chunks(self, tensors: tuple[Tensor, ...]) -> Iterator[tuple[slice, Tensor]]:
        """Runs of rows, and the product there."""
        *kept, weight = tensors
        if isinstance(self.source, _Chunked):
            for part, piece in self.source.chunks(tuple(kept)):
                yield part, piece.to(weight.dtype) @ weight.T
        else:
            yield slice(0, self.shape[0]), self.source.decode(tuple(kept)).to(weight.dtype) @ weight.T


def keep_coefficients(
    z: Tensor,
    mean: Tensor,
    scale: Tensor,
    directions: Tensor,
    sampled: Tensor,
    form: MapFormat | CoefficientFormat,
    *,
    bits: Tensor | None = None,
    seed: int | Tensor,
    standardized: bool = True,
) -> tuple[tuple[Coefficients, tuple[Tensor, ...]], Tensor]:
    """Keeps c = ((z - mean) scale) V, each column divided by its deviation in sampled rows, or all by one.

    Args:
        z: map (N, D).
        mean: (D,), of its columns.
        scale: (D,), what the centred columns are multiplied by.
        directions: V (D, R), or (D,) of the columns themselves.
        sampled: c (S, R) of some rows of the whole map.
        form: how the coefficients are quantized.
        bits: int32 (R,), dealt over the directions, for a :class:`CoefficientFormat`.
        seed: of the rounding.
        standardized: whether each column has a deviation of its own. One that is small but for some rows would widen
            the ranges of these, where a range is that of a row.

    Returns:
        The kept coefficients, and the deviations (R,) that were divided out.
    """
    scaled = per_feature(scale, directions) * directions
    deviation = sampled.square().mean(0).sqrt()
    if not standardized:
        deviation = deviation.square().mean().sqrt().expand_as(deviation)
    # A column that is next to constant in these rows need not be so in the others.
    deviation = deviation.clamp_min(1e-3 * deviation.max()).clamp_min(1e-12)
    matrix = scaled / deviation
    factors = (matrix.to(z.dtype), -coefficients_of(mean, matrix).to(z.dtype))
    if isinstance(form, MapFormat):
        return form.encode_product(z, *factors, seed=seed), deviation
    product = torch.addmm(factors[1], z, factors[0])
    return encode_coefficients(product, form, bits=bits, seed=seed), deviation


def encode_coefficients(
    coefficients: Tensor, form: MapFormat | CoefficientFormat, *, bits: Tensor | None, seed: int | Tensor
) -> tuple[Coefficients, tuple[Tensor, ...]]:
    """Keeps standardised coefficients (N, R); ``bits`` (R,) are those of a :class:`CoefficientFormat`."""
    if isinstance(form, MapFormat):
        return form.encode(coefficients, seed=seed)
    assert bits is not None
    return form.encode(coefficients, bits, seed=seed)
