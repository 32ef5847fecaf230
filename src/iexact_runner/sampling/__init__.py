"""Mini-batches: parts of a graph that are drawn, and what a training step works on made of them."""

from __future__ import annotations

from iexact_runner.sampling.batches import MiniBatches, with_batches
from iexact_runner.sampling.prefetch import one_ahead

__all__ = ["MiniBatches", "one_ahead", "with_batches"]
