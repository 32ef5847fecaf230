"""``task=distribution``: trains, then observes how the maps that are quantized are distributed."""

from __future__ import annotations

from iexact_runner.compression.seeds import mix
from iexact_runner.nn import Model
from iexact_runner.tasks import train
from iexact_runner.tasks.context import Context


def run(context: Context) -> None:
    """Trains all runs and observes the maps of each."""
    # SciPy, which this needs, is slow to import.
    from iexact_runner.analysis.observed import observe

    config, bits = context.config, context.config.compression.bits
    assert bits is not None
    context.findings.distribution = observed = []

    def finish(model: Model, seed: int) -> None:
        observed.append(observe(model, context.largest_step(), bits=bits, seed=mix(seed, config.training.epochs + 1)))

    train.run(context, finish=finish)
