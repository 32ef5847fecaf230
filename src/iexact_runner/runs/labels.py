"""Configurations in a few words, for titles, tables and figures."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict
from functools import cache
from typing import Any

from iexact_runner.config.presets import preset, preset_names

# Fields of a compression that change no number.
_WHERE = ("backend", "offload_folder")
_FORMATS = {"actnn": "ActNN", "dropit": "DropIT", "velora": "VeLoRA", "hadamard": "Hadamard"}
_UNIFORM = {"alpha": 1.0, "levels": "uniform"}
_LOW_RANK = {"rank": None, "energy": None, "rounding": "nearest", "refresh": None, "residual": 0, "levels": "uniform"}
_SIGNS = {"sign_threshold": None, "sign_share": None, "signs": "sketch"}


def compression_label(config: Mapping[str, Any]) -> str:
    """A compression's configuration in a few words: the name that papers call it by, and what is not as there."""
    scheme, bits = config.get("scheme"), config.get("bits")
    maps = "FP32 maps" if bits is None else f"INT{bits}"
    usual: dict[str, Any] = {}
    if scheme in ("none", "recompute"):
        words = ["FP32" if scheme == "none" else "FP32, recomputed"]
    elif scheme == "auto":
        size, share = config.get("budget_mib"), config.get("budget")
        words = [f"auto, {'what fits' if share == 'fit' else f'{share} of FP32' if size is None else f'{size:g} MiB'}"]
        usual = {"rounding": "nearest", "refresh": None, "interval": None}
    elif scheme == "lowrank":
        dealt = config.get("map_bits")
        words = ["PRAC" if preset_of(config) == "prac" else "low rank"]
        words.append(maps if dealt is None else f"{dealt} bits a node")
        usual = _LOW_RANK if preset_of(config) else _LOW_RANK | _SIGNS
    elif (published := _FORMATS.get(config.get("format", "blocks"))) is not None:
        words = [published, *([] if bits is None else [maps])]
        usual = {"kept_frac": 1.0, "group_size": None} | _UNIFORM
    else:
        words, usual = _projected_words(config, maps)
    words += [f"{field} {config[field]}" for field, value in usual.items() if config.get(field, value) != value]
    words += [word for field, word in (("offload", "offloaded"), ("simulate", "simulated")) if config.get(field)]
    return ", ".join(words)


def _projected_words(config: Mapping[str, Any], maps: str) -> tuple[list[str], dict[str, Any]]:
    """EXACT's name where maps are projected, i-EXACT's where blocks span G rows, with the published share unsaid."""
    projected, rows = config.get("kept_frac", 1.0) != 1.0, config.get("col_size", 0)
    name = ["i-EXACT" if rows else "EXACT"] if projected else []
    words = [*name, maps, *([f"G = {rows}"] if rows else [])]
    return words, {"kept_frac": 0.125 if projected else 1.0} | _UNIFORM


def preset_of(config: Mapping[str, Any]) -> str | None:
    """The preset that a compression is, by all its fields that change a number; None if it is none of them."""
    for name, fields in _presets().items():
        if all(config.get(field, fields[field]) == fields[field] for field in fields if field not in _WHERE):
            return name
    return None


@cache
def _presets() -> dict[str, dict[str, Any]]:
    return {name: asdict(preset(name)) for name in preset_names()}


def sampler_label(config: Mapping[str, Any] | None) -> str:
    """A sampler's configuration in a few words; records of before there were samplers have none."""
    name = (config or {}).get("name", "none")
    sizes = {
        "none": "full batch",
        "cluster": "{batch_parts} of {parts} parts",
        "saint_rw": "{roots} walks of {walk_length}",
        "saint_node": "{nodes} nodes",
        "saint_edge": "{edges} edges",
        "neighbor": "{batch_size} nodes, {num_neighbors}",
    }
    size = sizes.get(name, "").format_map(defaultdict(str, config or {}))
    return size if name == "none" else ", ".join(filter(None, (name, size)))
