"""Does PyTorch's own refusal come through the guard word for word?

Save hooks switch PyTorch's version check off, so the guard makes it. Each program here is refused by plain PyTorch; under the
guard the error must have the same type and the same text.
"""

from __future__ import annotations

import copy
import io
import pickle
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_transparency import GUARDS
from torch import nn
from torch.utils.checkpoint import checkpoint

import torchguard
from torchguard import _refusal

PROGRAMS: dict[str, Callable[[], Any]] = {}


def refused(program: Callable[[], Any]) -> Callable[[], Any]:
    """Enter a program that plain PyTorch refuses."""
    PROGRAMS[program.__name__] = program
    return program


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.rand(shape or (3,), dtype=dtype).requires_grad_()


def back(out: torch.Tensor, **arguments: Any) -> None:
    (out.abs() if out.is_complex() else out).sum().backward(**arguments)


# ---- what was saved -----------------------------------------------------------------------------------------------


@refused
def a_leaf() -> None:
    w = leaf()
    out = w * w
    with torch.no_grad():
        w.add_(1)
    back(out)


@refused
def a_parameter() -> None:
    w = nn.Parameter(torch.rand(3))
    out = w.sin()
    with torch.no_grad():
        w.copy_(torch.ones(3))
    back(out)


@refused
def a_leaf_by_optimiser() -> None:
    layers = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    loss = layers(torch.rand(2, 3)).sum()
    loss.backward(retain_graph=True)
    torch.optim.SGD(layers.parameters(), lr=0.1).step()
    loss.backward()


@refused
def an_input_that_is_no_leaf() -> None:
    h = leaf() * 2
    out = h * h
    h.add_(1)
    back(out)


@refused
def an_input_many_times_over() -> None:
    h = leaf() * 2
    out = h.sin()
    for _ in range(5):
        h.add_(1)
    back(out)


@refused
def an_output() -> None:
    out = leaf().sigmoid()
    out.mul_(2)
    back(out)


@refused
def an_output_by_detached_alias() -> None:
    out = leaf().sigmoid()
    out.detach().zero_()
    back(out)


@refused
def an_output_without_grad() -> None:
    out = leaf().exp()
    with torch.no_grad():
        out.zero_()
    back(out)


@refused
def an_output_changed_and_used_on() -> None:
    out = leaf().tanh()
    out += 1
    back(out.exp())


@refused
def the_first_of_several_outputs() -> None:
    values, indices = leaf(3, 4).max(dim=1)
    indices.add_(0)
    back(values)


@refused
def the_second_of_several_outputs() -> None:
    u, s, v = torch.linalg.svd(leaf(3, 3) + torch.eye(3), full_matrices=False)
    v.mul_(2)
    back(u.abs() + s)


@refused
def the_third_of_several_outputs() -> None:
    u, s, _ = torch.linalg.svd(leaf(3, 3) + torch.eye(3), full_matrices=False)
    s.detach().mul_(2)
    back(u.abs())


@refused
def indices_of_a_sort() -> None:
    values, indices = torch.sort(leaf(5))
    indices.zero_()
    back(values)


@refused
def indices_of_a_topk() -> None:
    values, indices = torch.topk(leaf(5), 2)
    indices[0] = 1
    back(values)


@refused
def a_qr() -> None:
    q, r = torch.linalg.qr(leaf(3, 3))
    q.neg_()
    back(r)


@refused
def an_lstm() -> None:
    cell = nn.LSTM(3, 3)
    out, (h, _) = cell(leaf(2, 1, 3))
    with torch.no_grad():
        cell.weight_hh_l0.zero_()
    back(out + h)


@refused
def a_view_of_a_leaf() -> None:
    w = leaf(4)
    out = w[1:] * w[1:]
    with torch.no_grad():
        w[0] = 1
    back(out)


@refused
def a_view_of_an_output() -> None:
    h = leaf(4).exp()
    out = h[:2] * h[2:]
    h.mul_(2)
    back(out)


@refused
def in_place_on_a_view() -> None:
    h = leaf(4) * 1
    out = h.sin()
    h[2:].zero_()
    back(out)


@refused
def in_place_on_a_view_that_was_saved() -> None:
    h = leaf(4) * 1
    v = h[1:]
    out = v.sin()
    v.mul_(2)
    back(out)


@refused
def in_place_on_a_view_of_a_view() -> None:
    h = leaf(4, 4) * 1
    out = h.t()[1:].sin()
    h.view(-1)[::2].add_(1)
    back(out)


@refused
def in_place_twice() -> None:
    h = leaf(4) * 1
    h.exp_()
    h.sigmoid_()
    h.add_(1)
    back(h)


@refused
def another_row_of_a_buffer() -> None:
    buffer = torch.zeros(4, 3)
    w = leaf()
    out = buffer[0] * w
    buffer[1] = 5
    back(out)


@refused
def a_buffer_that_requires_no_grad() -> None:
    mask = torch.ones(3)
    out = leaf() * mask
    mask.zero_()
    back(out)


@refused
def a_buffer_through_a_module() -> None:
    norm = nn.BatchNorm1d(3).eval()
    out = norm(leaf(4, 3))
    norm.running_mean.add_(1)
    back(out)


@refused
def a_plain_input() -> None:
    layer = nn.Linear(3, 2)
    x = torch.rand(4, 3)
    out = layer(x)
    x.normal_()
    back(out)


@refused
def an_index() -> None:
    index = torch.tensor([0, 2])
    out = leaf()[index]
    index.add_(0)
    back(out)


@refused
def an_embedding() -> None:
    index = torch.tensor([0, 2])
    out = F.embedding(index, leaf(3, 2))
    index[0] = 1
    back(out)


@refused
def a_target() -> None:
    target = torch.tensor([0, 1])
    loss = F.cross_entropy(leaf(2, 3), target)
    target.fill_(2)
    loss.backward()


@refused
def a_boolean_mask() -> None:
    mask = torch.tensor([True, False, True])
    out = leaf().masked_fill(mask, 0)
    mask.logical_not_()
    back(out)


@refused
def a_where() -> None:
    condition = torch.tensor([True, False, True])
    out = torch.where(condition, leaf(), leaf())
    condition.zero_()
    back(out)


def _of_dtype(dtype: torch.dtype) -> None:
    def as_input() -> None:
        w = leaf(3, 2, dtype=dtype)
        out = w * w
        with torch.no_grad():
            w.mul_(2)
        back(out)

    def as_output() -> None:
        out = leaf(3, 2, dtype=dtype).exp()
        out.detach().mul_(2)
        back(out)

    name = str(dtype).removeprefix("torch.")
    PROGRAMS[f"a_{name}_input"] = as_input
    PROGRAMS[f"a_{name}_output"] = as_output


for _dtype in (torch.half, torch.bfloat16, torch.double, torch.cfloat, torch.cdouble):
    _of_dtype(_dtype)


@refused
def a_scalar() -> None:
    w = leaf()[0] * 1
    out = w * w
    w.add_(1)
    out.backward()


@refused
def an_empty_tensor() -> None:
    h = leaf(0) * 1
    out = h * h
    h.add_(1)
    back(out)


@refused
def an_empty_output() -> None:
    out = leaf(2, 0).exp()
    out.add_(1)
    back(out)


@refused
def a_meta_tensor() -> None:
    h = torch.ones(3, device="meta", requires_grad=True) * 1
    out = h * h
    h.add_(1)
    back(out)


@refused
def a_sparse_tensor() -> None:
    s = torch.eye(3).to_sparse()
    out = torch.sparse.mm(s, leaf(3, 2))
    s.mul_(2)
    back(out)


@refused
def a_conjugate() -> None:
    z = leaf(3, dtype=torch.cfloat)
    c = z.conj()
    out = c * c
    with torch.no_grad():
        z.mul_(2)
    back(out)


@refused
def the_real_part() -> None:
    z = leaf(3, dtype=torch.cfloat) * 1
    out = z * z
    z.real = torch.zeros(3)
    back(out)


@refused
def a_subclass() -> None:
    class Plain(torch.Tensor):
        pass

    h = leaf().as_subclass(Plain) * 1
    out = h * h
    h.add_(1)
    back(out)


@refused
def an_output_of_a_subclass() -> None:
    class Plain(torch.Tensor):
        pass

    out = leaf().as_subclass(Plain).exp()
    out.add_(1)
    back(out)


@refused
def of_several_saves_the_first_that_is_read() -> None:
    a, b = leaf() * 1, leaf(2) * 1
    out = a.sin().sum() + b.exp().sum()
    a.add_(1)
    b.add_(1)
    back(out)


@refused
def a_write_under_inference_mode() -> None:
    h = leaf() * 1
    out = h * h
    with torch.inference_mode():
        h.mul_(2)
    back(out)


@refused
def a_write_by_foreach() -> None:
    h = leaf() * 1
    out = h * h
    torch._foreach_mul_([h], 2)
    back(out)


@refused
def a_write_by_out() -> None:
    h = torch.rand(3)
    out = leaf() * h
    torch.add(h, 1, out=h)
    back(out)


@refused
def a_write_by_operator() -> None:
    h = torch.rand(3)
    out = leaf() * h
    torch.ops.aten.add_(h, 1)
    back(out)


@refused
def a_write_by_increment_version() -> None:
    h = torch.rand(3)
    out = leaf() * h
    torch.autograd.graph.increment_version(h)
    back(out)


@refused
def a_write_through_an_alias_of_data() -> None:
    """Of two writes the tracked one is PyTorch's to refuse, and the silent one comes too late to matter."""
    h = torch.rand(3)
    out = leaf() * h
    h.mul_(2)
    back(out)


@refused
def a_resize() -> None:
    h = torch.rand(3)
    out = leaf() * h
    h.resize_(3).add_(1)
    back(out)


@refused
def a_transposition_in_place() -> None:
    h = torch.rand(3, 3)
    out = leaf(3, 3) * h
    h.t_()
    back(out)


@refused
def a_squeeze_in_place() -> None:
    h = leaf(1, 3) * 1
    out = h * h
    h.squeeze_(0)
    back(out)


@refused
def setting_another_storage() -> None:
    h = torch.rand(3)
    out = leaf() * h
    h.set_(torch.ones(3))
    back(out)


# ---- names of operations ------------------------------------------------------------------------------------------


def _named(name: str, operation: Callable[[torch.Tensor], torch.Tensor]) -> None:
    def program() -> None:
        out = operation(leaf(4, 4) * 1)
        with torch.no_grad():
            out.add_(1)
        back(out)

    PROGRAMS[f"output_of_{name}"] = program


for _name, _operation in {
    "exp": torch.exp,
    "sqrt": torch.sqrt,
    "relu": torch.relu,
    "relu_": torch.relu_,
    "elu": F.elu,
    "elu_": F.elu_,
    "leaky_relu_": F.leaky_relu_,
    "celu_": F.celu_,
    "selu_": F.selu_,
    "threshold_": lambda x: F.threshold_(x, 0.1, 0.0),
    "rsqrt": torch.rsqrt,
    "reciprocal": torch.reciprocal,
    "tanh": torch.tanh,
    "softmax": lambda x: x.softmax(1),
    "log_softmax": lambda x: x.log_softmax(1),
    "cumprod": lambda x: x.cumprod(0),
    "logsumexp": lambda x: x.logsumexp(1),
    "prod": lambda x: x.prod(1),
    "norm": lambda x: x.norm(dim=1),
    "linalg_vector_norm": lambda x: torch.linalg.vector_norm(x, dim=1),
    "inverse": lambda x: torch.linalg.inv(x + torch.eye(4)),
    "matrix_exp": torch.linalg.matrix_exp,
    "cholesky": lambda x: torch.linalg.cholesky(x @ x.t() + torch.eye(4)),
    "div": lambda x: 1 / x,
    "pow_scalar": lambda x: 2**x,
    "pow_tensor": lambda x: x**x,
    "amax": lambda x: x.amax(1),
    "logcumsumexp": lambda x: x.logcumsumexp(0),
    "nanmedian": lambda x: x.nanmedian(1)[0],
    "sdpa": lambda x: F.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None]),
    "solve": lambda x: torch.linalg.solve(x + torch.eye(4), x),
    "glu": lambda x: torch.special.expit(x),
    "hardtanh_": F.hardtanh_,
    "renorm": lambda x: x.sigmoid().view(2, 8),
    "exp of a view": lambda x: x[1:].exp(),
}.items():
    _named(_name, _operation)
#: Not refused, as their backward does not read their output; ``test_each_program_is_refused`` would say so.
for _name in ("norm", "matrix_exp", "pow_tensor", "nanmedian", "hardtanh_", "div", "elu", "threshold_"):
    del PROGRAMS[f"output_of_{_name}"]


# ---- custom functions ---------------------------------------------------------------------------------------------


class SavesInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * 2

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return grad * x


class SavesOutputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> Any:
        one, two = x.exp(), x.sin()
        ctx.save_for_backward(one, two)
        return one, two

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor, other: torch.Tensor) -> Any:
        one, two = ctx.saved_tensors
        return grad * one + other * two


class SavesIntermediate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, seen: list[torch.Tensor]) -> torch.Tensor:
        middle = x.exp()
        ctx.save_for_backward(middle)
        seen.append(middle)
        return middle * 2

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        return grad * ctx.saved_tensors[0], None


class Dirty(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        x.exp_()
        ctx.mark_dirty(x)
        ctx.save_for_backward(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * ctx.saved_tensors[0]


class InnerGraph(torch.autograd.Function):
    """Its forward records a graph of its own, which upsets the sequence numbers."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            inner = x.detach().requires_grad_()
            out = inner.sin().exp()
        out = out.detach() * 1
        ctx.save_for_backward(x, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        x, out = ctx.saved_tensors
        return grad * x * out


@refused
def input_of_a_function() -> None:
    h = leaf() * 1
    out = SavesInput.apply(h)
    h.add_(1)
    back(out)


@refused
def leaf_of_a_function() -> None:
    w = leaf()
    out = SavesInput.apply(w)
    with torch.no_grad():
        w.add_(1)
    back(out)


@refused
def first_output_of_a_function() -> None:
    one, two = SavesOutputs.apply(leaf())
    one.detach().add_(1)
    back(one + two)


@refused
def second_output_of_a_function() -> None:
    one, two = SavesOutputs.apply(leaf())
    two.detach().add_(1)
    back(one + two)


@refused
def intermediate_of_a_function() -> None:
    seen: list[torch.Tensor] = []
    out = SavesIntermediate.apply(leaf(), seen)
    seen[0].add_(1)
    back(out)


@refused
def dirty_input_of_a_function() -> None:
    h = Dirty.apply(leaf() * 1)
    h.add_(1)
    back(h)


@refused
def output_of_a_function_with_a_graph_inside() -> None:
    out = InnerGraph.apply(leaf() * 1)
    out.detach().add_(1)
    back(out)


@refused
def input_of_a_function_with_a_graph_inside() -> None:
    h = leaf() * 1
    out = InnerGraph.apply(h)
    h.add_(1)
    back(out)


@refused
def output_of_one_function_that_another_saves() -> None:
    h = SavesOutputs.apply(leaf())[0]
    out = SavesInput.apply(h)
    h.detach().add_(1)
    back(out)


@refused
def saved_tensors_read_directly() -> None:
    h = leaf() * 1
    out = SavesInput.apply(h)
    h.add_(1)
    out.grad_fn.saved_tensors


@refused
def a_saved_attribute_of_a_node() -> None:
    h = leaf() * 1
    out = h * h
    h.add_(1)
    out.grad_fn._saved_self


@refused
def a_saved_result_of_a_node() -> None:
    out = leaf().exp()
    out.detach().add_(1)
    out.grad_fn._saved_result


@refused
def a_list_of_saved_attributes() -> None:
    index = torch.tensor([0, 1])
    out = leaf()[index]
    index.add_(1)
    out.grad_fn._saved_indices


@refused
def saved_tensors_after_release() -> None:
    out = SavesInput.apply(leaf())
    node = out.grad_fn
    back(out)
    node.saved_tensors


@refused
def a_saved_attribute_after_release() -> None:
    out = leaf().exp()
    node = out.grad_fn
    back(out)
    node._saved_result


# ---- detached in place --------------------------------------------------------------------------------------------


@refused
def detached_in_place() -> None:
    h = leaf() * 1
    out = (h * h).sum()
    h.detach_()
    out.backward()


@refused
def detached_in_place_by_function() -> None:
    h = leaf() * 1
    out = (h * h).sum()
    torch.detach_(h)
    out.backward()


@refused
def detached_in_place_and_written() -> None:
    h = leaf() * 1
    out = h * h
    h.detach_()
    h.add_(1)
    back(out)


@refused
def written_and_detached_in_place() -> None:
    h = leaf() * 1
    out = h.sin()
    h.add_(1)
    h.detach_()
    back(out)


# ---- the second time ----------------------------------------------------------------------------------------------


@refused
def backward_twice() -> None:
    out = leaf().exp().sum()
    out.backward()
    out.backward()


@refused
def backward_twice_through_an_input() -> None:
    w = leaf()
    out = (w * w).sum()
    out.backward()
    out.backward()


@refused
def backward_twice_through_a_function() -> None:
    out = SavesInput.apply(leaf()).sum()
    out.backward()
    out.backward()


@refused
def backward_twice_through_a_shared_part() -> None:
    h = leaf().exp()
    h.sum().backward()
    (h * 2).sum().backward()


@refused
def grad_twice() -> None:
    w = leaf()
    out = w.sin().sum()
    torch.autograd.grad(out, w)
    torch.autograd.grad(out, w)


@refused
def a_loop_that_carries_its_state() -> None:
    cell = nn.RNNCell(3, 3)
    h = torch.zeros(1, 3)
    for _ in range(2):
        h = cell(torch.rand(1, 3), h)
        h.sum().backward()


@refused
def write_after_the_first_of_two() -> None:
    h = leaf() * 1
    out = h.sin().sum()
    out.backward(retain_graph=True)
    h.add_(1)
    out.backward()


@refused
def write_after_the_second_of_three() -> None:
    out = leaf().exp()
    for _ in range(2):
        back(out, retain_graph=True)
    out.detach().add_(1)
    back(out)


@refused
def double_backward() -> None:
    w = leaf()
    out = (w**3).sum()
    (grad,) = torch.autograd.grad(out, w, create_graph=True)
    with torch.no_grad():
        w.add_(1)
    back(grad)


@refused
def double_backward_through_the_first_graph() -> None:
    h = leaf().exp()
    out = h.sin().sum()
    (grad,) = torch.autograd.grad(out, h, create_graph=True)
    h.detach().add_(1)
    back(grad)


@refused
def triple_backward() -> None:
    w = leaf()
    one = torch.autograd.grad((w**5).sum(), w, create_graph=True)[0]
    two = torch.autograd.grad(one.sum(), w, create_graph=True)[0]
    with torch.no_grad():
        w.mul_(2)
    back(two)


@refused
def double_backward_without_create_graph() -> None:
    w = leaf()
    (grad,) = torch.autograd.grad((w**3).sum(), w)
    back(grad)


@refused
def double_backward_of_an_output() -> None:
    w = leaf()
    out = w.exp()
    (grad,) = torch.autograd.grad(out.sum(), w, create_graph=True)
    out.detach().mul_(2)
    back(grad)


@refused
def backward_of_a_tensor_without_graph() -> None:
    torch.rand(3).sum().backward()


@refused
def backward_of_many_elements() -> None:
    leaf().exp().backward()


@refused
def a_checkpoint_whose_input_was_written() -> None:
    layer = nn.Linear(3, 3)
    h = leaf() * 1
    out = checkpoint(layer, h, use_reentrant=True)
    with torch.no_grad():
        h.add_(1)
    back(out)


@refused
def a_hook_that_writes() -> None:
    w = leaf()
    middle = w.exp()
    out = middle * 2
    out.register_hook(lambda grad: middle.detach().add_(1) and None)
    back(out)


@refused
def a_hook_that_raises() -> None:
    def hook(grad: torch.Tensor) -> None:
        raise RuntimeError("the hook's own error")

    out = leaf().exp()
    out.register_hook(hook)
    back(out)


@refused
def a_backward_that_raises() -> None:
    class Raises(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x)
            return x * 1

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> Any:
            raise RuntimeError(f"{len(ctx.saved_tensors)} saved")

    back(Raises.apply(leaf()))


# ---- anomaly mode -------------------------------------------------------------------------------------------------


@refused
def anomaly_input() -> None:
    with torch.autograd.detect_anomaly():
        an_input_that_is_no_leaf()


@refused
def anomaly_output() -> None:
    with torch.autograd.detect_anomaly(check_nan=False):
        an_output()


@refused
def anomaly_leaf_of_a_function() -> None:
    with torch.autograd.detect_anomaly():
        leaf_of_a_function()


@refused
def anomaly_nan() -> None:
    with torch.autograd.detect_anomaly():
        back((leaf() * 0).sqrt() * 0)


@refused
def anomaly_second_backward() -> None:
    with torch.autograd.detect_anomaly():
        backward_twice()


@refused
def anomaly_detached() -> None:
    with torch.autograd.detect_anomaly():
        detached_in_place()


# ---- the tests ----------------------------------------------------------------------------------------------------


def refusal_of(program: Callable[[], Any]) -> Exception | None:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            program()
        except Exception as error:
            traceback.clear_frames(error.__traceback__)
            return error
    return None


@pytest.mark.parametrize("name", PROGRAMS)
def test_each_program_is_refused(name: str) -> None:
    assert refusal_of(PROGRAMS[name]) is not None


@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize("name", PROGRAMS)
def test_the_refusal_is_pytorchs_own(name: str, guard: str) -> None:
    expected = refusal_of(PROGRAMS[name])
    with GUARDS[guard]() as entered:
        error = refusal_of(PROGRAMS[name])
    assert error is not None
    assert str(error) == str(expected)
    assert type(error) is type(expected)
    assert entered.violations == []


@pytest.mark.parametrize("name", PROGRAMS)
def test_the_refusal_comes_again(name: str) -> None:
    """The second program under one guard meets whatever the first one left."""
    expected = refusal_of(PROGRAMS[name])
    with torchguard.strict():
        errors = [refusal_of(PROGRAMS[name]) for _ in range(2)]
    assert [str(error) for error in errors] == [str(expected)] * 2


@pytest.mark.parametrize("name", ["an_input_that_is_no_leaf", "an_output", "input_of_a_function", "double_backward"])
def test_the_refusal_in_nested_guards(name: str) -> None:
    expected = refusal_of(PROGRAMS[name])
    with torchguard.warn(), torchguard.strict(), torchguard.strict():
        assert str(refusal_of(PROGRAMS[name])) == str(expected)


@pytest.mark.parametrize("name", ["an_input_that_is_no_leaf", "an_output", "a_float16_output", "leaf_of_a_function"])
def test_the_refusal_can_be_copied_and_has_no_second_cause(name: str) -> None:
    with torchguard.strict():
        error = refusal_of(PROGRAMS[name])
    assert error is not None
    assert str(copy.copy(error)) == str(error)
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert error.__cause__ is None
    assert error.__context__ is None


@pytest.mark.parametrize(("saved_in", "read_in"), [("guard", "none"), ("none", "guard"), ("guard", "another guard")])
@pytest.mark.parametrize("kind", ["input", "output", "leaf"])
def test_saved_in_one_place_and_read_in_another(saved_in: str, read_in: str, kind: str) -> None:
    def forward() -> tuple[torch.Tensor, torch.Tensor]:
        w = torch.ones(3, requires_grad=True)
        if kind == "leaf":
            return w, w * w
        h = w * 1
        if kind == "input":
            return h, h * h
        out = h.exp()
        return out, out

    def spoil(written: torch.Tensor, out: torch.Tensor) -> None:
        with torch.no_grad():
            written.add_(1)
        out.sum().backward()

    expected = refusal_of(lambda: spoil(*forward()))
    if saved_in == "guard":
        with torchguard.strict():
            saved = forward()
    else:
        saved = forward()
    if read_in == "none":
        error = refusal_of(lambda: spoil(*saved))
    else:
        with torchguard.strict():
            error = refusal_of(lambda: spoil(*saved))
    assert str(error) == str(expected)
    assert type(error) is type(expected)


def test_the_refusal_does_not_disturb_what_it_refuses() -> None:
    with torchguard.strict():
        h = leaf() * 1
        out = h * h
        h.add_(1)
        version, bytes_before = h._version, h.tolist()
        for _ in range(3):
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                out.sum().backward(retain_graph=True)
            assert h._version == version
            assert h.tolist() == bytes_before


@pytest.mark.filterwarnings("ignore")
def test_anomaly_mode_points_at_the_users_line() -> None:
    def forward() -> torch.Tensor:
        h = leaf() * 1
        out = h.sin()  # the culprit
        h.add_(1)
        return out

    def told() -> list[str]:
        with warnings.catch_warnings(record=True) as caught, torch.autograd.detect_anomaly():
            warnings.simplefilter("always")
            with pytest.raises(RuntimeError):
                forward().sum().backward()
        return [str(warning.message) for warning in caught if "Traceback of forward call" in str(warning.message)]

    expected = told()
    with torchguard.strict():
        found = told()
    assert len(found) == len(expected) == 1
    assert "# the culprit" in found[0]
    assert "torchguard/" not in found[0]


def test_a_refused_program_leaves_nothing_behind() -> None:
    file = io.StringIO()
    for name in ("an_input_that_is_no_leaf", "an_output", "input_of_a_function", "detached_in_place"):
        with torchguard.strict() as guard:
            refusal_of(PROGRAMS[name])
        assert guard.violations == []
        print(guard, file=file)
    innocent = leaf()
    with torchguard.strict():
        back(innocent.exp())
    assert innocent.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64], ids=str)
def test_a_wrapper_is_refused_as_a_tensor_of_its_type_is(dtype: torch.dtype) -> None:
    told: list[str] = []

    def look(x: torch.Tensor) -> torch.Tensor:
        told.append(str(_refusal.refusal(x, 5, None, 0)))
        return x

    torch.func.vmap(look)(torch.zeros(3, 2, dtype=dtype))
    look(torch.zeros(2, dtype=dtype))
    assert told[0] == told[1]
    assert "is at version 0; expected version 5 instead" in told[0]
