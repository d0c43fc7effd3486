"""A checkpoint's function makes a tensor of a NumPy array that somebody writes to before backward runs it again."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import torchguard
from torchguard import SavedTensorCorruptionError

Array = Any
BOTH = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non_reentrant"])

#: How a function may get at the array.
TAKEN: dict[str, Callable[[Array], torch.Tensor]] = {
    "from_numpy": lambda n: torch.from_numpy(n),
    "as_tensor": lambda n: torch.as_tensor(n),
    "asarray": lambda n: torch.asarray(n),
    "from_dlpack": lambda n: torch.from_dlpack(n),
    "of a part": lambda n: torch.from_numpy(n[1:4]),
    "a part of it": lambda n: torch.from_numpy(n)[1:4],
    "twice": lambda n: torch.from_numpy(n) + torch.from_numpy(n),
    "strided": lambda n: torch.from_numpy(n[::2]),
    "converted": lambda n: torch.from_numpy(n).double(),
}
FUNCTIONS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "saved": lambda x, t: x * t,
    "weighs": lambda x, t: (x + t).sin(),
    "not needed": lambda x, t: x.sin() + t,
    "of its sign only": lambda x, t: x * t.sign(),
}


def gradient(
    function: Callable[[torch.Tensor], torch.Tensor],
    write: Callable[[], object] | None,
    reentrant: bool,
    guard: AbstractContextManager[Any] | None = None,
) -> torch.Tensor:
    x = torch.tensor(0.5, requires_grad=True)
    with guard or nullcontext():
        out = checkpoint(function, x, use_reentrant=reentrant)
        if write is not None:
            write()
        out.sum().backward()
    assert x.grad is not None
    return x.grad


def array() -> Array:
    return np.linspace(1, 2, 6)


@BOTH
@pytest.mark.parametrize("value", [0.0, 5.0])
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("taken", TAKEN)
def test_it_is_told_where_a_gradient_depends_on_it(taken: str, name: str, value: float, reentrant: bool) -> None:
    def run(write: bool, guard: torchguard.Guard | None = None) -> torch.Tensor:
        n = array()
        return gradient(
            lambda x: (
                FUNCTIONS[name](x, TAKEN[taken](n)).tanh()
                if name != "not needed"
                else FUNCTIONS[name](x, TAKEN[taken](n))
            ),
            (lambda: n.fill(value)) if write else None,
            reentrant,
            guard,
        )

    plain, truth = run(True), run(False)
    corrupts = not torch.equal(plain, truth)
    assert corrupts is (name != "not needed" and (name != "of its sign only" or value == 0))
    guard = torchguard.strict()
    if corrupts:
        with pytest.raises(SavedTensorCorruptionError):
            run(True, guard)
    else:
        assert torch.equal(run(True, guard), truth)
    assert [violation.kind for violation in guard.violations] == ["recompute"] * corrupts
    clean = torchguard.strict()
    assert torch.equal(run(False, clean), truth)
    assert clean.violations == clean.unwatched == []


@BOTH
def test_another_part_of_the_array_may_be_written_to(reentrant: bool) -> None:
    n = array()

    def write() -> None:
        n[4:] = 7

    guard = torchguard.strict()
    found = gradient(lambda x: (x * torch.from_numpy(n[:4])).tanh(), write, reentrant, guard)
    assert torch.equal(found, gradient(lambda x: (x * torch.from_numpy(n[:4])).tanh(), None, reentrant))
    assert guard.violations == []


@BOTH
def test_what_is_the_functions_own_business(reentrant: bool) -> None:
    """It makes its array itself, or counts in one."""
    calls = np.zeros(3)

    def own(x: torch.Tensor) -> torch.Tensor:
        return (x * torch.from_numpy(np.ones(3))).tanh()

    def counting(x: torch.Tensor) -> torch.Tensor:
        calls[:] += 1
        seen = torch.from_numpy(calls)
        seen.add_(1)
        return x.sin()

    for function in (own, counting):
        guard = torchguard.strict()
        assert torch.equal(gradient(function, None, reentrant, guard), gradient(function, None, reentrant))
        assert guard.violations == []


@BOTH
def test_the_array_is_not_kept_alive(reentrant: bool) -> None:
    box = [array()]
    gone = weakref.ref(box[0])
    x = torch.tensor(0.5, requires_grad=True)
    with torchguard.strict() as guard:
        out = checkpoint(lambda x: (x * torch.from_numpy(box[0])).tanh(), x, use_reentrant=reentrant)
        box[0] = np.zeros(6)
        gc.collect()
        assert gone() is None
        out.sum().backward()
    assert guard.violations == []


@BOTH
@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_a_read_only_array_is_nobodys_to_write_to(reentrant: bool) -> None:
    n = np.frombuffer(np.ones(3).tobytes())
    assert not n.flags.writeable
    guard = torchguard.strict()
    gradient(lambda x: (x * torch.from_numpy(n)).tanh(), None, reentrant, guard)
    assert guard.violations == []


@BOTH
def test_each_write_is_told_once(reentrant: bool) -> None:
    n = array()
    x = torch.tensor(0.5, requires_grad=True)
    with torchguard.Guard("record") as guard:
        out = checkpoint(lambda x: (x * torch.from_numpy(n)).tanh(), x, use_reentrant=reentrant)
        n.fill(0)
        out.sum().backward(retain_graph=True)
        assert len(guard.violations) == 1
        out.sum().backward(retain_graph=True)
        assert len(guard.violations) == 1, "what was told is accepted"
        n.fill(3)
        out.sum().backward()
    assert len(guard.violations) == 2


@BOTH
def test_threads_make_tensors_of_their_own(reentrant: bool) -> None:
    failures: list[str] = []

    def once(write: bool) -> None:
        n = array()
        guard = torchguard.Guard("record")
        gradient(lambda x: (x * torch.from_numpy(n)).tanh(), (lambda: n.fill(0)) if write else None, reentrant, guard)
        if bool(guard.violations) is not write:
            failures.append(f"{write}: {guard.violations}")

    def work(write: bool) -> None:
        for _ in range(10):
            once(write)

    threads = [threading.Thread(target=work, args=(write,)) for write in (True, False) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
