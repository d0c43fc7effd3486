"""Are many aliases of one storage (parameters cut from one flat buffer) judged as few are, and at what cost?"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Literal

import pytest
import torch

import torchguard
from benchmarks.instructions import count_steps
from torchguard._aliases import ALIASES

MANY = 60
Parameters = list[torch.nn.Parameter]
Write = Callable[[Parameters, list[torch.Tensor], torch.Tensor], object]


def flat(number: int) -> tuple[Parameters, torch.Tensor]:
    """Parameters of four elements each, cut from one buffer."""
    torch.manual_seed(0)
    buffer = torch.rand(4 * number) + 0.5
    parameters = [torch.nn.Parameter(torch.empty(4)) for _ in range(number)]
    for i, p in enumerate(parameters):
        p.data = buffer[4 * i : 4 * i + 4]
    return parameters, buffer


def gradients(write: Write | None, steps: int = 2) -> list[torch.Tensor]:
    """Those of the last of some steps, in which ``write`` comes between forward and backward."""
    parameters, buffer = flat(MANY)
    aliases = [p.data for p in parameters]
    for step in range(steps):
        loss = torch.stack([p.square() for p in parameters]).sum()  # saves each parameter
        if write is not None and step == steps - 1:
            write(parameters, aliases, buffer)
        for p in parameters:
            p.grad = None
        loss.backward()
        for p in parameters[:1] if step == steps - 1 else parameters:
            assert p.grad is not None
            with torch.no_grad():
                p.add_(p.grad, alpha=-0.01)
    return [p.grad for p in parameters if p.grad is not None]


def out_through(number: int) -> Write:
    return lambda parameters, aliases, buffer: torch.mul(aliases[number], 2.0, out=aliases[number])


def out_and_back(number: int) -> Write:
    def write(parameters: Parameters, aliases: list[torch.Tensor], buffer: torch.Tensor) -> None:
        alias = aliases[number]
        torch.mul(alias, 2.0, out=alias)
        torch.mul(alias, 0.5, out=alias)

    return write


def onto_its_neighbour(parameters: Parameters, aliases: list[torch.Tensor], buffer: torch.Tensor) -> None:
    """An alias of one parameter is pointed at the next one's memory, and written to unseen."""
    alias = parameters[50].data
    alias.as_strided_((4,), (1,), 4 * 51)
    torch.mul(alias, 2.0, out=alias)


CORRUPTING: dict[str, Write] = {
    "unseen, first": out_through(0),
    "unseen, last": out_through(MANY - 1),
    "unseen, through a new alias": lambda parameters, _, __: torch.neg(parameters[7].data, out=parameters[7].data),
    "unseen, through an alias that moved": onto_its_neighbour,
    "seen": lambda parameters, aliases, _: aliases[30].mul_(2),
    "seen, of them all": lambda parameters, aliases, _: torch._foreach_mul_(aliases, 2.0),
    "the buffer": lambda parameters, aliases, buffer: buffer[40:44].zero_(),
}
INNOCENT: dict[str, Write] = {
    "unseen and taken back": out_and_back(30),
    "unseen, the same values": lambda _, aliases, __: torch.mul(aliases[30], 1.0, out=aliases[30]),
    "seen, the same values": lambda _, aliases, __: aliases[30].mul_(1),
    "read": lambda _, aliases, __: [alias.sum() for alias in aliases],
}


@pytest.mark.parametrize("name", CORRUPTING)
def test_a_corrupting_write_is_loud(name: str) -> None:
    wrong, right = gradients(CORRUPTING[name]), gradients(None)
    assert not all(map(torch.equal, wrong, right))
    with pytest.raises(torchguard.SavedTensorCorruptionError), torchguard.strict():
        gradients(CORRUPTING[name])


@pytest.mark.parametrize("name", INNOCENT)
def test_its_innocent_twin_is_silent(name: str) -> None:
    right = gradients(None)
    assert all(map(torch.equal, gradients(INNOCENT[name]), right))
    with torchguard.strict() as guard:
        assert all(map(torch.equal, gradients(INNOCENT[name]), right))
    assert guard.violations == []


def test_an_unseen_write_to_what_is_not_saved_is_silent() -> None:
    parameters, _ = flat(MANY)
    with torchguard.strict() as guard:
        aliases = [p.data for p in parameters]
        losses = [p.square().sum() for p in parameters[:40]]
        for alias in aliases[40:]:
            torch.mul(alias, 2.0, out=alias)
        torch.stack(losses).sum().backward()
    assert guard.violations == []


@pytest.mark.parametrize("kept", [False, True], ids=["", "kept"])
def test_a_step_costs_the_same_however_many_there_are(kept: bool) -> None:
    each = {}
    for number in (50, 400):
        with torchguard.strict():
            parameters, _ = flat(number)
            aliases = [p.data for p in parameters] if kept else []

            def step(parameters: Parameters = parameters) -> None:
                torch.stack([p.square() for p in parameters]).sum().backward()
                with torch.no_grad():
                    for p in parameters:
                        p.sub_(p.grad)  # type: ignore[arg-type]
                        p.grad = None

            for _ in range(3):
                step()
            each[number] = count_steps(step) / number
            assert len(ALIASES.by_storage) < 10
            del aliases
    assert each[400] < 1.2 * each[50]


def test_pointing_a_tensor_at_itself_makes_no_alias() -> None:
    with torchguard.strict():
        model = torch.nn.Linear(3, 3)
        before = len(ALIASES.by_storage)
        model.to("cpu")
        assert len(ALIASES.by_storage) == before


# ---- a view that reaches further than the alias that it is a view of --------------------------------------------


def gradient_of_one(write: Callable[[torch.Tensor], object] | None) -> torch.Tensor:
    """The gradient of the second of two parameters, where ``write`` is given an alias of the first."""
    (first, second), _ = flat(2)
    loss = (second * second.sin()).sum()
    if write is not None:
        write(first.data)
    loss.backward()
    assert second.grad is not None
    return second.grad


def further(alias: torch.Tensor, *factors: float) -> None:
    view = alias.as_strided((4,), (1,), 4)
    for factor in factors:
        torch.mul(view, factor, out=view)


def moved(alias: torch.Tensor, *factors: float) -> None:
    view = alias.view_as(alias)
    view.as_strided_((4,), (1,), 4)
    for factor in factors:
        torch.mul(view, factor, out=view)


@pytest.mark.parametrize("reach", [further, moved])
@pytest.mark.parametrize("at", ["write", "read"])
def test_an_unseen_write_through_a_view_that_reaches_further(
    reach: Callable[..., None], at: Literal["write", "read"]
) -> None:
    right = gradient_of_one(None)
    assert not torch.equal(gradient_of_one(lambda alias: reach(alias, 2.0)), right)
    with pytest.raises(torchguard.SavedTensorCorruptionError), torchguard.strict(at=at):
        gradient_of_one(lambda alias: reach(alias, 2.0))
    for innocent in (lambda alias: reach(alias, 2.0, 0.5), lambda alias: torch.mul(alias, 2.0, out=alias)):
        assert torch.equal(gradient_of_one(innocent), right)
        with torchguard.strict(at=at) as guard:
            assert torch.equal(gradient_of_one(innocent), right)
        assert guard.violations == []


# ---- parts that share a counter -----------------------------------------------------------------------------------

HALF = 20
#: Elements of a part: more than are copied when something is saved that has a living alias.
LONG = 5000


class Parts:
    """Parameters pointed at the parts of a buffer that somebody holds; the first half of them is saved.

    The parts share one version counter, the parameters have one each: what moves when one part is written to is no
    sign of a write to another.
    """

    def __init__(self) -> None:
        torch.manual_seed(0)
        *self.parts, self.spare = (torch.rand((2 * HALF + 1) * LONG) + 0.5).split(LONG)
        self.parameters = [torch.nn.Parameter(torch.empty(LONG)) for _ in self.parts]
        for p, part in zip(self.parameters, self.parts, strict=True):
            p.data = part
        self.losses = [p.square().sum() for p in self.parameters[:HALF]]  # saves each parameter

    def write_unseen(self, number: int) -> None:
        torch.mul(self.parts[number], 2.0, out=self.parts[number])

    def gradients(self) -> list[torch.Tensor | None]:
        for loss in self.losses:
            loss.backward()
        return [p.grad for p in self.parameters[:HALF]]


def then_each_parameter(parts: Parts) -> None:
    parts.parts[-1].mul_(2)
    with torch.no_grad():
        for p in parts.parameters[HALF:]:
            p.mul_(2)


def two_of_them_twice(parts: Parts) -> None:
    for _ in range(2):
        parts.parts[-1].mul_(2)
        parts.parts[-3].mul_(2)


def unseen_and_then_seen(parts: Parts) -> None:
    parts.write_unseen(0)
    parts.parts[-1].mul_(2)


def seen_unseen_and_seen(parts: Parts) -> None:
    parts.parts[-1].mul_(2)
    parts.write_unseen(0)
    parts.parts[-2].mul_(2)


def seen_and_then_unseen(parts: Parts) -> None:
    parts.parts[-1].mul_(2)
    parts.write_unseen(0)


def unseen_read_and_seen(parts: Parts) -> None:
    parts.write_unseen(0)
    with contextlib.suppress(torchguard.SavedTensorCorruptionError):
        parts.losses.pop(5).backward()
    parts.parts[5].mul_(2)


def unseen_and_then_where_nothing_lies(parts: Parts) -> None:
    parts.write_unseen(0)
    parts.spare.mul_(2)


PARTS_APART: list[Callable[[Parts], None]] = [
    lambda parts: parts.parts[-1].mul_(2),
    lambda parts: parts.spare.mul_(2),
    lambda parts: parts.parts[-1].detach().mul_(2),
    lambda parts: torch._foreach_mul_(parts.parts[HALF:], 2.0),
    then_each_parameter,
    two_of_them_twice,
]


@pytest.mark.parametrize("every_call", [False, True])
@pytest.mark.parametrize("write", PARTS_APART)
def test_a_judged_write_to_another_part_is_silent(write: Callable[[Parts], None], every_call: bool) -> None:
    right = Parts().gradients()
    with torchguard.strict(every_call=every_call):
        parts = Parts()
        write(parts)
        found = parts.gradients()
    assert all(map(torch.equal, found, right))


@pytest.mark.parametrize(
    "write",
    [
        unseen_and_then_seen,
        seen_and_then_unseen,
        seen_unseen_and_seen,
        unseen_read_and_seen,
        unseen_and_then_where_nothing_lies,
    ],
)
def test_an_unseen_write_is_not_taken_for_a_judged_one(write: Callable[[Parts], None]) -> None:
    parts = Parts()
    write(parts)
    wrong, right = parts.gradients()[0], Parts().gradients()[0]
    assert wrong is not None
    assert right is not None
    assert not torch.equal(wrong, right)
    with torchguard.strict():
        parts = Parts()
        write(parts)
        with pytest.raises(torchguard.SavedTensorCorruptionError):
            parts.losses[0].backward()
