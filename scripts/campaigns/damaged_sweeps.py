"""Sweeps with a damaged status file, taken up again: how many were tried, survived and lost.

    python scripts/campaigns/damaged_sweeps.py --files 50

A sweep survives if the same command with ``sweep.skip_completed=true`` completes and complains of nothing, every seed
stands once and under the number it had, the other jobs are left as they were, and a file that is no status of a job is
named and kept. All else is lost, and printed.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from damage_campaign import DEAD, QUICK, Tally, call, snapshot
from damaged_files import copy, damages_of
from iexact_runner import cli
from iexact_runner.runs.jobs import LOST, STATUS, Job
from iexact_runner.runs.records import ATTEMPT

SEEDS = (0, 1)
SWEEP = ("-m", *QUICK, "compression=none", f"seed={','.join(map(str, SEEDS))}", "sweep.skip_completed=true")
STATES = ("completed", "running", "failed", "queued")
CONTENTS = (
    b"",
    b"[]",
    b"{}",
    b'{"state": "completed"}',
    b"\x80\x02\xff\x00",
    b"null",
    b"7",
    b"[" * 100_000,
    b'{"a": NaN}',
)
# Values of other types than a field has, or that say something else.
VALUES = ({}, [], "", "no", 7, -1.5, 10**400, True, None, "\ud800", "\x1b[2J", "[/nope]", ["a", 1], {"a": {}})


def main() -> None:
    """Prints the counts; the exit status says whether anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=50, help="damaged status files (default: 50)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ |= DEAD
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        tally = try_statuses(options.files, options.seed, Path(folder).resolve())
    survived, seconds = tally.tried - len(tally.losses), time.perf_counter() - start
    print(f"damaged status files: tried {tally.tried}, survived {survived}, lost {len(tally.losses)} ({seconds:.0f} s)")
    for loss in tally.losses:
        print(f"  {loss}")
    sys.exit(1 if tally.losses else 0)


def try_statuses(count: int, seed: int, folder: Path) -> Tally:
    """Takes so many sweeps up again in which the status file of one job is damaged."""
    rng, losses = random.Random(seed), []
    whole, place = folder / "whole", folder / "place"
    outcome = call(cli.main, [*SWEEP, f"hydra.sweep.dir={whole}"], folder)
    if outcome.status is not None:
        raise RuntimeError(f"the undamaged sweep does not run: {outcome.stderr}")
    for number in range(count):
        copy(whole, place)
        job = Job(place / str(rng.randrange(len(SEEDS))))
        state = STATES[number % len(STATES)]
        leave_in(job, state)
        damage = (_replaced, _changed, _damaged)[number // len(STATES) % 3]
        what = damage(job.folder / STATUS, rng)
        before, lost = snapshot(place), job.state == LOST
        others = {path: content for path, content in before.items() if not path.startswith(job.folder.name)}
        resume = ["resume=auto"] if rng.random() < 0.5 else []
        outcome = call(cli.main, [*SWEEP, *resume, f"hydra.sweep.dir={place}"], folder)
        found = snapshot(place)
        kept = [content for path, content in found.items() if path.endswith(STATUS) and ATTEMPT in path]
        problem = {
            "ended badly": outcome.status is not None or outcome.stderr,
            "another folder": {path.name for path in place.iterdir() if path.is_dir()} != set(map(str, SEEDS)),
            "a seed moved": [_seed(place / str(index)) for index in range(len(SEEDS))] != list(SEEDS),
            "another job changed": any(found.get(path) != content for path, content in others.items()),
            "not named": lost and str(job.folder / STATUS) not in outcome.stdout.replace("\n", ""),
            "not kept": lost and before[f"{job.folder.name}/{STATUS}"] not in kept,
            "ran": (folder / "ran").exists(),
        }
        wrong = [name for name, holds in problem.items() if holds]
        if wrong:
            losses.append(f"{what} of a job that was {state}: {', '.join(wrong)}: {outcome.stderr.strip()[-300:]!r}")
    return Tally(count, losses)


def leave_in(job: Job, state: str) -> None:
    """Leaves a completed job as one that is in another state."""
    if state != "completed":
        (job.folder / "summary.json").unlink()
    if state == "queued":
        for name in ("config.yaml", "metrics.jsonl"):
            (job.folder / name).unlink()
    (job.folder / STATUS).write_text(json.dumps(job.status() | {"state": state}, indent=2) + "\n")


def _seed(folder: Path) -> object:
    try:
        summary = json.loads((folder / "summary.json").read_text())
    except FileNotFoundError:
        return None
    return summary["config"]["seed"] if summary["status"] == "completed" else None


def _replaced(path: Path, rng: random.Random) -> str:
    content = rng.choice(CONTENTS)
    path.write_bytes(content)
    return f"{content[:30]!r}"


def _changed(path: Path, rng: random.Random) -> str:
    status = json.loads(path.read_text())
    name, value = rng.choice(sorted(status)), rng.choice(VALUES)
    path.write_text(json.dumps(status | {name: value}))
    return f"{name}={str(value)[:30]!a}"


def _damaged(path: Path, rng: random.Random) -> str:
    damage: Callable[[Path, random.Random], None] = rng.choice(damages_of(path))
    damage(path, rng)
    return damage.__name__


if __name__ == "__main__":
    main()
