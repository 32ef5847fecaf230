"""Gradients of two processes that share a graph, on a GPU, against those of one.

python scripts/bench/gpu_parallel.py

Two GPUs talk by NCCL. NCCL refuses two processes on one GPU: these talk by gloo, by way of the host, which runs
everything but NCCL itself.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from bench_epoch import seeded_model
from iexact_runner.cli import compose_config
from iexact_runner.data import load_dataset
from iexact_runner.parallel.team import Team
from iexact_runner.sampling.parallel import in_parts, parallel_problem
from iexact_runner.training import evaluate, training_loss

PROCESSES = 2
FIELDS = ("dataset=synthetic", "dataset.num_nodes=3000", "parallel=graph", "parallel.partition=label_propagation")
SIZE = (f"parallel.parts={PROCESSES}", "model.hidden_channels=64", "model.num_layers=3", "training.epochs=1")
MODELS = ("sage", "gcn", "gcn2", "gat", "graphconv")
# Forward, backward, and the largest relative error of the gradient; without compression.
MESSAGES = (("fp32", "fp32", 1e-4), ("bf16", "bf16", 0.05), ("int8", "int8", 0.1), ("lowrank", "int4", 0.5))
# Under compression a value between two codes may fall to either side.
COMPRESSED = (("iexact", 0.03), ("lowrank", 0.03), ("recompute", 1e-4))
Row = dict[str, Any]


def main() -> None:
    """Prints what differs; ends with status 1 if anything does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    arguments = parser.parse_args()
    rows = compare_processes(arguments.device, models=arguments.models)
    for row in rows:
        print(f"{row['model']} {row['preset']}, {row['forward']}/{row['backward']}: {row['problem'] or 'agrees'}")
    sys.exit(any(row["problem"] for row in rows))


def compare_processes(device: str, *, models: tuple[str, ...] = MODELS) -> list[Row]:
    """A row for each model, preset and pair of messages; ``problem`` is empty if the gradients agree."""
    cases = [(model, "none", *messages) for model, messages in itertools.product(models, MESSAGES)]
    # Of attention each process rounds the rows of others for itself: another estimate of the gradient.
    compressed = [model for model in models if model != "gat"]
    cases += [
        (model, name, "fp32", "fp32", limit) for model, (name, limit) in itertools.product(compressed, COMPRESSED)
    ]
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(PROCESSES, mp_context=context) as pool:
            meeting = f"file://{folder}/meeting"
            tasks = [pool.submit(_gradients, rank, device, meeting, cases) for rank in range(PROCESSES)]
            found = [task.result() for task in tasks]
    rows = []
    gradients = zip(cases, found[0][1], *(each[0] for each in found), strict=True)
    for (model, preset, forward, backward, limit), one, *many in gradients:
        error = max(float(np.linalg.norm(own - one) / np.linalg.norm(one)) for own in many)
        problem = "" if error <= limit else f"the gradient differs by {error:.2g} of its norm, more than {limit:g}"
        rows.append(
            {
                "model": model,
                "preset": preset,
                "forward": forward,
                "backward": backward,
                "processes": PROCESSES,
                "backend": found[0][2],
                "gradient_error": error,
                "problem": problem,
            }
        )
    return rows


def _gradients(
    rank: int, device: str, meeting: str, cases: list[tuple[Any, ...]]
) -> tuple[list[np.ndarray[Any, Any]], list[np.ndarray[Any, Any]], str]:
    """Gradients of one of several processes, those of one process alone if it is the first, and how they talked."""
    torch.set_num_threads(2)
    several = device != "cpu" and torch.cuda.device_count() >= PROCESSES
    backend = "cpu:gloo,cuda:nccl" if several else "gloo"
    here = torch.device("cuda", rank) if several else torch.device(device)
    if several:
        torch.cuda.set_device(here)
    dist.init_process_group(backend, init_method=meeting, rank=rank, world_size=PROCESSES)
    together = [_gradient(case, Team(rank, PROCESSES, rank, 60.0), here) for case in cases]
    dist.destroy_process_group()
    return together, [_gradient(case, Team(), here) for case in cases] if rank == 0 else [], backend


def _gradient(case: tuple[Any, ...], team: Team, device: torch.device) -> np.ndarray[Any, Any]:
    model, preset, forward, backward, _ = case
    # One process has no messages; what is rounded differs from what is not, and the limit says by how much.
    messages = (f"messages.forward={forward}", f"messages.backward={backward}")
    config = compose_config(*FIELDS, *SIZE, f"model={model}", f"compression={preset}", *messages)
    problem = parallel_problem(in_parts(load_dataset(config.dataset), config, team), config, team, device)[0]
    network = seeded_model(config, problem, device)
    training_loss(network, problem, kind="cross_entropy", precision="float32", seed=5).backward()
    problem.training.shard.sum_gradients(network.parameters())
    evaluate(network, problem)
    parts = [parameter.grad.flatten().cpu() for parameter in network.parameters() if parameter.grad is not None]
    return torch.cat(parts).numpy()


if __name__ == "__main__":
    main()
