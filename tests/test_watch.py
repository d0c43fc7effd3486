"""Does watch() make PyTorch refuse silent writes, say where they come from, and change nothing else?"""

from __future__ import annotations

import copy
import gc
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from harness import _TorchAsItIs
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import torchguard
from torchguard import (
    Guard,
    SavedTensorCorruptionError,
    SavedTensorCorruptionWarning,
    _torch,
    allow,
    strict,
    warn,
    watch,
)

REFUSAL = "one of the variables needed for gradient computation has been modified by an inplace operation"


names_the_lines = pytest.mark.skipif(
    not _torch.SHOWS_SAVES, reason="this torch does not show saved tensors: the refusal is PyTorch's own"
)
sees_data = pytest.mark.skipif(
    not _torch.SHOWS_SAVES, reason="a dispatch mode of this torch does not see .data, and does see the guard's detach()"
)


def leaf(*values: float) -> torch.Tensor:
    return torch.tensor(values or (1.0, 2.0, 3.0), requires_grad=True)


def corrupt() -> None:
    y = leaf().exp()
    y.data.zero_()
    y.sum().backward()


def plain_refusal(program: Callable[[], Any]) -> str:
    with pytest.raises(RuntimeError) as caught:
        program()
    return str(caught.value)


# ---- what it refuses -----------------------------------------------------------------------------------------------


@names_the_lines
def test_the_four_lines() -> None:
    with watch() as guard:
        a = leaf()
        out = a.sigmoid()
        c = out.data
        c.zero_()
        with pytest.raises(SavedTensorCorruptionError) as caught:
            out.sum().backward()
    (violation,) = guard.violations
    assert caught.value.violation == violation
    assert isinstance(caught.value, RuntimeError)
    assert (violation.kind, violation.caught, violation.operation) == ("refused", "read", "zero_()")
    assert violation.aliased is not None
    assert violation.aliased.source == "c = out.data"
    assert violation.written is not None
    assert violation.written.source == "c.zero_()"
    assert violation.read is not None
    assert violation.read.source == "out.sum().backward()"
    assert violation.saved_by == "sigmoid"
    assert (violation.shape, violation.dtype) == ((3,), "float32")


@names_the_lines
def test_the_message_of_pytorch_is_there_word_for_word() -> None:
    def program(alias: Callable[[torch.Tensor], torch.Tensor]) -> None:
        out = leaf().sigmoid()
        alias(out).zero_()
        out.sum().backward()

    words = plain_refusal(lambda: program(torch.Tensor.detach))
    assert REFUSAL in words
    with watch(), pytest.raises(SavedTensorCorruptionError) as caught:
        program(lambda x: x.data)
    assert words in str(caught.value)
    assert caught.value.violation.refusal == words
    assert str(caught.value.__cause__) == words


def test_what_pytorch_refuses_anyway_keeps_its_words_and_type() -> None:
    def program() -> None:
        out = leaf().sigmoid()
        out.detach().zero_()
        out.sum().backward()

    words = plain_refusal(program)
    with watch() as guard, pytest.raises(RuntimeError) as caught:
        program()
    assert type(caught.value) is RuntimeError
    assert str(caught.value) == words
    assert guard.violations == []


def written_after(alias: torch.Tensor) -> None:
    alias.mul_(2)


@names_the_lines
@pytest.mark.parametrize(
    ("write", "operation", "source"),
    [
        (lambda y: y.data.zero_(), "zero_()", "y.data.zero_()"),
        (lambda y: y.data[1:].t().mul_(2), "mul_()", "mul_"),
        (lambda y: y.data.__setitem__(0, 5.0), "x[i] = v", "__setitem__"),
        (lambda y: torch.add(y, 1, out=y.data), "out=", "out=y.data"),
        (lambda y: nn.init.zeros_(y.data), "zeros_()", "zeros_"),
        (lambda y: written_after(y.data), "", ".backward()"),
    ],
    ids=["inline", "view", "item", "out", "init", "in a function"],
)
def test_the_source_tells_who_writes(write: Any, operation: str, source: str) -> None:
    with watch():
        y = leaf().exp()
        with torch.no_grad():
            write(y)
        with pytest.raises(SavedTensorCorruptionError) as caught:
            y.sum().backward()
    violation = caught.value.violation
    assert violation.operation == operation
    assert violation.written is not None
    assert source in violation.written.source
    assert violation.aliased is not None
    assert "y.data" in violation.aliased.source


def test_what_an_operation_in_place_on_a_view_saved_is_refused_with_the_places() -> None:
    """Its node shows nobody what it has saved."""

    def program(alias: Callable[[torch.Tensor], torch.Tensor]) -> None:
        y = torch.rand(3, 4, requires_grad=True) * 1
        y[0].mul_(alias(y)[0])
        y.sum().backward()

    words = plain_refusal(lambda: program(torch.Tensor.detach))
    with watch(), pytest.raises(SavedTensorCorruptionError) as caught:
        program(lambda x: x.data)
    violation = caught.value.violation
    assert violation.refusal == words
    assert violation.aliased is not None
    assert "lambda x: x.data" in violation.aliased.source
    assert violation.read is not None
    assert violation.read.source == "y.sum().backward()"
    assert str(violation).startswith("a write, perhaps through .data, moved the version of a tensor saved for backward")


def test_of_two_that_it_may_be_none_is_named() -> None:
    with watch() as guard, pytest.raises(RuntimeError) as caught:
        y, z = torch.rand(3, 4, requires_grad=True) * 1, torch.rand(3, 4, requires_grad=True) * 1
        y[0].mul_(y.data[0])
        z[0].add_(z.data[0])
        (y + z).sum().backward()
    assert type(caught.value) is RuntimeError
    assert guard.violations == []


def test_an_argument_of_a_method_is_read_and_of_a_function_written() -> None:
    with watch():
        y = leaf()
        z = y * y
        with torch.no_grad():
            y.mul_(y.data)
        with pytest.raises(SavedTensorCorruptionError) as caught:
            z.sum().backward()
    assert caught.value.violation.operation == ""
    with watch():
        y = leaf().exp()
        torch.sigmoid_(y.data)
        with pytest.raises(SavedTensorCorruptionError) as caught:
            y.sum().backward()
    assert caught.value.violation.operation == "sigmoid_()"


@names_the_lines
def test_the_alias_that_was_written_through_is_told_from_one_that_was_read() -> None:
    with watch():
        y = leaf().exp()
        c = y.data
        c += 1
        assert float(y.data.sum()) > 0
        with pytest.raises(SavedTensorCorruptionError) as caught:
            y.sum().backward()
    violation = caught.value.violation
    assert violation.aliased is not None
    assert violation.aliased.source == "c = y.data"
    assert violation.operation == "+="


@names_the_lines
def test_an_alias_of_what_is_gone_by_the_time_of_the_error() -> None:
    def hidden() -> tuple[torch.Tensor, torch.Tensor]:
        y = leaf().sigmoid()
        return y * 1, y.data

    with watch():
        out, alias = hidden()
        alias.zero_()
        with pytest.raises(SavedTensorCorruptionError) as caught:
            out.sum().backward()
    assert caught.value.violation.aliased is not None


def test_an_alias_that_only_read_before_the_save_is_not_blamed() -> None:
    with watch():
        h = torch.ones(3)
        out = leaf() * h
        h.add_(1)
        assert float(h.data.sum()) == 6  # taken after the last write
        with pytest.raises(RuntimeError) as caught:
            out.sum().backward()
    assert type(caught.value) is RuntimeError


class Handed(torch.Tensor):
    """A subclass that adds nothing."""


@names_the_lines
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("kind", [torch.Tensor, Handed])
def test_a_write_that_was_over_before_the_save_is_not_blamed(kind: type, again: bool) -> None:
    """The same line may clip before a step and, by mistake, once more between forward and backward."""

    def clip(p: torch.Tensor) -> None:
        p.data.mul_(5)

    with watch() as guard:
        p = torch.ones(3).as_subclass(kind).requires_grad_()
        clip(p)
        out = (p * p).sum()
        if again:
            clip(p)
        else:
            with torch.no_grad():
                p.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation") as caught:
            out.backward()
    if again:
        assert isinstance(caught.value, SavedTensorCorruptionError)
        assert caught.value.violation.operation == "mul_()"
    elif kind is torch.Tensor:
        assert type(caught.value) is RuntimeError
        assert guard.violations == []


@names_the_lines
@pytest.mark.parametrize("walrus", [False, True])
def test_an_alias_from_before_the_save_that_is_written_to_after_it_is_blamed(walrus: bool) -> None:
    with watch():
        p = leaf()
        p.data.mul_(5)
        if walrus:
            (d := p.data).mul_(1)
        else:
            d = p.data
        out = (p * p).sum()
        d.zero_()
        with pytest.raises(SavedTensorCorruptionError) as caught:
            out.backward()
    violation = caught.value.violation
    assert violation.aliased is not None
    assert "d " in violation.aliased.source


REBINDINGS: dict[str, Callable[[nn.Linear], Any]] = {
    "data": lambda m: setattr(m.weight, "data", torch.zeros(3, 3)),
    "half": lambda m: m.half(),
    "to_empty": lambda m: m.to_empty(device="cpu"),
    "vector_to_parameters": lambda m: nn.utils.vector_to_parameters(torch.zeros(12), m.parameters()),
}


@names_the_lines
@pytest.mark.parametrize("name", REBINDINGS)
def test_a_weight_of_which_a_view_is_saved_is_refused_with_the_line_that_rebound_it(name: str) -> None:
    model, x = nn.Linear(3, 3), torch.ones(1, 3, requires_grad=True)
    with watch() as guard:
        out = model(x)
        REBINDINGS[name](model)
        with pytest.raises(SavedTensorCorruptionError) as caught:
            out.sum().backward()
    assert [violation.operation for violation in guard.violations] == ["x.data = y"]
    written = caught.value.violation.written
    assert written is not None
    assert written.function == "<lambda>"


SILENT: dict[str, Callable[[torch.Tensor], Any]] = {
    "rebind": lambda h: setattr(h, "data", torch.zeros(3)),
    "apply_": lambda h: h.apply_(lambda v: v + 1),
    "map_": lambda h: h.map_(torch.ones(3), lambda a, b: a + b),
    "storage fill_": lambda h: h.untyped_storage().fill_(1),
    "storage copy_": lambda h: h.untyped_storage().copy_(torch.ones(3).untyped_storage()),
    "storage item": lambda h: h.untyped_storage().__setitem__(0, 7),
    "typed storage": lambda h: h.storage().__setitem__(0, 7.0),
    "fused sgd": lambda h: torch._fused_sgd_(
        [h], [torch.ones(3)], [], weight_decay=0, momentum=0, lr=0.1, dampening=0, nesterov=False, maximize=False,
        is_first_step=False,
    ),
    "from_dlpack": lambda h: torch.from_dlpack(h).zero_(),
    "unscale": lambda h: torch._amp_foreach_non_finite_check_and_unscale_([h], torch.zeros(1), torch.ones(1) * 2),
}  # fmt: skip


@names_the_lines
@pytest.mark.parametrize("name", SILENT)
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_silent_writers(name: str) -> None:
    with watch():
        h, w = torch.arange(3.0), leaf()
        out = w * h
        SILENT[name](h)
        with pytest.raises(SavedTensorCorruptionError, match="moved the version") as caught:
            out.sum().backward()
    assert REFUSAL in str(caught.value)


@pytest.mark.parametrize("name", SILENT)
@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
def test_silent_writers_after_backward(name: str) -> None:
    with watch() as guard:
        h, w = torch.arange(3.0), leaf()
        (w * h).sum().backward()
        SILENT[name](h)
        (w * h).sum().backward()
    assert guard.violations == []


@names_the_lines
def test_fused_step_between_forward_and_backward() -> None:
    model = nn.Linear(3, 3)
    x = leaf()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with watch():
        out = model(x).tanh()
        optimizer.step()
        with pytest.raises(SavedTensorCorruptionError, match=r"optimizer\.step\(\)"):
            out.sum().backward()


@names_the_lines
def test_gradients_count_as_written_by_a_fused_step_only_where_they_are_unscaled() -> None:
    def step(scale: torch.Tensor | None) -> None:
        p, x = torch.ones(3), leaf()
        grad = torch.ones(3)
        out = x * grad
        torch._fused_adam_(
            [p], [grad], [torch.zeros(3)], [torch.zeros(3)], [], [torch.ones(())], lr=0.1, beta1=0.9, beta2=0.99,
            weight_decay=0, eps=1e-8, amsgrad=False, maximize=False, grad_scale=scale,
        )  # fmt: skip
        out.sum().backward()

    with watch():
        step(None)
        with pytest.raises(SavedTensorCorruptionError):
            step(torch.tensor(2.0))


# ---- running statistics ---------------------------------------------------------------------------------------------


def test_two_forward_passes_in_training_before_one_backward() -> None:
    bn = nn.BatchNorm1d(3)
    x = torch.randn(4, 3, requires_grad=True)
    with watch() as guard:
        (bn(x) + bn(x * 2)).sum().backward()
    assert guard.violations == []


@names_the_lines
def test_a_training_pass_between_an_evaluation_and_its_backward() -> None:
    bn = nn.BatchNorm1d(3).eval()
    x = torch.randn(4, 3, requires_grad=True)
    with watch():
        out = bn(x)
        bn.train()(torch.randn(4, 3))
        with pytest.raises(SavedTensorCorruptionError, match="batch_norm"):
            out.square().sum().backward()


def test_training_passes_once_the_evaluation_has_had_its_backward() -> None:
    bn = nn.BatchNorm1d(3).eval()
    x = torch.randn(4, 3, requires_grad=True)
    with watch() as guard:
        bn(x).square().sum().backward()
        bn.train()
        (bn(x) + bn(x)).sum().backward()
    assert guard.violations == []


# ---- what must stay as it is ----------------------------------------------------------------------------------------


def looks(alias: torch.Tensor) -> dict[str, Any]:
    found = {
        name: getattr(alias, name)
        for name in ("requires_grad", "is_leaf", "grad_fn", "dtype", "shape", "layout", "device", "output_nr")
    }
    found["type"] = type(alias)
    found["keys"] = str(torch._C._dispatch_keys(alias))
    for name in ("is_inference", "_is_view", "is_conj", "is_neg"):
        found[name] = getattr(alias, name)()
    found["has base"] = alias._base is not None
    return found


class Plain(torch.Tensor):
    pass


class Named(nn.Parameter):
    pass


def inference_tensor() -> torch.Tensor:
    with torch.inference_mode():
        return torch.ones(3)


SOURCES: dict[str, Callable[[], torch.Tensor]] = {
    "leaf": leaf,
    "non-leaf": lambda: leaf() * 2,
    "view": lambda: (leaf() * 2)[1:],
    "parameter": lambda: nn.Parameter(torch.ones(3)),
    "parameter subclass": lambda: Named(torch.ones(3)),
    "buffer": lambda: nn.Buffer(torch.ones(3)),
    "expanded": lambda: torch.ones(1).expand(3),
    "conjugated": lambda: torch.ones(3, dtype=torch.complex64).conj(),
    "negated": lambda: torch.ones(3, dtype=torch.complex64).conj().imag,
    "inference": inference_tensor,
    "sparse": lambda: torch.eye(3).to_sparse(),
    "meta": lambda: torch.empty(3, device="meta"),
    "empty": lambda: torch.empty(0),
    "subclass": lambda: torch.ones(3).as_subclass(Plain),
}


@pytest.mark.parametrize("name", SOURCES)
def test_the_alias_is_what_data_gives(name: str) -> None:
    expected = looks(SOURCES[name]().data)
    with watch():
        assert looks(SOURCES[name]().data) == expected
    with torch.inference_mode():
        expected = looks(SOURCES[name]().data)
        with watch():
            assert looks(SOURCES[name]().data) == expected


def test_what_can_be_done_with_the_alias() -> None:
    with watch():
        x = torch.ones(2, 3, requires_grad=True)
        assert x.data.resize_(3, 2).shape == (3, 2)
        assert x.data.t_().shape == (3, 2)
        assert x.data.transpose_(0, 1).shape == (3, 2)
        assert x.data.set_(torch.zeros(4)).shape == (4,)
        assert x.data.squeeze_().unsqueeze_(0).shape == (1, 2, 3)
        assert nn.Parameter(x.data).is_leaf
        assert x.data.requires_grad_().is_leaf
        x.data.add_(1)  # of a leaf that requires grad, in grad mode
        assert torch.equal(x, torch.full((2, 3), 2.0))
        assert torch.equal(copy.deepcopy(x.data), x)
        x.data = torch.zeros(5)
        assert x.shape == (5,)
        with pytest.raises(TypeError, match="data"):
            x.data = 5  # type: ignore[assignment]
        with pytest.raises(RuntimeError):
            del x.data


@sees_data
def test_modes_see_the_same_calls() -> None:
    calls: list[Any] = []

    class Functions(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.append(func)
            return func(*args, **(kwargs or {}))

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.append(func)
            return func(*args, **(kwargs or {}))

    def seen(mode: type[Any]) -> list[Any]:
        calls.clear()
        x = leaf()
        with mode():
            x.data
            x.data.add_(1)
        return list(calls)

    for mode in (Functions, Operators):
        expected = seen(mode)
        with watch():
            assert seen(mode) == expected or mode is Functions
            if mode is Functions:
                assert [getattr(call, "__name__", "") for call in seen(mode)] == [
                    getattr(call, "__name__", "") for call in expected
                ]


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_traced_graph_is_the_same() -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return x.data * 2

    def graph() -> str:
        return str(torch.jit.trace(function, (torch.ones(2),)).graph)

    expected = graph()
    with watch():
        function(torch.ones(2))
        assert graph() == expected


def test_a_captured_tensor_inside_a_transform() -> None:
    captured = torch.ones(3)
    kept: list[torch.Tensor] = []

    def function(x: torch.Tensor) -> torch.Tensor:
        kept.append(captured.data)
        return (x * captured.data).sum()

    with watch():
        for _ in range(2):
            assert torch.equal(torch.func.grad(function)(torch.ones(3)), captured)
    assert not any(torch._C._functorch.is_functorch_wrapped_tensor(alias) for alias in kept)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_nested_derivatives_are_those_of_plain_pytorch() -> None:
    def function(z: torch.Tensor) -> torch.Tensor:
        return (z.exp() * z.data.sin()).sum()

    x = torch.tensor([0.5, 1.5])
    expected = torch.func.hessian(function)(x)
    with watch():
        assert torch.equal(torch.func.hessian(function)(x), expected)


def test_gradcheck_passes() -> None:
    with watch() as guard:
        x = torch.randn(3, dtype=torch.double, requires_grad=True)
        for fast in (False, True):
            assert torch.autograd.gradcheck(lambda t: (t.exp() * t).sin(), x, fast_mode=fast)
            assert torch.autograd.gradgradcheck(lambda t: t.exp() * t, x, fast_mode=fast)
    assert guard.violations == []


def test_a_training_loop_has_the_same_results() -> None:
    def train() -> list[torch.Tensor]:
        torch.manual_seed(3)
        model, average = nn.Linear(4, 2), nn.Linear(4, 2)
        for _ in range(5):
            model.zero_grad()
            model(torch.randn(8, 4)).square().mean().backward()
            for p, q in zip(model.parameters(), average.parameters(), strict=True):
                assert p.grad is not None
                p.data.add_(p.grad.data, alpha=-0.1)
                q.data.mul_(0.9).add_(p.data, alpha=0.1)
                p.data = p.data.clamp(-1, 1)
        return [p.detach().clone() for p in (*model.parameters(), *average.parameters())]

    expected = train()
    with watch() as guard:
        found = train()
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert guard.violations == []


def test_parameters_that_are_given_up_and_taken_up_again() -> None:
    """As sharding and offloading do it between forward and backward."""
    with watch() as guard:
        w, x = nn.Parameter(torch.ones(3) * 2), leaf()
        out = x * w
        kept = w.data.clone()
        w.data = torch.empty(0)
        w.data = kept
        out.sum().backward()
        assert x.grad is not None
        assert x.grad.tolist() == [2, 2, 2]
        out = x * w
        w.data = w.data.clone()  # the same bytes
        out.sum().backward()
        y = leaf().exp()
        y.data = torch.zeros(3)  # an output: autograd has a hold of its own
        y.sum().backward()
    assert guard.violations == []


# ---- allow, suppressions ---------------------------------------------------------------------------------------------


@names_the_lines
def test_an_alias_that_is_taken_in_an_allow_block_is_a_plain_one() -> None:
    with watch():
        y = leaf().exp()
        with allow("it is put back"):
            y.data.zero_()
            y.untyped_storage().fill_(0)
        y.sum().backward()
        y = leaf().exp()
        y.data.zero_()
        with pytest.raises(SavedTensorCorruptionError):
            y.sum().backward()


@names_the_lines
def test_what_is_suppressed_is_refused_in_the_words_of_pytorch() -> None:
    with watch(suppressions=["test_watch.py -- it is the test's"]) as guard:
        with pytest.raises(RuntimeError) as caught:
            corrupt()
    assert type(caught.value) is RuntimeError
    assert guard.violations == []
    (allowed,) = guard.allowed
    assert allowed.allowed is not None
    assert allowed.allowed.startswith("it is the test's")


# ---- combinations, nesting, leaving -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda: Guard(depth="watch"),
        lambda: Guard("warn", "read", "watch"),
        lambda: Guard("record", "read", "watch"),
        lambda: watch(every_call=True),
        lambda: watch(at="write"),  # type: ignore[arg-type]
    ],
)
def test_combinations_that_make_no_sense(make: Any) -> None:
    with pytest.raises(ValueError, match=r"^torchguard: .* as in torchguard.watch\(\)") as caught:
        make()
    assert "\n" not in str(caught.value)


@names_the_lines
def test_the_long_way_to_say_it() -> None:
    with Guard("raise", "read", "watch") as guard, pytest.raises(SavedTensorCorruptionError):
        corrupt()
    assert len(guard.violations) == 1


@names_the_lines
def test_nothing_is_left_behind() -> None:
    with strict(), watch():
        pass  # what is made and imported once
    before = _TorchAsItIs()
    untyped = dict(vars(torch.UntypedStorage)), dict(vars(torch.TypedStorage)), dict(vars(torch.autograd))
    with pytest.raises(SavedTensorCorruptionError), watch():
        corrupt()
    first, second = watch().__enter__(), watch().__enter__()
    first.leave()
    assert "data" in vars(torch.Tensor)
    second.leave()
    assert before.differences() == []
    after = dict(vars(torch.UntypedStorage)), dict(vars(torch.TypedStorage)), dict(vars(torch.autograd))
    assert all(a[name] is b[name] for a, b in zip(untyped, after, strict=True) for name in a | b)


@pytest.mark.parametrize("order", ["stacked", "crossed"])
@pytest.mark.parametrize(
    "kinds", [(strict, watch), (watch, strict), (watch, warn)], ids=["strict_watch", "watch_strict", "watch_warn"]
)
def test_any_order_of_leaving(kinds: Any, order: str) -> None:
    with strict(), watch():
        pass
    before = _TorchAsItIs()
    guards = [make().__enter__() for make in kinds]
    for guard in guards if order == "crossed" else reversed(guards):
        guard.leave()
    assert before.differences() == []


@names_the_lines
def test_strict_inside_watch_raises_at_the_write() -> None:
    with watch() as outer:
        with strict() as inner:
            y = leaf().exp()
            with pytest.raises(SavedTensorCorruptionError) as caught:
                y.data.zero_()
            assert caught.value.violation.caught == "write"
            y.sum().backward()
        assert len(inner.violations) == 1
        assert outer.violations == []
        with pytest.raises(SavedTensorCorruptionError) as caught:
            corrupt()
        assert caught.value.violation.kind == "refused"


def test_strict_inside_watch_is_as_exact_as_alone() -> None:
    with watch(), strict() as inner:
        h, w = torch.ones(2, 3), leaf()
        out = w * h[0]
        h.data[1].zero_()  # another row: strict knows better than the counter
        out.sum().backward()
        bn = nn.BatchNorm1d(3)
        (bn(torch.randn(4, 3, requires_grad=True)) + bn(torch.randn(4, 3))).sum().backward()
    assert inner.violations == []


@names_the_lines
def test_a_write_inside_strict_to_what_was_saved_before_it() -> None:
    with watch():
        y, h = leaf().exp(), torch.arange(3.0)
        out = leaf() * h
        with strict():
            y.data.zero_()
            h.apply_(lambda v: v + 1)
        for result in (y, out):
            with pytest.raises(SavedTensorCorruptionError):
                result.sum().backward()


def test_warn_inside_watch_warns_and_goes_on() -> None:
    with watch():
        with warn():
            for write in (lambda y: y.data.zero_(), lambda y: y.detach().apply_(lambda v: 0.0)):
                a = leaf()
                y = a.exp()
                with pytest.warns(SavedTensorCorruptionWarning):
                    write(y)
                y.sum().backward()
                assert a.grad is not None
                assert a.grad.tolist() == [0, 0, 0]


@names_the_lines
def test_watch_inside_strict_refuses_at_the_read() -> None:
    with strict() as outer:
        with watch() as inner:
            y = leaf().exp()
            y.data.zero_()
            with pytest.raises(SavedTensorCorruptionError) as caught:
                y.sum().backward()
            assert caught.value.violation.kind == "refused"
        assert (len(inner.violations), outer.violations) == (1, [])
        y = leaf().exp()
        with pytest.raises(SavedTensorCorruptionError) as caught:
            y.data.zero_()
        assert caught.value.violation.caught == "write"


@names_the_lines
def test_other_threads() -> None:
    found: list[BaseException] = []

    def work() -> None:
        try:
            corrupt()
        except RuntimeError as error:
            found.append(error)

    with watch() as guard:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert [type(error) for error in found] == [SavedTensorCorruptionError]
    assert len(guard.violations) == 1


def test_nothing_is_kept_alive() -> None:
    with watch():
        x = leaf()
        y = x.exp()
        y.data.sum()
        y.untyped_storage()
        x.data = torch.zeros(3)
        holds = [weakref.ref(x), weakref.ref(y)]
        storage = StorageWeakRef(y.untyped_storage())
        del x, y
        gc.collect()
        assert [hold() for hold in holds] == [None, None]
        assert storage.expired()


def test_swap_tensors() -> None:
    with watch():
        a, b = torch.ones(2), torch.zeros(3)
        a.data.add_(1)
        b.data.add_(1)
        a.apply_(lambda v: v + 1)
        torch.utils.swap_tensors(a, b)
        assert (a.tolist(), b.tolist()) == ([1, 1, 1], [3, 3])


@names_the_lines
def test_from_outside() -> None:
    program = (
        "import torch\n"
        "x = torch.ones(3, requires_grad=True)\n"
        "y = x.exp()\n"
        "y.data.zero_()\n"
        "try:\n"
        "    y.sum().backward()\n"
        "except RuntimeError as error:\n"
        "    print(type(error).__name__)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.path.dirname(os.path.dirname(torchguard.__file__))}
    arguments = [sys.executable, "-m", "torchguard", "--mode", "watch", "-c", program]
    path = os.path.join(os.environ.get("TMPDIR", "/tmp"), f"watched_{os.getpid()}.py")
    with open(path, "w", encoding="utf-8") as file:
        file.write(program)
    try:
        arguments[-2:] = [path]
        done = subprocess.run(arguments, capture_output=True, text=True, env=environment, check=False, timeout=100)
    finally:
        os.unlink(path)
    assert done.stdout == "SavedTensorCorruptionError\n", done.stderr
    assert "watch: 1 violation" in done.stderr
    assert done.returncode == 66


@pytest.mark.parametrize("transform", ["grad", "jacrev", "grad_and_value"])
@pytest.mark.parametrize("writes", [True, False])
def test_data_inside_a_batched_gradient_is_refused_as_detached_data_is(transform: str, writes: bool) -> None:
    weights, factor = torch.rand(4, 3), torch.rand(3)

    def run(alias: Callable[[torch.Tensor], torch.Tensor]) -> Any:
        def program(w: torch.Tensor) -> torch.Tensor:
            y = (w * factor).exp()
            out = (y * y).sum()
            alias(y).mul_(2) if writes else alias(y).sum()
            return out

        return torch.func.vmap(getattr(torch.func, transform)(program))(weights)

    if not writes:
        expected = run(torch.Tensor.detach)
        with watch():
            found = run(lambda y: y.data)
        assert all(map(torch.equal, *(torch.utils._pytree.tree_leaves(value) for value in (found, expected))))
        return
    with pytest.raises(RuntimeError, match="inplace operation"):
        run(torch.Tensor.detach)
    with watch(), pytest.raises(SavedTensorCorruptionError):
        run(lambda y: y.data)
