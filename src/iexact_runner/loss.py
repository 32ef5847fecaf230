"""Losses of node classification that keep nothing but the model's output, whose memory becomes its gradient.

Shapes: N nodes, T of them trained on, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

LOG_LOSS_OFFSET = 1 - math.log(2)
# Scores that are worked on at once, so that softmax and gathered rows stay small beside the output; on a GPU, where
# each chunk is a dozen launches, 64 MiB of them.
CHUNK_ELEMENTS = 1 << 18
GPU_CHUNK_ELEMENTS = 1 << 24


def loss_per_node(scores: Tensor, labels: Tensor, *, kind: str) -> Tensor:
    """Loss (T,) of nodes from their scores (T, C) and labels.

    Cross-entropy, or BCE with logits for several labels a node; ``log_cross_entropy`` is
    log(eps + CE) - log(eps), eps = 1 - ln 2, the loss of the published code on arxiv.
    """
    if labels.dim() == 2:
        return F.binary_cross_entropy_with_logits(scores, labels, reduction="none").mean(1)
    losses = F.cross_entropy(scores, labels, reduction="none")
    if kind == "cross_entropy":
        return losses
    return torch.log(LOG_LOSS_OFFSET + losses) - math.log(LOG_LOSS_OFFSET)


def node_loss(scores: Tensor, labels: Tensor, nodes: Tensor, *, kind: str, weights: Tensor | None = None) -> Tensor:
    """Training loss, in float32: the mean of :func:`loss_per_node` over some nodes of a model's output, or a sum.

    Its backward pass computes each chunk again and writes the gradient over ``scores``, so that the loss keeps no map
    beside the output and needs none for the gradient; the scores are gone then.

    Args:
        scores: the model's output (N, C), in any floating-point type.
        labels: classes (N,), or (N, C) marks for several labels a node.
        nodes: indices (T,) of the nodes to train on, each once.
        kind: ``cross_entropy`` or ``log_cross_entropy``.
        weights: (T,) of a weighted sum in place of the mean.
    """
    loss: Tensor = _NodeLoss.apply(scores, labels, nodes, kind, weights)  # type: ignore[no-untyped-call]
    return loss


class _NodeLoss(Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, labels: Tensor, nodes: Tensor, kind: str, weights: Tensor | None) -> Tensor:
        ctx.kind = kind
        ctx.save_for_backward(scores, labels, nodes, weights)
        parts = [loss_per_node(scores[part].float(), labels[part], kind=kind) for part in _chunks(scores, nodes)]
        losses = torch.cat(parts)
        return losses.mean() if weights is None else losses @ weights

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        scores, labels, nodes, weights = ctx.saved_tensors
        share = grad / nodes.numel() if weights is None else grad * weights
        shares = _chunks(scores, share.expand(nodes.numel()))
        for part, weight in zip(_chunks(scores, nodes), shares, strict=True):
            with torch.enable_grad():
                chunk = scores[part].float().requires_grad_()
                losses = loss_per_node(chunk, labels[part], kind=ctx.kind)
            (slope,) = torch.autograd.grad(losses, chunk, weight)
            scores[part] = slope.to(scores.dtype)
        others = torch.ones(scores.size(0), dtype=torch.bool, device=scores.device)
        others.index_fill_(0, nodes, False)  # ``others[nodes] = False`` copies the False to a GPU, and waits
        # In place, so that autograd refuses a second backward pass, which would find no scores.
        return scores.masked_fill_(others.unsqueeze(1), 0), None, None, None, None


def _chunks(scores: Tensor, of_nodes: Tensor) -> Iterator[Tensor]:
    """Runs of what belongs to nodes (T,)."""
    elements = CHUNK_ELEMENTS if scores.device.type == "cpu" else GPU_CHUNK_ELEMENTS
    return iter(of_nodes.split(max(1, elements // max(1, scores.size(1)))))
