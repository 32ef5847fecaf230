"""ActNN (Chen et al., ICML 2021, arXiv 2104.14129): per-group quantization, bits dealt over the rows of a map.

A row is cut into groups of ``group_size`` elements, each with its zero point and range R_g; stochastic rounding to b
bits has a variance of at most R_g^2 / (4 (2^b - 1)^2) an element (section 3). Bits go where they lower the sum over the
rows most, greedily, which is optimal, for the gain of a bit falls with each (section 4.1). Codes have 1, 2, 4 or 8
bits; the weight of a row's gradient is left out, as by default in the authors' code. Shapes: N nodes, D features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from iexact_runner.compression.maps import DecodedLayout, KeptMap
from iexact_runner.compression.seeds import tensor_seed
from iexact_runner.config import CompressionConfig
from iexact_runner.kernels import ops
from iexact_runner.kernels.reference import pack, stored_dtype, unpack

CODE_BITS = (1, 2, 4, 8)


@dataclass(frozen=True)
class ActNN:
    """The format.

    Args:
        bits: mean over the rows.
        group_size: elements of a row that share a zero point and a range.
        backend: who quantizes.
    """

    bits: int
    group_size: int
    backend: str

    @property
    def references_features(self) -> bool:
        """As plain modules do."""
        return True

    def keep(self, x: Tensor, *, seed: int | Tensor, project: bool) -> KeptMap:
        """Keeps a map (N, D), unbiased."""
        width = min(x.size(1), self.group_size)
        layout = ActNNLayout(tuple(x.shape), f"int{self.bits}", x.dtype, width, self.backend)
        rows = F.pad(x, (0, -x.size(1) % width))
        groups = x.size(0) * (rows.size(1) // width)
        if isinstance(x, FakeTensor):  # which rows get how many bits is a number
            sizes = (-(-x.size(0) // 4), -(-rows.numel() * self.bits // 8))
            packed = [x.new_empty(size, dtype=torch.uint8) for size in sizes]
            statistics = [x.new_empty(groups, dtype=stored_dtype(x.dtype)) for _ in range(2)]
            return KeptMap(layout, (*packed, *statistics))
        low, high = rows.view(x.size(0), -1, width).aminmax(dim=2)
        choice = deal_bits((high - low).float().square().sum(1), mean_bits=self.bits)
        parts: list[Tensor] = [pack(choice, 2)]
        for index, bits in enumerate(CODE_BITS):
            chosen = rows[choice == index]
            parts += ops.quantize(
                chosen,
                bits=bits,
                block_size=width,
                levels=None,
                seed=tensor_seed(seed, index),
                backend=self.backend,
            )
        return KeptMap(layout, tuple(parts))


@dataclass(frozen=True)
class ActNNLayout(DecodedLayout):
    """Which of ``CODE_BITS`` each row has, then codes, zeros and scales of the rows of each.

    Args:
        dtype: of the map.
        width: elements of a group.
        backend: who decodes.
    """

    dtype: torch.dtype
    width: int
    backend: str

    def decode(self, tensors: tuple[Tensor, ...]) -> Tensor:
        """Unbiased estimate (N, D) of the map."""
        nodes, columns = self.shape
        padded = columns + -columns % self.width
        choice = unpack(tensors[0], nodes, 2)
        rows = torch.empty(nodes, padded, dtype=self.dtype, device=choice.device)
        for index, bits in enumerate(CODE_BITS):
            codes, zero, scale = tensors[1 + 3 * index : 4 + 3 * index]
            rows[choice == index] = ops.dequantize(
                codes,
                zero,
                scale,
                bits=bits,
                block_size=self.width,
                levels=None,
                shape=(zero.numel() * self.width // padded, padded),
                dtype=self.dtype,
                backend=self.backend,
            )
        return rows[:, :columns].contiguous()


def deal_bits(weights: Tensor, *, mean_bits: int) -> Tensor:
    """Index (N,) into ``CODE_BITS`` for each row, of least sum of weights / (2^b - 1)^2 at ``mean_bits`` a row.

    Rows begin with one bit. What a bit more gains falls from step to step, so the best steps, taken in order, are best
    together; those that no longer fit are left out.
    """
    variance = [1 / (2**bits - 1) ** 2 for bits in CODE_BITS]
    costs = [after - before for before, after in zip(CODE_BITS, CODE_BITS[1:], strict=False)]
    gains = [(before - after) / cost for before, after, cost in zip(variance, variance[1:], costs, strict=False)]
    gain = weights.double().nan_to_num().unsqueeze(0) * weights.new_tensor(gains, dtype=torch.float64).unsqueeze(1)
    cost = torch.tensor(costs, device=weights.device).unsqueeze(1).expand_as(gain).flatten()
    order = gain.flatten().argsort(descending=True, stable=True)  # a row's own steps in order, at equal gains too
    taken = cost[order].cumsum(0) <= (mean_bits - 1) * weights.numel()
    steps = torch.zeros(gain.numel(), dtype=torch.uint8, device=weights.device)
    steps[order] = taken.to(torch.uint8)
    return steps.view(gain.shape).sum(0, dtype=torch.uint8)


def make_format(config: CompressionConfig) -> ActNN:
    """From the fields of a configuration."""
    assert config.bits is not None and config.group_size is not None
    return ActNN(config.bits, config.group_size, config.backend)
