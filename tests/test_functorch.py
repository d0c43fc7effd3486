"""Does a function under torch.func run as ever while each of its saves is watched, and is nothing left behind?"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from test_transparency import attempt, frozen, transparent
from torch import nn
from torch._dynamo.utils import counters
from torch.func import functional_call, grad, hessian, jacrev, vjp, vmap
from torch.overrides import TorchFunctionMode

import torchguard
from torchguard._aliases import ALIASES
from torchguard._saves import LEDGER

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def function(t: torch.Tensor) -> torch.Tensor:
    y = t.sin() * t
    y.add_(1)
    return (y.exp() * t).sum()


def corrupting(t: torch.Tensor) -> torch.Tensor:
    y = t.sin()
    z = y * t
    y.data.add_(1)
    return z.sum()


def modes() -> int:
    return int(torch._C._len_torch_function_stack())


# ---- what is watched, and what is told ----------------------------------------------------------------------------


def test_nothing_is_told_of_what_is_watched() -> None:
    with torchguard.strict() as guard:
        hessian(function)(torch.randn(3))
        vmap(grad(function))(torch.randn(2, 3))
        w = torch.randn(3, requires_grad=True)
        with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
            w.exp().sum().backward()
    assert guard.unwatched == []


def test_what_a_node_hides_is_told_by_name() -> None:
    """An in-place operation on a view makes a node inside a node, and the inner one cannot be asked for."""

    def program(t: torch.Tensor) -> torch.Tensor:
        y = t * 2
        y[1:].mul_(t[1:])
        return y.sum()

    with torchguard.strict() as guard:
        grad(program)(torch.randn(3))
        grad(program)(torch.randn(3))
    (told,) = guard.unwatched
    assert "CopySlices" in told
    assert "torch.func" in told


def test_the_report_names_the_places() -> None:
    with torchguard.strict(), pytest.raises(torchguard.SavedTensorCorruptionError) as error:
        vmap(grad(corrupting))(torch.randn(2, 3))
    violation = error.value.violation
    assert violation.saved is not None
    assert violation.aliased is not None
    assert violation.written is not None
    assert violation.saved.source == "z = y * t"
    assert violation.aliased.source == violation.written.source == "y.data.add_(1)"
    assert (violation.shape, violation.elements, violation.of) == ((2, 3), 6, 6)
    assert violation.saved_by == "mul"


@pytest.mark.parametrize("transform", [grad, jacrev, hessian, lambda f: lambda x: vjp(f, x)[1](torch.ones(()))])
def test_allow_permits_it(transform: Callable[..., Any]) -> None:
    def program(t: torch.Tensor) -> torch.Tensor:
        with torchguard.allow("on purpose"):
            return corrupting(t)

    x = torch.randn(3)
    expected = transform(corrupting)(x)
    with torchguard.strict() as guard:
        found = transform(program)(x)
    assert frozen(found) == frozen(expected)
    assert guard.violations == []
    assert {violation.allowed for violation in guard.allowed} == {"on purpose"}


def test_a_guard_entered_inside_watches_inside() -> None:
    def program(t: torch.Tensor) -> torch.Tensor:
        with torchguard.warn() as guard, pytest.warns(torchguard.SavedTensorCorruptionWarning):
            result = corrupting(t)
        assert len(guard.violations) == 1
        assert modes() == 0
        return result

    x = torch.randn(3)
    assert frozen(grad(program)(x)) == frozen(grad(corrupting)(x))


def test_a_thread_started_inside_a_guard() -> None:
    import threading

    told: list[Any] = []
    with torchguard.strict():
        thread = threading.Thread(target=lambda: told.append(attempt(grad(corrupting), torch.randn(3))))
        thread.start()
        thread.join()
    assert told[0][0] is torchguard.SavedTensorCorruptionError


# ---- nothing is left behind ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("every_call", [False, True])
def test_the_mode_is_there_only_while_hooks_are_off(every_call: bool) -> None:
    seen = []

    def program(t: torch.Tensor) -> torch.Tensor:
        seen.append(modes())
        return function(t)

    def fails(t: torch.Tensor) -> torch.Tensor:
        function(t)
        raise ValueError("no")

    with torchguard.strict(every_call=every_call):
        outside = modes()
        grad(program)(torch.randn(3))
        grad(lambda t: grad(program)(t).sum())(torch.randn(3))
        assert modes() == outside == every_call
        for raising in (fails, corrupting):
            with pytest.raises((ValueError, torchguard.SavedTensorCorruptionError)):
                grad(lambda t, raising=raising: grad(raising)(t).sum())(torch.randn(3))
            assert modes() == outside
    assert set(seen) == {outside + 1}
    grad(program)(torch.randn(3))
    assert seen[-1] == modes() == 0


def test_a_guard_left_inside_a_transform() -> None:
    """Entered outside, left inside, as a generator may do it."""
    guard = torchguard.strict()
    guard.__enter__()

    def program(t: torch.Tensor) -> torch.Tensor:
        guard.__exit__(None, None, None)
        assert modes() == 0
        return function(t)

    x = torch.randn(3)
    assert frozen(grad(program)(x)) == frozen(grad(function)(x))


@pytest.mark.usefixtures("empty_ledger")
def test_no_save_outlives_the_transform() -> None:
    leaked: list[Any] = []

    def program(t: torch.Tensor) -> torch.Tensor:
        y = t.sin()
        leaked.append(weakref.ref(torch._C._functorch.get_unwrapped(y)))
        return (y * t).sum()

    with torchguard.strict():
        grad(program)(torch.randn(3))
        _, pull = vjp(program, torch.randn(3))
        assert len(LEDGER) > 0
        pull(torch.ones(()))
        del pull
        gc.collect()
        assert len(LEDGER) == 0
        assert [ref() for ref in leaked] == [None] * 2


@pytest.mark.usefixtures("empty_ledger")
def test_many_steps_leave_nothing_behind() -> None:
    x = torch.randn(3)
    with torchguard.strict():
        for _ in range(200):
            hessian(function)(x)
        assert len(LEDGER) == 0
        assert len(ALIASES.by_storage) < 64


# ---- as without a guard -------------------------------------------------------------------------------------------


@transparent
def test_users_hooks_on_single_saves() -> Any:
    """Somebody else may register hooks on what a node saved, as long as the guard's are not there."""
    x = torch.randn(3)
    seen: list[Any] = []

    def program(t: torch.Tensor) -> torch.Tensor:
        y = t.exp()
        node = y.grad_fn
        seen.append([type(node).__name__, node._saved_result.shape, node._saved_result.grad_fn is node])  # type: ignore[union-attr]
        seen.append(y.requires_grad)
        return (y * t).sum()

    return [grad(program)(x), seen]


@transparent
def test_modes_of_the_program() -> Any:
    calls: list[str] = []

    class Log(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.append(getattr(func, "__name__", str(func)))
            return func(*args, **(kwargs or {}))

    def program(t: torch.Tensor) -> torch.Tensor:
        with Log():
            return function(t)

    x = torch.randn(3)
    results = [grad(program)(x)]
    with Log():
        results.append(grad(function)(x))
    with torch.device("cpu"):
        results.append(grad(lambda t: function(t * torch.ones(3)))(x))
    return [results, calls]


@transparent
def test_random_numbers() -> Any:
    def program(t: torch.Tensor) -> torch.Tensor:
        y = nn.functional.dropout(t.sin(), 0.5)
        y.data.clone().bernoulli_(0.5)
        return (y * torch.rand(3)).sum()

    x = torch.randn(2, 3)
    results = [grad(program)(x[0]), torch.rand(2)]
    for randomness in ("different", "same", "error"):
        results.append(attempt(vmap(grad(program), randomness=randomness), x))
    return [results, torch.rand(2)]


class Scale(torch.autograd.Function):
    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[0], output)
        ctx.given = inputs[0].shape

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:  # type: ignore[override]
        x, output = ctx.saved_tensors
        return g * 2 + 0 * (x + output)

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: torch.Tensor) -> Any:
        return Scale.apply(x), in_dims[0]


class OldStyle(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> Any:  # type: ignore[override]
        return g * 2


@transparent
def test_custom_functions() -> Any:
    x = torch.randn(3)

    def program(t: torch.Tensor) -> torch.Tensor:
        return (Scale.apply(t.sin()) * t).sum()

    return [
        grad(program)(x),
        grad(lambda t: grad(program)(t).sum())(x),
        vmap(grad(program))(x[None]),
        attempt(grad(lambda t: OldStyle.apply(t).sum()), x),
    ]


@transparent
def test_layers() -> Any:
    model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.GroupNorm(1, 3), nn.GELU(), nn.Flatten(0), nn.Linear(9, 2)).eval()
    attention = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    x, tokens = torch.randn(2, 4), torch.randn(1, 3, 4)

    def loss(module: nn.Module, given: torch.Tensor) -> Callable[..., torch.Tensor]:
        return lambda parameters: functional_call(module, parameters, (given,)).square().mean()

    return [
        grad(loss(module, given))({name: p.detach() for name, p in module.named_parameters()})
        for module, given in ((model, x), (attention, tokens))
    ]


# ---- with torch.compile -------------------------------------------------------------------------------------------


def counted() -> Any:
    found = (
        sorted(counters["graph_break"].items()),
        counters["stats"]["unique_graphs"],
        counters["stats"]["calls_captured"],
        dict(counters["recompiles"]),
    )
    counters.clear()
    return found


COMPILED: dict[str, Callable[[str, torch.Tensor], Any]] = {
    "grad inside": lambda backend, x: torch.compile(lambda t: grad(function)(t) * 2, backend=backend)(x),
    "vmap of grad inside": lambda backend, x: torch.compile(vmap(grad(function)), backend=backend)(x[None]),
    "grad outside": lambda backend, x: grad(torch.compile(function, backend=backend))(x),
    "vjp outside": lambda backend, x: vjp(torch.compile(function, backend=backend), x)[1](torch.ones(())),
}


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("where", COMPILED)
def test_compiled(where: str, backend: str) -> None:
    x = torch.linspace(-1, 1, 3)
    attempt(COMPILED[where], backend, x)
    torch._dynamo.reset()
    counted()
    expected = frozen(attempt(COMPILED[where], backend, x)), counted()
    torch._dynamo.reset()
    with torchguard.strict() as guard:
        found = frozen(attempt(COMPILED[where], backend, x)), counted()
    assert found == expected
    assert guard.violations == []


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_before_the_guard_and_run_inside_and_after(backend: str) -> None:
    x = torch.linspace(-1, 1, 3)
    compiled = torch.compile(lambda t: grad(function)(t) * 2, backend=backend)
    expected = compiled(x)
    counted()
    with torchguard.strict() as guard:
        assert torch.equal(compiled(x), expected)
    assert torch.equal(compiled(x), expected)
    assert counted()[1] == 0
    assert guard.violations == guard.unwatched == []
