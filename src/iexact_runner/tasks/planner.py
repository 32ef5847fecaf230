"""When the budget of ``compression=auto`` is dealt: before training, at intervals, and when memory ran out."""

from __future__ import annotations

import gc
import json
import logging
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console

from iexact_runner.analysis.budgets import plan_training
from iexact_runner.budget import TRIALS, Plan
from iexact_runner.compression.choices import Choice
from iexact_runner.compression.directions import Directions
from iexact_runner.compression.seeds import mix
from iexact_runner.config import Config
from iexact_runner.display import show_plan
from iexact_runner.measure import MIB
from iexact_runner.nn import Model
from iexact_runner.phases import PhaseOutOfMemory, is_out_of_memory
from iexact_runner.problem import Problem
from iexact_runner.runs.records import to_json

logger = logging.getLogger(__name__)

# What is left of a budget once memory ran out under it, and the least share of it that is worth a try.
SHRINKAGE, LEAST_SCALE = 0.7, 0.01
# Of the epochs, what may be spent on trials, which take about as long each.
TIME_SHARE = 0.03
# What a plan takes beside its trials, in trials: before training, and where plans are held against the exact gradient.
START, OVERHEAD = 2, 7
# Maps change fast at first: after how many epochs they are measured first, and how much later each time.
FIRST, LATER = 5, 4
# Stream of a step's seed that trials draw their masks from.
_TRIAL = 1 << 20


class Planner:
    """The plans of a run, each frozen until the next one.

    Args:
        config: of the run.
        problem: of the step that needs most.
        console: where a plan is shown.
        plans: records of all plans; filled here.
    """

    def __init__(self, config: Config, problem: Problem, console: Console, plans: list[dict[str, Any]]) -> None:
        self._config = config
        self._problem = problem
        self._console = console
        self._plans = plans
        self._scale = 1.0
        self._first: list[Choice] = []
        self._trials = 0

    def lowers(self, error: BaseException) -> bool:
        """Whether fewer bytes of maps may be the answer: the budget is ``fit``, and a step ran out of memory."""
        if self._config.compression.budget != "fit" or self._scale < LEAST_SCALE:
            return False
        return is_out_of_memory(error) and not (isinstance(error, PhaseOutOfMemory) and error.phase == "evaluation")

    def start(self, model: Model, *, run: int, seed: int) -> None:
        """Has a new model keep its maps as planned before the first run."""
        if not self._first:
            self._first = self._fitting(model, run=run, seed=seed, epoch=0).choices()
        self._trials = START
        model.directions[:] = [Directions(choice=choice) for choice in self._first]

    def passed(self, model: Model, run: int, seed: int, epoch: int) -> None:
        """Makes a new plan if it is due after an epoch."""
        due, trials = self._due(epoch)
        if not due:
            return
        self._trials += (trials or 0) // TRIALS * TRIALS + OVERHEAD
        try:
            plan = self._planned(model, run=run, seed=seed, epoch=epoch, trials=trials)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or self._problem.whole.shard.distributed:  # others would wait
                raise
            logger.warning(f"keeps its plan after epoch {epoch}: out of memory while maps were measured")
            return
        model.directions[:] = plan.directions()

    def shrink(self, model: Model, *, run: int, seed: int, epoch: int) -> None:
        """Makes a plan with less, after a step ran out of memory."""
        self._lower()
        plan = self._fitting(model, run=run, seed=seed, epoch=epoch)
        self._first = plan.choices()
        model.directions[:] = plan.directions()
        place = f"epoch {epoch + 1} of run {run + 1}"
        logger.warning(f"out of memory in {place}: takes it again with {plan.saved / MIB:.2f} MiB of maps")

    def state(self) -> dict[str, Any]:
        """As a checkpoint holds it."""
        first = [choice.state() for choice in self._first]
        return {
            "scale": self._scale,
            "trials": self._trials,
            "first": first,
            "plans": to_json(self._plans),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from a :meth:`state`."""
        self._scale, self._trials = state["scale"], state["trials"]
        self._first = [Choice(**choice) for choice in state["first"]]
        self._plans[:] = json.loads(state["plans"])

    def _due(self, epoch: int) -> tuple[bool, int | None]:
        """Whether maps are measured after an epoch, and how many gradients may be computed."""
        interval = self._config.compression.interval
        if interval is not None:
            return epoch % interval == 0, None
        due = FIRST
        while due < epoch:
            due *= LATER
        rest = int(TIME_SHARE * self._config.training.epochs) - self._trials - OVERHEAD
        return due == epoch and rest >= TRIALS, rest

    def _fitting(self, model: Model, *, run: int, seed: int, epoch: int) -> Plan:
        """A plan without trials, with less if memory runs out while it is made."""
        while True:
            try:
                return self._planned(model, run=run, seed=seed, epoch=epoch, trials=0)
            except (MemoryError, RuntimeError) as error:
                if not self.lowers(error):
                    raise
            self._lower()
            logger.warning(f"out of memory while maps were planned: plans with {self._scale:.2f} of the budget")

    def _lower(self) -> None:
        gc.collect()  # what the failed step left behind
        self._scale *= SHRINKAGE

    def _planned(self, model: Model, *, run: int, seed: int, epoch: int, trials: int | None) -> Plan:
        config, start = self._config, time.perf_counter()
        plan = plan_training(
            model,
            self._problem,
            config,
            seed=mix(seed, epoch, _TRIAL),
            scale=self._scale,
            trials=trials,
        )
        seconds = time.perf_counter() - start
        self._plans.append({"run": run, "epoch": epoch, "seconds": seconds, **plan.record()})
        show_plan(self._console, self._plans[-1])
        return plan
