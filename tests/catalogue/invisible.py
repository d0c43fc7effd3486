"""Writes that no Python sees: through raw pointers, by operators that do not say it, to what a Function stashes on its ctx."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from harness import Run, add

ROUTE = "no Python sees it"

Write = Callable[[torch.Tensor], Any]


def _poke(tensor: torch.Tensor) -> None:
    ctypes.memset(tensor.data_ptr(), 0, tensor.element_size())


def _fill(tensor: torch.Tensor) -> None:
    ctypes.memset(tensor.data_ptr(), 0x41, tensor.numel() * tensor.element_size())


def _swap_halves(tensor: torch.Tensor) -> None:
    half = tensor.numel() * tensor.element_size() // 2
    low = ctypes.string_at(tensor.data_ptr(), half)
    ctypes.memmove(tensor.data_ptr(), tensor.data_ptr() + half, half)
    ctypes.memmove(tensor.data_ptr() + half, low, half)


def _flip_signs(tensor: torch.Tensor) -> None:
    words = (ctypes.c_uint32 * tensor.numel()).from_address(tensor.data_ptr())
    for i, word in enumerate(words):
        words[i] = word ^ 0x80000000


@torch.library.custom_op("torchguard_tests::says_it_writes_to_nothing", mutates_args=())
def says_it_writes_to_nothing(x: torch.Tensor) -> torch.Tensor:
    """Writes to ``x`` all the same."""
    ctypes.memset(x.data_ptr(), 0, 4)
    return x.sum()


POINTERS: dict[str, Write] = {
    "one_element": _poke,
    "fill": _fill,
    "permutation": _swap_halves,
    "signs": _flip_signs,
    "operator": lambda t: says_it_writes_to_nothing(t.detach()),
}
SAVING: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "input": lambda w, h: h * w,  # saved
    "view": lambda w, h: h.view(-1)[2:10].view(2, 4) * w[:2],  # saved
    "transposed": lambda w, h: h.t() @ w,  # saved
}


def _pointer(write: Write, save: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[[Run, str], Any]:
    def body(run: Run, when: str) -> Any:
        w, h = run.leaf(), run.leaf() + 1
        out = save(w, h)  # saved
        if when == "restored":
            kept = ctypes.string_at(h.data_ptr(), 48)
            run.write(lambda: (write(h), ctypes.memmove(h.data_ptr(), kept, 48)))
        elif when == "clone":
            run.write(write, h.detach().clone())
        elif when == "before":
            run.write(write, h.view(-1)[4:8])
        out.sin().sum().backward()
        if when == "after":
            run.write(write, h)
        return [w.grad]

    return body


for _how, _write in POINTERS.items():
    for _what, _save in SAVING.items():
        _name = f"pointer_{_how}_of_{_what}"
        _body = _pointer(_write, _save)
        add(
            lambda run, body=_body: body(run, "before"),
            name=_name,
            route=ROUTE,
            kind="corrupting",
            only_audit=True,
        )
        for _when in ("clone", "after", "restored"):
            add(
                lambda run, body=_body, when=_when: body(run, when),
                name=f"{_name}_{_when}",
                route=ROUTE,
                kind="innocent",
                twin_of=_name,
                hooks=_when != "restored",
            )


class Stash(torch.autograd.Function):
    """Keeps what it was given, what it returns and a list where nobody looks."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        ctx.h = h
        ctx.several = {"half": [h / 2]}
        return x * h * 1.5

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        return grad * (ctx.h + ctx.several["half"][0]), None


STASHED: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "tracked": lambda h, half: h.add_(1),
    "data": lambda h, half: h.data.mul_(2),
    "row": lambda h, half: h[1].data.zero_(),
    "out": lambda h, half: torch.add(h, 1, out=h),
    "ops": lambda h, half: torch.ops.aten.mul_(h, 2),
    "rebound": lambda h, half: setattr(h, "data", torch.zeros(3, 4)),
    "pointer": lambda h, half: _poke(h),
    "in_a_list": lambda h, half: half.mul_(3),
}


def _stash(write: Callable[[torch.Tensor, torch.Tensor], Any], before: bool) -> Callable[[Run], Any]:
    def body(run: Run) -> Any:
        x, h = run.leaf(), run.leaf(requires_grad=False)
        out = Stash.apply(x, h)  # type: ignore[no-untyped-call]  # saved
        half = out.grad_fn.several["half"][0]
        if before:
            run.write(write, h, half)
        out.sum().backward()
        if not before:
            run.write(write, h, half)
        return [x.grad]

    return body


for _how, _change in STASHED.items():
    _name = f"ctx_stash_{_how}"
    add(
        _stash(_change, True),
        name=_name,
        route=ROUTE,
        kind="corrupting",
        only_audit=True,
        repairable=False,
        hooks=False,
    )
    add(_stash(_change, False), name=f"{_name}_after", route=ROUTE, kind="innocent", twin_of=_name, hooks=False)
