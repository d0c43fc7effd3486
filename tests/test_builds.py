"""Does the guard stand on a torch that lacks what this one has?

Each program runs in a process of its own, in which torch has lost the name before torchguard is imported.
docs/compatibility.md tells which builds were really run.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

_WITHOUT_TOP = """
import torch
if hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"):
    del torch._C._autograd._top_saved_tensors_default_hooks
import torchguard
from torch.autograd.graph import saved_tensors_hooks
from torchguard import _torch
assert not _torch.SHOWS_HOOKS
packed = []
def pack(tensor):
    packed.append(tensor.shape)
    return tensor
def leaf():
    return torch.ones(3, requires_grad=True)
def corrupt():
    y = leaf().exp()
    y.data.zero_()
    y.sum().backward()
"""

PROGRAMS = {
    "the programs hooks are called, and what is saved under them is watched": """
with torchguard.strict() as guard:
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        try:
            corrupt()
        except torchguard.SavedTensorCorruptionError:
            print("caught")
    assert len(packed) == 1
    leaf().exp().sum().backward()
assert len(packed) == 1 and guard.unwatched == []
""",
    "hooks from before the guard are told, and are there afterwards": """
import warnings
warnings.simplefilter("ignore")
with saved_tensors_hooks(pack, lambda tensor: tensor):
    with torchguard.strict() as guard:
        try:
            corrupt()
        except torchguard.SavedTensorCorruptionError:
            print("caught")
    assert ["pushed before the first guard" in line for line in guard.unwatched] == [True]
    assert packed == []
    leaf().exp()
    assert len(packed) == 1
try:
    torch._C._autograd._pop_saved_tensors_default_hooks()
except RuntimeError:
    pass
else:
    raise AssertionError("a pair is left")
""",
    "what is written under hooks from before the guard is refused in PyTorch's own words": """
import warnings
warnings.simplefilter("ignore")
def refusal():
    y = leaf().exp()
    y.mul_(2)
    try:
        y.sum().backward()
    except RuntimeError as error:
        return type(error), str(error)
expected = refusal()
with saved_tensors_hooks(lambda tensor: tensor * 1, lambda tensor: tensor):
    with torchguard.strict():
        assert refusal() == expected, (refusal(), expected)
        print("caught")
""",
    "a guard that leaves first takes its own pair": """
guard = torchguard.strict()
guard.__enter__()
hooks = saved_tensors_hooks(pack, lambda tensor: tensor)
hooks.__enter__()
guard.__exit__(None, None, None)
leaf().exp()
assert len(packed) == 1
hooks.__exit__()
leaf().exp()
assert len(packed) == 1
with torchguard.strict():
    try:
        corrupt()
    except torchguard.SavedTensorCorruptionError:
        print("caught")
""",
    "a guard left in another thread takes its pair along when the first thread comes by again": """
import threading
def push_and_pop():
    return torch._C._autograd._push_saved_tensors_default_hooks, torch._C._autograd._pop_saved_tensors_default_hooks
found = push_and_pop()
guard = torchguard.strict()
guard.__enter__()
leaving = threading.Thread(target=guard.__exit__, args=(None, None, None))
leaving.start()
leaving.join()
with saved_tensors_hooks(pack, lambda tensor: tensor):  # nobody is on guard, and it lies above
    with torchguard.strict() as guard:
        try:
            corrupt()
        except torchguard.SavedTensorCorruptionError:
            print("caught")
    assert guard.unwatched == [] and len(packed) == 1
    leaf().exp()
    assert len(packed) == 2
assert not _torch.hides_hooks()
assert push_and_pop() == found
""",
    "work that outlives the guard that it was begun under": """
import threading
def push_and_pop():
    return torch._C._autograd._push_saved_tensors_default_hooks, torch._C._autograd._pop_saved_tensors_default_hooks
found = push_and_pop()
begun, go = threading.Event(), threading.Event()
def work():
    begun.set()
    go.wait()
from concurrent.futures import ThreadPoolExecutor
with ThreadPoolExecutor(1) as pool:
    with torchguard.strict():
        working = pool.submit(work)
        begun.wait()
    go.set()
    working.result()
    assert not pool.submit(_torch.hides_hooks).result()
    with torchguard.strict() as guard:
        try:
            pool.submit(corrupt).result()
        except torchguard.SavedTensorCorruptionError:
            print("caught")
assert guard.unwatched == [] and push_and_pop() == found
""",
    "a thread that never ends": """
import threading
def push_and_pop():
    return torch._C._autograd._push_saved_tensors_default_hooks, torch._C._autograd._pop_saved_tensors_default_hooks
found = push_and_pop()
with torchguard.strict():
    threading.Thread(target=threading.Event().wait, daemon=True).start()
    try:
        corrupt()
    except torchguard.SavedTensorCorruptionError:
        print("caught")
assert push_and_pop() == found
""",
    "torch.func switches hooks off and on again": """
with torchguard.strict():
    assert torch.equal(torch.func.grad(lambda x: x.exp().sum())(torch.zeros(2)), torch.ones(2))
    try:
        corrupt()
    except torchguard.SavedTensorCorruptionError:
        print("caught")
assert not _torch.hides_hooks()
""",
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_torch_that_does_not_show_its_hooks(name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_TOP + PROGRAMS[name]],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "caught\n"), done.stderr


_ONE_TENSOR = """
import torch
class _unsafe_preserve_version_counter(torch.autograd._unsafe_preserve_version_counter):
    def __init__(self, tensor):
        self.tensor, self.prev_version = tensor, tensor._version
    def __enter__(self): ...
    def __exit__(self, *error):
        from torchguard import _torch
        _torch.set_version(self.tensor, self.prev_version)
torch.autograd._unsafe_preserve_version_counter = _unsafe_preserve_version_counter
import torchguard
with torchguard.strict():
    y = torch.ones(3, requires_grad=True).exp()
    with torch.autograd._unsafe_preserve_version_counter(y):
        y.detach().zero_()
    try:
        y.sum().backward()
    except torchguard.SavedTensorCorruptionError:
        print("caught")
"""


def test_a_block_that_preserves_one_tensor() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _ONE_TENSOR],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "caught\n"), done.stderr
