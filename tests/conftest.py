"""Does every test leave torch as it found it?"""

from __future__ import annotations

import concurrent.futures.thread
import copyreg
import gc
import multiprocessing.pool
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.utils.checkpoint
from harness import program_hooks
from hypothesis import settings

import torchguard
from torchguard import _hooks, _intercept, _policy, _torch
from torchguard._aliases import _SLACK, ALIASES
from torchguard._hooked import HookedSave
from torchguard._saves import LEDGER

# Pickling and swap_tensors note it on the class, whoever comes first.
copyreg._slotnames(torch.Tensor)  # type: ignore[attr-defined]
copyreg._slotnames(torch.nn.Parameter)  # type: ignore[attr-defined]

# The same examples in every run; `--hypothesis-profile search` draws new ones, many more, and remembers what failed.
settings.register_profile("fixed", derandomize=True, database=None)
settings.register_profile("search", max_examples=2000)
settings.load_profile("fixed")

#: Everything that a guard patches something in.
NAMESPACES: dict[str, Any] = {
    "torch.Tensor": torch.Tensor,
    "torch": torch,
    "torch.nn.functional": torch.nn.functional,
    "torch._C._nn": torch._C._nn,
    "torch._VF": torch._VF,
    "torch._C._autograd": torch._C._autograd,
    "torch.autograd": torch.autograd,
    "the work of executors": concurrent.futures.thread._WorkItem,
    "ThreadPool": multiprocessing.pool.ThreadPool,
    "BackwardCFunction": torch.autograd.function.BackwardCFunction,
    "_unsafe_preserve_version_counter": torch.autograd._unsafe_preserve_version_counter,
    "threading.Thread": threading.Thread,
    "torch.utils.checkpoint": torch.utils.checkpoint,
    "CheckpointFunction": torch.utils.checkpoint.CheckpointFunction,
    "torch.UntypedStorage": torch.UntypedStorage,
    "torch.utils.dlpack": torch.utils.dlpack,
    "torch._C": torch._C,
    **{f"process groups: {owner.__name__}": owner for owner in _torch.PROCESS_GROUPS},
    **{f"{owner.__name__}": owner for owner, _ in _torch.BROADCAST_COALESCED},
    "the table of TorchScript's builtins": None,
}

#: torch replaces these itself, when ``torch._dynamo`` is imported, or first looked for.
REPLACED_BY_TORCH = {("torch", "manual_seed"), ("torch.distributed", "_spmd_types_available")}


def _contents(owner: Any) -> dict[Any, Any]:
    if owner is not None:
        return dict(vars(owner))
    # torch enters operators here as they are first asked for: what counts is what the guard enters, and its
    # originals.
    wrappers = [wrapper for wrapper, _ in _intercept._script_names]
    relevant = {id(wrapper) for wrapper in wrappers} | {id(wrapper.__wrapped__) for wrapper in wrappers}
    return {key: value for key, value in (torch.jit._builtins._builtin_table or {}).items() if key in relevant}


torch.set_num_threads(1)  # the tensors are small, and two test processes share the machine

with torchguard.strict():
    pass  # the first guard has torch fill its tables, once


class Found:
    """What torch looks like at one moment: every attribute that a guard may patch, and this thread's stacks."""

    def __init__(self) -> None:
        self.namespaces = {name: _contents(owner) for name, owner in NAMESPACES.items()}
        self.hooks = hook_stack()
        self.modes = mode_stack()

    def differences(self) -> list[str]:
        """What is not the same *object* any more, in words; empty where torch is as it was found."""
        told = []
        for name, owner in NAMESPACES.items():
            before, now = self.namespaces[name], _contents(owner)
            if len(before) == len(now) and all(now.get(key) is value for key, value in before.items()):
                continue
            missing = object()
            told += [
                f"{name}: {key}"
                for key in before.keys() | now.keys()
                # A submodule that was imported meanwhile, or a warning registry, is nobody's patch.
                if before.get(key, missing) is not now.get(key, missing)
                and (key in before or not _harmless(key, now[key]))
                and (name, key) not in REPLACED_BY_TORCH
            ]
        if not _same(self.hooks, hook_stack()):
            told.append("the stack of saved tensor hooks")
        if not _same(self.modes, mode_stack()):
            told.append("the stack of function modes")
        return told


def _harmless(key: Any, value: Any) -> bool:
    return key == "__warningregistry__" or isinstance(value, type(torch))


def _same(before: list[Any], now: list[Any]) -> bool:
    return len(before) == len(now) and all(a is b for a, b in zip(before, now, strict=True))


def hook_stack() -> list[Any]:
    """The pack hooks on this thread's stack, innermost last."""
    autograd = torch._C._autograd
    if not hasattr(autograd, "_top_saved_tensors_default_hooks") and not _torch.top_hooks():
        return ["a pair that this torch does not show"] if _torch.hides_hooks() else []
    pairs = []
    while (top := program_hooks()) is not None:
        autograd._pop_saved_tensors_default_hooks()
        pairs.append(top)
    for pair in reversed(pairs):
        autograd._push_saved_tensors_default_hooks(*pair)
    return [pair[0] for pair in reversed(pairs)]


def mode_stack() -> list[Any]:
    """The function modes on this thread's stack, innermost last."""
    return [torch._C._get_function_stack_at(i) for i in range(torch._C._len_torch_function_stack())]


def _clear_up() -> None:
    """One test's failure must not be the next one's."""
    while program_hooks() is not None:
        torch._C._autograd._pop_saved_tensors_default_hooks()
    while torch._C._len_torch_function_stack():
        torch._C._pop_torch_function_stack()
    _policy.entered.clear()
    _policy.process_wide.clear()
    _policy.state.guards.clear()
    _policy.state.reasons.clear()
    _policy.state.every_call = 0
    _hooks._lifted.pairs.clear()
    while _intercept._installed > 0:
        _intercept.uninstall()
    _intercept._installed = 0


def _forget_cycles() -> None:
    """A pack hook that returns an output itself makes a cycle that nobody collects, guarded or not."""
    LEDGER.file()
    for storage, group in list(LEDGER.groups.items()):
        if any(isinstance(item(), HookedSave) for item in group):
            LEDGER._close(storage)


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Any]:
    """A process group of this process alone."""
    if not (dist.is_available() and dist.is_gloo_available()):
        pytest.skip("this torch has no gloo")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


@pytest.fixture
def empty_ledger() -> None:
    """What other tests have left in uncollectable cycles of their own is not to be counted, nor the aliases of it: what
    lives of them is swept late, and a storage that is gone may have left its address to one of this test's.
    """
    gc.collect()
    LEDGER.file()
    for storage in list(LEDGER.groups):
        LEDGER._close(storage)
    for by_storage in (ALIASES.by_storage, ALIASES.young, ALIASES._spans, ALIASES._judged):
        by_storage.clear()
    ALIASES._sweep_at = _SLACK


@pytest.fixture
def found() -> Callable[[], Found]:
    """Takes down what torch looks like now; ``.differences()`` tells what has changed since."""
    return Found


class _Everything(set[str]):
    def __contains__(self, item: object) -> bool:
        return True


@pytest.fixture(autouse=True)
def what_cannot_be_watched_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The warning comes once a process: in whichever test is first. ``test_limits.py`` asks for it."""
    monkeypatch.setattr("torchguard._findings.told", _Everything())


@pytest.fixture(autouse=True)
def torch_as_found() -> Iterator[None]:
    """No hook, no mode, no guard and no patch outlives a test."""
    before = Found()
    yield
    _forget_cycles()
    left = before.differences()
    if _policy.entered or _policy.state.guards:
        left.append(f"guards that are still entered: {_policy.entered or _policy.state.guards}")
    if _policy.state.reasons or _policy.state.every_call or _intercept._installed:
        left.append("an allow block, a mode or the patches")
    if left:
        _clear_up()
        for name in ("torch.Tensor", "torch", "torch.nn.functional", "threading.Thread"):
            for key, value in before.namespaces[name].items():
                if vars(NAMESPACES[name]).get(key) is not value:
                    setattr(NAMESPACES[name], key, value)
        table = torch.jit._builtins._get_builtin_table()
        for key in _contents(None).keys() - before.namespaces["the table of TorchScript's builtins"].keys():
            del table[key]
        pytest.fail("the test left torch changed: " + ", ".join(left[:8]))
