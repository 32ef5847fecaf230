"""How the maps that are quantized are really distributed, and what that means for the variance of rounding.

Shapes: N nodes, R stored features, G block size, B highest code, h = (x - zero) / scale in [0, B] a normalised value.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from iexact_runner.compression import dequantize, quantize
from iexact_runner.compression.bins import (
    ClippedNormal,
    Distribution,
    Empirical,
    Uniform,
    cell_masses,
    expected_variance,
    optimal_levels,
)
from iexact_runner.compression.curves import Array
from iexact_runner.compression.maps import MapLayout
from iexact_runner.kept import graph_nodes
from iexact_runner.nn import Model
from iexact_runner.problem import Problem, training_input

# Cells of the histograms that are compared, and elements of a map that are looked at.
CELLS = 128
MOST_ELEMENTS = 1 << 21
DRAWS = 4


@dataclass(frozen=True)
class CapturedMap:
    """A map as it is before it is quantized.

    Args:
        layer: dotted name of the parameters that it is kept for; empty for an operation without any.
        op: the operation that keeps it, for example ``Linear`` or ``BatchNorm``.
        projected: whether the random projection was applied.
        values: (N, R).
        block_size: G.
    """

    layer: str
    op: str
    projected: bool
    values: Tensor
    block_size: int


@dataclass(frozen=True)
class LevelFigures:
    """Variance of rounding to some levels, in units of the code squared.

    Args:
        predicted: of clipped normal values.
        measured: of the map itself, over several draws.
        reduction: measured, as a share of that with uniform levels.
        error_reduction: likewise for the squared error of the decoded map, in which wide blocks weigh more.
    """

    predicted: float
    measured: float
    reduction: float
    error_reduction: float


@dataclass(frozen=True)
class MapFigures:
    """How one map fits the model.

    Args:
        d: elements of a block.
        js_uniform: Jensen-Shannon divergence of the observed h from uniform values, in bits, 0 to 1.
        js_clipped_normal: likewise from the clipped normal of d.
        uniform: figures of uniform levels.
        optimal: of those that are best for the clipped normal.
        empirical: of those that are best for the histogram of the map itself.
    """

    d: int
    js_uniform: float
    js_clipped_normal: float
    uniform: LevelFigures
    optimal: LevelFigures
    empirical: LevelFigures


def captured_maps(model: Model, problem: Problem, *, seed: int) -> list[CapturedMap]:
    """What a compressing model would quantize in one training step, layer by layer.

    A copy of the model runs forward, its maps projected as configured but kept in FP32.

    Args:
        model: left as it is.
        problem: what it trains on.
        seed: of the step: projections and dropout masks.
    """
    twin = copy.deepcopy(model)
    twin.compression = dataclasses.replace(model.compression, bits=None, alpha=1.0, levels="uniform")
    twin.train()
    places = {parameter: place for place, parameter in enumerate(twin.parameters())}
    names = [*(name.rpartition(".")[0] for name, _ in twin.named_parameters()), ""]
    features, _ = training_input(problem, seed=seed)
    found: dict[int, tuple[int, CapturedMap]] = {}
    for node in graph_nodes(twin(features, problem.training.graph, seed=seed)):
        # Its first weight names the layer; a map that several operations share counts for the first of them.
        parents = [getattr(parent, "variable", None) for parent, _ in node.next_functions]
        known = [parent for parent in parents if parent is not None and parent in places]
        matrices = [parent for parent in known if parent.dim() > 1]
        place = min((places[parent] for parent in matrices or known), default=len(places))
        op = node.name().removesuffix("Backward").removeprefix("Graph")
        for layout, values in _stored_maps(node):
            earlier = found.get(values.data_ptr())
            if earlier is None or place < earlier[0]:
                captured = CapturedMap(names[place], op, layout.projected, values, layout.block_size)
                found[values.data_ptr()] = (place, captured)
    return [captured for _, captured in sorted(found.values(), key=lambda item: item[0])]


def _stored_maps(node: Any) -> Iterator[tuple[MapLayout, Tensor]]:
    """The maps that a node keeps, with their layouts: that of its input, and of another one if it has two."""
    layouts = [getattr(node, name, None) for name in ("layout", "own_layout")]
    kept = list(node.saved_tensors) if any(isinstance(layout, MapLayout) for layout in layouts) else []
    for layout in layouts:
        if isinstance(layout, MapLayout):
            shape = (layout.shape[0], layout.rank)
            place = next(index for index, tensor in enumerate(kept) if tensor is not None and tensor.shape == shape)
            yield layout, kept.pop(place)


def map_figures(values: Tensor, *, block_size: int, bits: int, seed: int = 0) -> MapFigures:
    """How a map fits the clipped normal, and what rounding it costs with uniform and with better levels.

    Only whole blocks that are not constant count, at most 2**21 elements of them, evenly spaced.

    Args:
        values: (N, R), on any device.
        block_size: G, the d of the model.
        bits: bits of a code.
        seed: of the first draw of the rounding.

    Raises:
        ValueError: if there is no such block.
    """
    blocks = _sampled_blocks(values.detach(), block_size)
    top = 2**bits - 1
    h = normalised(blocks, bits=bits).numpy()
    model = ClippedNormal(block_size)
    observed = np.histogram(h, bins=CELLS, range=(0, top))[0] / h.size
    choices: dict[str, tuple[float, ...]] = {
        "uniform": tuple(map(float, range(top + 1))),
        "optimal": optimal_levels(bits, distribution=model),
        "empirical": optimal_levels(bits, distribution=Empirical.of(h, top=top)),
    }
    errors = {name: _measured(blocks, levels, bits=bits, seed=seed) for name, levels in choices.items()}
    base, base_error = errors["uniform"]
    figures = {
        name: LevelFigures(
            predicted=expected_variance(choices[name], distribution=model),
            measured=variance,
            reduction=1 - variance / base,
            error_reduction=1 - error / base_error,
        )
        for name, (variance, error) in errors.items()
    }
    return MapFigures(
        d=block_size,
        js_uniform=divergence(observed, Uniform()),
        js_clipped_normal=divergence(observed, model),
        uniform=figures["uniform"],
        optimal=figures["optimal"],
        empirical=figures["empirical"],
    )


def normalised(blocks: Tensor, *, bits: int) -> Tensor:
    """The h of blocks (K, G) as the quantizer sees them, from the stored zero and scale; float64 in [0, B]."""
    kept = quantize(blocks, bits=bits, block_size=blocks.size(1), seed=0)
    zero, scale = (part.double()[:, None] for part in (kept.zero, kept.scale))
    return ((blocks.double() - zero) / scale).clamp(0, 2**bits - 1)


def divergence(observed: Array, distribution: Distribution) -> float:
    """Jensen-Shannon divergence in bits between the masses of equal cells over [0, B] and those of a distribution."""
    expected = cell_masses(distribution, cells=len(observed))
    middle = (observed + expected) / 2

    def from_middle(masses: Array) -> float:
        some = masses > 0
        return float((masses[some] * np.log2(masses[some] / middle[some])).sum())

    return (from_middle(observed) + from_middle(expected)) / 2


def _sampled_blocks(values: Tensor, block_size: int) -> Tensor:
    """Whole blocks (K, G) that are not constant, in float32 on the CPU."""
    flat = values.reshape(-1)
    blocks = flat[: flat.numel() // block_size * block_size].view(-1, block_size)
    most = max(1, MOST_ELEMENTS // block_size)
    blocks = blocks[:: max(1, -(-len(blocks) // most))].float().cpu()
    low, high = blocks.aminmax(dim=1)
    blocks = blocks[low < high]
    if not len(blocks):
        raise ValueError(f"block_size={block_size}: the map has no whole block of it that is not constant")
    return blocks


def _measured(blocks: Tensor, levels: tuple[float, ...], *, bits: int, seed: int) -> tuple[float, float]:
    """Mean square of the rounding error, in units of the scale and of the values."""
    scaled = plain = 0.0
    for draw in range(DRAWS):
        kept = quantize(blocks, bits=bits, block_size=blocks.size(1), levels=levels, seed=seed + draw)
        error = dequantize(kept).double() - blocks
        plain += error.square().mean().item() / DRAWS
        scaled += (error / kept.scale.double()[:, None]).square().mean().item() / DRAWS
    return scaled, plain
