"""Does torch.compile compile the same graphs, with no break added, and run to the same bits with the guard on as off?"""

from __future__ import annotations

import contextlib
import functools
import shutil
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.nn.functional as F
from test_transparency import Ballast, attempt, difference, frozen
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import torchguard

pytestmark = pytest.mark.filterwarnings("ignore")

BACKENDS = ["eager", "aot_eager"]
GUARDS = {"strict": torchguard.strict, "warn": torchguard.warn}
HAS_COMPILER = shutil.which("g++") is not None or shutil.which("clang++") is not None


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def pointwise(x: torch.Tensor) -> torch.Tensor:
    return x.sin() * x.exp()


def in_place(x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    y.add_(1)
    y += x
    y[0] = 1
    torch.relu_(y)
    return F.relu(y * x, inplace=True).sigmoid()


def inplace_functionals(x: torch.Tensor) -> torch.Tensor:
    y = F.elu(x * 1, inplace=True)
    return F.hardtanh(F.leaky_relu_(y * 2) * 1, inplace=True) * x


def reads_data(x: torch.Tensor) -> torch.Tensor:
    scale = x.data.abs().max()
    return (x / (scale + 1)).exp() * x.detach()


def writes_to_data_of_a_copy(x: torch.Tensor) -> torch.Tensor:
    y = (x * 2).detach()
    y.data.mul_(2)
    return x * y


def foreach(x: torch.Tensor) -> torch.Tensor:
    parts = [x * 1, x * 2]
    torch._foreach_mul_(parts, 2)
    return parts[0] * parts[1]


def breaks(x: torch.Tensor) -> torch.Tensor:
    y = (x * 2).sin_()
    torch._dynamo.graph_break()
    y.add_(1)
    return y * x


def views(x: torch.Tensor) -> torch.Tensor:
    y = x.t() * 1
    y[1:].mul_(2)
    return y.reshape(-1)[::2].exp()


def checkpointed(x: torch.Tensor) -> torch.Tensor:
    return checkpoint(lambda t: (t * 2).relu_().exp(), x, use_reentrant=False)


def custom(x: torch.Tensor) -> torch.Tensor:
    return Cube.apply(x) * x


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return grad * 3 * x**2


def by_the_class(x: torch.Tensor) -> torch.Tensor:
    y = torch.Tensor.add_(x * 2, 1)
    for method in (torch.Tensor.mul_, torch.Tensor.sub_):
        method(y, x)
    return functools.partial(torch.Tensor.clamp_, y)(max=3) * x


FUNCTIONS = [by_the_class, pointwise, in_place, inplace_functionals, reads_data, writes_to_data_of_a_copy, foreach,
             breaks, views, checkpointed, custom]  # fmt: skip


def use(function: Callable[..., Any]) -> Any:
    """Call with and without gradients, and go backward."""
    torch.manual_seed(0)
    x = torch.randn(3, 4, requires_grad=True)
    out = function(x)
    out.sum().backward()
    with torch.no_grad():
        plain = function(x)
    second = function(x)
    second.square().mean().backward()
    return frozen([out.detach(), plain, x, second.detach(), type(out).__name__])


def compiled(function: Callable[..., Any], backend: str) -> Any:
    return torch.compile(function, backend=backend)


def counted() -> dict[str, Any]:
    """What dynamo did since it was last asked."""
    numbers = {
        "breaks": sorted(counters["graph_break"].items()),
        "graphs": counters["stats"]["unique_graphs"],
        "calls": counters["stats"]["calls_captured"],
        "frames": dict(counters["frames"]),
        "unimplemented": dict(counters["unimplemented"]),
        "recompiles": dict(counters["recompiles"]),
    }
    counters.clear()
    return numbers


@contextlib.contextmanager
def under(guard: str) -> Iterator[None]:
    with GUARDS[guard]() as entered:
        ballast = Ballast()
        yield
        del ballast
    assert entered.violations == []


@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_same_graphs_and_results(function: Callable[..., Any], backend: str, guard: str) -> None:
    use(compiled(function, backend))  # what dynamo imports and warns of at first
    torch._dynamo.reset()
    counters.clear()
    expected = use(compiled(function, backend)), counted()
    torch._dynamo.reset()
    with under(guard):
        found = use(compiled(function, backend)), counted()
    assert not difference(found[0], expected[0])
    assert found[1] == expected[1]
    torch._dynamo.reset()
    after = use(compiled(function, backend)), counted()
    assert not difference(after[0], expected[0])
    assert after[1] == expected[1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_compiled_in_one_place_and_called_in_the_other(function: Callable[..., Any], backend: str) -> None:
    expected = use(compiled(function, backend))
    torch._dynamo.reset()
    with under("strict"):
        inside = compiled(function, backend)
        assert not difference(use(inside), expected)
    assert not difference(use(inside), expected)
    torch._dynamo.reset()
    outside = compiled(function, backend)
    assert not difference(use(outside), expected)
    with under("strict"):
        assert not difference(use(outside), expected)
    assert not difference(use(outside), expected)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_explain(function: Callable[..., Any]) -> None:
    def explained() -> list[Any]:
        torch._dynamo.reset()
        told = torch._dynamo.explain(function)(torch.randn(3, 4, requires_grad=True))
        targets = [[(n.op, str(n.target).split(" at 0x")[0]) for n in g.graph.nodes] for g in told.graphs]
        return [told.graph_count, told.graph_break_count, told.op_count, len(told.out_guards or ()), targets]

    expected = explained()
    with under("strict"):
        found = explained()
    assert not difference(found, expected)


@pytest.mark.parametrize("every_call", [False, True])
@pytest.mark.parametrize("function", [f for f in FUNCTIONS if f is not breaks])
def test_without_graph_breaks(function: Callable[..., Any], every_call: bool) -> None:
    """``fullgraph=True`` refuses any break."""
    expected = attempt(lambda: use(torch.compile(function, backend="eager", fullgraph=True)))
    torch._dynamo.reset()
    with torchguard.strict(every_call=every_call):
        found = attempt(lambda: use(torch.compile(function, backend="eager", fullgraph=True)))
    assert not difference(_first_line(found), _first_line(expected))


def _first_line(result: Any) -> Any:
    if isinstance(result, tuple) and isinstance(result[0], type):
        return result[0], str(result[1]).split("\n")[0]
    return result


def test_entering_a_guard_again_recompiles_nothing() -> None:
    """Once is needed, as dynamo guards on the identity of ``torch.relu_``; not once a guard."""
    function = compiled(in_place, "aot_eager")
    use(function)
    with under("strict"):
        use(function)  # dynamo checks that torch.relu_ is the object it was: once more (docs/limits.md)
    counted()
    for _ in range(3):
        with under("strict"):
            use(function)
        use(function)
    assert counted()["graphs"] == 0


def test_every_call_gives_the_same_results() -> None:
    def run(function: Any) -> list[torch.Tensor]:
        x = torch.arange(12, dtype=torch.float32).view(3, 4).requires_grad_()
        out = function(x)
        out.sum().backward()
        assert x.grad is not None
        return [out.detach(), x.grad]

    expected = run(compiled(in_place, "aot_eager"))
    torch._dynamo.reset()
    with torchguard.strict(every_call=True):
        ballast = Ballast()
        inside = compiled(in_place, "aot_eager")
        assert all(map(torch.equal, run(inside), expected))
        del ballast
    assert all(map(torch.equal, run(inside), expected))


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 8), nn.ReLU(inplace=True), nn.LayerNorm(8), nn.Linear(8, 2), nn.Hardtanh(inplace=True)
    )


def _train(backend: str, optimiser_compiled: bool = False) -> Any:
    model = _model()
    step_model = torch.compile(model, backend=backend)
    optimiser = torch.optim.AdamW(model.parameters(), 0.01)
    step = torch.compile(optimiser.step, backend=backend) if optimiser_compiled else optimiser.step
    losses = []
    for _ in range(3):
        optimiser.zero_grad()
        loss = F.cross_entropy(step_model(torch.randn(6, 4)), torch.arange(6) % 2)
        loss.backward()
        step()
        for p in model.parameters():
            p.data.clamp_(-1, 1)
        losses.append(loss.detach())
    return frozen([losses, list(model.parameters())])


@pytest.mark.parametrize("backend", BACKENDS)
def test_training_a_compiled_model(backend: str) -> None:
    expected = _train(backend), counted()
    torch._dynamo.reset()
    with under("strict"):
        found = _train(backend), counted()
    assert not difference(found[0], expected[0])
    assert found[1] == expected[1]


def test_a_compiled_optimiser() -> None:
    expected = _train("aot_eager", optimiser_compiled=True), counted()
    torch._dynamo.reset()
    with under("strict"):
        found = _train("aot_eager", optimiser_compiled=True), counted()
    assert not difference(found[0], expected[0])
    assert found[1]["breaks"] == expected[1]["breaks"]


def test_refusals_of_compiled_programs() -> None:
    def program(backend: str) -> Any:
        torch._dynamo.reset()
        function = compiled(pointwise, backend)
        h = torch.ones(3, requires_grad=True) * 1
        out = function(h)
        h.add_(1)
        return attempt(lambda: out.sum().backward())

    for backend in BACKENDS:
        expected = program(backend)
        with torchguard.strict():
            assert program(backend) == expected


def test_dynamic_shapes() -> None:
    def run() -> Any:
        torch._dynamo.reset()
        counters.clear()
        function = torch.compile(in_place, backend="aot_eager", dynamic=True)
        results = []
        for n in (3, 4, 5):
            x = torch.linspace(0, 1, n * 4).reshape(n, 4).requires_grad_()
            function(x).sum().backward()
            results.append(x)
        return frozen(results), counted()

    run()
    expected = run()
    with under("strict"):
        found = run()
    assert not difference(found[0], expected[0])
    assert found[1] == expected[1]


def test_a_guard_inside_a_compiled_function_runs() -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        with torchguard.strict():
            z = y.exp()
        return z * y

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert not difference(use(compiled(program, "eager")), use(program))


def test_compiled_functions_under_allow_and_decorators() -> None:
    @torchguard.strict()
    def program(x: torch.Tensor) -> torch.Tensor:
        return compiled(in_place, "aot_eager")(x)

    assert not difference(use(program), use(compiled(in_place, "aot_eager")))


def test_corruption_outside_the_compiled_region_is_still_caught() -> None:
    with torchguard.strict():
        function = compiled(in_place, "aot_eager")
        use(function)
        out = torch.ones(3, requires_grad=True).exp()
        with pytest.raises(torchguard.SavedTensorCorruptionError):
            out.data.zero_()


@functools.lru_cache(maxsize=1)
def _inductor_works() -> bool:
    if not HAS_COMPILER:
        return False
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(3))
    except Exception:
        return False
    finally:
        torch._dynamo.reset()
    return True


@pytest.mark.parametrize("function", [in_place, reads_data, writes_to_data_of_a_copy])
def test_inductor(function: Callable[..., Any]) -> None:
    if not _inductor_works():
        pytest.skip("inductor needs a C++ compiler")
    counters.clear()
    expected = use(compiled(function, "inductor")), counted()
    torch._dynamo.reset()
    with under("strict"):
        inside = compiled(function, "inductor")
        found = use(inside), counted()
    assert not difference(found[0], expected[0])
    assert found[1] == expected[1]
    assert not difference(use(inside), expected[0])


def test_inductor_trains_a_model() -> None:
    if not _inductor_works():
        pytest.skip("inductor needs a C++ compiler")
    expected = _train("inductor")
    torch._dynamo.reset()
    with under("strict"):
        found = _train("inductor")
    assert not difference(found, expected)
