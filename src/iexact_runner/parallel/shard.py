"""The rows of a graph's maps that one process has, and sums over what the others have.

Shapes: N nodes of the whole graph, D features.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from iexact_runner.kernels.ops import RowSeed


class Shard:
    """All rows: every sum is there already. What is not distributed has this one, :data:`WHOLE`."""

    distributed = False

    def seed(self, seed: int) -> int:
        """A seed whose draws belong to the rows of the whole graph."""
        return seed

    def count(self, x: Tensor) -> int:
        """N of a map of which ``x`` has the rows of this process."""
        return x.size(0)

    def sum_(self, x: Tensor) -> Tensor:
        """The sum over all processes, written over ``x``."""
        return x

    def sample(self, x: Tensor, count: int) -> Tensor:
        """``count`` evenly spaced rows of the whole map, or all if there are fewer: float32, in every process."""
        return x[sampled_rows(x.size(0), count, device=x.device)].float()

    def mean(self, x: Tensor) -> Tensor:
        """Mean of each column of the whole map, in float32."""
        return column_sums(x.float()) / x.size(0) if x.is_cuda else x.float().mean(0)

    def summed(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sums of some tensors over all processes, in one message."""
        return list(tensors)

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Sums the gradients over all processes."""

    def largest(self, value: float) -> float:
        """The largest value of any process."""
        return value

    def agreed(self, value: Any) -> Any:
        """The value of the process that has most rows."""
        return value


class DistributedShard(Shard):
    """Rows ``cuts[rank]`` to ``cuts[rank + 1]`` of N, in one of several processes that hold one graph together.

    Every process must call the same methods in the same order.

    Args:
        cuts: first row of each process, and N.
        rank: which of them this is.
    """

    distributed = True

    def __init__(self, cuts: Sequence[int], rank: int) -> None:
        self.cuts, self.rank = tuple(cuts), rank
        self.start, self.stop, self.total = cuts[rank], cuts[rank + 1], cuts[-1]

    @property
    def processes(self) -> int:
        """How many hold the graph."""
        return len(self.cuts) - 1

    @property
    def rows(self) -> int:
        """Of this process."""
        return self.stop - self.start

    def seed(self, seed: int) -> int:
        """A seed whose draws belong to the rows of the whole graph: all processes together draw what one draws."""
        return RowSeed.of(seed, self.start)

    def count(self, x: Tensor) -> int:
        """N."""
        return self.total

    def sum_(self, x: Tensor) -> Tensor:
        """The sum over all processes, written over ``x``."""
        if self.processes > 1 and not isinstance(x, FakeTensor):
            dist.all_reduce(x)
        return x

    def sample(self, x: Tensor, count: int) -> Tensor:
        """``count`` evenly spaced rows of the whole map, or all if there are fewer: float32, in every process."""
        rows = sampled_rows(self.total, count, device=x.device)
        sample = x.new_zeros(rows.numel(), x.size(1), dtype=torch.float32)
        first, last = torch.searchsorted(rows, torch.tensor([self.start, self.stop], device=x.device)).tolist()
        sample[first:last] = x[rows[first:last] - self.start].float()
        return self.sum_(sample)

    def mean(self, x: Tensor) -> Tensor:
        """Mean of each column of the whole map, in float32."""
        return self.sum_(column_sums(x.float())) / self.total

    def summed(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The sums of some tensors over all processes, in one message."""
        together = self.sum_(torch.cat([tensor.flatten() for tensor in tensors]))
        parts = together.split([tensor.numel() for tensor in tensors])
        return [part.view_as(tensor) for part, tensor in zip(parts, tensors, strict=True)]

    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Sums the gradients over all processes; one that has none in this process counts as 0."""
        held = [parameter for parameter in parameters if parameter.requires_grad]
        if self.processes == 1 or not held:
            return
        for parameter in held:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        grads = [parameter.grad for parameter in held if parameter.grad is not None]
        for grad, total in zip(grads, self.summed(grads), strict=True):
            grad.copy_(total)

    def largest(self, value: float) -> float:
        """The largest value of any process."""
        if self.processes == 1:
            return value
        held: list[float] = [0.0] * self.processes
        dist.all_gather_object(held, value)
        return max(held)

    def agreed(self, value: Any) -> Any:
        """The value of the process that has most rows."""
        if self.processes == 1:
            return value
        held, rows = [value], [last - first for first, last in itertools.pairwise(self.cuts)]
        dist.broadcast_object_list(held, src=rows.index(max(rows)))
        return held[0]


WHOLE = Shard()


def column_sums(x: Tensor) -> Tensor:
    """Sum of each column (D,) of a map (N, D)."""
    # On a GPU a product with ones takes a quarter of the time of torch's reduction of as many rows.
    return x.T.mv(x.new_ones(x.size(0))) if x.is_cuda else x.sum(0)


def sampled_rows(nodes: int, count: int, *, device: torch.device) -> Tensor:
    """Indices of ``count`` rows, or of all if there are fewer, evenly spaced."""
    count = min(count, nodes)
    return torch.arange(count, device=device) * nodes // count


def column_statistics(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float, shard: Shard = WHOLE
) -> tuple[Tensor, Tensor]:
    """Mean and variance (D,) of each column of the whole map, float32 or float64; moves the running ones."""
    if isinstance(x, FakeTensor):  # torch has no rule for the shapes of its kernel
        return x.new_empty(x.size(1), dtype=torch.float32), x.new_empty(x.size(1), dtype=torch.float32)
    exact = torch.promote_types(x.dtype, torch.float32)
    # On a processor the statistics of a 16-bit map would be rounded to 16 bits.
    x = x if x.is_cuda else x.to(exact)
    if not isinstance(shard, DistributedShard):
        mean, variance = torch.ops.aten.batch_norm_update_stats(x, running_mean, running_var, momentum)
        return mean, variance
    own_mean = own_variance = x.new_zeros(x.size(1), dtype=exact)
    if x.size(0):
        own_mean, own_variance = torch.ops.aten.batch_norm_update_stats(x, None, None, 0.0)
    share, nodes = x.size(0) / shard.total, shard.total
    mean = shard.sum_(own_mean * share)
    variance = shard.sum_((own_variance + (own_mean - mean).square()) * share)
    if running_mean is not None and running_var is not None:
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_((variance * (nodes / max(1, nodes - 1))).to(running_var.dtype), momentum)
    return mean, variance
