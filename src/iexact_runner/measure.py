"""Memory kept for the backward pass and epochs per second.

What is kept is read off the autograd graph itself: a saved-tensor hook sees every tensor that is packed, and a weak
reference tells which of them the graph still holds when the model returns. Each storage counts once.
"""

from __future__ import annotations

import gc
import re
import statistics
import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

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
        bytes: bytes kept.
    """

    layer: str
    op: str
    shape: tuple[int, ...]
    dtype: str
    bytes_fp32: int
    bytes: int

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
        self._seen: list[_Packed] = []
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
            fresh = {_key(piece): piece.untyped_storage().nbytes() for piece in dense if _key(piece) not in taken}
            taken.update(fresh)
            if any(fresh.values()):
                records.append(_describe(op, packed, sum(fresh.values()), described))
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
        seen, self._seen = self._seen, []
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
        self._seen.append(packed)
        return packed.tensor

    def _enter_layer(self, module: nn.Module, args: Any) -> None:
        self._stack.append(self._names.get(module, self._stack[-1]))

    def _leave_layer(self, module: nn.Module, args: Any, output: Any) -> None:
        self._stack.pop()


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


def _describe(op: str, packed: _Packed, kept: int, described: Any) -> TensorRecord:
    if described is not None:
        return TensorRecord(packed.layer, op, described.shape, described.stored_type, described.fp32_bytes, kept)
    tensor = packed.tensor
    return TensorRecord(packed.layer, op, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."), kept, kept)


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


def allocated(device: torch.device) -> int | None:
    """Bytes allocated on a CUDA device; None elsewhere."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else None


def reset_peak(device: torch.device) -> None:
    """Starts the peak figures of a device anew, from what is really in use."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()  # the reserved peak would else begin at what an earlier run left cached
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):  # only Linux has it
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peak_mib(device: torch.device) -> dict[str, float | None]:
    """Peak MiB since :func:`reset_peak`: allocated and reserved on a CUDA device, and resident in this process.

    None for what a machine does not count: CUDA's figures without it, the resident set outside of Linux.
    """
    cuda = device.type == "cuda"
    return {
        "peak_allocated_mib": torch.cuda.max_memory_allocated(device) / MIB if cuda else None,
        "peak_reserved_mib": torch.cuda.max_memory_reserved(device) / MIB if cuda else None,
        "peak_resident_mib": _peak_resident_mib(),
    }


def _peak_resident_mib() -> float | None:
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        return None
    found = re.search(r"VmHWM:\s*(\d+) kB", status)
    return None if found is None else int(found[1]) / 1024


@dataclass(frozen=True)
class Throughput:
    """Epochs per second over the timed epochs: median, 20th and 80th percentile."""

    median: float
    p20: float
    p80: float
    warmup_epochs: int
    timed_epochs: int

    @classmethod
    def of(cls, seconds: Sequence[float], *, warmup_epochs: int) -> Throughput:
        """From the seconds of each timed epoch."""
        rates = sorted(1.0 / max(second, 1e-9) for second in seconds)
        cuts = statistics.quantiles(rates, n=10, method="inclusive") if len(rates) > 1 else [rates[0]] * 9
        return cls(statistics.median(rates), cuts[1], cuts[7], warmup_epochs, len(rates))

    def to_dict(self) -> dict[str, Any]:
        """In the layout of ``summary.json``."""
        return {
            "epochs_per_second": {"median": self.median, "p20": self.p20, "p80": self.p80},
            "warmup_epochs": self.warmup_epochs,
            "timed_epochs": self.timed_epochs,
        }


def time_epochs(
    epoch: Callable[[], float],
    *,
    warmup_epochs: int,
    timed_epochs: int,
    max_seconds: float,
    meter: AbstractContextManager[Any] | None = None,
) -> Throughput:
    """Calls ``epoch``, which runs one and returns its seconds, first to warm up, then to be timed inside ``meter``.

    Past a quarter of ``max_seconds`` the warm-up ends, past ``max_seconds`` the timing, after three epochs at least.
    """
    warmed: list[float] = []
    while len(warmed) < warmup_epochs and sum(warmed) < max_seconds / 4:
        warmed.append(epoch())
    timed: list[float] = []
    with meter or nullcontext():
        while len(timed) < timed_epochs and (len(timed) < 3 or sum(timed) < max_seconds):
            timed.append(epoch())
    return Throughput.of(timed, warmup_epochs=len(warmed))
