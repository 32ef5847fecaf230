"""A training step captured in a CUDA graph: the host launches one graph in place of hundreds of kernels.

Forward pass, loss and backward pass are replayed; the optimizer steps outside of the graph, once the loss is known to
be finite.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from iexact_runner.compression.deferred import deferred_checks
from iexact_runner.compression.directions import Directions

logger = logging.getLogger(__name__)

# Steps before a capture: they compile kernels, find directions, and say how much room the signs of a map need.
WARM_UP = 2


class Optimizing(Protocol):
    """What takes the weights from one step to the next."""

    def backward(self, loss: Tensor) -> None:
        """Gradients of a loss, in place of those before."""

    def apply(self, model: Any, loss: float, *, epoch: int) -> None:
        """A step of the optimizer, if the loss is finite."""


class Recording:
    """Work of a GPU, recorded once."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            work()

    def replay(self) -> None:
        """Does the work again, on the same memory."""
        self._graph.replay()


class CapturedStep:
    """Takes training steps, most of them by a replay, with the numbers of steps that are not captured.

    Steps that find directions of maps anew are taken without a graph, and so are those after a new plan and every one
    whose kept signs need more room than the graph has; the next one is captured anew. Where a step cannot be captured
    none is, which is said once.

    Args:
        model: the model, on a GPU.
        optimization: what updates its weights.
        loss: the loss of a step from its seed, a 0-d int64 tensor.
    """

    def __init__(self, model: nn.Module, optimization: Optimizing, loss: Callable[[Tensor], Tensor]) -> None:
        self._model = model
        self._optimization = optimization
        self._loss = loss
        self._parameters = list(model.parameters())
        device = self._parameters[0].device
        self._seed = torch.zeros((), dtype=torch.int64, device=device)
        self._recording: Recording | None = None
        self._outcome = self._seed
        self._gradients: list[Tensor | None] = []
        self._before: list[Tensor] = []
        self._waiting = WARM_UP
        self._known: Sequence[Directions] | None = None
        self.replays = 0

    def __call__(self, *, seed: int, epoch: int) -> float:
        """One training step; returns the loss.

        Raises:
            TrainingError: if the loss is not finite; the weights are then left as they were.
        """
        self._seed.fill_(seed)
        if self._known is not None and list(map(id, self._directions())) != list(map(id, self._known)):
            self._waiting = max(self._waiting, WARM_UP)  # a new plan, of which the graph knows nothing
        # Without directions yet, or with such as are due, the pass makes tensors that outlive it.
        if self._waiting > 0 or any(state.due for state in self._directions()):
            self._waiting -= 1
            return self._plain(epoch)
        fresh = self._recording is None
        if fresh and not self._record():
            return self._plain(epoch)
        assert self._recording is not None
        self._recording.replay()
        loss, wrong = self._outcome.tolist()
        if wrong:
            if self._before:
                torch._foreach_copy_(self._moved(), self._before)
            for state in self._directions():
                state.age -= fresh
            return self._plain(epoch)
        for state in self._directions():
            state.age += not fresh  # the pass that was captured has counted itself
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        self._optimization.apply(self._model, loss, epoch=epoch)
        self.replays += 1
        return float(loss)

    def _directions(self) -> Sequence[Directions]:
        directions: list[Directions] = getattr(self._model, "directions", [])
        return directions

    def _moved(self) -> list[Tensor]:
        """What a forward pass moves: directions and running statistics."""
        vectors = [state.vectors for state in self._directions() if state.vectors is not None]
        return [*vectors, *self._model.buffers()]

    def _plain(self, epoch: int) -> float:
        """The step without a graph, whose memory is given up first."""
        self._recording, self._gradients = None, []
        self._model.train()
        loss = self._loss(self._seed)
        self._optimization.backward(loss)
        value = loss.item()
        del loss
        self._known = list(self._directions())
        self._optimization.apply(self._model, value, epoch=epoch)
        return value

    def _record(self) -> bool:
        """Captures the step; False if that cannot be done, after which it is not tried again."""
        self._model.train()
        directions = self._directions()
        for state in directions:
            if state.room is not None:
                state.room.settle()
        moved = self._moved()
        self._before = [each.clone() for each in moved]
        for parameter in self._parameters:
            parameter.grad = None
        ages = [state.age for state in directions]

        def work() -> None:
            if moved:
                torch._foreach_copy_(self._before, moved)
            with deferred_checks() as checks:
                loss = self._loss(self._seed)
                self._optimization.backward(loss)
            wrong = sum((check.ne(0).float() for check in checks), torch.zeros_like(loss, dtype=torch.float32))
            self._outcome = torch.stack([loss.detach().float(), wrong])
            self._gradients = [parameter.grad for parameter in self._parameters]

        try:
            self._recording = Recording(work)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:200]
            logger.warning(f"training.cuda_graph: this step cannot be captured, and is taken without a graph: {reason}")
            for state, age in zip(directions, ages, strict=True):
                state.age = age
            self._waiting = 1 << 62
            return False
        return True
