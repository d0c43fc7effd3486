"""Is what ``docs/limits.md`` says is not watched really not watched, and told where the page says so?

Each case is corrupting in plain PyTorch, and the guard is silent. One that the guard catches fails here: the page has to be
mended.
"""

from __future__ import annotations

import copy
import ctypes
import queue
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import same_values
from torch.utils.checkpoint import checkpoint

import torchguard

PAGE = " ".join((Path(__file__).parent.parent / "docs" / "limits.md").read_text(encoding="utf-8").split())

Program = Callable[[bool, Callable[[], Any]], list[torch.Tensor]]

#: Taken before any guard.
_NUMPY = torch.Tensor.numpy


def _leaves() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([0.5, 1.5, -2.0], requires_grad=True), torch.tensor([1.0, 2.0, 3.0])


def _grad(w: torch.Tensor, out: torch.Tensor) -> list[torch.Tensor]:
    out.sum().backward()
    assert w.grad is not None
    return [w.grad]


def saved_before(writes: bool, guard: Callable[[], Any]) -> list[torch.Tensor]:
    w, _ = _leaves()
    out = w.sigmoid()
    with guard():
        if writes:
            out.data.zero_()
        return _grad(w, out)


def raw_pointer(writes: bool, guard: Callable[[], Any]) -> list[torch.Tensor]:
    w, _ = _leaves()
    with guard():
        out = w.sigmoid()
        if writes:
            ctypes.memset(out.data_ptr(), 0, 12)
        return _grad(w, out)


def _halve(x: torch.Tensor) -> None:
    x.data.mul_(0.5)


def written_by_a_script(writes: bool, guard: Callable[[], Any]) -> list[torch.Tensor]:
    w, h = _leaves()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        halve = torch.jit.script(_halve)
    with guard():
        out = w * h
        if writes:
            halve(h)
        return _grad(w, out)


class _Stashes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, w: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        ctx.h = h
        return w * h

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return grads[0] * ctx.h, None


def stashed(writes: bool, guard: Callable[[], Any]) -> list[torch.Tensor]:
    w, h = _leaves()
    with guard():
        out = _Stashes.apply(w, h)
        if writes:
            h.data.zero_()
        return _grad(w, out)


def _alias_from_before(make: Callable[[torch.Tensor], torch.Tensor]) -> Program:
    def program(writes: bool, guard: Callable[[], Any]) -> list[torch.Tensor]:
        w, h = _leaves()
        alias = make(h)
        with guard():
            out = w * h
            if writes:
                torch.add(alias, 1, out=alias)
            return _grad(w, out)

    return program


def handed_out_by_a_bound_function(writes: bool, guard: Callable[[], Any]) -> list[torch.Tensor]:
    w, _ = _leaves()
    with guard():
        out = w.sigmoid()
        array = _NUMPY(out.detach())
        if writes:
            array[:] = 0
        return _grad(w, out)


def statistics_through_torch_ops(writes: bool, guard: Callable[[], Any]) -> list[torch.Tensor]:
    norm = torch.nn.BatchNorm1d(2)
    x = torch.tensor([[1.0, 2.0], [3.0, 5.0], [4.0, 9.0]], requires_grad=True)
    with guard():
        out = norm.eval()(x)
        if writes:
            torch.ops.aten.native_batch_norm(
                x.detach(), None, None, norm.running_mean, norm.running_var, True, 0.5, 1e-5
            )
        return _grad(x, out)


def preserved_from_before(writes: bool, guard: Callable[[], Any]) -> list[torch.Tensor]:
    w, h = _leaves()
    block = torch.autograd._unsafe_preserve_version_counter(h)
    block.__enter__()
    with guard():
        out = w * h
        if writes:
            h.add_(1)
        block.__exit__()
        return _grad(w, out)


def counter_set_by_hand(writes: bool, guard: Callable[[], Any]) -> list[torch.Tensor]:
    w, h = _leaves()
    with guard():
        out = w * h
        if writes:
            h.add_(1)
            torch._C._autograd._unsafe_set_version_counter((h,), (0,))  # type: ignore[attr-defined]
        return _grad(w, out)


def checkpoint_from_before(writes: bool, guard: Callable[[], Any]) -> list[torch.Tensor]:
    w, h = _leaves()
    out = checkpoint(lambda x: (x * h).sin(), w, use_reentrant=False)
    with guard():
        if writes:
            h.add_(1)
        return _grad(w, out)


def compiled_before(writes: bool, guard: Callable[[], Any]) -> list[torch.Tensor]:
    def region(x: torch.Tensor) -> torch.Tensor:
        y = x.sigmoid()
        if writes:
            y.data.zero_()
        return y * 1

    torch.compiler.reset()
    compiled = torch.compile(region, backend="aot_eager")
    w, _ = _leaves()
    compiled(w)
    with guard():
        return _grad(w, compiled(w))


def saved_by_a_worker_from_before(writes: bool, guard: Callable[[], Any]) -> list[torch.Tensor]:
    w, _ = _leaves()
    work: queue.Queue[Any] = queue.Queue()
    done: queue.Queue[Any] = queue.Queue()

    def loop() -> None:
        for task in iter(work.get, None):
            done.put(task())

    thread = threading.Thread(target=loop)
    thread.start()
    try:
        with guard():
            work.put(w.sigmoid)
            out = done.get()
            if writes:
                out.data.zero_()
            return _grad(w, out)
    finally:
        work.put(None)
        thread.join()


def descriptor_called_by_hand(writes: bool, guard: Callable[[], Any]) -> list[torch.Tensor]:
    w = torch.ones(2, 2, requires_grad=True)
    h = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    with guard():
        out = w * h
        if writes:
            torch.Tensor.data.__set__(h, h.t())  # type: ignore[attr-defined]
        return _grad(w, out)


def linearized(writes: bool, guard: Callable[[], Any]) -> list[torch.Tensor]:
    x = torch.tensor([0.5, 1.5, -2.0])
    with guard(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it scripts, and its graph complains
        _, push = torch.func.linearize(torch.sin, x)
        if writes:
            x.data.zero_()
        return [push(torch.ones(3))]


#: What the page says, and the program that shows it.
NOT_WATCHED: dict[str, tuple[str, Program]] = {
    "saved before": ("Tensors saved before the guard was entered.", saved_before),
    "raw pointer": ("kernels and C++ code through raw pointers (`data_ptr()`)", raw_pointer),
    "script": ("TorchScript that writes through a `.data` of its own", written_by_a_script),
    "stash": ("tensors that a Function stashed as `ctx.x = x` in eager mode", stashed),
    "data": ("through an alias that was made before the guard** (by `.data`,", _alias_from_before(lambda x: x.data)),
    "set_": ("`set_`,", _alias_from_before(lambda x: torch.empty(0).set_(x))),
    "copy": ("`copy.copy`", _alias_from_before(copy.copy)),
    "bound": (
        "**A function bound before the guard that hands memory out** (`f = torch.Tensor.numpy`)",
        handed_out_by_a_bound_function,
    ),
    "statistics": ("**Running statistics of batch normalisation**", statistics_through_torch_ops),
    "preserved": ("**In a `_unsafe_preserve_version_counter` block** that was entered before", preserved_from_before),
    "by hand": ("A direct call of `_unsafe_set_version_counter`", counter_set_by_hand),
    "checkpoint": ("**What a checkpoint reads** if it was made before the guard", checkpoint_from_before),
    "compiled": ("**Regions that were compiled before the guard**", compiled_before),
    "worker": ("**Hand-written worker threads that were there before the guard**", saved_by_a_worker_from_before),
    "linearize": ("**What `torch.func.linearize` traced**", linearized),
    "descriptor": ("**`torch.Tensor.data.__set__(x, x.t())`**", descriptor_called_by_hand),
}


@pytest.mark.parametrize("name", NOT_WATCHED)
def test_what_the_page_says_is_not_watched_is_not(name: str) -> None:
    sentence, program = NOT_WATCHED[name]
    assert sentence in PAGE, "the page does not say so"
    guards: list[torchguard.Guard] = []

    def guard() -> torchguard.Guard:
        guards.append(torchguard.strict())
        return guards[-1]

    no_guard = torch.enable_grad
    assert not same_values(list(program(True, no_guard)), list(program(False, no_guard))), "nothing is corrupted"
    program(True, guard)
    assert guards[0].violations == [], "it is watched after all: take it off the page"


def _tensor_without_memory() -> None:
    (torch.eye(2).to_sparse().requires_grad_() * 2).to_dense().sum().backward()


def _copy_slices() -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        y = x.clone()
        y[0].mul_(x[1])
        return y.sum()

    torch.func.grad(program)(torch.ones(3))


def _worker_that_writes() -> None:
    w, _ = _leaves()
    out = w.sigmoid()
    assert out is not None


TOLD = {
    "layout sparse": ("(sparse, opaque)", _tensor_without_memory),
    "CopySlices": ("what `CopySlices` nodes", _copy_slices),
}


@pytest.mark.parametrize("name", TOLD)
def test_what_the_page_says_is_told_is_told_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sentence, program = TOLD[name]
    assert sentence in PAGE, "the page does not say so"
    monkeypatch.setattr("torchguard._findings.told", set())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            with torchguard.strict() as guard:
                program()
                program()
            assert [text for text in guard.unwatched if name in text]
            assert guard.violations == []
    told = [str(one.message) for one in caught if issubclass(one.category, torchguard.UnwatchedWarning)]
    assert len([text for text in told if name in text]) == 1


def test_that_warnings_are_errors_breaks_no_program() -> None:
    with warnings.catch_warnings(), torchguard.strict() as guard:
        warnings.simplefilter("error")
        _tensor_without_memory()
    assert guard.unwatched
