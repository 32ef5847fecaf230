"""The shared low-rank sketch: a few adaptive directions of each map serve BatchNorm and the next convolution alike.

``docs/lowrank.md`` has the equations. Shapes: N nodes, D features, R directions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from iexact_runner.compression.maps import KeptMap, MapLayout
from iexact_runner.compression.sketch import (
    Directions,
    ProductLayout,
    ResidentLayout,
    SketchLayout,
    followed_directions,
    keep_coefficients,
    leading_directions,
    residual_directions,
    sampled_rows,
)
from iexact_runner.config import CompressionConfig
from iexact_runner.schemes import functions
from iexact_runner.schemes.activation import Activation, Kept, Resident
from iexact_runner.schemes.projected import Projected, momentum_of


@dataclass(frozen=True)
class Sketch:
    """A map kept as its coefficients' tensors, with directions (D, R) that hold all scales, and a shift (D,)."""

    layout: MapLayout
    tensors: tuple[Tensor, ...]
    directions: Tensor
    shift: Tensor


class LowRank(Projected):
    """One training pass of the low-rank scheme; the forward pass stays exact.

    Args:
        config: rank or energy, bits, and how often directions are renewed.
        seed: seed of this pass.
        map_seed: seed of the rounding, if it is to differ from that of the masks.
        directions: those of the model's maps, in the order of the pass; found or brought up to date here.
    """

    def __init__(
        self,
        config: CompressionConfig,
        *,
        seed: int | Tensor,
        map_seed: int | Tensor | None = None,
        directions: list[Directions],
    ) -> None:
        super().__init__(config, seed=seed, map_seed=map_seed)
        self._config = config
        self._directions = directions
        self._sketches = 0
        self._normalized: Sketch | None = None

    def input(self, features: Tensor, *, dropout: float) -> Activation:
        """The activation a model starts from: the features are referenced, dropout on them is regenerated."""
        return self.drop(Activation(features, Resident()), dropout)

    def finish(
        self, convolve: Callable[[], Tensor], *, norm: nn.BatchNorm1d | None, residual: Tensor | None, dropout: float
    ) -> Activation:
        """A convolution, BatchNorm, + residual, ReLU, dropout: one sketch, or two if a residual comes between."""
        if not torch.is_grad_enabled():
            return super().finish(convolve, norm=norm, residual=residual, dropout=dropout)
        h = convolve()
        self._normalized = None
        signs: list[Tensor] = []
        backend = self._format.backend
        seed, fixed, seeds = self._mask_seed() if dropout else (0, 0, [])
        value: Tensor | None = None
        if norm is not None and norm.affine and residual is None and not self._config.residual:
            value = self._normalize_relu_dropout(h, norm, dropout, seed, signs)
        elif norm is not None:
            h = self.batch_norm(h, norm)
        if residual is not None:
            h, self._normalized = h + residual, None
        layout, tensors = self._kept_sketch(h, self._normalized)
        if value is None and dropout:
            value = functions.LeakyReLUDropout.apply(h, 0.0, dropout, seed, False, backend, signs)
        elif value is None:
            value = functions.LeakyReLU.apply(h, 0.0, backend, False, signs)
        layout = replace(layout, relu=True, dropout=dropout, seed=fixed)
        return Activation(value, Kept(KeptMap(layout, (*tensors, *signs, *seeds))))

    def _normalize_relu_dropout(
        self, h: Tensor, norm: nn.BatchNorm1d, p: float, seed: int | Tensor, signs: list[Tensor]
    ) -> Tensor:
        """BatchNorm, ReLU and dropout in one pass over h (N, D), and in two backwards."""

        def keep(mean: Tensor, inverse_std: Tensor) -> KeptMap:
            return self._keep_normalized(h, mean, inverse_std, norm.weight, norm.bias)

        parameters = (norm.weight, norm.bias, norm.running_mean, norm.running_var, momentum_of(norm), norm.eps)
        finished: Tensor = functions.BatchNormReLUDropout.apply(
            h, *parameters, p, seed, self._format.backend, keep, signs
        )
        return finished

    def drop(self, x: Activation, p: float) -> Activation:
        """Dropout of an activation that has other consumers; both are decoded from one sketch."""
        if not p:
            return x
        seed, fixed, seeds = self._mask_seed()
        value: Tensor = functions.Dropout.apply(x.value, p, seed, self._format.backend)
        kept = self._shared(x) if isinstance(x.source, Resident) else x.source.kept
        if kept is None or not isinstance(kept.layout, (SketchLayout, ResidentLayout)) or kept.layout.dropout:
            return Activation(value, Kept())
        layout = replace(kept.layout, dropout=p, seed=fixed)
        return Activation(value, Kept(KeptMap(layout, (*kept.tensors, *seeds))))

    def normalized(
        self,
        x: Activation,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        *,
        momentum: float,
        eps: float,
    ) -> Activation:
        """BatchNorm1d, whose sketch its consumers share."""
        value = self.normalize(x.value, weight, bias, running_mean, running_var, momentum=momentum, eps=eps)
        return Activation(value, Kept(KeptMap(*self._kept_sketch(value, self._normalized))))

    def rectified(self, x: Activation, negative_slope: float, *, inplace: bool = False) -> Activation:
        """LeakyReLU; after ReLU of a sketched map the mask is added to its sketch."""
        if negative_slope:
            return super().rectified(x, negative_slope, inplace=inplace)
        layout, tensors = x.source.kept or (None, ())
        if not isinstance(layout, SketchLayout) or layout.relu or layout.dropout:
            layout, tensors = self._kept_sketch(x.value)
        signs: list[Tensor] = []
        value: Tensor = functions.LeakyReLU.apply(x.value, 0.0, self._format.backend, inplace, signs)
        return Activation(value, Kept(KeptMap(replace(layout, relu=True), (*tensors, *signs))))

    def _shared(self, x: Activation) -> KeptMap:
        """The one kept map of an activation: of the features a reference, of a map with no sketch yet its own."""
        if x.source.kept is None:
            if isinstance(x.source, Resident):
                x.source.kept = KeptMap(ResidentLayout(tuple(x.value.shape), backend=self._format.backend), (x.value,))
            else:
                x.source.kept = KeptMap(*self._kept_sketch(x.value))
        return x.source.kept

    def _keep_product(self, h: Tensor, product: tuple[Activation, Tensor] | None) -> KeptMap:
        """Keeps nothing of h = x W^T but W: x is kept already."""
        if product is None:
            return super()._keep_product(h, product)
        x, weight = product
        kept = self._shared(x)
        return KeptMap(ProductLayout(kept.layout, tuple(h.shape)), (*kept.tensors, weight))

    def _keep_normalized(
        self, h: Tensor, mean: Tensor, inverse_std: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> KeptMap:
        """Keeps the normalised map x^: for BatchNorm as its input, for the block as its output gamma x^ + beta."""
        sketch = self._sketch(h.detach(), mean, inverse_std)
        gamma = torch.ones_like(mean) if weight is None else weight.detach()
        beta = torch.zeros_like(mean) if bias is None else bias.detach().clone()
        self._normalized = replace(sketch, directions=sketch.directions * gamma.unsqueeze(1), shift=beta)
        residual = self._config.residual
        layout = SketchLayout(sketch.layout, tuple(h.shape), residual=residual, half=0 if residual else None)
        return KeptMap(layout, (*sketch.tensors, sketch.directions / inverse_std.unsqueeze(1), mean))

    def _kept_sketch(self, z: Tensor, sketch: Sketch | None = None) -> tuple[SketchLayout, tuple[Tensor, ...]]:
        """A map z (N, D) as its sketch, which is made here if there is none."""
        if sketch is None:
            mean = z.detach().float().mean(0)
            sketch = self._sketch(z.detach(), mean, torch.ones_like(mean))
        layout = SketchLayout(
            sketch.layout, tuple(z.shape), backend=self._format.backend, residual=self._config.residual
        )
        return layout, (*sketch.tensors, sketch.directions, sketch.shift)

    def _sketch(self, z: Tensor, mean: Tensor, scale: Tensor) -> Sketch:
        """The sketch of (z - mean) * scale for a map z (N, D) with columns of this mean; its shift is the mean."""
        if self._sketches == len(self._directions):
            self._directions.append(Directions())
        state = self._directions[self._sketches]
        self._sketches += 1
        config = self._config
        rows = sampled_rows(z.size(0), config.sample_rows, device=z.device)
        sample = (z[rows].float() - mean) * scale
        if state.vectors is None or state.age >= config.refresh:
            state.vectors, state.age = leading_directions(sample, rank=config.rank, energy=config.energy), 0
        else:
            state.vectors = followed_directions(sample, state.vectors)
        state.age += 1
        directions, residual = state.vectors, config.residual
        if residual:
            halves = [self._residual_directions(state.vectors) for _ in range(2)]
            directions = torch.cat([directions, *halves], dim=1)
        (layout, tensors), directions = keep_coefficients(
            z, mean, scale, directions, self._format, seed=self._next_map_seed()
        )
        if residual:
            directions[:, -2 * residual :] /= 2  # the mean of two estimates
        return Sketch(layout, tensors[: layout.parts], directions, mean)

    def _residual_directions(self, directions: Tensor) -> Tensor:
        return residual_directions(
            directions, self._config.residual, seed=self._next_map_seed(), backend=self._format.backend
        )

    def _mask_seed(self) -> tuple[int | Tensor, int | None, list[Tensor]]:
        """Seed of the next mask; what a layout holds of it, and the tensors that a map holds of it."""
        seed = self.next_mask_seed()
        return (seed, None, [seed]) if isinstance(seed, Tensor) else (seed, seed, [])
