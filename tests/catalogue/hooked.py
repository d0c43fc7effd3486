"""Programs that have save hooks of their own: under them PyTorch compares no versions, so a tracked write is silent, too.

What was packed decides. A pair that keeps the memory (as it is, in a container, behind a key) is corrupted by a write to
it; one that copies is not. ``harness`` puts the clones and the recorder of its truth under the program's own pair.
"""

from __future__ import annotations

import functools
import io
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from harness import Moment, Run, add, lacks_shown_hooks, no_lack, program
from torch.autograd import Function, grad
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

_ROUTE = "save hooks of the program"

Pack = Callable[[torch.Tensor], Any]
Unpack = Callable[[Any], torch.Tensor]
Hooks = Callable[[], AbstractContextManager[Any]]
Write = Callable[[torch.Tensor], Any]


class _Kept:
    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


class _Slotted:
    __slots__ = ("tensor",)

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


@dataclass
class _Record:
    shape: Any
    parts: list[Any]


def _in_a_closure(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    return lambda: tensor


def _pair(pack: Pack, unpack: Unpack = lambda packed: packed) -> Hooks:
    return lambda: saved_tensors_hooks(pack, unpack)


def _by_key(keep: Callable[[torch.Tensor], Any], load: Callable[[Any], torch.Tensor]) -> Hooks:
    def hooks() -> AbstractContextManager[Any]:
        kept: dict[int, Any] = {}

        def pack(tensor: torch.Tensor) -> int:
            kept[len(kept)] = keep(tensor)
            return len(kept) - 1

        return saved_tensors_hooks(pack, lambda key: load(kept[key]))

    return hooks


torch.save(torch.ones(1), io.BytesIO())  # the first one leaves a note in torch.Tensor


def _to_file(tensor: torch.Tensor) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(tensor.detach().clone(), file)
    return file


def _from_file(file: io.BytesIO) -> torch.Tensor:
    file.seek(0)
    loaded: torch.Tensor = torch.load(file)
    return loaded


#: What was packed shows that backward will read the memory.
KEEP: dict[str, Hooks] = {
    "itself": _pair(lambda tensor: tensor),
    "detached": _pair(lambda tensor: tensor.detach()),
    "alias": _pair(lambda tensor: tensor.data),
    "same_dtype": _pair(lambda tensor: tensor.to(torch.float32)),
    "tuple": _pair(lambda tensor: (tensor.device, tensor.detach()), lambda packed: packed[1]),
    "nested": _pair(lambda tensor: {"a": [None, (tensor.detach(),)]}, lambda packed: packed["a"][1][0]),
    "object": _pair(lambda tensor: _Kept(tensor.detach()), lambda packed: packed.tensor),
    "slots": _pair(lambda tensor: _Slotted(tensor.detach()), lambda packed: packed.tensor),
    "dataclass": _pair(lambda t: _Record(t.shape, [t.detach().view(-1)]), lambda p: p.parts[0].view(p.shape)),
    "closure": _pair(lambda tensor: _in_a_closure(tensor.detach()), lambda packed: packed()),
    "partial": _pair(lambda tensor: functools.partial(torch.mul, tensor.detach(), 1), lambda packed: packed()),
    "array": _pair(lambda tensor: tensor.detach().numpy(), lambda packed: torch.from_numpy(packed)),
    "bytes_of_it": _pair(lambda tensor: tensor.detach().view(torch.int32), lambda packed: packed.view(torch.float32)),
    "copied_when_unpacked": _pair(lambda tensor: tensor.detach(), lambda packed: packed.clone()),
    "save_on_cpu": save_on_cpu,
}

#: Only what unpack returns shows it.
LEAD_TO: dict[str, Hooks] = {
    "key": _by_key(lambda tensor: tensor.detach(), lambda kept: kept),
    "key_of_itself": _by_key(lambda tensor: tensor, lambda kept: kept),
    "key_of_an_alias": _by_key(lambda tensor: tensor.data, lambda kept: kept),
    "key_copied_when_unpacked": _by_key(lambda tensor: tensor.detach(), lambda kept: kept.clone()),
    "itself_beside_a_copy": _pair(lambda tensor: (tensor.detach(), tensor.clone()), lambda packed: packed[0]),
}

#: Backward reads other memory.
COPY: dict[str, Hooks] = {
    "clone": _pair(lambda tensor: tensor.clone()),
    "double": _pair(lambda tensor: tensor.double(), lambda packed: packed.float()),
    "half": _pair(lambda tensor: tensor.half(), lambda packed: packed.float()),
    "quantised": _pair(lambda t: ((t * 16).to(torch.int8), 16), lambda packed: packed[0].float() / packed[1]),
    "clone_in_a_tuple": _pair(lambda tensor: (tensor.device, tensor.clone()), lambda packed: packed[1]),
    "copied_array": _pair(lambda tensor: tensor.detach().numpy().copy(), lambda packed: torch.from_numpy(packed)),
    "numbers": _pair(lambda tensor: tensor.tolist(), torch.tensor),
    "file": _pair(_to_file, _from_file),
    "key_of_a_clone": _by_key(lambda tensor: tensor.clone(), lambda kept: kept),
    "key_of_a_file": _by_key(_to_file, _from_file),
    "a_copy_beside_itself": _pair(lambda tensor: (tensor.detach(), tensor.clone()), lambda packed: packed[1]),
}

TRACKED: dict[str, Write] = {
    "fill": lambda out: out.detach().fill_(3),
    "of_one_element": lambda out: out.detach()[1, 2].add_(1),
    "foreach": lambda out: torch._foreach_mul_([out.detach()], 2.0),
}

SILENT: dict[str, Write] = {
    "fill": lambda out: out.data.fill_(3),
    "of_a_row": lambda out: out.data[1].mul_(2),
}

#: These come unseen, and move the save's own counter.
TRACKED_UNSEEN: dict[str, Write] = {"out": lambda out: torch.mul(out.detach(), 2, out=out.detach())}

#: These change no byte of what was saved.
HARMLESS: dict[str, Write] = {
    "tracked_times_one": lambda out: out.detach().mul_(1),
    "tracked_clamp": lambda out: out.detach().clamp_(-9, 9),
    "silent_times_one": lambda out: out.data.mul_(1),
    "nothing_at_all": lambda out: out.detach()[:0].fill_(7),
}


def _after_the_guard(hooks: Hooks, write: Write, late: bool = False) -> Callable[[Run], Any]:
    def body(run: Run) -> Any:
        w = run.leaf()
        with hooks():
            out = w.tanh()  # saved
        if not late:
            run.write(write, out)
        out.sum().backward()
        if late:
            run.write(write, out)
        return [w.grad]

    return body


def _before_the_guard(hooks: Hooks, write: Write, late: bool = False) -> Callable[[Run], Any]:
    def body(run: Run) -> Any:
        w = run.leaf()
        with hooks(), run.guard():
            out = w.tanh()  # saved
            if not late:
                run.write(write, out)
            out.sum().backward()
            if late:
                run.write(write, out)
        return [w.grad]

    return body


_SIDES: dict[str, tuple[Any, bool]] = {"inside": (_after_the_guard, False), "around": (_before_the_guard, True)}

for _side, (_make, _enters) in _SIDES.items():
    _lacks = lacks_shown_hooks if _enters else no_lack
    for _name, _hooks in {**KEEP, **LEAD_TO}.items():
        _seen_at: Moment = "write" if _name in KEEP else "read"
        _corrupting = []
        _table: tuple[tuple[str, dict[str, Write], Moment, Moment], ...] = (
            ("tracked", TRACKED, "read", "read"),
            ("tracked", TRACKED_UNSEEN, "read", "read"),
            ("silent", SILENT, _seen_at, _seen_at),
        )
        for _what, _writes, _caught, _every_call in _table:
            if (_name, _writes) == ("key_copied_when_unpacked", TRACKED_UNSEEN):
                continue  # nobody sees it coming, and what is read is a copy
            for _write_name, _write in _writes.items():
                _corrupting.append(f"hooks_{_side}_{_name}_{_what}_{_write_name}")
                add(
                    _make(_hooks, _write),
                    name=_corrupting[-1],
                    route=_ROUTE,
                    kind="corrupting",
                    caught=_caught,
                    every_call=_every_call,
                    exact=_name != "array",
                    enters_guard=_enters,
                    lacks=_lacks,
                )
        for _write_name, _write in HARMLESS.items():
            add(
                _make(_hooks, _write),
                name=f"hooks_{_side}_{_name}_{_write_name}",
                route=_ROUTE,
                kind="innocent",
                twin_of=_corrupting,
                enters_guard=_enters,
                lacks=_lacks,
            )
        add(
            _make(_hooks, TRACKED["fill"], late=True),
            name=f"hooks_{_side}_{_name}_written_after_backward",
            route=_ROUTE,
            kind="innocent",
            enters_guard=_enters,
            lacks=_lacks,
        )
    for _name, _hooks in COPY.items():
        for _what, _writes in (("tracked", {**TRACKED, **TRACKED_UNSEEN}), ("silent", SILENT)):
            for _write_name, _write in _writes.items():
                add(
                    _make(_hooks, _write),
                    name=f"hooks_{_side}_{_name}_{_what}_{_write_name}",
                    route=_ROUTE,
                    kind="unread" if (_name, _what) == ("a_copy_beside_itself", "silent") else "innocent",
                    enters_guard=_enters,
                    lacks=_lacks,
                )


# ---- inputs and leaves --------------------------------------------------------------------------------------------


@program(route=_ROUTE, kind="corrupting")
def hooks_rebound_leaf(run: Run) -> Any:
    w, h = run.leaf(), run.leaf()
    with KEEP["itself"]():
        out = w * h  # saved
    run.write(lambda: setattr(w, "data", torch.ones(3, 4)))
    return [grad(out.sum(), h)]


@program(route=_ROUTE, kind="corrupting", caught="read", every_call="read")
def hooks_rebound_leaf_behind_a_key(run: Run) -> Any:
    w, h = run.leaf(), run.leaf()
    with LEAD_TO["key_of_itself"]():
        out = w * h  # saved
    run.write(lambda: setattr(w, "data", torch.ones(3, 4)))
    return [grad(out.sum(), h)]


@program(route=_ROUTE, kind="innocent", twin_of=("hooks_rebound_leaf", "hooks_rebound_leaf_behind_a_key"))
def hooks_rebound_leaf_of_which_an_alias_is_kept(run: Run) -> Any:
    w, h = run.leaf(), run.leaf()
    with KEEP["detached"]():
        out = w * h
    run.write(lambda: setattr(w, "data", torch.ones(3, 4)))
    return [grad(out.sum(), h)]


@program(route=_ROUTE, kind="corrupting", caught="read", every_call="read")
def hooks_optimiser_step_before_backward(run: Run) -> Any:
    layer = torch.nn.Linear(4, 3)
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.1)
    x = run.leaf()
    with save_on_cpu():
        out = layer(x).tanh() @ layer.weight  # saved
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    run.write(optimiser.step)
    return [grad(out.sum(), x)]


@program(route=_ROUTE, kind="innocent", twin_of="hooks_optimiser_step_before_backward")
def hooks_optimiser_step_with_a_graph_alive_that_nobody_reads(run: Run) -> Any:
    layer = torch.nn.Linear(4, 3)
    optimiser = torch.optim.SGD(layer.parameters(), lr=0.1)
    x = run.leaf()
    with save_on_cpu():
        out = layer(x).tanh() @ layer.weight
        first = grad(out.sum(), layer.weight, retain_graph=True)
    for parameter in layer.parameters():
        parameter.grad = torch.ones_like(parameter)
    run.write(optimiser.step)
    return [first, out.detach()]


# ---- parts of the memory ------------------------------------------------------------------------------------------


def _rows(hooks: Hooks, write: Callable[[torch.Tensor], Any]) -> Callable[[Run], Any]:
    def body(run: Run) -> Any:
        w = run.leaf([1.0, 2.0, 3.0, 4.0])
        buffer = run.leaf(requires_grad=False)
        with hooks():
            out = w * buffer[1]  # saved
        run.write(write, buffer)
        return [grad(out.sum(), w)]

    return body


for _name, _hooks in {"itself": KEEP["itself"], "tuple": KEEP["tuple"], "key": LEAD_TO["key"]}.items():
    for _write_name, _this, _other in (
        ("fill", lambda b: b[1].fill_(7), lambda b: b[0].fill_(7)),
        ("out", lambda b: torch.add(b[1], 1, out=b[1]), lambda b: torch.add(b[1], 1, out=b[2])),
        ("columns", lambda b: b[:, 1].fill_(7), lambda b: b[::2, 1].fill_(7)),
    ):
        add(
            _rows(_hooks, _this),
            name=f"hooks_{_name}_{_write_name}_of_the_saved_row",
            route=_ROUTE,
            kind="corrupting",
            caught="read",
            every_call="read",
        )
        # Nobody sees an out= coming, and of what a key leads to no proof is kept.
        _twin = "fill" if (_name, _write_name) == ("key", "out") else _write_name
        add(
            _rows(_hooks, (lambda b: b[0].fill_(7)) if _twin != _write_name else _other),
            name=f"hooks_{_name}_{_write_name}_of_another_row",
            route=_ROUTE,
            kind="innocent",
            twin_of=f"hooks_{_name}_{_write_name}_of_the_saved_row",
        )


# ---- nested pairs -------------------------------------------------------------------------------------------------


def _nested(outer: Hooks, inner: Hooks, write: Write, guarded: str) -> Callable[[Run], Any]:
    def body(run: Run) -> Any:
        w = run.leaf()
        first, second, third = [run.guard if guarded == at else nullcontext for at in ("outside", "between", "within")]
        with first(), outer(), second(), inner(), third():
            out = w.tanh()  # saved
            run.write(write, out)
            return [grad(out.sum(), w)]

    return body


for _at in ("outside", "between", "within"):
    for _what, _writes, _caught in (("tracked", TRACKED, "read"), ("silent", SILENT, "write")):
        add(
            _nested(COPY["clone"], KEEP["tuple"], _writes["fill"], _at),
            name=f"hooks_that_keep_within_hooks_that_copy_{_at}_{_what}",
            route=_ROUTE,
            kind="corrupting",
            caught=_caught,  # type: ignore[arg-type]
            every_call=_caught,  # type: ignore[arg-type]
            enters_guard=True,
            lacks=no_lack if _at == "outside" else lacks_shown_hooks,
        )
        add(
            _nested(KEEP["tuple"], COPY["clone"], _writes["fill"], _at),
            name=f"hooks_that_copy_within_hooks_that_keep_{_at}_{_what}",
            route=_ROUTE,
            kind="innocent",
            twin_of=f"hooks_that_keep_within_hooks_that_copy_{_at}_{_what}",
            enters_guard=True,
            lacks=no_lack if _at == "outside" else lacks_shown_hooks,
        )


@program(route=_ROUTE, kind="refused")
def hooks_that_are_left_again(run: Run) -> Any:
    w = run.leaf()
    with KEEP["itself"]():
        w.exp()
    out = w.tanh()
    run.write(lambda: out.detach().fill_(3))
    return [grad(out.sum(), w)]


# ---- several reads ------------------------------------------------------------------------------------------------


@program(route=_ROUTE, kind="corrupting", caught="read", every_call="read")
def hooks_write_between_two_backwards(run: Run) -> Any:
    w = run.leaf()
    with KEEP["tuple"]():
        out = w.tanh()  # saved
    first = grad(out.sum(), w, retain_graph=True)
    run.write(lambda: out.detach().mul_(2))
    return [first, grad(out.sum(), w)]


@program(route=_ROUTE, kind="innocent", twin_of="hooks_write_between_two_backwards")
def hooks_write_undone_between_two_backwards(run: Run) -> Any:
    w = run.leaf()
    with KEEP["tuple"]():
        out = w.tanh()

    def there_and_back() -> None:
        out.detach().mul_(2)
        out.detach().div_(2)

    first = grad(out.sum(), w, retain_graph=True)
    run.write(there_and_back)
    return [first, grad(out.sum(), w)]


@program(route=_ROUTE, kind="corrupting", caught="read", every_call="read")
def hooks_write_before_double_backward(run: Run) -> Any:
    w = run.leaf()
    with KEEP["object"]():
        out = w.tanh()  # saved
        (first,) = grad(out.sum(), w, create_graph=True)  # saved
    run.write(lambda: out.detach().mul_(2))
    return [first, grad(first.sum(), w)]


@program(route=_ROUTE, kind="innocent", twin_of="hooks_write_before_double_backward")
def hooks_that_copy_and_double_backward(run: Run) -> Any:
    w = run.leaf()
    with COPY["clone"]():
        out = w.tanh()
        (first,) = grad(out.sum(), w, create_graph=True)
    run.write(lambda: out.detach().mul_(2))
    return [first, grad(first.sum(), w)]


class _Cube(Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return grads[0] * 3 * x * x


@program(route=_ROUTE, kind="corrupting", caught="read", every_call="read")
def hooks_around_a_custom_function(run: Run) -> Any:
    w = run.leaf()
    h = w * 1
    with save_on_cpu():
        out = _Cube.apply(h)  # saved
    run.write(lambda: h.detach().mul_(2))
    return [grad(out.sum(), w)]


@program(route=_ROUTE, kind="innocent", twin_of="hooks_around_a_custom_function")
def hooks_that_copy_around_a_custom_function(run: Run) -> Any:
    w = run.leaf()
    h = w * 1
    with COPY["clone"]():
        out = _Cube.apply(h)
    run.write(lambda: h.detach().mul_(2))
    return [grad(out.sum(), w)]


# ---- checkpoint ---------------------------------------------------------------------------------------------------


@program(route=_ROUTE, kind="innocent", twin_of="hooks_write_before_double_backward")
def hooks_of_checkpoint_recompute_what_was_overwritten(run: Run) -> Any:
    w = run.leaf()
    inner: list[torch.Tensor] = []

    def body(x: torch.Tensor) -> torch.Tensor:
        hidden = x.tanh()
        if not inner:
            inner.append(hidden)
        return hidden.sigmoid()

    out = checkpoint(body, w, use_reentrant=False)
    run.write(lambda: inner[0].detach().fill_(3))
    return [grad(out.sum(), w)]


def _body_that_writes(then_saves: bool) -> Callable[[Run], Any]:
    def program(run: Run) -> Any:
        w = run.leaf()

        def body(x: torch.Tensor) -> torch.Tensor:
            hidden = x * 1
            out = hidden.sigmoid()  # saved
            other = out * 1
            run.write(lambda: out.mul_(2))
            return other.exp() if then_saves else other * 1

        return [grad(checkpoint(body, w, use_reentrant=False).sum(), w)]

    return program


add(
    _body_that_writes(then_saves=True),
    name="checkpoint_repeats_a_write_of_its_body",
    route=_ROUTE,
    repairable=False,
    kind="corrupting",
    caught="read",
    every_call="read",
)
add(
    _body_that_writes(then_saves=False),
    name="checkpoint_stops_before_it_repeats_a_write_of_its_body",
    route=_ROUTE,
    kind="innocent",
    twin_of="checkpoint_repeats_a_write_of_its_body",
)


# ---- allowed ------------------------------------------------------------------------------------------------------


def _allowed(write: Write) -> Callable[[Run], Any]:
    def body(run: Run) -> Any:
        import torchguard

        w = run.leaf()
        with KEEP["tuple"]():
            out = w.tanh()  # saved
        with torchguard.allow("a test of the allowed"):
            run.write(write, out)
        return [grad(out.sum(), w)]

    return body


for _what, _writes in (("tracked", TRACKED), ("silent", SILENT)):
    add(_allowed(_writes["fill"]), name=f"hooks_allowed_{_what}", route=_ROUTE, kind="corrupting", allowed=True)
    add(
        _allowed(HARMLESS["tracked_times_one"]),
        name=f"hooks_allowed_{_what}_harmless",
        route=_ROUTE,
        kind="innocent",
        twin_of=f"hooks_allowed_{_what}",
    )
