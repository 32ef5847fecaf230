"""``task=train``: trains all runs, recording every epoch."""

from __future__ import annotations

import time
from collections.abc import Callable

from iexact_runner.display import Display
from iexact_runner.measure import Throughput
from iexact_runner.nn import Model
from iexact_runner.records import RunFolder
from iexact_runner.tasks.context import Context
from iexact_runner.training import Epoch, Optimization, Scores, train_epochs


def run(context: Context, *, finish: Callable[[Model, int], None] | None = None) -> None:
    """Trains all runs; ``finish`` is called with the model of each and its seed."""
    config, problem, findings = context.config, context.problem, context.findings
    assert findings.memory is not None
    warmup = min(config.measure.warmup_epochs, config.training.epochs // 2)
    timed: list[float] = []
    epochs = config.training.epochs
    with Display(context.console, runs=config.runs, epochs=epochs, metric=problem.metric) as display:
        for run in range(config.runs):
            model, seed = context.new_model(run)
            display.start_run(run)
            best: Scores | None = None
            optimization = Optimization(model, config.training, precision=config.precision)
            for epoch in train_epochs(model, problem, optimization, seed=seed):
                record(context.folder, run, epoch)
                context.logger.log(run, epoch)
                if best is None or epoch.scores.val > best.val:
                    best = epoch.scores
                if epoch.number > warmup:
                    timed.append(epoch.seconds)
                    findings.throughput = Throughput.of(timed, warmup_epochs=warmup)
                display.show(run, epoch, saved_mib=findings.memory["saved_mib"])
            assert best is not None
            findings.completed.append(best)
            if finish is not None:
                finish(model, seed)


def record(folder: RunFolder, run: int, epoch: Epoch) -> None:
    """Writes the line of an epoch."""
    scores = epoch.scores._asdict()
    line = {"run": run, "epoch": epoch.number, "loss": epoch.loss, **scores, "seconds": epoch.seconds}
    folder.append_metrics({**line, "time": time.time()})
