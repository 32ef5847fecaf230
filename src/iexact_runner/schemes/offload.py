"""Kept tensors moved to the host until the backward pass needs them: ``compression.offload=true``, under every scheme.

Beside a GPU they go to pinned memory on a stream of their own; when the backward pass asks for one, the one that was
kept before it is fetched too. On a CPU they go to files without a name, which the backward pass reads where they are.
"""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.multiprocessing.reductions import StorageWeakRef

from iexact_runner.compression.host import HostMap, cannot_hold
from iexact_runner.config import CompressionConfig
from iexact_runner.schemes.hooks import NestedHooks

# Smaller tensors stay where they are.
LEAST_BYTES = 1 << 14


def offloading(config: CompressionConfig, held: Iterable[Tensor]) -> AbstractContextManager[Any]:
    """Context of a forward pass that moves what it keeps, if the configuration says so.

    Args:
        config: of the scheme.
        held: tensors that the caller holds anyway, and that stay where they are: features, graph.
    """
    if not (config.offload and torch.is_grad_enabled()):
        return nullcontext()
    return Offload(held, folder=config.offload_folder)


def is_offloaded(tensor: Tensor) -> bool:
    """Whether a tensor that a graph holds lies on the host on behalf of :class:`Offload`."""
    reference = _OFFLOADED.get(tensor.untyped_storage()._cdata)
    return reference is not None and not reference.expired()


class Offload(NestedHooks):
    """Saved-tensor hooks that move what is saved while they are on.

    Args:
        held: tensors that stay where they are.
        folder: for the files on a CPU; None for the system's folder of temporary files.
    """

    def __init__(self, held: Iterable[Tensor], *, folder: str | None) -> None:
        super().__init__()
        self._folder = tempfile.gettempdir() if folder is None else folder
        self._held: set[int] = set()
        for tensor in held:
            if tensor.layout == torch.strided:
                self._held.add(tensor.untyped_storage()._cdata)
        self._known: dict[tuple[Any, ...], tuple[StorageWeakRef, _Moved]] = {}
        self._last: _Moved | None = None
        self._stream: torch.cuda.Stream | None = None

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._known.clear()
        self._last = None

    def _pack(self, tensor: Tensor) -> Any:
        # Detached, for a node that keeps its own output would otherwise keep itself alive.
        return self._moved(tensor) if self._movable(tensor) else self._outside(tensor.detach())

    def _unpack(self, held: Any) -> Tensor:
        return held.fetched(self._inside(held.kept)) if isinstance(held, _Moved) else self._inside(held)

    def _movable(self, tensor: Tensor) -> bool:
        if type(tensor) not in (Tensor, FakeTensor) or tensor.layout != torch.strided or is_offloaded(tensor):
            return False
        base = tensor._base if tensor._is_view() and tensor._base is not None else tensor
        if (base.is_leaf and base.requires_grad) or tensor.untyped_storage()._cdata in self._held:
            return False
        return tensor.nbytes >= LEAST_BYTES

    def _moved(self, tensor: Tensor) -> _Moved:
        """The tensor on the host, once for all that save it."""
        storage = tensor.untyped_storage()
        version = None if tensor.is_inference() else tensor._version
        place = (storage._cdata, tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype, version)
        reference, known = self._known.get(place, (None, None))
        if reference is not None and known is not None and not reference.expired():
            return known
        moved = self._to_host(tensor.detach())
        self._known[place] = (StorageWeakRef(storage), moved)
        self._last = moved
        return moved

    def _to_host(self, tensor: Tensor) -> _Moved:
        if isinstance(tensor, FakeTensor):  # which has nothing to move
            _mark(tensor)
            return _Moved(self._outside(tensor), None, None, None)
        if tensor.is_cuda:
            return self._to_pinned_memory(tensor)
        try:
            host = HostMap.new(tuple(tensor.shape), tensor.dtype, tensor.device, folder=self._folder)
        except OSError as error:
            raise cannot_hold("compression.offload_folder", self._folder, tensor.nbytes, error) from error
        host.tensor.copy_(tensor)
        host.release()
        _mark(host.tensor)
        return _Moved(self._outside(host.tensor), None, None, None)

    def _to_pinned_memory(self, tensor: Tensor) -> _Moved:
        self._stream = self._stream or torch.cuda.Stream(tensor.device)
        host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream(tensor.device))
        with torch.cuda.stream(self._stream):
            host.copy_(tensor, non_blocking=True)
        tensor.record_stream(self._stream)
        _mark(host)
        return _Moved(self._outside(host), tensor.device, self._stream, self._last)


class _Moved:
    """What the graph holds in a tensor's place.

    Args:
        kept: the tensor on the host, as hooks further out hold it.
        device: where it is needed; None if it is read where it is.
        stream: that copies.
        before: what was moved before it, and will be needed after it.
    """

    def __init__(
        self, kept: Any, device: torch.device | None, stream: torch.cuda.Stream | None, before: _Moved | None
    ) -> None:
        self.kept = kept
        self._device = device
        self._stream = stream
        self._before = None if before is None else weakref.ref(before)
        self._copy: Tensor | None = None

    def fetched(self, host: Tensor) -> Tensor:
        """The tensor where it is needed."""
        if self._device is None or self._stream is None:
            return host
        self._fetch(host)
        current, copy = torch.cuda.current_stream(self._device), self._copy
        current.wait_stream(self._stream)
        assert copy is not None
        copy.record_stream(current)
        self._copy = None
        before = None if self._before is None else self._before()
        if before is not None and isinstance(before.kept, Tensor):
            before._fetch(before.kept)
        return copy

    def _fetch(self, host: Tensor) -> None:
        if self._copy is None and self._stream is not None:
            with torch.cuda.stream(self._stream):
                self._copy = host.to(self._device, non_blocking=True)


_OFFLOADED: dict[int, StorageWeakRef] = {}


def _mark(tensor: Tensor) -> None:
    for key in [key for key, reference in _OFFLOADED.items() if reference.expired()]:
        del _OFFLOADED[key]
    storage = tensor.untyped_storage()
    _OFFLOADED[storage._cdata] = StorageWeakRef(storage)
