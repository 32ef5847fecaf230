"""Time of an epoch of two processes that a network of a given rate lies between, by how their messages travel.

sudo python scripts/bench/bench_network.py --csv benchmarks/network_cpu.csv dataset=synthetic_arxiv model=sage

Each process has a network namespace of its own; between them is a pair of virtual interfaces, each limited by a token
bucket (``ip`` and ``tc`` of iproute2; needs root). Rounds go through all messages in turns.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from bench_epoch import append_rows
from bench_ranks import setting

PAIRS = (("fp32", "fp32"), ("int8", "int8"), ("int8", "int4"), ("int4", "int4"), ("lowrank", "int4"))
SPACES = (("iexact0", "veth0", "10.213.7.1"), ("iexact1", "veth1", "10.213.7.2"))
PORT = "29517"


def main() -> None:
    """Prints a line for each rate and pair of messages, and writes the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", nargs="+", default=("1gbit", "10gbit"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--csv", type=Path, help="file to append the rows to")
    parser.add_argument("overrides", nargs="*", help="of the configuration: dataset=NAME model=NAME ...")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for rate in arguments.rates:
        found: dict[tuple[str, str], list[dict[str, Any]]] = {pair: [] for pair in PAIRS}
        with network(rate):
            for _, pair in itertools.product(range(arguments.rounds), PAIRS):
                summary = run([*arguments.overrides, f"training.epochs={arguments.epochs}"], pair)
                found[pair].append(summary)
        exact = [seconds(summary) for summary in found[PAIRS[0]]]
        for pair, summaries in found.items():
            ratios = [seconds(each) / one for each, one in zip(summaries, exact, strict=True)]
            rows.append(row(rate, summaries, ratios))
            print(
                f"{rate}  {pair[0]}/{pair[1]}  {rows[-1]['epoch_seconds']:.2f} s an epoch, {rows[-1]['ratio']:.2f}",
                flush=True,
            )
    if arguments.csv:
        append_rows(rows, arguments.csv)


@contextmanager
def network(rate: str) -> Iterator[None]:
    """Two namespaces with a link of that rate between them, gone afterwards."""
    (first, near, _), (second, far, _) = SPACES
    for name in (first, second):  # left over from a run that was killed
        subprocess.run(["ip", "netns", "del", name], capture_output=True)
    try:
        for name, _, _ in SPACES:
            command("ip", "netns", "add", name)
        command("ip", "link", "add", near, "type", "veth", "peer", "name", far)
        for name, link, address in SPACES:
            command("ip", "link", "set", link, "netns", name)
            command("ip", "-n", name, "addr", "add", f"{address}/24", "dev", link)
            command("ip", "-n", name, "link", "set", link, "up")
            command("ip", "-n", name, "link", "set", "lo", "up")
            limit = ("rate", rate, "burst", "1mb", "latency", "200ms")
            command("tc", "-n", name, "qdisc", "add", "dev", link, "root", "tbf", *limit)
        yield
    finally:
        for name in (first, second):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def command(*words: str) -> None:
    """Runs a command that must succeed."""
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(words)}: {done.stderr.strip()}")


def run(overrides: list[str], pair: tuple[str, str]) -> dict[str, Any]:
    """The summary of a run whose two processes are in the two namespaces."""
    messages = [f"messages.forward={pair[0]}", f"messages.backward={pair[1]}"]
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-m", "iexact_runner", "parallel=graph", f"hydra.run.dir={folder}/run", *messages]
        processes = []
        for rank, (name, link, _) in enumerate(SPACES):
            contract = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "GLOO_SOCKET_IFNAME": link}
            contract |= {"MASTER_ADDR": SPACES[0][2], "MASTER_PORT": PORT}
            inside = ["ip", "netns", "exec", name, *words, *overrides]
            processes.append(
                subprocess.Popen(inside, env=os.environ | contract, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
            )
        texts = [process.communicate()[0].decode() for process in processes]
        if any(process.returncode for process in processes):
            sys.exit("\n".join(texts)[-2000:])
        summary: dict[str, Any] = json.loads(Path(folder, "run", "summary.json").read_text())
    return summary


def seconds(summary: dict[str, Any]) -> float:
    """Median of the epochs of a run."""
    return 1 / float(summary["throughput"]["epochs_per_second"]["median"])


def row(rate: str, summaries: list[dict[str, Any]], ratios: list[float]) -> dict[str, Any]:
    """What the rounds of a pair of messages come to."""
    environment = summaries[0]["environment"]
    ranks = [rank for summary in summaries for rank in summary["parallel"]["ranks"]]
    return {
        **setting(summaries[0]),
        "rate": rate,
        "epoch_seconds": median(map(seconds, summaries)),
        "ratio": median(ratios),
        "ratio_least": min(ratios),
        "ratio_most": max(ratios),
        "sent_mib": sum(rank["sent_mib"] for rank in ranks) / len(summaries),
        "exchanges": ranks[0]["exchanges"],
        "waiting_seconds": median(rank["waiting_seconds"] for rank in ranks),
        "rounds": len(summaries),
        **{key: environment[key] for key in ("python", "torch", "cpu_count", "torch_threads", "git_commit")},
    }


if __name__ == "__main__":
    main()
