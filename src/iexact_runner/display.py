"""What a run shows: a live progress bar on a terminal, plain lines elsewhere, and a table at the end."""

from __future__ import annotations

import logging
import re
import statistics
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from iexact_runner.runs.labels import compression_label
from iexact_runner.untrusted.text import unmarked

if TYPE_CHECKING:  # torch is slow to import
    from iexact_runner.training import Epoch, Scores

PLAIN_LINES_PER_RUN = 10


def show_messages(console: Console) -> None:
    """Shows what the package logs, such as a download that begins."""
    logger = logging.getLogger("iexact_runner")
    logger.handlers = [RichHandler(console=console, show_time=False, show_level=False, show_path=False)]
    logger.setLevel(logging.INFO)


class Display:
    """Progress of the runs of one job.

    Args:
        console: where to write; a terminal gets a live bar.
        runs: number of runs.
        epochs: epochs of a run.
        metric: name of the scores.
    """

    def __init__(self, console: Console, *, runs: int, epochs: int, metric: str) -> None:
        self._console = console
        self._runs = runs
        self._epochs = epochs
        self._metric = metric.replace("_", "-")
        self._live = console.is_terminal
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(compact=True),
            console=console,
            disable=not self._live,
        )
        self._bar: TaskID | None = None
        self._recent: deque[float] = deque(maxlen=10)
        self._scores: Scores | None = None

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def start_run(self, run: int) -> None:
        """Announces run ``run``, counted from 0."""
        name = f"run {run + 1}/{self._runs}"
        self._recent.clear()
        self._scores = None
        self._bar = self._progress.add_task(name, total=self._epochs, figures="")

    def show(self, run: int, epoch: Epoch, *, saved_mib: float) -> None:
        """Shows the figures of an epoch, and the scores of the last evaluation."""
        self._scores = scores = epoch.scores or self._scores
        self._recent.append(epoch.seconds)
        rate = len(self._recent) / max(sum(self._recent), 1e-9)
        shown = "" if scores is None else "train {:.4f} val {:.4f} test {:.4f}  ".format(*scores)
        figures = (
            f"loss {epoch.loss:.4f}  {shown and f'{self._metric} {shown}'}"
            f"saved {saved_mib:.2f} MiB  {rate:.2f} epochs/s"
        )
        if self._live and self._bar is not None:
            self._progress.update(self._bar, completed=epoch.number, figures=figures)
            return
        every = max(1, self._epochs // PLAIN_LINES_PER_RUN)
        if epoch.number == 1 or epoch.number % every == 0 or epoch.number == self._epochs:
            self._console.print(
                f"run {run + 1}/{self._runs}  epoch {epoch.number}/{self._epochs}  {figures}",
                highlight=False,
                soft_wrap=True,
            )


def show_summary(console: Console, summary: Mapping[str, Any], *, folder: str) -> None:
    """Prints the figures of a finished or interrupted run."""
    config = summary["config"]
    title = f"{config['model']['name']} on {config['dataset']['name']}, {compression_label(config['compression'])}"
    table = Table(title=unmarked(title, style="table.title"), title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column()
    accuracy, memory, throughput = summary["accuracy"], summary["memory"], summary["throughput"]
    if accuracy is not None and accuracy["test"]["mean"] is not None:
        for split in ("train", "val", "test"):
            figures = accuracy[split]
            spread = f" ± {100 * figures['std']:.2f}" if len(figures["values"]) > 1 else ""
            table.add_row(unmarked(f"{split} {accuracy['metric']}"), f"{100 * figures['mean']:.2f}{spread} %")
    fp32 = summary.get("fp32") or {}
    if memory is not None:
        plain = {name: fp32.get(f"{name.replace(' ', '_')}_mib") for name in ("step peak", "evaluation peak", "data")}
        plain["saved"] = memory["saved_mib_fp32"]
        for name in (
            "saved",
            "offloaded",
            "step peak",
            "evaluation peak",
            "data",
            "loss",
            "model",
            "peak allocated",
            "peak reserved",
            "reference activation",
        ):
            figure = memory.get(f"{name.replace(' ', '_')}_mib")
            if figure is not None and (figure or name != "offloaded"):
                table.add_row(name, f"{figure:.2f} MiB{_less_than_fp32(figure, plain.get(name))}")
    if throughput is not None:
        rate = throughput["epochs_per_second"]
        spread = f"p20 {rate['p20']:.2f}, p80 {rate['p80']:.2f}"
        table.add_row("epochs/s", f"{rate['median']:.2f}  ({spread}{_times_fp32(rate, fp32)})")
    if summary.get("batches") is not None:
        _add_batches(table, summary["batches"])
    if (summary.get("parallel") or {}).get("ranks"):
        _add_processes(table, summary["parallel"])
    if summary["energy"] is not None:
        emitted = summary["energy"]["gco2e"]
        table.add_row("energy", f"{summary['energy']['kwh']:.3g} kWh" + (f"  ({emitted:.3g} gCO2e)" if emitted else ""))
    table.add_row("status", summary["status"])
    console.print(table)
    console.print(unmarked(f"written to {folder}"), soft_wrap=True)


def _add_processes(table: Table, parallel: Mapping[str, Any]) -> None:
    """Rows of a graph over several processes: what each has, and what they sent each other."""
    ranks = parallel["ranks"]

    def spread(name: str, form: str) -> str:
        least, most = (form.format(choose(rank[name] for rank in ranks)) for choose in (min, max))
        return least if least == most else f"{least} - {most}"

    cut = f"{parallel['method']}, {100 * parallel['edge_cut']:.1f} % of the edges cut"
    table.add_row("processes", f"{len(ranks)}, {parallel['parts']} parts  ({cut})")
    table.add_row("nodes of each", f"{spread('nodes', '{:,}')}, and {spread('halo', '{:,}')} of others")
    table.add_row("step peak of each", f"{spread('step_peak_mib', '{:.2f}')} MiB")
    sent = sum(rank["sent_mib"] for rank in ranks)
    table.add_row("sent", f"{sent:.1f} MiB in all, waited {spread('waiting_seconds', '{:.2f}')} s for it")


def _add_batches(table: Table, batches: Mapping[str, Any]) -> None:
    """Rows of mini-batches: their sizes, what they need, and what sampling them took."""
    nodes, share = batches["nodes"], 100 * batches["edges_share"]
    sizes = f"{nodes['p50']:,} nodes (p95 {nodes['p95']:,}, max {nodes['max']:,})"
    table.add_row("batches", f"{batches['an_epoch']} an epoch, {sizes}, {share:.1f} % of the edges an epoch")
    for name in ("saved_mib", "step_peak_mib"):
        figures = batches[name]
        table.add_row(
            f"{name.removesuffix('_mib').replace('_', ' ')} of batches",
            f"p50 {figures['p50']:.2f}, p95 {figures['p95']:.2f}, max {figures['max']:.2f} MiB",
        )
    if "nodes_per_second" in batches:
        sampling = f"{100 * batches['sampling_share']:.1f} % of an epoch's time beside the steps"
        waiting = f"{100 * batches['waiting_share']:.1f} % waited for"
        table.add_row("nodes/s", f"{batches['nodes_per_second']:,.0f}  (sampling {sampling}, {waiting})")
    if batches["partition"] is not None:
        found = batches["partition"]
        cut = f"{100 * found['edge_cut']:.1f} % of the edges cut"
        table.add_row("partition", f"{found['method']}, {cut}, {found['seconds']:.1f} s")


def _less_than_fp32(figure: float, plain: float | None) -> str:
    """A size beside that of the same model in FP32; empty where one of them is not known or nothing."""
    if not figure or not plain:
        return ""
    if figure == plain:
        return "  (the same in FP32)"
    words = f"{plain / figure:.1f}x less than" if figure < plain else f"{figure / plain:.2f}x"
    return f"  ({words} {plain:.2f} in FP32)"


def _times_fp32(rate: Mapping[str, float], fp32: Mapping[str, Any]) -> str:
    """Epochs per second beside those of the same model in FP32."""
    plain = fp32.get("epochs_per_second")
    return "" if plain is None else f"; {rate['median'] / plain['median']:.2f}x FP32's {plain['median']:.2f}"


def show_tensors(console: Console, tensors: list[dict[str, Any]]) -> None:
    """Prints the tensors that are saved for the backward pass."""
    table = Table(title="saved for the backward pass", title_justify="left")
    for name in ("layer", "op", "shape", "dtype"):
        table.add_column(name)
    columns = {"bytes_fp32": "FP32 MiB", "bytes": "saved MiB"}
    if any(tensor["host_bytes"] for tensor in tensors):
        columns["host_bytes"] = "on the host MiB"
    for name in columns.values():
        table.add_column(name, justify="right")
    for tensor in tensors:
        shape = " x ".join(map(str, tensor["shape"]))
        sizes = (f"{tensor[size] / 2**20:.3f}" for size in columns)
        op = re.sub(r"Backward\d*$", "", tensor["op"])
        table.add_row(*map(unmarked, (tensor["layer"], op, shape, tensor["dtype"], *sizes)))
    table.add_section()
    totals = [f"{sum(tensor[size] for tensor in tensors) / 2**20:.3f}" for size in columns if size != "bytes_fp32"]
    table.add_row("total", "", "", "", "", *totals, style="bold")
    console.print(table)


def show_plan(console: Console, record: Mapping[str, Any]) -> None:
    """Prints how the maps of a model are kept under a budget, and their shares of the error that is expected."""
    budget = f"{record['budget_mib']:.2f} MiB may be saved, {record['saved_mib']:.2f} MiB are"
    error, expected = record["measured_error"], record["expected_error"]
    text = "errors are measured later" if expected is None else f"gradient error {expected:.4f} expected"
    text += "" if error is None else f", {error:.4f} measured"
    table = Table(title=f"{budget}; {text}", title_justify="left")
    table.add_column("layer", no_wrap=True)
    table.add_column("kept")
    for name in ("MiB", "share of error"):
        table.add_column(name, justify="right")
    for each in record["maps"]:
        table.add_row(unmarked(each["layer"]), each["kept"], f"{each['mib']:.3f}", f"{each['error_share']:.3f}")
    console.print(table)


def show_fidelity(console: Console, record: Mapping[str, Any]) -> None:
    """Prints how far compressed gradients are from the exact one, overall and by parameter at the last epoch."""
    title = f"gradient against the exact one, {record['draws']} draws"
    table = Table(title=title, title_justify="left")
    table.add_column("after", no_wrap=True)
    for name in ("share of norm", "relative error", "cosine", "bias (standard error)"):
        table.add_column(name, justify="right")
    for epoch, figures in record["after"].items():
        table.add_row(f"{epoch} epochs", "1.000", *_fidelity_cells(figures))
        for name, title in (("sampling", "sampling"), ("both", "sampling and compression")):
            if name in figures:
                table.add_row(f"  {title}", "", *_fidelity_cells(figures[name]))
    table.add_section()
    last = list(record["after"].values())[-1]
    for name, figures in last["parameters"].items():
        table.add_row(unmarked(f"  {name}"), f"{statistics.fmean(figures['share']):.3f}", *_fidelity_cells(figures))
    console.print(table)


def _fidelity_cells(figures: Mapping[str, Any]) -> list[str]:
    """Means over the runs; a dash for a parameter whose exact gradient is zero but for rounding."""
    if None in figures["relative_error"]:
        return ["-", "-", "-"]
    error, cosine, bias, spread = (
        statistics.fmean(figures[name]) for name in ("relative_error", "cosine", "bias", "bias_standard_error")
    )
    return [f"{error:.3f}", f"{cosine:.3f}", f"{bias:.3f} ({spread:.3f})"]
