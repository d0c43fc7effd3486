"""Does the guard keep anything alive? Every tensor must die when it would without the guard, with no help from gc."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_transparency import GUARDS
from torch import nn
from torch.utils.checkpoint import checkpoint

import torchguard
from torchguard._saves import LEDGER

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True, scope="module")
def _young_generations_only() -> Iterator[None]:
    """What is there already need not be looked at again by each ``gc.collect()``."""
    for end in (_drop, _backward):  # modules that are imported on first use
        for program in PROGRAMS:
            alive_after(program, end)
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _without_gc() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


class Watched(list[Any]):
    """Weak references to tensors, by name."""

    def __call__(self, *tensors: torch.Tensor) -> Any:
        self.extend(weakref.ref(tensor) for tensor in tensors)
        return tensors[0] if len(tensors) == 1 else tensors

    @property
    def alive(self) -> int:
        return sum(item() is not None for item in self)


class Outputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> Any:
        one, two = x.exp(), x.sin()
        ctx.save_for_backward(x, one, two, None)
        return one, two

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        _, one, two, _ = ctx.saved_tensors
        return grad * one + other * two


class GraphInside(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            inner = x.detach().requires_grad_()
            for _ in range(3):
                inner = inner.sin().exp()
        out = inner.detach() * 1
        ctx.save_for_backward(x, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        x, out = ctx.saved_tensors
        return grad * x * out


class Dirty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        x.exp_()
        ctx.mark_dirty(x)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * ctx.saved_tensors[0]


class Plain(torch.Tensor):
    pass


def leaf(*shape: int) -> torch.Tensor:
    return torch.rand(shape or (4,)).requires_grad_()


def output(w: Watched) -> torch.Tensor:
    return w(w(leaf()).sigmoid())


def outputs(w: Watched) -> torch.Tensor:
    x = w(leaf())
    return w(w(w(x * 2).exp()).tanh() * w(x.sqrt()))


def several(w: Watched) -> torch.Tensor:
    u, s, v = w(*torch.linalg.svd(w(leaf(3, 3)), full_matrices=False))
    values, index = w(*torch.sort(u))
    return values.abs().sum() + s.sum()


def in_place(w: Watched) -> torch.Tensor:
    h = w(w(leaf()) * 1)
    h.mul_(2)
    h.add_(h)
    h.sigmoid_()
    return h


def in_place_on_views(w: Watched) -> torch.Tensor:
    base = w(torch.zeros(8))
    view = w(base[2:6])
    view.copy_(w(leaf()))
    view.mul_(2)
    w(view[1:]).neg_()
    base[0] = 1
    base.tanh_()
    return base


def views(w: Watched) -> torch.Tensor:
    h = w(w(leaf(4, 4)).exp())
    return w(w(h.t())[1:] * w(h.view(-1))[4:].view(3, 4))


def aliases(w: Watched) -> torch.Tensor:
    h = w(w(leaf()).exp())
    alias = w(h.data)
    w(alias[1:]).mul_(1)
    out = w(h * h)
    w(out.data)
    w(w(leaf()).data)
    return out


def rebound(w: Watched) -> torch.Tensor:
    x = w(leaf())
    x.data = w(torch.ones(4))
    out = w(x.exp())
    x.data = w(torch.ones(4))
    return out


def custom(w: Watched) -> torch.Tensor:
    one, two = w(*Outputs.apply(w(leaf())))
    return w(Outputs.apply(w(one * two))[0])


def custom_chain(w: Watched) -> torch.Tensor:
    h = w(leaf())
    for _ in range(4):
        h = w(Outputs.apply(h)[0])
    return h


def custom_with_a_graph_inside(w: Watched) -> torch.Tensor:
    return w(GraphInside.apply(w(GraphInside.apply(w(leaf())))))


def custom_dirty(w: Watched) -> torch.Tensor:
    return w(Dirty.apply(w(w(leaf()) * 1)))


def custom_dirty_view(w: Watched) -> torch.Tensor:
    base = w(w(leaf()) * 1)
    w(Dirty.apply(w(base[1:])))
    return base


def function_in_setup_style(w: Watched) -> torch.Tensor:
    class Exp(torch.autograd.Function):
        @staticmethod
        def forward(x: torch.Tensor) -> torch.Tensor:
            return x.exp()

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.save_for_backward(output, *inputs)

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
            return grad * ctx.saved_tensors[0]

    return w(Exp.apply(w(leaf())))


def subclass(w: Watched) -> torch.Tensor:
    return w(w(w(leaf()).as_subclass(Plain)).exp()).sigmoid().as_subclass(torch.Tensor)


def sparse(w: Watched) -> torch.Tensor:
    return w(torch.sparse.mm(w(torch.eye(3).to_sparse()), w(leaf(3, 3)))).exp()


def network(w: Watched) -> torch.Tensor:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.LayerNorm(4), nn.Linear(4, 2))
    w(*model.parameters())
    return w(model(w(leaf(2, 4))))


def lstm(w: Watched) -> torch.Tensor:
    model = nn.LSTM(4, 3)
    w(*model.parameters())
    return w(model(w(leaf(2, 1, 4)))[0])


def attention(w: Watched) -> torch.Tensor:
    q = w(leaf(1, 2, 3, 4))
    return w(F.scaled_dot_product_attention(q, q, q, is_causal=True))


def embedding(w: Watched) -> torch.Tensor:
    return w(F.embedding(w(torch.tensor([0, 1])), w(leaf(3, 2)))).exp()


def checkpointed(w: Watched) -> torch.Tensor:
    return w(checkpoint(lambda t: t.exp().sigmoid(), w(w(leaf()) * 1), use_reentrant=False))


def checkpointed_reentrantly(w: Watched) -> torch.Tensor:
    return w(checkpoint(lambda t: t.exp().sigmoid(), w(w(leaf()) * 1), use_reentrant=True))


def double(w: Watched) -> torch.Tensor:
    x = w(leaf())
    (grad,) = torch.autograd.grad(w(x.exp() * x).sum(), x, create_graph=True)
    return w(grad)


def anomalous(w: Watched) -> torch.Tensor:
    with torch.autograd.detect_anomaly(check_nan=False):
        return w(w(w(leaf()) * 2).exp())


def hooked(w: Watched) -> torch.Tensor:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach(), lambda t: t):
        return w(w(leaf()).exp())


def batch_norm(w: Watched) -> torch.Tensor:
    mean, var = w(torch.zeros(4)), w(torch.ones(4))
    return w(F.batch_norm(w(leaf(3, 4)), mean, var, training=True))


def foreach(w: Watched) -> torch.Tensor:
    xs = [w(leaf()) * 1, w(leaf()) * 2]
    torch._foreach_exp_(xs)
    return w(xs[0] * xs[1])


PROGRAMS: list[Callable[[Watched], torch.Tensor]] = [
    output, outputs, several, in_place, in_place_on_views, views, aliases, rebound, custom, custom_chain,
    custom_with_a_graph_inside, custom_dirty, custom_dirty_view, function_in_setup_style, subclass, sparse, network, lstm,
    attention, embedding, checkpointed, checkpointed_reentrantly, double, anomalous, hooked, batch_norm, foreach,
]  # fmt: skip


def _drop(out: torch.Tensor) -> None:
    pass


def _backward(out: torch.Tensor) -> None:
    with contextlib.suppress(RuntimeError):  # one or two programs are refused
        out.sum().backward()


def _twice(out: torch.Tensor) -> None:
    with contextlib.suppress(RuntimeError):
        out.sum().backward(retain_graph=True)
        out.sum().backward()


def _retained(out: torch.Tensor) -> None:
    with contextlib.suppress(RuntimeError):
        out.sum().backward(retain_graph=True)


def _refused(out: torch.Tensor) -> None:
    with contextlib.suppress(RuntimeError), torch.no_grad():
        out.add_(1)
    _backward(out)


def alive_after(program: Callable[[Watched], torch.Tensor], end: Callable[[torch.Tensor], None]) -> int:
    watched = Watched()
    out = program(watched)
    end(out)
    del out
    return watched.alive


@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize("end", [_drop, _backward, _twice, _retained, _refused])
@pytest.mark.parametrize("program", PROGRAMS)
def test_every_tensor_dies(
    program: Callable[[Watched], torch.Tensor], end: Callable[[torch.Tensor], None], guard: str
) -> None:
    expected = alive_after(program, end)
    if program is custom_dirty_view and expected:
        pytest.skip("this torch itself keeps a view that is marked dirty, and what it is a view of")
    gc.collect()
    before = len(LEDGER)
    with GUARDS[guard]():
        assert alive_after(program, end) == expected
        if expected == 0:
            assert len(LEDGER) == before
    gc.collect()
    assert len(LEDGER) == before


@pytest.mark.parametrize("program", PROGRAMS)
def test_backward_releases_what_was_saved_while_the_output_lives(program: Callable[[Watched], torch.Tensor]) -> None:
    def alive() -> tuple[int, torch.Tensor]:
        watched = Watched()
        out = program(watched)
        _backward(out)
        return watched.alive, out

    expected, out = alive()
    del out
    gc.collect()
    before = len(LEDGER)
    with torchguard.strict():
        found, out = alive()
        assert found == expected
        if program is not anomalous:
            assert len(LEDGER) == before
        del out


@pytest.mark.parametrize("program", [output, outputs, in_place, views, aliases, custom, network])
def test_what_lives_on_after_the_guard_dies_then(program: Callable[[Watched], torch.Tensor]) -> None:
    before = len(LEDGER)
    watched = Watched()
    with torchguard.strict():
        out = program(watched)
    assert len(LEDGER) > before
    del out
    assert watched.alive == 0
    assert len(LEDGER) == before


def test_an_error_that_is_kept_keeps_no_more_than_without_the_guard() -> None:
    def refused(watched: Watched) -> RuntimeError:
        h = watched(watched(leaf()) * 1)
        out = watched(h.sin())
        h.add_(1)
        try:
            out.sum().backward()
        except RuntimeError as error:
            return error.with_traceback(None)
        raise AssertionError

    watched = Watched()
    errors = [refused(watched)]
    assert watched.alive == 0
    with torchguard.strict():
        errors.append(refused(watched))
    assert watched.alive == 0
    assert str(errors[0]) == str(errors[1])


def test_a_violation_keeps_nothing_alive() -> None:
    watched = Watched()
    with torchguard.strict() as guard:
        out = watched(watched(leaf()).sigmoid())
        with pytest.raises(torchguard.SavedTensorCorruptionError) as caught:
            watched(out.data).zero_()
        error = caught.value.with_traceback(None)
        del caught, out
        assert guard.violations
        assert watched.alive == 0
    assert error.violation is not None if hasattr(error, "violation") else True


def test_a_warning_keeps_nothing_alive() -> None:
    watched = Watched()
    with torchguard.warn() as guard:
        out = watched(watched(leaf()).sigmoid())
        watched(out.data).zero_()
        out.sum().backward()
        del out
        assert watched.alive == 0
    assert guard.violations


def test_results_of_writers_and_data_are_not_kept() -> None:
    with torchguard.strict():
        base = leaf().exp()
        watched = Watched()
        for _ in range(10):
            watched(base.data)
            watched(base.data[1:])
            x = watched(torch.ones(4))
            x.add_(1)
            x.data = watched(torch.ones(4))
            del x
        assert watched.alive == 0
        base.sum().backward()


def test_a_million_bytes_come_back() -> None:
    """Storages, not only their Python objects."""
    with torchguard.strict():
        storages = []
        for _ in range(3):
            x = torch.rand(1000, requires_grad=True)
            h = x.exp()
            alias = h.data
            out = (h * h).sigmoid()
            out.sum().backward()
            storages += [weakref.ref(t.untyped_storage()) for t in (x, h, alias, out)]
            del x, h, alias, out
        assert [s() for s in storages] == [None] * len(storages)


def test_guards_themselves_die() -> None:
    guards = []
    for _ in range(3):
        with torchguard.strict() as guard:
            guards.append(weakref.ref(guard))
            leaf().exp().sum().backward()
        del guard
    assert [g() for g in guards] == [None] * 3
