"""``task=measure``: saved tensors, and epochs per second."""

from __future__ import annotations

import itertools

from iexact_runner.display import show_tensors
from iexact_runner.measure import time_epochs
from iexact_runner.measure.energy import EnergyMeter
from iexact_runner.tasks.context import Context
from iexact_runner.training import Optimization, clock, epoch_trainer


def run(context: Context) -> None:
    """Shows the kept tensors and times epochs with the device to itself, with their energy if asked to."""
    config, problem, findings, device = context.config, context.problem, context.findings, context.device
    assert findings.memory is not None
    show_tensors(context.console, findings.memory["tensors"])
    model, seed = context.new_model(run=0)
    optimization = Optimization(model, config.training, precision=config.precision)
    train_epoch, numbers = epoch_trainer(model, optimization, problem, seed=seed), itertools.count(1)

    def one_epoch() -> float:
        number = next(numbers)
        start = clock(device)
        _, work = train_epoch(number)
        seconds = clock(device) - start
        if work is not None:
            findings.work.append((seconds, work))
        return float(context.team.from_first(seconds))  # by which all processes go on or end

    context.lock.exclude_others(patience=config.measure.max_wait)
    meter = EnergyMeter(device, country=config.measure.country) if config.measure.energy else None
    with context.console.status("timing epochs"):
        findings.throughput = time_epochs(
            one_epoch,
            warmup_epochs=config.measure.warmup_epochs,
            timed_epochs=config.measure.timed_epochs,
            max_seconds=config.measure.max_seconds,
            meter=meter,
        )
    findings.energy = None if meter is None else meter.record
