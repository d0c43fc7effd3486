"""Do all kinds of tensors, subclasses and modes behave with the guard on as off?"""

from __future__ import annotations

import contextlib
import copy
import operator
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_transparency import GUARDS, Ballast, attempt, frozen, transparent
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import torchguard

pytestmark = pytest.mark.filterwarnings("ignore")


class Plain(torch.Tensor):
    """A subclass that adds nothing."""


def _quantised(dtype: torch.dtype = torch.quint8) -> torch.Tensor:
    return torch.quantize_per_tensor(torch.randn(3, 4), 0.1, 10, dtype)


def _jagged() -> torch.Tensor:
    return torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)], layout=torch.jagged)


KINDS: dict[str, Callable[[], torch.Tensor]] = {
    "dense": lambda: torch.randn(3, 4),
    "double": lambda: torch.randn(3, 4, dtype=torch.double),
    "half": lambda: torch.randn(3, 4).half(),
    "bfloat16": lambda: torch.randn(3, 4).bfloat16(),
    "complex": lambda: torch.randn(3, 4, dtype=torch.cfloat),
    "integers": lambda: torch.arange(12).view(3, 4),
    "booleans": lambda: torch.arange(12).view(3, 4) > 5,
    "scalar": lambda: torch.randn(()),
    "empty": lambda: torch.randn(0),
    "empty rows": lambda: torch.randn(3, 0),
    "transposed": lambda: torch.randn(4, 3).t(),
    "strided": lambda: torch.randn(6, 8)[::2, 1::2],
    "expanded": lambda: torch.randn(3, 1).expand(3, 4),
    "channels last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "parameter": lambda: nn.Parameter(torch.randn(3, 4)),
    "buffer": lambda: nn.Buffer(torch.randn(3, 4)),
    "conjugate": lambda: torch.randn(3, 4, dtype=torch.cfloat).conj(),
    "negative view": lambda: torch.randn(3, 4, dtype=torch.cfloat).conj().imag,
    "from numpy": lambda: torch.from_numpy(np.arange(12.0).reshape(3, 4)),
    "read-only numpy": lambda: torch.from_numpy(np.broadcast_to(np.arange(4.0), (3, 4))),
    "from dlpack": lambda: torch.from_dlpack(torch.randn(3, 4)),
    "copy on write": lambda: torch._lazy_clone(torch.randn(3, 4)),
    "meta": lambda: torch.randn(3, 4, device="meta"),
    "coo": lambda: torch.randn(3, 4).relu().to_sparse(),
    "hybrid coo": lambda: torch.randn(3, 4).relu().to_sparse(1),
    "csr": lambda: torch.randn(3, 4).relu().to_sparse_csr(),
    "csc": lambda: torch.randn(3, 4).relu().to_sparse_csc(),
    "bsr": lambda: torch.randn(4, 4).relu().to_sparse_bsr((2, 2)),
    "nested": lambda: torch.nested.nested_tensor([torch.randn(2, 4), torch.randn(3, 4)]),
    "jagged": _jagged,
    "quantised": _quantised,
    "quantised qint32": lambda: _quantised(torch.qint32),
    "mkldnn": lambda: torch.randn(3, 4).to_mkldnn(),
    "subclass": lambda: torch.randn(3, 4).as_subclass(Plain),
    "uninitialised": lambda: nn.UninitializedParameter(),
}

OPERATIONS: dict[str, Callable[[torch.Tensor], Any]] = {
    "data": lambda x: x.data,
    "data of data": lambda x: x.data.data,
    "type of data": lambda x: (type(x.data), x.data.layout, x.data.requires_grad, x.data._version),
    "add_": lambda x: x.add_(1),
    "mul_": lambda x: x.mul_(2),
    "mul_ of data": lambda x: x.data.mul_(2),
    "zero_": lambda x: x.zero_(),
    "copy_": lambda x: x.copy_(x.clone()),
    "relu_": lambda x: torch.relu_(x),
    "F.relu": lambda x: F.relu(x, inplace=True),
    "+=": lambda x: operator.iadd(x, x),
    "item": lambda x: operator.setitem(x, 0, 1),
    "slice of data": lambda x: operator.setitem(x.data, slice(0, 1), 1),
    "whole": lambda x: operator.setitem(x, ..., 0),
    "foreach": lambda x: torch._foreach_mul_([x, x.data], 2),
    "rebind": lambda x: setattr(x, "data", x.data.clone()),
    "rebind to itself": lambda x: setattr(x, "data", x.data),
    "rebind to plain": lambda x: setattr(x, "data", torch.ones(3, 4)),
    "detach_": lambda x: x.detach_(),
    "requires_grad_": lambda x: x.requires_grad_().requires_grad_(False),
    "resize_": lambda x: x.resize_(x.shape),
    "t_": lambda x: x.t_(),
    "real": lambda x: setattr(x, "real", torch.ones(3, 4)),
    "deepcopy": lambda x: copy.deepcopy(x.data),
    "pickle": lambda x: pickle.loads(pickle.dumps(x.data)),
    "numpy": lambda x: x.data.numpy().tolist(),
    "apply_": lambda x: x.data.apply_(lambda v: v + 1),
    "Parameter": lambda x: nn.Parameter(x.data, requires_grad=x.data.is_floating_point()),
    "version": lambda x: x._version,
    "equal": lambda x: torch.equal(x, x.data),
}

BACKWARDS: dict[str, Callable[[torch.Tensor], Any]] = {
    "square": lambda x: x * x,
    "sigmoid": lambda x: torch.sigmoid(x),
    "relu_": lambda x: torch.relu_(x * 1),
    "mul_ of a copy": lambda x: (x * 1).mul_(2).mul_(x),
    "matmul": lambda x: x @ torch.ones(4, 2, dtype=x.dtype, requires_grad=True),
    "custom": lambda x: Twice.apply(x),
    "to dense": lambda x: x.to_dense() * x.to_dense(),
    "linear": lambda x: F.linear(x, torch.ones(2, 4, requires_grad=True)),
}


class Twice(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        out = x * 2
        ctx.save_for_backward(x, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        x, out = ctx.saved_tensors
        assert x.shape == out.shape
        return grad * 2


@transparent
@pytest.mark.parametrize("kind", KINDS)
def test_operations_on_each_kind(kind: str) -> Any:
    results: list[Any] = []
    for name, operation in OPERATIONS.items():
        x = KINDS[kind]()
        if kind == "jagged" and name == "rebind to plain":
            continue  # the message numbers its symbols, differently in each run
        result = attempt(operation, x)
        results.append((name, "itself" if result is x else result, x if kind != "uninitialised" else None))
    return frozen(_without_memory(results)) if kind == "uninitialised" else results


def _without_memory(value: Any) -> Any:
    if isinstance(value, nn.parameter.UninitializedTensorMixin):
        return type(value).__name__
    if isinstance(value, (list, tuple)):
        return [_without_memory(item) for item in value]
    return value


@transparent
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "uninitialised"])
def test_forward_and_backward_of_each_kind(kind: str) -> Any:
    results: list[Any] = []
    for name, forward in BACKWARDS.items():
        x = KINDS[kind]()

        def run(x: torch.Tensor = x, forward: Callable[[torch.Tensor], Any] = forward) -> Any:
            leaf = x.detach().requires_grad_()
            alias = leaf.data
            out = forward(leaf)
            kept = out.data
            total = out.to_dense().sum() if out.layout is not torch.strided and not out.is_nested else out
            if total.is_nested:
                total = torch.cat([part.reshape(-1) for part in total.unbind()]).sum()
            total = total.sum().abs()
            total.backward()
            grad = leaf.grad
            leaf.data.mul_(2)  # its graph is gone
            alias.add_(0) if alias.layout is torch.strided else None
            leaf.data = leaf.data.clone()
            return [out.detach(), kept, grad, leaf.detach(), leaf._version]

        results.append((name, attempt(run)))
    return results


@transparent
def test_tensors_of_inference_mode() -> Any:
    with torch.inference_mode():
        x = torch.randn(3)
        seen = [x.data, type(x.data), x.is_inference(), x.data.is_inference(), attempt(lambda: x._version)]
        x.add_(1)
        x.data.mul_(2)
        x[0] = 1
        x.data[1:] = 2
        torch.relu_(x)
        normal = nn.Parameter(torch.randn(3))
        seen.append(normal.data)
    w = torch.randn(3, requires_grad=True)
    with torch.inference_mode():
        w.data.mul_(2)
        w.mul_(2)
        inside = w.data
    with torch.inference_mode(), torch.inference_mode(False):
        y = (w * w).sum()
        y.backward()

    def assign() -> None:
        w.data = x

    return [
        seen,
        x,
        w,
        inside,
        inside.is_inference(),
        attempt(lambda: x.data),
        attempt(lambda: x.data.add_(1)),
        attempt(lambda: x.add_(1)),
        attempt(lambda: w * x),
        attempt(lambda: operator.setitem(x, 0, 1)),
        attempt(assign),
        attempt(lambda: x.requires_grad_()),
        w,
    ]


@transparent
def test_under_no_grad() -> Any:
    w = nn.Parameter(torch.randn(3))
    out = w.exp()
    with torch.no_grad():
        alias = w.data
        h = w * 2
        h.relu_()
        h.data.add_(1)
        w.sub_(h)
        w.data.sub_(h)
        with torch.enable_grad():
            again = w.exp()
    with torch.set_grad_enabled(False):
        w[0] = 1
    torch.autograd.backward([again.sum()])
    return [w, alias, h, out, again]


# ---- subclasses ---------------------------------------------------------------------------------------------------


def _name(func: Any) -> str:
    name = torch.overrides.resolve_name(func)
    return name or getattr(func, "__qualname__", None) or str(func)


def note(log: list[Any], func: Any, *more: Any) -> None:
    """Take down an operator, except for ``detach``: save hooks that do nothing at all add and remove those."""
    if func is not torch.ops.aten.detach.default:
        log.append((str(func), *more))


class Logging(torch.Tensor):
    """Notes every function that is called with one of its kind."""

    log: list[Any] = []  # noqa: RUF012

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        shapes = [tuple(a.shape) if type(a) is torch.Tensor else type(a).__name__ for a in args]
        Logging.log.append((_name(func), [t.__name__ for t in types], shapes, sorted(kwargs or {})))
        return super().__torch_function__(func, types, args, kwargs or {})


class Wrapper(torch.Tensor):
    """Wraps a tensor, has no memory of its own, and notes every operator that reaches it."""

    log: list[Any] = []  # noqa: RUF012
    elem: torch.Tensor

    @staticmethod
    def __new__(cls, elem: torch.Tensor, requires_grad: bool = False) -> Any:
        wrapper = torch.Tensor._make_wrapper_subclass(
            cls, elem.size(), strides=elem.stride(), dtype=elem.dtype, requires_grad=requires_grad
        )
        wrapper.elem = elem.detach()
        return wrapper

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        note(Wrapper.log, func)
        unwrap = lambda x: x.elem if isinstance(x, Wrapper) else x  # noqa: E731
        wrap = lambda x: Wrapper(x) if isinstance(x, torch.Tensor) else x  # noqa: E731
        result = tree_map(wrap, func(*tree_map(unwrap, args), **tree_map(unwrap, kwargs or {})))
        return args[0] if func._schema.name.endswith("_") else result


class Dispatching(torch.Tensor):
    """Has memory of its own, and notes every operator that reaches it."""

    log: list[Any] = []  # noqa: RUF012

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        note(Dispatching.log, func)
        keep = lambda x: x.as_subclass(Dispatching) if type(x) is torch.Tensor else x  # noqa: E731
        with torch._C._DisableTorchDispatch():
            return tree_map(keep, func(*args, **(kwargs or {})))


def _work(make: Callable[[torch.Tensor], torch.Tensor]) -> list[Any]:
    """A program with in-place operations, ``.data``, several saves and live aliases while they are made."""
    results: list[Any] = []

    def training() -> Any:
        w = make(torch.ones(4)).requires_grad_()
        alias = w.data
        h = w * 2
        kept = h.data
        out = torch.relu_(h * 1).sigmoid()
        out2 = out * h
        view = out2[1:]
        view.mul_(2)
        out2[0] = 1
        total = out2.sum()
        total.backward(retain_graph=True)
        total.backward()
        w.data.sub_(w.grad.data, alpha=0.1)
        w.grad.data.zero_()
        w.data = w.data * 2
        alias.add_(1)
        return [type(kept), type(alias), type(w.grad), w._version, alias._version, kept is h]

    def others() -> Any:
        x = make(torch.ones(4))
        x += 1
        x.data[:2].fill_(3)
        F.relu(x, inplace=True)
        torch._foreach_add_([x], 1)
        p = nn.Parameter(x.data)
        with torch.no_grad():
            p.copy_(x)
            nn.init.zeros_(p)
        return [type(p), type(x.data), x._version]

    def refused() -> Any:
        w = make(torch.ones(4)).requires_grad_()
        h = w * 2
        out = h * h
        h.add_(1)
        out.sum().backward()

    def double() -> Any:
        w = make(torch.ones(4)).requires_grad_()
        (grad,) = torch.autograd.grad((w * w * w).sum(), w, create_graph=True)
        (again,) = torch.autograd.grad(grad.sum(), w)
        return [type(grad), type(again)]

    for program in (training, others, refused, double):
        results.append(attempt(program))
    return results


@transparent
def test_a_plain_subclass() -> Any:
    return _work(lambda t: t.as_subclass(Plain))


@transparent
def test_the_calls_that_a_subclass_sees() -> Any:
    Logging.log.clear()
    results = _work(lambda t: t.as_subclass(Logging))
    return [results, list(Logging.log)]


@transparent
def test_the_operators_that_a_wrapper_sees() -> Any:
    Wrapper.log.clear()
    results = _work(Wrapper)
    return [results, list(Wrapper.log)]


@transparent
def test_the_operators_that_a_dispatching_subclass_sees() -> Any:
    Dispatching.log.clear()
    results = _work(lambda t: t.as_subclass(Dispatching))
    return [results, list(Dispatching.log)]


@transparent
def test_a_subclass_that_overrides_writers_and_data() -> Any:
    calls: list[str] = []

    class Own(torch.Tensor):
        def add_(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
            calls.append("add_")
            return super().add_(*args, **kwargs)

        def __iadd__(self, other: Any) -> Any:
            calls.append("+=")
            return super().__iadd__(other)

        @property
        def data(self) -> Any:  # type: ignore[override]
            calls.append("data")
            return torch.Tensor.data.__get__(self)

        @data.setter
        def data(self, value: Any) -> None:
            calls.append("data =")
            torch.Tensor.data.__set__(self, value)

    x = torch.ones(3).as_subclass(Own).requires_grad_()
    kept = x.exp()
    alias = x.data
    with torch.no_grad():
        x += 1
        x.add_(1)
    x.data = torch.zeros(3)
    return [calls, type(x).__name__, x.tolist(), alias.tolist(), kept.shape]


@transparent
def test_a_subclass_without_torch_function() -> Any:
    class Silent(torch.Tensor):
        __torch_function__ = torch._C._disabled_torch_function_impl

    return _work(lambda t: t.as_subclass(Silent))


@transparent
def test_what_func_is_inside_torch_function() -> Any:
    """User code compares ``func`` and looks it up. (``func is torch.relu_`` is a limit: docs/limits.md.)"""
    found: list[Any] = []
    writers = {torch.Tensor.add_: "add_", torch.relu_: "relu_", torch.Tensor.data.__get__: "data"}

    class Asking(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found.append(
                [
                    func == torch.Tensor.add_,
                    func == torch.relu_,
                    func in (torch.Tensor.mul_, torch.Tensor.__setitem__),
                    writers.get(func),
                    func in torch.overrides.get_testing_overrides(),
                    getattr(func, "__name__", None),
                    getattr(func, "__self__", None) is not None,
                ]
            )
            return super().__torch_function__(func, types, args, kwargs or {})

    x = torch.ones(3).as_subclass(Asking).clone()
    x.add_(1)
    torch.Tensor.add_(x, 1)
    torch.relu_(x)
    F.relu(x, inplace=True)
    x.data
    x.mul_(2)
    x[0] = 1
    x += 1
    torch._foreach_add_([x], 1)
    torch.Tensor.data.__set__(x, torch.ones(3))
    x.real = torch.ones(3)
    F.hardtanh_(x)
    torch.dropout_(x, 0.5, False)
    return found


def _harmless(make: Callable[[torch.Tensor], torch.Tensor]) -> list[Any]:
    """Writes that no byte feels: the guard may rehearse them, and nobody may see it."""
    w = make(torch.ones(4)).requires_grad_()
    out = w.exp()
    out.data.mul_(1)
    out.data[:0] = 5
    out.data[make(torch.zeros(4)) > 1] = 7
    torch.relu_(out.data)
    out.sum().backward()
    return [type(out.data), out._version, w.grad is not None]


@transparent
def test_harmless_writes() -> Any:
    return _harmless(lambda t: t)


@transparent
def test_harmless_writes_to_a_plain_subclass() -> Any:
    return _harmless(lambda t: t.as_subclass(Plain))


@transparent
def test_harmless_writes_to_a_logging_subclass() -> Any:
    Logging.log.clear()
    results = _harmless(lambda t: t.as_subclass(Logging))
    return [results, list(Logging.log)]


@transparent
def test_harmless_writes_under_a_function_mode() -> Any:
    mode = FunctionLog()
    with mode:
        results = _harmless(lambda t: t)
    return [results, mode.log]


# ---- modes --------------------------------------------------------------------------------------------------------


class FunctionLog(TorchFunctionMode):
    def __init__(self) -> None:
        self.log: list[Any] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.log.append((_name(func), [t.__name__ for t in types], len(args), sorted(kwargs or {})))
        return func(*args, **(kwargs or {}))


class DispatchLog(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.log: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        note(self.log, func, [tuple(a.shape) for a in args if isinstance(a, torch.Tensor)], sorted(kwargs or {}))
        return func(*args, **(kwargs or {}))


MODES: dict[str, Callable[[], Any]] = {"function": FunctionLog, "dispatch": DispatchLog}


@transparent
@pytest.mark.parametrize("kind", MODES)
def test_what_a_mode_inside_the_guard_sees(kind: str) -> Any:
    mode = MODES[kind]()
    with mode:
        results = _work(lambda t: t)
    return [results, mode.log]


@pytest.mark.parametrize("kind", MODES)
@pytest.mark.parametrize("guard", GUARDS)
def test_what_a_mode_around_the_guard_sees(kind: str, guard: str) -> None:
    def run(manager: Any) -> tuple[Any, Any]:
        torch.manual_seed(0)
        mode = MODES[kind]()
        ballast = Ballast()
        with mode, manager:
            results = _work(lambda t: t)
        del ballast
        return frozen(results), mode.log

    expected = run(contextlib.nullcontext())
    found = run(GUARDS[guard]())
    assert found[1] == expected[1]
    assert found[0] == expected[0]


@transparent
def test_two_modes_and_a_subclass() -> Any:
    inner, outer, dispatch = FunctionLog(), FunctionLog(), DispatchLog()
    Logging.log.clear()
    with outer, dispatch, inner:
        results = _work(lambda t: t.as_subclass(Logging))
    return [results, inner.log, outer.log, dispatch.log, list(Logging.log)]


@transparent
def test_a_device_mode() -> Any:
    with torch.device("meta"):
        x = torch.ones(3, requires_grad=True)
        y = x.sin()
        y.data.add_(1)
    with torch.device("cpu"):
        z = torch.ones(3)
        z.data.add_(1)
        nn.init.ones_(z)
    return [x, y, z]


@transparent
def test_a_mode_that_answers_itself() -> Any:
    class Answers(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func in (torch.Tensor.add_, torch.relu_, torch.Tensor.__setitem__):
                return "not called"
            return func(*args, **(kwargs or {}))

    x = torch.ones(3)
    with Answers():
        results = [x.add_(1), torch.relu_(x), x.mul_(2) is x, torch.Tensor.add_(x, 1)]
        x[0] = 5
    return [results, x]


@transparent
def test_fake_tensors() -> Any:
    with FakeTensorMode() as mode:
        results = _work(lambda t: t)
        model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 2), nn.Dropout(inplace=True))
        out = model(torch.randn(5, 3))
        out.sum().backward()
        torch.optim.Adam(model.parameters(), foreach=True).step()
        fakes = [p.data for p in model.parameters()]
        types = [type(p).__name__ for p in model.parameters()] + [type(p.data).__name__ for p in fakes]
    real = torch.randn(3, requires_grad=True)
    fake = mode.from_tensor(real)
    square = fake * fake
    fake.data.mul_(2)
    return [results, types, [(f.shape, f.dtype, f.device.type) for f in fakes], square.shape, fake.shape, real]


@transparent
def test_functional_tensors() -> Any:
    def program(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        y.data.add_(1)
        y[0] = 3
        torch.relu_(y)
        return y + x.data

    return [torch.func.functionalize(program)(torch.randn(3)), program(torch.randn(3))]


@pytest.fixture(autouse=True)
def _logs_are_empty() -> Iterator[None]:
    yield
    for log in (Logging.log, Wrapper.log, Dispatching.log):
        log.clear()


@pytest.mark.parametrize("hooks", [False, True])
def test_nobody_is_told_that_a_tensor_without_bytes_cannot_be_watched(hooks: bool) -> None:
    """What a compiler traces with, and what ``torch.export`` saves, is only a shape: there is nothing to write to."""

    def run() -> None:
        with FakeTensorMode():
            x = torch.ones(3, requires_grad=True)
            (x * x.exp()).sum().backward()
        torch.export.export(nn.Sequential(nn.Linear(3, 3), nn.Tanh()), (torch.ones(1, 3),))

    own = torch.autograd.graph.saved_tensors_hooks(lambda tensor: (tensor,), lambda packed: packed[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error", torchguard.UnwatchedWarning)
        with torchguard.strict() as guard, own if hooks else contextlib.nullcontext():
            run()
    assert guard.unwatched == []
