"""A budget of bytes dealt over the maps of a model where they lower the error of its gradient most."""

from iexact_runner.budget.plan import Plan
from iexact_runner.budget.planner import TRIALS, Trial, make_plan

__all__ = ["TRIALS", "Plan", "Trial", "make_plan"]
