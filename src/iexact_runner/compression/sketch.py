"""Maps kept as coefficients in a few adaptive directions, and the masks that make an activation of them again.

For a map z (N, D) with column means m and directions V (D, R), the leading eigenvectors of its covariance, kept are the
coefficients c = (z - m) V, each column divided by its deviation and quantized block-wise; z~ = c~ V^T + m. What was
learned from c for one use serves every other: see ``docs/lowrank.md``.

Shapes: N nodes, D features, R directions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from iexact_runner.compression import ops
from iexact_runner.compression.maps import KeptMap, MapFormat, MapLayout

# Elements of a map that are decoded at once, in runs of whole rows whose masks begin with a byte.
CHUNK_ELEMENTS = 1 << 17


@dataclass(frozen=True)
class SketchLayout:
    """How an activation dropout(ReLU(scale * z + shift)) is decoded from the sketch of z.

    The tensors of such a map are those of the coefficients, the scaled directions (D, R), the shift (D,), and the sign
    mask of ReLU if there was one.

    Args:
        coefficients: how the coefficients (N, R) are kept.
        shape: (N, D).
        relu: whether the sign mask is among the tensors.
        dropout: rate of the dropout after it.
        seed: seed of its mask; a tensor seed is the last of the tensors.
        backend: who runs the kernels.
    """

    coefficients: MapLayout
    shape: tuple[int, ...]
    relu: bool = False
    dropout: float = 0.0
    seed: int | None = 0
    backend: str = "auto"

    @property
    def stored_type(self) -> str:
        """What a coefficient is kept as."""
        return self.coefficients.stored_type

    def decode(self, tensors: tuple[Tensor, ...]) -> Tensor:
        """The activation (N, D)."""
        decoded = tensors[self._parts].new_empty(self.shape)
        for part, piece in self._chunks(tensors):
            decoded[part] = piece
        return decoded

    def weight_gradient(self, grad: Tensor, tensors: tuple[Tensor, ...]) -> Tensor:
        """grad^T x~ for grad (N, C): (C, D); no (N, D) map is built."""
        gradient = grad.new_zeros(grad.size(1), self.shape[1])
        for part, piece in self._chunks(tensors):
            gradient.addmm_(grad[part].T, piece.to(grad.dtype))
        return gradient

    def inner_product_factors(self, grad: Tensor, tensors: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Two maps (N, D) whose rows' inner products are those of ``grad`` with the activation."""
        return grad, self.decode(tensors)

    @property
    def _parts(self) -> int:
        return 1 if self.coefficients.bits is None else 3

    def _chunks(self, tensors: tuple[Tensor, ...]) -> Iterator[tuple[slice, Tensor]]:
        kept, (directions, shift, *rest) = tensors[: self._parts], tensors[self._parts :]
        coefficients = self.coefficients.stored(kept)
        nodes, width = self.shape
        rows = max(8, CHUNK_ELEMENTS // width // 8 * 8)
        for start in range(0, nodes, rows):
            part = slice(start, min(start + rows, nodes))
            piece = torch.addmm(shift, coefficients[part], directions.T)
            yield part, self._activated(piece, start * width, rest)

    def _activated(self, piece: Tensor, offset: int, rest: list[Tensor]) -> Tensor:
        seed = rest[-1] if self.seed is None else self.seed
        if not self.relu:
            if not self.dropout:
                return piece
            return ops.dropout(piece, p=self.dropout, seed=seed, offset=offset, backend=self.backend)
        mask = rest[0][offset // 8 : (offset + piece.numel() + 7) // 8]
        if not self.dropout:
            return ops.leaky_relu_backward(piece, mask, negative_slope=0.0, backend=self.backend)
        return ops.leaky_relu_dropout_backward(
            piece, mask, negative_slope=0.0, p=self.dropout, seed=seed, offset=offset, backend=self.backend
        )


@dataclass
class Directions:
    """The directions of one map, renewed every so many training passes.

    Args:
        vectors: (D, R), orthonormal columns; None before the first pass.
        age: training passes since they were found.
    """

    vectors: Tensor | None = None
    age: int = 0


def leading_directions(sample: Tensor, *, rank: int | None, energy: float | None) -> Tensor:
    """Leading eigenvectors (D, R) of the second moments of rows (S, D).

    R is ``rank``, at most D, or else as many as hold the share ``energy`` of the sum of squares.
    """
    sample = sample.float()
    # In ascending order: the last belong to the largest eigenvalues.
    values, vectors = torch.linalg.eigh(sample.T @ sample)
    if rank is None:
        share = values.flip(0).clamp_min(0).cumsum(0)
        rank = 1 + int((share < energy * share[-1]).sum())
    return vectors[:, -min(rank, vectors.size(1)) :].contiguous()


def sampled_rows(nodes: int, count: int, *, device: torch.device) -> Tensor:
    """Indices of about ``count`` rows, evenly spaced."""
    return torch.arange(0, nodes, max(1, nodes // count), device=device)


def keep_coefficients(
    z: Tensor, mean: Tensor, scale: Tensor, directions: Tensor, form: MapFormat, *, seed: int | Tensor
) -> tuple[KeptMap, Tensor]:
    """Keeps c = ((z - mean) scale) V, each column divided by its deviation.

    Args:
        z: map (N, D).
        mean: (D,), of its columns.
        scale: (D,), what the centred columns are multiplied by.
        directions: V (D, R).
        form: how the coefficients are quantized.
        seed: of the rounding.

    Returns:
        The kept coefficients, and the directions (D, R) times the deviations that were divided out.
    """
    scaled = (scale.unsqueeze(1) * directions).to(z.dtype)
    coefficients = torch.addmm(-(mean.to(z.dtype) @ scaled), z, scaled)
    deviation = coefficients.float().square().mean(0).sqrt().clamp_min(1e-12)
    kept = form.keep(coefficients.div_(deviation), seed=seed, project=False)
    return kept, directions * deviation
