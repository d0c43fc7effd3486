"""Functions under torch.compile: writes inside a region, and between a compiled forward and its backward."""

from __future__ import annotations

import functools
import shutil
import warnings
from collections.abc import Callable
from typing import Any

import torch
from harness import Run, add, no_lack

Write = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any]

ROUTE = "torch.compile"
HAS_COMPILER = shutil.which("g++") is not None or shutil.which("clang++") is not None


class Stash(torch.autograd.Function):
    """Keeps a tensor where nothing looks at its version."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
        ctx.h = h
        return x * h

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        return grad * ctx.h, None


def multiplies(x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:  # saved
    return (x * h).sin()


def saves_its_output(x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:  # saved
    return (x + h).tanh()


def views_its_input(x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:  # saved
    return torch.mm(x.view(2, 2), h.view(2, 2).t())


def stashes(x: torch.Tensor, h: torch.Tensor) -> torch.Tensor:  # saved
    return Stash.apply(x, h)  # type: ignore[no-any-return]


@functools.cache
def compiled(function: Callable[..., torch.Tensor], backend: str) -> Callable[..., torch.Tensor]:
    return torch.compile(function, backend=backend)


def _inputs() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([0.3, 1.2, -0.7, 0.9], requires_grad=True), torch.tensor([0.5, -1.1, 2.0, 0.4])


def _between(run: Run, function: Callable[..., torch.Tensor], backend: str, write: Write, when: str) -> Any:
    x, h = _inputs()
    out = compiled(function, backend)(x, h)
    if when == "before":
        run.write(write, x, h, out)
    out.sum().backward()
    if when == "after":
        run.write(write, x, h, out)
    if when == "on a clone":
        run.write(write, x.detach().clone(), h.clone(), out.detach().clone())
    return [x.grad]


@functools.cache
def lacks_ignorance_of_a_stash() -> str:
    """For programs in which nothing looks at the version of what a Function keeps on its ctx."""
    x, h = _inputs()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        out = compiled(stashes, "aot_eager")(x, h)
    h.mul_(2)
    try:
        out.sum().backward()
    except RuntimeError:
        return "this torch's compiler hands autograd what a Function keeps on its ctx"
    return ""


BETWEEN: dict[str, tuple[Callable[..., torch.Tensor], Write, dict[str, Any]]] = {
    "input_data": (multiplies, lambda x, h, out: h.data.mul_(2), {}),
    "input_slice": (multiplies, lambda x, h, out: h.data[1:].mul_(2), {}),
    "input_ops": (multiplies, lambda x, h, out: torch.ops.aten.mul_(h.data, 2), {"caught": "read"}),
    "input_rebound": (multiplies, lambda x, h, out: setattr(h, "data", torch.zeros(4)), {}),
    "parameter_data": (multiplies, lambda x, h, out: x.data.mul_(2), {}),
    "output_data": (saves_its_output, lambda x, h, out: out.data.mul_(2), {}),
    "stash_tracked": (stashes, lambda x, h, out: h.mul_(2), {"caught": "read", "every_call": "read"}),
    "stash_data": (stashes, lambda x, h, out: h.data.mul_(2), {"caught": "read", "every_call": "read"}),
    "stash_ops": (stashes, lambda x, h, out: torch.ops.aten.mul_(h, 2), {"caught": "read", "every_call": "read"}),
    "stash_rebound": (
        stashes,
        lambda x, h, out: setattr(h, "data", torch.zeros(4)),
        {"caught": "read", "every_call": "read"},
    ),
}
#: Inductor rebuilds a view of an input, and its version counter is another one from then on.
LOST: dict[str, tuple[Callable[..., torch.Tensor], Write, dict[str, Any]]] = {
    "view_tracked": (views_its_input, lambda x, h, out: h.mul_(2), {}),
    "view_ops": (views_its_input, lambda x, h, out: torch.ops.aten.mul_(h, 2), {"caught": "read"}),
    "view_out": (views_its_input, lambda x, h, out: torch.mul(h, 2, out=h), {"caught": "read"}),
}


def _programs(table: dict[str, tuple[Callable[..., torch.Tensor], Write, dict[str, Any]]], backend: str) -> None:
    for name, (function, write, declared) in table.items():
        full = f"compiled_{backend}_{name}"
        lacks = lacks_ignorance_of_a_stash if function is stashes else no_lack
        add(
            lambda run, f=function, w=write: _between(run, f, backend, w, "before"),
            name=full,
            route=ROUTE,
            kind="corrupting",
            hooks=False,
            lacks=lacks,
            **({"every_call": "write"} | declared),
        )
        for when in ("after", "on a clone"):
            add(
                lambda run, f=function, w=write, when=when: _between(run, f, backend, w, when),
                name=f"{full}_{when}",
                route=ROUTE,
                kind="innocent",
                twin_of=full,
                hooks=False,
                lacks=lacks,
            )


_programs(BETWEEN, "aot_eager")
if HAS_COMPILER:
    _programs(LOST, "inductor")

add(
    lambda run: _between(run, saves_its_output, "aot_eager", lambda x, h, out: out.detach().mul_(2), "before"),
    name="compiled_aot_eager_output_tracked",
    route=ROUTE,
    kind="refused",
    hooks=False,
)
add(
    lambda run: _between(run, multiplies, "aot_eager", lambda x, h, out: h.mul_(2), "before"),
    name="compiled_aot_eager_input_tracked",
    route=ROUTE,
    kind="refused",
    hooks=False,
)


# ---- inside a region ----------------------------------------------------------------------------------------------


def _intermediate(x: torch.Tensor, h: torch.Tensor, writes: bool) -> torch.Tensor:
    y = x.sin()
    z = y * x
    if writes:
        y.data.mul_(2)
    return z.sum()


def _input(x: torch.Tensor, h: torch.Tensor, writes: bool) -> torch.Tensor:
    z = x * h
    if writes:
        h.data[1:].mul_(2)
    return z.sum()


def _output(x: torch.Tensor, h: torch.Tensor, writes: bool) -> torch.Tensor:
    z = x.tanh()
    if writes:
        z.data.zero_()
    return (z * 1).sum() * 0 + z.sum()


def _random(x: torch.Tensor, h: torch.Tensor, writes: bool) -> torch.Tensor:
    z = x * (h + torch.rand(4))
    y = z * x
    if writes:
        z.data.mul_(torch.rand(4) + 1)
    return y.sum()


def _on_a_copy(x: torch.Tensor, h: torch.Tensor, writes: bool) -> torch.Tensor:
    y = (x * 2).detach()
    if writes:
        y.data.mul_(1)
    scale = h.data.clone()
    scale.add_(1)
    return (x * y * scale * torch.rand(4)).sum()


def _on_another_part(x: torch.Tensor, h: torch.Tensor, writes: bool) -> torch.Tensor:
    both = torch.stack([h, h + 1])
    z = x * both[0]
    if writes:
        both.data[1].mul_(2)
    return z.sum()


def _without_a_graph(x: torch.Tensor, h: torch.Tensor, writes: bool) -> torch.Tensor:
    with torch.no_grad():
        y = x.sin() * h
        if writes:
            y.data.mul_(1)
            y.data.add_(0)
    return (x * y).sum()


def _region(run: Run, function: Callable[..., torch.Tensor], backend: str) -> Any:
    torch._dynamo.reset()  # what was compiled without a guard is not known to it
    x, h = _inputs()
    run.write(lambda: None)
    out = torch.compile(function, backend=backend)(x, h, run.writes)
    out.backward()
    return [x.grad, torch.rand(2)]


REGIONS = ("aot_eager", "eager")
for _function in (_on_a_copy, _on_another_part, _without_a_graph):
    for _backend in REGIONS:
        add(
            lambda run, f=_function, b=_backend: _region(run, f, b),
            name=f"compiled_region_{_backend}{_function.__name__}",
            route=ROUTE,
            kind="innocent",
            hooks=False,
            twin_of="compiled_aot_eager_input_data",
        )
