"""The directions of a map: found by an eigenproblem, followed as the map moves, and random ones of what they miss.

Shapes: N nodes, S sampled rows, D features, R directions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from iexact_runner.compression.choices import Choice
from iexact_runner.compression.seeds import normal_draws
from iexact_runner.compression.signs import Room

# What the inner products of unit columns in float64 are shifted by: some hundred times their rounding.
CHOLESKY_SHIFT = 1e-13


@dataclass
class Directions:
    """The directions of one map: found anew every so many training passes, and following the map in between.

    Args:
        vectors: (D, R), orthonormal columns, or ones (D,) for the columns of the map themselves; None before the
            first pass.
        age: training passes since they were found anew.
        interval: passes after which they are found anew; 0 before the first pass.
        bits: int32 (R,), dealt when they were found anew; None if all coefficients have as many.
        room: for the signs of the map, once it has any.
        choice: how this map is kept, where each has its own; None for as the configuration says.
    """

    vectors: Tensor | None = None
    age: int = 0
    interval: int = 0
    bits: Tensor | None = None
    room: Room | None = None
    choice: Choice | None = None

    @property
    def due(self) -> bool:
        """Whether the next pass finds anew what was found; the columns of a map themselves stay."""
        return self.vectors is not None and not self.of_columns and self.age >= self.interval

    @property
    def of_columns(self) -> bool:
        """Whether this map is kept by its columns themselves, which have no directions to find."""
        return self.choice is not None and self.choice.of_columns

    def observe(self, z: Tensor, sample: Tensor, offset: Tensor) -> None:
        """Told of a map (N, D), sampled rows (S, D) as they are sketched, and what is added before signs are taken."""

    def observe_quantized(self, x: Tensor) -> None:
        """Told of a map (N, D) that is quantized without a sketch."""

    def follow(self, vectors: Tensor) -> None:
        """Takes the directions that follow; in their place where a captured step is to read them again."""
        self.age += 1
        if self.vectors is not None and vectors.is_cuda and torch.cuda.is_current_stream_capturing():
            self.vectors.copy_(vectors)
        else:
            self.vectors = vectors

    def state(self) -> dict[str, Any]:
        """As a checkpoint holds it."""
        return {
            "vectors": self.vectors,
            "age": self.age,
            "interval": self.interval,
            "bits": self.bits,
            "room": self.room and self.room.state(),
            "choice": self.choice and self.choice.state(),
        }

    @classmethod
    def of(cls, state: Mapping[str, Any], device: torch.device) -> Directions:
        """What :meth:`state` was taken of."""
        vectors, bits = (None if part is None else part.to(device) for part in (state["vectors"], state["bits"]))
        room, choice = state["room"], state["choice"]
        ages = state["age"], state.get("interval", 0)  # which 0.2.0 does not write: it finds them anew
        return cls(vectors, *ages, bits, room and Room(**room), choice and Choice(**choice))


def coefficients_of(x: Tensor, directions: Tensor) -> Tensor:
    """Coefficients x V (S, R) of rows (S, D) in directions V (D, R); with (D,), the columns times these factors."""
    return x * directions if directions.dim() == 1 else x @ directions


def rows_of(coefficients: Tensor, directions: Tensor) -> Tensor:
    """Rows c V^T (S, D) of coefficients (S, R) in directions V (D, R), or (D,) as above."""
    return coefficients * directions if directions.dim() == 1 else coefficients @ directions.T


def per_feature(factor: Tensor, directions: Tensor) -> Tensor:
    """A factor of each feature (D,) in the shape in which it multiplies directions (D, R) or (D,)."""
    return factor if directions.dim() == 1 else factor.unsqueeze(1)


def leading_directions(sample: Tensor, *, rank: int | None, energy: float | None) -> Tensor:
    """Leading eigenvectors (D, R) of the second moments of rows (S, D).

    R is ``rank``, at most D, or else as many as hold the share ``energy`` of the sum of squares.
    """
    moments = sample.float().T @ sample.float()
    # Of rows that are not finite any directions will do, for the loss is not finite either and says so better.
    # In ascending order: the last belong to the largest eigenvalues.
    values, vectors = torch.linalg.eigh(moments.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0))
    if rank is None:
        share = values.flip(0).clamp_min(0).cumsum(0)
        rank = 1 + int((share < (energy or 1.0) * share[-1]).sum())
    # The first one first: a step of orthogonal iteration keeps that order, in which bits are dealt.
    leading: Tensor = vectors[:, -min(rank, vectors.size(1)) :].flip(1).contiguous()
    return leading


def followed_directions(sample: Tensor, directions: Tensor) -> Tensor:
    """Directions (D, R) that follow rows (S, D) which have moved: one step of orthogonal iteration from V (D, R).

    It brings V nearer to the leading eigenvectors of the rows' second moments, for two products and a QR decomposition
    of R columns in place of an eigenproblem of size D.
    """
    followed: Tensor = (sample.T @ (sample @ directions)).float()
    return _orthonormal(followed) if followed.is_cuda else torch.linalg.qr(followed).Q.contiguous()


def _orthonormal(columns: Tensor) -> Tensor:
    """The Q of QR by Cholesky decompositions of the columns' inner products, in float64; a GPU is not waited for.

    Shifted Cholesky QR (Fukaya et al., 2020), twice. A column that depends on those before it becomes next to zero.
    """
    q = columns.double()
    q = q / q.norm(dim=0).clamp_min(torch.finfo(torch.float64).tiny)
    for _ in range(2):
        moments = q.T @ q
        moments.diagonal().add_(CHOLESKY_SHIFT)
        factor = torch.linalg.cholesky_ex(moments).L
        q = torch.linalg.solve_triangular(factor.T, q, upper=True, left=False)
    orthonormal: Tensor = q.to(columns.dtype, memory_format=torch.contiguous_format)
    return orthonormal


def residual_directions(directions: Tensor, count: int, *, seed: int | Tensor) -> Tensor:
    """Random directions (D, count) Q of what V (D, R) misses: E[Q Q^T] = I - V V^T.

    Orthogonal columns of one length, uniform in the complement of V: of all such Q that with the least variance (PRAC,
    arXiv 2602.23111). Where the complement has fewer than ``count`` dimensions the last columns are zero.
    """
    width, rank = directions.shape
    kept = min(count, width - rank)
    basis = normal_draws(width * kept, seed=seed, device=directions.device).view(width, kept).to(directions.dtype)
    for _ in range(2):  # once leaves parts along V where the columns nearly span the complement
        basis = torch.linalg.qr(basis - directions @ (directions.T @ basis))[0]
    return F.pad(basis * ((width - rank) / max(1, kept)) ** 0.5, (0, count - kept))
