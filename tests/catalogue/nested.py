"""Nested tensors of strided layout: one flat memory, and no strides that would tell of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from harness import Run, add

Write = Callable[[torch.Tensor], Any]


def _nested(*values: float, requires_grad: bool = True) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prototype, says torch
        rows = [torch.full((size + 2, 2), value) for size, value in enumerate(values)]
        return torch.nested.nested_tensor(rows, requires_grad=requires_grad)


def _add(name: str, kind: Any, write: Write, of_output: bool = False, **declared: Any) -> None:
    def body(run: Run) -> Any:
        x = _nested(1.0, -2.0)
        h = x * x  # saved
        out = (h * h).to_padded_tensor(0.0).sum()  # saved
        run.write(write, h if of_output else x)
        out.backward()
        return [row.clone() for row in x.grad.unbind()]  # type: ignore[union-attr]

    add(body, name=f"nested_{name}", route="nested tensor", kind=kind, hooks=False, **declared)


WRITES: dict[str, Write] = {
    "data": lambda t: t.data.mul_(2),
    "row_of_data": lambda t: t.data.unbind()[0].zero_(),
    "storage": lambda t: t.untyped_storage().fill_(0),
    "numpy": lambda t: t.detach().unbind()[1].numpy().fill(3.0),
    "out": lambda t: torch.mul(t.data.unbind()[1], 2, out=t.data.unbind()[1]),
}

for _name, _write in WRITES.items():
    _add(_name, "corrupting", _write, True, caught="read", every_call="read")
    _add(
        f"{_name}_of_a_copy",
        "innocent",
        lambda t, write=_write: write(t.detach().clone()),  # type: ignore[misc]
        True,
        twin_of=f"nested_{_name}",
    )

_add("data_by_one", "innocent", lambda t: t.data.mul_(1), True, twin_of="nested_data")
_add("data_is_read", "innocent", lambda t: t.data.to_padded_tensor(0.0).norm(), True, twin_of="nested_data")


def _rebound(run: Run) -> Any:
    x = _nested(1.0, -2.0)
    out = (x * x).to_padded_tensor(0.0).sum()  # saved
    run.write(lambda: setattr(x, "data", _nested(3.0, 1.0, requires_grad=False)))
    out.backward()
    return [row.clone() for row in x.grad.unbind()]  # type: ignore[union-attr]


add(_rebound, name="nested_rebound", route="x.data = y", kind="corrupting", hooks=False, repairable=False)


def _rebound_to_the_same(run: Run) -> Any:
    x = _nested(1.0, -2.0)
    out = torch.relu(x * x).to_padded_tensor(0.0).sum()  # saved
    run.write(lambda: setattr(x, "data", x.detach().clone()))
    out.backward()
    return [row.clone() for row in x.grad.unbind()]  # type: ignore[union-attr]


add(
    _rebound_to_the_same,
    name="nested_rebound_to_the_same",
    route="x.data = y",
    kind="innocent",
    twin_of="nested_rebound",
    hooks=False,
)
