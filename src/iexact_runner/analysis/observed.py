"""``task=distribution``: how the maps of a trained model are distributed, as a record of one line a map."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
from torch import Tensor

from iexact_runner.analysis.distribution import captured_maps, map_figures, normalised
from iexact_runner.compression.bins import ClippedNormal, cell_masses
from iexact_runner.nn import Model
from iexact_runner.problem import Problem

# Cells of the histograms that are drawn, and elements of a map that they count.
CELLS = 60
MOST_ELEMENTS = 1 << 20


def observe(model: Model, problem: Problem, *, bits: int, seed: int) -> list[dict[str, Any]]:
    """Figures of every map that the model would quantize in a training step, with the histogram of its h in [0, B].

    ``observed`` and ``clipped_normal`` are the masses of equal cells: of the map, and of the clipped normal for its
    block size; uniform values would put the same into each.

    Args:
        model: left as it is.
        problem: what it trains on.
        bits: bits of a code; B = 2**bits - 1.
        seed: of the step.
    """
    return [
        {
            "layer": captured.layer,
            "op": captured.op,
            "projected": captured.projected,
            "shape": list(captured.values.shape),
            **asdict(map_figures(captured.values, block_size=captured.block_size, bits=bits)),
            "observed": _histogram(captured.values, captured.block_size, bits=bits),
            "clipped_normal": list(map(float, cell_masses(ClippedNormal(captured.block_size), cells=CELLS))),
        }
        for captured in captured_maps(model, problem, seed=seed)
    ]


def _histogram(values: Tensor, block_size: int, *, bits: int) -> list[float]:
    flat = values.detach().reshape(-1)[: MOST_ELEMENTS // block_size * block_size]
    blocks = flat[: flat.numel() // block_size * block_size].view(-1, block_size).float().cpu()
    low, high = blocks.aminmax(dim=1)
    h = normalised(blocks[low < high], bits=bits).numpy()
    counts = np.histogram(h, bins=CELLS, range=(0, 2**bits - 1))[0]
    return [float(mass) for mass in counts / counts.sum()]
