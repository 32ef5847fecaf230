"""Figures of the EXACT and i-EXACT papers and of their reference code, to stand beside what is measured here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Figure:
    """One figure and the configuration that it holds for.

    Args:
        metric: which of the report's metrics it is a figure of.
        kind: ``published`` (logged by the reference, or derived from what it logs), or ``formula`` of its layout.
        value: in the metric's unit.
        where: valid values by dotted field of the configuration.
        device: kind of device it holds for; None for any.
    """

    metric: str
    kind: str
    value: float
    where: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    device: str | None = None

    def holds_for(self, config: Mapping[str, Any], device: str) -> bool:
        """Whether a run with this flat configuration on this device should reproduce the figure."""
        if self.device is not None and self.device != device.partition(":")[0]:
            return False
        return all(name in config and config[name] in valid for name, valid in self.where.items())


NOTES = {
    "published": "published: logged by the reference; its saved MiB hold .75 MiB of the loss, and col_size 2 and 4 are "
    "derived",
    "formula": "formula: what the reference's layout, or plain PyG modules in FP32, keep when the model returns",
}

# SAGE on ogbn-arxiv or a graph of its sizes, in the hyper-parameters of the papers.
_ARXIV_SAGE: dict[str, tuple[Any, ...]] = {
    "model.name": ("sage",),
    "model.num_layers": (3,),
    "model.hidden_channels": (128,),
    "model.batch_norm": (True,),
    "model.input_dropout": (0.0,),
    "model.residual": (False,),
    "dataset.name": ("arxiv", "synthetic_arxiv"),
    "dataset.inductive": (False,),
}
_FP32 = _ARXIV_SAGE | {"compression.scheme": ("none",), "compression.share_maps": (False,)}
_LAYOUT = _ARXIV_SAGE | {
    "compression.scheme": ("projected",),
    "compression.bits": (2,),
    "compression.kept_frac": (0.125,),
    "compression.max_block_size": (1024,),
    "compression.share_maps": (False,),
    "compression.store_dropout_mask": (True,),
}
# col_size: MiB that the reference logs, MiB by the formula.
_SAVED_MIB = {
    0: (30.47, 29.72),
    2: (27.89, 27.13),
    4: (26.59, 25.84),
    8: (25.95, 25.19),
    16: (25.72, 24.95),
    32: (25.60, 24.83),
    64: (25.56, 24.77),
}


def _rows(col_size: int, logged: float, formula: float) -> list[Figure]:
    where = _LAYOUT | {"compression.col_size": (0, 1) if col_size == 0 else (col_size,)}
    return [
        Figure("saved_mib", "published", logged, where),
        Figure("saved_mib", "formula", formula, where),
        # What the reference itself measures, on the device that it measures on.
        Figure("reference_activation_mib", "published", logged, where),
    ]


FIGURES = (
    *(figure for col_size, values in _SAVED_MIB.items() for figure in _rows(col_size, *values)),
    Figure("saved_mib", "formula", 786.0, _FP32, device="cuda"),
    Figure("saved_mib", "formula", 910.0, _FP32, device="cpu"),
    Figure("model_mib", "published", 0.2954, _ARXIV_SAGE),
    Figure("data_mib", "published", 162.01, _ARXIV_SAGE),
)


def figures_for(metric: str, config: Mapping[str, Any], device: str) -> dict[str, float]:
    """Figures by kind that a measured value of this configuration should be held against."""
    return {
        figure.kind: figure.value for figure in FIGURES if figure.metric == metric and figure.holds_for(config, device)
    }
