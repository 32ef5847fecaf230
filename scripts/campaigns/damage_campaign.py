"""Bad overrides and damaged files by the hundred: how many were tried, survived and lost.

    python scripts/campaigns/damage_campaign.py --overrides 200 --files 50 --records 200

A bad override survives if the command ends with a status that is not 0, says exactly one line, which begins with
``iexact: ``, and leaves every file and folder as it was. A damaged file of a dataset survives if the command does the
same, apart from the folder in which every run records that it failed; or if it completes a run with a score that is a
number, for some bits mean nothing. A damaged record survives if ``iexact-report`` names it, or reads it as whole, and
in both cases shows the run beside it. So does a record with another value or text in it, in each of the six formats, of
which none holds markup, an escape or a formula of a record's. A damaged checkpoint survives if the resumed run
completes, from an earlier state, or is refused in one line. Nothing may run what a file says. All else is lost, and
printed.
"""

from __future__ import annotations

import _thread
import argparse
import contextlib
import io
import json
import math
import os
import random
import shutil
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet

from bad_overrides import bad_overrides
from damaged_files import DATASETS, copy, damages_of, write_datasets
from iexact_runner import cli
from iexact_runner.report import command as report
from iexact_runner.untrusted.text import visible
from mutated_records import FORMATS, live, mutate

QUICK = ("training.epochs=1", "model.hidden_channels=4", "model.num_layers=2")
# A proxy that refuses at once: a missing file is not downloaded.
DEAD = {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}


@dataclass(frozen=True)
class Outcome:
    """What a command did.

    Args:
        status: its exit status.
        stdout: what it printed.
        stderr: what it complained of.
    """

    status: object
    stdout: str
    stderr: str

    def is_one_line(self) -> bool:
        """Whether it failed, and said so in one line of its own."""
        said = self.stderr
        return self.status not in (0, None) and said.startswith("iexact: ") and said.count("\n") == 1


@dataclass
class Tally:
    """How many were tried, and for each that was lost, what happened."""

    tried: int
    losses: list[str]


def call(main: Callable[[], None], arguments: Sequence[str], folder: Path) -> Outcome:
    """Runs a command in this process, in ``folder``; a process of its own takes seconds to start."""
    stdout, stderr = io.StringIO(), io.StringIO()
    before, argv, status = Path.cwd(), sys.argv, None
    os.chdir(folder)
    sys.argv = ["command", *arguments]
    try:
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            main()
    except SystemExit as error:
        status = error.code
        if isinstance(status, str):  # what the interpreter would print
            print(status, file=stderr)
    except BaseException:
        traceback.print_exc(file=stderr)
        status = "traceback"
    finally:
        sys.argv = argv
        os.chdir(before)
    return Outcome(status, stdout.getvalue(), stderr.getvalue())


def snapshot(folder: Path) -> dict[str, object]:
    """Everything below a folder: the content of files, where links lead."""
    found: dict[str, object] = {}
    for place, folders, files in os.walk(folder):
        for path in (Path(place, name) for name in folders + files):
            content = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
            found[str(path.relative_to(folder))] = content
    return found


def try_overrides(count: int, seed: int, folder: Path) -> Tally:
    """Runs so many bad command lines."""
    lines = bad_overrides()
    random.Random(seed).shuffle(lines)
    lines = lines[:count]
    (folder / "file").write_text("a file\n")
    before, losses = snapshot(folder), []
    for line in lines:
        outcome = call(cli.main, [*line, *QUICK] if line[0].startswith("-") else [*QUICK, *line], folder)
        changed = sorted(name for name, _ in before.items() ^ snapshot(folder).items())
        if not outcome.is_one_line() or changed:
            losses.append(_loss(" ".join(line)[:200], outcome, f"changed {changed[:3]}"))
        for name in changed:
            shutil.rmtree(folder / name, ignore_errors=True)
    return Tally(len(lines), losses)


def try_datasets(count: int, seed: int, folder: Path) -> Tally:
    """Loads so many damaged files of datasets, in turn raw ones and processed ones."""
    rng, losses = random.Random(seed), []
    raw, whole, place = folder / "raw", folder / "whole", folder / "place"
    write_datasets(raw)
    copy(raw, whole)
    for name in DATASETS:
        outcome = call(cli.main, [f"dataset={name}", f"dataset.root={whole}", *QUICK], folder)
        if outcome.status is not None:
            raise RuntimeError(f"the undamaged {name} cannot be loaded: {outcome.stderr}")
    for number in range(count):
        name = sorted(DATASETS)[number % len(DATASETS)]
        source = (raw if number // len(DATASETS) % 2 else whole) / DATASETS[name]
        copy(source, place / DATASETS[name])
        files = sorted(path for path in (place / DATASETS[name]).rglob("*") if path.suffix not in (".txt", ""))
        files = [path for path in files if path.is_file() and not path.name.startswith("pre_")]
        if source.is_relative_to(whole):  # the raw files are not read again
            files = [path for path in files if path.parent.name != "raw"]
        path = rng.choice(files)
        damage = rng.choice(damages_of(path))
        damage(path, rng)
        before = snapshot(place)
        shutil.rmtree(folder / "outputs", ignore_errors=True)
        outcome = call(cli.main, [f"dataset={name}", f"dataset.root={place}", *QUICK], folder)
        changed = {item for item, _ in before.items() ^ snapshot(place).items()}
        completed = outcome.status is None and not outcome.stderr and _completed(folder)
        # What loading makes; a failure leaves the folder for it, but nothing in it.
        made = ("processed", "RELEASE_v1.txt") + (("data.pt", "geometric_data_processed.pt") if completed else ())
        kept = all(item not in before and Path(item).name in made for item in changed)
        if not (completed or outcome.is_one_line()) or not kept or (folder / "ran").exists():
            losses.append(
                _loss(f"{path.relative_to(place)} {damage.__name__}", outcome, f"changed {sorted(changed)[:3]}")
            )
        shutil.rmtree(folder / "ran", ignore_errors=True)
    return Tally(count, losses)


def _completed(folder: Path) -> bool:
    (path,) = (folder / "outputs").rglob("summary.json")
    summary = json.loads(path.read_text())
    return summary["status"] == "completed" and math.isfinite(summary["accuracy"]["test"]["mean"])


def try_records(count: int, seed: int, folder: Path) -> Tally:
    """Reports on so many runs with a damaged file, beside one without."""
    rng, losses = random.Random(seed), []
    call(cli.main, [*QUICK, f"hydra.run.dir={folder / 'run'}"], folder)
    both = folder / "both"
    for number in range(count):
        copy(folder / "run", both / "whole")
        copy(folder / "run", both / "damaged")
        path = both / "damaged" / ("summary.json", "metrics.jsonl", "config.yaml")[number % 3]
        if path.name == "config.yaml":  # which is read while there is no summary
            (both / "damaged" / "summary.json").unlink()
        damage = rng.choice(damages_of(path))
        damage(path, rng)
        before = snapshot(both)
        form = rng.choice(["table", "csv", "markdown", "latex", "html"])
        drawn = ["--figures", str(folder / "figures")] if number % 5 == 0 else []  # which takes seconds
        outcome = call(report.main, [str(both), "--format", form, *drawn], folder)
        lines = [line for line in outcome.stderr.splitlines() if not line.startswith("iexact-report: ")]
        named = str(both / "damaged") in outcome.stderr
        survived = not lines and (outcome.status == 0 or (outcome.status == 1 and named))
        if not survived or "digits" not in outcome.stdout or snapshot(both) != before or (folder / "ran").exists():
            losses.append(_loss(f"{path.name} {damage.__name__} --format {form}", outcome, ""))
        shutil.rmtree(folder / "ran", ignore_errors=True)
    return Tally(count, losses)


def try_mutated_records(count: int, seed: int, folder: Path) -> Tally:
    """Reports in all formats on so many runs whose records say something else, beside one without."""
    rng, losses = random.Random(seed), []
    tasks = {task: folder / task for task in ("train", "distribution", "fidelity")}
    for task, place in tasks.items():
        call(cli.main, [*QUICK, f"task={task}", "fidelity.epochs=[1,2]", f"hydra.run.dir={place}"], folder)
    copy(tasks["train"], folder / "both" / "whole")
    for number in range(count):
        both, place = folder / "both", folder / "both" / "mutated"
        copy(tasks[rng.choice(sorted(tasks))], place)
        what = mutate(place, rng)
        (mutated,) = (path for path in both.iterdir() if path.name != "whole")
        before = snapshot(both)
        for form in FORMATS:
            output = folder / f"report.{form}"
            outcome = call(report.main, [str(both), "--format", form, "--output", str(output)], folder)
            complaints = _complaints(outcome, mutated, form, output)
            if snapshot(both) != before or (folder / "ran").exists():
                complaints.append("something was changed")
            if complaints:
                losses.append(_loss(f"record {number}, {what}, --format {form}", outcome, "; ".join(complaints)))
        shutil.rmtree(mutated)
    return Tally(count * len(FORMATS), losses)


def _complaints(outcome: Outcome, mutated: Path, form: str, output: Path) -> list[str]:
    """What is wrong with a report on a mutated run and a whole one."""
    lines = outcome.stderr.splitlines()
    found = [f"line {line[:80]!a}" for line in lines if not line.startswith("iexact-report: ")]
    if outcome.status not in (0, 1):
        return [*found, "no report"]
    if outcome.status == 1 and visible(str(mutated)) not in outcome.stderr:
        found.append("the damaged run is not named")
    if form == "parquet":
        return found + ([] if pyarrow.parquet.read_table(output).num_rows else ["no rows"])
    text = output.read_text()
    output.unlink()
    found += [f"stderr: {sign!r}" for sign in set(outcome.stderr) if not sign.isprintable() and sign != "\n"]
    return found + live(form, text) + ([] if "digits" in text else ["the whole run is not shown"])


def try_checkpoints(count: int, seed: int, folder: Path) -> Tally:
    """Resumes so many runs with a damaged checkpoint: from an earlier one, from the start, or not at all."""
    rng, losses = random.Random(seed), []
    stopped, place = folder / "stopped", folder / "place"
    command = [*QUICK, "training.epochs=40", "checkpoint.every=1", f"hydra.run.dir={stopped}"]
    threading.Thread(target=_interrupt_after, args=(stopped / "checkpoint.previous.pt",), daemon=True).start()
    if call(cli.main, command, folder).status != cli.EXIT_INTERRUPTED:
        raise RuntimeError("the run ended before it could be interrupted")
    for number in range(count):
        copy(stopped, place)
        path = place / ("checkpoint.pt", "checkpoint.previous.pt", "metrics.jsonl", "config.yaml")[number % 4]
        damage = rng.choice(damages_of(path))
        damage(path, rng)
        outcome = call(cli.main, [f"resume={place}"], folder)
        refused = outcome.stderr.startswith("iexact: ") and outcome.stderr.count("\n") == 1
        went_on = outcome.status is None and json.loads((place / "summary.json").read_text())["status"] == "completed"
        if not (refused or went_on) or (folder / "ran").exists() or (place / "ran").exists():
            losses.append(_loss(f"{path.name} {damage.__name__}", outcome, ""))
        shutil.rmtree(folder / "ran", ignore_errors=True)
    return Tally(count, losses)


def _interrupt_after(path: Path) -> None:
    """Interrupts the main thread, as Ctrl-C does, once a file is there."""
    while not path.exists():
        time.sleep(0.005)
    _thread.interrupt_main()


def _loss(what: str, outcome: Outcome, more: str) -> str:
    return f"{what}: status {outcome.status} {more}: {outcome.stderr.strip()[-500:]!r}"


def main() -> None:
    """Runs all parts; the exit status says whether anything was lost."""
    parser = argparse.ArgumentParser(description="Counts of bad overrides and damaged files: tried, survived, lost.")
    parser.add_argument("--overrides", type=int, default=200, help="bad command lines (default: 200)")
    parser.add_argument("--files", type=int, default=50, help="damaged files, of datasets and of records (default: 50)")
    parser.add_argument("--records", type=int, default=200, help="mutated records, in every format (default: 200)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ |= DEAD
    records = checkpoints = options.files // 5
    parts = {
        "bad overrides": (try_overrides, options.overrides),
        "damaged dataset files": (try_datasets, options.files - records - checkpoints),
        "damaged records": (try_records, records),
        "mutated records x formats": (try_mutated_records, options.records),
        "damaged checkpoints": (try_checkpoints, checkpoints),
    }
    lost = 0
    for name, (attempt, count) in parts.items():
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            tally = attempt(count, options.seed, Path(folder).resolve())
        lost += len(tally.losses)
        survived, seconds = tally.tried - len(tally.losses), time.perf_counter() - start
        print(
            f"{name}: tried {tally.tried}, survived {survived}, lost {len(tally.losses)} ({seconds:.0f} s)", flush=True
        )
        for loss in tally.losses:
            print(f"  {loss}", flush=True)
    sys.exit(1 if lost else 0)


if __name__ == "__main__":
    main()
