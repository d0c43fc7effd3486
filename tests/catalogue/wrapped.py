"""Tensor subclasses that wrap other tensors, as DTensor does: what is inside is written to below autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from harness import Run, add
from torch.utils._pytree import tree_map

Write = Callable[["Boxed"], Any]


class Boxed(torch.Tensor):
    """Wraps one tensor; every operation is done on what is inside."""

    inside: torch.Tensor

    @staticmethod
    def __new__(cls, inside: torch.Tensor) -> Boxed:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined, no-any-return]
            cls, inside.shape, dtype=inside.dtype, strides=inside.stride(), storage_offset=inside.storage_offset()
        )

    def __init__(self, inside: torch.Tensor) -> None:
        self.inside = inside

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inside"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], _meta: None, _size: Any, _stride: Any) -> Boxed:
        return Boxed(inner["inside"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def unbox(value: Any) -> Any:
            return value.inside if isinstance(value, Boxed) else value

        def box(value: Any) -> Any:
            return Boxed(value) if isinstance(value, torch.Tensor) else value

        result = func(*tree_map(unbox, args), **tree_map(unbox, kwargs or {}))
        if func._schema.is_mutable:
            return args[0]
        return tree_map(box, result)


def _boxed() -> tuple[Boxed, Boxed]:
    w, x = Boxed(torch.tensor([[1.0, 2.0], [3.0, 4.0]])), Boxed(torch.tensor([[0.5, -1.5], [2.5, 3.5]]))
    return w.requires_grad_(), x.requires_grad_()  # type: ignore[return-value]


def _add(name: str, kind: Any, write: Write, of_output: bool = False, **declared: Any) -> None:
    def body(run: Run) -> Any:
        w, x = _boxed()
        h = w * x  # saved
        out = (h * h).sum()  # saved
        run.write(write, h if of_output else w)
        out.backward()
        return [w.grad.inside, x.grad.inside]  # type: ignore[union-attr]

    add(body, name=f"wrapped_{name}", route="wrapper subclass", kind=kind, hooks=False, **declared)


def _foreach(t: Boxed) -> None:
    with torch.no_grad():
        torch._foreach_mul_([t.inside], 2.0)


WRITES: dict[str, Write] = {
    "data": lambda t: t.data.mul_(2),
    "data_item": lambda t: t.data.__setitem__(0, 7.0),
    "data_row": lambda t: t.data[1].zero_(),
    "inside": lambda t: t.inside.mul_(2),
    "inside_data": lambda t: t.inside.data.mul_(2),
    "foreach_of_inside": _foreach,
    "numpy_of_inside": lambda t: t.inside.numpy().fill(3.0),
    "out_into_inside": lambda t: torch.mul(t.inside, 2, out=t.inside),
    "out_into_data_of_inside": lambda t: torch.mul(t.inside, 2, out=t.inside.data),
    "storage_of_inside": lambda t: t.inside.untyped_storage().fill_(1),
}

for _name, _write in WRITES.items():
    for _of_output in (False, True):
        _suffix = "_of_an_output" if _of_output else ""
        _add(_name + _suffix, "corrupting", _write, _of_output, caught="read", every_call="read")
        _add(
            f"{_name}{_suffix}_of_a_copy",
            "innocent",
            lambda t, write=_write: write(Boxed(t.inside.detach().clone())),  # type: ignore[misc]
            _of_output,
            twin_of=f"wrapped_{_name}{_suffix}",
        )

_add("data_by_one", "innocent", lambda t: t.data.mul_(1), twin_of="wrapped_data")
_add("data_put_back", "innocent", lambda t: (t.data.mul_(2), t.data.mul_(0.5)), twin_of="wrapped_data")
_add("out_of_what_is_there", "innocent", lambda t: torch.mul(t.inside, 1, out=t.inside.data), twin_of="wrapped_data")


def _tracked(t: Boxed) -> None:
    with torch.no_grad():
        t.mul_(2)


_add("tracked", "refused", _tracked)


def _other_rows(run: Run) -> Any:
    whole = Boxed(torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    w = whole[:1].detach().requires_grad_()
    out = (w * w).sum()  # saved
    run.write(lambda: whole.data[1:].zero_())
    out.backward()
    return w.grad.inside  # type: ignore[union-attr]


add(
    _other_rows,
    name="wrapped_other_rows",
    route="wrapper subclass",
    kind="innocent",
    hooks=False,
    twin_of="wrapped_data_row",
)
