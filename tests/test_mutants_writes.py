"""Is a write judged and told as no other test would miss? Each test here was asked for by a mutant of ``_writes``."""

from __future__ import annotations

import ctypes
import gc
import os
import threading
import types
import warnings
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from catalogue.wrapped import Boxed
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

import torchguard
from torchguard import SavedTensorCorruptionError, Violation
from torchguard._writes import saves_of

_preserve = torch.autograd._unsafe_preserve_version_counter

#: A program that writes, or does not: the leaf whose gradient is asked for, and what backward starts from.
Program = Callable[[bool], tuple[torch.Tensor, torch.Tensor]]

#: More elements than are copied because somebody has an alias: no bytes tell whether an unseen write changed anything.
LARGE = 1 << 19


def leaf(n: int = 3) -> torch.Tensor:
    return torch.linspace(0.5, 1.5, n).requires_grad_()


def hooked() -> AbstractContextManager[Any]:
    """What is packed is a number: before backward reads, nobody can tell that the tensor itself is kept."""
    kept: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> int:
        kept.append(tensor)
        return len(kept) - 1

    return saved_tensors_hooks(pack, kept.__getitem__)


def gradient(
    program: Program, guard: AbstractContextManager[Any] | None = None, writes: bool = True, left: bool = False
) -> torch.Tensor:
    """The gradient, with all of it under the guard, or with the guard ``left`` before backward."""
    with guard or nullcontext():
        a, out = program(writes)
        if not left:
            out.sum().backward()
    if left:
        out.sum().backward()
    assert a.grad is not None
    return a.grad


def told(program: Program, guard: torchguard.Guard | None = None) -> Violation:
    """The one thing that is said of a program which corrupts; its result stays what it is without the guard."""
    plain = gradient(program)
    assert not torch.equal(plain, gradient(program, writes=False)), "it corrupts nothing"
    guard = guard or torchguard.Guard("record")
    assert torch.equal(gradient(program, guard), plain)
    (violation,) = guard.violations
    return violation


def quiet(program: Program, guard: torchguard.Guard | None = None) -> torchguard.Guard:
    """A program that corrupts nothing is let through with nothing said."""
    plain = gradient(program)
    assert torch.equal(plain, gradient(program, writes=False)), "it corrupts"
    guard = guard or torchguard.strict()
    assert torch.equal(gradient(program, guard), plain)
    assert guard.violations == []
    return guard


def function_of(file: str, code: str) -> Any:
    """The function that ``code`` defines, as though it stood in ``file``."""
    space: dict[str, Any] = {}
    exec(compile(code, file, "exec"), space)
    return next(value for value in space.values() if isinstance(value, types.FunctionType))


#: Points a tensor elsewhere, and back.
_THERE_AND_BACK = """
def perturb(tensor, other):
    kept = tensor.data
    tensor.data = other
    tensor.data = kept
"""

_GRADCHECK = "elsewhere/torch/autograd/gradcheck.py"
_INVENTED = f"{os.path.dirname(torch.__file__)}/distributed/fsdp/_invented.py"


def source(place: Any) -> str | None:
    return None if place is None else place.source


# ---- what a write is called ---------------------------------------------------------------------------------------


def alias_written(writes: bool) -> tuple[torch.Tensor, torch.Tensor]:
    x = leaf()
    out = x.sigmoid()
    alias = out.data
    if writes:
        alias.mul_(2)
    return x, out


def alias_written_uncounted(writes: bool) -> tuple[torch.Tensor, torch.Tensor]:
    x = leaf()
    out = x.sigmoid()
    alias = out.data
    if writes:
        alias.apply_(lambda value: value * 2)
    return x, out


def written_uncounted(writes: bool) -> tuple[torch.Tensor, torch.Tensor]:
    x, h = leaf(), torch.ones(3)
    out = x * h
    if writes:
        h.apply_(lambda value: value * 2)
    return x, out


def kept_by_hooks_and_written(writes: bool) -> tuple[torch.Tensor, torch.Tensor]:
    x, h = leaf(), torch.ones(3)
    with hooked():
        out = x * h
    if writes:
        h.mul_(2)
    return x, out


def kept_by_hooks_and_alias_written(writes: bool) -> tuple[torch.Tensor, torch.Tensor]:
    x, h = leaf(), torch.ones(3)
    with hooked():
        out = x * h
    alias = h.data
    if writes:
        alias.mul_(2)
    return x, out


def kept_by_hooks_and_written_uncounted(writes: bool) -> tuple[torch.Tensor, torch.Tensor]:
    x, h = leaf(), torch.ones(3)
    with hooked():
        out = x * h
    if writes:
        h.apply_(lambda value: value * 2)
    return x, out


def kept_by_hooks_and_pointed_elsewhere(writes: bool) -> tuple[torch.Tensor, torch.Tensor]:
    x, h = leaf(), torch.ones(3)
    with hooked():
        out = x * h
    if writes:
        h.data = torch.zeros(3)
    return x, out


def preserved(writes: bool) -> tuple[torch.Tensor, torch.Tensor]:
    x, h = leaf(), torch.ones(3)
    out = x * h
    if writes:
        with _preserve(h):
            h.mul_(2)
    return x, out


def reads_an_alias_of_its_own(writes: bool) -> tuple[torch.Tensor, torch.Tensor]:
    x = leaf()
    h = x * 1
    out = h.mul_(h.data if writes else h.data.clone())
    return x, out


BATCH = torch.linspace(0, 1, 12).reshape(4, 3)


def statistics_written(writes: bool) -> tuple[torch.Tensor, torch.Tensor]:
    x, norm = leaf(12), nn.BatchNorm1d(3).eval()
    out = norm(x.view(4, 3)).square()
    norm.train()
    if writes:
        norm(BATCH)
    return x, out


@pytest.mark.parametrize(
    ("program", "kind", "operation", "aliased", "caught"),
    [
        (alias_written, "write", "mul_()", "alias = out.data", "write"),
        (alias_written_uncounted, "write", "apply_()", "alias = out.data", "write"),
        (written_uncounted, "uncounted", "apply_()", None, "write"),
        (kept_by_hooks_and_written, "unchecked", "mul_()", None, "read"),
        (kept_by_hooks_and_alias_written, "write", "mul_()", None, "read"),
        (kept_by_hooks_and_written_uncounted, "uncounted", "apply_()", None, "read"),
        (kept_by_hooks_and_pointed_elsewhere, "rebind", "x.data = y", None, "read"),
        (preserved, "uncounted", "mul_() under _unsafe_preserve_version_counter()", None, "read"),
        (reads_an_alias_of_its_own, "write", "mul_()", None, "read"),
        (statistics_written, "uncounted", "batch_norm()", None, "read"),
    ],
)
@pytest.mark.parametrize("at", [None, "read"])
def test_what_is_said_of_a_write(
    program: Program, kind: str, operation: str, aliased: str | None, caught: str, at: Any
) -> None:
    violation = told(program, torchguard.Guard("record", at=at, every_call=True))
    assert (violation.kind, violation.operation) == (kind, operation)
    assert violation.caught == (at or caught)
    assert source(violation.aliased) == aliased
    assert violation.written is not None
    assert violation.written.function == program.__name__
    assert violation.written.source not in ("if writes:", "return x, out")


def test_a_write_under_watch_through_an_alias_that_it_lent() -> None:
    """``watch()`` gives out aliases that share the counter; inside strict() they are judged as plain ones."""
    plain = gradient(alias_written)
    outer, inner = torchguard.watch(), torchguard.Guard("record")
    with outer, inner:
        x, out = alias_written(True)
        out.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, plain)
    (violation,) = inner.violations
    assert (violation.kind, violation.operation, violation.caught) == ("write", "mul_()", "write")


# ---- running statistics -------------------------------------------------------------------------------------------


def test_an_allowed_change_of_statistics_is_listed_with_its_reason() -> None:
    def program(writes: bool) -> tuple[torch.Tensor, torch.Tensor]:
        x, norm = leaf(12), nn.BatchNorm1d(3).eval()
        out = norm(x.view(4, 3)).square()
        norm.train()
        with torchguard.allow("meant"):
            if writes:
                norm(BATCH)
        return x, out

    plain = gradient(program)
    guard = torchguard.Guard("record")
    assert torch.equal(gradient(program, guard), plain)
    assert guard.violations == []
    assert {(one.kind, one.operation, one.caught, one.elements) for one in guard.allowed} == {
        ("uncounted", "batch_norm()", "write", 3)
    }
    assert {one.allowed for one in guard.allowed} == {"meant"}


def test_statistics_that_are_kept_are_written_by_keyword() -> None:
    def program(writes: bool) -> tuple[torch.Tensor, torch.Tensor]:
        x, mean, var = leaf(12), torch.zeros(3), torch.ones(3)
        out = torch.native_batch_norm(x.view(4, 3), None, None, mean, var, False, 0.1, 1e-5)[0].square()
        if writes:
            torch.native_batch_norm(
                BATCH, None, None, running_mean=mean, running_var=var, training=True, momentum=0.1, eps=1e-5
            )
        return x, out

    assert told(program).operation == "native_batch_norm()"


def test_statistics_that_a_call_leaves_as_they_are_cost_no_copy_and_are_judged_again() -> None:
    """The second call is the one that changes them, in a guard that has looked at the first."""

    def program(writes: bool) -> tuple[torch.Tensor, torch.Tensor]:
        x, norm = leaf(12), nn.BatchNorm1d(3, momentum=0.0).eval()
        out = norm(x.view(4, 3)).square()
        norm.train()
        norm(BATCH)
        norm.momentum = 0.5
        if writes:
            norm(BATCH)  # the second
        return x, out

    assert (source(told(program).written) or "").endswith("# the second")


# ---- what corrupts nothing ----------------------------------------------------------------------------------------


def test_a_harmless_write_through_an_alias_is_expected_when_backward_reads() -> None:
    """No bytes are kept of so large a save: the alias's counter alone would be held against it."""

    def program(writes: bool) -> tuple[torch.Tensor, torch.Tensor]:
        x = leaf(LARGE)
        out = x.sigmoid()
        alias = out.data
        if writes:
            alias.mul_(1)
        return x, out

    quiet(program)


def test_a_write_to_another_part_through_an_alias_is_expected_when_backward_reads() -> None:
    """So many saves in one storage that those in the part are asked alone, and there are none."""

    def program(writes: bool) -> tuple[torch.Tensor, torch.Tensor]:
        x, flat = leaf(LARGE), torch.ones(LARGE + 8)
        alias = flat.data
        out = torch.stack([(x * flat[:LARGE]).sum() for _ in range(70)])
        if writes:
            alias[LARGE:].zero_()
        return x, out

    quiet(program)


def test_gradcheck_perturbs_what_is_saved_and_puts_it_back() -> None:
    x = torch.linspace(0.5, 1.5, 3, dtype=torch.float64).requires_grad_()
    with torchguard.strict() as guard:
        assert torch.autograd.gradcheck(lambda x: x * x, x)
    assert guard.violations == []


def test_what_gradcheck_would_not_put_back_is_told_by_its_bytes() -> None:
    perturb = function_of(_GRADCHECK, "def perturb(write, tensor):\n    write(tensor)\n")

    def program(writes: bool) -> tuple[torch.Tensor, torch.Tensor]:
        x = leaf()
        out = x.sigmoid()
        if writes:
            perturb(lambda tensor: tensor.mul_(2), out.data)
        return x, out

    violation = told(program)
    assert (violation.kind, violation.operation, violation.caught) == ("write", "mul_()", "read")


def test_a_tensor_that_is_pointed_at_itself() -> None:
    def program(writes: bool) -> tuple[torch.Tensor, torch.Tensor]:
        x = leaf()
        out = x * x
        if writes:
            x.data = x
            x.data = x.detach()
        return x, out

    quiet(program)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("value", ["same", "other", "longer"])
def test_a_nested_tensor_that_is_pointed_elsewhere(value: str) -> None:
    def nested(a: float, lengths: tuple[int, ...] = (2, 3)) -> torch.Tensor:
        return torch.nested.nested_tensor([torch.full((n, 2), a) for n in lengths])

    with torchguard.Guard("record") as guard:
        x = nested(2.0).requires_grad_()
        out = x * x
        x.data = nested(2.0) if value == "same" else nested(3.0) if value == "other" else nested(2.0, (2, 3, 1))
        assert out is not None
    assert [one.kind for one in guard.violations] == ([] if value == "same" else ["rebind"])


@pytest.mark.parametrize("value", [torch.ones(3, dtype=torch.int64), torch.ones(3).to_sparse()], ids=["int", "sparse"])
def test_what_pytorch_refuses_to_point_at_is_no_violation(value: torch.Tensor) -> None:
    x = leaf()
    with torchguard.strict() as guard:
        out = x * x
        with pytest.raises(RuntimeError) as caught:
            x.data = value
        out.sum().backward()
    assert not isinstance(caught.value, SavedTensorCorruptionError)
    assert guard.violations == []
    assert x.grad is not None
    assert torch.equal(x.grad, 2 * leaf())


# ---- x.data = y ---------------------------------------------------------------------------------------------------


def test_the_value_that_a_tensor_points_at_is_an_alias_of_it() -> None:
    def program(writes: bool) -> tuple[torch.Tensor, torch.Tensor]:
        x, h, value = leaf(), torch.zeros(3), torch.ones(3)
        h.data = value
        out = x * h
        if writes:
            value.mul_(2)
        return x, out

    violation = told(program)
    assert (violation.kind, source(violation.aliased)) == ("write", "h.data = value")
    guard = torchguard.Guard("record")
    gradient(program, guard)
    assert guard.stats.writes > 0


def test_pointing_a_saved_tensor_elsewhere_counts_as_a_write_that_was_judged() -> None:
    with torchguard.Guard("record") as guard:
        x = leaf()
        out = x * x
        before = guard.stats.writes
        x.data = torch.zeros(3)
        assert guard.stats.writes == before + 1
        assert out is not None


def test_the_error_keeps_no_save_alive() -> None:
    """Once the graph is gone, the memory is free to be written to, though somebody keeps the error."""
    with torchguard.strict() as guard:
        x = leaf()
        out = x * x
        with pytest.raises(SavedTensorCorruptionError) as caught:
            x.data = torch.zeros(3)
        del out
        gc.collect()
        x.data.zero_()
    assert caught.value.violation.kind == "rebind"
    assert len(guard.violations) <= 1


# ---- the same memory in two storages ------------------------------------------------------------------------------


def test_the_array_of_what_is_saved_is_written_to_as_a_tensor() -> None:
    def program(writes: bool) -> tuple[torch.Tensor, torch.Tensor]:
        x = leaf()
        out = x.sigmoid()
        other = torch.from_numpy(out.detach().numpy())
        if writes:
            other.mul_(2)
        return x, out

    violation = told(program)
    assert (violation.kind, violation.operation, violation.caught) == ("write", "mul_()", "write")


def test_what_is_saved_lies_in_an_array_of_another_tensor() -> None:
    def program(writes: bool) -> tuple[torch.Tensor, torch.Tensor]:
        x, base = leaf(), torch.ones(3)
        out = x * torch.from_numpy(base.numpy())
        if writes:
            base.mul_(2)
        return x, out

    violation = told(program)
    assert (violation.kind, violation.operation, violation.caught) == ("write", "mul_()", "write")


# ---- reshaped in place --------------------------------------------------------------------------------------------


def test_a_tensor_is_reshaped_by_keyword() -> None:
    def program(writes: bool) -> tuple[torch.Tensor, torch.Tensor]:
        x, h = leaf(6), torch.ones(2, 3)
        out = x.view(2, 3) * h.clone()
        h.transpose_(dim0=0, dim1=1)
        assert h.shape == (3, 2)
        return x, out

    quiet(program)


def test_what_is_reshaped_is_repaired_and_told() -> None:
    def program(writes: bool) -> tuple[torch.Tensor, torch.Tensor]:
        x, h = leaf(4), torch.tensor([[1.0, 2.0], [3.0, 4.0]])
        out = x.view(2, 2) * h
        if writes:
            h.t_()
        return x, out

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradient(program)
    guard = torchguard.Guard("repair")
    with pytest.warns(torchguard.SavedTensorCorruptionWarning):
        found = gradient(program, guard)
    assert torch.equal(found, gradient(program, writes=False))
    (violation,) = guard.violations
    assert (violation.kind, violation.operation) == ("tracked", "t_()")
    assert source(violation.written) == "h.t_()"


def test_an_alias_that_reaches_a_save_only_once_it_is_reshaped() -> None:
    def program(writes: bool) -> tuple[torch.Tensor, torch.Tensor]:
        x, flat = leaf(), torch.ones(6)
        aliases = [flat[3:].data for _ in range(20)]
        alias = flat[3:].data
        out = x * flat[:3]
        alias.as_strided_((3,), (1,), 0)
        if writes:
            torch.zeros(3, out=alias)
        assert aliases
        return x, out

    violation = told(program)
    assert (violation.kind, source(violation.aliased)) == ("unseen", "alias = flat[3:].data")


def test_a_saved_tensor_that_reaches_another_part_is_judged_there() -> None:
    """In a storage of so many saves that it is known which lie where; a block puts the version back."""

    def program(writes: bool) -> tuple[torch.Tensor, torch.Tensor]:
        x, flat = leaf(), torch.arange(6.0)
        h = flat[:3]
        others = [x * flat[:3] for _ in range(70)]
        out = x * h
        flat[5:].apply_(lambda value: value)  # asks who lies there
        with _preserve(h):
            h.as_strided_((3,), (1,), 3)
        alias = flat.data
        if writes:
            alias[3:].zero_()
        return x, out + 0 * torch.stack(others).sum(0)

    guard = torchguard.Guard("record")
    plain = gradient(program)
    assert not torch.equal(plain, gradient(program, writes=False))
    assert torch.equal(gradient(program, guard), plain)
    assert "zero_()" in [violation.operation for violation in guard.violations]


def test_pytorch_refuses_what_was_detached_in_place() -> None:
    def program(writes: bool) -> tuple[torch.Tensor, torch.Tensor]:
        x = leaf()
        h = x * 1
        out = h * h
        if writes:
            h.detach_()
        return x, out

    def said(guard: AbstractContextManager[Any] | None = None) -> str:
        try:
            return str(gradient(program, guard).tolist())
        except RuntimeError as error:
            return str(error)

    guard = torchguard.strict()
    assert said(guard).partition("Hint")[0] == said().partition("Hint")[0]
    assert guard.violations == []


# ---- repair() -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("saves", [1, 70])
def test_a_write_to_another_part_of_a_buffer_is_repaired(saves: int) -> None:
    """Also where so many saves lie in it that those in the part would be asked alone."""

    def program(writes: bool) -> tuple[torch.Tensor, torch.Tensor]:
        x, flat = leaf(), torch.arange(6.0)
        out = torch.stack([x * flat[:3] for _ in range(saves)]).sum(0)
        if writes:
            flat[3:].mul_(2)
        return x, out

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradient(program)
    guard = torchguard.Guard("repair")
    assert torch.equal(gradient(program, guard), gradient(program, writes=False))


# ---- what is computed anew ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [True, False])
def test_what_a_checkpoint_reads_again_is_written_to(own: bool) -> None:
    def program(writes: bool) -> tuple[torch.Tensor, torch.Tensor]:
        x, h = leaf(), torch.ones(3)
        out = checkpoint(lambda x: x.sin() * h, x, use_reentrant=False)
        if writes:
            (h if own else h.data).mul_(2)
        return x, out

    violation = told(program)
    assert violation.operation == "mul_()"
    assert violation.written is not None
    assert violation.written.function.endswith("program")


@pytest.mark.parametrize("own", [True, False])
def test_a_write_beside_what_a_checkpoint_reads_again(own: bool) -> None:
    def program(writes: bool) -> tuple[torch.Tensor, torch.Tensor]:
        x, flat = leaf(), torch.ones(6)
        h = flat[:3]
        out = checkpoint(lambda x: x.sin() * h, x, use_reentrant=False)
        if writes:
            (flat if own else flat.data)[3:].mul_(2)
        return x, out

    quiet(program)


def test_the_first_write_that_reached_what_a_checkpoint_reads_again_is_named() -> None:
    def program(writes: bool) -> tuple[torch.Tensor, torch.Tensor]:
        x, flat = leaf(), torch.ones(6)
        h = flat[:3]
        out = checkpoint(lambda x: x.sin() * h, x, use_reentrant=False)
        if writes:
            flat[3:].zero_()
            h.mul_(2)
        return x, out

    assert told(program).operation == "mul_()"


# ---- inference mode -----------------------------------------------------------------------------------------------


def test_an_alias_without_a_counter_is_written_to_unseen() -> None:
    def program(writes: bool) -> tuple[torch.Tensor, torch.Tensor]:
        x, h = leaf(), torch.ones(3)
        out = x * h
        with torch.inference_mode():
            value = torch.ones(3)
        h.data = value
        if writes:
            with torch.inference_mode():
                torch.zeros(3, out=value)
        return x, out

    assert told(program).caught == "read"


# ---- what a subclass wraps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", [lambda inside: inside, lambda inside: inside.data], ids=["itself", "alias"])
@pytest.mark.parametrize("at", [None, "read"])
def test_what_is_inside_a_saved_wrapper_is_written_to(route: Any, at: Any) -> None:
    """PyTorch looks at the wrapper's version only, so a write that moves the inner one is as silent as any."""

    def gradient_of(writes: bool) -> torch.Tensor:
        a, inside = leaf(), torch.ones(3)
        x = Boxed(a.detach()).requires_grad_()
        out = x * Boxed(inside)
        if writes:
            route(inside).mul_(2)
        out.sum().backward()
        assert isinstance(x.grad, Boxed)
        return x.grad.inside

    plain = gradient_of(True)
    assert not torch.equal(plain, gradient_of(False))
    with torchguard.Guard("record", at=at) as guard:
        assert torch.equal(gradient_of(True), plain)
    (violation,) = guard.violations
    assert (violation.kind, violation.operation, violation.caught) == ("wrapped", "mul_()", "read")
    assert source(violation.written) == "route(inside).mul_(2)"


# ---- other processes and threads ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize(("gathers", "caught"), [(True, "read"), (False, "write")])
def test_a_collective_writes_where_a_block_puts_the_version_back(gathers: bool, caught: str) -> None:
    """Gathering moves the version, which the block puts back; scattering does not, and is told at once."""

    def program(writes: bool) -> tuple[torch.Tensor, torch.Tensor]:
        x, h = leaf(), torch.ones(3)
        out = x * h
        if writes:
            with _preserve(h):
                if gathers:
                    dist.all_gather([h], torch.zeros(3))
                else:
                    dist.scatter(h, [torch.zeros(3)], src=0)
        return x, out

    violation = told(program)
    operation = "all_gather()" if gathers else "scatter()"
    assert (violation.kind, violation.operation, violation.caught) == ("uncounted", operation, caught)
    assert violation.written is not None
    assert violation.written.function.endswith("program")


def test_a_thread_from_before_the_guard_that_writes_is_named() -> None:
    begin, done = threading.Event(), []
    h = torch.ones(3)

    def work() -> None:
        assert begin.wait(60)
        h.data.mul_(1)
        done.append(True)

    thread = threading.Thread(target=work, name="the old one")
    thread.start()
    with torchguard.Guard("record") as guard:
        x = leaf()
        out = x * h
        begin.set()
        thread.join(60)
        assert done
        out.sum().backward()
    assert [line for line in guard.unwatched if "'the old one'" in line]


# ---- counters -----------------------------------------------------------------------------------------------------


def test_what_one_alias_did_unseen_is_not_forgotten_when_another_is_judged() -> None:
    """There are so many of them that only those that reach the memory written to are asked."""

    def program(writes: bool) -> tuple[torch.Tensor, torch.Tensor]:
        x, flat = leaf(6), torch.ones(6)
        out = torch.cat([x[:3] * flat[:3], x[3:] * flat[3:]])
        others = [flat[3:].data for _ in range(20)]
        first = flat[:3].data
        second = flat[3:].data
        if writes:
            torch.zeros(3, out=second)
        first.mul_(1)
        assert others
        return x, out

    violation = told(program)
    assert (violation.kind, source(violation.aliased)) == ("unseen", "second = flat[3:].data")


def test_of_two_tensors_that_a_call_writes_to_one_is_counted() -> None:
    """PyTorch refuses that one, and is left to do so."""
    with torchguard.Guard("record") as guard:
        x, scale, growth = leaf(1), torch.ones(1), torch.zeros(1, dtype=torch.int32)
        out = x * scale
        torch._amp_update_scale_(scale, growth, torch.ones(1), 2.0, 0.5, 1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()
    assert guard.violations == []


# ---- FSDP ---------------------------------------------------------------------------------------------------------

_FSDP = """
def free(h):
    h.untyped_storage().resize_(0)

def refill(h, kept):
    h.untyped_storage().resize_(kept.untyped_storage().nbytes())
    with preserve(h):
        h.copy_(kept)
"""


def test_fsdp_fills_freed_memory_with_other_bytes() -> None:
    space: dict[str, Any] = {"preserve": _preserve}
    exec(compile(_FSDP, _INVENTED, "exec"), space)

    def program(writes: bool) -> tuple[torch.Tensor, torch.Tensor]:
        x, h = leaf(), torch.ones(3)
        out = x * h
        kept = h * (2 if writes else 1)
        space["free"](h)
        space["refill"](h, kept)
        return x, out

    guard = torchguard.Guard("record", every_call=True)
    assert told(program, guard).operation == "FSDP's all-gather of changed shards"


def test_the_error_keeps_no_save_alive_that_the_bytes_were_to_decide_about() -> None:
    with torchguard.strict():
        x, inside = leaf(), torch.ones(3)
        boxed = Boxed(torch.ones(3)).requires_grad_() * Boxed(inside)
        out = x * inside
        holds = [weakref.ref(save) for save in saves_of(inside)]
        assert len(holds) == 2
        with pytest.raises(SavedTensorCorruptionError) as caught:
            inside.data = torch.zeros(3)
        del boxed, out
        gc.collect()
        assert [hold() for hold in holds] == [None, None]
    assert caught.value.violation.kind == "rebind"


def test_the_error_of_a_call_that_keeps_statistics_keeps_no_save_alive() -> None:
    norm, x = nn.BatchNorm1d(3).eval(), leaf(12)
    mean, var = norm.running_mean, norm.running_var
    assert mean is not None
    with torchguard.strict():
        out = norm(x.view(4, 3))
        hold = weakref.ref(saves_of(mean)[0])
        with pytest.raises(RuntimeError, match="weight should contain 3 elements") as caught:
            torch.batch_norm(BATCH, torch.ones(5), None, mean, var, True, 0.1, 1e-5, False)
        assert hold() is not None
        del out
        gc.collect()
        assert hold() is None
    assert caught.value is not None


# ---- several targets, keywords, places ------------------------------------------------------------------------------


class Handed(torch.Tensor):
    """A subclass that adds nothing."""


@pytest.mark.parametrize("writes", [True, False])
def test_a_target_that_nobody_saved_does_not_hide_the_next(writes: bool) -> None:
    with torchguard.Guard("record") as guard:
        x = leaf()
        y = x.sigmoid()
        for other in (torch.ones(3).as_subclass(Handed), torch.ones(3)):
            with torch.no_grad():
                torch._foreach_mul_([other, y.data if writes else torch.ones(3)], 2)
                torch._foreach_div_([other, y.data if writes else torch.ones(3)], 2)
    assert sum(violation.times for violation in guard.violations) == 4 * writes


@pytest.mark.parametrize("corrupting", [True, False])
def test_statistics_that_are_given_by_keyword(corrupting: bool) -> None:
    def program(writes: bool) -> tuple[torch.Tensor, torch.Tensor]:
        x, mean, var = leaf(6), torch.zeros(2), torch.ones(2)
        keywords: dict[str, Any] = {"weight": None, "bias": None, "running_mean": mean, "running_var": var, "eps": 1e-5}
        keywords |= {"momentum": 0.1 if corrupting else 0.0, "cudnn_enabled": False}
        out = torch.batch_norm(input=x.view(3, 2), training=False, **keywords)
        if writes:
            torch.batch_norm(input=torch.arange(8.0).view(4, 2), training=True, **keywords)
        return x, out

    truth, plain = gradient(program, writes=False), gradient(program)
    assert torch.equal(plain, truth) is not corrupting
    guard = torchguard.Guard("record")
    assert torch.equal(gradient(program, guard), plain)
    assert [violation.kind for violation in guard.violations] == ["uncounted"] * corrupting


def test_the_line_of_an_allowed_update_of_statistics_is_kept() -> None:
    with torchguard.Guard("record") as guard:
        norm = nn.BatchNorm1d(2)
        x = leaf(6).view(3, 2)
        out = norm.eval()(x)
        with torchguard.allow("on purpose"):
            norm.train()(torch.rand(4, 2))
        out.sum().backward()
    assert guard.violations == []
    assert guard.allowed
    for violation in guard.allowed:
        assert violation.written is not None
        assert violation.written.source == "norm.train()(torch.rand(4, 2))"


@pytest.mark.parametrize("where", ["array", "tensor"])
@pytest.mark.parametrize("writes", [True, False])
def test_a_save_over_an_array_of_torchs_memory_is_hit_once(where: str, writes: bool) -> None:
    """Two storages over the same memory: a write to the one is a write to the other."""
    owner = torch.ones(4)
    with torchguard.Guard("record") as guard:
        over = torch.from_numpy(owner.numpy())
        x = leaf(4)
        saved, written = (over, owner) if where == "array" else (owner, over)
        out = x * saved
        if writes:
            written.mul_(3)
        out.sum().backward()
    assert [(violation.caught, violation.times) for violation in guard.violations] == [("write", 1)] * writes


@pytest.mark.parametrize("quiet", ["no_grad", "hooks of its own"])
def test_a_thread_from_before_the_guard_that_saves_nothing_is_not_named(quiet: str) -> None:
    begin, h = threading.Event(), torch.ones(3)

    def work() -> None:
        assert begin.wait(60)
        with torch.no_grad() if quiet == "no_grad" else hooked():
            h.data.mul_(1)

    thread = threading.Thread(target=work, name="the old one")
    thread.start()
    with torchguard.Guard("record") as guard:
        out = leaf() * h
        begin.set()
        thread.join(60)
        out.sum().backward()
    assert not [line for line in guard.unwatched if "'the old one'" in line]


def test_a_write_to_what_was_saved_in_two_ways_while_another_thread_lives() -> None:
    over = threading.Event()
    thread = threading.Thread(target=over.wait, args=(60,))
    thread.start()
    try:
        with torchguard.Guard("record") as guard:
            x, buffer = leaf(), torch.ones(6)
            with hooked():
                first = x * buffer[:3]
            out = first + x * buffer[3:]
            buffer.data.mul_(1)
            buffer[:3].data.mul_(2)
            out.sum().backward()
    finally:
        over.set()
        thread.join()
    assert len(guard.violations) == 1


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("writes", [True, False])
def test_the_values_of_a_sparse_tensor_are_written_to_with_it(writes: bool) -> None:
    def program(write: bool) -> tuple[torch.Tensor, torch.Tensor]:
        sparse = torch.sparse_coo_tensor(torch.tensor([[0, 2]]), torch.tensor([2.0, 3.0]), (3,)).coalesce()
        x = leaf(2)
        out = x * sparse.values().data
        if write:
            sparse.mul_(2)
        return x, out

    truth = gradient(program, writes=False)
    plain = gradient(program, writes=writes)
    guard = torchguard.Guard("record")
    found = gradient(program, guard, writes=writes)
    assert torch.equal(found, plain)
    assert bool(guard.violations) is not torch.equal(plain, truth)


def test_a_write_beside_a_block_that_preserves_another_version_is_refused_by_pytorch() -> None:
    def program() -> str:
        x, h, other = leaf(), torch.ones(3), torch.ones(3)
        out = x * h
        with _preserve((other,)):
            h.mul_(2)
        with pytest.raises(RuntimeError) as refused:
            out.sum().backward()
        return str(refused.value)

    plain = program()
    with torchguard.strict() as guard:
        assert program() == plain
    assert guard.violations == []


# ---- reshaped in place, pointed elsewhere ---------------------------------------------------------------------------

RESHAPED: dict[str, Callable[[torch.Tensor], object]] = {
    "unsqueeze_": lambda x: x.unsqueeze_(0),
    "transpose_": lambda x: x.transpose_(0, 1),
    "swapaxes_": lambda x: torch.Tensor.swapaxes_(x, axis0=0, axis1=1),
    "as_strided_": lambda x: x.as_strided_((2,), (1,)),
    "resize_as_": lambda x: torch.resize_as_(x, torch.ones(2)),
}


@pytest.mark.parametrize("name", RESHAPED)
def test_what_is_reshaped_in_place_is_repaired_and_told_by_its_name(name: str) -> None:
    def program(writes: bool) -> tuple[torch.Tensor, torch.Tensor]:
        x = torch.linspace(0.5, 1.5, 6).view(2, 3).requires_grad_()
        out = x.sigmoid()
        total = out.sum()
        if writes:
            with torch.no_grad():
                RESHAPED[name](out.detach())
        return x, total

    truth = gradient(program, writes=False)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradient(program)
    guard = torchguard.repair()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert torch.equal(gradient(program, guard), truth)
    assert len(told) == len(guard.violations)
    assert {violation.operation for violation in guard.violations} <= {f"{name}()"}


@pytest.mark.parametrize("name", RESHAPED)
def test_the_saved_tensor_itself_is_reshaped(name: str) -> None:
    def program(writes: bool) -> tuple[torch.Tensor, torch.Tensor]:
        x, h = torch.ones(2, 3, requires_grad=True), torch.linspace(1, 2, 6).view(2, 3)
        out = (x * h).sum()
        if writes:
            RESHAPED[name](h)
        return x, out

    truth = gradient(program, writes=False)
    guard = torchguard.repair()
    with pytest.warns(torchguard.SavedTensorCorruptionWarning):
        assert torch.equal(gradient(program, guard), truth)
    (violation,) = guard.violations
    assert violation.operation == f"{name}()"
    assert violation.written is not None
    assert violation.written.function == "<lambda>"
    with torchguard.strict() as silent, pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradient(program)
    assert silent.violations == []


def test_a_part_of_a_buffer_that_moves_on_is_judged_where_it_lies_now() -> None:
    """A saved tensor that is pointed at another part of its crowded storage, in a block that puts its version back."""
    for corrupts in (True, False):

        def program(writes: bool, place: int = 360 if corrupts else 300) -> tuple[torch.Tensor, torch.Tensor]:
            x, flat = leaf(), torch.ones(400)
            others = [x * flat[3 * i : 3 * i + 3] for i in range(80)]
            h = flat[300:303]
            alias = flat.data
            out = x * h
            with _preserve((h,)):
                h.as_strided_((3,), (1,), 360)
            if writes:
                alias[place] = 5.0
            return x, torch.stack([out, *others])

        truth, plain = gradient(program, writes=False), gradient(program)
        assert torch.equal(plain, truth) is not corrupts
        guard = torchguard.Guard("record")
        assert torch.equal(gradient(program, guard), plain)
        assert bool(guard.violations) is corrupts, corrupts


@pytest.mark.parametrize("made", ["tensor", "parameter"])
@pytest.mark.parametrize("corrupts", [True, False])
def test_memory_that_a_checkpoint_reads_is_followed_where_it_is_pointed(made: str, corrupts: bool) -> None:
    def program(writes: bool) -> tuple[torch.Tensor, torch.Tensor]:
        x, h = leaf(), torch.linspace(1, 2, 3)
        h = nn.Parameter(h) if made == "parameter" else h
        out = checkpoint(lambda x: (x * h).sin(), x, use_reentrant=False)
        other = h.detach().clone()
        if writes:
            h.data = other
            if corrupts:
                other.mul_(2)
        return x, out

    truth, plain = gradient(program, writes=False), gradient(program)
    assert torch.equal(plain, truth) is not corrupts
    guard = torchguard.Guard("record")
    assert torch.equal(gradient(program, guard), plain)
    assert len(guard.violations) == corrupts
    if corrupts:
        assert guard.violations[0].kind == "recompute"


def test_who_pointed_what_a_checkpoint_reads_elsewhere_is_told() -> None:
    x, h = leaf(), torch.linspace(1, 2, 3)
    with torchguard.Guard("record") as guard:
        out = checkpoint(lambda x: (x * h).sin(), x, use_reentrant=False)
        h.data = torch.zeros(3)
        out.sum().backward()
    (violation,) = guard.violations
    assert (violation.kind, violation.operation) == ("recompute", "x.data = y")
    assert violation.written is not None
    assert violation.written.source == "h.data = torch.zeros(3)"


def test_what_is_no_tensor_is_refused_in_the_words_of_pytorch() -> None:
    def words() -> list[str]:
        told = []
        calls: list[Callable[[], object]] = [
            lambda: torch.Tensor.unsqueeze_(3, 0),  # type: ignore[arg-type]
            lambda: torch.Tensor.transpose_(None, dim0=0, dim1=1),  # type: ignore[arg-type]
            lambda: torch.resize_as_(3, the_template=torch.ones(2)),  # type: ignore[arg-type]
        ]
        for call in calls:
            with pytest.raises((TypeError, RuntimeError, AttributeError)) as refused:
                call()
            told.append(f"{refused.type} {refused.value}")
        return told

    plain = words()
    with torchguard.strict():
        assert words() == plain


@pytest.mark.usefixtures("empty_ledger")
@pytest.mark.parametrize("where", ["owner", "over it", "itself"])
@pytest.mark.parametrize("writes", [True, False])
def test_a_save_over_memory_that_torch_does_not_know_to_be_shared_is_hit_once(where: str, writes: bool) -> None:
    """One of two storages over the same memory says that it is not torch's own, the other does not."""
    owner = torch.ones(4)

    def program(write: bool) -> tuple[torch.Tensor, torch.Tensor]:
        owner.fill_(1)
        over = torch.frombuffer((ctypes.c_float * 4).from_address(owner.data_ptr()), dtype=torch.float32)
        x = leaf(4)
        saved, written = {"owner": (owner, over), "over it": (over, owner), "itself": (over, over.data)}[where]
        out = x * saved
        if write:
            written.mul_(3)
        return x, out

    truth = gradient(program, writes=False)
    guard = torchguard.Guard("record")
    found = gradient(program, guard, writes=writes)
    assert torch.equal(found, truth) is not writes
    assert [(violation.caught, violation.times) for violation in guard.violations] == [("write", 1)] * writes


def test_what_a_call_that_keeps_statistics_leaves_as_it_is_keeps_the_proof_that_it_had() -> None:
    """An array that others write to, unseen: the bytes alone tell."""

    def program(writes: bool) -> tuple[torch.Tensor, torch.Tensor]:
        x, norm = leaf(12), nn.BatchNorm1d(3, momentum=0.0).eval()
        out = norm(x.view(4, 3)).square()
        array = norm.running_var.detach().numpy()  # type: ignore[union-attr, operator]
        norm.train()
        norm(BATCH)
        if writes:
            array[:] = 5
        return x, out

    assert told(program).caught == "read"


@pytest.mark.usefixtures("empty_ledger")
def test_what_lies_inside_a_wrapper_is_saved_itself() -> None:
    """What is written to the wrapper does not move the version of what is inside."""

    def program(writes: bool) -> tuple[torch.Tensor, torch.Tensor]:
        x, inside = leaf(), torch.ones(3)
        box = Boxed(inside)
        out = x * inside
        if writes:
            box.mul_(2)
        return x, out

    assert told(program).operation == "mul_()"


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
def test_a_target_without_memory_comes_before_one_that_is_saved() -> None:
    def program(writes: bool) -> tuple[torch.Tensor, torch.Tensor]:
        x, h = leaf(), torch.ones(3)
        empty = torch.sparse_coo_tensor(torch.zeros(1, 1, dtype=torch.long), torch.ones(1), (3,))
        out = x * h
        if writes:
            torch._foreach_mul_([empty, h.data], 2.0)
        return x, out

    assert told(program).operation == "_foreach_mul_()"


def test_statistics_that_a_checkpoint_reads_again_are_written_to() -> None:
    def program(writes: bool) -> tuple[torch.Tensor, torch.Tensor]:
        x, norm = leaf(12), nn.BatchNorm1d(3).eval()
        out = checkpoint(lambda x: norm(x.view(4, 3)).square(), x, use_reentrant=False)
        if writes:
            norm.train()
            norm(BATCH)
            norm.eval()
        return x, out

    violation = told(program)
    assert (violation.kind, violation.operation) == ("recompute", "batch_norm()")


def back_off(scale: torch.Tensor, tracker: torch.Tensor, keyword: bool) -> None:
    """Halve ``scale``, whose version moves, and put ``tracker`` back to zero, whose version does not."""
    found = torch.ones(1)
    if keyword:
        torch._amp_update_scale_(
            input=scale,
            growth_tracker=tracker,
            found_inf=found,
            scale_growth_factor=2.0,
            scale_backoff_factor=0.5,
            growth_interval=10,
        )
    else:
        torch._amp_update_scale_(scale, tracker, found, 2.0, 0.5, 10)


@pytest.mark.filterwarnings("ignore::torchguard.SavedTensorCorruptionWarning")
@pytest.mark.parametrize("keyword", [False, True])
def test_a_call_that_moves_one_version_of_two_is_repaired(keyword: bool) -> None:
    def program(writes: bool) -> tuple[torch.Tensor, torch.Tensor]:
        x, scale, tracker = leaf(1), torch.full((1,), 4.0), torch.zeros(1, dtype=torch.int32)
        out = x * scale
        if writes:
            back_off(scale, tracker, keyword)
        return x, out

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradient(program)
    assert torch.equal(gradient(program, torchguard.Guard("repair")), gradient(program, writes=False))


@pytest.mark.parametrize("keyword", [False, True])
def test_a_call_that_moves_one_version_of_two_and_writes_to_what_is_saved_of_both(keyword: bool) -> None:
    """PyTorch refuses the one; the other is silently overwritten."""

    def outcome(guard: AbstractContextManager[Any], writes: bool = True) -> str:
        weight = leaf(6).detach().view(3, 2).requires_grad_()
        scale, tracker = torch.full((1,), 4.0), torch.ones(1, dtype=torch.int32)
        with guard:
            try:
                out = nn.functional.embedding(tracker, weight)
                if keyword:
                    out = out * scale
                if writes:
                    back_off(scale, tracker, keyword)
                out.sum().backward()
            except RuntimeError as error:
                return str(error)
        return str(weight.grad)

    assert outcome(nullcontext()) != outcome(nullcontext(), writes=False)
    for writes in (True, False):
        guard = torchguard.Guard("record")
        assert outcome(guard, writes) == outcome(nullcontext(), writes)
        assert [violation.operation for violation in guard.violations] == ["_amp_update_scale_()"] * writes


# ---- what is pointed elsewhere, or reaches elsewhere --------------------------------------------------------------


@pytest.mark.parametrize("size", [3, LARGE])
def test_what_was_written_unseen_was_written_where_the_alias_reached_then(size: int) -> None:
    def program(writes: bool) -> tuple[torch.Tensor, torch.Tensor]:
        x, flat = leaf(size), torch.ones(2 * size)
        out = x * flat[:size]
        alias = flat[:size].data
        if writes:
            torch.zeros(size, out=alias)
        alias.as_strided_((size,), (1,), size)
        return x, out

    told(program)


def test_a_leaf_that_is_detached_in_place_is_not_refused() -> None:
    def program(_: bool) -> tuple[torch.Tensor, torch.Tensor]:
        x, w = leaf(), leaf()
        out = x * w
        w.detach_()
        return x, out

    quiet(program)


def test_an_alias_that_is_pointed_elsewhere_writes_to_nothing_that_is_saved() -> None:
    """No bytes are kept of so large a save: the alias's counter alone would be held against it."""

    def program(writes: bool) -> tuple[torch.Tensor, torch.Tensor]:
        x, h = leaf(LARGE), torch.ones(LARGE)
        out = x * h
        alias = h.data
        alias.data = torch.zeros(LARGE)
        if writes:
            torch.ones(LARGE, out=alias)
        return x, out

    quiet(program)


@pytest.mark.parametrize("at", [None, "read"])
def test_the_last_write_to_what_was_pointed_at_the_same_bytes_is_named(at: Any) -> None:
    def program(writes: bool) -> tuple[torch.Tensor, torch.Tensor]:
        x, h = leaf(), torch.ones(3)
        out = x * h
        h.data.mul_(1)
        h.data = h.detach().clone()
        if writes:
            h.data.mul_(2)  # the last
        return x, out

    assert (source(told(program, torchguard.Guard("record", at=at)).written) or "").endswith("# the last")


@pytest.mark.parametrize("at", [None, "read"])
def test_memory_that_a_saved_tensor_is_pointed_at_is_written_through_an_older_alias(at: Any) -> None:
    def program(writes: bool) -> tuple[torch.Tensor, torch.Tensor]:
        x, h = leaf(), torch.ones(3)
        memory = torch.ones(3)
        alias = memory.data
        out = x * h
        h.data = memory
        if writes:
            torch.zeros(3, out=alias)
        return x, out

    told(program, torchguard.Guard("record", at=at))


@pytest.mark.parametrize("value", [torch.ones(2, 2, dtype=torch.int64), torch.ones(3, 3).to_sparse(), "text"])
@pytest.mark.parametrize("at", [None, "read"])
def test_a_refused_value_changes_nothing(value: Any, at: Any) -> None:
    x, h = leaf(), leaf()
    with torchguard.Guard("record", at=at) as guard:
        out = x * h
        with pytest.raises((RuntimeError, TypeError)):
            h.data = value
        out.sum().backward()
    assert guard.violations == []
    assert x.grad is not None
    assert torch.equal(x.grad, leaf().detach())


def test_a_tensor_that_is_pointed_elsewhere_beside_one_whose_unpack_is_the_programs() -> None:
    def program(writes: bool) -> tuple[torch.Tensor, torch.Tensor]:
        x, flat = leaf(), torch.ones(6)
        first, second = flat[:3], flat[3:]
        with hooked():
            out = x * first
        if writes:
            second.data = torch.zeros(3)
        return x, out

    quiet(program)


def refused(program: Callable[[], torch.Tensor], guard: AbstractContextManager[Any]) -> str:
    """In which words PyTorch refuses to go on."""
    with guard, pytest.raises(RuntimeError, match="modified by an inplace operation") as caught:
        program().sum().backward()
    return str(caught.value)


@pytest.mark.parametrize("write", [lambda h: h.add_(1).data.mul_(2), lambda h: h.t_()], ids=["twice", "reshaped"])
def test_what_pytorch_refuses_already_is_not_told(write: Callable[[torch.Tensor], object]) -> None:
    def program() -> torch.Tensor:
        x, h = leaf(4).detach().view(2, 2).requires_grad_(), torch.ones(2, 2)
        out = x * h
        write(h)
        return out

    guard = torchguard.Guard("record")
    assert refused(program, guard) == refused(program, nullcontext())
    assert guard.violations == []


def test_an_uncounted_write_of_gradchecks_is_told_as_one() -> None:
    perturb = function_of(_GRADCHECK, "def perturb(tensor):\n    tensor.untyped_storage().fill_(0)\n")

    def program(writes: bool) -> tuple[torch.Tensor, torch.Tensor]:
        x = leaf()
        out = x.sigmoid()
        if writes:
            perturb(out)
        return x, out

    assert told(program).kind == "uncounted"


@pytest.mark.parametrize("file", [_GRADCHECK, _INVENTED], ids=["gradcheck", "fsdp"])
def test_what_torch_itself_points_elsewhere_and_back_is_no_violation(file: str) -> None:
    perturb = function_of(file, _THERE_AND_BACK)

    def program(_: bool) -> tuple[torch.Tensor, torch.Tensor]:
        x, h = leaf(), torch.ones(3)
        out = x * h
        perturb(h, torch.zeros(3))
        return x, out

    quiet(program)


def test_who_wrote_first_answers_for_what_is_pointed_elsewhere_later() -> None:
    inner = torchguard.Guard("record")

    def program(writes: bool) -> tuple[torch.Tensor, torch.Tensor]:
        x, h = leaf(), torch.ones(3)
        out = x * h
        if writes:
            h.data.mul_(2)
            with inner:
                h.data = torch.zeros(3)
        return x, out

    outer = torchguard.Guard("record", at="read")
    assert not torch.equal(gradient(program), gradient(program, writes=False))
    inner = torchguard.Guard("record")
    gradient(program, outer)
    assert inner.violations == []
    (violation,) = outer.violations
    assert violation.operation == "mul_()"


def test_what_a_call_that_calls_back_wrote_is_answered_once() -> None:
    """NumPy shares the memory: the bytes are compared when backward reads, too."""

    def program(writes: bool) -> tuple[torch.Tensor, torch.Tensor]:
        x, h = leaf(), torch.ones(3)
        out = x * h
        array = h.numpy()
        if writes:
            h.data.apply_(lambda value: value + 1)
        assert array.shape == (3,)
        return x, out

    assert told(program).caught == "write"


def test_who_wrote_to_memory_that_a_checkpoint_reads_since_it_was_pointed_elsewhere_is_told() -> None:
    def program(writes: bool) -> tuple[torch.Tensor, torch.Tensor]:
        x, h = leaf(), torch.ones(3)
        out = checkpoint(lambda x: x.sin() * h, x, use_reentrant=False)
        h.data = torch.ones(3)
        if writes:
            h.data.mul_(2)
        return x, out

    assert told(program).operation == "mul_()"


@pytest.mark.parametrize("size", [3, LARGE])
def test_a_counted_write_beside_what_the_programs_own_hooks_keep(size: int) -> None:
    def program(writes: bool) -> tuple[torch.Tensor, torch.Tensor]:
        x, flat = leaf(size), torch.ones(2 * size)
        with hooked():
            out = x * flat[:size]
        alias = flat.data
        if writes:
            flat[size:].mul_(2)
        assert alias.numel() == 2 * size
        return x, out

    quiet(program)


def test_a_write_through_an_alias_that_watch_lends_is_left_to_pytorch() -> None:
    def program() -> torch.Tensor:
        x, h = leaf(), torch.ones(3)
        out = x * h
        with torchguard.watch():
            h.data.mul_(2)
        return out

    guard = torchguard.Guard("record")
    assert "modified by an inplace operation" in refused(program, guard)
    assert guard.violations == []


def test_statistics_that_evaluation_reads_are_proven_though_somebody_has_an_alias_of_them() -> None:
    """By the promise of ``every_call``: whoever writes."""

    def program(writes: bool) -> tuple[torch.Tensor, torch.Tensor]:
        x, norm = leaf(12), nn.BatchNorm1d(3).eval()
        assert norm.running_var is not None
        alias = norm.running_var.data
        out = norm(x.view(4, 3)).square()
        if writes:
            ctypes.memset(norm.running_var.data_ptr(), 0, 12)
        assert alias.numel() == 3
        return x, out

    told(program, torchguard.Guard("record", every_call=True))
