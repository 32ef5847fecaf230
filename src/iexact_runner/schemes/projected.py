"""EXACT and i-EXACT: maps kept by random projection and block-wise stochastic quantization, masks in 1 bit."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from iexact_runner.compression.formats import format_of
from iexact_runner.compression.maps import KeptMap, exact_map
from iexact_runner.compression.seeds import tensor_seed
from iexact_runner.compression.sketch import ResidentLayout
from iexact_runner.config import CompressionConfig
from iexact_runner.data.graph import Adjacency
from iexact_runner.data.sparse import CSR
from iexact_runner.parallel.shard import WHOLE, Shard
from iexact_runner.schemes import functions
from iexact_runner.schemes.activation import Activation, Kept, Resident
from iexact_runner.schemes.aggregation import Extremum, WeightedSpMM
from iexact_runner.schemes.attention import Attention
from iexact_runner.schemes.graph_linear import GraphLinear, GraphWeights
from iexact_runner.schemes.normalization import BatchNorm, momentum_of
from iexact_runner.schemes.plain import Plain
from iexact_runner.schemes.softmax import SoftmaxAggregation


class Projected(Plain):
    """One training pass of the projected scheme; the forward pass stays exact.

    EXACT (Liu et al., ICLR 2022) is one block a row, i-EXACT (Eliassen and Selvan, ICASSP 2024) blocks of ``col_size``
    rows. What no gradient needs is not kept.

    Args:
        config: how maps are kept.
        seed: seed of this pass, an int or a 0-d int64 tensor.
        map_seed: seed of projections and rounding, if it is to differ from that of the masks.
        shard: which rows of the whole graph these are.
    """

    def __init__(
        self,
        config: CompressionConfig,
        *,
        seed: int | Tensor,
        map_seed: int | Tensor | None = None,
        shard: Shard = WHOLE,
    ) -> None:
        super().__init__(training=True, seed=seed, transform_first=bool(config.share_maps), shard=shard)
        self._format = format_of(config)
        self._backend = config.backend
        self._simulate = config.simulate
        self._projects = config.format == "blocks" and config.kept_frac < 1.0
        self._store_dropout_mask = config.store_dropout_mask
        self._map_seed = self.seed if map_seed is None else map_seed
        self._maps_kept = 0
        # Whether what the caller holds anyway is kept as it is, where it would not be projected.
        self.references_inputs = self.uses_known_products = self._format.references_features

    def linear(self, x: Activation, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Product x W^T + b, from the one kept map that all consumers of ``x`` share."""
        if not (torch.is_grad_enabled() and weight.requires_grad):
            return super().linear(x, weight, bias)
        # Plain modules keep nothing of the resident features but a reference.
        fp32_bytes = 0 if isinstance(x.source, Resident) else 4 * x.value.numel()
        value, dtype = x.value, _autocast_dtype(x.value)
        if dtype is not None:
            value, weight, bias = value.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        kept = self._shared(x)
        overwrite = x.owned and _is_free(kept)
        product: Tensor = functions.Linear.apply(value, weight, bias, kept, fp32_bytes, overwrite)
        return product

    def _graph_linear(
        self, x: Activation, adjacency: Adjacency, weights: GraphWeights, own: Activation | None
    ) -> Tensor:
        """In one function, which may take the place of x."""
        needed = all(part is None or part.requires_grad for part in (weights.weight, weights.own))
        if _autocast_dtype(x.value) is not None or not (torch.is_grad_enabled() and needed):
            return super()._graph_linear(x, adjacency, weights, own)
        kept, other = self._shared(x), None if own is None else self._shared(own)
        # Plain modules keep nothing of the resident features but a reference.
        fp32_bytes = [0 if isinstance(part.source, Resident) else 4 * part.value.numel() for part in (x, own or x)]
        product: Tensor = GraphLinear.apply(
            x.value,
            None if own is None else own.value,
            weights.weight,
            weights.own,
            weights.bias,
            adjacency,
            kept,
            other,
            weights.mixes,
            fp32_bytes,
            x.owned and _is_free(kept),
        )
        return product

    def aggregate_weighted(self, x: Activation, weight: Tensor, matrix: CSR) -> Tensor:
        """Sum of neighbours' x (N, D) with weights (E,) that may need a gradient."""
        needed = torch.is_grad_enabled() and weight.requires_grad
        kept = self._shared(x) if needed else None
        # Plain modules keep what each edge gathers.
        fp32_bytes = 4 * weight.numel() * x.value.size(1) if needed else 0
        aggregated: Tensor = WeightedSpMM.apply(x.value, weight, matrix, kept, fp32_bytes)
        return aggregated

    def aggregate_extremum(self, x: Tensor, weight: Tensor | None, matrix: CSR, *, maximum: bool) -> Tensor:
        """Maximum or minimum of neighbours' x (N, D), with weights (E,) that may need a gradient, or none."""
        needed = torch.is_grad_enabled() and weight is not None and weight.requires_grad
        kept = self._keep(x, project=False) if needed else None
        # Plain modules keep what each edge gathers and what comes out.
        fp32_bytes = 4 * (matrix.columns.numel() + x.size(0)) * x.size(1)
        aggregated: Tensor = Extremum.apply(x, weight, matrix, maximum, kept, fp32_bytes)
        return aggregated

    def aggregate_softmax(self, x: Activation, t: Tensor, adjacency: Adjacency, *, semi_grad: bool) -> Tensor:
        """Softmax aggregation that keeps x quantized, without projection; nothing as long as the edges."""
        if not torch.is_grad_enabled():
            return super().aggregate_softmax(x, t, adjacency, semi_grad=semi_grad)
        # Plain modules keep an edge's softmax; where it has a gradient, its message and the steps between as well.
        fp32_bytes = 4 * (1 if semi_grad else 3) * adjacency.matrix.columns.numel() * x.value.size(1)
        kept = self._keep_messages(x)
        aggregated: Tensor = SoftmaxAggregation.apply(x.value, t, adjacency, semi_grad, kept, fp32_bytes)
        return aggregated

    def _keep_messages(self, x: Activation) -> KeptMap:
        """Keeps what a softmax is recomputed from, and is not linear in."""
        return self._keep(x.value, project=False)

    def attention(
        self,
        h: Tensor,
        att_source: Tensor,
        att_target: Tensor | None,
        edges: CSR,
        *,
        negative_slope: float,
        dropout: float = 0.0,
        product: tuple[Activation, Tensor] | None = None,
        overwrite: bool = False,
    ) -> Tensor:
        """Graph attention that keeps h quantized, without projection, and the scores; nothing as long as the edges."""
        if not torch.is_grad_enabled():
            return super().attention(h, att_source, att_target, edges, negative_slope=negative_slope, dropout=dropout)
        _, heads, features = att_source.shape
        # Plain modules keep h, what each edge gathers of it, and the steps of the softmax.
        fp32_bytes = 4 * heads * (h.size(0) * features + edges.columns.numel() * (features + 3))
        kept = self._keep_product(h, product)
        gathered: Tensor = Attention.apply(
            h,
            att_source,
            att_target,
            edges,
            negative_slope,
            dropout,
            self.next_mask_seed() if dropout else 0,
            self._backend,
            kept,
            fp32_bytes,
            overwrite and _is_free(kept),
        )
        return gathered

    def _keep_product(self, h: Tensor, product: tuple[Activation, Tensor] | None) -> KeptMap:
        """Keeps h, or what it is the product of."""
        return self._keep(h, project=False)

    def batch_norm(self, h: Tensor, norm: nn.BatchNorm1d) -> Tensor:
        """BatchNorm1d over the nodes, its input quantized without projection, for dx is not linear in it."""
        if not torch.is_grad_enabled():
            return super().batch_norm(h, norm)
        parameters = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
        return self.normalize(h, *parameters, momentum=momentum_of(norm), eps=norm.eps)

    def normalize(
        self,
        h: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        *,
        momentum: float,
        eps: float,
    ) -> Tensor:
        """BatchNorm1d from its parameters and statistics."""

        def keep(mean: Tensor, inverse_std: Tensor) -> KeptMap:
            return self._keep_normalized(h, mean, inverse_std, weight, bias)

        normalised: Tensor = BatchNorm.apply(
            h, weight, bias, running_mean, running_var, momentum, eps, keep, 4 * h.numel(), self.shard
        )
        return normalised

    def _keep_normalized(
        self, h: Tensor, mean: Tensor, inverse_std: Tensor, weight: Tensor | None, bias: Tensor | None
    ) -> KeptMap:
        """Keeps the input of BatchNorm, whose output is (h - mean) * inverse_std * weight + bias."""
        return self._keep(h, project=False)

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
        """:meth:`normalize` of an activation; what it keeps is of no use to a later consumer."""
        statistics = (running_mean, running_var)
        return Activation(self.normalize(x.value, weight, bias, *statistics, momentum=momentum, eps=eps), Kept())

    def rectified(self, x: Activation, negative_slope: float, *, inplace: bool = False) -> Activation:
        """:meth:`leaky_relu` of an activation."""
        return Activation(self.leaky_relu(x.value, negative_slope, inplace=inplace), Kept())

    def relu(self, h: Tensor) -> Tensor:
        """ReLU, its mask in 1 bit an element."""
        return self.leaky_relu(h, 0.0)

    def leaky_relu(self, h: Tensor, negative_slope: float, *, inplace: bool = False) -> Tensor:
        """LeakyReLU, its mask in 1 bit an element."""
        activated: Tensor = functions.LeakyReLU.apply(h, negative_slope, self._backend, inplace)
        return activated

    def elu(self, h: Tensor, alpha: float) -> Tensor:
        """ELU, its input quantized without projection."""
        kept = self._keep(h.reshape(-1, h.size(-1)), project=False)
        activated: Tensor = functions.ELU.apply(h, alpha, kept, 4 * h.numel())
        return activated

    def relu_dropout(self, h: Tensor, p: float) -> Tensor:
        """ReLU then dropout, in one pass."""
        if p == 0:
            return self.relu(h)
        seed, store_mask, backend = self.next_mask_seed(), self._store_dropout_mask, self._backend
        dropped: Tensor = functions.LeakyReLUDropout.apply(h, 0.0, p, seed, store_mask, backend)
        return dropped

    def dropout(self, h: Tensor, p: float) -> Tensor:
        """Dropout from the seed of this pass, its mask regenerated or kept in 1 bit an element."""
        if p == 0:
            return h
        dropped: Tensor
        if self._store_dropout_mask:
            dropped = functions.MaskedDropout.apply(h, p, self.next_mask_seed(), self._backend)
        else:
            dropped = functions.Dropout.apply(h, p, self.next_mask_seed(), self._backend)
        return dropped

    def _shared(self, x: Activation) -> KeptMap:
        """The one kept map of an activation, made by its first consumer."""
        if x.source.kept is None:
            held = self.references_inputs and isinstance(x.source, Resident) and not self._projects
            if held and not x.value.is_inference():  # of which autograd saves nothing
                x.source.kept = KeptMap(ResidentLayout(tuple(x.value.shape), backend=self._backend), (x.value,))
            else:
                x.source.kept = self._keep(x.value, project=True)
        return x.source.kept

    def _keep(self, value: Tensor, *, project: bool) -> KeptMap:
        kept = self._format.keep(value.detach(), seed=self.next_map_seed(), project=project)
        return exact_map(kept.layout.decode(kept.tensors)) if self._simulate else kept

    @property
    def fallback_bits(self) -> int | None:
        """Bits of an element of the maps that no operation here keeps."""
        return self._format.bits

    def next_map_seed(self) -> int | Tensor:
        """Seed of the next map."""
        self._maps_kept += 1
        return tensor_seed(self._map_seed, self._maps_kept - 1)


def _is_free(kept: KeptMap) -> bool:
    """Whether a map may be overwritten once it is kept: what is kept of it is not the map itself."""
    return kept.layout.decodes_afresh and not torch.compiler.is_compiling()


def _autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The type that autocast, if it is on, computes products in."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
