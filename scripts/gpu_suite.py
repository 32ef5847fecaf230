"""Everything that only a GPU can show, in one command of under eight minutes: parity first, then times.

python scripts/gpu_suite.py --out benchmarks

Writes gpu_parity.csv (every kernel against the reference, bit for bit), gpu_kernels.csv (bandwidth against a copy on
the same device) and gpu_epochs.csv (a training step against plain PyG FP32 in the same process), each row with the
device, the versions and the commit. Ends with status 1 if a kernel differs from the reference.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import sys
import time
from pathlib import Path
from typing import Any

NEEDED = ("torch", "triton", "torch_geometric", "numpy", "pandas", "hydra", "omegaconf", "rich", "iexact_runner")
DATASETS = ("synthetic_arxiv", "synthetic_flickr")
MODELS = ("sage", "gcn", "gcn2", "gat")
# The targets that the tables are read against; that of a preset is a ratio to plain PyG FP32.
BANDWIDTH_TARGET = 0.80
EPOCH_TARGETS = {"iexact": 1.05, "lowrank": 0.90}


def main() -> None:
    """Runs the parts one after the other; what is done is on disk before the next begins."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=9, help="timed epochs of each preset")
    parser.add_argument("--parity-seconds", type=float, default=150.0, help="stop comparing after this long")
    parser.add_argument("--seconds", type=float, default=400.0, help="start no further epoch benchmark after this long")
    arguments = parser.parse_args()
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"gpu_suite: not installed: {', '.join(missing)}")
    import torch

    if not torch.cuda.is_available():
        sys.exit("gpu_suite: no CUDA device was found")
    device = torch.device(arguments.device)
    arguments.out.mkdir(parents=True, exist_ok=True)
    from iexact_runner.kernels import triton as triton_kernels

    start = time.monotonic()
    equal = check_parity(triton_kernels, device, arguments.out, max_seconds=arguments.parity_seconds)
    time_kernels(device, arguments.out)
    time_epochs(device, arguments.out, rounds=arguments.rounds, deadline=start + arguments.seconds)
    print(f"done in {time.monotonic() - start:.0f} s")
    sys.exit(0 if equal else 1)


def check_parity(kernels: Any, device: Any, out: Path, *, max_seconds: float) -> bool:
    """Compares kernels with the reference on the CPU; whether all compared cases agree, the quick ones among them.

    Every specialisation is compiled on first use, which all cases together have no time for: after the quick ones,
    which touch every function, width and type, the others follow in a seeded random order until the time is up.
    """
    from iexact_runner.kernels import parity

    quick, others = list(parity.cases(quick=True)), list(parity.cases(quick=False))
    random.Random(0).shuffle(others)
    start, compared, rows = time.monotonic(), 0, []
    for case in [*quick, *others]:
        if compared >= len(quick) and time.monotonic() - start > max_seconds:
            break
        rows += [{"difference": line} for line in parity.differences(case, kernels, device)]
        compared += 1
    for row in rows[:20]:
        print(f"DIFFERS {row['difference']}")
    total = len(quick) + len(others)
    print(f"parity: {compared} of {total} cases compared in {time.monotonic() - start:.0f} s, {len(rows)} differences")
    counts = {"compared": compared, "of": total, "differences": len(rows)}
    _write([counts | row for row in rows or [{"difference": ""}]], out / "gpu_parity.csv", device)
    return not rows


def time_kernels(device: Any, out: Path) -> None:
    """Bandwidth of each kernel, bytes read and written once, against a device-to-device copy."""
    import torch
    from triton.testing import do_bench

    from bench_kernels import kernel_runs
    from iexact_runner.kernels import triton as triton_kernels

    rows = []
    for shape in ((169_343, 128), (2_449_029, 128)):
        x = torch.randn(shape, device=device)
        target = torch.empty_like(x)
        copy = 2 * x.nbytes / (1e-3 * do_bench(lambda x=x, target=target: target.copy_(x), return_mode="median"))
        for name, kernel in kernel_runs(triton_kernels, x).items():
            seconds = 1e-3 * do_bench(kernel.run, return_mode="median")
            share = kernel.nbytes / seconds / copy
            rows.append(
                {
                    "kernel": name,
                    "rows": shape[0],
                    "columns": shape[1],
                    "microseconds_median": 1e6 * seconds,
                    "gigabytes_per_second": kernel.nbytes / seconds / 1e9,
                    "share_of_copy_bandwidth": share,
                }
            )
            mark = "" if share >= BANDWIDTH_TARGET else "  below target"
            print(f"{shape[0]:>9} x {shape[1]}  {name:<28} {1e6 * seconds:>9.1f} us  {share:.2f} of copy{mark}")
    _write(rows, out / "gpu_kernels.csv", device)


def time_epochs(device: Any, out: Path, *, rounds: int, deadline: float) -> None:
    """A training step of every model and preset against plain PyG FP32."""
    from rich.console import Console

    from bench_epoch import PRESETS, append_rows, show, time_presets
    from iexact_runner.errors import UserError

    # Eigenproblems take long on a GPU: what does it bring to follow directions instead?
    presets = PRESETS | {"lowrank, refresh 10": ("compression=lowrank", "compression.refresh=10")}
    path = out / "gpu_epochs.csv"
    path.unlink(missing_ok=True)
    for dataset in DATASETS:
        for model in MODELS:
            if time.monotonic() > deadline:
                print(f"{model} on {dataset}: left out, the time is up")
                continue
            try:
                rows = time_presets(dataset, model, device, rounds=rounds, presets=presets)
            except UserError as error:
                print(f"{model} on {dataset}: {error}")
                continue
            show(rows, Console(width=120))
            append_rows(rows, path)
            for row in rows:
                target = EPOCH_TARGETS.get(row["preset"])
                if target and row["ratio_median"] > target:
                    print(f"{model} on {dataset}, {row['preset']}: {row['ratio_median']:.3f} is above {target}")


def _write(rows: list[dict[str, Any]], path: Path, device: Any) -> None:
    import pandas as pd

    from iexact_runner.measure import environment

    facts = environment.describe(device, backend="triton")
    kept = {key: facts[key] for key in ("device_name", "python", "torch", "triton", "cuda", "git_commit")}
    pd.DataFrame([row | kept for row in rows]).to_csv(path, index=False)


if __name__ == "__main__":
    main()
