"""Whether the tests would notice: makes seeded small mistakes in the source, one at a time, and runs its tests.

    taskset -c 1 python scripts/campaigns/mutation_check.py --csv benchmarks/mutation_cpu.csv
    taskset -c 1 python scripts/campaigns/mutation_check.py --csv benchmarks/mutation_cpu.csv --again  # others

``mutants.py`` says what a mistake is. About ``--count`` mutants are drawn from the modules of ``TESTS``, from each in
proportion to the places it has. Modules of compiled kernels count a quarter, for each of their mutants compiles them
anew, and so does the one with the calls to compare backends on, most of which would do as well with another size. A
mutant is killed if one of its module's tests fails, or they take several times as long as without it. One that
survives is a test that is missing, or has its reason in ``EQUIVALENT``.

Not mutmut or cosmic-ray: importing torch and compiling Numba's kernels would take most of their time. Here every mutant
is a fork of one process that has imported what the tests need, and only what it changes is compiled again. All happens
in a clone of what is committed; the checkout is not touched.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from mutants import Mutant, mutants

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGE = Path("src/iexact_runner")
# What the tests import of others, which a fork then has.
IMPORTED = (
    "hypothesis",
    "numba",
    "pytest",
    "scipy.optimize",
    "sklearn.datasets",
    "torch",
    "torch_geometric.nn",
    "triton",
)

_QUANTIZER = ("kernels/test_reference.py", "compression/test_codec.py")
_SCHEMES = ("schemes/test_functions.py", "schemes/test_projected.py", "schemes/test_lowrank.py")
_SKETCH = ("schemes/test_lowrank.py", "schemes/test_lowrank_signs.py")
_LEVELS = ("compression/test_curves.py", "compression/test_bins.py", "compression/test_maps.py", "tasks/test_bins.py")
_NUMBA = ("kernels/test_numba.py",)
_PARTS = ("blocks", "coefficients", "common", "elementwise", "product", "quantizer", "signs", "spmm")
_REFERENCE = (*_QUANTIZER, *_SCHEMES, *_NUMBA)
_TRITON = ("kernels/test_triton_interpreter.py",)
_SAVED = ("test_kept.py", "measure/test_memory_formulas.py")
_SHARDS = ("parallel/test_delta.py", "parallel/test_shard.py", "parallel/test_gradients.py")
# The tests that mirror a module first, then those of what it serves.
TESTS: dict[str, tuple[str, ...]] = {
    "kernels/backends.py": ("kernels/test_backends.py", "compression/test_codec.py"),
    "compression/bins.py": _LEVELS,
    "kernels/sparse_ops.py": ("kernels/test_ops.py", "data/test_graph.py", "schemes/test_graph_linear.py"),
    "kernels/block_ops.py": ("kernels/test_ops.py", *_SCHEMES, "schemes/test_compile.py"),
    "compression/codec.py": ("compression/test_codec.py",),
    "compression/coefficients.py": ("compression/test_coefficients.py", *_SKETCH),
    "compression/curves.py": _LEVELS,
    "compression/deferred.py": ("compression/test_deferred.py", "test_capture.py"),
    "compression/directions.py": ("compression/test_directions.py", *_SKETCH),
    **{
        f"compression/formats/{name}.py": ("compression/test_formats.py",)
        for name in ("actnn", "dropit", "hadamard", "of_inputs", "velora")
    },
    "compression/host.py": ("compression/test_host.py", "schemes/test_offload.py", "sampling/test_samplers.py"),
    "compression/maps.py": ("compression/test_maps.py", *_SCHEMES),
    **{f"kernels/numba/{part}.py": _NUMBA for part in _PARTS},
    "kernels/levels.py": ("compression/test_coefficients.py", *_SKETCH),
    "kernels/ops.py": ("kernels/test_ops.py", *_QUANTIZER, *_SCHEMES, "schemes/test_compile.py"),
    "kernels/sketch_ops.py": ("kernels/test_ops.py", *_SKETCH, "schemes/test_compile.py"),
    "kernels/parity.py": ("kernels/test_parity_cases.py", *_NUMBA, *_TRITON),
    **{f"kernels/reference/{part}.py": _REFERENCE for part in _PARTS},
    "compression/seeds.py": ("compression/test_seeds.py", "kernels/test_reference.py", *_SCHEMES),
    "compression/signs.py": _SKETCH,
    "compression/sketch.py": ("compression/test_sketch.py", *_SKETCH),
    **{f"kernels/triton/{part}.py": _TRITON for part in (*_PARTS, "tiles") if part != "spmm"},  # cuSPARSE has it
    "layerwise.py": ("sampling/test_samplers.py",),
    "loss.py": ("test_loss.py", "test_training.py", "sampling/test_samplers.py"),
    "measure/batches.py": ("test_experiment.py",),
    "compression/choices.py": ("budget/test_budget.py",),
    "budget/allocation.py": ("budget/test_allocation.py",),
    "budget/planner.py": ("budget/test_budget.py",),
    "budget/sites.py": ("budget/test_budget.py",),
    "measure/energy.py": ("measure/test_energy.py",),
    "measure/environment.py": ("measure/test_environment.py",),
    "measure/out_of_memory.py": ("measure/test_out_of_memory.py",),
    "measure/peak.py": ("measure/test_peak.py", *_SAVED, "test_experiment.py"),
    "kept.py": _SAVED,
    "measure/step.py": ("measure/test_step.py", *_SAVED, "measure/test_out_of_memory.py", "test_experiment.py"),
    "measure/throughput.py": _SAVED,
    "parallel/halo.py": _SHARDS,
    "parallel/helpers.py": ("parallel/test_helpers.py",),
    "parallel/messages.py": _SHARDS,
    "parallel/shard.py": _SHARDS,
    "parallel/team.py": ("parallel/test_runs.py",),
    "data/partitioned.py": _SHARDS,
    "data/parts.py": ("parallel/test_parts.py",),
    "data/part_files.py": ("parallel/test_parts.py",),
    "runs/records.py": ("runs/test_records.py", "report", "runs/test_resume.py"),
    "sampling/partition.py": ("sampling/test_partition.py",),
    "sampling/parallel.py": ("parallel/test_parts.py", *_SHARDS),
    "sampling/saint.py": ("sampling/test_samplers.py",),
    "sampling/samplers.py": ("sampling/test_samplers.py",),
    "sampling/subgraph.py": ("sampling/test_subgraph.py", "sampling/test_samplers.py"),
    "schemes/aggregation.py": ("schemes/test_aggregation.py", "parallel/test_gradients.py"),
    "schemes/attention.py": ("schemes/test_aggregation.py",),
    "schemes/graph_linear.py": ("schemes/test_graph_linear.py", *_SCHEMES),
    "schemes/normalization.py": (*_SCHEMES, *_SHARDS),
    "schemes/ownership.py": ("schemes/test_ownership.py",),
    "schemes/offload.py": ("schemes/test_offload.py",),
    "schemes/recompute.py": ("schemes/test_recompute.py",),
    "schemes/functions.py": (*_SCHEMES, "measure/test_out_of_memory.py"),
}
QUARTERED = ("kernels/numba/", "kernels/triton/", "kernels/parity")
# Why no test can notice: module, and the mutation as the rows have it.
EQUIVALENT: dict[tuple[str, str], str] = {
    (
        "compression/formats/dropit.py",
        "return DropIT(MapFormat(config.bits, 1.0, 0, None, None, config.backend), config.kept_frac) -> "
        "return DropIT(MapFormat(config.bits, 1.0, (1), None, None, config.backend), config.kept_frac)",
    ): "blocks of no rows are blocks of one",
    (
        "compression/formats/hadamard.py",
        "blocks = MapFormat(config.bits, 1.0, 0, None, None, config.backend) -> "
        "blocks = MapFormat(config.bits, (2.0), 0, None, None, config.backend)",
    ): "what is not projected has no share of columns",
    (
        "budget/planner.py",
        "error, saved, plan = min(tried, key=lambda each: each[0]) -> error, saved, plan = (min(tried))",
    ): "no two plans have the same error to the last bit",
    ("layerwise.py", "touched = 0 -> touched = (1)"): "a byte more of a gibibyte",
    ("layerwise.py", "TOUCHED_BYTES = 1 << 30 -> TOUCHED_BYTES = (1 >> 30)"): "memory is given back more often",
    (
        "loss.py",
        "return iter(of_nodes.split(max(1, elements // max(1, scores.size(1))))) -> "
        "return iter(of_nodes.split(max(1, elements // max((2), scores.size(1)))))",
    ): "another size does as well",
    (
        "compression/bins.py",
        "sigma: Array = _top(bits) / 2 / np.abs(ndtri(1 / np.asarray(d, dtype=np.float64))) -> "
        "sigma: Array = _top(bits) / 2 / np.abs(ndtri(1 / (np.asarray(d))))",
    ): "one divided by integers is float64 too",
    (
        "compression/formats/velora.py",
        "return VeLoRA(MapFormat(config.bits, 1.0, 0, None, None, config.backend), config.group_size) -> "
        "return VeLoRA(MapFormat(config.bits, (2.0), 0, None, None, config.backend), config.group_size)",
    ): "what is not projected has no share of columns",
    ("kernels/numba/spmm.py", "FEATURES = 32 -> FEATURES = (33)"): "another size does as well",
    (
        "kernels/parity.py",
        "each, width = torch.tensor(bits, dtype=torch.int32), -(-sum(bits) // 8) * 8 -> "
        "each, width = (torch.tensor(bits)), -(-sum(bits) // 8) * 8",
    ): "another type of integers does as well",
    (
        "budget/planner.py",
        "nearest = min(stored, key=lambda way: abs((way.choice.bits or 0) - (usual.choice.bits or 0))) -> "
        "nearest = min(stored, key=lambda way: abs((way.choice.bits or (1)) - (usual.choice.bits or 0)))",
    ): "all of these options have bits",
    (
        "kernels/numba/quantizer.py",
        "decoded = torch.empty(shape, dtype=torch.float32) -> decoded = (torch.empty(shape))",
    ): "torch's default type is float32 too, or holds every float32",
    (
        "kernels/parity.py",
        "WIDTHS = ((0, 5, 2), (1, 1, 1), (37, 63, 5), (101, 16, 8), (130, 136, 16), (37, 63, 0)) -> "
        "WIDTHS = ((0, 5, 2), (1, (2), 1), (37, 63, 5), (101, 16, 8), (130, 136, 16), (37, 63, 0))",
    ): "another size does as well",
    (
        "kernels/parity.py",
        "shapes = QUICK_WIDTHS if quick else (*WIDTHS, (4099, 24, 8)) -> "
        "shapes = QUICK_WIDTHS if quick else (*WIDTHS, (4099, (25), 8))",
    ): "another size does as well",
    (
        "parallel/messages.py",
        "vectors = torch.linalg.eigh(moments.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0))[1] -> "
        "vectors = torch.linalg.eigh((moments.nan_to_num(posinf=0.0, neginf=0.0)))[1]",
    ): "a NaN becomes 0 by default too",
    (
        "data/part_files.py",
        "far = torch.zeros(facts.num_nodes, dtype=torch.bool) -> far = (torch.zeros(facts.num_nodes))",
    ): "ones are counted as well",
    (
        "sampling/parallel.py",
        "assert isinstance(build, (ScaledAdjacency, EdgePattern)) and isinstance(config.parallel, ParallelConfig) -> "
        "assert (isinstance(build, (ScaledAdjacency, EdgePattern)) or isinstance(config.parallel, ParallelConfig))",
    ): "says to the type checker what is so",
    (
        "schemes/recompute.py",
        "for each, value in zip(inputs, values, strict=True) -> for each, value in (zip(inputs, values))",
    ): "there are as many of both",
    ("compression/host.py", "self.mapping.madvise(mmap.MADV_DONTNEED) -> pass"): "advice, which changes no byte",
    ("compression/signs.py", "exact: bool = False -> exact: bool = (True)"): "where all signs are stored none is wrong",
    (
        "kernels/parity.py",
        "SHAPES = ((), (0,), (3, 0), (1,), (7,), (8,), (9,), (63,), (64,), (100,), (1000,), (1031,), (37, 63), "
        "(128, 16)) -> SHAPES = ((), (0,), (3, 0), (1,), (7,), (8,), (9,), (63,), (64,), (100,), (1000,), (1031,), "
        "(37, (64)), (128, 16))",
    ): "another size does as well",
    (
        "kernels/parity.py",
        "WIDTHS = ((0, 5, 2), (1, 1, 1), (37, 63, 5), (101, 16, 8), (130, 136, 16), (37, 63, 0)) -> "
        "WIDTHS = (((1), 5, 2), (1, 1, 1), (37, 63, 5), (101, 16, 8), (130, 136, 16), (37, 63, 0))",
    ): "another size does as well",
    ("kernels/numba/signs.py", "for bit in range(8): -> for bit in range((9)):"): "a byte has no ninth bit",
    (
        "kernels/triton/blocks.py",
        "if WIDTH % 4 == 0: # neighbours in memory too: 16 bytes are loaded at once -> "
        "if WIDTH % 4 == (1): # neighbours in memory too: 16 bytes are loaded at once",
    ): "says how many bytes are loaded at once, which the interpreter does not do",
    (
        "kernels/triton/elementwise.py",
        "grad = widen(tl.load(grad_ptr + start + position, mask=inside, other=0.0)) -> "
        "grad = widen((tl.load(grad_ptr + start + position, mask=inside)))",
    ): "elements past the last are not stored",
    (
        "measure/step.py",
        "if available is None or needed + COMPILING_BYTES > available: -> "
        "if available is None or (needed + COMPILING_BYTES >= available):",
    ): "what is needed is a guess, not known to the byte",
    (
        "measure/step.py",
        "if before is not None and after is not None: -> if (before is not None or after is not None):",
    ): "of one device both are known or neither",
}

ENVIRONMENT = ("device_name", "torch_threads", "python", "torch", "numba", "git_commit")


def main() -> None:
    """Prints each mutant's outcome, and how many were killed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=110, help="mutants in all, at least one of each module")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--modules", nargs="+", default=list(TESTS), choices=list(TESTS), metavar="MODULE")
    parser.add_argument("--csv", type=Path, help="file to write the rows to")
    parser.add_argument("--again", action="store_true", help="keep the killed ones of the file, and run the others")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkout = Path(folder, "checkout")
        subprocess.run(["git", "clone", "--quiet", "--local", REPOSITORY, checkout], check=True)
        drawn = [
            mutant
            for mutant in draw(checkout / PACKAGE, count=arguments.count, seed=arguments.seed)
            if mutant.module in arguments.modules
        ]
        keys = {(mutant.module, mutant.line, mutant.mutation) for mutant in drawn}
        rows = {key: row for key, row in known(arguments.csv).items() if key in keys} if arguments.again else {}
        trials = Trials(checkout)
        facts = describe()
        for index, mutant in enumerate(drawn):
            key = (mutant.module, mutant.line, mutant.mutation)
            if key not in rows:
                row = rows[key] = trials.run(mutant) | facts
                print(f"{index + 1}/{len(drawn)} {row['outcome']} {row['seconds']} s {key}", flush=True)
                if arguments.csv:  # as it goes on, for it is long
                    write(arguments.csv, rows)
    table = pd.DataFrame([rows[mutant.module, mutant.line, mutant.mutation] for mutant in drawn])
    counts = table["outcome"].value_counts()
    killed, equivalent = counts.get("killed", 0), counts.get("equivalent", 0)
    print(table[table["outcome"] != "killed"].to_string(index=False))
    print(f"{len(table)} mutants: {killed} killed ({killed / len(table):.1%}), {equivalent} equivalent")
    sys.exit(0 if killed + equivalent == len(table) else 1)


def describe() -> dict[str, Any]:
    """The environment of the clone, from a process of its own: nothing of the package may be imported before a fork."""
    program = "import json, torch; from iexact_runner.measure import environment as found; "
    program += "print(json.dumps(found.describe(torch.device('cpu'), backend='auto')))"
    said = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    facts = json.loads(said)
    return {name: facts[name] for name in ENVIRONMENT}


def known(path: Path) -> dict[tuple[str, int, str], dict[str, Any]]:
    """The killed mutants of a file of rows."""
    rows = pd.read_csv(path, keep_default_na=False).to_dict("records")
    return {(row["module"], row["line"], row["mutation"]): row for row in rows if row["outcome"] == "killed"}


def write(path: Path, rows: dict[tuple[str, int, str], dict[str, Any]]) -> None:
    """Writes the rows in the order of the source."""
    pd.DataFrame([rows[key] for key in sorted(rows)]).to_csv(path, index=False)


@functools.cache
def all_mutants(package: Path) -> dict[str, list[Mutant]]:
    """All mutants of each module of ``TESTS``."""
    return {module: list(mutants(module, (package / module).read_text())) for module in TESTS}


def draw(package: Path, *, count: int, seed: int) -> list[Mutant]:
    """About ``count`` mutants of the modules of ``TESTS``, by the number of places that each has."""
    found = all_mutants(package)
    weights = {module: len(places) * (0.25 if module.startswith(QUARTERED) else 1) for module, places in found.items()}
    total = sum(weights.values())
    drawn = []
    for module, places in found.items():
        share = max(1, int(count * weights[module] / total))
        draws = random.Random(f"{seed} {module}")  # of its own, so that a changed module changes no other's
        drawn += sorted(draws.sample(places, share), key=lambda mutant: mutant.line)
    return drawn


class Trials:
    """Runs the tests of mutants in a clone.

    Args:
        checkout: the clone; a module of it is another while its mutant is tried.
    """

    def __init__(self, checkout: Path) -> None:
        self.checkout = checkout
        self.caches = checkout.parent
        # A module changed twice within a second and to the same size would be read from its old bytecode.
        sys.dont_write_bytecode = True
        os.environ |= {
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONPATH": str(checkout / "src"),
            "NUMBA_CACHE_DIR": str(self.caches / "numba"),
            "OMP_NUM_THREADS": "1",
        }
        sys.path.insert(0, str(checkout / "src"))
        for name in IMPORTED:
            importlib.import_module(name)
        import torch

        torch.set_num_threads(1)
        self._baselines: dict[str, float] = {}

    def run(self, mutant: Mutant) -> dict[str, Any]:
        """One row."""
        tests = TESTS[mutant.module]
        limit = 60 + 4 * sum(self._baseline(one) for one in tests)
        path = self.checkout / PACKAGE / mutant.module
        original = path.read_text()
        path.write_text(mutant.source)
        # Numba keeps code by the file of the function alone, though it has others' functions and constants in it.
        inlined = Path(mutant.module).parent.name in ("numba", "reference")
        cache = Path(tempfile.mkdtemp(dir=self.caches)) if inlined else self.caches / "numba"
        start = time.perf_counter()
        try:
            status, said = self._fork(tests, cache, limit)
        finally:
            path.write_text(original)
            if inlined:
                shutil.rmtree(cache)
        first = re.search(r"^(?:FAILED|ERROR) (\S+)", said, re.MULTILINE)
        reason = EQUIVALENT.get((mutant.module, mutant.mutation), "")
        survived = "equivalent" if reason else "survived"
        return {
            "module": mutant.module,
            "line": mutant.line,
            "mutation": mutant.mutation,
            "outcome": survived if status == 0 else "killed",
            "noticed_by": "time" if status is None else first[1].removeprefix("tests/") if first else "",
            "why_equivalent": reason,
            "seconds": round(time.perf_counter() - start, 1),
        }

    def _baseline(self, tests: str) -> float:
        """Seconds of a file or folder of tests without a mutant, which pass."""
        if tests not in self._baselines:
            start = time.perf_counter()
            status, said = self._fork([tests], self.caches / "numba", 1200)
            if status != 0:
                raise RuntimeError(f"tests/{tests}: must pass without a mutant\n{said[-3000:]}")
            self._baselines[tests] = time.perf_counter() - start
        return self._baselines[tests]

    def _fork(self, tests: Sequence[str], cache: Path, limit: float) -> tuple[int | None, str]:
        """Exit status of the tests in a fork, None if they take longer than ``limit`` seconds, and what they print."""
        log = self.caches / "log"
        child = os.fork()
        if child == 0:
            os._exit(self._child(tests, cache, log))
        end = time.monotonic() + limit
        status: int | None = None
        while time.monotonic() < end:
            done, code = os.waitpid(child, os.WNOHANG)
            if done:
                status = os.waitstatus_to_exitcode(code)
                break
            time.sleep(0.05)
        with contextlib.suppress(ProcessLookupError):  # what it left behind, or itself
            os.killpg(child, signal.SIGKILL)
        if status is None:
            os.waitpid(child, 0)
        return status, log.read_text(errors="replace")

    def _child(self, tests: Sequence[str], cache: Path, log: Path) -> int:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_DATA, (6 << 30, 6 << 30))  # a mutant may ask for any amount
        with log.open("w") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.environ["NUMBA_CACHE_DIR"] = str(cache)
        sys.modules["numba"].config.CACHE_DIR = str(cache)
        os.chdir(self.checkout)
        import pytest

        options = ["-x", "-q", "--no-header", "-p", "no:cacheprovider", "--tb=line"]
        return int(pytest.main([*options, *(f"tests/{name}" for name in tests)]))


if __name__ == "__main__":
    main()
