"""What messages of fewer bits between processes do to the gradient, and how many bytes they save.

torchrun --nproc-per-node 2 scripts/bench/bench_messages.py --csv benchmarks/messages_cpu.csv dataset=amazon_computers

Trains with messages in float32, and after some epochs compares the gradient of one step, at the same weights and masks,
with that of the same step under each kind of messages. Differences are to what earlier epochs would have sent. The
bytes are those that all processes send in the step.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench_epoch import append_rows, seeded_model
from iexact_runner.cli import compose_config
from iexact_runner.compression.seeds import mix
from iexact_runner.config import Config, ParallelConfig
from iexact_runner.data import load_dataset
from iexact_runner.data.partitioned import begin_epoch, frozen_messages, halo_of
from iexact_runner.measure import environment
from iexact_runner.nn import Model
from iexact_runner.parallel.team import Team, joined
from iexact_runner.problem import Problem
from iexact_runner.sampling.parallel import in_parts, parallel_problem
from iexact_runner.training import Optimization, step, training_loss


class Kind(NamedTuple):
    """Messages forward and backward, the share of the halo that travels, and whether it does so as differences."""

    forward: str
    backward: str
    halo_sample: float = 1.0
    delta: bool = False


MESSAGES = (
    Kind("fp32", "fp32"),
    Kind("bf16", "bf16"),
    Kind("int8", "int8"),
    Kind("int8", "int4"),
    Kind("int4", "int4"),
    Kind("int2", "int2"),
    Kind("int4", "fp32"),
    Kind("fp32", "int4"),
    Kind("lowrank", "int4"),
    Kind("int8", "int8", delta=True),
    Kind("int4", "int4", delta=True),
    Kind("int2", "int4", delta=True),
    Kind("lowrank", "int4", delta=True),
    Kind("fp32", "fp32", halo_sample=0.5),
    Kind("fp32", "fp32", halo_sample=0.1),
)
MIB = 2**20


def main() -> None:
    """Prints a line for each kind of messages and writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, nargs="+", default=(5, 30), help="after which gradients are compared")
    parser.add_argument("--draws", type=int, default=5, help="of the rounding")
    parser.add_argument("--csv", type=Path, help="file to append the rows to")
    parser.add_argument("overrides", nargs="*", help="of the configuration: dataset=NAME model=NAME ...")
    arguments = parser.parse_args()
    config = compose_config("parallel=graph", "compression=none", *arguments.overrides)
    assert isinstance(config.parallel, ParallelConfig)
    with joined(device="cpu", timeout=config.parallel.timeout) as team:
        rows = compare(config, team, epochs=arguments.epochs, draws=arguments.draws)
    if team.first and arguments.csv:
        append_rows(rows, arguments.csv)


def compare(config: Config, team: Team, *, epochs: list[int], draws: int) -> list[dict[str, Any]]:
    """A row for each epoch and kind of messages."""
    device = torch.device("cpu")
    graph = in_parts(load_dataset(config.dataset), config, team)

    def problem_of(kind: Kind) -> Problem:
        messages = replace(config.messages, forward=kind.forward, backward=kind.backward, delta=kind.delta)
        parallel = replace(config.parallel, halo_sample=kind.halo_sample)
        return parallel_problem(graph, replace(config, messages=messages, parallel=parallel), team, device)[0]

    compared = {kind: problem_of(kind) for kind in MESSAGES}
    exact = compared[MESSAGES[0]]
    model = seeded_model(config, exact, device)
    optimization = Optimization(model, config.training)
    rows: list[dict[str, Any]] = []
    for epoch in range(1, max(epochs) + 1):
        for kind, problem in compared.items():
            if kind.delta:
                gradient(model, problem, config, team, seed=mix(0, epoch))
                begin_epoch(problem.training.graph, epoch + 1)
        step(model, optimization, exact, seed=mix(0, epoch), epoch=epoch)
        if epoch not in epochs:
            continue
        expected, full = gradient(model, exact, config, team, seed=mix(1, epoch))
        for kind, problem in compared.items():
            errors, sent = [], 0.0
            with frozen_messages(problem.training.graph):
                for draw in range(draws):
                    found, sent = gradient(model, problem, config, team, seed=mix(1, epoch), draw=draw)
                    errors.append(((found - expected).norm() / expected.norm()).item())
            rows.append(
                {
                    "dataset": config.dataset.name,
                    "model": config.model.name,
                    "processes": team.size,
                    "epoch": epoch,
                    "dropout": config.model.dropout,
                    **kind._asdict(),
                    "rank": config.messages.rank if kind.forward == "lowrank" else None,
                    "relative_error": sum(errors) / draws,
                    "sent_mib": sent,
                    "share_of_fp32": sent / full if full else 1.0,
                    "draws": draws,
                }
                | {key: environment.describe(device, backend="auto")[key] for key in ("python", "torch", "git_commit")}
            )
            if team.first:
                row = rows[-1]
                name = f"{kind.forward}/{kind.backward}{', differences' if kind.delta else ''}"
                name += "" if kind.halo_sample == 1.0 else f", {kind.halo_sample:g} of the halo"
                print(f"epoch {epoch}  {name}  error {row['relative_error']:.4f}  {sent:.2f} MiB", flush=True)
    return rows


def gradient(
    model: Model, problem: Problem, config: Config, team: Team, *, seed: int, draw: int = 0
) -> tuple[Tensor, float]:
    """The gradient of a step that is not taken, all parameters in a row, and MiB that all processes sent for it."""
    model.train()
    model.zero_grad()
    halo = halo_of(problem.training.graph)
    assert halo is not None
    before = halo.traffic.sent_bytes
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
    training_loss(
        model, problem, kind=config.training.loss, precision="float32", seed=seed, map_seed=mix(seed, draw)
    ).backward()
    problem.training.shard.sum_gradients(model.parameters())
    for name, buffer in model.named_buffers():
        buffer.copy_(statistics[name])
    sent = sum(team.gathered(halo.traffic.sent_bytes - before)) / MIB
    return torch.cat(
        [parameter.grad.flatten().clone() for parameter in model.parameters() if parameter.grad is not None]
    ), sent


if __name__ == "__main__":
    main()
