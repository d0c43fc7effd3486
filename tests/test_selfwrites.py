"""What may a call save of the memory that it then writes over, and what becomes of it?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import torchguard
from torchguard import _selfwrites
from torchguard._writers import Writer, writer_of


class Plain(torch.Tensor):
    """A subclass that adds nothing."""


def writer(name: str) -> Writer:
    found = writer_of(name)
    assert found is not None
    return found


def output(values: Any = ((1.0, 2.0), (3.0, 4.0))) -> tuple[torch.Tensor, torch.Tensor]:
    """A leaf, and what is computed from it, of the same values."""
    leaf = torch.tensor(values, requires_grad=True)
    return leaf, leaf * 1


# ---- the quick look -----------------------------------------------------------------------------------------------

H, OTHER = torch.ones(2, 2), torch.ones(2, 2)
LOOKS: dict[str, tuple[tuple[Any, ...], bool]] = {
    "nothing": ((H,), False),
    "a number": ((H, 2.0), False),
    "another tensor": ((H, OTHER), False),
    "itself": ((H, H), True),  # PyTorch's to refuse, but under repair()
    "its own data": ((H, H.data), True),
    "another part of its memory": ((H[0], H[1]), True),  # a closer look tells
    "its own data, after a number": ((H, 2.0, H.data), True),
    "its own data, after another tensor": ((H, OTHER, H.data), True),
    "another tensor, after a number": ((H, 2.0, OTHER), False),
    "a number, after another tensor": ((H, OTHER, 2.0), False),
    "a list": (([H], [OTHER]), True),
    "a subclass": ((H.as_subclass(Plain), OTHER), True),
    "a storage": ((H.untyped_storage(), 2, 3), False),
    "without memory": ((torch.ones(2, 2).to_sparse(), torch.ones(2, 2).to_sparse()), False),
}


@pytest.mark.parametrize("name", LOOKS)
def test_the_quick_look(name: str) -> None:
    look = _selfwrites.may_save_what_it_writes("mul_")
    assert look is not None
    arguments, answer = LOOKS[name]
    assert look(arguments) is answer


CALLS: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "__setitem__": lambda h, own: h.__setitem__(0, own[1]),
    "copy_": lambda h, own: h.copy_(own),
    "add_": lambda h, own: h.add_(own),
    "sub_": lambda h, own: h.sub_(own),
    "__iadd__": lambda h, own: h.__iadd__(own),
    "__isub__": lambda h, own: h.__isub__(own),
    "_foreach_copy_": lambda h, own: torch._foreach_copy_([h], [own]),
    "_foreach_add_": lambda h, own: torch._foreach_add_([h], [own]),
    "_foreach_sub_": lambda h, own: torch._foreach_sub_([h], [own]),
    "mul_": lambda h, own: h.mul_(own),
    "_foreach_mul_": lambda h, own: torch._foreach_mul_([h], [own]),
}


@pytest.mark.parametrize("name", CALLS)
def test_only_what_saves_is_looked_at(name: str) -> None:
    _, h = output()
    own = h.data
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda _: torch.empty(0)):
        CALLS[name](h, own)
    assert (_selfwrites.may_save_what_it_writes(name) is not None) is bool(saved)
    with torchguard.strict():
        assert bool(_selfwrites.own_reads(writer(name), (h, own) if h.dim() else (), {})) is bool(saved)


# ---- what a call may save of what it writes to --------------------------------------------------------------------


def read(name: str, *args: Any, **kwargs: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(read.tensor, read.target) for read in _selfwrites.own_reads(writer(name), args, kwargs)]


def same(found: list[tuple[torch.Tensor, torch.Tensor]], *expected: tuple[torch.Tensor, torch.Tensor]) -> bool:
    return len(found) == len(expected) and all(
        a is c and b is d for (a, b), (c, d) in zip(found, expected, strict=True)
    )


def test_what_overlaps_the_target_and_is_not_the_target() -> None:
    _, h = output()
    own, w = h.data, torch.ones(2, 2)
    with torchguard.strict():
        assert same(read("mul_", h, own), (own, h))
        assert same(read("mul_", h, other=own), (own, h))
        assert same(read("addcmul_", h, w, own), (own, h))
        assert same(read("mul_", h, w))
        assert same(read("mul_", h, h))  # PyTorch refuses it
        assert same(read("mul_", h, 2.0))
        assert same(read("mul_", h[0], own[1]))
        row, other = h[0], own[0]
        assert same(read("mul_", row, other), (other, row))


def test_where_nothing_requires_grad_nothing_is_saved() -> None:
    h = torch.ones(2, 2)
    with torchguard.strict():
        assert same(read("mul_", h, h.data))
        h.requires_grad_()
        own = h.data
        assert same(read("mul_", h, own), (own, h))


def test_under_repair_what_pytorch_would_refuse_counts_too() -> None:
    _, h = output()
    with torchguard.repair():
        assert same(read("mul_", h, h), (h, h))
        own = h.data
        assert same(read("addcmul_", h, h, own), (h, h), (own, h))
        assert same(read("mul_", h, torch.ones(2, 2)))


def test_each_target_has_its_own() -> None:
    _, h = output()
    _, other = output()
    subclass, own = other.as_subclass(Plain), h.data
    with torchguard.strict():
        assert same(read("_foreach_mul_", [subclass, h], [torch.ones(2, 2), own]), (own, h))
        assert same(read("_foreach_mul_", [subclass], [other.data]))  # its attributes may be the user's code


def test_collectives_and_running_statistics_are_judged_elsewhere() -> None:
    _, h = output()
    mean = torch.zeros(2)
    weight = mean.data.requires_grad_()
    statistics = writer("batch_norm")
    assert statistics.keeps_statistics
    with torchguard.strict():
        assert _selfwrites.own_reads(Writer("all_reduce", collective=True), (h, h.data), {}) == []
        arguments = (torch.ones(3, 2), weight, None, mean, torch.ones(2), True, 0.1, 1e-5, False)
        assert _selfwrites.own_reads(statistics, arguments, {}) == []


# ---- what becomes of it -------------------------------------------------------------------------------------------


def test_the_report_names_the_call_the_alias_and_the_line() -> None:
    with torchguard.Guard("record") as guard:
        _, h = output()
        own = h.data
        h.mul_(own)
        h.sum().backward()
    (violation,) = guard.violations
    assert (violation.kind, violation.operation, violation.caught) == ("write", "mul_()", "read")
    assert violation.written is not None
    assert violation.written.source == "h.mul_(own)"
    assert violation.aliased is None  # it is written through h

    with torchguard.Guard("record") as guard:
        h = torch.full((2, 2), 3.0)
        c = h.data
        c.add_(torch.zeros(2, 2, requires_grad=True))  # part of a graph now, and nothing is saved for it
        c.mul_(h)
        out = c.sum()
        del c  # what was known of it must not depend on it
        out.backward()
    (violation,) = guard.violations
    assert violation.written is not None
    assert violation.written.source == "c.mul_(h)"
    assert violation.aliased is not None
    assert violation.aliased.source == "c = h.data"


def test_under_repair_backward_is_given_what_was_saved() -> None:
    def gradient(square: Callable[[torch.Tensor], Any]) -> torch.Tensor:
        leaf, h = output()
        square(h).sum().backward()
        assert leaf.grad is not None
        return leaf.grad

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradient(lambda h: h.mul_(h))
    truth = gradient(lambda h: h.clone().mul(h))
    with torchguard.Guard("repair") as guard:
        with pytest.warns(torchguard.SavedTensorCorruptionWarning):
            assert torch.equal(gradient(lambda h: h.mul_(h)), truth)
    (violation,) = guard.violations
    assert (violation.kind, violation.operation, violation.repaired) == ("tracked", "mul_()", True)


def test_what_was_saved_before_the_call_is_judged_by_the_call() -> None:
    """PyTorch refuses it, in its own words."""

    def run() -> None:
        _, h = output()
        out = (h * h.detach()).sum()
        h.mul_(h.data)
        out.backward()

    with pytest.raises(RuntimeError, match="modified by an inplace operation") as plain:
        run()
    with torchguard.strict(), pytest.raises(RuntimeError) as guarded:
        run()
    assert (guarded.type, str(guarded.value)) == (plain.type, str(plain.value))


def test_what_was_saved_before_the_call_is_told_once() -> None:
    with torchguard.Guard("record") as guard:
        _, h = output()
        y = h.exp()
        c = y.data
        c.add_(torch.zeros(2, 2, requires_grad=True))  # part of a graph now, and no byte changes
        c.mul_(y.data)
        y.sum().backward()
        assert [(violation.saved_by, violation.times) for violation in guard.violations] == [("exp", 1)]
        out = c.sum()
        del c
        out.backward()
    assert [(violation.caught, violation.times) for violation in guard.violations] == [("write", 1), ("read", 1)]
    assert [violation.saved_by for violation in guard.violations] == ["exp", "mul_"]
    aliases = [violation.aliased for violation in guard.violations]
    assert [alias and alias.source for alias in aliases] == ["c = y.data"] * 2


@pytest.mark.parametrize("of", [0, 1])
def test_each_save_is_compared_with_what_it_was_itself(of: int) -> None:
    """The second tensor holds ones, which multiplied by themselves are what they were."""
    with torchguard.Guard("record") as guard:
        twos, ones = output([2.0, 2.0]), output([1.0, 1.0])
        torch._foreach_mul_([twos[1], ones[1]], [twos[1].data, ones[1].data])
        (twos, ones)[of][1].sum().backward()
    assert [violation.operation for violation in guard.violations] == ["_foreach_mul_()"] * (of == 0)
