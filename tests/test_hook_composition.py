"""Does a program with save hooks of its own run under the guard as it does without, but for what is loud?"""

from __future__ import annotations

import gc
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conftest import Found, hook_stack
from harness import needs_shown_hooks, program_hooks
from torch.autograd import Function, grad
from torch.autograd.graph import disable_saved_tensors_hooks, save_on_cpu, saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

import torchguard
from torchguard import Guard, SavedTensorCorruptionError, SavedTensorCorruptionWarning, _torch, strict, warn

autograd: Any = torch._C._autograd
torch.utils.swap_tensors(torch.ones(1), torch.ones(1))  # the first one leaves a note in torch.Tensor
TakeDown = Callable[[], Found]


def leaf() -> torch.Tensor:
    return torch.tensor([0.5, 1.0, 2.0], requires_grad=True)


def identity(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def really_on_the_stack() -> list[Any]:
    """The pack hooks on this thread's stack, those of guards and composed ones among them, innermost last."""
    pairs = _torch.lift_hooks()[::-1]
    for pair in pairs:
        _torch.push_hooks(pair)
    return [pair[0] for pair in pairs]


# ---- the stack ----------------------------------------------------------------------------------------------------


def test_inside_the_program_sees_its_own_pairs_and_no_others() -> None:
    def pack(tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    with strict():
        assert program_hooks() is None
        with saved_tensors_hooks(pack, identity):
            with strict():
                top = program_hooks()
            assert top[0] is pack
            assert top[1] is identity
            assert hook_stack() == [pack]
        assert program_hooks() is None


def test_a_pop_too_many_is_refused_in_pytorchs_words() -> None:
    with pytest.raises(RuntimeError) as plain:
        autograd._pop_saved_tensors_default_hooks()
    with strict():
        with pytest.raises(RuntimeError) as guarded:
            autograd._pop_saved_tensors_default_hooks()
        assert str(guarded.value) == str(plain.value)
        out = leaf().exp()
        with pytest.raises(SavedTensorCorruptionError):
            out.data.zero_()


@needs_shown_hooks
@pytest.mark.parametrize("order", list(itertools.permutations(range(4))), ids=str)
def test_blocks_left_in_any_order_leave_the_programs_pairs(order: tuple[int, ...], found: TakeDown) -> None:
    before = found()
    pairs = [((lambda tensor: tensor), (lambda tensor: tensor)) for _ in range(2)]
    guards = [Guard("record"), Guard("record")]
    autograd._push_saved_tensors_default_hooks(*pairs[0])
    guards[0].__enter__()
    autograd._push_saved_tensors_default_hooks(*pairs[1])
    guards[1].__enter__()
    expected = [pairs[0][0], pairs[1][0]]
    entered = 2
    for which in order:
        if which < 2:
            guards[which].__exit__(None, None, None)
            entered -= 1
        else:
            autograd._pop_saved_tensors_default_hooks()
            expected.pop()
        assert hook_stack() == expected
        if not entered:
            assert really_on_the_stack() == expected
    assert before.differences() == []


def test_the_very_pair_is_back_after_an_exception(found: TakeDown) -> None:
    with save_on_cpu():
        before = found()
        with pytest.raises(KeyError), strict(), save_on_cpu(), strict():
            raise KeyError
        assert before.differences() == []
        with pytest.raises(SavedTensorCorruptionError), strict():
            out = leaf().exp()
            out.data.zero_()
        assert before.differences() == []


@needs_shown_hooks
def test_a_closed_generator_takes_only_its_own(found: TakeDown) -> None:
    def steps() -> Iterator[None]:
        with strict():
            yield

    with save_on_cpu():
        before = found()
        generator = steps()
        next(generator)
        with saved_tensors_hooks(identity, identity):
            generator.close()  # type: ignore[attr-defined]
            assert really_on_the_stack()[1:] == [identity]
        assert before.differences() == []


def test_a_guard_left_in_another_thread(found: TakeDown) -> None:
    with save_on_cpu():
        before = found()
        guard = strict()
        guard.__enter__()
        thread = threading.Thread(target=guard.__exit__, args=(None, None, None))
        thread.start()
        thread.join()
        with strict():
            pass
        assert before.differences() == []


def test_a_thread_composes_its_own_pairs() -> None:
    errors = []

    def work() -> None:
        out = leaf()
        with save_on_cpu():
            out = out.exp()
        out.detach().mul_(2)
        try:
            out.sum().backward()
        except SavedTensorCorruptionError as error:
            errors.append(error.violation.kind)
        assert hook_stack() == []

    with strict():
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert errors == ["unchecked"]


@needs_shown_hooks
def test_a_pair_pushed_where_no_guard_is_stays_as_it_is() -> None:
    stacks: list[Any] = []

    def work() -> None:
        with saved_tensors_hooks(identity, identity):
            stacks.append(really_on_the_stack())

    thread = threading.Thread(target=work)
    go = threading.Event()
    waiting = threading.Thread(target=lambda: (go.wait(), work()))
    waiting.start()
    with strict():
        go.set()
        waiting.join()
    thread.start()
    thread.join()
    assert stacks == [[identity], [identity]]


# ---- what runs ----------------------------------------------------------------------------------------------------


@needs_shown_hooks
@pytest.mark.parametrize("around", [False, True])
def test_only_the_innermost_pair_of_the_program_runs(around: bool) -> None:
    ran: list[str] = []

    def pair(name: str) -> saved_tensors_hooks:
        return saved_tensors_hooks(
            lambda tensor: ran.append(f"pack {name}") or tensor,  # type: ignore[func-returns-value]
            lambda tensor: ran.append(f"unpack {name}") or tensor,  # type: ignore[func-returns-value]
        )

    def program() -> torch.Tensor:
        w = leaf()
        w.exp()
        with pair("inner"):
            out = w.exp()
        out.sum().backward(retain_graph=True)
        out.sum().backward()
        assert w.grad is not None
        return w.grad

    with pair("outer"):
        expected = program()
    plain, ran[:] = list(ran), []
    if around:
        with pair("outer"), strict():
            assert torch.equal(program(), expected)
    else:
        with strict(), pair("outer"):
            assert torch.equal(program(), expected)
    assert ran == plain
    assert ran.count("unpack inner") == 2


class Boom(Exception):
    pass


@pytest.mark.parametrize("make", [strict, warn])
@pytest.mark.parametrize("where", ["pack", "unpack"])
def test_what_the_programs_hooks_raise_comes_through(where: str, make: Callable[[], Guard]) -> None:
    boom = Boom("mine")

    def fail(_: Any) -> Any:
        raise boom

    with make() as guard:
        with pytest.raises(Boom) as caught:
            with saved_tensors_hooks(*((fail, identity) if where == "pack" else (identity, fail))):
                out = leaf().exp()
            out.sum().backward()
        assert caught.value is boom
    assert guard.violations == []


def words(program: Callable[[], Any]) -> str:
    try:
        program()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def in_place(tensor: torch.Tensor) -> torch.Tensor:
    tensor.mul_(2)
    return tensor


@needs_shown_hooks
@pytest.mark.parametrize(
    "pair",
    [
        (in_place, identity),
        (lambda tensor: None, identity),
        (lambda tensor: 3, lambda packed: "text"),
        (identity, lambda tensor: tensor[:1]),
        (lambda: None, identity),
        (identity, lambda: None),
    ],
)
def test_bad_hooks_are_refused_in_pytorchs_words(pair: Any) -> None:
    def program() -> Any:
        w = leaf()
        with saved_tensors_hooks(*pair):
            out = w.exp()
        out.sum().backward()

    plain = words(program)
    with strict() as guard:
        assert words(program).split("0x")[0] == plain.split("0x")[0]
    with saved_tensors_hooks(*pair):
        around = words(lambda: leaf().exp().sum().backward())
        with strict():
            assert words(lambda: leaf().exp().sum().backward()).split("0x")[0] == around.split("0x")[0]
    assert guard.violations == []


@pytest.mark.parametrize("arguments", [(), (identity,), (1, 2), (identity, None), (identity, identity, identity)])
def test_a_push_of_nonsense_is_refused_in_pytorchs_words(arguments: tuple[Any, ...]) -> None:
    plain = words(lambda: autograd._push_saved_tensors_default_hooks(*arguments))
    with strict():
        assert words(lambda: autograd._push_saved_tensors_default_hooks(*arguments)) == plain
    assert plain != "no error"


@needs_shown_hooks
def test_hooks_that_are_disabled_say_so() -> None:
    def program() -> None:
        with disable_saved_tensors_hooks("not here, please"), save_on_cpu():
            pass

    plain = words(program)
    with strict() as guard:
        assert words(program) == plain == "RuntimeError: not here, please"
        assert hook_stack() == []
        with disable_saved_tensors_hooks("x"):
            out = leaf().exp()
        out.detach().mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()
    assert all("disable_saved_tensors_hooks" in line for line in guard.unwatched)

    def with_a_pair() -> None:
        with save_on_cpu(), disable_saved_tensors_hooks("y"):
            pass

    plain = words(with_a_pair)
    with strict():
        assert words(with_a_pair) == plain != "no error"


class Keeps(Function):
    seen: Any = None

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, None, y)
        return x * y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, none, y = ctx.saved_tensors
        assert none is None
        Keeps.seen = (x, y)
        return grads[0] * y, grads[0] * x


@pytest.mark.parametrize("pack", [identity, torch.Tensor.detach, torch.Tensor.clone])
def test_saved_tensors_are_what_they_are_under_the_programs_hooks(pack: Any) -> None:
    def program() -> list[Any]:
        w, parameter = leaf(), torch.nn.Parameter(torch.ones(3))
        with saved_tensors_hooks(pack, identity):
            out = Keeps.apply(w, parameter)
        (out.sum() + Keeps.apply(w, parameter).sum()).backward()
        x, y = Keeps.seen
        return [
            x is w,
            y is parameter,
            type(x),
            type(y),
            x.requires_grad,
            x.grad_fn is None,
            y.is_leaf,
            w.grad.tolist(),
        ]

    plain = program()
    with strict():
        assert program() == plain


def test_saved_tensors_are_the_originals_again_outside_the_programs_hooks() -> None:
    with strict():
        with save_on_cpu():
            leaf().exp()
        w, parameter = leaf(), torch.nn.Parameter(torch.ones(3))
        Keeps.apply(w, parameter).sum().backward()
        assert Keeps.seen[0] is w
        assert Keeps.seen[1] is parameter


def test_rrelu_is_right_under_hooks_of_the_program() -> None:
    def program() -> Any:
        torch.manual_seed(3)
        w = torch.linspace(-2, 2, 12).requires_grad_()
        with save_on_cpu():
            out = torch.nn.functional.rrelu(w, training=True)
            out = torch.nn.functional.rrelu(out * 1, training=True, inplace=True)
        return grad(out.sum(), w)[0].tolist()

    plain = program()
    with strict() as guard:
        assert program() == plain
    assert guard.violations == []


def test_warn_goes_on_bit_for_bit_and_says_it_once() -> None:
    def program() -> Any:
        w = leaf()
        with save_on_cpu():
            out = w.exp()
        out.detach().mul_(2)
        return [grad(out.sum(), w, retain_graph=True)[0].tolist(), grad(out.sum(), w)[0].tolist()]

    plain = program()
    with pytest.warns(SavedTensorCorruptionWarning) as warned, warn() as guard:
        assert program() == plain
    assert len(warned) == 1
    (violation,) = guard.violations
    assert violation.kind == "unchecked"
    assert violation.times == 1
    text = str(violation)
    assert "mul_(), under save hooks that switch PyTorch's check off, has corrupted" in text
    assert "out.detach().mul_(2)" in text
    assert "compares no versions" in text


def test_a_write_nobody_saw_says_where_it_was_read() -> None:
    w = leaf()
    with pytest.raises(SavedTensorCorruptionError) as caught, strict():
        with save_on_cpu():
            out = w.exp()
        torch.mul(out.detach(), 2, out=out.detach())
        out.sum().backward()
    text = str(caught.value)
    assert "a write, under save hooks" in text
    assert "(between save and read, by a call that is not patched" in text
    assert "out.sum().backward()" in text


def test_an_allowed_tracked_write_is_kept_with_its_reason() -> None:
    w = leaf()
    with strict() as guard:
        with save_on_cpu():
            out = w.exp()
        with torchguard.allow("on purpose"):
            out.detach().mul_(2)
        out.sum().backward()
    assert [violation.allowed for violation in guard.allowed] == ["on purpose"]
    assert guard.violations == []


@pytest.mark.parametrize("unseen", [False, True])
def test_what_was_written_under_the_guard_and_is_read_after_it(unseen: bool) -> None:
    w = leaf()
    with strict() as guard, save_on_cpu():
        out = w.exp()
        if unseen:
            torch.mul(out.detach(), 2, out=out.detach())
        else:
            out.detach().mul_(2)
    with pytest.raises(SavedTensorCorruptionError):
        out.sum().backward()
    assert [violation.kind for violation in guard.violations] == ["unchecked"]


@pytest.mark.parametrize("first", [True, False])
def test_one_write_that_is_not_allowed_is_enough(first: bool) -> None:
    w = leaf()
    with strict() as guard:
        with save_on_cpu():
            out = w.exp()
        if first:
            out.detach().mul_(2)
        with torchguard.allow("on purpose"):
            out.detach().mul_(2)
        if not first:
            out.detach().mul_(2)
        with pytest.raises(SavedTensorCorruptionError):
            out.sum().backward()
    assert guard.allowed == []


def test_a_write_after_one_that_was_warned_of_is_another_violation() -> None:
    w = leaf()
    with Guard("record") as guard:
        with save_on_cpu():
            out = w.exp()
        out.detach().mul_(2)
        out.sum().backward(retain_graph=True)
        out.sum().backward(retain_graph=True)
        assert [violation.operation for violation in guard.violations] == ["mul_()"]
        with torchguard.allow("on purpose"):
            out.detach().add_(2)
        out.sum().backward(retain_graph=True)
        assert [violation.operation for violation in guard.allowed] == ["add_()"]
        torch.exp(out.detach(), out=out.detach())
        out.sum().backward()
    assert [(violation.operation, violation.times) for violation in guard.violations] == [("mul_()", 1), ("", 1)]


def test_what_has_no_memory_is_told() -> None:
    with strict() as guard:
        w = leaf()
        with save_on_cpu():
            torch.sparse.mm(torch.eye(3).to_sparse(), w[:, None]).sum().backward()
    (line,) = guard.unwatched
    assert "no memory to compare writes with" in line


# ---- lifetimes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize("pack", [torch.Tensor.clone, torch.Tensor.tolist, lambda tensor: (1, tensor.double())])
def test_hooks_that_copy_free_the_original(pack: Any, around: bool) -> None:
    @contextmanager
    def blocks() -> Iterator[Any]:
        hooks = saved_tensors_hooks(pack, lambda packed: torch.ones(3))
        with hooks, strict():
            yield None
        if not around:
            with strict(), hooks:
                yield None

    with strict(), saved_tensors_hooks(pack, lambda packed: torch.ones(3)):
        w = leaf()
        middle = w * 2
        out = middle.exp() * 3 + middle.sin()
        gone = weakref.ref(middle)
        memory = StorageWeakRef(middle.untyped_storage())
        del middle
        gc.collect()
        assert gone() is None
        assert memory.expired()
        out.sum().backward()


def test_what_was_packed_dies_with_the_graph() -> None:
    class Packed:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor.detach()

    packed: list[Any] = []

    def pack(tensor: torch.Tensor) -> Packed:
        kept = Packed(tensor)
        packed.append(weakref.ref(kept))
        return kept

    with strict():
        w = leaf()
        with saved_tensors_hooks(pack, lambda kept: kept.tensor):
            out = w.exp()
            again = w.sin()
        assert [hold() is None for hold in packed] == [False, False]
        out.sum().backward()
        assert packed[0]() is None
        with pytest.raises(SavedTensorCorruptionError) as caught:
            w.data.zero_()
        assert packed[1]() is not None
        del again
        assert packed[1]() is None, caught


def test_an_object_that_lets_go_of_the_memory_is_a_copy_from_then_on() -> None:
    class Offloads:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor.detach()

    kept: list[Offloads] = []

    def pack(tensor: torch.Tensor) -> Offloads:
        kept.append(Offloads(tensor))
        return kept[-1]

    with strict() as guard, saved_tensors_hooks(pack, lambda packed: packed.tensor):
        w = leaf()
        out = w.exp()
        kept[0].tensor = kept[0].tensor.clone()
        memory = StorageWeakRef(out.untyped_storage())
        out.data.zero_()
        total = out.sum()
        del out
        assert memory.expired()
        total.backward()
        assert w.grad is not None
        assert torch.equal(w.grad, w.detach().exp())
    assert guard.violations == []


def test_memory_used_again_for_something_else_is_not_mistaken() -> None:
    with strict() as guard:
        for _ in range(50):
            w = leaf()
            with saved_tensors_hooks(torch.Tensor.tolist, torch.tensor):
                total = (w * 2).exp().sum()
            other = torch.zeros(3)
            other.add_(1)
            other.data.mul_(2)
            total.backward()
    assert guard.violations == []


def test_swap_tensors_is_possible_where_hooks_copied() -> None:
    def program() -> str:
        a, b = torch.ones(3), torch.zeros(3)
        w = leaf()
        with saved_tensors_hooks(lambda tensor: id(tensor), lambda key: torch.ones(3)):
            out = w * a
        torch.utils.swap_tensors(a, b)
        out.sum().backward()
        return f"{a.tolist()} {w.grad}"

    plain = words(program)
    with strict():
        assert words(program) == plain


# ---- checkpoint ---------------------------------------------------------------------------------------------------


@needs_shown_hooks
@pytest.mark.parametrize("around", [False, True])
def test_checkpoint_stops_as_early_as_ever(around: bool) -> None:
    calls: list[str] = []

    def body(x: torch.Tensor) -> torch.Tensor:
        calls.append("exp")
        x = x.exp()
        calls.append("sin")
        x = x.sin()
        calls.append("after")
        return x * 1

    def program() -> Any:
        calls.clear()
        w = leaf()
        out = checkpoint(body, w, use_reentrant=False)
        (first,) = grad(out.sum(), w, create_graph=True)
        return [first.tolist(), grad(first.sum(), w)[0].tolist(), list(calls)]

    plain = program()
    if around:
        with save_on_cpu():
            plain = program()
            with strict() as guard:
                assert program() == plain
    else:
        with strict() as guard:
            assert program() == plain
    assert guard.violations == []
    assert guard.unwatched == []


def test_checkpoints_own_errors_come_through() -> None:
    def program() -> None:
        turns = iter([True, False])

        def body(x: torch.Tensor) -> torch.Tensor:
            return x.exp().sin() if next(turns) else x * 1

        checkpoint(body, leaf(), use_reentrant=False).sum().backward()

    plain = words(program)
    with strict():
        assert words(program).splitlines()[0] == plain.splitlines()[0] != "no error"


# ---- torch.compile ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("inside", [False, True])
def test_compiled_regions_with_hooks_are_as_ever(backend: str, inside: bool) -> None:
    packed: list[int] = []

    def pack(tensor: torch.Tensor) -> Any:
        packed.append(tensor.numel())
        return (tensor.clone(),)

    def region(x: torch.Tensor) -> torch.Tensor:
        return x.exp().sin()

    def region_with_hooks(x: torch.Tensor) -> torch.Tensor:
        with saved_tensors_hooks(pack, lambda kept: kept[0]):
            return x.exp().sin()

    def program() -> Any:
        torch._dynamo.reset()
        packed.clear()
        w = leaf()
        if inside:
            out = torch.compile(region_with_hooks, backend=backend)(w)
        else:
            with saved_tensors_hooks(pack, lambda kept: kept[0]):
                out = torch.compile(region, backend=backend)(w)
        return [grad(out.sum(), w)[0].tolist(), list(packed)]

    plain = words_or(program)
    with strict() as guard:
        assert words_or(program) == plain
    assert guard.violations == []
    torch._dynamo.reset()


def words_or(program: Callable[[], Any]) -> Any:
    try:
        return program()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"


def test_hooks_that_are_graphs_are_inlined_into_a_compiled_region() -> None:
    def pack(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(torch.float64)

    def unpack(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(torch.float32)

    graphs = torch.fx.symbolic_trace(pack), torch.fx.symbolic_trace(unpack)

    def program() -> Any:
        torch._dynamo.reset()
        w = leaf()
        with saved_tensors_hooks(*graphs):
            out = torch.compile(lambda x: x.exp().sin(), backend="aot_eager")(w)
        return grad(out.sum(), w)[0].tolist()

    plain = words_or(program)
    with strict():
        assert words_or(program) == plain
    torch._dynamo.reset()
