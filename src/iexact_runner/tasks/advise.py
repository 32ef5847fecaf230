"""``iexact advise``: what each way to save memory would need and cost here, and which to take, without training."""

from __future__ import annotations

import shlex

from rich.table import Table

from iexact_runner.analysis.forecast import Forecast, forecasts, recommended
from iexact_runner.compression.seeds import mix
from iexact_runner.config import Config, DatasetConfig, FileConfig, ModuleConfig
from iexact_runner.measure import MIB, out_of_memory, total_bytes
from iexact_runner.tasks.context import Context
from iexact_runner.untrusted.text import unmarked


def run(context: Context) -> None:
    """Shows the table and the command of the option that is recommended, and leaves both for the summary."""
    config, problem = context.config, context.largest_step()
    available = config.advise.memory_mib
    if available is None:
        free = out_of_memory.available_bytes(context.device)
        # What is free comes on top of the data, which lie in memory already.
        available = None if free is None else (free + total_bytes(problem.tensors())) / MIB
    with context.console.status("measuring steps on smaller graphs"):
        rows = forecasts(
            problem,
            config,
            device=context.device,
            nodes=config.advise.nodes,
            available_mib=available,
            seed=mix(config.seed, 0),
        )
    chosen = recommended(rows)
    context.findings.advice = {
        "available_mib": available,
        "sampled": max(problem.training.x.size(0), problem.whole.x.size(0)) > config.advise.nodes,
        "options": [row._asdict() for row in rows],
        "recommended": None if chosen is None else chosen.name,
    }
    context.console.print(_table(rows, model=config.model.name, dataset=config.dataset.name, available=available))
    if chosen is None:
        line = f"no option fits; mini-batches need less: {_command(config)} compression=lowrank sampler=cluster"
    else:
        line = f"recommended: {_command(config)} {chosen.overrides}"
    context.console.print(unmarked(line), soft_wrap=True)


def _command(config: Config) -> str:
    """What trains the same model on the same graph, but for fields of the model and of training."""
    words = {"model": config.model.name, "dataset": config.dataset.name}
    if isinstance(config.model, ModuleConfig):
        words["model.target"] = config.model.target
    if isinstance(config.dataset, FileConfig):
        words["dataset.path"] = config.dataset.path
    elif config.dataset.root != DatasetConfig.root:
        words["dataset.root"] = config.dataset.root
    if config.sampler.name != "none":
        words["sampler"] = config.sampler.name
    return shlex.join(["iexact", *(f"{name}={value}" for name, value in words.items())])


def _table(rows: list[Forecast], *, model: str, dataset: str, available: float | None) -> Table:
    limit = "" if available is None else f"; {available:,.0f} MiB may be used"
    table = Table(title=f"{model} on {dataset}{limit}", title_justify="left")
    table.add_column("option", no_wrap=True)
    hosted = any(row.offloaded_mib for row in rows)
    names = ["saved [MiB]", *(["on the host [MiB]"] if hosted else []), "step peak [MiB]", "total [MiB]", "fits"]
    for name in (*names, "time / FP32", "gradient error"):
        table.add_column(name, justify="right")
    for row in rows:
        fits = {True: "yes", False: "no", None: "not known"}[row.fits]
        host = [f"{row.offloaded_mib:,.2f}"] if hosted else []
        error = "-" if row.error is None else f"{row.error:.3f}"
        sizes = [f"{row.saved_mib:,.2f}", *host, f"{row.step_peak_mib:,.1f}", f"{row.total_mib:,.1f}"]
        table.add_row(row.name, *sizes, fits, f"{row.time:.2f}", error)
    return table
