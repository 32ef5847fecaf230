"""``compress(model, "lowrank")``: a PyTorch model made of torch and PyG layers trains with compressed maps."""

from __future__ import annotations

import copy
from collections import Counter
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from types import new_class
from typing import Any

import torch
from torch import fx, nn
from torch_geometric import nn as pyg
from torch_geometric.nn.aggr import Aggregation
from torch_geometric.utils._trim_to_layer import TrimToLayer

from iexact_runner.budget.calls import budget_of, plan_call
from iexact_runner.compression.directions import Directions
from iexact_runner.config import LOW_RANK, CompressionConfig
from iexact_runner.config.checks import check_choice
from iexact_runner.config.presets import check_names, preset
from iexact_runner.errors import ConfigError
from iexact_runner.nn.interception import Compression
from iexact_runner.nn.pyg_convs import CONVOLUTIONS
from iexact_runner.nn.saved_tensors import Savings

_PRODUCT = "its input, compressed once for all its consumers"
_SIGN = "the sign of its input in 1 bit"
_QUANTIZED = "its input, compressed"
FUNCTIONS: dict[type[Any], str] = {
    nn.Linear: _PRODUCT,
    pyg.Linear: _PRODUCT,
    nn.ReLU: _SIGN,
    nn.LeakyReLU: _SIGN,
    nn.ELU: _QUANTIZED,
    nn.BatchNorm1d: _QUANTIZED,
    nn.Dropout: "nothing, or its mask in 1 bit",
}
# They keep nothing, or what they keep stands in the line of the convolution they are part of.
PARTS = (nn.Identity, TrimToLayer, Aggregation)


@dataclass(frozen=True)
class Layer:
    """What became of one layer.

    Args:
        name: dotted name in the model.
        kind: class name.
        converted: whether it trains with compressed maps.
        note: what it keeps, or why it was left as it is.
    """

    name: str
    kind: str
    converted: bool
    note: str


@dataclass(frozen=True)
class Report:
    """What :func:`compress` did; ``print`` shows it as a table.

    Args:
        layers: each layer once, in the order of the model; containers are left out.
        functions: how often each function was compressed so far, called by a module or not; grows while training.
        left: calls that had no twin so far, with the reason; of functions unknown here, only the usual ones.
        savings: what was compressed where autograd saved it, function by function; grows while training.
    """

    layers: tuple[Layer, ...]
    functions: Counter[str]
    left: set[str]
    savings: Savings

    def __str__(self) -> str:
        rows = [(layer.name, layer.kind, "" if layer.converted else "left: ", layer.note) for layer in self.layers]
        widths = [max((len(row[column]) for row in rows), default=0) for column in range(2)]
        lines = [f"{name:{widths[0]}}  {kind:{widths[1]}}  {left}{note}" for name, kind, left, note in rows]
        if self.functions:
            calls = ", ".join(f"{name} {count}" for name, count in sorted(self.functions.items()))
            lines.append(f"calls compressed so far: {calls}")
        left = (f"call left to what autograd saves: {reason}" for reason in sorted(self.left))
        return "\n".join([*lines, *self.savings.lines(), *left])


class Compressed(nn.Module):
    """Put in front of a layer's class: a call in training mode runs in the model's pass."""

    _compression: Compression
    # Of the model that was compressed; its parts have none.
    _report: Report | None = None
    # Of passes that begin with a call of this layer, in the order of their maps.
    _kept_directions: list[Directions]

    def __repr__(self) -> str:
        return super().__repr__() if self._report is None else f"{super().__repr__()}\n{self._report}"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls the layer, in a pass of its own if none of the model's runs."""
        if not self.training:
            return super().__call__(*args, **kwargs)
        return self._call_in_pass(*args, **kwargs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # every pass has a seed of its own
    def _call_in_pass(self, *args: Any, **kwargs: Any) -> Any:
        shared = self._compression
        planned = shared.plan is not None or shared.directions is not None or shared.current() is not None
        if shared.config.scheme == "auto" and not planned and torch.is_grad_enabled():
            shared.directions = []  # while it is planned
            shared.plan = plan_call(self, args, kwargs, budget_mib=budget_of(shared.config))
            shared.directions = None
        with shared.running((*args, *kwargs.values()), self._kept_directions):
            return super().__call__(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Names the class by its parts, for it is made at run time: deepcopy and pickle find it again."""
        reduced: Any = super().__reduce_ex__(protocol)
        function, (first, *rest), *state = reduced
        if first is not type(self):  # a class that reduces itself
            return reduced
        return _rebuild, (function, type(self).__bases__[-1], type(self).__name__, *rest), *state


def compress(
    model: nn.Module,
    compression: str | CompressionConfig = "lowrank",
    *,
    seed: int = 0,
    fallback: str | None = "saved_tensors",
    **fields: Any,
) -> Report:
    """Turns a model into its compressed twin, in place: same parameters, same checkpoints, same evaluation.

    In training mode a forward pass keeps its maps compressed: those of torch's linear products, ReLU, LeakyReLU, ELU,
    dropout and BatchNorm1d, whether called as modules or as functions, and of PyG's GCNConv, GCN2Conv, SAGEConv,
    GraphConv, GENConv and GATConv. Under the low-rank scheme BatchNorm, ReLU, dropout and the layers after them share
    one sketch wherever they follow each other. Classes of layers change to subclasses of theirs, so that
    ``isinstance``, optimizers and references hold.

    What has no twin is caught where autograd saves it: maps become codes of the preset's bits (4 under the low-rank
    scheme), without projection, masks one bit an element, indices the smallest integers. What a backward pass needs
    exactly stays as it is (:data:`~iexact_runner.nn.saved_tensors.EXACT`). The report says what was saved by what.

    Functions are caught while a module of the model runs. Code that calls parts of the model and functions in turn runs
    in :func:`compressed_pass`. Under ``torch.compile`` training passes run as they are.

    Directions of the low-rank scheme are found anew in each pass, for passes need not be alike. ``refresh=k`` is for a
    model whose passes are: found every k passes, they follow the maps in between, first to first, second to second.

    Args:
        model: any module; nothing of it may be compressed already.
        compression: how maps are kept: a preset of the command line's ``compression=NAME``, or a configuration.
        seed: seed of masks, projections and rounding, which torch's global generators then have no part in.
        fallback: ``saved_tensors``, or None to leave what has no twin as it is.
        fields: of :class:`CompressionConfig`, in place of those of the preset or configuration.

    Raises:
        ConfigError: a ValueError of one line, if there is no such preset or field, a value is not valid, the scheme
            keeps plain maps, or the model is compressed already or on more than one device.
    """
    config = _chosen(compression, fields)
    if config.scheme == "auto" and isinstance(compression, str):
        budget_of(config)
    if config.scheme not in ("projected", *LOW_RANK):
        valid = "must be projected, lowrank or auto to compress a model"
        if config.scheme == "recompute":
            valid += "; torch.utils.checkpoint computes parts of any model again"
        raise ConfigError.of("compression.scheme", config.scheme, valid)
    check_choice("fallback", fallback, ("saved_tensors", None))
    model_name = type(model).__name__
    _take_own_defaults(model)
    if compressed := [name for name, module in model.named_modules() if isinstance(module, Compressed)]:
        layer = f" (layer {compressed[0]})" if compressed[0] else ""
        raise ConfigError.of("model", model_name, f"is compressed already{layer}; compress a model once, as a whole")
    devices = sorted({str(tensor.device) for tensor in (*model.parameters(), *model.buffers())})
    if len(devices) > 1:
        raise ConfigError.of("model", model_name, f"is on {' and '.join(devices)}; must be on one device")
    shared = Compression(config, seed=seed, fallback=fallback is not None)
    layers = []
    for name, module in list(model.named_modules()):
        kind = type(module)
        kept, why_not = _judge(module)
        leaf = isinstance(module, (pyg.MessagePassing, fx.GraphModule)) or not list(module.children())
        if kept is not None or (leaf and not isinstance(module, PARTS)):
            layers.append(Layer(name, kind.__name__, kept is not None, kept or why_not))
        if _runs(module):
            module._compression, module._kept_directions = shared, []
            module.__class__ = _twin(kind, kind.__name__ if kept is None else f"Compressed{kind.__name__}")
    report = Report(tuple(layers), shared.functions, shared.left, shared.savings)
    model._report = report  # type: ignore[assignment]  # modules hold anything
    return report


def compressed_pass(model: nn.Module) -> AbstractContextManager[Any]:
    """One pass over several calls, for code that does not call the model itself: ``model.encode(x)`` in training.

    Every call in it is compressed, functions too, and parts of the model share the maps they keep.

    Raises:
        ConfigError: a ValueError of one line, if the model is not compressed.
    """
    compressed = next((module for module in model.modules() if isinstance(module, Compressed)), None)
    if compressed is None:
        raise ConfigError.of("model", type(model).__name__, "is not compressed; call compress(model) first")
    shared = compressed._compression
    return shared.running((), shared.between_calls)


def _chosen(compression: str | CompressionConfig, fields: dict[str, Any]) -> CompressionConfig:
    """The configuration that a caller of :func:`compress` means."""
    if isinstance(compression, str):
        return preset(compression, **fields)
    if not isinstance(compression, CompressionConfig):
        valid = "must be the name of a preset, such as lowrank or iexact, or a CompressionConfig"
        raise ConfigError.of("compression", repr(compression), valid)
    check_names(fields)
    return replace(compression, **fields)


def _take_own_defaults(model: nn.Module) -> None:
    """Gives a model copies of layers that are default arguments of its classes, which every other model shares."""
    makers = [vars(kind).get("__init__") for kind in {kind for each in model.modules() for kind in type(each).__mro__}]
    positional = [value for make in makers for value in getattr(make, "__defaults__", None) or ()]
    named = [value for make in makers for value in (getattr(make, "__kwdefaults__", None) or {}).values()]
    own = {id(value): copy.copy(value) for value in (*positional, *named) if isinstance(value, nn.Module)}
    for parent in list(model.modules()) if own else ():
        for name, child in parent._modules.items():
            if id(child) in own:
                setattr(parent, name, own[id(child)])


def _judge(module: nn.Module) -> tuple[str | None, str]:
    """What a layer keeps if it has a twin, else None and why it has none."""
    kind, calls = type(module), "calls of known functions inside it are compressed"
    if isinstance(module, torch.jit.ScriptModule):
        return None, "compiled by TorchScript, which hides its calls"
    if isinstance(module, fx.GraphModule):
        return (
            None,
            "traced by torch.fx, each instance with a class of its own; each of its layers runs in its own pass",
        )
    if kind in FUNCTIONS:
        return FUNCTIONS[kind], ""
    if kind not in CONVOLUTIONS:
        return None, f"no twin; {calls}"
    convolution = CONVOLUTIONS[kind]
    option = convolution.option_without_twin(module)
    return (convolution.kept(module), "") if option is None else (None, f"no twin with {option}; {calls}")


def _runs(module: nn.Module) -> bool:
    """Whether a module has a forward pass that can be caught."""
    hidden = isinstance(module, (torch.jit.ScriptModule, fx.GraphModule, *PARTS))
    return not hidden and type(module).forward is not nn.Module.forward


def _twin(kind: type[Any], name: str) -> type[Any]:
    """A class for one layer once it is compressed; a layer without a twin keeps its name.

    Not one for all of a kind, for some modules of PyG write their own code into their class.
    """
    convolution = (CONVOLUTIONS[kind],) if kind in CONVOLUTIONS and name != kind.__name__ else ()
    body = {"__module__": kind.__module__}
    return new_class(name, (Compressed, *convolution, kind), exec_body=lambda namespace: namespace.update(body))


def _rebuild(function: Any, kind: type[nn.Module], name: str, *rest: Any) -> Any:
    """The empty module that deepcopy and pickle fill."""
    return function(_twin(kind, name), *rest)
