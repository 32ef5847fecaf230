"""Times the compression kernels on the CPU against copying the map they work on.

python scripts/bench/bench_kernels.py --csv benchmarks/kernels_cpu.csv

Kernels and copies take turns, so that a busy machine slows all of them alike; medians are printed. A fresh tensor costs
page faults, which every kernel that returns a map pays too, hence the two copies to compare with.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pandas as pd
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from iexact_runner.kernels import backends, parity, reference
from iexact_runner.kernels.levels import level_table
from iexact_runner.measure import environment

BITS = (1, 2, 4, 8)
# Two capped blocks of published presets and one row of a projected map.
BLOCK_SIZES = (1024, 63 * 16, 16)


class KernelRun(NamedTuple):
    """A call to time, and the bytes that it has to read and to write at least."""

    run: Callable[[], object]
    nbytes: int


def main() -> None:
    """Prints one table and the ratio that the project promises."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=169_343, help="nodes of the map (ogbn-arxiv)")
    parser.add_argument("--columns", type=int, default=128, help="features of the map")
    parser.add_argument("--repeats", type=int, default=9, help="timed runs of each kernel")
    parser.add_argument("--backend", choices=("numba", "torch"), default="numba")
    parser.add_argument("--csv", type=Path, help="file to write the rows to")
    arguments = parser.parse_args()

    device = torch.device("cpu")
    x = torch.randn(arguments.rows, arguments.columns)
    existing = torch.empty_like(x)
    runs = {
        "copy to existing": KernelRun(lambda: existing.copy_(x), 2 * x.nbytes),
        "copy to fresh": KernelRun(lambda: torch.empty_like(x).copy_(x), 2 * x.nbytes),
        **kernel_runs(backends.select(arguments.backend, device), x),
    }
    medians = _medians(runs, arguments.repeats)
    console = Console()
    table = Table(title=f"{arguments.backend}, {tuple(x.shape)} float32, {torch.get_num_threads()} threads")
    for heading in ("kernel", "median [ms]", "x copy to existing", "x copy to fresh"):
        table.add_column(heading, justify="left" if heading == "kernel" else "right")
    for name, median in medians.items():
        ratios = (median / medians[copy] for copy in ("copy to existing", "copy to fresh"))
        table.add_row(name, f"{1e3 * median:.1f}", *(f"{ratio:.2f}" for ratio in ratios))
    console.print(table)
    pair = medians["quantize int2/1024"] + medians["dequantize int2/1024"]
    for copy in ("copy to existing", "copy to fresh"):
        console.print(f"INT2 quantize + decode: {pair / (2 * medians[copy]):.2f} x {copy} twice")
    if arguments.csv:
        facts = environment.describe(device, backend=arguments.backend)
        rows = [
            {
                "kernel": name,
                "rows": arguments.rows,
                "columns": arguments.columns,
                "milliseconds_median": 1e3 * median,
                "ratio_to_copy_existing": median / medians["copy to existing"],
                "ratio_to_copy_fresh": median / medians["copy to fresh"],
                "repeats": arguments.repeats,
                **{key: facts[key] for key in ("device_name", "torch_threads", "python", "torch", "numba")},
                "backend": arguments.backend,
                "git_commit": facts["git_commit"],
            }
            for name, median in medians.items()
        ]
        arguments.csv.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(rows).to_csv(arguments.csv, index=False)


def kernel_runs(kernels: ModuleType, x: Tensor) -> dict[str, KernelRun]:
    """Every kernel of a backend on a map, by name."""
    runs: dict[str, KernelRun] = {}
    for bits, block_size, levels in _quantizer_forms():
        form: dict[str, Any] = {"bits": bits, "block_size": block_size, "levels": levels}
        stored = kernels.quantize(x, **form, seed=0)
        nbytes = x.nbytes + sum(part.nbytes for part in stored)
        name = f"int{bits}/{block_size}{' uneven' if levels else ''}"
        runs[f"quantize {name}"] = KernelRun(lambda form=form: kernels.quantize(x, **form, seed=0), nbytes)  # type: ignore[misc]
        runs[f"dequantize {name}"] = KernelRun(
            lambda form=form, stored=stored: kernels.dequantize(  # type: ignore[misc]
                *stored, **form, shape=tuple(x.shape), dtype=x.dtype
            ),
            nbytes,
        )
    random: dict[str, Any] = {"p": 0.5, "seed": 0}
    mask = kernels.leaky_relu(x, negative_slope=0.0)[1]
    maps = 2 * x.nbytes
    return (
        runs
        | _block_runs(kernels, x)
        | {
            "relu": KernelRun(lambda: kernels.leaky_relu(x, negative_slope=0.0), maps + mask.nbytes),
            "leaky_relu": KernelRun(lambda: kernels.leaky_relu(x, negative_slope=0.2), maps + mask.nbytes),
            "relu backward": KernelRun(
                lambda: kernels.leaky_relu_backward(x, mask, negative_slope=0.0), maps + mask.nbytes
            ),
            "dropout": KernelRun(lambda: kernels.dropout(x, **random), maps),
            "dropout_mask": KernelRun(lambda: kernels.dropout_mask(x.numel(), **random, device=x.device), mask.nbytes),
            "apply_dropout_mask": KernelRun(lambda: kernels.apply_dropout_mask(x, mask, p=0.5), maps + mask.nbytes),
            "relu_dropout": KernelRun(
                lambda: kernels.leaky_relu_dropout(x, negative_slope=0.0, **random), maps + mask.nbytes
            ),
            "relu_dropout backward": KernelRun(
                lambda: kernels.leaky_relu_dropout_backward(x, mask, negative_slope=0.0, **random), maps + mask.nbytes
            ),
            "rademacher": KernelRun(
                lambda: kernels.rademacher(*x.shape, seed=0, dtype=x.dtype, device=x.device), x.nbytes
            ),
        }
    )


def _block_runs(kernels: ModuleType, x: Tensor) -> dict[str, KernelRun]:
    """The passes of a block of the low-rank scheme, with 8 directions, and of its kept form, with 48 bits a node."""
    random: dict[str, Any] = {"p": 0.5, "seed": 0}
    vector = torch.rand(x.size(1), device=x.device)
    directions = torch.randn(x.size(1), 8, device=x.device)
    coefficients = torch.randn(x.size(0), 8, device=x.device)
    mask = kernels.leaky_relu(x, negative_slope=0.0)[1]
    form: dict[str, Any] = {"bits": 4, "block_size": 32, "levels": None, "seed": 0}
    kept = sum(part.nbytes for part in kernels.quantize(coefficients, **form))
    decoded = mask.nbytes + coefficients.nbytes
    dealt = torch.tensor([8, 7, 6, 6, 5, 5, 4, 4, 1, 1, 1, 0], dtype=torch.int32, device=x.device)
    levels = level_table(x.device)
    several = torch.randn(x.size(0), len(dealt), device=x.device)
    codes = kernels.quantize_coefficients(several, dealt, levels, width=48, seed=None)
    # Signs of which the sketch is sure in about nine of ten.
    sketch = (coefficients, directions, vector, torch.full_like(vector, 0.3))
    signs: dict[str, Any] = {"exact": False, "p": 0.5, "seed": 0}
    streams, counts = kernels.pack_signs(mask, *sketch, **signs)
    length = int(reference.stream_lengths(counts).sum())
    stream = kernels.join_streams(streams, counts, capacity=length)
    sketched = mask.nbytes + coefficients.nbytes
    return {
        "quantize_coefficients/48": KernelRun(
            lambda: kernels.quantize_coefficients(several, dealt, levels, width=48, seed=None),
            several.nbytes + codes.nbytes,
        ),
        "dequantize_coefficients/48": KernelRun(
            lambda: kernels.dequantize_coefficients(codes, dealt, levels), several.nbytes + codes.nbytes
        ),
        "pack_signs": KernelRun(lambda: kernels.pack_signs(mask, *sketch, **signs), sketched + length),
        "join_streams": KernelRun(lambda: kernels.join_streams(streams, counts, capacity=length), 2 * length),
        "unpack_signs": KernelRun(lambda: kernels.unpack_signs(stream, counts, *sketch, **signs), sketched + length),
        "normalize_relu_dropout": KernelRun(
            lambda: kernels.normalize_relu_dropout(x, vector, vector, vector, vector, **random),
            2 * x.nbytes + mask.nbytes,
        ),
        "quantize_product int4/32": KernelRun(
            lambda: kernels.quantize_product(x, directions, vector[:8], **form), x.nbytes + kept
        ),
        "decode_relu_dropout": KernelRun(
            lambda: kernels.decode_relu_dropout(coefficients, directions, vector, mask, **random), x.nbytes + decoded
        ),
        "gated_sums": KernelRun(
            lambda: kernels.gated_sums(x, mask, coefficients, directions, **random), x.nbytes + decoded
        ),
        "gated_gradient": KernelRun(
            lambda: kernels.gated_gradient(x, mask, coefficients, directions, vector, vector, **random),
            2 * x.nbytes + decoded,
        ),
    }


def _quantizer_forms() -> list[tuple[int, int, tuple[float, ...] | None]]:
    """Bits, block size and levels."""
    uniform = [(bits, block_size, None) for block_size in BLOCK_SIZES for bits in BITS]
    return uniform + [(bits, BLOCK_SIZES[0], parity.uneven_levels(bits)) for bits in BITS]


def _medians(runs: dict[str, KernelRun], repeats: int) -> dict[str, float]:
    """Median seconds of each run, after one that is not counted because it may compile."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, kernel in runs.items():
            start = time.perf_counter()
            kernel.run()
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


if __name__ == "__main__":
    main()
