"""``task=fidelity``: compressed gradients against the exact one while a model trains."""

from __future__ import annotations

from functools import partial

from iexact_runner.analysis.fidelity import checkpoints, pooled
from iexact_runner.display import show_fidelity
from iexact_runner.tasks.context import Context


def run(context: Context) -> None:
    """Compares the gradients of all runs and shows the figures."""
    config, findings, console = context.config, context.findings, context.console
    for run in range(config.runs):
        model, seed = context.new_model(run)
        findings.fidelities.append({})
        name = f"run {run + 1}/{config.runs}"
        passed = None
        if context.planner is not None:
            passed = partial(context.planner.passed, model, run, seed)
        with console.status(f"{name}: training, then drawing gradients"):
            for epoch, figures in checkpoints(model, context.problem, config, seed=seed, passed=passed):
                findings.fidelities[-1][epoch] = figures
                line = f"{name}  after epoch {epoch}  relative error {figures['relative_error']:.4f}"
                console.print(line, highlight=False)
    show_fidelity(console, pooled(findings.fidelities, draws=config.fidelity.draws))
