"""Is what a compiled region writes, or keeps for its backward, watched, and does it run as ever?"""

from __future__ import annotations

import gc
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from catalogue import compiled as programs
from torch._dynamo.utils import counters

import torchguard
from torchguard._saves import LEDGER

pytestmark = pytest.mark.filterwarnings("ignore")

REGIONS = [programs._intermediate, programs._input, programs._output, programs._random]


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def run(function: Callable[..., Any], backend: str, writes: bool) -> Any:
    torch.manual_seed(0)
    x, h = programs._inputs()
    out = torch.compile(function, backend=backend)(x, h, writes)
    out.backward()
    return [x.grad, out.detach(), h, torch.rand(3)]


def counted() -> Any:
    found = (
        sorted(counters["graph_break"].items()),
        counters["stats"]["unique_graphs"],
        counters["stats"]["calls_captured"],
        dict(counters["recompiles"]),
    )
    counters.clear()
    return found


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(map(torch.equal, one, other))


@pytest.mark.parametrize("backend", ["aot_eager", "eager"])
@pytest.mark.parametrize("function", REGIONS)
def test_a_region_that_writes_through_data(function: Callable[..., Any], backend: str) -> None:
    right = run(function, backend, False)
    wrong = run(function, backend, True)
    assert not torch.equal(right[0], wrong[0]), "it does not corrupt"
    torch._dynamo.reset()
    with torchguard.strict() as guard:
        assert same(run(function, backend, False), right)
        assert guard.violations == []
        with pytest.raises(torchguard.SavedTensorCorruptionError) as error:
            run(function, backend, True)
    violation = error.value.violation
    for place in (violation.saved, violation.written):
        assert place is not None
        assert place.file.endswith("compiled.py")
        assert function.__name__ in place.function


@pytest.mark.parametrize("function", REGIONS)
def test_warned_of_it_runs_to_the_same_bits(function: Callable[..., Any]) -> None:
    run(function, "aot_eager", True)
    torch._dynamo.reset()
    counted()
    expected = run(function, "aot_eager", True), counted()
    torch._dynamo.reset()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with torchguard.warn() as guard:
            found = run(function, "aot_eager", True), counted()
    assert same(found[0], expected[0])
    assert found[1] == expected[1]
    assert len(guard.violations) == 1
    assert any(issubclass(note.category, torchguard.SavedTensorCorruptionWarning) for note in told)
    assert same(run(function, "aot_eager", True), expected[0])
    torch._dynamo.reset()
    with torchguard.strict() as guard, torchguard.allow("on purpose"):
        assert same(run(function, "aot_eager", True), expected[0])
    assert guard.violations == []
    assert len(guard.allowed) == 1


def test_a_rehearsal_leaves_nothing_behind() -> None:
    gc.collect()
    before = len(LEDGER)  # what other tests have left
    with torchguard.warn():
        run(programs._intermediate, "aot_eager", True)
        assert len(LEDGER) == before


@pytest.mark.parametrize("every_call", [False, True])
def test_seeing_every_call_adds_no_graph_break(every_call: bool) -> None:
    expected = run(programs._on_another_part, "aot_eager", True), counted()
    torch._dynamo.reset()
    with torchguard.strict(every_call=every_call):
        found = run(programs._on_another_part, "aot_eager", True), counted()
    assert same(found[0], expected[0])
    assert found[1][0] == expected[1][0] == []
    assert found[1][1] == expected[1][1]


def test_operators_of_others_are_not_called_twice() -> None:
    calls = []

    @torch.library.custom_op("torchguard_tests::counted_twice", mutates_args=())
    def operator(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return x * 2

    operator.register_fake(torch.empty_like)
    operator.register_autograd(lambda ctx, grad: grad * 2)

    def function(x: torch.Tensor, h: torch.Tensor, writes: bool) -> torch.Tensor:
        y = operator(x).sin()
        z = y * x
        if writes:
            y.data.mul_(2)
        return z.sum()

    with torchguard.strict() as guard:
        run(function, "aot_eager", True)
    assert len(calls) == 1
    assert any("torch.compile" in told for told in guard.unwatched)


def test_a_stash_outlives_the_guard() -> None:
    """What a compiled function stashed inside is read outside, and the other way round."""
    for inside in (True, False):
        torch._dynamo.reset()
        x, h = programs._inputs()
        guard = torchguard.strict()
        guard.__enter__()
        if not inside:
            guard.__exit__(None, None, None)
        out = torch.compile(programs.stashes, backend="aot_eager")(x, h)
        if inside:
            guard.__exit__(None, None, None)
            out.sum().backward()
        else:
            with torchguard.strict() as guard:
                out.sum().backward()
        assert torch.equal(x.grad, h)
        assert guard.violations == []


def test_parameters_stepped_while_the_stash_is_held() -> None:
    """The loss is still bound when the optimiser writes to what a Function has stashed: nothing reads it again."""
    weight = torch.ones(4, requires_grad=True)
    function = torch.compile(programs.stashes, backend="aot_eager")
    with torchguard.strict() as guard:
        for _ in range(3):
            x, _ = programs._inputs()
            loss = function(x, weight.detach()).sum()
            loss.backward()
            with torch.no_grad():
                weight.sub_(0.1)
            weight.data.mul_(0.9)
    assert guard.violations == []


def test_the_compiler_is_patched_when_it_is_loaded_inside_the_guard() -> None:
    script = """
import torch, torchguard
assert "torch._dynamo" not in __import__("sys").modules
before = dict(vars(torch))
def function(x):
    y = x.sin()
    z = y * x
    y.data.mul_(2)
    return z.sum()
with torchguard.strict():
    compiled = torch.compile(function, backend="aot_eager")
    try:
        compiled(torch.ones(3, requires_grad=True)).backward()
    except torchguard.SavedTensorCorruptionError:
        print("caught")
from torch._dynamo.output_graph import OutputGraph
print(type(vars(OutputGraph)["call_user_compiler"]).__name__, torch.compile is before["compile"])
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=100)
    assert done.stdout.split() == ["caught", "function", "True"], done.stderr


SUBCLASS = """
import torch, torchguard

torchguard.enable("strict", every_call=EVERY_CALL)

class Wrapper(torch.Tensor):
    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], None

    @classmethod
    def __tensor_unflatten__(cls, tensors, *_):
        return cls(tensors["inner"])

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        out = func(*[arg.inner if isinstance(arg, cls) else arg for arg in args], **(kwargs or {}))
        return args[0] if func is torch.ops.aten.copy_.default else out

@torch.compile(fullgraph=True, backend="aot_eager")
def double(state, value):
    state.copy_(value * 2)

state = Wrapper(torch.ones(3))
double(state, torch.ones(3))
torchguard.disable()
double(state, torch.full((3,), 2.0))
print(state.inner.tolist())
"""


@pytest.mark.parametrize("every_call", [False, True])
def test_a_compiled_write_to_a_subclass_where_dynamo_is_loaded_under_the_guard(every_call: bool) -> None:
    """Dynamo guards on what it read of the routed method, by way of the subclass (found with torchao's optimisers)."""
    script = SUBCLASS.replace("EVERY_CALL", str(every_call))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert (done.stdout.strip(), done.returncode) == ("[4.0, 4.0, 4.0]", 0), done.stderr[-2000:]
