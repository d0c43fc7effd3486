"""Does ``ctx.saved_tensors`` hand back the very objects that a custom Function saved?"""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_transparency import transparent
from torch import nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

import torchguard


class Saver(Function):
    """Saves what it is told to, and takes down what it gets back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, also: list[Any], seen: list[Any]) -> torch.Tensor:
        ctx.save_for_backward(*also)
        ctx.seen = seen
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        ctx.seen.append(ctx.saved_tensors)
        ctx.seen.append(ctx.saved_tensors)
        return grad * 2, None, None


def given_back(*saved: Any) -> tuple[Any, ...]:
    """What a Function that saves ``saved`` finds in ``ctx.saved_tensors``."""
    seen: list[Any] = []
    Saver.apply(torch.ones(2, requires_grad=True), list(saved), seen).sum().backward()
    assert len(seen[0]) == len(seen[1]) == len(saved)
    assert all(a is b for a, b in zip(*seen, strict=True))
    assert type(seen[0]) is tuple
    return seen[0]


@pytest.fixture(params=["strict", "every_call", "nested", "warn"])
def guarded(request: pytest.FixtureRequest) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if request.param == "nested":
            stack.enter_context(torchguard.warn())
        every_call = request.param == "every_call"
        stack.enter_context(torchguard.warn() if request.param == "warn" else torchguard.strict(every_call=every_call))
        yield


class Plain(torch.Tensor):
    pass


OBJECTS = {
    "plain": lambda: torch.ones(3),
    "leaf": lambda: torch.ones(3, requires_grad=True),
    "parameter": lambda: nn.Parameter(torch.ones(3)),
    "frozen parameter": lambda: nn.Parameter(torch.ones(3), requires_grad=False),
    "buffer": lambda: nn.Buffer(torch.ones(3)),
    "no leaf": lambda: torch.ones(3, requires_grad=True) * 1,
    "view": lambda: torch.ones(3)[1:],
    "alias": lambda: torch.ones(3).data,
    "detached": lambda: (torch.ones(3, requires_grad=True) * 1).detach(),
    "integers": lambda: torch.arange(3),
    "booleans": lambda: torch.tensor([True]),
    "half": lambda: torch.ones(3).half(),
    "complex": lambda: torch.ones(3, dtype=torch.cfloat),
    "scalar": lambda: torch.tensor(1.0),
    "empty": lambda: torch.ones(0),
    "meta": lambda: torch.ones(3, device="meta"),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "csr": lambda: torch.eye(3).to_sparse_csr(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
    "subclass": lambda: torch.ones(3).as_subclass(Plain),
    "conjugate": lambda: torch.ones(3, dtype=torch.cfloat).conj(),
    "output of another Function": lambda: Saver.apply(torch.ones(2, requires_grad=True), [], []),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR", "ignore:.*nested")
@pytest.mark.parametrize("kind", OBJECTS)
@pytest.mark.usefixtures("guarded")
def test_the_very_object(kind: str) -> None:
    saved = OBJECTS[kind]()
    saved.main_grad = [1]
    (found,) = given_back(saved)
    assert found is saved
    assert found.main_grad == [1]
    assert type(found) is type(saved)


@pytest.mark.usefixtures("guarded")
def test_none_and_mixed_entries() -> None:
    p, x = nn.Parameter(torch.ones(2)), torch.zeros(3)
    found = given_back(None, p, None, x, p, None)
    assert [found[i] for i in (0, 2, 5)] == [None] * 3
    assert found[1] is p
    assert found[3] is x
    assert found[4] is p
    assert given_back() == ()
    assert given_back(None) == (None,)


@pytest.mark.usefixtures("guarded")
def test_an_attribute_set_after_the_save() -> None:
    """As Megatron does it: ``main_grad`` is hung on the weight, and backward adds into it."""

    class Linear(Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x, weight)
            return x @ weight.t()

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> Any:
            x, weight = ctx.saved_tensors
            weight.main_grad.addmm_(grad.t(), x)
            return grad @ weight, None

    weight = nn.Parameter(torch.ones(2, 3))
    out = Linear.apply(torch.ones(4, 3, requires_grad=True), weight)
    weight.main_grad = torch.zeros(2, 3)  # type: ignore[attr-defined]
    for _ in range(2):
        out.sum().backward(retain_graph=True)
    assert weight.main_grad.tolist() == [[8.0] * 3] * 2
    assert weight.grad is None


@pytest.mark.usefixtures("guarded")
def test_read_from_outside_the_function() -> None:
    p, x = nn.Parameter(torch.ones(2)), torch.ones(2, requires_grad=True)
    out = Saver.apply(x, [p, None, x], [])
    found = out.grad_fn.saved_tensors
    assert found[0] is p
    assert found[1] is None
    assert found[2] is x


@pytest.mark.usefixtures("guarded")
def test_the_objects_after_an_inner_guard() -> None:
    p = nn.Parameter(torch.ones(2))
    seen: list[Any] = []
    with torchguard.strict():
        out = Saver.apply(p, [p], seen)
    out.sum().backward()
    assert seen[0][0] is p


@pytest.mark.usefixtures("guarded")
def test_saved_before_and_read_inside() -> None:
    p = nn.Parameter(torch.ones(2))
    seen: list[Any] = []
    out = Saver.apply(p, [p, None], seen)
    with torchguard.strict():
        out.sum().backward()
    assert seen[0][0] is p
    assert seen[0][1] is None


def test_saved_before_any_guard_and_read_inside() -> None:
    p = nn.Parameter(torch.ones(2))
    seen: list[Any] = []
    out = Saver.apply(p, [p, None], seen)
    with torchguard.strict():
        out.sum().backward()
    assert seen[0][0] is p
    assert seen[0][1] is None


# ---- results ------------------------------------------------------------------------------------------------------


class Several(Function):
    """Saves inputs, None and outputs, and is differentiable twice."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, y: torch.Tensor) -> Any:
        one, two = x.exp(), y.sin()
        ctx.save_for_backward(one, None, x, two, y)
        return one, two

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, other: torch.Tensor) -> Any:
        one, nothing, x, two, y = ctx.saved_tensors
        assert nothing is None
        assert ctx.saved_tensors[0].shape == x.shape
        return grad * one + two.detach() * 0, other * y.cos()


@transparent
def test_outputs_and_inputs() -> Any:
    x, y = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    one, two = Several.apply(x, y)
    node = one.grad_fn
    found = node.saved_tensors
    facts = [(type(t), t is x, t is y, t.requires_grad, t.is_leaf) for t in found if t is not None]
    same_node = found[0].grad_fn is node
    (one * two).sum().backward()
    return [facts, same_node, found[0].output_nr, found[3].output_nr, x, y]


@transparent
def test_double_and_triple_backward() -> Any:
    x, y = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    one, two = Several.apply(x, y)
    results = [(one * two * x).sum()]
    for _ in range(3):
        results.append(sum(g.sum() for g in torch.autograd.grad(results[-1], [x, y], create_graph=True)))
    return [*results, torch.autograd.grad(results[-1], x)]


@transparent
def test_gradcheck_of_a_function() -> Any:
    x, y = (torch.randn(3, dtype=torch.double, requires_grad=True) for _ in range(2))
    return [
        torch.autograd.gradcheck(Several.apply, (x, y)),
        torch.autograd.gradgradcheck(Several.apply, (x, y)),
        x,
    ]


@transparent
def test_mark_dirty() -> Any:
    class InPlace(Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            x.exp_()
            ctx.mark_dirty(x)
            ctx.save_for_backward(x)
            return x

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> Any:
            (result,) = ctx.saved_tensors
            return grad * result

    x = torch.randn(4, requires_grad=True)
    h = x * 1
    out = InPlace.apply(h)
    view_base = x * 1
    view = InPlace.apply(view_base[1:])
    (first,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    out2 = torch.autograd.grad(first.sum(), x, allow_unused=True)
    return [out is h, h, view, view_base, first, out2, torch.autograd.grad(view_base.sum(), x)]


@transparent
def test_mark_non_differentiable_and_unused() -> Any:
    class Sorts(Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> Any:
            values, index = x.sort()
            ctx.mark_non_differentiable(index)
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(x, index)
            return values, index

        @staticmethod
        def backward(ctx: Any, grad: Any, nothing: Any) -> Any:
            x, index = ctx.saved_tensors
            assert nothing is None
            return torch.zeros_like(x).index_add_(0, index, grad)

    x = torch.randn(4, requires_grad=True)
    values, index = Sorts.apply(x)
    (values * torch.arange(4)).sum().backward()
    return [values, index, x, values.grad_fn.needs_input_grad]


@transparent
def test_once_differentiable() -> Any:
    class Once(Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, grad: torch.Tensor) -> Any:
            (x,) = ctx.saved_tensors
            return 2 * grad * x

    x = torch.randn(3, requires_grad=True)
    (grad,) = torch.autograd.grad(Once.apply(x).sum(), x, create_graph=True)
    try:
        grad.sum().backward()
    except RuntimeError as error:
        return [grad, error]
    return grad


class Cube(Function):
    """In the style of torch.func: with ``setup_context`` and ``vmap``."""

    @staticmethod
    def forward(x: torch.Tensor) -> Any:
        return x**3, 3 * x**2

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        (x,) = inputs
        cube, slope = output
        ctx.save_for_backward(x, slope)
        ctx.save_for_forward(x, slope)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        x, slope = ctx.saved_tensors
        return grad * slope + other * 6 * x

    @staticmethod
    def vmap(info: Any, in_dims: Any, x: torch.Tensor) -> Any:
        return Cube.apply(x), (in_dims[0], in_dims[0])

    @staticmethod
    def jvp(ctx: Any, tangent: torch.Tensor) -> Any:
        x, slope = ctx.saved_tensors
        return tangent * slope, tangent * 6 * x


class Generated(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        return x.exp()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (result,) = ctx.saved_tensors
        return grad * result


@transparent
def test_functions_for_torch_func() -> Any:
    x = torch.randn(3, requires_grad=True)
    cube, slope = Cube.apply(x)
    (grad,) = torch.autograd.grad(cube.sum() + slope.sum(), x, create_graph=True)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x.detach(), torch.ones(3))
        tangents = [torch.autograd.forward_ad.unpack_dual(part).tangent for part in Cube.apply(dual)]
    detached = x.detach()
    return [
        grad,
        torch.autograd.grad(grad.sum(), x),
        tangents,
        torch.func.grad(lambda t: Cube.apply(t)[0].sum())(detached),
        torch.func.vmap(torch.func.grad(lambda t: Cube.apply(t)[0].sum()))(torch.randn(2, 3)),
        torch.func.grad(lambda t: Generated.apply(t).sum())(detached),
        torch.func.vmap(Generated.apply)(torch.randn(2, 3)),
        torch.func.jacrev(torch.func.grad(lambda t: Generated.apply(t).sum()))(detached),
        torch.autograd.grad(Generated.apply(x).sum(), x),
        torch.func.jvp(lambda t: Cube.apply(t)[0], (detached,), (torch.ones(3),)),
    ]


@transparent
def test_nested_functions() -> Any:
    """A Function that applies another one in its forward and reads its own saves through a third in its backward."""

    class Outer(Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            with torch.enable_grad():
                inner = x.detach().requires_grad_()
                hidden = Several.apply(inner, inner)[0]
            ctx.save_for_backward(inner, hidden, scale)
            ctx.hidden = hidden
            return hidden.detach() * scale

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> Any:
            inner, hidden, scale = ctx.saved_tensors
            with torch.enable_grad():
                (result,) = torch.autograd.grad(ctx.hidden, inner, grad * scale)
            return result, (grad * hidden).sum()

    x, scale = torch.randn(3, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    y = Outer.apply(Outer.apply(x, scale), scale)
    y.sum().backward()
    return [y, x, scale]


@transparent
def test_reading_in_a_forward_of_another() -> Any:
    """``saved_tensors`` of one node are read while another one is reading its own."""
    x = torch.randn(3, requires_grad=True)
    first = Several.apply(x, x)[0]

    class Reads(Function):
        @staticmethod
        def forward(ctx: Any, h: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(*first.grad_fn.saved_tensors[2:3], h)
            return h * 1

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> Any:
            own, others = ctx.saved_tensors, first.grad_fn.saved_tensors
            return grad * own[0] * others[2] * (own[0] is x) * (others[2] is x)

    Reads.apply(first).sum().backward(retain_graph=True)
    first.sum().backward()
    return x


@transparent
@pytest.mark.parametrize("kind", ["identity", "clone", "numpy"])
def test_the_users_own_hooks(kind: str) -> Any:
    pack, unpack = {
        "identity": (lambda t: t, lambda t: t),
        "clone": (lambda t: t.clone(), lambda t: t),
        "numpy": (lambda t: t.detach().numpy().copy(), torch.from_numpy),
    }[kind]
    p = nn.Parameter(torch.randn(3))
    seen: list[Any] = []
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        out = Saver.apply(p, [p, p * 1], seen)
        one, _ = Several.apply(out, p)
    mixed = Saver.apply(one, [p], seen)
    mixed.sum().backward()
    return [[(type(t), t is p, t) for t in found] for found in seen] + [p]


@transparent
def test_what_functions_refuse() -> Any:
    class Wrong(Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, saved: Any) -> torch.Tensor:
            ctx.save_for_backward(*saved)
            return x * 1

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> Any:
            ctx.saved_tensors = ()
            return grad, None

    def attempt(saved: Any) -> Any:
        try:
            out = Wrong.apply(torch.ones(2, requires_grad=True), saved)
            out.grad_fn.saved_tensors
            out.sum().backward()
        except Exception as error:
            return type(error), str(error)
        return None

    out = Saver.apply(torch.ones(2, requires_grad=True), [], [])
    return [
        attempt([1]),
        attempt(["no"]),
        attempt([[torch.ones(1)]]),
        attempt([]),
        hasattr(out.grad_fn, "saved_tensors"),
        "saved_tensors" in dir(out.grad_fn),
        out.grad_fn.saved_tensors,
        hasattr(out.grad_fn, "saved_variables"),
    ]


@transparent
def test_to_save_and_saved_for_forward() -> Any:
    class Tells(Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x, None)
            ctx.count = len(ctx.to_save)
            return x * 1

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> Any:
            return grad * ctx.count

    x = torch.randn(2, requires_grad=True)
    Tells.apply(x).sum().backward()
    return x


@transparent
def test_under_no_grad_nothing_is_saved() -> Any:
    p = nn.Parameter(torch.randn(2))
    with torch.no_grad():
        out = Saver.apply(p, [p], [])
    return [out, out.grad_fn, Saver.apply(torch.ones(2), [p], [])]


# ---- lifetimes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["backward", "dropped"])
@pytest.mark.usefixtures("guarded")
def test_what_a_function_saved_dies_with_the_graph(end: str) -> None:
    gc.collect()
    gc.disable()
    try:
        p = nn.Parameter(torch.ones(3))
        one, two = Several.apply(p, p)
        third = Saver.apply(one, [one, p], [])
        held = [weakref.ref(tensor) for tensor in (p, one, two, third)]
        if end == "backward":
            (third + two).sum().backward()
        del p, one, two, third
        assert [item() for item in held] == [None] * 4
    finally:
        gc.enable()
