"""The shared low-rank sketch: a few adaptive directions of each map serve BatchNorm and the next convolution alike.

``docs/lowrank.md`` has the equations. Shapes: N nodes, D features, R directions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from iexact_runner.compression.choices import UNPLANNED, Choice
from iexact_runner.compression.coefficients import CoefficientFormat, deal_bits, directions_for
from iexact_runner.compression.directions import (
    Directions,
    coefficients_of,
    followed_directions,
    leading_directions,
    per_feature,
    residual_directions,
    rows_of,
)
from iexact_runner.compression.formats import blocks
from iexact_runner.compression.maps import KeptMap, MapFormat
from iexact_runner.compression.signs import Room, sure_from
from iexact_runner.compression.sketch import (
    ProductLayout,
    ResidentLayout,
    SketchLayout,
    encode_coefficients,
    keep_coefficients,
)
from iexact_runner.config import CompressionConfig
from iexact_runner.parallel.shard import WHOLE, Shard
from iexact_runner.schemes import functions
from iexact_runner.schemes.activation import Activation, Kept, Resident
from iexact_runner.schemes.normalization import BatchNormReLUDropout, momentum_of
from iexact_runner.schemes.projected import Projected

# Bits of an element of the maps that have no sketch, where the coefficients of sketches have bits of their own.
OTHER_BITS = 4


class LowRank(Projected):
    """One training pass of the low-rank scheme; the forward pass stays exact.

    Args:
        config: rank or energy, bits, and how often directions are renewed.
        seed: seed of this pass.
        map_seed: seed of the rounding, if it is to differ from that of the masks.
        directions: those of the model's maps, in the order of the pass; found or brought up to date here.
        shard: which rows of the whole graph these are.
    """

    def __init__(
        self,
        config: CompressionConfig,
        *,
        seed: int | Tensor,
        map_seed: int | Tensor | None = None,
        directions: list[Directions],
        shard: Shard = WHOLE,
    ) -> None:
        super().__init__(config, seed=seed, map_seed=map_seed, shard=shard)
        self._config = config
        self.uses_known_products = True  # features are referenced, and so may be their product
        self._form = blocks(config)
        self._common = Choice(config.map_bits, config.sign_threshold, config.sign_share)
        if config.scheme == "auto":
            self._common = UNPLANNED
        if self._common.bits is not None:
            self._format = replace(self._form, bits=OTHER_BITS)
        self._directions = directions
        self._maps = 0
        self._normalized: KeptMap | None = None

    def input(self, features: Tensor, *, dropout: float) -> Activation:
        """The activation a model starts from: the features are referenced, dropout on them is regenerated."""
        return self.drop(Activation(features, Resident()), dropout)

    def finish(
        self,
        convolve: Callable[[], Tensor],
        *,
        norm: nn.BatchNorm1d | None,
        residual: Tensor | None,
        dropout: float,
        owned: bool = True,
    ) -> Activation:
        """A convolution, BatchNorm, + residual, ReLU, dropout: one sketch, or two if a residual comes between."""
        if not torch.is_grad_enabled():
            return super().finish(convolve, norm=norm, residual=residual, dropout=dropout, owned=owned)
        h = convolve()
        self._normalized = None
        if norm is not None and norm.affine and residual is None and not self._config.residual:
            return self._normalize_relu_dropout(h, norm, dropout, overwrite=owned and not torch.compiler.is_compiling())
        if norm is not None:
            h = self.batch_norm(h, norm)
        if residual is not None:
            h, self._normalized = h + residual, None
        return self._relu_dropout(h, self._normalized or self._kept_sketch(h), dropout)

    def _relu_dropout(self, h: Tensor, sketch: KeptMap, p: float, *, inplace: bool = False) -> Activation:
        """ReLU and dropout of a map (N, D) with a sketch."""
        seed, fixed, seeds = self._mask_seed() if p else (0, 0, [])
        kept: list[KeptMap] = []

        def keep(mask: Tensor) -> KeptMap:
            kept.append(self._signed(sketch, mask, p, seed, fixed, seeds))
            return kept[0]

        value: Tensor = functions.SketchedReLUDropout.apply(h, p, seed, self._backend, keep, inplace)
        return Activation(value, Kept(kept[0]), owned=True)

    def _normalize_relu_dropout(self, h: Tensor, norm: nn.BatchNorm1d, p: float, *, overwrite: bool) -> Activation:
        """BatchNorm, ReLU and dropout in one pass over h (N, D), and in two backwards."""
        seed, fixed, seeds = self._mask_seed() if p else (0, 0, [])
        kept: list[KeptMap] = []

        def keep(mean: Tensor, inverse_std: Tensor) -> KeptMap:
            return self._keep_normalized(h, mean, inverse_std, norm.weight, norm.bias)

        def keep_signs(mask: Tensor) -> KeptMap:
            assert self._normalized is not None
            kept.append(self._signed(self._normalized, mask, p, seed, fixed, seeds))
            return kept[0]

        parameters = (norm.weight, norm.bias, norm.running_mean, norm.running_var, momentum_of(norm), norm.eps)
        value: Tensor = BatchNormReLUDropout.apply(
            h, *parameters, p, seed, self._backend, keep, keep_signs, overwrite, self.shard
        )
        return Activation(value, Kept(kept[0]), owned=True)

    def _signed(
        self, sketch: KeptMap, mask: Tensor, p: float, seed: int | Tensor, fixed: int | None, seeds: list[Tensor]
    ) -> KeptMap:
        """A sketch with the signs of the ReLU that follows it, and the dropout after that."""
        layout, tensors = sketch
        assert isinstance(layout, SketchLayout)
        exact = self._config.signs == "exact"
        signed, tensors = layout.with_signs(tensors, mask, exact=exact, p=p, seed=seed)
        return KeptMap(replace(signed, dropout=p, seed=fixed), (*tensors, *seeds))

    def drop(self, x: Activation, p: float) -> Activation:
        """Dropout of an activation that has other consumers; both are decoded from one sketch."""
        if not p:
            return x
        seed, fixed, seeds = self._mask_seed()
        value: Tensor = functions.Dropout.apply(x.value, p, seed, self._backend)
        kept = self._shared(x) if isinstance(x.source, Resident) else x.source.kept
        if kept is None or not isinstance(kept.layout, (SketchLayout, ResidentLayout)) or kept.layout.dropout:
            return Activation(value, Kept(), owned=True)
        layout = replace(kept.layout, dropout=p, seed=fixed)
        return Activation(value, Kept(KeptMap(layout, (*kept.tensors, *seeds))), owned=True)

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
        return Activation(value, Kept(self._normalized or self._kept_sketch(value)))

    def rectified(self, x: Activation, negative_slope: float, *, inplace: bool = False) -> Activation:
        """LeakyReLU; after ReLU of a sketched map the mask is added to its sketch.

        Of a map that is no table of nodes and features, a sketch would have no rows: it keeps 1 bit an element.
        """
        if negative_slope or x.value.dim() != 2:
            return super().rectified(x, negative_slope, inplace=inplace)
        sketch = x.source.kept
        layout = None if sketch is None else sketch.layout
        if sketch is None or not isinstance(layout, SketchLayout) or layout.signs is not None or layout.dropout:
            sketch = self._kept_sketch(x.value)
        return self._relu_dropout(x.value, sketch, 0.0, inplace=inplace)

    def _shared(self, x: Activation) -> KeptMap:
        """The one kept map of an activation: of the features a reference, of a map with no sketch yet its own."""
        if x.source.kept is None:
            if isinstance(x.source, Resident):
                x.source.kept = KeptMap(ResidentLayout(tuple(x.value.shape), backend=self._backend), (x.value,))
            else:
                x.source.kept = self._kept_sketch(x.value)
        return x.source.kept

    def _keep_messages(self, x: Activation) -> KeptMap:
        """The sketch of an activation that has one already."""
        return x.source.kept or super()._keep_messages(x)

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
        gamma = torch.ones_like(mean) if weight is None else weight.detach()
        beta = torch.zeros_like(mean) if bias is None else bias.detach().clone()
        layout, tensors = self._sketch(h.detach(), mean, inverse_std, offset=beta / gamma)
        parts = layout.coefficients.parts
        coefficients, (directions, _, *limit) = tensors[:parts], tensors[parts:]
        scaled = (directions * per_feature(gamma, directions), beta, *(bound * gamma.abs() for bound in limit))
        self._normalized = KeptMap(layout, (*coefficients, *scaled))
        input_layout = replace(layout, gives_signs=False, half=0 if self._config.residual else None)
        return KeptMap(input_layout, (*coefficients, directions / per_feature(inverse_std, directions), mean))

    def _kept_sketch(self, z: Tensor) -> KeptMap:
        """A map z (N, D) as a sketch of its own."""
        mean = self.shard.mean(z.detach())
        return KeptMap(*self._sketch(z.detach(), mean, torch.ones_like(mean), offset=mean))

    def _sketch(
        self, z: Tensor, mean: Tensor, scale: Tensor, *, offset: Tensor
    ) -> tuple[SketchLayout, tuple[Tensor, ...]]:
        """The sketch of (z - mean) * scale for a map z (N, D) with columns of this mean; its shift is the mean.

        ``offset`` (D,) is what is added to the sketched map before its sign is taken.
        """
        state = self._next_map()
        config, choice = self._config, state.choice or self._common
        # A compiler would keep the decoded coefficients between the passes, which are larger than all signs.
        threshold = None if torch.compiler.is_compiling() else choice.sign_threshold
        sample = (
            self.shard.sample(z, config.sample_rows).sub_(mean).mul_(scale)
        )  # written over: of a mini-batch these may be all rows
        state.observe(z, sample, offset)
        self._renew(state, sample)
        directions, residual = state.vectors, config.residual
        assert directions is not None
        if residual:
            halves = [self._residual_directions(directions) for _ in range(2)]
            directions = torch.cat([directions, *halves], dim=1)
        form, seed, sampled = self._coefficients_of(choice), self.next_map_seed(), coefficients_of(sample, directions)
        (coefficients, tensors), deviation = keep_coefficients(
            z,
            mean,
            scale,
            directions,
            sampled,
            form,
            bits=state.bits,
            seed=seed,
            standardized=not state.of_columns,
        )
        scaled, limit = directions * deviation, []
        if threshold is not None:
            state.room = state.room or Room(share=choice.sign_share or 1.0)
            own, parts = encode_coefficients(sampled / deviation, form, bits=state.bits, seed=seed)
            known = rows_of(own.stored(parts[: own.parts]).float(), scaled)
            missed = sample.sub_(known).square_().mean(0).sqrt()
            limit = sure_from(known.add_(offset), missed, [(threshold, choice.sign_share)])
        if residual:
            scaled[:, -2 * residual :] /= 2  # the mean of two estimates
        layout = SketchLayout(
            coefficients,
            tuple(z.shape),
            gives_signs=bool(limit),
            backend=self._backend,
            residual=residual,
            room=state.room if limit else None,
        )
        return layout, (*tensors[: coefficients.parts], scaled, mean, *limit)

    def _next_map(self) -> Directions:
        """What is known of the next map of the pass."""
        if self._maps == len(self._directions):
            self._directions.append(Directions())
        self._maps += 1
        return self._directions[self._maps - 1]

    def _coefficients_of(self, choice: Choice) -> MapFormat | CoefficientFormat:
        if choice.bits is None:  # as the configuration says, or FP32
            return self._form
        if choice.blockwise:
            return replace(self._form, bits=choice.bits)
        return CoefficientFormat(choice.bits, self._config.rounding == "stochastic", self._config.backend)

    def _keep(self, value: Tensor, *, project: bool) -> KeptMap:
        """A map without a sketch."""
        if self._config.scheme != "auto":
            return super()._keep(value, project=project)
        state = self._next_map()
        state.observe_quantized(value)
        form = self._format if state.choice is None else replace(self._form, bits=state.choice.bits)
        return form.keep(value.detach(), seed=self.next_map_seed(), project=project)

    def _renew(self, state: Directions, sample: Tensor) -> None:
        """Finds the directions of a map from sampled rows (S, D), or has them follow; deals bits over new ones."""
        config, choice = self._config, state.choice or self._common
        if state.of_columns:
            if state.vectors is None:
                state.vectors = torch.ones(sample.size(1), device=sample.device)
            return
        known = state.vectors
        # Of another width where the passes of a model of others are not alike after all.
        if known is not None and known.size(0) == sample.size(1) and not state.due:
            state.follow(followed_directions(sample, known))
            return
        rank = config.rank
        if choice.bits is not None and (state.choice is not None or (rank is None and config.energy is None)):
            rank = directions_for(choice.bits)
        state.vectors, state.age = leading_directions(sample, rank=rank, energy=config.energy), 1
        state.interval = config.refresh_on(sample.device.type, before=state.interval)
        if choice.bits is not None:
            state.bits = deal_bits((sample @ state.vectors).square().mean(0), choice.bits)

    def _residual_directions(self, directions: Tensor) -> Tensor:
        return residual_directions(directions, self._config.residual, seed=self.next_map_seed())

    def _mask_seed(self) -> tuple[int | Tensor, int | None, list[Tensor]]:
        """Seed of the next mask; what a layout holds of it, and the tensors that a map holds of it."""
        seed = self.next_mask_seed()
        return (seed, None, [seed]) if isinstance(seed, Tensor) else (seed, seed, [])
