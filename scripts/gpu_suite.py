"""Everything that only a GPU can show, in one command of under eight minutes: parity first, then times.

python scripts/gpu_suite.py --out benchmarks

Writes gpu_parity.csv (every kernel against the reference, bit for bit), gpu_kernels.csv (bandwidth against a copy on
the same device) and gpu_epochs.csv (a training step against plain PyG FP32 in the same process), each row with the
device, the versions and the commit. Ends with status 1 if a kernel differs from the reference.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time
from pathlib import Path
from typing import Any

NEEDED = ("torch", "triton", "torch_geometric", "numpy", "pandas", "hydra", "omegaconf", "rich", "iexact_runner")
DATASETS = ("synthetic_arxiv", "synthetic_flickr")
MODELS = ("sage", "gcn", "gcn2", "gat")
# The targets that the table is read against.
BANDWIDTH_TARGET, EPOCH_TARGET = 0.80, 1.05


def main() -> None:
    """Runs the parts one after the other; what is done is on disk before the next begins."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rounds", type=int, default=9, help="timed epochs of each preset")
    parser.add_argument("--parity-seconds", type=float, default=180.0, help="stop comparing after this long")
    arguments = parser.parse_args()
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        sys.exit(f"gpu_suite: not installed: {', '.join(missing)}")
    import torch

    if not torch.cuda.is_available():
        sys.exit("gpu_suite: no CUDA device was found")
    device = torch.device(arguments.device)
    arguments.out.mkdir(parents=True, exist_ok=True)
    different = check_parity(device, arguments.out, max_seconds=arguments.parity_seconds)
    time_kernels(device, arguments.out)
    time_epochs(device, arguments.out, rounds=arguments.rounds)
    sys.exit(1 if different else 0)


def check_parity(device: Any, out: Path, *, max_seconds: float) -> int:
    """Compares every kernel with the reference on the CPU; returns how many cases differ."""
    from iexact_runner.compression import parity, triton_kernels

    start, compared, lines = time.monotonic(), {"quick": 0, "full": 0}, []
    for kind in compared:  # the quick cases touch every function before the clock can run out
        for case in parity.cases(quick=kind == "quick"):
            if time.monotonic() - start > max_seconds:
                break
            lines += parity.differences(case, triton_kernels, device)
            compared[kind] += 1
    total = sum(1 for kind in compared for _ in parity.cases(quick=kind == "quick"))
    for line in lines[:20]:
        print(f"DIFFERS {line}")
    print(f"parity: {sum(compared.values())} of {total} cases compared, {len(lines)} differences")
    row = {"cases": sum(compared.values()), "of": total, "differences": len(lines), "first": (lines or [""])[0]}
    _write([row], out / "gpu_parity.csv", device)
    return len(lines)


def time_kernels(device: Any, out: Path) -> None:
    """Bandwidth of each kernel, bytes read and written once, against a device-to-device copy."""
    import torch
    from triton.testing import do_bench

    from bench_kernels import kernel_runs
    from iexact_runner.compression import triton_kernels

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


def time_epochs(device: Any, out: Path, *, rounds: int) -> None:
    """A training step of every model and preset against plain PyG FP32."""
    from rich.console import Console

    from bench_epoch import append_rows, show, time_presets
    from iexact_runner.errors import UserError

    path = out / "gpu_epochs.csv"
    path.unlink(missing_ok=True)
    for dataset in DATASETS:
        for model in MODELS:
            try:
                rows = time_presets(dataset, model, device, rounds=rounds)
            except UserError as error:
                print(f"{model} on {dataset}: {error}")
                continue
            show(rows, Console(width=120))
            append_rows(rows, path)
            for row in rows:
                if row["preset"] == "iexact" and row["ratio_median"] > EPOCH_TARGET:
                    print(f"{model} on {dataset}: {row['ratio_median']:.3f} is above the target of {EPOCH_TARGET}")


def _write(rows: list[dict[str, Any]], path: Path, device: Any) -> None:
    import pandas as pd

    from iexact_runner import environment

    facts = environment.describe(device, backend="triton")
    kept = {key: facts[key] for key in ("device_name", "python", "torch", "triton", "cuda", "git_commit")}
    pd.DataFrame([row | kept for row in rows]).to_csv(path, index=False)


if __name__ == "__main__":
    main()
