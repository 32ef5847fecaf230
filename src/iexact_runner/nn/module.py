"""A model of one's own: ``model=module model.target=package.module:Class``, compressed by :func:`compress`."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from iexact_runner.compression.directions import Directions
from iexact_runner.config import CompressionConfig, ModuleConfig
from iexact_runner.data.graph import Edges, edge_list
from iexact_runner.errors import ConfigError
from iexact_runner.nn.convert import compress
from iexact_runner.nn.interception import Compression

# What a class may call the width of its input and of its output, best first.
INPUTS = ("in_channels", "in_dim", "in_features", "input_dim", "num_features", "nfeat")
OUTPUTS = ("out_channels", "out_dim", "out_features", "output_dim", "num_classes", "nclass")
# Fields of the configuration that are passed to a class that has parameters of the same name.
FIELDS = ("hidden_channels", "num_layers", "dropout")


class ModuleNet(nn.Module):
    """A class of the user's, with the interface of the models here.

    Args:
        config: which class, and what it is given.
        in_channels: D, width of the features.
        out_channels: number of classes.
        compression: how maps are kept while training.

    Raises:
        ConfigError: if there is no such class, or it cannot be made.
    """

    build_graph = staticmethod(edge_list)
    gathers_sums = False  # as far as is known

    def __init__(
        self, config: ModuleConfig, *, in_channels: int, out_channels: int, compression: CompressionConfig
    ) -> None:
        super().__init__()
        self.target = config.target
        self.net = _made(config, in_channels=in_channels, out_channels=out_channels)
        self.directions: list[Directions] = []  # found anew in each pass, but under a plan or a longer refresh
        self._config = compression
        self._pass: Compression | None = None
        self.compression = compression

    @property
    def compression(self) -> CompressionConfig:
        """How maps are kept."""
        return self._config

    @compression.setter
    def compression(self, config: CompressionConfig) -> None:
        self._config = config
        if self._pass is None and config.scheme != "none":
            compress(self.net, config)
            self._pass = self.net._compression  # type: ignore[assignment]  # what compress puts there
        elif self._pass is not None:
            self._pass.config = config

    def reset_parameters(self) -> None:
        """Draws new weights of all parts that can."""
        for module in self.net.modules():
            reset: Any = getattr(module, "reset_parameters", None)
            if reset is not None:
                reset()

    def forward(
        self, features: Tensor, graph: Edges, *, seed: int | Tensor = 0, map_seed: int | Tensor | None = None
    ) -> Tensor:
        """Maps features (N, D) to scores (N, classes); ``seed`` is that of this training step.

        Raises:
            ConfigError: if the class returns anything else.
        """
        if self._pass is not None:
            self._pass.seeds = (seed, map_seed)
            go_on = self._config.scheme == "auto" or (self._config.refresh or 1) > 1
            self._pass.directions = self.directions if go_on else None
        scores = self.net(features, graph.edge_index)
        if not isinstance(scores, Tensor) or scores.dim() != 2 or scores.size(0) != features.size(0):
            found = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else f"a {type(scores).__name__}"
            valid = f"forward(x, edge_index) must return scores (nodes, classes), and returned {found}"
            raise ConfigError.of("model.target", self.target, valid)
        return scores


def _made(config: ModuleConfig, *, in_channels: int, out_channels: int) -> nn.Module:
    """An instance, given what its class has parameters for."""
    made = _found(config.target)
    parameters = inspect.signature(made).parameters
    anything = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    given: dict[str, Any] = {name: getattr(config, name) for name in FIELDS if name in parameters}
    for names, width in ((INPUTS, in_channels), (OUTPUTS, out_channels)):
        name = next((name for name in names if name in parameters), names[0] if anything else None)
        if name is None:
            valid = (
                f"has no parameter for a width: name one of its parameters {names[0]} (it has {', '.join(parameters)})"
            )
            raise ConfigError.of("model.target", config.target, valid)
        given[name] = width
    try:
        module = made(**given | config.kwargs)
    except (TypeError, ValueError) as error:
        reason = (
            f"cannot be made with {', '.join(f'{name}={value}' for name, value in (given | config.kwargs).items())}"
        )
        raise ConfigError.of("model.target", config.target, f"{reason}: {' '.join(str(error).split())}") from error
    if not isinstance(module, nn.Module):
        raise ConfigError.of(
            "model.target", config.target, f"must make an nn.Module, and made a {type(module).__name__}"
        )
    return module


def _found(target: str) -> Callable[..., Any]:
    """What ``package.module:Class`` names, looked for in the working folder too."""
    module_name, _, name = target.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        found: Any = importlib.import_module(module_name)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ConfigError.of("model.target", target, f"cannot be imported: {' '.join(str(error).split())}") from error
    if not callable(found):
        raise ConfigError.of("model.target", target, "must be a class, or a function that makes a model")
    callable_found: Callable[..., Any] = found
    return callable_found
