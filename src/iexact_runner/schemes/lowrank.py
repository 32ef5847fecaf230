"""The shared low-rank sketch: a few adaptive directions of each map serve BatchNorm and the next convolution alike.

``docs/lowrank.md`` has the equations. Shapes: N nodes, D features, R directions.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from iexact_runner.compression.maps import KeptMap, MapFormat
from iexact_runner.compression.sketch import (
    Directions,
    SketchLayout,
    keep_coefficients,
    leading_directions,
    sampled_rows,
)
from iexact_runner.config import CompressionConfig
from iexact_runner.schemes import functions
from iexact_runner.schemes.activation import Activation, Kept, Resident
from iexact_runner.schemes.projected import Projected


class LowRank(Projected):
    """One training pass of the low-rank scheme; the forward pass stays exact.

    Args:
        config: rank or energy, bits, and how often directions are renewed.
        seed: seed of this pass.
        map_seed: seed of the rounding, if it is to differ from that of the masks.
        directions: those of the model, one for each map in the order of the pass; renewed here.
    """

    def __init__(
        self,
        config: CompressionConfig,
        *,
        seed: int | Tensor,
        map_seed: int | Tensor | None = None,
        directions: dict[int, Directions],
    ) -> None:
        super().__init__(config, seed=seed, map_seed=map_seed)
        self.transform_first = True
        self._config = config
        self._directions = directions
        self._sketches = 0

    def linear(self, x: Activation, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Product x W^T + b; resident features are referenced, exact and free."""
        if isinstance(x.source, Resident):
            return F.linear(x.value, weight, bias)
        return super().linear(x, weight, bias)

    def finish(
        self, convolve: Callable[[], Tensor], *, norm: nn.BatchNorm1d | None, residual: Tensor | None, dropout: float
    ) -> Activation:
        """A convolution, BatchNorm, + residual, ReLU, dropout: one sketch, or two if a residual comes between."""
        if not torch.is_grad_enabled():
            return super().finish(convolve, norm=norm, residual=residual, dropout=dropout)
        h = convolve()
        sketch: tuple[KeptMap, Tensor, Tensor] | None = None
        if norm is not None:
            with torch.no_grad():
                variance, mean = torch.var_mean(h, 0, correction=0)
                scale = (variance + norm.eps).rsqrt()
                kept, directions = self._sketch(h, mean, scale)
            # The sketch is of the normalised map; BatchNorm's backward asks for its input.
            restored = directions / scale.unsqueeze(1)
            h = self._normalised(h, norm, self._layout(h, kept, restored, mean))
            sketch = (kept, directions * norm.weight.detach().unsqueeze(1), norm.bias.detach().clone())
        if residual is not None:
            h = h + residual
            sketch = None
        if sketch is None:
            with torch.no_grad():
                mean = h.mean(0)
                kept, directions = self._sketch(h, mean, torch.ones_like(mean))
            sketch = (kept, directions, mean)
        signs: list[Tensor] = []
        mask_seed = self.next_mask_seed() if dropout else 0
        backend = self._format.backend
        value: Tensor
        if dropout:
            value = functions.LeakyReLUDropout.apply(h, 0.0, dropout, mask_seed, False, backend, signs)
        else:
            value = functions.LeakyReLU.apply(h, 0.0, backend, False, signs)
        activation = Kept(self._layout(h, *sketch, signs=signs, dropout=dropout, seed=mask_seed))
        return Activation(value, activation)

    def _normalised(self, h: Tensor, norm: nn.BatchNorm1d, kept: KeptMap) -> Tensor:
        return self.normalize_from(h, norm, kept)

    def _sketch(self, z: Tensor, mean: Tensor, scale: Tensor) -> tuple[KeptMap, Tensor]:
        state = self._directions.setdefault(self._sketches, Directions())
        self._sketches += 1
        config = self._config
        if state.vectors is None or state.age >= config.refresh or state.vectors.size(0) != z.size(1):
            rows = sampled_rows(z.size(0), config.sample_rows, device=z.device)
            sample = (z[rows] - mean) * scale
            state.vectors, state.age = leading_directions(sample, rank=config.rank, energy=config.energy), 0
        state.age += 1
        return keep_coefficients(z, mean, scale, state.vectors, self._format, seed=self._next_map_seed())

    def _layout(
        self,
        z: Tensor,
        kept: KeptMap,
        directions: Tensor,
        shift: Tensor,
        *,
        signs: list[Tensor] | None = None,
        dropout: float = 0.0,
        seed: int | Tensor = 0,
    ) -> KeptMap:
        fixed = None if isinstance(seed, Tensor) else seed
        layout = SketchLayout(
            kept.layout, tuple(z.shape), signs is not None, dropout, fixed, self._format.backend
        )
        seeds = [seed] if isinstance(seed, Tensor) else []
        return KeptMap(layout, (*kept.tensors, directions, shift, *(signs or []), *seeds))
