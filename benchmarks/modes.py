"""Under what do the benchmarks run a workload? Nothing, PyTorch's own tools, and torchguard."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

import torchguard


def _identity() -> AbstractContextManager[Any]:
    """Save hooks that do nothing: the floor for a tool that must know what is saved.

    Detaching is what the documentation asks of a pack hook: an output returned as it is makes a cycle.
    """
    return torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, lambda tensor: tensor)


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "bare": contextlib.nullcontext,
    "identity hooks": _identity,
    "strict": torchguard.strict,
    "warn": torchguard.warn,
    "strict, every call": lambda: torchguard.strict(every_call=True),
    "strict, at the read": lambda: torchguard.strict(at="read"),
    "repair": torchguard.repair,
    "repair, patches alone": lambda: torchguard.repair(every_call=False),
    "audit": torchguard.audit,
    "allow_mutation_on_saved_tensors": torch.autograd.graph.allow_mutation_on_saved_tensors,
}
