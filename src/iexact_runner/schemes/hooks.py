"""Saved-tensor hooks inside others: what they put into the graph goes through those further out, which may count it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor


class NestedHooks(ABC):
    """Context in which autograd packs what it saves by :meth:`_pack`, and gets it back by :meth:`_unpack`."""

    def __init__(self) -> None:
        self._hooks: Any = None
        self._outer: tuple[Callable[[Tensor], Any], Callable[[Any], Tensor]] | None = None

    def __enter__(self) -> Self:
        self._outer = torch._C._autograd._top_saved_tensors_default_hooks(False)
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)

    @abstractmethod
    def _pack(self, tensor: Tensor) -> Any:
        """What the graph holds in a tensor's place."""

    @abstractmethod
    def _unpack(self, held: Any) -> Tensor:
        """The tensor that the backward pass asks for."""

    def _outside(self, tensor: Tensor) -> Any:
        """A tensor as the hooks further out hold it."""
        return tensor if self._outer is None else self._outer[0](tensor)

    def _inside(self, held: Any) -> Tensor:
        """What :meth:`_outside` was given."""
        tensor: Tensor = held if self._outer is None else self._outer[1](held)
        return tensor
