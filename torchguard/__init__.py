"""torchguard: loud errors where PyTorch's autograd would use silently overwritten saved tensors.

Importing this package imports neither torch nor wrapt; its names do, when they are first used. The pytest plugin and
the command line rest on that. (PYTEST_DONT_REWRITE: the package may be in use before pytest is.)
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torchguard._switch import disable, enable
    from torchguard._violation import (
        SavedTensorCorruptionError,
        SavedTensorCorruptionWarning,
        UnwatchedWarning,
        Violation,
    )
    from torchguard.guard import Guard, allow, audit, repair, strict, warn, watch

__all__ = [
    "Guard",
    "SavedTensorCorruptionError",
    "SavedTensorCorruptionWarning",
    "UnwatchedWarning",
    "Violation",
    "allow",
    "audit",
    "disable",
    "enable",
    "repair",
    "strict",
    "warn",
    "watch",
]

__version__ = "0.1.0"

_HOMES = {
    "Guard": "guard",
    "SavedTensorCorruptionError": "_violation",
    "SavedTensorCorruptionWarning": "_violation",
    "UnwatchedWarning": "_violation",
    "Violation": "_violation",
    "allow": "guard",
    "audit": "guard",
    "disable": "_switch",
    "enable": "_switch",
    "repair": "guard",
    "strict": "guard",
    "warn": "guard",
    "watch": "guard",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    try:
        value: object = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    except ImportError as error:
        # Another project on PyPI is called torchguard; installed on top of this one it replaces files of it.
        if (error.name or "").startswith("torchguard"):
            raise ImportError(
                "torchguard: files of this package are missing, as when the PyPI project 'torchguard', another one, "
                "was installed over it: pip uninstall torchguard torchguard-autograd && pip install torchguard-autograd"
            ) from None
        raise
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
