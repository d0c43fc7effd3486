"""Is a buffer that is filled row by row, while earlier rows are saved, judged row by row, and at the price of a row?"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch

import torchguard
from benchmarks.instructions import count_steps

#: More saves than are gone through one by one.
ROWS = 70
WIDTH = 6

#: What of row ``i`` is written to, as an index.
INDICES: dict[str, Callable[[int], Any]] = {
    "row": lambda i: i,
    "row and all": lambda i: (i, slice(None)),
    "row and the rest": lambda i: (i, ...),
    "part of a row": lambda i: (i, slice(1, 4)),
    "every other": lambda i: (i, slice(None, None, 2)),
    "element": lambda i: (i, 2),
    "rows": lambda i: slice(i, i + 1),
    "from the end": lambda i: i - ROWS,
    "new axis": lambda i: (None, i),
    "column of a row": lambda i: (slice(i, i + 1), slice(-2, None)),
    "list": lambda i: [i],
    "tensor": lambda i: torch.tensor(i),
    "mask": lambda i: torch.arange(ROWS) == i,
    "list in a row": lambda i: (i, [0, 2]),
    "nothing": lambda i: slice(i, i),
}


def write(buffer: torch.Tensor, index: Any, value: float) -> None:
    buffer[index] = value


def gradient(
    index: Callable[[int], Any], again: int | None, guard: AbstractContextManager[Any] | None = None, held: bool = True
) -> torch.Tensor:
    """The gradient where each row is filled, and saved, after the one before; then row ``again`` is written to once more."""
    with guard or nullcontext():
        buffer, a = torch.zeros(ROWS, WIDTH), torch.ones(WIDTH, requires_grad=True)
        total: torch.Tensor | float = 0.0
        alias = buffer.data
        for i in range(ROWS):
            write(alias if held else buffer.data, index(i), float(i + 1))
            total = total + (a * buffer[i]).sum()
        if again is not None:
            write(alias if held else buffer.data, index(again), 100.0)
        assert isinstance(total, torch.Tensor)
        total.backward()
    assert a.grad is not None
    return a.grad


@pytest.mark.parametrize(
    ("mode", "held"), [("strict", True), ("strict", False), ("at the read", True), ("repair", True)]
)
@pytest.mark.parametrize("name", INDICES)
def test_a_row_is_judged_by_itself(name: str, mode: str, held: bool) -> None:
    index = INDICES[name]
    guards: dict[str, Callable[[], torchguard.Guard]] = {
        "strict": torchguard.strict,
        "at the read": lambda: torchguard.strict(at="read"),
        "repair": torchguard.repair,
    }
    truth = gradient(index, None, held=held)
    guard = guards[mode]()
    assert torch.equal(gradient(index, None, guard, held), truth)
    assert guard.violations == []
    row = 3
    plain = gradient(index, row, held=held)
    corrupts = not torch.equal(plain, truth)
    assert corrupts is (name != "nothing")
    guard = guards[mode]()
    if mode == "repair":
        with pytest.warns(torchguard.SavedTensorCorruptionWarning) if corrupts else nullcontext():
            found = gradient(index, row, guard, held)
        assert torch.equal(found, truth)
    elif corrupts:
        with pytest.raises(torchguard.SavedTensorCorruptionError):
            gradient(index, row, guard, held)
    assert len(guard.violations) == corrupts


def test_what_pytorch_refuses_of_a_row_it_refuses_in_its_own_words() -> None:
    def words(index: Any) -> str:
        with pytest.raises((IndexError, RuntimeError, TypeError, ValueError)) as caught:
            gradient(lambda i: i if i < ROWS - 1 else index, None)
        return f"{caught.type} {caught.value}"

    for index in (ROWS, (0, WIDTH), (0, 0, 0), slice(None, None, -1), "a", 1.5):
        plain = words(index)
        with torchguard.strict():
            assert words(index) == plain


@pytest.mark.parametrize("name", sorted(INDICES.keys() - {"list", "tensor", "mask", "list in a row", "from the end"}))
@pytest.mark.parametrize("at", ["write", "read"])
def test_a_row_costs_the_same_however_many_rows_are_saved(at: Any, name: str) -> None:
    each = {}
    index = INDICES[name](ROWS - 1)
    for rows in (100, 400):
        with torchguard.strict(at=at):
            buffer, a = torch.zeros(rows, WIDTH), torch.ones(WIDTH, requires_grad=True)
            alias, saved = buffer.data, []
            for i in range(rows):
                alias[i] = 1.0
                if i != ROWS - 1:
                    saved.append(a * buffer[i])
            each[rows] = count_steps(lambda alias=alias: write(alias, index, 2.0))  # type: ignore[misc]
    assert each[400] < 1.2 * each[100]


WHOLE: dict[str, Callable[[torch.Tensor], object]] = {
    "add_": lambda x: x.add_(1),
    "fill_": lambda x: x.fill_(0),
    "mul_": lambda x: torch.Tensor.mul_(x, 2),
    "masked_fill_": lambda x: x.masked_fill_(torch.ones(1, dtype=torch.bool), 0),
    "index_fill_": lambda x: x.index_fill_(0, torch.tensor([ROWS - 2]), 0),
    "foreach": lambda x: torch._foreach_add_([x], 1),
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_write_to_the_whole_is_judged_against_all_rows(name: str) -> None:
    buffer, a = torch.zeros(ROWS, WIDTH), torch.ones(WIDTH, requires_grad=True)
    with torchguard.strict():
        alias, kept = buffer.data, []
        for i in range(ROWS):
            alias[i] = 1.0
            kept.append(a * buffer[i])
        with pytest.raises(torchguard.SavedTensorCorruptionError):
            WHOLE[name](alias)


@pytest.mark.parametrize("corrupts", [True, False])
def test_an_unseen_write_through_a_new_alias_is_judged_by_the_rows_it_reaches(corrupts: bool) -> None:
    buffer, a = torch.zeros(ROWS + 1, WIDTH), torch.ones(WIDTH, requires_grad=True)
    with torchguard.Guard("record") as guard:
        kept = [a * buffer[i] for i in range(ROWS)]
        row = buffer.data[3 if corrupts else ROWS]
        torch.add(row, 1, out=row)
        torch.stack(kept).sum().backward()
    assert bool(guard.violations) is corrupts
