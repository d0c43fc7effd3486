"""Does a program give the same results, types and errors with the guard on as off?

``transparent`` turns a program into a test: the program runs without a guard, under each kind of guard, and once more
after it, and what it returned, or raised, must be the same to the last bit. The other ``test_transparency_*`` modules use it.
"""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import io
import operator
import pickle
import types
import warnings
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.overrides
from torch import nn
from torch.utils.weak import WeakTensorKeyDictionary

import torchguard

GUARDS: dict[str, Callable[[], torchguard.Guard]] = {
    "strict": torchguard.strict,
    "every_call": functools.partial(torchguard.strict, every_call=True),
    "warn": torchguard.warn,
}


# ---- the comparison -----------------------------------------------------------------------------------------------


def frozen_tensor(x: torch.Tensor) -> Any:
    """Everything about a tensor that a program can tell apart, in plain values."""
    with torch._C.DisableTorchFunction(), torch.no_grad():
        shape = None if x.is_nested else tuple(x.shape)
        facts: list[Any] = [type(x), x.dtype, shape, x.layout, str(x.device), x.requires_grad, x.is_leaf]
        facts += [type(x.grad_fn).__name__, x.is_inference(), None if x.is_inference() else x._version]
        facts += [sorted(vars(x))]
        if type(x).__name__ == "FakeTensor" or x.device.type == "meta":
            return (*facts, x.stride())
        plain = x.detach()
        if plain._is_zerotensor():
            return (*facts, "zeros")
        if plain.is_nested:
            values: Any = [frozen(part) for part in plain.unbind()]
        elif plain.is_quantized:
            values = [plain.int_repr().tolist(), str(plain.qscheme())]
        elif plain.layout is not torch.strided:
            values = frozen(attempt(plain.to_dense))
        else:
            dense = plain if type(plain) is torch.Tensor else plain.as_subclass(torch.Tensor)
            facts += [dense.stride(), dense.is_conj(), dense.is_neg()]
            dense = dense.resolve_conj().resolve_neg().contiguous().reshape(-1)
            values = bytes(dense.view(torch.uint8).tolist()) if dense.numel() else b""
        grad = x.grad if x.is_leaf and not x.is_inference() else None
        return (*facts, values, None if grad is None else frozen_tensor(grad))


def frozen(value: Any) -> Any:
    """``value`` in a form that ``==`` compares bit for bit."""
    if isinstance(value, torch.Tensor):
        return frozen_tensor(value)
    if isinstance(value, (list, tuple)):
        return type(value).__name__, [frozen(item) for item in value]
    if isinstance(value, dict):
        return [(frozen(key), frozen(item)) for key, item in value.items()]
    if isinstance(value, BaseException):
        return type(value), str(value)
    if isinstance(value, float):
        return repr(value)
    return value


def difference(one: Any, other: Any, path: str = "") -> str:
    """Where two frozen values differ first, and how; empty where they do not."""
    if isinstance(one, (list, tuple)) and type(one) is type(other):
        for i, (a, b) in enumerate(zip(one, other, strict=False)):
            if found := difference(a, b, f"{path}[{i}]"):
                return found
        if len(one) != len(other):
            longer = one if len(one) > len(other) else other
            where = "with the guard" if longer is one else "without it"
            return (
                f"{path}: {len(one)} items instead of {len(other)}; {where} {longer[min(len(one), len(other)) :][:6]!r}"
            )
        return ""
    return "" if one == other else f"{path}: with the guard {one!r}, without it {other!r}"


def outcome(program: Callable[[], Any]) -> tuple[str, Any, set[str]]:
    """What a program returned or raised, and the warnings that it gave."""
    torch.manual_seed(0)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            end, value = "returned", program()
        except Exception as error:
            # Without its traceback: that would keep the frames, and with them the tensors, alive.
            end, value = "raised", type(error)(*error.args) if type(error) in (RuntimeError, TypeError) else error
    return end, value, {f"{warning.category.__name__}: {warning.message}" for warning in caught}


def attempt(call: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a call returns, or the error that it raises, as a value to compare."""
    try:
        return call(*args, **kwargs)
    except Exception as error:
        return type(error), str(error)


class Ballast:
    """A live save, and a live alias of it: without either, the guard's patches step aside at once."""

    def __init__(self) -> None:
        self.leaf = torch.ones(3, requires_grad=True)
        self.output = self.leaf.sigmoid()
        self.alias = self.output.data


def assert_same(program: Callable[[], Any], guard: str = "strict") -> None:
    """Run a program without a guard, with one, and after it; fail where the outcomes differ."""
    end, value, said = outcome(program)
    expected = end, frozen(value)
    if end == "raised":
        raise value
    with GUARDS[guard]() as entered:
        ballast = Ballast()
        end, value, said_then = outcome(program)
        del ballast
    assert not difference((end, frozen(value)), expected)
    assert said_then <= said
    assert entered.violations == []
    end, value, said_then = outcome(program)
    assert not difference((end, frozen(value)), expected), "after the guard"
    assert said_then <= said


def transparent(program: Any = None, *, guards: Iterable[str] = tuple(GUARDS)) -> Any:
    """Turn a program into a test that it runs the same with the guard on as off."""
    if program is None:
        return functools.partial(transparent, guards=guards)

    @functools.wraps(program)
    def test(guard: str, **arguments: Any) -> None:
        assert_same(functools.partial(program, **arguments), guard)

    parameter = inspect.Parameter("guard", inspect.Parameter.KEYWORD_ONLY)
    signature = inspect.signature(program)
    del test.__wrapped__  # type: ignore[attr-defined]
    test.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[
            *(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in signature.parameters.values()),
            parameter,
        ]
    )
    return pytest.mark.parametrize("guard", guards)(test)


def guarded() -> bool:
    return bool(torchguard._policy.entered)


@pytest.mark.parametrize(
    "program",
    [
        lambda: torch.ones(2) + guarded(),
        lambda: [torch.zeros(1), guarded()],
        lambda: torch.zeros(1, requires_grad=guarded()),
        lambda: torch.full((1,), -0.0 if guarded() else 0.0),
        lambda: torch.zeros(2, 2).t() if guarded() else torch.zeros(2, 2),
        lambda: nn.Parameter(torch.zeros(1)) if guarded() else torch.zeros(1, requires_grad=True),
        lambda: torch.zeros(1).add_(0) if guarded() else torch.zeros(1),
        lambda: torch.zeros(1).reshape(2 if guarded() else 3),
        lambda: warnings.warn("guarded", stacklevel=1) if guarded() else None,
    ],
    ids=["value", "list", "requires_grad", "sign of zero", "stride", "type", "version", "error", "warning"],
)
def test_the_comparison_can_fail(program: Callable[[], Any]) -> None:
    with pytest.raises((AssertionError, RuntimeError)):
        assert_same(program)


# ---- x.data -------------------------------------------------------------------------------------------------------


@transparent
@pytest.mark.parametrize("kind", ["parameter", "leaf", "output", "view", "plain"])
def test_what_data_is(kind: str) -> Any:
    leaf = torch.randn(3, 4, requires_grad=True)
    x = {
        "parameter": lambda: nn.Parameter(leaf.detach()),
        "leaf": lambda: leaf,
        "output": lambda: leaf.exp(),
        "view": lambda: leaf[1:],
        "plain": lambda: torch.randn(3, 4),
    }[kind]()
    kept = x * x
    alias = x.data
    return [
        kept,
        alias,
        type(alias),
        alias is x.data,
        alias is x,
        alias._base is None,
        alias._is_view(),
        alias.grad_fn,
        alias.grad,
        alias.output_nr,
        alias.data_ptr() == x.data_ptr(),
        alias.storage_offset() == x.storage_offset(),
        alias.untyped_storage()._cdata == x.untyped_storage()._cdata,
        alias.is_set_to(x),
        vars(alias),
        bool((alias == x).all()),
        alias.data.data,
        alias._version,
        x._version,
    ]


@transparent
def test_versions_move_as_ever() -> Any:
    x = torch.randn(4)
    alias, detached = x.data, x.detach()
    x.add_(1)
    seen = [x._version, alias._version, detached._version]
    alias.mul_(2)
    alias[0] = 1
    seen += [x._version, alias._version, detached._version]
    x.data = torch.randn(4).add_(1)
    seen += [x._version, alias._version, detached._version, x.data._version]
    x[1:].zero_()
    x.data[1:].zero_()
    x += 1
    torch.relu_(x)
    F.relu(x, inplace=True)
    torch._foreach_add_([x, alias], 1)
    seen += [x._version, alias._version, detached._version]
    return seen


@transparent
def test_versions_of_saved_tensors_stay_where_they_are() -> Any:
    """The probe for shared counters bumps a counter, and must put it back."""
    leaf = torch.randn(4, requires_grad=True)
    out = leaf.exp()
    alias = out.data
    view = alias[:2]
    alias.mul_(1)  # changes no bytes
    view.add_(0)
    alias[[]] = 1
    return [out._version, leaf._version, alias._version, view._version, out, *torch.autograd.grad(out.sum(), leaf)]


@transparent
def test_attributes_of_data_are_its_own() -> Any:
    x = nn.Parameter(torch.randn(2))
    x.tag = "user"  # type: ignore[attr-defined]
    alias = x.data
    alias.other = 1  # type: ignore[attr-defined]
    return [vars(alias), vars(x), vars(x.data), hasattr(alias, "tag")]


@transparent
def test_weak_references_to_data() -> Any:
    x = torch.randn(2)
    alias = x.data
    held = weakref.ref(alias)
    table = WeakTensorKeyDictionary({alias: 1})
    before = held() is alias, table[alias], weakref.getweakrefs(alias)[0] is held
    del alias
    return [before, held() is None, len(table)]


@transparent
def test_a_parameter_over_data() -> Any:
    x = torch.randn(3, requires_grad=True)
    kept = x.exp()
    p = nn.Parameter(x.data)
    q = nn.Parameter(x.data, requires_grad=False)
    (p * p).sum().backward()
    return [p, q, type(p), p.data_ptr() == x.data_ptr(), p._version, kept, nn.Buffer(x.data)]


@transparent
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickling_data(protocol: int) -> Any:
    x = torch.randn(3, requires_grad=True)
    kept = x.exp()
    dumped = pickle.dumps(x.data, protocol)
    return [pickle.loads(dumped), pickle.loads(pickle.dumps(nn.Parameter(x.data), protocol)), kept]


@transparent
def test_copying_and_saving_data() -> Any:
    x = torch.randn(3, requires_grad=True)
    kept = x.exp()
    file = io.BytesIO()
    torch.save({"x": x.data, "again": x.data}, file)
    file.seek(0)
    loaded = torch.load(file)
    return [
        copy.copy(x.data),
        copy.deepcopy(x.data),
        copy.deepcopy([x.data, x.data]),
        copy.deepcopy(x),
        loaded,
        loaded["x"].data_ptr() == loaded["again"].data_ptr(),
        attempt(copy.deepcopy, kept),
    ]


@transparent
def test_what_data_refuses() -> Any:
    x = torch.randn(3, requires_grad=True)

    def set_data(value: Any) -> None:
        x.data = value

    def delete_data() -> None:
        del x.data

    return [
        attempt(set_data, 3),
        attempt(set_data, None),
        attempt(set_data, torch.ones(3, dtype=torch.int)),
        attempt(set_data, torch.ones(3, dtype=torch.cfloat)),
        attempt(set_data, torch.eye(2).to_sparse()),
        attempt(delete_data),
        attempt(torch.Tensor.data.__get__, 3),
        attempt(torch.Tensor.data.__set__, x, 3),
        attempt(setattr, x, "data", "no"),
        attempt(x.data.backward),
        x,
    ]


@transparent
def test_data_on_the_class() -> Any:
    x = torch.randn(3, requires_grad=True)
    kept = x.exp()
    descriptor = torch.Tensor.data
    descriptor.__set__(x, torch.ones(3))
    return [
        type(descriptor),
        descriptor is torch.Tensor.data,
        descriptor.__name__,
        descriptor.__doc__,
        descriptor.__get__ == torch.Tensor.data.__get__,
        hash(descriptor.__get__) == hash(torch.Tensor.data.__get__),
        descriptor.__get__(x),
        nn.Parameter.data is descriptor,
        type(torch.Tensor.real),
        torch.Tensor.real is torch.Tensor.real,
        x,
        torch.overrides.resolve_name(torch.Tensor.data.__get__),
        torch.overrides.is_tensor_method_or_property(torch.Tensor.data.__get__),
        kept.shape,
    ]


def test_data_on_the_class_is_the_very_descriptor() -> None:
    before = torch.Tensor.data, torch.Tensor.real, torch.Tensor.imag
    with torchguard.strict():
        assert torch.Tensor.data is before[0]
        assert torch.Tensor.real is before[1]
        assert torch.Tensor.imag is before[2]
    assert torch.Tensor.data is before[0]


@transparent
def test_parts_of_complex_numbers() -> Any:
    z = torch.randn(3, dtype=torch.cfloat)
    x = torch.randn(3)

    def set_part(tensor: torch.Tensor, name: str, value: Any) -> None:
        setattr(tensor, name, value)

    z.real = torch.ones(3)
    z.imag = z.real * 2
    w = torch.randn(3, dtype=torch.cfloat, requires_grad=True)
    square = w * w
    square.real = torch.zeros(3)
    square.abs().sum().backward()
    x.real = torch.ones(3)
    return [
        z,
        z._version,
        z.real._base is z,
        attempt(set_part, x, "imag", torch.ones(3)),
        attempt(set_part, z, "imag", "no"),
        attempt(set_part, w, "real", torch.ones(3)),
        attempt(lambda: x.imag),
        x,
        w,
        w.data.real,
    ]


@transparent
def test_swapping_tensors() -> Any:
    x, y = torch.randn(3), torch.randn(2)
    torch.utils.swap_tensors(x, y)
    p, q = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(2))
    torch.utils.swap_tensors(p, q)
    return [x, y, p, q]


@transparent
def test_swapping_an_alias() -> Any:
    x, y = torch.randn(3), torch.randn(2)
    alias = x.data
    torch.utils.swap_tensors(alias, y)
    return [alias, x, y]


@transparent
def test_swapping_what_was_assigned_to_data() -> Any:
    x, y, other = torch.randn(3), torch.randn(3), torch.randn(2)
    x.data = y
    torch.utils.swap_tensors(y, other)
    return [x, y, other]


@transparent
@pytest.mark.parametrize("swap", [False, True])
def test_converting_modules(swap: bool) -> Any:
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
        parameters = list(module.parameters())
        module(torch.randn(4, 3)).sum().backward()
        seen = []
        for convert in (module.double, module.half, module.float, lambda: module.to(torch.bfloat16)):
            convert()
            seen.append({name: value.clone() for name, value in module.state_dict().items()})
        return [
            seen,
            [a is b for a, b in zip(parameters, module.parameters(), strict=True)],
            list(module.parameters()),
        ]
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)


@transparent
@pytest.mark.parametrize("assign", [False, True])
def test_loading_a_state(assign: bool) -> Any:
    source, module = nn.Linear(3, 2), nn.Linear(3, 2)
    out = module(torch.randn(4, 3))
    out.sum().backward()
    keys = module.load_state_dict(source.state_dict(), assign=assign)
    wrong = attempt(module.load_state_dict, {"weight": torch.ones(1)})
    return [list(module.parameters()), str(keys), wrong, [p._version for p in module.parameters()]]


@transparent
def test_sharing_memory() -> Any:
    x = torch.randn(3)
    module = nn.Linear(2, 2)
    module.share_memory()
    return [x.share_memory_(), x.is_shared(), x.data.is_shared(), list(module.parameters())]


# ---- the functions ------------------------------------------------------------------------------------------------

WRITERS: dict[str, Callable[[], Any]] = {
    "torch.relu_": lambda: torch.relu_,
    "torch.Tensor.add_": lambda: torch.Tensor.add_,
    "torch.Tensor.__iadd__": lambda: torch.Tensor.__iadd__,
    "torch.Tensor.__ipow__": lambda: torch.Tensor.__ipow__,
    "torch.Tensor.__setitem__": lambda: torch.Tensor.__setitem__,
    "torch.Tensor.apply_": lambda: torch.Tensor.apply_,
    "torch.Tensor.detach_": lambda: torch.Tensor.detach_,
    "torch.detach_": lambda: torch.detach_,
    "torch.Tensor.relu_": lambda: torch.Tensor.relu_,
    "torch.Tensor.index_put_": lambda: torch.Tensor.index_put_,
    "F.relu_": lambda: F.relu_,
    "F.elu_": lambda: F.elu_,
    "F.hardtanh_": lambda: F.hardtanh_,
    "F.threshold_": lambda: F.threshold_,
    "F.leaky_relu_": lambda: F.leaky_relu_,
    "F.celu_": lambda: F.celu_,
    "nn.init.normal_": lambda: nn.init.normal_,
    "torch._C._nn.relu6_": lambda: torch._C._nn.relu6_,
    "torch._VF.dropout_": lambda: torch._VF.dropout_,  # type: ignore[attr-defined]
    "torch._foreach_add_": lambda: torch._foreach_add_,
    "torch._fused_sgd_": lambda: torch._fused_sgd_,
    "nn.Parameter.mul_": lambda: nn.Parameter.mul_,
}
BEFORE = {name: get() for name, get in WRITERS.items()}
_TABLE = {function: name for name, function in BEFORE.items()}
_SET = set(BEFORE.values())


@pytest.mark.parametrize("name", WRITERS)
def test_functions_are_equal_to_themselves(name: str) -> None:
    before = BEFORE[name]
    with torchguard.strict():
        now = WRITERS[name]()
        assert now == before
        assert before == now
        assert not now != before
        assert not before != now
        assert hash(now) == hash(before)
        assert now in _SET
        assert _TABLE[now] == _TABLE[before]
        inside, inside_set = {now: 1}, {now}
        assert inside[before] == 1
        assert before in inside_set
        assert len({now, before}) == 1
    assert WRITERS[name]() is before
    assert inside[before] == 1
    assert before in inside_set
    assert now == before
    assert before == now


@transparent
@pytest.mark.parametrize("name", WRITERS)
def test_functions_are_the_same_object_each_time(name: str) -> Any:
    return WRITERS[name]() is WRITERS[name]()


@transparent
@pytest.mark.parametrize("name", WRITERS)
def test_what_functions_say_of_themselves(name: str) -> Any:
    function = WRITERS[name]()
    names = ["__name__", "__qualname__", "__module__", "__doc__", "__text_signature__", "__objclass__"]
    checks = [inspect.isroutine, inspect.isbuiltin, inspect.isfunction, callable]
    return [
        [getattr(function, attribute, "absent") for attribute in names],
        [check(function) for check in checks],
        str(attempt(inspect.signature, function)),
        inspect.getdoc(function),
    ]


@transparent
@pytest.mark.parametrize("name", WRITERS)
def test_tables_of_torch_overrides(name: str) -> Any:
    function = WRITERS[name]()
    return [
        torch.overrides.resolve_name(function),
        torch.overrides.is_tensor_method_or_property(function),
        function in torch.overrides.get_testing_overrides(),
        function in torch.overrides.get_ignored_functions(),
        any(function in functions for functions in torch.overrides.get_overridable_functions().values()),
    ]


_CACHED = ("get_overridable_functions", "get_testing_overrides", "get_ignored_functions")


def _tables() -> list[Any]:
    overridable = torch.overrides.get_overridable_functions()
    return [
        {str(key): set(functions) for key, functions in overridable.items()},
        {function: inspect.signature(dummy) for function, dummy in torch.overrides.get_testing_overrides().items()},
        # Lightning puts a function of its own in the place of torch.compile, once it has been imported by another test.
        {one for one in torch.overrides.get_ignored_functions() if getattr(one, "__name__", "") != "compile"},
    ]


def _forget_tables() -> None:
    for function in [*(getattr(torch.overrides, name) for name in _CACHED), *vars(torch.overrides).values()]:
        if hasattr(function, "cache_clear"):
            function.cache_clear()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("guard", GUARDS)
def test_tables_of_torch_overrides_made_under_the_guard(guard: str) -> None:
    _forget_tables()
    before = _tables()
    resolved = torch.overrides.resolve_name(torch.relu_)
    try:
        _forget_tables()
        with GUARDS[guard]():
            ballast = Ballast()
            inside = _tables()
            assert inside == before
            assert torch.overrides.resolve_name(torch.Tensor.add_) == "torch.Tensor.add_"
            del ballast
        assert _tables() == before
        assert torch.overrides.is_tensor_method_or_property(torch.Tensor.add_)
        assert torch.Tensor.add_ in torch.overrides.get_testing_overrides()
        assert torch.overrides.resolve_name(torch.relu_) == resolved
    finally:
        _forget_tables()


@transparent
def test_what_is_there() -> Any:
    return [dir(torch.Tensor), dir(torch.Tensor()), dir(torch), dir(F), hasattr(torch.Tensor, "sigmoid__")]


def test_what_was_fetched_under_the_guard_works_after_it() -> None:
    x = torch.ones(2)
    with torchguard.strict():
        bound, unbound, function, python = x.add_, torch.Tensor.add_, torch.relu_, F.hardtanh_
        leaf = torch.ones(2, requires_grad=True)
        kept = leaf.exp()
        alias = kept.data
    bound(1)
    assert x.tolist() == [2, 2]
    unbound(x, -3)
    assert x.tolist() == [-1, -1]
    function(x)
    assert x.tolist() == [0, 0]
    python(x.add_(5))
    assert x.tolist() == [1, 1]
    unbound(alias, 1)  # the guard is gone: nothing is judged, not even what it would have refused
    assert bound == x.add_
    assert unbound == torch.Tensor.add_
    assert bound.__self__ is x


@transparent
def test_ways_to_call_a_writer() -> Any:
    x = torch.randn(4)
    y = x.add_(1)
    z = torch.Tensor.add_(x, 1)
    w = torch.Tensor.add_(x, other=torch.ones(4), alpha=2)
    v = torch.relu_(input=x)
    u = operator.iadd(x, 1)
    operator.setitem(x, 0, 3.0)
    t = operator.methodcaller("mul_", 2)(x)
    s = functools.partial(torch.Tensor.sub_, x)(1)
    r = list(map(torch.relu_, [x]))[0]
    q = functools.partialmethod(torch.Tensor.neg_).__get__(x, torch.Tensor)()
    p = getattr(x, "exp_")()  # noqa: B009
    o = torch.Tensor.__dict__.get("add_", torch._C.TensorBase.add_).__get__(x)(1)
    n = super(torch.Tensor, x).sub_(1)
    m = F.relu_(x)
    return [x] + [other is x for other in (y, z, w, v, u, t, s, r, q, p, o, n, m)]


@transparent
def test_a_bound_writer() -> Any:
    x = torch.ones(2)
    method = x.add_
    return [
        method.__self__ is x,
        method.__name__,
        method.__qualname__,
        method == x.add_,
        method == torch.ones(2).add_,
        hash(method) == hash(x.add_),
        inspect.isbuiltin(method),
        inspect.isroutine(method),
        isinstance(method, types.BuiltinMethodType),
        method.__module__,
        method.__doc__ == torch.ones(2).add_.__doc__,
        repr(method).split(" at ")[0],
        sorted(dir(method)),
        type(attempt(inspect.signature, method)),
        hasattr(method, "no_such"),
        method != x.add_,
        {method: 1}.get(x.add_),
        functools.partial(method, 1)() is x,
        copy.copy(method)(1) is x,
        pickle.loads(pickle.dumps(method))(1),
        copy.deepcopy(method)(1),
        x,
    ]


@transparent
@pytest.mark.parametrize(
    "call",
    [
        lambda x: torch.Tensor.add_(),
        lambda x: torch.Tensor.add_(3, x),
        lambda x: torch.Tensor.add_(self=x, other=1),
        lambda x: torch.Tensor.zero_(x, 1),
        lambda x: x.add_(),
        lambda x: x.add_("no"),
        lambda x: x.add_(1, 2, 3),
        lambda x: x.add_(torch.ones(3, 5)),
        lambda x: x.add_(torch.ones(2, dtype=torch.cfloat)),
        lambda x: x.no_such_(1),
        lambda x: torch.relu_(),
        lambda x: torch.relu_("no"),
        lambda x: torch.relu_(x, nothing=1),
        lambda x: F.hardtanh_(),
        lambda x: F.elu_("no"),
        lambda x: torch._foreach_add_([x], "no"),
        lambda x: torch._foreach_add_([], 1),
        lambda x: torch._foreach_add_(x, 1),
        lambda x: operator.setitem(x, 9, 1),
        lambda x: operator.setitem(x, "no", 1),
        lambda x: operator.setitem(x, 0, "no"),
        lambda x: operator.setitem(x, slice(0, 2), torch.ones(7)),
        lambda x: operator.iadd(x, "no"),
        lambda x: operator.imatmul(x, x),
        lambda x: operator.ipow(x, None),
        lambda x: x.index_put_((torch.tensor([7]),), torch.tensor(1.0)),
        lambda x: x.masked_fill_(torch.tensor([True]), "no"),
        lambda x: x.scatter_(0, torch.tensor([9]), 1.0),
        lambda x: x.expand(3, 2).add_(1),
        lambda x: x.apply_(3),
        lambda x: x.map_(x, lambda a, b: "no"),
        lambda x: x.data.apply_(lambda a: 1 / 0),
        lambda x: x.int().add_(1.5),
        lambda x: x.requires_grad_().add_(1),
        lambda x: x.requires_grad_().zero_(),
        lambda x: torch.relu_(x.requires_grad_()),
        lambda x: F.relu(x.requires_grad_(), inplace=True),
        lambda x: operator.setitem(x.requires_grad_(), 0, 1),
        lambda x: operator.iadd(x.requires_grad_()[0:1], 1),
        lambda x: x.requires_grad_().detach()[0:1].requires_grad_().detach_(),
        lambda x: (x.requires_grad_() * 1)[0:1].detach_(),
        lambda x: x.requires_grad_().unbind()[0].add_(1),
    ],
)
def test_calls_that_torch_refuses(call: Callable[[torch.Tensor], Any]) -> Any:
    """Each of these is refused by PyTorch (a few are not), in PyTorch's own words."""
    x = torch.ones(2)
    keep = torch.ones(2, requires_grad=True).exp()
    result = attempt(call, x)
    return [result if result is not x else "itself", x, keep]


@transparent
def test_a_call_that_fails_is_made_once() -> Any:
    calls: list[float] = []

    def fails(value: float, other: float = 0.0) -> float:
        calls.append(value)
        raise ValueError("the user's own error")

    x, leaf = torch.arange(3.0), torch.ones(3, requires_grad=True)
    kept = leaf.exp()
    results = [attempt(x.apply_, fails), attempt(x.map_, x, fails), attempt(x.data.apply_, fails)]
    with torch.inference_mode():
        inside = torch.ones(3)
    results += [attempt(lambda: inside.add_(1)), attempt(lambda: torch.relu_(inside.neg())), inside]
    return [results, calls, x, kept]


def test_a_refused_call_shows_no_more_than_torch_would() -> None:
    """The writer that fails leaves no wrapper's frame where a traceback's reader looks: at its end is the user's line."""
    with torchguard.strict():
        ballast = Ballast()
        with pytest.raises(RuntimeError) as caught:
            torch.ones(2).add_(torch.ones(3))
        assert ballast.alias is not None
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


# ---- modules that hold functions ----------------------------------------------------------------------------------


class Holder(nn.Module):
    """A module with writers among its attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.relu = torch.relu_
        self.add = torch.Tensor.add_
        self.relu_of_functional = F.relu_
        self.hardtanh = F.hardtanh_
        self.elu = F.elu_
        self.relu6 = torch._C._nn.relu6_
        self.leaky = torch._C._nn.leaky_relu_
        self.celu = torch.celu_
        self.imul = torch.Tensor.__imul__
        self.setitem = torch.Tensor.__setitem__
        self.detach = torch.Tensor.detach_
        self.foreach = torch._foreach_add_
        self.dropout = torch._VF.dropout_  # type: ignore[attr-defined]
        self.init = nn.init.zeros_
        self.several = [torch.sigmoid_, torch.Tensor.tanh_]
        self.by_name = {"exp": torch.exp_}
        self.partial = functools.partial(torch.Tensor.clamp_, min=0.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu6(self.leaky(self.elu(self.relu(self.linear(x)))))
        x = self.hardtanh(self.relu_of_functional(self.celu(self.partial(x))))
        return self.by_name["exp"](self.several[1](self.several[0](self.imul(self.add(x, 1), 2))))


def _deepcopied(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module)


def _copied(module: nn.Module) -> nn.Module:
    return copy.copy(module)


def _pickled(module: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(module))


def _saved(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = [_deepcopied, _copied, _pickled, _saved]


def _agree(one: nn.Module, other: nn.Module) -> None:
    x = torch.randn(3, 2)
    assert torch.equal(one(x.clone()), other(x.clone()))


@pytest.mark.parametrize("duplicate", COPIES)
@pytest.mark.parametrize("made", ["before", "inside"])
@pytest.mark.parametrize("copied", ["inside", "after"])
def test_a_module_that_holds_writers(duplicate: Callable[[nn.Module], nn.Module], made: str, copied: str) -> None:
    module = Holder()
    with torchguard.strict():
        ballast = Ballast()
        if made == "inside":
            module = Holder()
        if copied == "inside":
            other = duplicate(module)
            _agree(module, other)
        del ballast
    if copied == "after":
        other = duplicate(module)
    _agree(module, other)
    _agree(duplicate(other), module)
    assert other.relu == torch.relu_
    assert other.add == torch.Tensor.add_


@pytest.mark.parametrize("guard_on", [False, True])
@pytest.mark.parametrize("name", WRITERS)
def test_copying_one_writer_is_as_possible_as_ever(name: str, guard_on: bool) -> None:
    before = BEFORE[name]
    with torchguard.strict():
        inside = WRITERS[name]()
        for way in (copy.copy, copy.deepcopy, lambda f: pickle.loads(pickle.dumps(f))):
            try:
                expected = way(before)
            except Exception as error:
                if guard_on and "not the same object" not in str(error):
                    with pytest.raises(type(error)):
                        way(inside)
                continue
            if guard_on:
                assert way(inside) == expected
    for way in (copy.copy, copy.deepcopy, lambda f: pickle.loads(pickle.dumps(f))):
        expected = attempt(way, before)
        assert attempt(way, inside) == expected, f"after the guard, {way}"


def test_what_was_pickled_under_the_guard_needs_no_torchguard() -> None:
    with torchguard.strict():
        dumped = pickle.dumps([torch.relu_, torch.Tensor.add_, F.relu_, Holder(), torch.ones(2).data])
        file = io.BytesIO()
        torch.save(Holder(), file)
    assert b"torchguard" not in dumped
    assert b"wrapt" not in dumped
    assert b"torchguard" not in file.getvalue()
    assert b"wrapt" not in file.getvalue()


@transparent
def test_inplace_modules_and_initialisers() -> Any:
    model = nn.Sequential(
        nn.Linear(4, 4), nn.ReLU(True), nn.Linear(4, 4), nn.ELU(inplace=True), nn.Hardtanh(inplace=True),
        nn.LeakyReLU(inplace=True), nn.Dropout(0.5, inplace=True), nn.SiLU(inplace=True), nn.Threshold(0.1, 0, True),
        nn.CELU(inplace=True), nn.SELU(inplace=True), nn.Hardswish(inplace=True), nn.RReLU(inplace=True),
        nn.ReLU6(True), nn.Mish(inplace=True), nn.AlphaDropout(0.1, inplace=True),
    )  # fmt: skip
    for p in model.parameters():
        nn.init.normal_(p)
        nn.init.uniform_(p, -1, 1)
        nn.init.constant_(p, 0.5)
        nn.init.trunc_normal_(p)
        if p.dim() > 1:
            nn.init.orthogonal_(p)
            nn.init.kaiming_normal_(p)
            nn.init.eye_(p)
    out = attempt(lambda: model(torch.randn(8, 4)))
    result = attempt(lambda: out.sum().backward()) if isinstance(out, torch.Tensor) else None
    return [out, result, list(model.parameters())]


def test_the_guard_makes_no_cycles_of_its_own() -> None:
    gc.collect()
    gc.disable()
    try:
        with torchguard.strict():
            x = torch.ones(3, requires_grad=True)
            held = [weakref.ref(x)]
            y = x.exp()
            held += [weakref.ref(y)]
            alias = y.data
            held.append(weakref.ref(alias))
            del x, y, alias
            assert [item() for item in held] == [None] * 3
    finally:
        gc.enable()
