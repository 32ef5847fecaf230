"""Published formats of a kept map, a module each, named as ``compression.format`` names them.

A module has ``make_format(config)``, which returns a :class:`~iexact_runner.compression.maps.Format`.
"""

from __future__ import annotations

from importlib import import_module

from iexact_runner.compression.maps import Format, MapFormat, levels_for
from iexact_runner.config import CompressionConfig


def format_of(config: CompressionConfig) -> Format:
    """The format that a configuration of the projected scheme chooses."""
    if config.format == "blocks":
        return blocks(config)
    made: Format = import_module(f"{__name__}.{config.format}").make_format(config)
    return made


def blocks(config: CompressionConfig) -> MapFormat:
    """Blocks of whole rows, projected or not: EXACT and i-EXACT."""
    return MapFormat(
        bits=config.bits,
        kept_frac=config.kept_frac,
        col_size=config.col_size,
        levels=levels_for(config.bits, config.alpha),
        max_block_size=config.max_block_size,
        backend=config.backend,
        optimal=config.optimal_levels(),
    )
