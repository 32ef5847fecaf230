"""Compressed twins of torch's functions, which take their place while a compressed model runs.

Modules, modules that a model uses several times, and functional calls all end in the same functions: here they are
caught. What has no twin (a rank, a type, an option) runs as it is.

Shapes: N rows, D columns, C outputs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar, Token
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from iexact_runner.budget.plan import Plan
from iexact_runner.compression.codec import DTYPES
from iexact_runner.compression.directions import Directions
from iexact_runner.compression.seeds import StepSeed, mix
from iexact_runner.config import CompressionConfig
from iexact_runner.errors import TrainingError
from iexact_runner.kept import tensors_in
from iexact_runner.nn.graph_cache import GraphCache, written
from iexact_runner.nn.saved_tensors import Fallback, Savings
from iexact_runner.schemes import Activation, Projected, start_pass
from iexact_runner.schemes.activation import Kept, Resident
from iexact_runner.schemes.offload import offloading


class Compression:
    """What all layers of a compressed model share.

    Args:
        config: how maps are kept.
        seed: seed of the model's passes, each of which draws its own from it.
        fallback: whether what has no twin is compressed where autograd saves it.
    """

    def __init__(self, config: CompressionConfig, *, seed: int, fallback: bool) -> None:
        self.config = config
        self.seed = seed
        self.fallback = fallback
        self.savings = Savings()
        self.passes = 0
        # Of the next pass: that of its masks, and another of its maps or None; else every pass draws its own.
        self.seeds: tuple[int | Tensor, int | Tensor | None] | None = None
        self.graphs = GraphCache()
        self.functions: Counter[str] = Counter()
        self.left: set[str] = set()
        # Of maps that each have a choice of their own: the plan, or states that go on from pass to pass.
        self.plan: Plan | None = None
        self.directions: list[Directions] | None = None
        # Of passes that no layer of the model begins.
        self.between_calls: list[Directions] = []

    def running(self, inputs: Iterable[Any], known: list[Directions]) -> AbstractContextManager[Any]:
        """The pass that runs already, else a new one.

        Args:
            inputs: what the model is called with.
            known: directions of earlier passes that began in the same place, which go on if they serve several passes.
        """
        if self.current() is not None:
            return nullcontext()
        # Not even a new pass with the same seed would draw the same masks for a part of the model.
        if torch._C._current_graph_task_id() != -1:
            raise TrainingError(
                "torch.utils.checkpoint runs a compressed layer again, with other masks: leave it out, the maps are"
                " compressed already"
            )
        self.passes += 1
        return Pass(self, inputs, known if (self.config.refresh or 1) > 1 else [])

    def current(self) -> Pass | None:
        """The pass of this model that runs at the moment."""
        current = _CURRENT.get()
        return current if current is not None and current.model is self else None

    def leave(self, what: str, reason: str) -> None:
        """Notes that a call was left as it is."""
        self.left.add(f"{what}: {reason}")


class Pass(TorchFunctionMode):
    """One training pass: the scheme's operations, and the one kept map of each tensor that several layers use."""

    def __init__(self, model: Compression, inputs: Iterable[Any], known: list[Directions]) -> None:
        super().__init__()
        self.model = model
        inputs = list(inputs)
        seed, map_seed = model.seeds or (mix(model.seed, model.passes), None)
        if (first := next(tensors_in(inputs), None)) is not None:
            seed = StepSeed.where_it_pays(first.device, seed)
        directions = known if model.directions is None else model.directions
        if model.plan is not None:
            directions = model.plan.directions()
        ops = start_pass(model.config, training=True, seed=seed, map_seed=map_seed, directions=directions)
        assert isinstance(ops, Projected)
        ops.references_inputs = model.fallback
        self._fallback = Fallback(
            bits=ops.fallback_bits, next_seed=ops.next_map_seed, savings=model.savings, backend=model.config.backend
        )
        self.ops: Projected = cast(Projected, _Quiet(ops, self._fallback))
        self._sources = WeakIdKeyDictionary()
        self._token: Token[Pass | None] | None = None
        self._fallback.hold(tensors_in(inputs))
        self._moving = offloading(model.config, tensors_in(inputs))
        for value in inputs:
            if isinstance(value, Tensor) and value.is_floating_point() and not value.requires_grad:
                self._sources[value] = (written(value), Resident())

    def __enter__(self) -> Pass:
        super().__enter__()  # type: ignore[no-untyped-call]
        self._token = _CURRENT.set(self)
        self._moving.__enter__()
        if self.model.fallback:
            self._fallback.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.model.fallback:
            self._fallback.__exit__(*error)
        self._moving.__exit__(*error)
        if self._token is not None:
            _CURRENT.reset(self._token)
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        if not self.model.fallback and function in WITHOUT_TWIN and args and args[0].requires_grad:
            self.model.leave(function.__name__, "no twin, its map is kept as it is")
        twin = TWINS.get(function)
        with self._fallback.of(function, (args, kwargs)):
            result = NotImplemented if twin is None else twin(self, *args, **kwargs)
            return function(*args, **kwargs) if result is NotImplemented else result

    def activation(self, x: Tensor) -> Activation:
        """The tensor with its source: the same one as last time, unless the tensor was written to since."""
        version, source = self._sources.get(x, (None, None))
        if source is None or version != written(x):
            source = Kept()
            self._sources[x] = (written(x), source)
        return Activation(x, source)

    def remember(self, x: Activation) -> Tensor:
        """The tensor of an activation, whose source later consumers will find."""
        self._sources[x.value] = (written(x.value), x.source)
        return x.value

    def takes(self, what: str, x: Any, *, rank: int | None = None) -> bool:
        """Whether a map is of a kind that can be kept compressed; counts the call as compressed or left."""
        reason = kind_without_twin(x, rank=rank)
        if reason is None:
            self.model.functions[what] += 1
        else:
            self.model.leave(what, reason)
        return reason is None


class _Quiet:
    """The operations of a pass, whose functions save what they have compressed themselves."""

    def __init__(self, ops: Projected, fallback: Fallback) -> None:
        self._ops = ops
        self._fallback = fallback

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._ops, name)
        if not callable(found):
            return found

        def quiet(*args: Any, **kwargs: Any) -> Any:
            with self._fallback.off():
                return found(*args, **kwargs)

        return quiet


_CURRENT: ContextVar[Pass | None] = ContextVar("current compressed pass", default=None)


def kind_without_twin(x: Any, *, rank: int | None = None) -> str | None:
    """Why a map cannot be kept compressed, or None if it can."""
    if type(x) not in (Tensor, nn.Parameter) or x.layout != torch.strided:
        return f"input is a {type(x).__name__}" if not isinstance(x, Tensor) else "input is not a plain dense tensor"
    if x.dtype not in DTYPES:
        return f"input is {str(x.dtype).removeprefix('torch.')}"
    if rank is not None and x.dim() != rank:
        return f"input has {x.dim()} dimensions instead of {rank}"
    return "input is empty" if x.numel() == 0 else None


def _linear(run: Pass, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Any:
    if not weight.requires_grad or not run.takes("linear", input, rank=2):
        return NotImplemented
    return run.ops.linear(run.activation(input), weight, bias)


def _matmul(run: Pass, input: Tensor, other: Tensor) -> Any:
    """A product of a map with a weight; of other products both factors are maps."""
    if not _is_weight(other) or isinstance(input, nn.Parameter) or not run.takes("matmul", input, rank=2):
        return NotImplemented
    return run.ops.linear(run.activation(input), other.t())


def _addmm(run: Pass, input: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Any:
    product = _matmul(run, mat1, mat2)
    if product is NotImplemented:
        return NotImplemented
    scaled = product if alpha == 1 else product.mul_(alpha)
    return scaled if beta == 0 else scaled.add_(input, alpha=beta)


def _leaky_relu(run: Pass, input: Tensor, negative_slope: float = 0.01, inplace: bool = False) -> Any:
    if not input.requires_grad or not run.takes("leaky_relu", input):
        return NotImplemented
    return run.remember(run.ops.rectified(run.activation(input), negative_slope, inplace=inplace))


def _relu(run: Pass, input: Tensor, inplace: bool = False) -> Any:
    if not input.requires_grad or not run.takes("relu", input):
        return NotImplemented
    return run.remember(run.ops.rectified(run.activation(input), 0.0, inplace=inplace))


def _elu(run: Pass, input: Tensor, alpha: float = 1.0, inplace: bool = False) -> Any:
    if not input.requires_grad:
        return NotImplemented
    if inplace:
        run.model.leave("elu", "in place")
        return NotImplemented
    return run.ops.elu(input, alpha) if run.takes("elu", input) else NotImplemented


def _dropout(run: Pass, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    if not training or not 0 < p < 1 or not run.takes("dropout", input):
        return NotImplemented
    dropped = run.ops.drop(run.activation(input), p)
    return run.remember(Activation(input.copy_(dropped.value), dropped.source) if inplace else dropped)


def _batch_norm(
    run: Pass,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Any:
    needed = any(part is not None and part.requires_grad for part in (input, weight, bias))
    # torch refuses statistics of one row, and should.
    if not training or not needed or input.size(0) < 2 or not run.takes("batch_norm", input, rank=2):
        return NotImplemented
    x, statistics = run.activation(input), (running_mean, running_var)
    return run.remember(run.ops.normalized(x, weight, bias, *statistics, momentum=momentum, eps=eps))


def _is_weight(x: Any) -> bool:
    return isinstance(x, nn.Parameter) and x.dim() == 2 and x.requires_grad


TWINS: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    **dict.fromkeys((torch.mm, torch.matmul, Tensor.mm, Tensor.matmul), _matmul),
    **dict.fromkeys((torch.addmm, Tensor.addmm), _addmm),
    **dict.fromkeys((F.relu, torch.relu, Tensor.relu), _relu),
    **dict.fromkeys((torch.relu_, Tensor.relu_), partial(_relu, inplace=True)),
    F.leaky_relu: _leaky_relu,
    F.leaky_relu_: partial(_leaky_relu, inplace=True),
    F.elu: _elu,
    F.dropout: _dropout,
    F.batch_norm: _batch_norm,
}
# What models use beside them that keeps a map; others are not noted.
WITHOUT_TWIN = frozenset(
    (
        *(F.gelu, F.silu, F.mish, F.selu, F.celu, F.prelu, F.relu6, F.softplus),
        *(torch.sigmoid, Tensor.sigmoid, torch.tanh, Tensor.tanh),
        *(F.softmax, torch.softmax, Tensor.softmax, F.log_softmax, torch.log_softmax, Tensor.log_softmax),
        *(F.layer_norm, F.group_norm, F.instance_norm, F.normalize),
    )
)
