"""Training of graph neural networks with compressed activation maps.

``from iexact_runner import compress`` makes a PyTorch model train with compressed maps.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from iexact_runner.budget.calls import deal_budget
    from iexact_runner.config import CompressionConfig
    from iexact_runner.nn import compress, compressed_pass
    from iexact_runner.nn.saved_tensors import compressed_saved_tensors

__version__ = "0.2.0"
__all__ = ["CompressionConfig", "__version__", "compress", "compressed_pass", "compressed_saved_tensors", "deal_budget"]

# Imported when they are first asked for: torch takes seconds, which ``iexact --help`` has no use for.
_HOMES = {
    "CompressionConfig": "iexact_runner.config",
    "compress": "iexact_runner.nn",
    "compressed_pass": "iexact_runner.nn",
    "compressed_saved_tensors": "iexact_runner.nn.saved_tensors",
    "deal_budget": "iexact_runner.budget.calls",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
