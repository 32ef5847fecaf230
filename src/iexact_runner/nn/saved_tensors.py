"""Compression where autograd saves: what has no twin is caught by saved-tensor hooks and quantized block-wise.

Maps become codes of a few bits, masks one bit an element, indices the smallest integers that hold them. Parameters,
what a model is called with, and what a backward pass needs exactly stay as they are.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from iexact_runner.compression.codec import BITS, DTYPES, Quantized, dequantize, quantize
from iexact_runner.compression.seeds import tensor_seed
from iexact_runner.config.checks import check_choice
from iexact_runner.kept import tensors_in
from iexact_runner.kernels.reference import pack, unpack
from iexact_runner.schemes.hooks import NestedHooks

# Smaller tensors are kept as they are.
LEAST_ELEMENTS = 1 << 12
# Elements of a block: a row, if it is neither shorter nor longer than this, else so many in flat order.
SHORTEST_ROW, LONGEST_ROW, FLAT_BLOCK = 16, 4096, 256
# What is this much smaller than the largest argument is a statistic of it: a norm's deviations, a log-sum-exp.
STATISTIC = 8

_POSITIONS = "its backward pass looks for the positions of extremes"
_COMPARED = "its gradient depends on a comparison with what is kept"
_SENSITIVE = "its gradient divides by what is kept, or takes differences of it"
# Functions whose saved floats are kept as they are, and why; by name without underscores at its ends, for methods,
# operators, functions and their forms in place alike.
EXACT: dict[str, str] = {
    **dict.fromkeys(
        ("max", "min", "amax", "amin", "maximum", "minimum", "median", "cummax", "cummin"),
        _POSITIONS,
    ),
    **dict.fromkeys(("scatter_reduce", "index_reduce", "segment_reduce"), _POSITIONS),
    **dict.fromkeys(
        ("abs", "clamp", "clamp_min", "clamp_max", "relu6", "hardtanh", "threshold", "prelu", "leaky_relu"),
        _COMPARED,
    ),
    **dict.fromkeys(
        ("softmax", "log_softmax", "logsumexp", "exp", "log", "log1p", "log2", "log10", "sqrt", "rsqrt", "norm"),
        _SENSITIVE,
    ),
    **dict.fromkeys(
        ("reciprocal", "div", "true_divide", "truediv", "rtruediv", "itruediv", "rdiv", "idiv", "std", "var"),
        _SENSITIVE,
    ),
    **dict.fromkeys(("pow", "rpow", "ipow", "prod", "cumprod", "cdist", "cosine_similarity", "normalize"), _SENSITIVE),
    **dict.fromkeys(("cross_entropy", "nll_loss", "binary_cross_entropy_with_logits"), _SENSITIVE),
}
# Functions of whose output the backward pass needs the sign alone, which is one bit.
SIGNS = ("relu",)
# A power that is linear in what is kept.
_SQUARE = "square"


@dataclass
class Savings:
    """What the fallback did, by the function whose tensors autograd saved: bytes before and after.

    Args:
        compressed: functions, each with its bytes before and after.
        exact: functions whose tensors were kept as they are, with the reason.
    """

    compressed: dict[str, list[int]] = field(default_factory=dict)
    exact: dict[str, str] = field(default_factory=dict)

    def add(self, function: str, before: int, after: int) -> None:
        """Counts a tensor."""
        totals = self.compressed.setdefault(function, [0, 0])
        totals[0] += before
        totals[1] += after

    def lines(self) -> Iterator[str]:
        """A line for each function."""
        for name, (before, after) in sorted(self.compressed.items()):
            yield f"saved by {name} so far: {before / 2**20:.2f} MiB in {after / 2**20:.2f}"
        for name, reason in sorted(self.exact.items()):
            yield f"saved by {name} as it is: {reason}"


class _Kept:
    """A tensor in the graph: its parts, as hooks further out hold them, and how to make it of them."""

    def __init__(self, parts: list[Any], restore: Callable[[list[Tensor]], Tensor]) -> None:
        self.parts = parts
        self.restore = restore


class Fallback(NestedHooks):
    """Hooks that compress what autograd saves while they are on.

    Args:
        bits: of a code; None keeps floats as they are.
        next_seed: seed of the rounding of the next map.
        savings: counts what was done.
        backend: who runs the kernels.
    """

    def __init__(
        self, *, bits: int | None, next_seed: Callable[[], int | Tensor], savings: Savings, backend: str = "auto"
    ) -> None:
        super().__init__()
        self._bits = bits
        self._next_seed = next_seed
        self._savings = savings
        self._backend = backend
        self._held: dict[int, StorageWeakRef] = {}
        self._known: dict[tuple[Any, ...], tuple[StorageWeakRef, _Kept]] = {}
        self._function, self._largest = "an operation", 0
        self._off = 0

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Takes tensors as held anyway: nothing is saved by keeping them smaller."""
        for tensor in tensors:
            if tensor.layout == torch.strided:
                storage = tensor.untyped_storage()
                self._held[storage._cdata] = StorageWeakRef(storage)

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._known.clear()

    @contextmanager
    def off(self) -> Iterator[None]:
        """While a function of this project saves what it has compressed itself."""
        self._off += 1
        try:
            yield
        finally:
            self._off -= 1

    @contextmanager
    def of(self, function: Any, arguments: Iterable[Any]) -> Iterator[None]:
        """While a function runs that may save something."""
        before = self._function, self._largest
        arguments = tuple(arguments)
        self._function = _named(function, arguments)
        self._largest = max((each.numel() for each in tensors_in(arguments)), default=0)
        try:
            yield
        finally:
            self._function, self._largest = before

    def _pack(self, tensor: Tensor) -> Any:
        known = self._reused(tensor) if self._compressible(tensor) else None
        # Detached, for a node that keeps its own output would otherwise keep itself alive.
        return self._outside(tensor.detach()) if known is None else known

    def _unpack(self, held: Any) -> Tensor:
        if isinstance(held, _Kept):
            return held.restore([self._inside(part) for part in held.parts])
        return self._inside(held)

    def _compressible(self, tensor: Tensor) -> bool:
        if self._off or type(tensor) is not Tensor or tensor.layout != torch.strided or tensor.is_complex():
            return False
        base = tensor._base if tensor._is_view() and tensor._base is not None else tensor
        if (base.is_leaf and base.requires_grad) or self._is_held(tensor):
            return False
        if _without_repeats(tensor).numel() < LEAST_ELEMENTS:
            return False
        if tensor.dtype not in DTYPES:
            return tensor.dtype == torch.bool or (tensor.dtype in _INTEGERS and not tensor.is_cuda)
        if self._bits is None or STATISTIC * tensor.numel() <= self._largest:
            return False
        if reason := EXACT.get(self._function) or (_SENSITIVE if self._function.startswith("linalg_") else None):
            self._savings.exact[self._function] = reason
            return False
        return True

    def _is_held(self, tensor: Tensor) -> bool:
        reference = self._held.get(tensor.untyped_storage()._cdata)
        return reference is not None and not reference.expired()

    def _reused(self, tensor: Tensor) -> _Kept | None:
        """The tensor compressed, once for all that save it; None if it does not get smaller."""
        storage, view = tensor.untyped_storage(), _without_repeats(tensor)
        place = (view.numel(),) if view.is_contiguous() else (tuple(view.shape), view.stride())
        version = None if tensor.is_inference() else tensor._version
        key = (storage._cdata, view.storage_offset(), place, tensor.dtype, version, self._function in SIGNS)
        reference, parts = self._known.get(key, (None, None))
        if reference is None or reference.expired() or parts is None:
            parts = self._compressed(view.detach())
            if parts is None:
                return None
            self._known[key] = (StorageWeakRef(storage), parts)
        shape, compact, own = tensor.shape, view.shape, parts
        return _Kept(parts.parts, lambda held: own.restore(held).view(compact).expand(shape))

    def _compressed(self, tensor: Tensor) -> _Kept | None:
        kind, count = tensor.dtype, tensor.numel()
        restore: Callable[[list[Tensor]], Tensor]
        if kind == torch.bool or (kind in DTYPES and self._function in SIGNS):
            parts = [pack((tensor > 0).flatten().to(torch.uint8), 1)]
            restore = lambda held: unpack(held[0], count, 1).to(kind)  # noqa: E731
        elif kind in DTYPES:
            parts, restore = self._quantized(tensor)
        else:
            small = _narrowed(tensor)
            if small.dtype == kind:
                return None
            parts, restore = [small.flatten()], lambda held: held[0].to(kind)
        self._savings.add(self._function, tensor.nbytes, sum(part.nbytes for part in parts))
        return _Kept([self._outside(part) for part in parts], restore)

    def _quantized(self, tensor: Tensor) -> tuple[list[Tensor], Callable[[list[Tensor]], Tensor]]:
        width = tensor.size(-1) if tensor.dim() else 1
        block = width if SHORTEST_ROW <= width <= LONGEST_ROW else FLAT_BLOCK
        assert self._bits is not None
        quantized = quantize(tensor, bits=self._bits, block_size=block, seed=self._next_seed(), backend=self._backend)
        form, backend = replace(quantized, codes=_EMPTY, zero=_EMPTY, scale=_EMPTY), self._backend

        def restore(held: list[Tensor]) -> Tensor:
            codes, zero, scale = held
            whole: Quantized = replace(form, codes=codes, zero=zero, scale=scale)
            return dequantize(whole, backend=backend)

        return [quantized.codes, quantized.zero, quantized.scale], restore


class _Naming(TorchFunctionMode):
    """Tells a fallback which function runs."""

    def __init__(self, fallback: Fallback) -> None:
        super().__init__()
        self._fallback = fallback

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        with self._fallback.of(function, (args, kwargs or {})):
            return function(*args, **kwargs or {})


@contextmanager
def compressed_saved_tensors(bits: int = 4, *, seed: int = 0, inputs: Iterable[Any] = ()) -> Iterator[Savings]:
    """Compresses what autograd saves in a block of code that is no module; yields what it did.

    Every floating-point map becomes codes of ``bits`` bits, unbiased; gradients that are not linear in a map are biased
    for all that. Masks and indices are exact, and so are parameters.

    Args:
        bits: of a code: 1, 2, 4 or 8.
        seed: of the rounding.
        inputs: tensors that are held anyway, in lists and dictionaries or not.

    Raises:
        ConfigError: a ValueError of one line, if there is no such number of bits.
    """
    check_choice("bits", bits, BITS)
    numbers = itertools.count()
    savings = Savings()
    fallback = Fallback(bits=bits, next_seed=lambda: tensor_seed(seed, next(numbers)), savings=savings)
    fallback.hold(tensors_in(inputs))
    with _Naming(fallback), fallback:
        yield savings


def _named(function: Any, arguments: tuple[Any, ...]) -> str:
    """The name that a function goes by here; a power of two has one of its own."""
    name: str = getattr(function, "__name__", "an operation").strip("_")
    given = arguments[0] if arguments and isinstance(arguments[0], tuple) else ()
    return _SQUARE if name in ("pow", "ipow") and len(given) == 2 and given[1] in (1, 2) else name


_EMPTY = torch.empty(0)
_INTEGERS = (torch.int64, torch.int32, torch.int16)


def _without_repeats(tensor: Tensor) -> Tensor:
    """A tensor without the copies that ``expand`` makes of it."""
    index = tuple(
        slice(0, 1) if stride == 0 and size > 1 else slice(None)
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return tensor.detach()[index] if tensor.dim() else tensor.detach()


def _narrowed(tensor: Tensor) -> Tensor:
    """Integers in the smallest type that holds them."""
    low, high = (int(extreme) for extreme in tensor.aminmax())
    for kind in (torch.uint8, torch.int16, torch.int32):
        limits = torch.iinfo(kind)
        if limits.min <= low and high <= limits.max:
            return tensor.to(kind)
    return tensor
