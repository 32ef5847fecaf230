"""What ``task=NAME`` does, a module each; ``experiment`` sets a run up for them and records how it ended.

``bins`` is apart: it needs no data and no model.
"""

from __future__ import annotations

from collections.abc import Callable

from iexact_runner.tasks import advise, distribution, fidelity, inspect, measure, train
from iexact_runner.tasks.context import Context

TASKS: dict[str, Callable[[Context], None]] = {
    "train": train.run,
    "measure": measure.run,
    "fidelity": fidelity.run,
    "distribution": distribution.run,
    "inspect": inspect.run,
    "advise": advise.run,
}
