"""Memory kept for the backward pass, tensor by tensor.

What is kept is read off the autograd graph itself: a saved-tensor hook sees every tensor that is packed, and a weak
reference tells which of them the graph still holds when the model returns. Each storage counts once.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from iexact_runner.schemes.offload import is_offloaded

MIB = 1024**2


@dataclass(frozen=True)
class TensorRecord:
    """One map kept for the backward pass.

    Args:
        layer: dotted name of the module in whose forward pass it was kept.
        op: autograd node that holds it.
        shape: logical shape of the map.
        dtype: what an element is kept as; ``int2`` for a quantized map, ``mask`` for 1 bit.
        bytes_fp32: bytes that plain FP32 modules keep in its place.
        bytes: bytes kept on the device.
        host_bytes: bytes that were moved to the host.
    """

    layer: str
    op: str
    shape: tuple[int, ...]
    dtype: str
    bytes_fp32: int
    bytes: int
    host_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self) | {"shape": list(self.shape)}


class _Packed:
    """What the autograd graph holds in a tensor's place, so that its life can be watched."""

    def __init__(self, tensor: Tensor, layer: str) -> None:
        self.tensor = tensor
        self.layer = layer


class SavedTensors:
    """Context in which a forward pass runs; :meth:`kept` lists what its autograd graph keeps.

    Args:
        model: names the layers; its parameters and buffers do not count.
        excluded: tensors that do not count: features, labels, adjacency.
    """

    def __init__(self, model: nn.Module, *, excluded: Iterable[Tensor]) -> None:
        self._names = {module: name or "model" for name, module in model.named_modules()}
        resident = [*excluded, *model.parameters(), *model.buffers()]
        self._excluded = {_key(part) for tensor in resident for part in dense_parts(tensor)}
        self._packed: list[weakref.ref[_Packed]] = []
        self._stack: list[str] = ["model"]
        self._seen: list[_Packed] | None = None
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        self._handles: list[Any] = []

    def __enter__(self) -> SavedTensors:
        self._handles = [
            nn.modules.module.register_module_forward_pre_hook(self._enter_layer),
            nn.modules.module.register_module_forward_hook(self._leave_layer, always_call=True),
        ]
        self._hooks.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._hooks.__exit__(kind, error, trace)
        for handle in self._handles:
            handle.remove()

    @property
    def layer(self) -> str:
        """Name of the module whose forward pass runs."""
        return self._stack[-1]

    def kept(self, output: Tensor, *, beside: Tensor | None = None) -> list[TensorRecord]:
        """What the graph behind ``output`` keeps at this moment, ``beside`` another one, in forward order."""
        # What no node admits to (an operation in C++ without attributes) still counts, as "unknown".
        items = {id(packed): ("unknown", [packed], None) for packed in self._alive()}
        for node in graph_nodes(output):
            for parts, described in self._items(node):
                for part in parts:
                    items.pop(id(part), None)
                items[id(parts[0])] = (node.name(), parts, described)
        records, taken = [], self._excluded | {_key(tensor) for tensor in (beside,) if tensor is not None}
        for packed in self._alive():
            op, parts, described = items.get(id(packed), ("", [], None))
            dense = [piece for part in parts for piece in dense_parts(part.tensor)]
            fresh = {_key(piece): piece for piece in dense if _key(piece) not in taken}
            taken.update(fresh)
            sizes = [(piece.untyped_storage().nbytes(), is_offloaded(piece)) for piece in fresh.values()]
            kept, moved = (sum(size for size, away in sizes if away is where) for where in (False, True))
            if kept or moved:
                records.append(_describe(op, packed, kept, moved, described))
        return records

    def _alive(self) -> list[_Packed]:
        return [packed for reference in self._packed if (packed := reference()) is not None]

    def _items(self, node: Any) -> Iterable[tuple[list[_Packed], Any]]:
        """Groups of packed tensors of a node, each with the node's own description of it."""
        self._seen = []
        saved_map = getattr(node, "saved_map", ())
        if isinstance(node, torch.autograd.function.BackwardCFunction):
            _ = node.saved_tensors
        else:
            for name in dir(node):
                if name.startswith("_saved_"):
                    getattr(node, name)
        seen, self._seen = self._seen, None
        for described in saved_map if isinstance(saved_map, tuple) else (saved_map,):
            yield seen[: described.parts], described
            seen = seen[described.parts :]
        for packed in seen:
            yield [packed], None

    def _pack(self, tensor: Tensor) -> _Packed:
        # Detached, for a node that keeps its own output would otherwise keep itself alive.
        packed = _Packed(tensor.detach(), self._stack[-1])
        self._packed.append(weakref.ref(packed))
        return packed

    def _unpack(self, packed: _Packed) -> Tensor:
        if self._seen is not None:  # asked for here, and not by a backward pass, which is to free what it has used
            self._seen.append(packed)
        return packed.tensor

    def _enter_layer(self, module: nn.Module, args: Any) -> None:
        self._stack.append(self._names.get(module, self._stack[-1]))

    def _leave_layer(self, module: nn.Module, args: Any, output: Any) -> None:
        self._stack.pop()


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    """Tensors in arguments, and in lists, tuples and dictionaries among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)
        elif isinstance(value, dict):
            yield from tensors_in(value.values())


def dense_parts(tensor: Tensor) -> list[Tensor]:
    """The strided tensors that a tensor is made of: a CSR matrix has three."""
    if tensor.layout == torch.sparse_csr:
        return [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
    return [tensor]


def total_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind some tensors, each storage once."""
    parts = [part for tensor in tensors for part in dense_parts(tensor)]
    return sum({_key(part): part.untyped_storage().nbytes() for part in parts}.values())


def _key(tensor: Tensor) -> int:
    # Not the address of the memory, which tensors without memory lack.
    storage: int = tensor.untyped_storage()._cdata
    return storage


def _describe(op: str, packed: _Packed, kept: int, moved: int, described: Any) -> TensorRecord:
    if described is not None:
        shape, kind, fp32_bytes = described.shape, described.stored_type, described.fp32_bytes
        return TensorRecord(packed.layer, op, shape, kind, fp32_bytes, kept, moved)
    shape, kind = tuple(packed.tensor.shape), str(packed.tensor.dtype).removeprefix("torch.")
    return TensorRecord(packed.layer, op, shape, kind, kept + moved, kept, moved)


def graph_nodes(output: Tensor) -> list[Any]:
    """All nodes of the autograd graph behind a tensor."""
    pending, seen, order = [output.grad_fn], set(), []
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        order.append(node)
        pending.extend(parent for parent, _ in node.next_functions)
    return order
