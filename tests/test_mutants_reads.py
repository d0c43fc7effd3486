"""Does backward's read notice, and say, what no other test would miss? Each test here was asked for by a mutant of ``_reads``."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from catalogue.wrapped import Boxed
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import torchguard
from torchguard import SavedTensorCorruptionError, SavedTensorCorruptionWarning, Violation, _reads
from torchguard._saves import LEDGER

#: A forward, and what is written then: the leaf whose gradient is asked for, and what backward starts from.
Program = Callable[[], tuple[torch.Tensor, torch.Tensor]]

#: Fetched while nothing is patched: a route to ``x.data = y`` that no guard sees.
point_at: Callable[[torch.Tensor, torch.Tensor], None] = torch.Tensor.data.__set__  # type: ignore[attr-defined]

#: More elements than are copied because somebody has an alias: nothing is remarked of such a save.
LARGE = 1 << 19


def leaf(n: int = 3) -> torch.Tensor:
    return torch.linspace(0.5, 1.5, n).requires_grad_()


def unseen(tensor: torch.Tensor) -> None:
    """``out=`` is patched nowhere: only the counter tells."""
    torch.zeros(tensor.shape, out=tensor)


def poke(tensor: torch.Tensor) -> None:
    """What a kernel does: no Python sees it, and no counter tells."""
    ctypes.memset(tensor.data_ptr(), 0x3C, tensor.element_size())


def cloning() -> AbstractContextManager[Any]:
    return saved_tensors_hooks(torch.Tensor.clone, lambda tensor: tensor)


def gradient(program: Program, guard: AbstractContextManager[Any] | None = None, left: bool = False) -> torch.Tensor:
    """The gradient, with all of it under the guard, or with the guard ``left`` before backward."""
    with guard or nullcontext():
        a, out = program()
        if not left:
            out.sum().backward()
    if left:
        out.sum().backward()
    assert a.grad is not None
    return a.grad


def told(program: Program, guard: torchguard.Guard | None = None, left: bool = False) -> Violation:
    """The one thing that is said of a program which corrupts; its result stays what it is without the guard."""
    plain = gradient(program)
    assert not torch.equal(plain, truth_of(program)), "it corrupts nothing"
    guard = guard or torchguard.Guard("record")
    assert torch.equal(gradient(program, guard, left), plain)
    (violation,) = guard.violations
    return violation


def truth_of(program: Program) -> torch.Tensor:
    if program is under_hooks_of_its_own:  # in which no others are asked
        return gradient(lambda: under_hooks_of_its_own(writes=False))
    return gradient(program, cloning())


def source(place: Any) -> str | None:
    return None if place is None else place.source


# ---- what has happened to the save --------------------------------------------------------------------------------


def pointed_elsewhere() -> tuple[torch.Tensor, torch.Tensor]:
    x = leaf()
    out = x * x
    point_at(x, torch.zeros(3))
    return x, out


def alias_written() -> tuple[torch.Tensor, torch.Tensor]:
    x = leaf()
    out = x.sigmoid()
    alias = out.data
    unseen(alias)
    return x, out


def large_alias_written() -> tuple[torch.Tensor, torch.Tensor]:
    x = leaf(LARGE)
    out = x.sigmoid()
    alias = out.data
    unseen(alias)
    return x, out


def array_written() -> tuple[torch.Tensor, torch.Tensor]:
    x = leaf()
    out = x.sigmoid()
    array = out.detach().numpy()
    array[:] = 0
    return x, out


def second_array_written() -> tuple[torch.Tensor, torch.Tensor]:
    x = leaf()
    out = x.sigmoid()
    first = out.detach()[:1].numpy()
    second = out.detach()[1:].numpy()
    second[:] = 0
    assert first[0]
    return x, out


@pytest.mark.parametrize(
    ("program", "kind", "operation", "aliased", "elements"),
    [
        (pointed_elsewhere, "rebind", "x.data = y", None, 3),
        (alias_written, "unseen", "", "alias = out.data", 3),
        (large_alias_written, "unseen", "", "alias = out.data", LARGE),
        (array_written, "exported", "", "array = out.detach().numpy()", 3),
        (second_array_written, "exported", "", "second = out.detach()[1:].numpy()", 2),
    ],
)
@pytest.mark.parametrize("mode", ["saves", "read", "bytes"])
def test_a_write_that_nobody_saw(
    program: Program, kind: str, operation: str, aliased: str | None, elements: int, mode: str
) -> None:
    guard = torchguard.Guard(
        "record", at="read" if mode == "read" else None, depth="bytes" if mode == "bytes" else "saves"
    )
    violation = told(program, guard)
    assert (violation.kind, violation.operation, violation.caught) == (kind, operation, "read")
    assert (source(violation.aliased), violation.elements) == (aliased, elements)
    assert source(violation.read) == source(violation.written) == "out.sum().backward()"


def test_a_tensor_that_points_elsewhere_is_told_at_once_where_bytes_are_compared_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a GPU: what was saved is not in the memory that would be compared."""
    monkeypatch.setattr(_reads, "SYNCHRONOUS", frozenset())
    violation = told(pointed_elsewhere, torchguard.Guard("record", depth="bytes"))
    assert (violation.kind, violation.operation) == ("rebind", "x.data = y")


def test_an_alias_that_was_there_before_its_memory_was_saved() -> None:
    """A tensor is pointed, with a warning, at memory of which an alias is known, and that alias is written to."""

    class Named(torch.Tensor): ...

    kept: list[torch.Tensor] = []

    def program() -> tuple[torch.Tensor, torch.Tensor]:
        x = leaf()
        out = x * x
        other = torch.ones(3)
        alias = other.data
        kept.append(alias)
        x.data = other.as_subclass(Named)
        unseen(alias)
        return x, out

    guard = torchguard.Guard("record")
    plain = gradient(program)
    assert torch.equal(gradient(program, guard), plain)
    assert [violation.kind for violation in guard.violations] == ["rebind", "unseen"]
    assert source(guard.violations[1].aliased) == "alias = other.data"


def test_what_was_put_back_once_is_told_when_it_is_written_again() -> None:
    def program() -> tuple[torch.Tensor, torch.Tensor]:
        x = leaf()
        out = x.sigmoid()
        kept = out.detach().clone()
        alias = out.data
        unseen(alias)
        torch.add(kept, 0, out=alias)
        out.sum().backward(retain_graph=True)
        x.grad = None
        unseen(alias)
        return x, out

    violation = told(program)
    assert (violation.kind, source(violation.aliased)) == ("unseen", "alias = out.data")


def test_of_a_copy_that_is_there_anyway_nothing_is_made_up() -> None:
    """A write through a raw pointer is audit()'s to tell (docs/choosing.md), though an alias has had the save copied."""

    def program() -> tuple[torch.Tensor, torch.Tensor]:
        x = leaf()
        out = x.sigmoid()
        alias = out.data
        assert alias is not out
        poke(out)
        return x, out

    guard = torchguard.strict()
    assert torch.equal(gradient(program, guard), gradient(program))
    assert guard.violations == []
    assert told(program, torchguard.Guard("record", depth="bytes")).kind == "invisible"


def test_the_second_backward_over_an_input_is_given_that_input() -> None:
    """What the backward of a backward saves is pointed elsewhere: wrong without a guard, so the guard must not mend it."""

    def program() -> tuple[torch.Tensor, torch.Tensor]:
        x = leaf()
        (slope,) = torch.autograd.grad((x**3).sum(), x, create_graph=True)
        point_at(x, torch.zeros(3))
        return x, slope

    violation = told(program)
    assert (violation.kind, violation.operation) == ("rebind", "x.data = y")


def test_a_save_is_read_while_another_thread_asks_what_it_reads() -> None:
    """``ctx.saved_tensors`` notes the saves that one thread reads, and no other's."""
    asking, answered = threading.Event(), threading.Event()

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x)
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            (x,) = ctx.saved_tensors
            assert torch.equal(x, leaf())
            return grad * 2

    def unpack(tensor: torch.Tensor) -> torch.Tensor:
        asking.set()
        assert answered.wait(60)
        return tensor

    def work() -> None:
        x = leaf()
        with saved_tensors_hooks(lambda tensor: tensor, unpack):
            out = Slow.apply(x)  # type: ignore[no-untyped-call]
        out.sum().backward()
        assert x.grad is not None
        grads.append(x.grad)

    grads: list[torch.Tensor] = []
    with torchguard.strict() as guard:
        y = leaf()
        out = y.exp()
        thread = threading.Thread(target=work)
        thread.start()
        try:
            assert asking.wait(60)
            out.sum().backward()
        finally:
            answered.set()
            thread.join()
    assert y.grad is not None
    assert torch.equal(y.grad, leaf().exp())
    assert [grad.tolist() for grad in grads] == [[2.0, 2.0, 2.0]]
    assert guard.violations == []


def test_who_asked_what_a_node_reads_asks_no_longer() -> None:
    """Each read would go the long way round, for ever."""
    norm = nn.BatchNorm1d(3)
    x = torch.randn(4, 3, requires_grad=True)
    with torchguard.strict() as guard:
        out = norm(x) + norm(x * 2)  # the second call writes to statistics that the first has saved and does not read
        out.square().sum().backward()
    assert guard.violations == []
    assert not _reads.collecting
    assert _reads.collector.saves is None


# ---- what PyTorch refuses -----------------------------------------------------------------------------------------


def an_input_without_an_element() -> None:
    h = leaf(0) * 2
    out = h * h
    h.add_(1)
    out.sum().backward()


def a_leaf_that_is_its_own_gradient() -> None:
    w = leaf()
    out = w * w
    w.grad = w.detach()
    with torch.no_grad():
        w.add_(1)
    out.sum().backward()


def a_view_that_was_written_to() -> None:
    h = leaf(4) * 1
    view = h[1:]
    view.exp_()
    view.detach().add_(1)
    h.sum().backward()


def a_view_that_was_written_to_and_is_gone() -> None:
    h = leaf(4) * 1
    view = h[1:]
    view.exp_()
    view.detach().add_(1)
    del view
    h.sum().backward()


def rows_that_were_written_to_in_a_loop() -> None:
    h = leaf(4).expand(2, 4) * 1
    for i in range(2):
        h[i].sigmoid_()
    h.detach().add_(1)
    h.sum().backward()


def a_row_that_was_written_to_by_torchs_own_code() -> None:
    h = leaf(4).expand(2, 4) * 1
    F.elu(h[1], inplace=True)
    h.detach().add_(1)
    h.sum().backward()


def a_row_that_was_written_to_by_a_module() -> None:
    h = leaf(4).expand(2, 4) * 1
    module = nn.ELU(inplace=True)
    module(h[1])
    h.detach().add_(1)
    h.sum().backward()


def a_row_that_was_written_to_with_random_numbers() -> None:
    h = leaf(4).expand(2, 4) * 1
    F.rrelu(h[1], training=True, inplace=True)
    h.detach().add_(1)
    h.sum().backward()


def a_row_that_was_written_to_by_a_call_with_arguments() -> None:
    h = leaf(4).expand(2, 4) * 1
    h[1].cumprod_(0)
    h.detach().add_(1)
    h.sum().backward()


def a_view_that_was_swapped_for_another_tensor() -> None:
    h = leaf(4) * 1
    view = h[1:]
    view.exp_()
    other = torch.ones(3)
    torch.utils.swap_tensors(view, other)
    h.detach().add_(1)
    h.sum().backward()


@pytest.mark.parametrize(
    "program",
    [
        an_input_without_an_element,
        a_leaf_that_is_its_own_gradient,
        a_view_that_was_written_to,
        a_view_that_was_written_to_and_is_gone,
        rows_that_were_written_to_in_a_loop,
        a_row_that_was_written_to_by_torchs_own_code,
        a_row_that_was_written_to_by_a_module,
        a_row_that_was_written_to_with_random_numbers,
        a_row_that_was_written_to_by_a_call_with_arguments,
        a_view_that_was_swapped_for_another_tensor,
    ],
)
def test_what_pytorch_refuses_is_refused_in_its_words(program: Callable[[], None]) -> None:
    torch.manual_seed(3)
    with pytest.raises(RuntimeError) as plain:
        program()
    drawn = torch.rand(1)
    torch.manual_seed(3)
    with torchguard.strict() as guard, pytest.raises(RuntimeError) as guarded:
        program()
    assert torch.equal(torch.rand(1), drawn)
    assert str(guarded.value) == str(plain.value)
    assert type(guarded.value) is RuntimeError
    assert guard.violations == []


@pytest.mark.parametrize("code", [True, False])
def test_what_cannot_be_named_is_refused_all_the_same(code: bool) -> None:
    """The source does not tell what wrote, or there is none: in a thread of the engine's no Python runs."""
    write = torch.exp_
    with torchguard.strict(), pytest.raises(RuntimeError, match="modified by an inplace operation") as refused:
        h = leaf(4) * 1
        write(h[1:])
        for save in LEDGER.all_alive() if not code else ():
            save.code = save.inner_code = None
        h.detach().add_(1)
        h.sum().backward()
    assert type(refused.value) is RuntimeError


# ---- repair() -----------------------------------------------------------------------------------------------------


def tracked_write_with_an_array_at_hand() -> tuple[torch.Tensor, torch.Tensor]:
    """A copy is kept for the sake of the array, and then comes a write that moves the counter."""
    x = leaf()
    out = x.sigmoid()
    array = out.detach().numpy()
    assert array.any()
    with torch._C.DisableTorchFunction():
        unseen(out.detach())
    return x, out


def hidden_alias_write() -> tuple[torch.Tensor, torch.Tensor]:
    x = leaf()
    out = x.sigmoid()
    alias = out.data
    with torch._C.DisableTorchFunction():
        unseen(alias)
    return x, out


def repaired(program: Program) -> Violation:
    truth = gradient(program, cloning())
    guard = torchguard.repair()
    with pytest.warns(SavedTensorCorruptionWarning, match="backward is given what was saved"):
        assert torch.equal(gradient(program, guard), truth)
    (violation,) = guard.violations
    assert violation.repaired
    assert source(violation.read) == "out.sum().backward()"
    return violation


def test_a_write_that_nobody_saw_is_repaired_and_told_with_its_places() -> None:
    assert not torch.equal(gradient(hidden_alias_write), gradient(hidden_alias_write, cloning()))
    violation = repaired(hidden_alias_write)
    assert (violation.kind, source(violation.aliased)) == ("unseen", "alias = out.data")


def test_what_pytorch_would_refuse_is_repaired_and_called_so() -> None:
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradient(tracked_write_with_an_array_at_hand)
    violation = repaired(tracked_write_with_an_array_at_hand)
    assert (violation.kind, violation.elements) == ("tracked", 3)


def test_what_pytorch_would_refuse_is_refused_where_it_is_lived_with() -> None:
    guard = torchguard.repair(suppressions=["test_mutants_reads.py -- a test"])
    with pytest.raises(RuntimeError, match="modified by an inplace operation") as error:
        gradient(tracked_write_with_an_array_at_hand, guard)
    assert type(error.value) is RuntimeError
    assert guard.violations == []
    assert [violation.allowed for violation in guard.allowed] == ["a test (suppressed by suppressions:1)"]


def test_what_is_lived_with_is_what_the_next_write_is_compared_with() -> None:
    def program() -> tuple[torch.Tensor, torch.Tensor]:
        x = leaf()
        out = x.sigmoid()
        alias = out.data
        with torch._C.DisableTorchFunction():
            torch.full((3,), 2.0, out=alias)
        read_and_live_with_it(x, out)
        with torch._C.DisableTorchFunction():
            torch.zeros(3, out=alias)
        return x, out

    def read_and_live_with_it(x: torch.Tensor, out: torch.Tensor) -> None:
        out.sum().backward(retain_graph=True)
        assert x.grad is not None
        assert torch.equal(x.grad, torch.full((3,), -2.0))
        x.grad = None

    guard = torchguard.repair(suppressions=["test_mutants_reads.py:*read_and_live_with_it -- a test"])
    with pytest.warns(SavedTensorCorruptionWarning):
        found = gradient(program, guard)
    assert torch.equal(found, torch.full((3,), -2.0))  # what was there when it was lived with
    assert [violation.largest_difference for violation in guard.violations] == [2.0]
    assert len(guard.allowed) == 1


# ---- what lies inside, or beside ----------------------------------------------------------------------------------


class Stashes(torch.autograd.Function):
    """Keeps a tensor where no hook is told of it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        ctx.y = y
        return x * y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        return grad * ctx.y, None


@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("array", [True, False])
def test_what_a_function_keeps_is_called_stashed_whoever_writes(
    at_once: bool, array: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not at_once:
        monkeypatch.setattr(_reads, "SYNCHRONOUS", frozenset())
    x, y = leaf(), torch.ones(3)
    with torchguard.Guard("record", depth="bytes") as guard:
        out = Stashes.apply(x, y)  # type: ignore[no-untyped-call]
        if array:
            y.numpy()[:] = 0
        else:
            poke(y)
        out.sum().backward()
    (violation,) = guard.violations
    assert violation.kind == "stashed"
    if at_once:
        assert violation.saved_by == "Stashes, as ctx.y"


def boxed(write: Callable[[torch.Tensor], object]) -> Program:
    def program() -> tuple[torch.Tensor, torch.Tensor]:
        w = Boxed(torch.tensor([1.0, 2.0, 3.0])).requires_grad_()
        out = w * w
        write(w.inside)  # type: ignore[attr-defined]
        return w, out

    return program


def into_its_array(inside: torch.Tensor) -> None:
    array = inside.numpy()
    array[:] = 0


def into_its_alias(inside: torch.Tensor) -> None:
    alias = inside.data
    unseen(alias)


@pytest.mark.parametrize(
    ("write", "kind", "aliased"),
    [
        (into_its_array, "exported", "array = inside.numpy()"),
        (into_its_alias, "wrapped", "alias = inside.data"),
        (lambda inside: inside.mul_(2), "wrapped", None),
    ],
)
def test_what_lies_inside_a_subclass(write: Callable[[torch.Tensor], object], kind: str, aliased: str | None) -> None:
    program = boxed(write)
    plain, truth = gradient(program), gradient(boxed(lambda inside: None))
    assert not torch.equal(plain.inside, truth.inside)  # type: ignore[attr-defined]
    guard = torchguard.Guard("record")
    assert torch.equal(gradient(program, guard).inside, plain.inside)  # type: ignore[attr-defined]
    (violation,) = guard.violations
    assert (violation.kind, source(violation.aliased)) == (kind, aliased)


def test_what_lies_inside_a_subclass_is_read_again_and_again() -> None:
    with torchguard.strict() as guard:
        w, out = boxed(lambda inside: None)()
        for _ in range(3):
            out.sum().backward(retain_graph=True)
    assert guard.violations == []


# ---- allow() ------------------------------------------------------------------------------------------------------


def test_what_was_written_before_a_block_is_not_allowed_by_it() -> None:
    def before() -> tuple[torch.Tensor, torch.Tensor]:
        x, out = alias_written()
        with torchguard.allow("something else"):
            pass
        return x, out

    def between() -> tuple[torch.Tensor, torch.Tensor]:
        x, out = alias_written()
        with torchguard.allow("something else"):
            out.exp()
        with torchguard.allow("and once more"):
            out.exp()
        return x, out

    for program in (before, between):
        guard = torchguard.Guard("record")
        assert told(program, guard).kind == "unseen"
        assert guard.allowed == []


@pytest.mark.parametrize("n", [3, LARGE])
def test_what_nobody_saw_being_written_in_a_block_is_allowed(n: int) -> None:
    def program() -> tuple[torch.Tensor, torch.Tensor]:
        x = leaf(n)
        other, out = x.tanh(), x.sigmoid()  # other lies elsewhere, and nothing is known of it
        first, second = out.data, other.data
        with torchguard.allow("a test"):
            unseen(first)
        return x, out + other + second

    guard = torchguard.strict()
    assert torch.equal(gradient(program, guard), gradient(program))
    assert guard.violations == []
    assert [(violation.kind, violation.allowed) for violation in guard.allowed] == [("unseen", "a test")]


def test_leaving_a_block_answers_for_nothing_else() -> None:
    """What the bytes decide at the read is decided there."""

    def program() -> tuple[torch.Tensor, torch.Tensor]:
        x = leaf()
        out = x.sigmoid()
        kept, alias = out.detach().clone(), out.data
        alias.zero_()
        with torchguard.allow("something else"):
            out.exp()
        alias.copy_(kept)
        return x, out

    guard = torchguard.strict(at="read")
    assert torch.equal(gradient(program, guard), gradient(program))
    assert guard.violations == guard.allowed == []


def three_arrays(write: Callable[[list[Any]], None]) -> Program:
    def program() -> tuple[torch.Tensor, torch.Tensor]:
        x = leaf()
        outs = [x.sigmoid(), x.tanh(), x.exp()]
        write([out.detach().numpy() for out in outs])
        return x, outs[0] + outs[1] + outs[2]

    return program


def in_an_inner_block(arrays: list[Any]) -> None:
    with torchguard.allow("outer"):
        arrays[1][:] = 0
        arrays[2][:] = 0
        with torchguard.allow("inner"):
            pass


def in_a_block(arrays: list[Any]) -> None:
    with torchguard.allow("outer"):
        arrays[1][:] = 0
        arrays[2][:] = 0


@pytest.mark.parametrize("write", [in_a_block, in_an_inner_block])
def test_what_an_array_wrote_in_a_block_is_allowed_by_it(write: Callable[[list[Any]], None]) -> None:
    program = three_arrays(write)
    guard = torchguard.strict()
    assert torch.equal(gradient(program, guard), gradient(program))
    assert guard.violations == []
    assert {(violation.kind, violation.allowed) for violation in guard.allowed} == {("exported", "outer")}
    assert sum(violation.times for violation in guard.allowed) == 2


def test_what_an_array_wrote_before_a_block_is_not_allowed_by_it() -> None:
    def write(arrays: list[Any]) -> None:
        arrays[0][:] = 0
        with torchguard.allow("something else"):
            pass

    guard = torchguard.Guard("record")
    assert told(three_arrays(write), guard).kind == "exported"
    assert guard.allowed == []


def test_audit_allows_in_a_block_whatever_the_layout_and_wherever_it_lies() -> None:
    """A subclass comes first, of whose parts no copy is kept; a sparse tensor has no bytes of its own."""

    def program() -> tuple[torch.Tensor, torch.Tensor]:
        x = leaf()
        box = Boxed(torch.ones(3)).requires_grad_()
        inside = (box * box).sum()
        matrix = torch.eye(3).to_sparse()
        one = torch.sparse.mm(matrix, x[:, None])
        two = x.sigmoid()
        with torchguard.allow("a test"):
            poke(matrix._values())
            poke(two)
        inside.backward()
        return x, one[:, 0] + two

    guard = torchguard.audit()
    assert torch.equal(gradient(program, guard), gradient(program))
    assert guard.violations == []
    assert sum(violation.times for violation in guard.allowed) == 2


@pytest.mark.parametrize("nested", [False, True])
def test_what_a_checkpoint_reads_again_may_be_written_to_in_a_block(nested: bool) -> None:
    def program() -> tuple[torch.Tensor, torch.Tensor]:
        x, flat = leaf(), torch.linspace(1, 2, 6)
        scale, shift = flat[:3], flat[3:]
        out = checkpoint(lambda x: (x * scale + shift * x).sin(), x, use_reentrant=False)
        alias = flat.data
        with torchguard.allow("outer"), torchguard.allow("inner") if nested else nullcontext():
            unseen(alias)
        assert isinstance(out, torch.Tensor)
        return x, out

    guard = torchguard.strict()
    assert torch.equal(gradient(program, guard), gradient(program))
    assert guard.violations == []
    assert {violation.allowed for violation in guard.allowed} == {"inner" if nested else "outer"}


@pytest.mark.usefixtures("empty_ledger")
def test_a_copy_for_an_array_goes_with_it() -> None:
    with torchguard.strict() as guard:
        out = leaf().sigmoid()
        array = out.detach().numpy()
        assert guard.stats.bytes_held == 12
        del array
        with torchguard.allow("whoever looks"):
            pass
        assert guard.stats.bytes_held == 0
        out.sum().backward()


# ---- a guard that is left -----------------------------------------------------------------------------------------


def preserved() -> tuple[torch.Tensor, torch.Tensor]:
    """A block puts the counter back."""
    x = leaf()
    out = x.sigmoid()
    with torch.autograd._unsafe_preserve_version_counter(out):
        out.detach().zero_()
    return x, out


def under_hooks_of_its_own(writes: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """PyTorch compares no versions there."""
    x = leaf()
    with saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        out = x.sigmoid()
    if writes:
        unseen(out.detach())
    return x, out


@pytest.mark.parametrize(
    "program", [pointed_elsewhere, alias_written, large_alias_written, array_written, preserved, under_hooks_of_its_own]
)
def test_a_guard_that_was_left_answers_for_what_was_written_under_it(program: Program) -> None:
    inside = told(program)
    outside = told(program, left=True)
    assert (outside.kind, outside.operation, outside.elements) == (inside.kind, inside.operation, inside.elements)
    with pytest.raises(SavedTensorCorruptionError):
        gradient(program, torchguard.strict(), left=True)


def nothing_written() -> tuple[torch.Tensor, torch.Tensor]:
    x = leaf()
    out = x.sigmoid() * x
    return x, out


def poked() -> tuple[torch.Tensor, torch.Tensor]:
    """A copy is at hand, and differs, and nobody but audit() has to notice."""
    x = leaf()
    out = x.sigmoid()
    alias = out.data
    poke(alias)
    return x, out


@pytest.mark.parametrize("program", [nothing_written, poked])
def test_a_guard_that_was_left_answers_for_nothing_that_comes_later(program: Program) -> None:
    def backward(guard: AbstractContextManager[Any]) -> torch.Tensor:
        with guard:
            x, out = program()
            alias = out.data
        point_at(x, torch.full((3,), 2.0))
        unseen(alias)
        out.sum().backward()
        assert x.grad is not None
        return x.grad

    guard = torchguard.strict()
    assert torch.equal(backward(guard), backward(nullcontext()))
    assert guard.violations == []


# ---- what arrives late --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("group")
def test_what_nobody_waited_for_is_waited_for_before_backward_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """It tells nobody when it has finished, as a receive does."""

    def tells_nobody(work: Any) -> Any:
        raise RuntimeError("a test")

    def program() -> tuple[torch.Tensor, torch.Tensor]:
        x = leaf()
        out = x.sigmoid()
        dist.scatter(out.data, [torch.zeros(3)], 0, async_op=True)
        dist.barrier()
        return x, out

    plain = gradient(program)
    assert not torch.equal(plain, gradient(program, cloning()))
    monkeypatch.setattr(dist.Work, "get_future", tells_nobody)
    guard = torchguard.Guard("record")
    assert torch.equal(gradient(program, guard), plain)
    (violation,) = guard.violations
    assert (violation.kind, violation.operation, violation.caught) == ("uncounted", "scatter()", "read")
