"""``task=train``: trains all runs, recording every epoch, and goes on where an earlier process was stopped."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator

from iexact_runner.display import Display
from iexact_runner.nn import Model
from iexact_runner.runs.checkpoint import Checkpoints
from iexact_runner.runs.interrupts import Interrupts
from iexact_runner.runs.records import RunFolder
from iexact_runner.tasks.context import Context
from iexact_runner.tasks.progress import Progress
from iexact_runner.training import Epoch, Scores, train_epochs

logger = logging.getLogger(__name__)


def run(context: Context, *, finish: Callable[[Model, int], None] | None = None) -> None:
    """Trains all runs; ``finish`` is called with the model of each and its seed."""
    config, problem, findings = context.config, context.problem, context.findings
    assert findings.memory is not None
    findings.warmup_epochs = warmup = min(config.measure.warmup_epochs, config.training.epochs // 2)
    checkpoints = Checkpoints(context.folder, config.checkpoint.every if context.team.first else None)
    progress = start(context, checkpoints)
    # What differences of rows are to is in no checkpoint: a resumed run begins where they travel whole.
    whole = config.messages.delta_interval if config.messages.delta else 1
    with (
        Display(context.console, runs=config.runs, epochs=config.training.epochs, metric=problem.metric) as display,
        Interrupts() as interrupts,
    ):

        def save() -> None:
            with interrupts.held():
                checkpoints.write(progress.state())
            interrupts.wait = False

        if context.folder.resumed and checkpoints.enabled:
            save()  # so that it counts as resumed whatever happens next
        while True:
            display.start_run(progress.run)
            begun, due = progress.epoch, False
            for epoch in _epochs(context, progress):
                interrupts.wait = checkpoints.enabled
                record(context.folder, progress.run, epoch)
                progress.passed(epoch)
                if epoch.number > begun + warmup:
                    findings.epoch_seconds.append(epoch.seconds)
                    if epoch.work is not None:
                        findings.work.append((epoch.seconds, epoch.work))
                context.logger.log(progress.run, epoch)
                display.show(progress.run, epoch, saved_mib=findings.memory["saved_mib"])
                if context.planner is not None and epoch.number < config.training.epochs:
                    context.planner.passed(progress.model, progress.run, progress.seed, epoch.number)
                due |= interrupts.pending or checkpoints.due(epoch.number)
                if checkpoints.enabled and due and epoch.number % whole == 0:
                    save()
                    due = False
                if interrupts.pending:
                    raise KeyboardInterrupt
            if finish is not None:
                if checkpoints.enabled:
                    save()  # what follows takes long
                finish(progress.model, progress.seed)
            findings.completed.append(progress.best_scores())
            findings.highest.append(progress.highest)
            findings.seconds_to_best.append(progress.seconds_to_best)
            if progress.run + 1 == config.runs:
                return
            progress = Progress(context, progress.run + 1)


def _epochs(context: Context, progress: Progress) -> Iterator[Epoch]:
    """Epochs of a run; one that runs out of memory is tried again with less, if the budget is what fits."""
    while True:
        epochs = train_epochs(
            progress.model, context.problem, progress.optimization, seed=progress.seed, done=progress.epoch
        )
        try:
            yield from epochs
            return
        except (MemoryError, RuntimeError) as error:
            if context.planner is None or not context.planner.lowers(error):
                raise
        context.planner.shrink(progress.model, run=progress.run, seed=progress.seed, epoch=progress.epoch)


def start(context: Context, checkpoints: Checkpoints) -> Progress:
    """Where training begins: at its first epoch, or after the last one that a checkpoint of the folder holds."""
    folder, findings, team = context.folder, context.findings, context.team
    state = checkpoints.read(lines=folder.metrics_lines()) if folder.resumed else None
    # The first process has the folder of the run; what it reads is true of all.
    resumed, state = team.from_first((folder.resumed, state))
    if not resumed:
        return Progress(context, 0)
    progress = Progress(context, 0) if state is None else Progress.of(state, context)
    if team.first:
        folder.keep_metrics(progress.lines)
    findings.resumed += 1
    place = f"goes on after epoch {progress.epoch} of run {progress.run + 1}"
    logger.info(f"{folder.path}: {'has no checkpoint: starts again' if state is None else place}")
    return progress


def record(folder: RunFolder, run: int, epoch: Epoch) -> None:
    """Writes the line of an epoch; its scores are null where there was no evaluation."""
    scores = dict.fromkeys(Scores._fields) if epoch.scores is None else epoch.scores._asdict()
    line = {"run": run, "epoch": epoch.number, "loss": epoch.loss, **scores, "seconds": epoch.seconds}
    work = {} if epoch.work is None else epoch.work._asdict()
    folder.append_metrics({**line, **work, "time": time.time()})
