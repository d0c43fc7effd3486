"""Under what do the benchmarks run a workload? Nothing, PyTorch's own tools, and torchguard."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

import torchguard

Mode = Callable[[], AbstractContextManager[Any]]


def _identity() -> AbstractContextManager[Any]:
    """Save hooks that do nothing: the floor for a tool that must know what is saved.

    Detaching is what the documentation asks of a pack hook: an output returned as it is makes a cycle.
    """
    return torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, lambda tensor: tensor)


class _Empty(TorchDispatchMode):
    """Sees every operator and does nothing."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


MODES: dict[str, Mode] = {
    "bare": contextlib.nullcontext,
    "identity hooks": _identity,
    "strict": torchguard.strict,
    "strict, at read": lambda: torchguard.strict(at="read"),
    "strict, every call": lambda: torchguard.strict(every_call=True),
    "warn": torchguard.warn,
    "repair": torchguard.repair,
    "watch": torchguard.watch,
    "audit": torchguard.audit,
    "allow_mutation_on_saved_tensors": torch.autograd.graph.allow_mutation_on_saved_tensors,
    "detect_anomaly": lambda: torch.autograd.set_detect_anomaly(True),
    "empty dispatch mode": _Empty,
}
