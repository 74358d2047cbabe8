"""IterBatch decides how many times each batch deserves to be trained, and proves whether that paid."""

import os
from typing import TYPE_CHECKING, Any

# Threads of OpenMP that wait by spinning make everything many times slower beside other work, and are read
# when PyTorch is loaded (docs/performance.md).
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

__version__ = "0.1.0"
__all__ = [
    "STRATEGIES",
    "BaseTrainingStrategy",
    "Listener",
    "Outcome",
    "Repeater",
    "UserError",
    "compare",
    "enable_prefix_reuse",
    "make_config",
    "run",
]

if TYPE_CHECKING:
    from iterbatch.api import compare, run
    from iterbatch.bench.listener import Listener
    from iterbatch.checks import make_config
    from iterbatch.errors import UserError
    from iterbatch.repeater import Repeater
    from iterbatch.reuse.in_model import enable_prefix_reuse
    from iterbatch.strategy import STRATEGIES, BaseTrainingStrategy
    from iterbatch.study.outcome import Outcome

_HOMES = {
    "run": "iterbatch.api",
    "compare": "iterbatch.api",
    "Outcome": "iterbatch.study.outcome",
    "Repeater": "iterbatch.repeater",
    "enable_prefix_reuse": "iterbatch.reuse.in_model",
    "Listener": "iterbatch.bench.listener",
    "make_config": "iterbatch.checks",
    "UserError": "iterbatch.errors",
    "STRATEGIES": "iterbatch.strategy",
    "BaseTrainingStrategy": "iterbatch.strategy",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that ``iterbatch --help`` need not wait for PyTorch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'iterbatch' has no attribute '{name}'")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
