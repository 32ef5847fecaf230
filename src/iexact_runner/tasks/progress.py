"""How far training has come: all that it depends on from here on, as a checkpoint holds it."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from iexact_runner.compression.directions import Directions
from iexact_runner.errors import ConfigError
from iexact_runner.runs.records import DamagedRecord, config_hash, to_json
from iexact_runner.tasks.context import Context
from iexact_runner.training import BatchWork, Epoch, Optimization, Scores

logger = logging.getLogger(__name__)


class Progress:
    """One of the runs of a task while it trains, and what the runs before it came to.

    Args:
        context: of the task; its findings are part of the state.
        run: which run, counted from 0; its weights are drawn here.
    """

    def __init__(self, context: Context, run: int) -> None:
        config = context.config
        self._context = context
        self.run = run
        self.epoch = 0
        self.best: Scores | None = None
        self.seconds = self.seconds_to_best = 0.0
        self.highest = Scores(0.0, 0.0, 0.0)
        self.model, self.seed = context.new_model(run)
        self.optimization = Optimization(self.model, config.training, precision=config.precision)

    @classmethod
    def of(cls, state: Mapping[str, Any], context: Context) -> Progress:
        """What :meth:`state` was taken of.

        Raises:
            ConfigError: if it is that of another configuration or kind of device.
            DamagedRecord: if it is that of another version of this program.
        """
        try:
            _check(state, context)
            progress = cls(context, state["run"])
            progress._restore(state)
        except ConfigError:
            raise
        except (KeyError, IndexError, AttributeError, TypeError, ValueError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            raise DamagedRecord(
                f"{context.folder.path}: its checkpoint does not fit this version ({reason})"
            ) from error
        return progress

    @property
    def lines(self) -> int:
        """Epochs that are over, of all runs: lines of ``metrics.jsonl``."""
        return self.run * self._context.config.training.epochs + self.epoch

    def passed(self, epoch: Epoch) -> None:
        """Counts an epoch that is over; of equal validation scores the first is the best."""
        self.epoch = epoch.number
        self.seconds += epoch.seconds
        if epoch.scores is None:
            return
        if self.best is None or epoch.scores.val > self.best.val:
            self.best, self.seconds_to_best = epoch.scores, self.seconds
        self.highest = Scores(*map(max, self.highest, epoch.scores))

    def best_scores(self) -> Scores:
        """Scores at the best validation epoch; there was one."""
        assert self.best is not None
        return self.best

    def state(self) -> dict[str, Any]:
        """Plain values and tensors; the tensors are those in use, not copies."""
        findings, device = self._context.findings, self._context.device
        return {
            "config": config_hash(asdict(self._context.config), resumed=True),
            "run": self.run,
            "epoch": self.epoch,
            "lines": self.lines,
            "seed": self.seed,
            "machine": _machine(self._context),
            "parts": _parts(self._context),
            "best": self.best and list(self.best),
            "highest": list(self.highest),
            "seconds": [self.seconds, self.seconds_to_best],
            "completed": [list(scores) for scores in findings.completed],
            "completed_seconds": findings.seconds_to_best,
            "completed_highest": [list(scores) for scores in findings.highest],
            "resumed": findings.resumed,
            "epoch_seconds": findings.epoch_seconds,
            "work": [[seconds, *work] for seconds, work in findings.work],
            "distribution": to_json(findings.distribution),
            "planner": self._context.planner and self._context.planner.state(),
            "model": self.model.state_dict(),
            "directions": [kept.state() for kept in self.model.directions],
            "optimizer": self.optimization.optimizer.state_dict(),
            "scaler": self.optimization.scaler.state_dict(),
            "generator": torch.get_rng_state(),
            "cuda_generator": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        findings, device = self._context.findings, self._context.device
        if state["seed"] != self.seed:
            raise ValueError(f"seed {state['seed']} is not {self.seed}")
        self.epoch = state["epoch"]
        self.best = state["best"] and Scores(*state["best"])
        self.highest = Scores(*state["highest"])
        self.seconds, self.seconds_to_best = state["seconds"]
        self.model.load_state_dict(state["model"])
        self.model.directions[:] = [Directions.of(kept, device) for kept in state["directions"]]
        self.optimization.optimizer.load_state_dict(state["optimizer"])
        self.optimization.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["generator"])
        if device.type == "cuda" and state["cuda_generator"] is not None:
            torch.cuda.set_rng_state(state["cuda_generator"], device)
        findings.completed[:] = [Scores(*scores) for scores in state["completed"]]
        findings.seconds_to_best[:] = state["completed_seconds"]
        findings.highest[:] = [Scores(*scores) for scores in state["completed_highest"]]
        findings.epoch_seconds[:] = state["epoch_seconds"]
        findings.work[:] = [(seconds, BatchWork(*work)) for seconds, *work in state["work"]]
        findings.resumed = state["resumed"]
        if self._context.planner is not None:
            self._context.planner.restore(state["planner"])
        if findings.distribution is not None:
            findings.distribution[:] = json.loads(state["distribution"])


def _parts(context: Context) -> int | None:
    """Parts of a graph over several processes, whose number decides which draws belong to which node."""
    parallel = context.findings.parallel
    return None if parallel is None else parallel["parts"]


def _check(state: Mapping[str, Any], context: Context) -> None:
    """That a state is of this configuration and kind of device; says where the last bits may differ."""
    if state.get("config") != config_hash(asdict(context.config), resumed=True):
        raise ConfigError.of("resume", context.folder.path, "its checkpoint is of another configuration")
    parts = _parts(context)
    if state.get("parts") != parts:
        raise ConfigError.of("parallel.parts", parts, f"the run began with {state.get('parts')}: name as many")
    made, here = state["machine"], _machine(context)
    if not isinstance(made, dict):
        raise TypeError(f"machine is of type {type(made).__name__}")
    if made["device"] != here["device"]:
        raise ConfigError.of("device", context.config.device, f"the run began on {made['device']}, and goes on there")
    for name, value in here.items():
        if made.get(name, value) != value:
            logger.warning(f"resume: {name} was {made[name]}, is {value}: the last bits of numbers may differ")


def _machine(context: Context) -> dict[str, Any]:
    """What the last bits of sums and products depend on."""
    return {
        "device": context.device.type,
        "torch": str(torch.__version__),
        "torch threads": torch.get_num_threads(),
        "first aggregate cached": context.problem.first_aggregate_cached,
    }
