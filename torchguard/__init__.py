"""torchguard: loud errors where PyTorch's autograd would use silently overwritten saved tensors."""

try:
    from torchguard._violation import (
        SavedTensorCorruptionError,
        SavedTensorCorruptionWarning,
        UnwatchedWarning,
        Violation,
    )
    from torchguard.guard import Guard, allow, strict, warn
except ImportError as error:
    # Another project on PyPI is called torchguard; installed on top of this one it replaces files of it.
    if (error.name or "").startswith("torchguard"):
        raise ImportError(
            "torchguard: files of this package are missing, as when the PyPI project 'torchguard', another one, was "
            "installed over it: pip uninstall torchguard torchguard-autograd && pip install torchguard-autograd"
        ) from None
    raise

__all__ = [
    "Guard",
    "SavedTensorCorruptionError",
    "SavedTensorCorruptionWarning",
    "UnwatchedWarning",
    "Violation",
    "allow",
    "strict",
    "warn",
]

__version__ = "0.1.0"
