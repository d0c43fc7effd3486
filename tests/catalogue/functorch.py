"""Writes to what torch.func's transforms save: inside the function, and between its forward and its backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from harness import Run, add, program
from torch import nn
from torch.func import functional_call, grad, grad_and_value, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap

Write = Callable[[torch.Tensor], Any]
Function = Callable[[torch.Tensor], torch.Tensor]

VALUES = [0.3, 1.2, -0.7, 0.9]
ROUTE = "torch.func"


def leaf(requires_grad: bool = False) -> torch.Tensor:
    return torch.tensor(VALUES, requires_grad=requires_grad)


def _vjp(function: Function) -> Any:
    result, pull = vjp(function, leaf())
    return [result, pull(torch.ones_like(result)), pull(torch.ones_like(result) * 2)]


def _outer_backward(function: Function) -> Any:
    x = leaf(requires_grad=True)
    grad(function)(x).sum().backward()
    return [x.grad]


def _functional_call(function: Function) -> Any:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(leaf())

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return function(self.weight * x)

    model = Model()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    found = grad(lambda p: functional_call(model, p, (torch.ones(4),)))(parameters)
    return [found["weight"]]


def _with_aux(function: Function) -> Any:
    return list(grad(lambda t: (function(t), t.sin()), has_aux=True)(leaf()))


def _second_argument(function: Function) -> Any:
    return [grad(lambda a, b: (a * function(b)).sum(), argnums=1)(leaf(), leaf())]


def _inside_no_grad(function: Function) -> Any:
    with torch.no_grad():
        return [grad(function)(leaf())]


#: Those under which a write to an intermediate's ``.data`` corrupts.
REVERSE: dict[str, Callable[[Function], Any]] = {
    "grad": lambda f: [grad(f)(leaf())],
    "grad_and_value": lambda f: list(grad_and_value(f)(leaf())),
    "vjp": _vjp,
    "jacrev": lambda f: [jacrev(lambda t: f(t) * t)(leaf())],
    "hessian": lambda f: [hessian(f)(leaf())],
    "grad_of_grad": lambda f: [grad(lambda t: grad(f)(t).sin().sum())(leaf())],
    "vmap_of_grad": lambda f: [vmap(grad(f))(torch.stack([leaf(), leaf() + 1]))],
    "vmap_of_grad_along_the_last_dimension": lambda f: [vmap(grad(f), 1)(torch.stack([leaf(), leaf() + 1], 1))],
    "vmap_of_vmap_of_grad": lambda f: [vmap(vmap(grad(f)))(torch.stack([leaf(), leaf() + 1])[None])],
    "vmap_of_jacrev": lambda f: [vmap(jacrev(f))(torch.stack([leaf(), leaf() + 1]))],
    "jacrev_of_jacrev": lambda f: [jacrev(jacrev(f))(leaf())],
    "jvp_of_grad": lambda f: list(jvp(grad(f), (leaf(),), (torch.ones(4),))),
    "outer_backward": _outer_backward,
    "functional_call": _functional_call,
    "with_aux": _with_aux,
    "second_argument": _second_argument,
    "inside_no_grad": _inside_no_grad,
}

#: Those under which what is saved has a history, or is batched, beyond the level that saved it: it cannot be replaced.
NESTED = ("hessian", "grad_of_grad", "vmap_of_jacrev", "jacrev_of_jacrev", "jvp_of_grad", "outer_backward")

WRITES: dict[str, Write] = {
    "mul_": lambda c: c.mul_(2),
    "slice": lambda c: c[1:].zero_(),
    "setitem": lambda c: c.__setitem__(1, 5.0),
    "mul_operator": lambda c: c.__imul__(3),
    "function": lambda c: torch.exp_(c),
    "foreach": lambda c: torch._foreach_mul_([c], 2.0),
    "flipped_view": lambda c: c.view(2, 2).t().mul_(2),
    "detached_once_more": lambda c: c.detach().mul_(2),
}

#: No patch sees these.
UNSEEN: dict[str, Write] = {
    "out": lambda c: torch.add(c, 1, out=c),
    "ops": lambda c: torch.ops.aten.mul_(c, 2),
}


def _of_an_input(run: Run, write: Write) -> Function:
    def function(t: torch.Tensor) -> torch.Tensor:
        y = t.sin()
        z = y * t  # saved
        c = y.data
        run.write(write, c)
        return z.sum()

    return function


def _of_an_output(run: Run, write: Write) -> Function:
    def function(t: torch.Tensor) -> torch.Tensor:
        y = (t * t).tanh()  # saved
        c = y.data
        run.write(write, c)
        return y.sum()

    return function


def _alias_before_the_save(run: Run, write: Write) -> Function:
    def function(t: torch.Tensor) -> torch.Tensor:
        y = t.sin()
        c = y.data
        z = y * t  # saved
        run.write(write, c)
        return z.sum()

    return function


def _on_a_clone(run: Run, write: Write) -> Function:
    def function(t: torch.Tensor) -> torch.Tensor:
        y = t.sin()
        z = y * t
        c = y.data.clone()
        run.write(write, c)
        return z.sum()

    return function


def _on_another_part(run: Run, write: Write) -> Function:
    def function(t: torch.Tensor) -> torch.Tensor:
        both = torch.stack([t.sin(), t.cos()])
        z = both[0] * t
        c = both.data[1]
        run.write(write, c)
        return z.sum()

    return function


def _before_the_save(run: Run, write: Write) -> Function:
    def function(t: torch.Tensor) -> torch.Tensor:
        y = torch.zeros_like(t) + 0.5
        c = y.data
        run.write(lambda: (write(c), c.fill_(0.5)))
        return (y * t).sin().sum()

    return function


def _programs(where: str, how: str, write: Write, several: bool, **declared: Any) -> None:
    transform, names = REVERSE[where], []
    for body in (_of_an_input, _of_an_output, _alias_before_the_save)[: 3 if several else 1]:
        names.append(f"func_{where}_{how}{body.__name__}")
        add(
            lambda run, b=body: transform(b(run, write)),
            name=names[-1],
            route=ROUTE,
            kind="corrupting",
            hooks=False,
            repairable=where not in NESTED,
            **declared,
        )
    for twin in (_on_a_clone, _on_another_part, _before_the_save):
        add(
            lambda run, b=twin: transform(b(run, write)),
            name=f"func_{where}_{how}{twin.__name__}",
            route=ROUTE,
            kind="innocent",
            twin_of=names,
            hooks=False,
        )


for _where in REVERSE:
    _thorough = _where in ("grad", "vmap_of_grad")
    for _how, _write in WRITES.items():
        if (_thorough or _how in ("mul_", "slice")) and not (_how == "foreach" and "vmap" in _where):
            _programs(_where, _how, _write, _thorough)
    _programs(_where, "ops", UNSEEN["ops"], _thorough, caught="read")
    if _where in ("grad", "jacrev", "with_aux"):  # PyTorch refuses out= under most of them
        _programs(_where, "out", UNSEEN["out"], _thorough, caught="read")


# ---- between forward and backward ---------------------------------------------------------------------------------


def _pull(run: Run, write: Write, function: Function, after: bool = False) -> Any:
    x = leaf()
    result, pull = vjp(function, x)
    if not after:
        run.write(write, x)
    pulled = pull(torch.ones_like(result))
    del pull
    if after:
        run.write(write, x)
    return [pulled]


#: To what ``vjp`` was given. Each level has a version counter of its own: even a write that autograd tracks passes it by.
BETWEEN: dict[str, tuple[Write, str, dict[str, Any]]] = {
    "tracked": (lambda x: x.add_(1), "a tracked write", {}),
    "data": (lambda x: x.data.add_(1), "a write through .data", {}),
    "row": (lambda x: x[2:].mul_(3), "a tracked write to a part", {}),
    "rebound": (lambda x: setattr(x, "data", torch.zeros(4)), "x.data = y", {}),
    "ops": (lambda x: torch.ops.aten.add_(x, 1), "an unseen write", {"caught": "read"}),
    "out": (lambda x: torch.add(x, 1, out=x), "out=", {"caught": "read"}),
    "detached": (lambda x: x.detach().zero_(), "a tracked write", {}),
    "optimiser": (lambda x: torch._foreach_add_([x], 1.0), "a step", {}),
}
SAVING: dict[str, Function] = {
    "square": lambda t: (t * t).sin(),  # saved
    "matmul": lambda t: (t.view(2, 2) @ t.view(2, 2)).tanh(),  # saved
    "jacobian": lambda t: jacrev(lambda s: (s * s).sum())(t) * t,  # saved
}
for _how, (_write, _, _declared) in BETWEEN.items():
    for _name, _function in SAVING.items():
        if _name != "square" and _how not in ("tracked", "ops"):
            continue
        _full = f"func_pull_{_how}_{_name}"
        add(
            lambda run, w=_write, f=_function: _pull(run, w, f),
            name=_full,
            route=ROUTE,
            kind="corrupting",
            hooks=False,
            **_declared,
        )
        add(
            lambda run, w=_write, f=_function: _pull(run, w, f, after=True),
            name=f"{_full}_after",
            route=ROUTE,
            kind="innocent",
            twin_of=_full,
            hooks=False,
        )


@program(route=ROUTE, kind="unread", hooks=False)
def write_while_a_pull_is_held(run: Run) -> Any:
    x = leaf()
    result, pull = vjp(lambda t: (t * t).sin(), x)  # saved
    pulled = pull(result)
    run.write(lambda: x.add_(1))
    return [pulled]


@program(route=ROUTE, kind="innocent", hooks=False, twin_of="func_pull_tracked_square")
def writes_to_what_a_pull_does_not_need(run: Run) -> Any:
    x, y = leaf(), leaf()
    result, pull = vjp(lambda t: (t.sin() * 2).sum(), x)
    run.write(lambda: (y.add_(1), result.data.add_(1), result.add_(1)))
    return [pull(torch.ones(()))]


@program(route=ROUTE, kind="corrupting", hooks=False)
def captured_tensor_written_before_the_pull(run: Run) -> Any:
    x, w = leaf(), leaf()
    result, pull = vjp(lambda t: (t * w).sum(), x)  # saved
    run.write(lambda: w.mul_(2))
    return [pull(torch.ones(()))]


@program(route=ROUTE, kind="innocent", hooks=False, twin_of="captured_tensor_written_before_the_pull")
def captured_tensor_written_after_the_pull(run: Run) -> Any:
    x, w = leaf(), leaf()
    result, pull = vjp(lambda t: (t * w).sum(), x)
    pulled = pull(torch.ones(()))
    del pull
    run.write(lambda: w.mul_(2))
    return [pulled]


@program(route=ROUTE, kind="corrupting", hooks=False)
def saved_at_the_outer_level(run: Run) -> Any:
    """Ordinary autograd records what runs inside a transform."""
    x = leaf(requires_grad=True)
    result = grad(lambda t: (t * t.sin()).sum())(x)  # saved
    run.write(lambda: x.data.add_(1))
    result.sum().backward()
    return [x.grad]


@program(route=ROUTE, kind="innocent", hooks=False, twin_of="saved_at_the_outer_level")
def saved_at_the_outer_level_and_read(run: Run) -> Any:
    x = leaf(requires_grad=True)
    result = grad(lambda t: (t * t.sin()).sum())(x)
    result.sum().backward()
    run.write(lambda: x.data.add_(1))
    return [x.grad]


@program(route=ROUTE, kind="refused", hooks=False)
def tracked_write_to_what_the_outer_level_saved(run: Run) -> Any:
    x = leaf(requires_grad=True)
    result = grad(lambda t: (t * t.sin()).sum())(x)
    with torch.no_grad():
        run.write(lambda: x.add_(1))
    result.sum().backward()
    return [x.grad]


@program(route=ROUTE, kind="innocent", hooks=False, twin_of=["func_grad_mul__of_an_input"])
def write_to_a_tensor_that_leaked(run: Run) -> Any:
    leaked = []

    def function(t: torch.Tensor) -> torch.Tensor:
        y = t.sin()
        leaked.append(y)
        return (y * t).sum()

    found = grad(function)(leaf())
    run.write(lambda: leaked.pop().data.zero_())
    return [found]


@program(route=ROUTE, kind="innocent", hooks=False, twin_of=["func_grad_mul__of_an_input"])
def parameters_stepped_after_grad(run: Run) -> Any:
    w, steps = leaf(), []
    for _ in range(3):
        g = grad(lambda p: (p * p.sin()).sum())(w)
        run.write(lambda g=g: w.sub_(g, alpha=0.1))
        run.write(lambda g=g: w.data.sub_(g, alpha=0.1))
        steps.append(g)
    return steps[0]


# ---- ordinary writes, and what PyTorch refuses ---------------------------------------------------------------------


def _clean(t: torch.Tensor) -> torch.Tensor:
    y = t * 2
    y.add_(1)
    y[1:].mul_(3)
    z = torch.relu_(y * t) * 1
    z[0] = 1
    return (z * z.data.clone().add_(1)).sum()


for _where, _transform in REVERSE.items():

    @program(
        name=f"func_{_where}_of_ordinary_writes",
        route=ROUTE,
        kind="innocent",
        hooks=False,
        twin_of="func_grad_mul__of_an_input",
    )
    def ordinary_writes(run: Run, transform: Any = _transform) -> Any:
        def function(t: torch.Tensor) -> torch.Tensor:
            run.write(lambda: None)
            return _clean(t)

        return transform(function)

    @program(
        name=f"func_{_where}_of_a_tracked_write",
        route=ROUTE,
        kind="refused",
        hooks=False,
        repairable=_where not in NESTED,
    )
    def tracked(run: Run, transform: Any = _transform) -> Any:
        def function(t: torch.Tensor) -> torch.Tensor:
            y = t.exp()
            z = y * t
            run.write(lambda: y.add_(1))
            return z.sum()

        return transform(function)

    @program(name=f"func_{_where}_of_a_write_to_captured_memory", route=ROUTE, kind="refused", hooks=False)
    def captured(run: Run, transform: Any = _transform) -> Any:
        w = leaf()

        def function(t: torch.Tensor) -> torch.Tensor:
            z = (t * w).sum()
            run.write(lambda: w.data.add_(1))
            return z

        return transform(function)


FORWARD: dict[str, Callable[[Function], Any]] = {
    "jvp": lambda f: list(jvp(f, (leaf(),), (torch.ones(4),))),
    "jacfwd": lambda f: [jacfwd(f)(leaf())],
    "linearize": lambda f: [linearize(f, leaf())[1](torch.ones(4))],
}
for _where, _transform in FORWARD.items():
    add(
        lambda run, t=_transform: t(_of_an_input(run, lambda c: c.add_(1))),
        name=f"func_{_where}_saves_nothing",
        route=ROUTE,
        kind="innocent",
        twin_of="func_grad_mul__of_an_input",
        hooks=False,
    )


@program(route=ROUTE, kind="refused", hooks=False)
def data_under_vmap(run: Run) -> Any:
    return [vmap(_of_an_input(run, lambda c: c.add_(1)))(leaf()[None])]


@program(route=ROUTE, kind="refused", hooks=False)
def rebinding_inside_grad(run: Run) -> Any:
    def function(t: torch.Tensor) -> torch.Tensor:
        y = t.sin()
        z = y * t
        run.write(lambda: setattr(y, "data", torch.zeros(4)))
        return z.sum()

    return [grad(function)(leaf())]


@program(route=ROUTE, kind="refused", hooks=False)
def captured_memory_that_an_outer_graph_saved(run: Run) -> Any:
    w = leaf(requires_grad=True)
    out = w.exp()
    c = out.data

    def function(t: torch.Tensor) -> torch.Tensor:
        run.write(lambda: c.zero_())
        return (t * t).sum()

    grad(function)(leaf())
    out.sum().backward()
    return [w.grad]


@program(route=ROUTE, kind="refused", hooks=False)
def batched_values_into_captured_memory(run: Run) -> Any:
    w = leaf(requires_grad=True)
    out = w.exp()
    c = out.data
    vmap(lambda t: run.write(lambda: c.add_(t)))(torch.ones(2, 4))
    out.sum().backward()
    return [w.grad]


# ---- nodes of other kinds -----------------------------------------------------------------------------------------


class Cube(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        return grad * 3 * x**2


class Exp(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        return x.exp()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        (result,) = ctx.saved_tensors
        return grad * result


#: What a function does with an intermediate, and whether it saves the result.
NODES: dict[str, tuple[Function, bool]] = {
    "custom_function": (lambda y: Cube.apply(y), False),  # saved
    "custom_function_saving_its_output": (lambda y: Exp.apply(y), True),  # saved
    "matmul": (lambda y: y.view(2, 2) @ y.view(2, 2), False),  # saved
    "linear": (lambda y: nn.functional.linear(y, y.view(1, 4)), False),  # saved
    "layer_norm": (lambda y: nn.functional.layer_norm(y, (4,)) ** 2, False),  # saved
    "where": (lambda y: torch.where(y > 0.5, y * y, y), False),  # saved
    "view": (lambda y: y.view(2, 2)[1].sin(), False),  # saved
    "softmax": (lambda y: torch.softmax(y, 0), True),  # saved
    "sigmoid": (lambda y: torch.sigmoid(y), True),  # saved
    "max": (lambda y: y.cumprod(0), False),  # saved
    "branches": (lambda y: torch.einsum("i,i->i", y, y), False),  # saved
}
for _name, (_node, _output) in NODES.items():
    for _where in ("grad", "vmap_of_grad"):

        def _body(run: Run, write: Write, node: Function = _node, output: bool = _output) -> Function:
            def function(t: torch.Tensor) -> torch.Tensor:
                y = t.sin() + 1
                z = node(y)  # saved
                c = z.data if output else y.data
                run.write(write, c)
                return z.sum()

            return function

        def _body_on_a_clone(run: Run, write: Write, node: Function = _node, output: bool = _output) -> Function:
            def function(t: torch.Tensor) -> torch.Tensor:
                y = t.sin() + 1
                z = node(y)
                c = (z.data if output else y.data).clone()
                run.write(write, c)
                return z.sum()

            return function

        add(
            lambda run, t=REVERSE[_where], b=_body: t(b(run, lambda c: c.mul_(1.5))),
            name=f"func_{_where}_{_name}",
            route=ROUTE,
            kind="corrupting",
            hooks=False,
        )
        add(
            lambda run, t=REVERSE[_where], b=_body_on_a_clone: t(b(run, lambda c: c.mul_(1.5))),
            name=f"func_{_where}_{_name}_on_a_clone",
            route=ROUTE,
            kind="innocent",
            twin_of=f"func_{_where}_{_name}",
            hooks=False,
        )


@program(route="save hooks switched off", kind="corrupting", hooks=False)
def save_hooks_switched_off_by_the_program(run: Run) -> Any:
    w = leaf(requires_grad=True)
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        y = w.sin()
        out = y * w  # saved
    run.write(lambda: y.data.zero_())
    out.sum().backward()
    return [w.grad]


@program(
    route="save hooks switched off",
    kind="innocent",
    hooks=False,
    twin_of="save_hooks_switched_off_by_the_program",
)
def save_hooks_switched_off_and_read(run: Run) -> Any:
    w = leaf(requires_grad=True)
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        y = w.sin()
        out = y * w
        out.sum().backward()
    run.write(lambda: y.data.zero_())
    return [w.grad]


@program(route="save hooks switched off", kind="corrupting", hooks=False)
def ordinary_autograd_inside_a_transform(run: Run) -> Any:
    def function(t: torch.Tensor) -> torch.Tensor:
        w = leaf(requires_grad=True)
        y = w.sin()
        out = (y * w).sum()  # saved
        run.write(lambda: y.data.zero_())
        (g,) = torch.autograd.grad(out, w)
        return (t * g).sum()

    return [grad(function)(leaf())]


@program(
    route="save hooks switched off",
    kind="innocent",
    hooks=False,
    twin_of="ordinary_autograd_inside_a_transform",
)
def ordinary_autograd_inside_a_transform_read_first(run: Run) -> Any:
    def function(t: torch.Tensor) -> torch.Tensor:
        w = leaf(requires_grad=True)
        y = w.sin()
        out = (y * w).sum()
        (g,) = torch.autograd.grad(out, w)
        run.write(lambda: y.data.zero_())
        return (t * g).sum()

    return [grad(function)(leaf())]


def _functional(run: Run, call: Any, after: bool) -> Any:
    def function(t: torch.Tensor) -> torch.Tensor:
        y = t.sin()
        z = y * t  # saved
        if after:
            y = y.clone()
        c = y.data
        run.write(lambda: c.mul_(2))
        return z.sum()

    return call(function)


for _name, _call in {
    "jacobian": lambda f: [torch.autograd.functional.jacobian(f, leaf())],
    "vjp": lambda f: list(torch.autograd.functional.vjp(f, leaf())),
    "vectorised": lambda f: [torch.autograd.functional.jacobian(f, leaf(), vectorize=True)],
}.items():
    add(
        lambda run, c=_call: _functional(run, c, False),
        name=f"functional_{_name}",
        route="torch.autograd.functional",
        kind="corrupting",
    )
    add(
        lambda run, c=_call: _functional(run, c, True),
        name=f"functional_{_name}_on_a_clone",
        route="torch.autograd.functional",
        kind="innocent",
        twin_of=f"functional_{_name}",
    )
