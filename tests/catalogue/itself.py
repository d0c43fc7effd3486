"""Calls that save what they then write over: the save is made inside the call, after the write was judged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from harness import Run, add

_ROUTE = "a call that writes to what it saves"

Write = Callable[[torch.Tensor, torch.Tensor], Any]

#: What is read is given by a function of the target.
WRITES: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any]] = {
    "mul_": lambda h, own, w: h.mul_(own),  # saved
    "div_": lambda h, own, w: h.div_(own),  # saved
    "addcmul_": lambda h, own, w: h.addcmul_(own, w),  # saved
    "addcdiv_": lambda h, own, w: h.addcdiv_(w, own),  # saved
    "atan2_": lambda h, own, w: h.atan2_(own),  # saved
    "foreach": lambda h, own, w: torch._foreach_mul_([h], [own]),  # saved
    "row": lambda h, own, w: h[0].mul_(own[0]),  # saved
}


def _add(name: str, kind: Any, of: Callable[[torch.Tensor], torch.Tensor], write: Any, **declared: Any) -> None:
    def body(run: Run) -> Any:
        a, w = run.leaf(), run.leaf([[0.5, 2.0, -1.0, 3.0]] * 3)
        h = a * 1
        run.write(lambda: write(h, of(h), w))  # saved
        h.sum().backward()
        return [a.grad, w.grad]

    add(body, name=name, route=_ROUTE, kind=kind, truth="cloned saves", **declared)


for _name, _write in WRITES.items():
    full = f"{_name}_of_its_own_data"
    _add(full, "corrupting", lambda h: h.data, _write, caught="read", every_call="read")
    _add(f"{_name}_of_a_copy", "innocent", lambda h: h.data.clone(), _write, twin_of=full)
    _add(f"{_name}_of_its_own_detached", "refused", lambda h: h.detach(), _write)
_add("other_row_of_its_own_data", "innocent", lambda h: h.data[1:], lambda h, own, w: h[0].mul_(own[0]))
_add("sum_with_its_own_data", "innocent", lambda h: h.data, lambda h, own, w: h.add_(own))
