"""``x.data = y``: pointing a tensor at other memory."""

from __future__ import annotations

import functools
from typing import Any

import torch
from harness import Run, add, program
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

_ROUTE = "x.data = y"


def _rebind(x: torch.Tensor, y: torch.Tensor) -> None:
    x.data = y


def _leaf(run: Run, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    h = run.leaf()
    return h, h * w  # saved


def _constant(run: Run, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    h = run.leaf(requires_grad=False)
    return h, h * w  # saved


def _non_leaf_input(run: Run, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    h = run.leaf() + 1
    return h, h * w  # saved


def _parameter(run: Run, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    h = nn.Parameter(torch.ones(3, 4))
    return h, h * w  # saved


def _input_of_sin(run: Run, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    h = w * 2
    return h, h.sin()  # saved


def _input_of_matmul(run: Run, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    h = run.leaf()
    return h, h @ w.t()  # saved


def _view_input(run: Run, w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    h = torch.ones(2, 3, 4)[1]
    return h, h * w  # saved


SAVED_OBJECTS = {
    "leaf": _leaf,
    "constant": _constant,
    "non_leaf_input": _non_leaf_input,
    "parameter": _parameter,
    "input_of_sin": _input_of_sin,
    "input_of_matmul": _input_of_matmul,
    "view_input": _view_input,
}

#: What it is pointed at: other values ...
OTHER = {
    "fresh_memory": lambda h: torch.full((3, 4), 7.0),
    "scaled": lambda h: h.data * 2 + 1,
    "another_view": lambda h: torch.arange(12.0).view(4, 3).t(),
}
#: ... or the values that it has.
SAME = {
    "same_memory": lambda h: h.data,
    "detached": lambda h: h.detach(),
    "view_of_the_same_memory": lambda h: h.data.view(3, 4) if h.is_contiguous() else h.data,
    "equal_values": lambda h: h.data.clone(),
    "equal_values_other_strides": lambda h: h.data.t().contiguous().t(),
}


def _programs() -> None:
    for source, save in SAVED_OBJECTS.items():
        corrupting = []
        for target, make in OTHER.items():

            def body(run: Run, save: Any = save, make: Any = make) -> Any:
                w = run.leaf()
                h, out = save(run, w)
                y = make(h)
                run.write(_rebind, h, y)
                out.sum().backward()
                return [w.grad]

            corrupting.append(f"rebind_{source}_to_{target}")
            add(body, name=corrupting[-1], route=_ROUTE, kind="corrupting")

            def late(run: Run, save: Any = save, make: Any = make) -> Any:
                w = run.leaf()
                h, out = save(run, w)
                y = make(h)
                out.sum().backward()
                run.write(_rebind, h, y)
                return [w.grad]

            add(late, name=f"{corrupting[-1]}_after_backward", route=_ROUTE, kind="innocent", twin_of=corrupting[-1])
        for target, make in SAME.items():

            def same(run: Run, save: Any = save, make: Any = make) -> Any:
                w = run.leaf()
                h, out = save(run, w)
                y = make(h)
                run.write(_rebind, h, y)
                out.sum().backward()
                return [w.grad]

            add(same, name=f"rebind_{source}_to_{target}", route=_ROUTE, kind="innocent", twin_of=corrupting)


_programs()


@program(route=_ROUTE, kind="innocent", twin_of="rebind_leaf_to_fresh_memory")
def rebind_an_output(run: Run) -> Any:
    """Autograd keeps a handle of its own on an output."""
    w = run.leaf()
    out = w.tanh()
    run.write(_rebind, out, torch.zeros(3, 4))
    out.sum().backward()
    return [w.grad]


@program(route=_ROUTE, kind="innocent", twin_of="rebind_leaf_to_fresh_memory", truth="cloned saves")
def rebind_an_output_and_write_to_its_new_memory(run: Run) -> Any:
    w = run.leaf()
    out = w.tanh()
    run.write(_rebind, out, torch.zeros(3, 4))
    out.data.add_(5)
    out.sum().backward()
    return [w.grad]


@program(route=_ROUTE, kind="corrupting")
def output_rebound_with_its_old_memory_written(run: Run) -> Any:
    w = run.leaf()
    out = w.tanh()  # saved
    old = out.data
    out.data = torch.zeros(3, 4)
    run.write(lambda: old.fill_(3))
    out.sum().backward()
    return [w.grad]


@program(route=_ROUTE, kind="corrupting")
def output_of_one_that_is_input_of_another(run: Run) -> Any:
    w = run.leaf()
    h = w.tanh()
    out = h * h  # saved
    run.write(_rebind, h, torch.zeros(3, 4))
    out.sum().backward()
    return [w.grad]


def _leaf_as_it_is(run: Run) -> torch.Tensor:
    return run.leaf()


def _has_a_history(run: Run) -> torch.Tensor:
    return run.leaf().exp()


def _parameter_of_its_own(run: Run) -> torch.Tensor:
    return nn.Parameter(run.leaf().detach().clone())


def _saved_again_by_backward() -> None:
    """A double backward saves what the first one read, the very tensor, when the first one's graph is gone."""
    for source in (_leaf_as_it_is, _has_a_history, _parameter_of_its_own):

        def before(run: Run, source: Any = source) -> Any:
            h, w, seed = source(run), run.leaf(), run.leaf()
            out = h * w
            (slope,) = torch.autograd.grad(out, w, seed, create_graph=True)  # saved
            del out
            run.write(_rebind, h, torch.zeros(3, 4))
            return [torch.autograd.grad(slope.sum(), seed)]

        def after(run: Run, source: Any = source) -> Any:
            h, w, seed = source(run), run.leaf(), run.leaf()
            out = h * w
            (slope,) = torch.autograd.grad(out, w, seed, create_graph=True)
            del out
            result = torch.autograd.grad(slope.sum(), seed)
            run.write(_rebind, h, torch.zeros(3, 4))
            return [result]

        def output(run: Run, source: Any = source) -> Any:
            """What it saves of an output is a tensor of its own."""
            h, seed = source(run), run.leaf()
            out = h.exp()
            (slope,) = torch.autograd.grad(out, h, seed, create_graph=True)
            run.write(_rebind, out, torch.zeros(3, 4))
            return [torch.autograd.grad(slope.sum(), seed)]

        name = f"rebind_what_backward_saved_again_{source.__name__.strip('_')}"
        add(before, name=name, route=_ROUTE, kind="corrupting")
        add(after, name=f"{name}_afterwards", route=_ROUTE, kind="innocent", twin_of=name)
        add(output, name=f"{name}_an_output", route=_ROUTE, kind="innocent", twin_of=name)


_saved_again_by_backward()


@program(
    route=_ROUTE,
    kind="innocent",
    twin_of=["output_of_one_that_is_input_of_another", "output_rebound_with_its_old_memory_written"],
)
def rebind_what_nothing_saved(run: Run) -> Any:
    w = run.leaf()
    h = w + 1
    out = h * 2
    run.write(_rebind, h, torch.zeros(3, 4))
    out.sum().backward()
    return [w.grad]


@program(route=_ROUTE, kind="innocent", twin_of="rebind_leaf_to_fresh_memory")
def rebind_an_alias_of_what_was_saved(run: Run) -> Any:
    w, h = run.leaf(), run.leaf()
    out = h * w
    c = h.data
    run.write(_rebind, c, torch.zeros(3, 4))
    out.sum().backward()
    return [w.grad]


@program(route=_ROUTE, kind="innocent", twin_of="rebind_leaf_to_fresh_memory")
def rebind_an_alias_and_write_through_it(run: Run) -> Any:
    w, h = run.leaf(), run.leaf()
    out = h * w
    c = h.data

    def write() -> None:
        c.data = torch.zeros(3, 4)
        c.fill_(9)

    run.write(write)
    out.sum().backward()
    return [w.grad]


@program(route=_ROUTE, kind="innocent", twin_of="rebind_leaf_to_fresh_memory", truth="cloned saves")
def rebind_before_the_save(run: Run) -> Any:
    w, h = run.leaf(), run.leaf()
    run.write(_rebind, h, torch.ones(3, 4))
    out = h * w
    out.sum().backward()
    return [w.grad]


@program(route=_ROUTE, kind="corrupting", truth="cloned saves")
def rebind_before_and_after_the_save(run: Run) -> Any:
    w, h = run.leaf(), run.leaf()
    h.data = torch.ones(3, 4)
    out = h * w  # saved
    run.write(_rebind, h, torch.zeros(3, 4))
    out.sum().backward()
    return [w.grad]


@program(route=_ROUTE, kind="corrupting", truth="cloned saves")
def written_in_the_memory_it_was_rebound_to_before_the_save(run: Run) -> Any:
    w, h = run.leaf(), run.leaf()
    y = torch.ones(3, 4)
    h.data = y
    out = h * w  # saved
    run.write(lambda: y.fill_(9))
    out.sum().backward()
    return [w.grad]


@program(
    route=_ROUTE,
    kind="innocent",
    truth="cloned saves",
    twin_of=["rebind_before_and_after_the_save", "written_in_the_memory_it_was_rebound_to_before_the_save"],
)
def written_in_the_memory_it_was_rebound_from(run: Run) -> Any:
    w, h = run.leaf(), run.leaf()
    old = h.data
    h.data = torch.ones(3, 4)
    out = h * w
    run.write(lambda: old.fill_(9))
    out.sum().backward()
    return [w.grad]


@program(route=_ROUTE, kind="unread")
def rebound_and_bound_back(run: Run) -> Any:
    """Binarised weights that are put back before backward."""
    w, h = run.leaf(), run.leaf()
    out = h * w
    old = h.data
    run.write(_rebind, h, old.sign())
    run.write(_rebind, h, old)
    out.sum().backward()
    return [w.grad]


@program(route=_ROUTE, kind="unread")
def rebound_and_never_read(run: Run) -> Any:
    w, h = run.leaf(), run.leaf()
    out = h * w
    run.write(_rebind, h, torch.zeros(3, 4))
    return [out.detach()]


@program(route=_ROUTE, kind="innocent", twin_of="rebind_leaf_to_fresh_memory", truth="cloned saves")
def rebound_after_the_graph_is_gone(run: Run) -> Any:
    w, h = run.leaf(), run.leaf()
    (h * w).sum()
    run.write(_rebind, h, torch.zeros(3, 4))
    (h * w).sum().backward()
    return [w.grad]


@program(route=_ROUTE, kind="refused")
def rebound_to_another_kind_of_tensor(run: Run) -> Any:
    w, h = run.leaf(), run.leaf()
    out = h * w
    run.write(_rebind, h, torch.zeros(3, 4).to_sparse())
    out.sum().backward()
    return [w.grad]


@program(route=_ROUTE, kind="refused")
def rebound_to_no_tensor(run: Run) -> Any:
    w, h = run.leaf(), run.leaf()
    out = h * w

    def write() -> None:
        h.data = 3  # type: ignore[assignment]

    run.write(write)
    out.sum().backward()
    return [w.grad]


@program(route=_ROUTE, kind="corrupting")
def rebound_one_element(run: Run) -> Any:
    w, h = run.leaf([2.0]), run.leaf([3.0])
    out = (h.exp() * w).sum() + (h * w).sum()  # saved
    run.write(_rebind, h, torch.tensor([5.0]))
    out.backward()
    return [w.grad]


@program(route=_ROUTE, kind="innocent", twin_of="rebound_one_element")
def rebound_where_only_outputs_were_saved(run: Run) -> Any:
    h = run.leaf([3.0])
    out = h.exp().sum()
    run.write(_rebind, h, torch.tensor([5.0]))
    out.backward()
    return [h.grad]


def _scale_and_mix() -> nn.Sequential:
    return nn.Sequential(nn.Conv1d(3, 3, 2), nn.LayerNorm(3))


def _two_linear_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))


@program(route="vector_to_parameters", kind="corrupting")
def vector_to_parameters_before_backward(run: Run) -> Any:
    model, x = _scale_and_mix(), run.leaf()
    out = model(x[None])  # saved
    vector = parameters_to_vector(model.parameters()).detach() + 1
    run.write(lambda: vector_to_parameters(vector, model.parameters()))
    out.pow(2).sum().backward()
    return [x.grad] + [p.grad for p in model.parameters()]


def _vector_programs() -> None:
    twin = "vector_to_parameters_before_backward"

    def linear(run: Run) -> Any:
        """A linear layer saves a view of its weight, which keeps the memory that it had."""
        model, x = _two_linear_layers(), run.leaf()
        out = model(x)
        vector = parameters_to_vector(model.parameters()).detach() + 1
        run.write(lambda: vector_to_parameters(vector, model.parameters()))
        out.sum().backward()
        return [x.grad] + [p.grad for p in model.parameters()]

    def after_backward(run: Run) -> Any:
        model, x = _scale_and_mix(), run.leaf()
        for _ in range(3):
            model(x[None]).pow(2).sum().backward()
            vector = parameters_to_vector(model.parameters()).detach() * 0.9
            run.write(vector_to_parameters, vector, model.parameters())
        return [x.grad] + [p.grad for p in model.parameters()]

    def same_values(run: Run) -> Any:
        model, x = _scale_and_mix(), run.leaf()
        out = model(x[None])
        vector = parameters_to_vector(model.parameters()).detach()
        run.write(vector_to_parameters, vector, model.parameters())
        out.pow(2).sum().backward()
        return [x.grad] + [p.grad for p in model.parameters()]

    route = "vector_to_parameters"
    add(linear, name="vector_to_parameters_of_linear_layers", route=route, kind="innocent", twin_of=twin)
    add(same_values, name="vector_to_parameters_same_values", route=route, kind="innocent", twin_of=twin)
    add(
        after_backward,
        name="vector_to_parameters_after_backward",
        route=route,
        kind="innocent",
        twin_of=twin,
        truth="cloned saves",
    )


_vector_programs()


@program(route=_ROUTE, kind="corrupting")
def weight_swapped_for_averaged_weight_before_backward(run: Run) -> Any:
    layer, x = nn.Conv1d(3, 3, 2), run.leaf()
    averaged = layer.weight.detach() * 0.5
    out = layer(x[None])  # saved
    run.write(_rebind, layer.weight, averaged)
    out.sum().backward()
    return [x.grad, layer.weight.grad]


@program(route=_ROUTE, kind="corrupting")
def weights_swapped_between_two_models(run: Run) -> Any:
    one, two, x = nn.Conv1d(3, 3, 2), nn.Conv1d(3, 3, 2), run.leaf()
    out = one(x[None]) + two(x[None]) * 3  # saved

    def swap() -> None:
        one.weight.data, two.weight.data = two.weight.data, one.weight.data  # written

    run.write(swap)
    out.sum().backward()
    return [x.grad, one.weight.grad, two.weight.grad]


@program(
    route=_ROUTE,
    kind="innocent",
    twin_of=["weight_swapped_for_averaged_weight_before_backward", "weights_swapped_between_two_models"],
)
def weights_of_linear_layers_swapped(run: Run) -> Any:
    """A linear layer saves a view of its weight, which keeps the memory that it had."""
    one, two, x = nn.Linear(4, 2), nn.Linear(4, 2), run.leaf()
    out = one(x) + two(x) * 3

    def swap() -> None:
        one.weight.data, two.weight.data = two.weight.data, one.weight.data

    run.write(swap)
    out.sum().backward()
    return [x.grad, one.weight.grad, two.weight.grad]


@program(
    route=_ROUTE,
    kind="innocent",
    truth="cloned saves",
    twin_of=["weight_swapped_for_averaged_weight_before_backward", "weights_swapped_between_two_models"],
)
def weight_swapped_for_averaged_weight_for_evaluation(run: Run) -> Any:
    layer, x = nn.Conv1d(3, 3, 2), run.leaf()
    for _ in range(3):
        layer(x[None]).sum().backward()
        own = layer.weight.data
        run.write(_rebind, layer.weight, own * 0.5)
        with torch.no_grad():
            layer(x[None])
        run.write(_rebind, layer.weight, own)
    return [x.grad, layer.weight.grad]


def _in_inference_mode() -> None:
    """Pointed at what inference mode made, a tensor keeps a version that no alias of it shares."""
    for source, save in SAVED_OBJECTS.items():
        if source == "view_input":
            continue  # PyTorch refuses to point it there

        def body(run: Run, changed: bool, save: Any = save) -> Any:
            w = run.leaf()
            h, out = save(run, w)
            with torch.inference_mode():
                y = h * 2 + 1 if changed else h.clone()
                run.write(_rebind, h, y)
            out.sum().backward()
            return [w.grad]

        name = f"rebind_{source}_in_inference_mode"
        add(functools.partial(body, changed=True), name=name, route=_ROUTE, kind="corrupting")
        same = functools.partial(body, changed=False)
        add(same, name=f"{name}_to_the_same", route=_ROUTE, kind="innocent", twin_of=name)


_in_inference_mode()


# ---- swap_tensors refuses what autograd holds -----------------------------------------------------------------------


def _swapped(make: Any) -> Any:
    def body(run: Run) -> Any:
        w, x = run.leaf(), make(run)
        out = x * w
        run.write(lambda: torch.utils.swap_tensors(x, torch.zeros(3, 4)))
        out.sum().backward()
        return [w.grad]

    return body


_SWAPPED = {
    "constant": lambda run: torch.ones(3, 4),
    "leaf": lambda run: run.leaf(),
    "non_leaf": lambda run: run.leaf() * 2,
    "buffer": lambda run: nn.Buffer(torch.ones(3, 4)),
}
for _name, _make in _SWAPPED.items():
    add(_swapped(_make), name=f"swap_of_a_saved_{_name}", route="swap_tensors", kind="refused")
