"""Kills training at random moments, resumes it, and compares every number with those of a run that was left alone.

python scripts/campaigns/kill_campaign.py --kills 80 --seed 7 --csv benchmarks/kill_campaign_cpu.csv

Each trial is one command in a process of its own, which gets SIGKILL, SIGTERM or Ctrl-C at a random moment, then
``resume=FOLDER`` or ``resume=auto``, which may be killed again. After some kills the newest checkpoint is damaged too.
After every kill the folder must tell the truth: lines that are those of the run left alone, no summary but one that
says how the run ended, no temporary files in the end. A trial survives if its numbers are the same to the last bit.

``--early N`` adds N short runs that a new interpreter starts, which imports everything, and that get SIGKILL at a
random moment from their first on. There is no folder yet, or it is resumed with the same end.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pandas as pd
import torch

# What a trial needs, imported once: a forked process starts at once.
from iexact_runner import cli, experiment  # noqa: F401
from iexact_runner.kernels import backends
from iexact_runner.measure import environment  # noqa: F401
from iexact_runner.runs import resume  # noqa: F401
from iexact_runner.runs.files import count_lines
from iexact_runner.tasks import distribution  # noqa: F401

RUN = ("dataset=synthetic", "dataset.num_nodes=200", "dataset.num_features=16", "model.hidden_channels=16", "runs=2")
RUN += ("training.epochs=25", "deterministic=true")
# Each has a state of its own: torch's generators; seeds alone; directions kept over epochs; another optimizer; one has
# checkpoints when it is interrupted, but hardly before; the last three have several batches an epoch.
VARIANTS = {
    "FP32": ("compression=none", "checkpoint.every=1"),
    "iexact": ("compression=iexact", "checkpoint.every=4"),
    "lowrank": ("compression=lowrank", "compression.refresh=4", "model=gcn", "checkpoint.every=3"),
    "bfloat16": ("compression=exact", "precision=bfloat16", "model=gcn2", "model.num_layers=2", "checkpoint.every=2"),
    "labels": ("compression=int8", "model=gat", "model.label_input=true", "training.optimizer=rmsprop")
    + ("training.warmup_epochs=20", "checkpoint.every=1"),
    "inductive": ("compression=int4", "dataset.inductive=true"),
    "cluster": ("compression=lowrank", "compression.refresh=4", "checkpoint.every=2", "sampler=cluster")
    + ("sampler.parts=10", "sampler.batch_parts=2", "sampler.partition=label_propagation"),
    "saint": ("compression=iexact", "checkpoint.every=3", "sampler=saint_rw", "sampler.roots=30"),
    "neighbor": ("compression=none", "checkpoint.every=1", "sampler=neighbor", "sampler.batch_size=30"),
}
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
# Shares of the kills after which the run is killed again, and after which its newest checkpoint is damaged.
AGAIN, DAMAGE = 0.4, 0.2
SHORT = (*RUN, "runs=1", "training.epochs=3", "compression=none")
COLUMNS = ("tried", "survived", "lost", "kills", "in training", "SIGKILL", "SIGTERM", "SIGINT", "damaged")
ENVIRONMENT = ("device_name", "torch_threads", "python", "torch", "numba", "git_commit")


def main() -> None:
    """Prints how many kills there were, and how many runs survived them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="kills in all; the last trial may add some")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--early", type=int, default=0, help="short runs killed from their first moment on (default: 0)"
    )
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--csv", type=Path, help="file to write the rows to")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = campaign(arguments.variants, kills=arguments.kills, draws=random.Random(arguments.seed))
    if arguments.early:
        rows.append(early_kills(arguments.early, draws=random.Random(arguments.seed)))
    table = pd.DataFrame(rows)
    print(table.to_string(index=False))
    total = table[["kills", "tried", "survived", "lost"]].sum()
    print(f"{total.kills} kills: {total.tried} runs tried, {total.survived} survived, {total.lost} lost")
    if arguments.csv:
        facts = environment.describe(torch.device("cpu"), backend=backends.resolve("auto", torch.device("cpu")))
        arguments.csv.parent.mkdir(parents=True, exist_ok=True)
        table.assign(seed=arguments.seed, **{name: facts[name] for name in ENVIRONMENT}).to_csv(
            arguments.csv, index=False
        )
    sys.exit(0 if total.lost == 0 else 1)


def campaign(variants: list[str], *, kills: int, draws: random.Random) -> list[dict[str, Any]]:
    """One trial of each variant in turn, until there were so many kills; a row for each variant."""
    counts = {name: Counter[str]() for name in variants}
    with tempfile.TemporaryDirectory() as place:
        wanted: dict[str, tuple[list[dict[str, Any]], Any, float]] = {}
        for name in variants:
            # The first run of a process may compile.
            for _ in range(2):
                folder = Path(tempfile.mkdtemp(dir=place), "run")
                start = time.monotonic()
                wait(begin([*RUN, *VARIANTS[name], f"hydra.run.dir={folder}"]))
                seconds = time.monotonic() - start
            wanted[name] = (*outcome(folder), seconds)
        trial = 0
        while sum(count["kills"] for count in counts.values()) < kills:
            name = variants[trial % len(variants)]
            problem = one_trial(name, Path(place, f"trial_{trial}"), wanted[name], counts[name], draws)
            counts[name]["tried"] += 1
            counts[name]["lost" if problem else "survived"] += 1
            if problem:
                print(f"trial {trial}, {name}: {problem}")
            trial += 1
    return [{"variant": name, **{column: count[column] for column in COLUMNS}} for name, count in counts.items()]


def early_kills(kills: int, *, draws: random.Random) -> dict[str, Any]:
    """So many short runs, each killed once at any moment of its life and resumed; a row like those of the variants."""
    count = Counter[str]()
    with tempfile.TemporaryDirectory() as place:
        for _ in range(2):  # the first run of a machine may compile
            folder, start = Path(tempfile.mkdtemp(dir=place), "run"), time.monotonic()
            start_short(folder).wait()
            seconds = time.monotonic() - start
        wanted = outcome(folder)
        while count["kills"] < kills:
            folder = Path(place, f"early_{count['tried']}", "run")
            process = start_short(folder)
            time.sleep(draws.uniform(0, seconds))
            process.kill()
            process.wait()
            count.update(("kills", "SIGKILL", "tried"))
            count["no folder"] += not folder.exists()
            count["in training"] += 0 < len(metrics(folder)) and status(folder) != "completed"
            if folder.exists() and status(folder) != "completed":
                wait(begin([f"resume={folder}"]))
            survived = not folder.exists() or outcome(folder) == wanted
            count["survived" if survived else "lost"] += 1
            if not survived:
                print(f"early kill {count['kills']}: left {sorted(path.name for path in folder.iterdir())}")
    print(f"{kills} early kills: {count['no folder']} before there was a folder")
    return {"variant": "early", **{column: count[column] for column in COLUMNS}}


def start_short(folder: Path) -> subprocess.Popen[bytes]:
    """A short run of a new interpreter."""
    command = [sys.executable, "-m", "iexact_runner", *SHORT, f"hydra.run.dir={folder}"]
    nowhere = subprocess.DEVNULL
    return subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=nowhere, stderr=nowhere)


def one_trial(
    name: str, output: Path, wanted: tuple[list[dict[str, Any]], Any, float], count: Counter[str], draws: random.Random
) -> str | None:
    """Starts, kills and resumes one run; what went wrong, or None."""
    lines, scores, seconds = wanted
    folder = output / "run"
    command = [*RUN, *VARIANTS[name], f"output_dir={output}"]
    fresh = [*command, f"hydra.run.dir={folder}"]
    overrides: list[str] = fresh
    again: bool | None = True
    while again:
        process = begin(overrides)
        wait_for_moment(process, folder / "metrics.jsonl", draws.randrange(len(lines)), seconds, draws)
        number = draws.choice(SIGNALS)
        os.kill(process, number)
        wait(process)
        count.update(("kills", signal.Signals(number).name))
        count["in training"] += 0 < len(metrics(folder)) and status(folder) != "completed"
        problem = untruth(folder, lines)
        if problem:
            return problem
        newest = folder / "checkpoint.pt"
        if newest.exists() and draws.random() < DAMAGE:
            data = bytearray(newest.read_bytes())
            data[draws.randrange(len(data))] ^= 1 << draws.randrange(8)
            newest.write_bytes(data[: draws.choice((len(data), len(data) // 2))])
            count["damaged"] += 1
        if status(folder) == "completed":
            again = None
            break
        again = draws.random() < AGAIN
        explicit = [f"resume={folder}"] if (folder / "config.yaml").exists() else fresh
        overrides = draws.choice((explicit, [*fresh, "resume=auto"]))
    else:
        wait(begin(overrides))
    if outcome(folder) != (lines, scores):
        return "its numbers differ"
    rest = {path.name for path in folder.iterdir()} - {"config.yaml", "metrics.jsonl", "summary.json"}
    if again is None:  # killed after its summary, before it had removed what it needs no longer
        rest -= {".lock", "checkpoint.pt", "checkpoint.previous.pt"}
    return f"left {', '.join(rest)}" if rest else None


def begin(overrides: list[str]) -> int:
    """Starts ``iexact`` in a process of its own, forked from this one; its id."""
    process = os.fork()
    if process:
        return process
    signal.signal(signal.SIGINT, signal.default_int_handler)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    sys.argv[1:] = overrides
    try:
        cli.main()
    finally:
        os._exit(0)


def wait_for_moment(process: int, path: Path, lines: int, seconds: float, draws: random.Random) -> None:
    """Returns soon after a file has more than so many lines or the process has ended; else within the seconds."""
    if count_lines(path) > lines:
        time.sleep(draws.uniform(0, seconds))
        return
    ended = os.WEXITED | os.WNOHANG | os.WNOWAIT
    while count_lines(path) <= lines and os.waitid(os.P_PID, process, ended) is None:
        time.sleep(0.002)
    time.sleep(draws.uniform(0, 0.03))


def wait(process: int) -> None:
    """Waits for the end of a process."""
    os.waitpid(process, 0)


def untruth(folder: Path, lines: list[dict[str, Any]]) -> str | None:
    """What the folder of a killed run says that is not so."""
    found = metrics(folder)
    if found != lines[: len(found)]:
        return "recorded lines differ"
    if status(folder) == "completed" and found != lines:
        return "claims to be completed"
    return None


def outcome(folder: Path) -> tuple[list[dict[str, Any]], Any]:
    """Lines and scores of a completed run; no scores of another."""
    if status(folder) != "completed":
        return metrics(folder), None
    return metrics(folder), json.loads((folder / "summary.json").read_text())["accuracy"]


def status(folder: Path) -> str | None:
    """What the summary says; None if there is none."""
    path = folder / "summary.json"
    return json.loads(path.read_text())["status"] if path.exists() else None


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of ``metrics.jsonl`` without what the clock says; a last one that is cut off does not count."""
    path = folder / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    whole = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return [{name: value for name, value in line.items() if not re.search(r"seconds$|^time$", name)} for line in whole]


if __name__ == "__main__":
    main()
