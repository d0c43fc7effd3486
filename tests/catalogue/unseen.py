"""Writes that no patch sees: ``out=``, ``torch.ops``, functions bound before the guard; and those that move no counter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from harness import Run, add, program

Write = Callable[[torch.Tensor], Any]

_ones = torch.ones

#: Taken before any guard: these are torch's own functions, whatever a guard puts in their place.
_ADD = torch.Tensor.add_
_ZERO = torch.Tensor.zero_
_SETITEM = torch.Tensor.__setitem__
_RELU = torch.relu_
_FOREACH_MUL = torch._foreach_mul_

OUT: dict[str, Write] = {
    "add": lambda c: torch.add(_ones(3, 4), 1, out=c),
    "mul": lambda c: torch.mul(c, 2, out=c),
    "sigmoid": lambda c: torch.sigmoid(_ones(3, 4), out=c),
    "matmul": lambda c: torch.matmul(_ones(3, 2), _ones(2, 4), out=c),
    "zeros": lambda c: torch.zeros(3, 4, out=c),
    "cat": lambda c: torch.cat([_ones(1, 4), _ones(2, 4)], out=c),
    "stack": lambda c: torch.stack([_ones(4)] * 3, out=c),
    "clamp": lambda c: torch.clamp(c, -0.1, 0.1, out=c),
    "cumsum": lambda c: torch.cumsum(c, 0, out=c),
    "where": lambda c: torch.where(c > 0, _ones(3, 4), torch.zeros(3, 4), out=c),
    "arange": lambda c: torch.arange(12.0, out=c.view(-1)),
    "max_with_indices": lambda c: torch.max(_ones(3, 4), 0, out=(c[0], torch.empty(4, dtype=torch.long))),
    "index_select": lambda c: torch.index_select(_ones(3, 4), 0, torch.tensor([0, 1, 2]), out=c),
    "of_a_slice": lambda c: torch.exp(c[1:], out=c[1:]),
    "linalg_norm": lambda c: torch.linalg.norm(_ones(4, 4), dim=0, out=c[0]),
    "ops_with_out": lambda c: torch.ops.aten.add.out(c, _ones(3, 4), out=c),
}

OPS: dict[str, Write] = {
    "zero_": lambda c: torch.ops.aten.zero_(c),
    "zero_default": lambda c: torch.ops.aten.zero_.default(c),
    "add_": lambda c: torch.ops.aten.add_(c, 1),
    "add_tensor": lambda c: torch.ops.aten.add_.Tensor(c, _ones(3, 4)),
    "mul_scalar": lambda c: torch.ops.aten.mul_.Scalar(c, 2.0),
    "copy_": lambda c: torch.ops.aten.copy_(c, _ones(3, 4)),
    "fill_": lambda c: torch.ops.aten.fill_(c, 7.0),
    "relu_": lambda c: torch.ops.aten.relu_(c),
    "clamp_": lambda c: torch.ops.aten.clamp_(c, 0.0, 0.5),
    "index_put_": lambda c: torch.ops.aten.index_put_(c, [torch.tensor([1])], _ones(1, 4)),
    "foreach": lambda c: torch.ops.aten._foreach_add_([c], 1.0),
    "of_a_transpose": lambda c: torch.ops.aten.exp_(c.t()),
}

BOUND: dict[str, Write] = {
    "unbound_method": lambda c: _ADD(c, 1),
    "unbound_zero": lambda c: _ZERO(c),
    "unbound_setitem": lambda c: _SETITEM(c, 1, 7.0),
    "function": lambda c: _RELU(c),
    "foreach": lambda c: _FOREACH_MUL([c], 0.5),
    "variable_functions": lambda c: torch._C._VariableFunctions.relu_(c),
    "of_the_base_class": lambda c: torch._C.TensorBase.add_(c, 1),
}

#: Functions that are looked up while the guard is on, in ways other than ``c.add_(1)``.
LOOKED_UP: dict[str, Write] = {
    "unbound": lambda c: torch.Tensor.add_(c, 1),
    "getattr": lambda c: getattr(c, "".join(["ze", "ro_"]))(),
    "getattr_of_torch": lambda c: getattr(torch, "".join(["relu", "_"]))(c),
    "map_over_a_list": lambda c: [method() for method in (c.neg_, c.exp_)],
    "vf": lambda c: torch._VF.relu_(c),
    "setitem_unbound": lambda c: torch.Tensor.__setitem__(c, 1, 7.0),
}


def _programs(prefix: str, route: str, table: dict[str, Write], **declared: Any) -> None:
    for name, write in table.items():
        full = f"{prefix}_{name}"

        def corrupting(run: Run, write: Write = write) -> Any:
            w, h = run.leaf(), run.leaf() * 1
            out = h * w  # saved
            c = h.data
            run.write(write, c)
            out.sum().backward()
            return [w.grad]

        def of_an_output(run: Run, write: Write = write) -> Any:
            w = run.leaf()
            out = w.tanh()  # saved
            c = out.data
            run.write(write, c)
            out.sum().backward()
            return [w.grad]

        def alias_before_the_save(run: Run, write: Write = write) -> Any:
            w, h = run.leaf(), run.leaf() * 1
            c = h.data
            out = h * w  # saved
            run.write(write, c)
            out.sum().backward()
            return [w.grad]

        def after_backward(run: Run, write: Write = write) -> Any:
            w, h = run.leaf(), run.leaf() * 1
            c = h.data
            (h * w).sum().backward()
            run.write(write, c)
            return [w.grad]

        def on_a_clone(run: Run, write: Write = write) -> Any:
            w, h = run.leaf(), run.leaf() * 1
            out = h * w
            c = h.data.clone()
            run.write(write, c)
            out.sum().backward()
            return [w.grad]

        def on_another_part(run: Run, write: Write = write) -> Any:
            both = torch.ones(2, 3, 4)
            w = run.leaf()
            out = both[0] * w
            c = both.data[1]
            run.write(write, c)
            out.sum().backward()
            return [w.grad]

        names = [full]
        add(corrupting, name=full, route=route, kind="corrupting", **declared)
        for body in (of_an_output, alias_before_the_save):
            names.append(f"{full}_{body.__name__}")
            add(body, name=names[-1], route=route, kind="corrupting", **declared)
        for twin in (after_backward, on_a_clone, on_another_part):
            add(twin, name=f"{full}_{twin.__name__}", route=route, kind="innocent", twin_of=names)


_programs("out", "out=", OUT, caught="read")
_programs("ops", "torch.ops", OPS, caught="read")
_programs("bound_before", "bound before the guard", BOUND, caught="read")
_programs("looked_up", "looked up in another way", LOOKED_UP, exact=False)


@program(
    route="bound before the guard",
    kind="innocent",
    enters_guard=True,
    twin_of="bound_method_called_inside",
)
def method_bound_before_the_guard_called_after_backward(run: Run) -> Any:
    w, h = run.leaf(), run.leaf(requires_grad=False)
    zero = h.data.zero_
    with run.guard():
        (h * w).sum().backward()
        run.write(lambda: zero())
    return [w.grad]


@program(route="bound before the guard", kind="corrupting", caught="read", enters_guard=True)
def bound_method_called_inside(run: Run) -> Any:
    w, h = run.leaf(), run.leaf(requires_grad=False)
    with run.guard():
        c = h.data
        out = h * w  # saved
        run.write(lambda: torch._C.TensorBase.zero_(c))
        out.sum().backward()
    return [w.grad]


@program(route="bound before the guard", kind="innocent", enters_guard=True, twin_of="bound_method_called_inside")
def bound_method_called_on_a_clone(run: Run) -> Any:
    w, h = run.leaf(), run.leaf(requires_grad=False)
    with run.guard():
        c = h.data.clone()
        out = h * w
        run.write(lambda: torch._C.TensorBase.zero_(c))
        out.sum().backward()
    return [w.grad]


@program(route="out=", kind="refused")
def out_into_a_tracked_alias(run: Run) -> Any:
    w, h = run.leaf(), run.leaf(requires_grad=False)
    out = h * w
    c = h.detach()
    run.write(lambda: torch.add(c, 1, out=c))
    out.sum().backward()
    return [w.grad]


@program(route="torch.ops", kind="refused")
def ops_on_a_tracked_alias(run: Run) -> Any:
    w, h = run.leaf(), run.leaf(requires_grad=False)
    out = h * w
    run.write(lambda: torch.ops.aten.zero_(h))
    out.sum().backward()
    return [w.grad]


@program(route="out=", kind="corrupting", caught="read")
def out_through_an_alias_that_is_gone(run: Run) -> Any:
    w, h = run.leaf(), run.leaf(requires_grad=False)
    out = h * w  # saved
    run.write(lambda: torch.zeros(3, 4, out=h.data))
    out.sum().backward()
    return [w.grad]


@program(route="out=", kind="innocent", twin_of="out_through_an_alias_that_is_gone")
def out_through_an_alias_that_is_gone_after_backward(run: Run) -> Any:
    w, h = run.leaf(), run.leaf(requires_grad=False)
    (h * w).sum().backward()
    run.write(lambda: torch.zeros(3, 4, out=h.data))
    return [w.grad]


@program(route="out=", kind="corrupting", caught="read")
def out_through_a_view_of_an_alias_that_is_gone(run: Run) -> Any:
    w, h = run.leaf(), run.leaf(requires_grad=False)
    out = h * w  # saved
    c = h.data.t()[1:]
    run.write(lambda: torch.neg(c, out=c))
    out.sum().backward()
    return [w.grad]


@program(
    route="out=",
    kind="innocent",
    twin_of="out_through_a_view_of_an_alias_that_is_gone",
)
def out_of_values_that_are_there(run: Run) -> Any:
    w, h = run.leaf(), run.leaf(requires_grad=False)
    out = h * w
    c = h.data.t()[1:]
    run.write(lambda: torch.mul(c, 1, out=c))
    out.sum().backward()
    return [w.grad]


@program(route="out=", kind="corrupting", caught="read", truth="cloned saves")
def out_then_a_seen_write_elsewhere(run: Run) -> Any:
    """A write that is seen and harmless must not settle one that was not seen."""
    both = torch.ones(2, 3, 4)
    w = run.leaf()
    out = both[0] * w  # saved
    c = both.data
    run.write(lambda: torch.zeros(3, 4, out=c[0]))
    c[1].add_(1)
    out.sum().backward()
    return [w.grad]


@program(route="out=", kind="innocent", twin_of="out_then_a_seen_write_elsewhere")
def out_and_a_seen_write_both_elsewhere(run: Run) -> Any:
    both = torch.ones(3, 3, 4)
    w = run.leaf()
    out = both[0] * w
    c = both.data
    run.write(lambda: torch.zeros(3, 4, out=c[1]))
    c[2].add_(1)
    out.sum().backward()
    return [w.grad]


@program(route="out=", kind="unread")
def out_into_a_save_that_nobody_reads(run: Run) -> Any:
    w, h = run.leaf(), run.leaf(requires_grad=False)
    out = h * w
    c = h.data
    run.write(lambda: torch.zeros(3, 4, out=c))
    return [out.detach()]


@program(route="out=", kind="unread")
def out_changed_and_put_back(run: Run) -> Any:
    w, h = run.leaf(), run.leaf(requires_grad=False)
    out = h * w
    c = h.data
    old = c.clone()
    run.write(lambda: torch.zeros(3, 4, out=c))
    run.write(lambda: torch.mul(old, 1, out=c))
    out.sum().backward()
    return [w.grad]


@program(route="out=", kind="corrupting", caught="read")
def large_save_written_by_out(run: Run) -> Any:
    """Too large for the guard to keep a copy of at every alias."""
    w = torch.ones(100, 100, requires_grad=True)
    h = torch.ones(100, 100)
    out = h * w  # saved
    c = h.data
    run.write(lambda: torch.zeros(100, 100, out=c))
    out.sum().backward()
    return [w.grad]


@program(route="out=", kind="innocent", twin_of="large_save_written_by_out")
def other_rows_of_a_large_buffer_written_by_out(run: Run) -> Any:
    w = torch.ones(100, 100, requires_grad=True)
    h = torch.ones(200, 100)
    out = h[:100] * w
    c = h.data[100:]
    run.write(lambda: torch.zeros(100, 100, out=c))
    out.sum().backward()
    return [w.grad]


@program(route="out=", kind="innocent", twin_of="large_save_written_by_out")
def other_rows_of_a_large_buffer_through_an_alias_of_all(run: Run) -> Any:
    w = torch.ones(100, 100, requires_grad=True)
    h = torch.ones(200, 100)
    out = h[:100] * w
    c = h.data
    run.write(lambda: torch.zeros(100, 100, out=c[100:]))
    out.sum().backward()
    return [w.grad]


# ---- through a tensor whose .data was assigned ----------------------------------------------------------------------

_ASSIGNED: dict[str, Write] = {
    "out": lambda p: torch.add(p, 1, out=p),
    "out_of_a_part": lambda p: torch.mul(p[1:], 3, out=p[1:]),
    "ops": lambda p: torch.ops.aten.zero_(p),
    "bound_before": lambda p: _ADD(p, 1),
}


def _assigned(run: Run, source: torch.Tensor) -> torch.Tensor:
    p = torch.empty(0)
    p.data = source
    return p


def _assigned_parameter(run: Run, source: torch.Tensor) -> torch.Tensor:
    p = torch.nn.Parameter(torch.zeros(3, 4), requires_grad=False)
    p.data = source
    return p


for _make in (_assigned, _assigned_parameter):
    for _name, _write in _ASSIGNED.items():

        def _before_the_save(run: Run, write: Write = _write, make: Any = _make) -> Any:
            w, flat = run.leaf(), torch.ones(3, 4)
            p = make(run, flat)
            out = flat * w  # saved
            run.write(write, p)
            out.sum().backward()
            return [w.grad]

        def _after_the_save(run: Run, write: Write = _write, make: Any = _make) -> Any:
            w, flat = run.leaf(), torch.ones(3, 4)
            out = flat * w  # saved
            p = make(run, flat)
            run.write(write, p)
            out.sum().backward()
            return [w.grad]

        def _of_a_clone(run: Run, write: Write = _write, make: Any = _make) -> Any:
            w, flat = run.leaf(), torch.ones(3, 4)
            p = make(run, flat.clone())
            out = flat * w
            run.write(write, p)
            out.sum().backward()
            return [w.grad]

        def _moved_away(run: Run, write: Write = _write, make: Any = _make) -> Any:
            w, flat = run.leaf(), torch.ones(3, 4)
            p = make(run, flat)
            out = flat * w
            p.data = torch.ones(3, 4)
            run.write(write, p)
            out.sum().backward()
            return [w.grad]

        def _after_backward(run: Run, write: Write = _write, make: Any = _make) -> Any:
            w, flat = run.leaf(), torch.ones(3, 4)
            p = make(run, flat)
            (flat * w).sum().backward()
            run.write(write, p)
            return [w.grad]

        _bodies = (_before_the_save, _after_the_save)
        _names = [f"{_name}_through{_make.__name__}{_body.__name__}" for _body in _bodies]
        for _full, _body in zip(_names, _bodies, strict=True):
            add(_body, name=_full, route="out= and the like", kind="corrupting", caught="read")
        for _body in (_of_a_clone, _moved_away, _after_backward):
            _full = f"{_name}_through{_make.__name__}{_body.__name__}"
            add(_body, name=_full, route="out= and the like", kind="innocent", twin_of=_names)


# ---- the guard is left before backward ------------------------------------------------------------------------------


@program(route="out=", kind="corrupting", caught="read", enters_guard=True)
def out_inside_and_backward_outside_the_guard(run: Run) -> Any:
    w = run.leaf()
    with run.guard():
        out = w.sigmoid()  # saved
        c = out.data
        run.write(lambda: torch.add(c, 1, out=c))
    out.sum().backward()
    return [w.grad]


@program(route="out=", kind="unread", enters_guard=True)
def out_inside_and_no_backward(run: Run) -> Any:
    w = run.leaf()
    with run.guard():
        out = w.sigmoid()
        c = out.data
        run.write(lambda: torch.add(c, 1, out=c))
    return [w.grad]


@program(route="out=", kind="innocent", enters_guard=True, twin_of="out_inside_and_backward_outside_the_guard")
def out_of_a_clone_inside_and_backward_outside_the_guard(run: Run) -> Any:
    w = run.leaf()
    with run.guard():
        out = w.sigmoid()
        c = out.data.clone()
        run.write(lambda: torch.add(c, 1, out=c))
    out.sum().backward()
    return [w.grad]
