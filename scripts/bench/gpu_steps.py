"""A training step on a GPU against the same step on the CPU: loss, exact gradient, and the error of the estimated one.

python scripts/bench/gpu_steps.py

Dropout masks are the same on both. Estimated gradients differ from device to device, for sums of another order round
otherwise; their error, over a few draws, must not. Epochs of mini-batches are compared by their losses.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import statistics
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench_epoch import PRESETS, seeded_model
from iexact_runner.analysis.fidelity import exact_twin
from iexact_runner.cli import compose_config
from iexact_runner.config import CompressionConfig
from iexact_runner.data import load_dataset
from iexact_runner.problem import prepare
from iexact_runner.sampling import with_batches
from iexact_runner.training import Optimization, train_on_batches, training_loss

MODELS = ("sage", "gcn", "gcn2", "gat", "deepergcn")
SIZES = ("dataset=synthetic", "dataset.num_nodes=3000", "model.hidden_channels=64", "model.num_layers=3")
# Between devices: of losses and of exact gradients, relative; the ratio of the errors of estimated ones.
LOSS_TOLERANCE, GRADIENT_TOLERANCE, ERROR_RATIO = 1e-4, 1e-3, 1.3
# Of losses after steps whose gradients were estimated by directions that each device finds in its own way.
ESTIMATED_LOSS_TOLERANCE = 0.05
DRAWS = 4
# The dropout of FP32 is PyTorch's own, which draws other masks on another device.
COMPARED = {name: preset for name, preset in PRESETS.items() if name not in ("none", "offload")} | {
    "int8, offloaded": ("compression=int8", "compression.offload=true"),
    "recompute, offloaded": ("compression=recompute", "compression.offload=true"),
    "int4, simulated": ("compression=int4", "compression.simulate=true"),
    **{name: (f"compression={name}",) for name in ("actnn", "dropit", "velora", "hadamard", "prac")},
}
SAMPLERS = ("cluster", "saint_node", "saint_edge", "saint_rw", "neighbor")
BATCH_PRESETS = ("exact", "lowrank", "recompute")
EPOCHS = 2


def main() -> None:
    """Prints what differs; ends with status 1 if anything does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    rows = compare_steps(device, models=arguments.models) + compare_epochs(device)
    for row in rows:
        print(f"{row['model']} {row['preset']}: {row['problem'] or 'agrees'}")
    sys.exit(any(row["problem"] for row in rows))


def compare_steps(device: torch.device, *, models: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each model and preset; ``problem`` says in what the devices differ and is empty if they do not."""
    return [
        _compared({"model": model, "preset": preset}, functools.partial(_figures, model, COMPARED[preset], device))
        for model, preset in itertools.product(models, COMPARED)
    ]


def compare_epochs(device: torch.device) -> list[dict[str, Any]]:
    """A row for each sampler and preset, with the loss of the second epoch of mini-batches on either device."""
    rows = []
    for sampler, preset in itertools.product(SAMPLERS, BATCH_PRESETS):
        row = {"model": "sage", "preset": f"{preset}, {sampler}"}
        rows.append(_compared(row, functools.partial(_epochs, sampler, preset, device)))
    return rows


def _compared(row: dict[str, Any], measure: Callable[[], dict[str, float]]) -> dict[str, Any]:
    """The row with its figures, and in what they differ."""
    try:
        row |= measure()
        row["problem"] = problem_of(row)
    except Exception as error:  # the other rows are worth having
        traceback.print_exc()
        row["problem"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return row


def problem_of(row: dict[str, Any]) -> str:
    """In what a step differs between the devices; empty if it does not."""
    estimated = "gradient_difference" not in row and row.get("preset", "").startswith("lowrank")
    if not abs(row["loss_gpu"] / row["loss_cpu"] - 1) <= (ESTIMATED_LOSS_TOLERANCE if estimated else LOSS_TOLERANCE):
        return f"loss {row['loss_gpu']:.6f} on the GPU, {row['loss_cpu']:.6f} on the CPU"
    if "gradient_difference" not in row:
        return ""
    if not row["gradient_difference"] <= GRADIENT_TOLERANCE:
        return f"exact gradients differ by {row['gradient_difference']:.2e}"
    errors = row["gradient_error_gpu"], row["gradient_error_cpu"]
    if not errors[0] <= ERROR_RATIO * errors[1] + GRADIENT_TOLERANCE:
        return f"gradient error {errors[0]:.4f} on the GPU, {errors[1]:.4f} on the CPU"
    return ""


def _figures(model: str, preset: tuple[str, ...], device: torch.device) -> dict[str, float]:
    """Losses, errors of the estimated gradients on either device, and the relative difference of the exact ones."""
    config = compose_config(*SIZES, f"model={model}", *preset)
    twin = exact_twin(config.compression)
    figures, exact = {}, []
    for name, place in (("gpu", device), ("cpu", torch.device("cpu"))):
        exact.append(_gradients(model, twin, place, draw=0)[1])
        drawn = [_gradients(model, config.compression, place, draw=draw) for draw in range(DRAWS)]
        figures[f"loss_{name}"] = drawn[0][0]
        errors = [(estimate - exact[-1]).norm().item() for _, estimate in drawn]
        figures[f"gradient_error_{name}"] = statistics.fmean(errors) / exact[-1].norm().item()
    return figures | {"gradient_difference": ((exact[0] - exact[1]).norm() / exact[1].norm()).item()}


def _gradients(model: str, compression: CompressionConfig, device: torch.device, *, draw: int) -> tuple[float, Tensor]:
    """Loss of a training step with fixed masks, and its gradients as one vector on the CPU."""
    config = dataclasses.replace(compose_config(*SIZES, f"model={model}"), compression=compression)
    problem = prepare(_dataset(), config.model, inductive=False, device=device)
    built = seeded_model(config, problem, device)
    kind = config.training.loss
    loss = training_loss(built.train(), problem, kind=kind, precision="float32", seed=1, map_seed=draw)
    value = loss.item()
    gradients = torch.autograd.grad(loss, list(built.parameters()))
    return value, torch.cat([gradient.flatten().cpu() for gradient in gradients])


def _epochs(sampler: str, preset: str, device: torch.device) -> dict[str, float]:
    """Losses of the last of a few epochs of mini-batches, on either device."""
    root = f"dataset.root={tempfile.gettempdir()}"  # of partitions that are kept
    config = compose_config(*SIZES, root, f"compression={preset}", f"sampler={sampler}")
    whole = prepare(_dataset(), config.model, inductive=False, device=torch.device("cpu"))
    losses = {}
    for name, place in (("gpu", device), ("cpu", torch.device("cpu"))):
        problem = with_batches(whole, config, _dataset(), device=place)
        model = seeded_model(config, problem, place)
        optimization = Optimization(model, config.training)
        for epoch in range(1, EPOCHS + 1):
            losses[f"loss_{name}"] = train_on_batches(model, optimization, problem, epoch, seed=0)[0]
    return losses


@functools.cache
def _dataset() -> Any:
    return load_dataset(compose_config(*SIZES).dataset)


if __name__ == "__main__":
    main()
