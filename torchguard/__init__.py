"""torchguard: loud errors where PyTorch's autograd would use silently overwritten saved tensors."""

from torchguard._violation import SavedTensorCorruptionError, SavedTensorCorruptionWarning, Violation
from torchguard.guard import Guard, allow, strict, warn

__all__ = [
    "Guard",
    "SavedTensorCorruptionError",
    "SavedTensorCorruptionWarning",
    "Violation",
    "allow",
    "strict",
    "warn",
]

__version__ = "0.1.0"
