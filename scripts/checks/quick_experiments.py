"""Runs the quick variant of every experiment and holds the cells of its table against the summaries of its runs.

python scripts/checks/quick_experiments.py --out FOLDER [NAME ...]
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import importlib
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# What a run imports on its way; each is a fork of this process, for an interpreter of its own takes seconds to begin.
IMPORTED = ("cli", "data.prepare", "experiment", "kernels.numba", "report.command", "sampling.batches")

# Seconds that one is waited for: a pool does not tell that a process was killed.
PATIENCE = 900.0


def main() -> None:
    """Runs them all, then exits with 1 if a run failed or a cell is not what its runs recorded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="by default all of conf/experiment")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--jobs", type=int, default=min(4, os.cpu_count() or 1), help="experiments at once")
    arguments = parser.parse_args()
    began = time.monotonic()
    os.environ["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // arguments.jobs))  # read while torch is imported
    for name in IMPORTED:
        importlib.import_module(f"iexact_runner.{name}")
    gc.freeze()  # or each fork copies all of it
    from iexact_runner.cli import config_dir

    names = arguments.names or sorted(path.stem for path in (config_dir() / "experiment").glob("*.yaml"))
    with multiprocessing.get_context("fork").Pool(arguments.jobs, maxtasksperchild=1) as pool:
        found = pool.imap(functools.partial(run, arguments.out), names, chunksize=1)
        problems = [problem for _ in names for problem in found.next(timeout=PATIENCE)]
        pool.close()  # left at once, it would interrupt them as a run is interrupted
        pool.join()
    print(f"{len(problems)} problems, {time.monotonic() - began:.0f} s")
    sys.exit("\n".join(problems) if problems else 0)


def run(out: Path, name: str) -> list[str]:
    """Runs one experiment in a folder of its own; what is wrong, a line each."""
    began, folder = time.monotonic(), out / name
    status, _, errors = ended("iexact_runner.cli", "-m", f"+experiment={name}", "quick=true", f"output_dir={folder}")
    if status:
        return [f"{name}: exit status {status}: {errors.strip()}"]
    status, table, errors = ended("iexact_runner.report.command", str(folder), "--format", "markdown")
    if status:
        return [f"{name}: iexact-report: {errors.strip()}"]
    problems = [f"{name}: {problem}" for problem in differences(table, folder)]
    print(f"{name}: {time.monotonic() - began:.0f} s, {len(problems)} problems", flush=True)
    return problems


def ended(module: str, *arguments: str) -> tuple[object, str, str]:
    """Exit status of a module's ``main``, and what it wrote to stdout and stderr."""
    sys.argv = [module, *arguments]
    status: object = 0
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                importlib.import_module(module).main()
            except SystemExit as end:
                status = end.code
        texts = []
        for stream in (out, err):
            stream.seek(0)
            texts.append(stream.read())
    return status, texts[0], texts[1]


def differences(markdown: str, folder: Path) -> Iterator[str]:
    """Cells of the first table that differ from what the summaries below a folder say, computed apart."""
    header, *rows = list(_first_table(markdown))
    groups: dict[str, list[dict[str, Any]]] = {}
    jobs = sorted(folder.rglob("summary.json"), key=lambda path: int(path.parent.name))
    for summary in (json.loads(path.read_text()) for path in jobs):
        config = summary["config"]
        names = [config[group]["name"] for group in ("model", "dataset")]
        key = [*names, config["compression"], config.get("sampler"), config.get("precision")]
        groups.setdefault(json.dumps(key, sort_keys=True), []).append(summary)
    if len(rows) != len(groups):
        yield f"{len(rows)} rows for {len(groups)} configurations"
    for row, summaries in zip(rows, groups.values(), strict=False):
        for heading, wanted in expected(summaries).items():
            shown = dict(zip(header, row, strict=True)).get(heading)
            if shown != wanted:
                yield f"{', '.join(row[:3])}: {heading} is {shown}, the runs say {wanted}"


def expected(summaries: list[dict[str, Any]]) -> dict[str, str]:
    """Cells by heading that a table must have for these runs of one configuration."""
    cells = {}
    scores = [score for summary in summaries for score in (summary["accuracy"] or {}).get("test", {}).get("values", [])]
    if scores:
        cells["test accuracy [%]"] = f"{100 * statistics.fmean(scores):.2f} ± {100 * statistics.stdev(scores):.2f}"
    rates = [summary["throughput"]["epochs_per_second"] for summary in summaries if summary["throughput"]]
    if len(rates) == 1:
        cells["epochs/s"] = "{median:.2f} ({p20:.2f} - {p80:.2f})".format(**rates[0])
    cells["saved [MiB]"] = f"{summaries[0]['memory']['saved_mib']:.2f}"
    for summary in summaries:
        for epoch, figures in (summary["fidelity"] or {"after": {}})["after"].items():
            errors = figures["relative_error"]
            shown = f"{statistics.fmean(errors):.3f} ± {statistics.stdev(errors):.3f}"
            cells[f"gradient error, epoch {epoch}"] = shown
    return cells


def _first_table(markdown: str) -> Iterator[list[str]]:
    lines = markdown.splitlines()
    begin = next(place for place, line in enumerate(lines) if line.startswith("|"))
    for place in range(begin, len(lines)):
        if not lines[place].startswith("|"):
            return
        if place != begin + 1:  # the rule below the header
            yield [cell.strip() for cell in lines[place].strip("|").split(" | ")]


if __name__ == "__main__":
    main()
