"""When the write comes and what the graph around it looks like: several backwards, custom Functions, hooks, dtypes."""

from __future__ import annotations

from typing import Any

import torch
from harness import Run, add, program
from torch import nn
from torch.autograd import Function, grad
from torch.autograd.function import once_differentiable

# ---- several backwards --------------------------------------------------------------------------------------------

_AGAIN = "backward again"


@program(route=_AGAIN, kind="corrupting")
def write_between_two_backwards(run: Run) -> Any:
    w = run.leaf()
    out = w.tanh()  # saved
    first = grad(out.sum(), w, retain_graph=True)
    run.write(lambda: out.data.fill_(3))
    return [first, grad(out.sum(), w)]


@program(route=_AGAIN, kind="innocent", twin_of="write_between_two_backwards")
def write_after_the_second_backward(run: Run) -> Any:
    w = run.leaf()
    out = w.tanh()
    first = grad(out.sum(), w, retain_graph=True)
    second = grad(out.sum(), w)
    run.write(lambda: out.data.fill_(3))
    return [first, second]


@program(route=_AGAIN, kind="unread")
def write_after_a_backward_that_retained(run: Run) -> Any:
    w = run.leaf()
    out = w.tanh()
    out.sum().backward(retain_graph=True)
    run.write(lambda: out.data.fill_(3))
    return [w.grad]


@program(route=_AGAIN, kind="refused")
def tracked_write_between_two_backwards(run: Run) -> Any:
    w = run.leaf()
    out = w.tanh()
    out.sum().backward(retain_graph=True)
    run.write(lambda: out.detach().fill_(3))
    out.sum().backward()
    return [w.grad]


@program(route=_AGAIN, kind="refused")
def backward_twice_without_retaining(run: Run) -> Any:
    w = run.leaf()
    out = w.tanh().sum()
    out.backward()
    out.backward()
    return [w.grad]


@program(route=_AGAIN, kind="corrupting")
def write_between_backward_and_double_backward(run: Run) -> Any:
    w = run.leaf()
    out = w.tanh()  # saved
    (first,) = grad(out.sum(), w, create_graph=True)  # saved
    run.write(lambda: out.data.fill_(3))
    return [first, grad(first.sum(), w)]


@program(route=_AGAIN, kind="innocent", twin_of="write_between_backward_and_double_backward")
def write_after_double_backward(run: Run) -> Any:
    w = run.leaf()
    out = w.tanh()
    (first,) = grad(out.sum(), w, create_graph=True)
    second = grad(first.sum(), w)
    del out
    run.write(lambda: first.data.fill_(3))
    return [second]


@program(route=_AGAIN, kind="corrupting")
def write_to_the_gradient_that_double_backward_saved(run: Run) -> Any:
    w = run.leaf()
    (first,) = grad(w.pow(3).sum(), w, create_graph=True)
    penalty = first.exp()  # saved
    run.write(lambda: penalty.data.fill_(0.5))
    return [grad(penalty.sum(), w)]


@program(route=_AGAIN, kind="innocent", twin_of="write_to_the_gradient_that_double_backward_saved")
def write_to_a_gradient_nothing_saved(run: Run) -> Any:
    w = run.leaf()
    (first,) = grad(w.pow(3).sum(), w, create_graph=True)
    penalty = first * 2
    run.write(lambda: penalty.data.fill_(0.5))
    return [grad(penalty.sum(), w)]


@program(route=_AGAIN, kind="corrupting")
def write_before_triple_backward(run: Run) -> Any:
    w, h = run.leaf(), run.leaf()
    out = (w.pow(4) * h).sum()  # saved
    (first,) = grad(out, w, create_graph=True)  # saved
    (second,) = grad(first.sum(), w, create_graph=True)  # saved
    run.write(lambda: w.data.mul_(3))
    return [grad(second.sum(), w)]


@program(route=_AGAIN, kind="innocent", twin_of="write_before_triple_backward")
def write_after_triple_backward(run: Run) -> Any:
    w, h = run.leaf(), run.leaf()
    out = (w.pow(4) * h).sum()
    (first,) = grad(out, w, create_graph=True)
    (second,) = grad(first.sum(), w, create_graph=True)
    third = grad(second.sum(), w)
    del out, first, second
    run.write(lambda: w.data.mul_(3))
    return [third]


@program(route=_AGAIN, kind="corrupting")
def gradient_penalty_with_the_weight_clipped_in_between(run: Run) -> Any:
    critic, x = nn.Linear(4, 1, bias=False), run.leaf()
    score = critic(x).pow(2).sum()  # saved
    (slope,) = grad(score, x, create_graph=True)  # saved
    run.write(lambda: critic.weight.data.clamp_(-0.01, 0.01))
    slope.pow(2).sum().backward()
    return [critic.weight.grad]


@program(route=_AGAIN, kind="innocent", twin_of="gradient_penalty_with_the_weight_clipped_in_between")
def gradient_penalty_with_the_weight_clipped_after(run: Run) -> Any:
    critic, x = nn.Linear(4, 1, bias=False), run.leaf()
    (slope,) = grad(critic(x).pow(2).sum(), x, create_graph=True)
    slope.pow(2).sum().backward()
    del slope
    run.write(lambda: critic.weight.data.clamp_(-0.01, 0.01))
    return [critic.weight.grad]


# ---- several graphs -----------------------------------------------------------------------------------------------

_MANY = "several graphs"


@program(route=_MANY, kind="corrupting")
def two_graphs_share_a_save_and_one_is_done(run: Run) -> Any:
    w, v, h = run.leaf(), run.leaf(), run.leaf()
    one, two = h * w, h * v  # saved
    one.sum().backward()
    run.write(lambda: h.data.fill_(3))
    two.sum().backward()
    return [w.grad, v.grad]


@program(route=_MANY, kind="innocent", twin_of="two_graphs_share_a_save_and_one_is_done")
def two_graphs_share_a_save_and_both_are_done(run: Run) -> Any:
    w, v, h = run.leaf(), run.leaf(), run.leaf()
    one, two = h * w, h * v
    one.sum().backward()
    two.sum().backward()
    run.write(lambda: h.data.fill_(3))
    return [w.grad, v.grad]


@program(route=_MANY, kind="corrupting")
def shared_trunk_updated_between_two_losses(run: Run) -> Any:
    trunk, policy, value = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 1)
    hidden = trunk(run.leaf(requires_grad=False)).tanh()  # saved
    actor, critic = policy(hidden).pow(2).sum(), value(hidden).pow(2).sum()  # saved
    actor.backward(retain_graph=True)
    run.write(lambda: value.weight.data.sub_(1))
    critic.backward()
    return [p.grad for p in (*trunk.parameters(), *value.parameters())]


@program(route=_MANY, kind="innocent", twin_of="shared_trunk_updated_between_two_losses")
def shared_trunk_updated_after_both_losses(run: Run) -> Any:
    trunk, policy, value = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 1)
    hidden = trunk(run.leaf(requires_grad=False)).tanh()
    loss = policy(hidden).pow(2).sum() + value(hidden).pow(2).sum()
    loss.backward()
    run.write(lambda: value.weight.data.sub_(1))
    return [p.grad for p in (*trunk.parameters(), *value.parameters())]


@program(route=_MANY, kind="innocent", twin_of="shared_trunk_updated_between_two_losses")
def two_heads_of_which_the_written_one_is_done(run: Run) -> Any:
    trunk, policy, value = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 1)
    hidden = trunk(run.leaf(requires_grad=False)).detach()
    actor, critic = policy(hidden).pow(2).sum(), value(hidden).pow(2).sum()
    actor.backward()
    run.write(lambda: policy.weight.data.sub_(1))
    critic.backward()
    return [p.grad for p in (*policy.parameters(), *value.parameters())]


@program(route=_MANY, kind="innocent", twin_of="two_graphs_share_a_save_and_one_is_done")
def input_that_needs_no_gradient_makes_the_other_unsaved(run: Run) -> Any:
    """``w * h`` saves ``w`` for the gradient of ``h`` only."""
    w, h = run.leaf(), run.leaf(requires_grad=False)
    out = w * h
    run.write(lambda: w.data.fill_(3))
    out.sum().backward()
    return [w.grad]


@program(route=_MANY, kind="innocent", twin_of="two_graphs_share_a_save_and_one_is_done")
def ops_that_save_nothing(run: Run) -> Any:
    w, h = run.leaf(), run.leaf()
    out = (w + h - 3).neg().reshape(-1).sum() * 2
    run.write(lambda: h.data.fill_(3))
    out.backward()
    return [w.grad, h.grad]


@program(route=_MANY, kind="innocent", twin_of="two_graphs_share_a_save_and_one_is_done")
def input_of_an_op_that_saves_its_output(run: Run) -> Any:
    w = run.leaf()
    h = w * 1
    out = h.tanh()
    run.write(lambda: h.data.fill_(3))
    out.sum().backward()
    return [w.grad]


@program(route=_MANY, kind="innocent", twin_of="two_graphs_share_a_save_and_one_is_done")
def output_of_an_op_that_saves_its_input(run: Run) -> Any:
    w = run.leaf()
    out = w.sin()
    run.write(lambda: out.data.fill_(3))
    out.sum().backward()
    return [w.grad]


# ---- custom Functions ---------------------------------------------------------------------------------------------

_CUSTOM = "custom Function"


class _Exp(Function):
    """Saves its output."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        out = x.exp()
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (out,) = ctx.saved_tensors
        return grads[0] * out


class _Times(Function):
    """Saves its inputs."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, y)
        return x * y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, y = ctx.saved_tensors
        return grads[0] * y, grads[0] * x


class _Cube(Function):
    """Saves an intermediate, and hands it out through an attribute."""

    squares: list[torch.Tensor]

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, leak: list[torch.Tensor]) -> torch.Tensor:
        square = x * x
        leak.append(square)
        ctx.save_for_backward(square)
        return square * x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (square,) = ctx.saved_tensors
        return 3 * grads[0] * square, None


class _Pick(Function):
    """Returns an index that is not differentiable, and saves it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        values, index = x.max(0)
        ctx.save_for_backward(index)
        ctx.mark_non_differentiable(index)
        ctx.rows = x.shape[0]
        return values, index

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        (index,) = ctx.saved_tensors
        return torch.zeros(ctx.rows, index.numel()).scatter(0, index[None], grads[0][None])


class _SetUp(Function):
    """The newer style, with ``setup_context``; saves input and output, and None."""

    @staticmethod
    def forward(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x * y).exp()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(inputs[1], None, output)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        y, _, out = ctx.saved_tensors
        return grads[0] * out * y, None


def _exp(run: Run) -> Any:
    w = run.leaf()
    out = _Exp.apply(w)  # saved
    return w, out, out


def _times_first(run: Run) -> Any:
    w, h = run.leaf(), run.leaf()
    return w, _Times.apply(h, w), h  # saved


def _times_second(run: Run) -> Any:
    w, h = run.leaf(), run.leaf() * 1
    return w, _Times.apply(w, h), h  # saved


def _cube(run: Run) -> Any:
    w, leak = run.leaf(), []
    out = _Cube.apply(w, leak)  # saved
    return w, out, leak[0]


def _pick(run: Run) -> Any:
    w = run.leaf()
    values, index = _Pick.apply(w)  # saved
    return w, values, index


def _set_up_input(run: Run) -> Any:
    w, h = run.leaf(), run.leaf()
    return w, _SetUp.apply(w, h), h  # saved


def _set_up_output(run: Run) -> Any:
    w, h = run.leaf(), run.leaf()
    out = _SetUp.apply(w, h)  # saved
    return w, out, out


def _custom_programs() -> None:
    saves = (_exp, _times_first, _times_second, _cube, _pick, _set_up_input, _set_up_output)
    for save in saves:
        name = f"custom{save.__name__}"

        def corrupting(run: Run, save: Any = save) -> Any:
            w, out, h = save(run)
            c = h.data
            run.write(lambda: c.zero_())
            out.sum().backward()
            return [w.grad]

        def refused(run: Run, save: Any = save) -> Any:
            w, out, h = save(run)
            c = h.detach()
            run.write(lambda: c.zero_())
            out.sum().backward()
            return [w.grad]

        def after_backward(run: Run, save: Any = save) -> Any:
            w, out, h = save(run)
            c = h.data
            out.sum().backward()
            run.write(lambda: c.zero_())
            return [w.grad]

        def out_of(run: Run, save: Any = save) -> Any:
            w, out, h = save(run)
            c = h.data
            run.write(lambda: torch.mul(c, 0, out=c))
            out.sum().backward()
            return [w.grad]

        add(corrupting, name=name, route=_CUSTOM, kind="corrupting")
        add(out_of, name=f"{name}_by_out", route=_CUSTOM, kind="corrupting", caught="read")
        add(refused, name=f"{name}_tracked", route=_CUSTOM, kind="refused")
        twins = [name, f"{name}_by_out"]
        add(after_backward, name=f"{name}_after_backward", route=_CUSTOM, kind="innocent", twin_of=twins)


_custom_programs()


@program(route=_CUSTOM, kind="corrupting")
def write_inside_a_custom_backward(run: Run) -> Any:
    w, h = run.leaf(), run.leaf()

    class Meddling(Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> Any:
            run.write(lambda: h.data.fill_(3))
            return grads[0]

    out = Meddling.apply(h * w)  # saved
    out.sum().backward()
    return [w.grad]


@program(route=_CUSTOM, kind="innocent", twin_of="write_inside_a_custom_backward")
def write_inside_a_custom_backward_after_the_read(run: Run) -> Any:
    w, h = run.leaf(), run.leaf()

    class Meddling(Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> Any:
            run.write(lambda: h.data.fill_(3))
            return grads[0]

    out = Meddling.apply(w) * h
    out.sum().backward()
    return [w.grad]


@program(route=_CUSTOM, kind="corrupting")
def write_inside_a_custom_forward(run: Run) -> Any:
    w, h = run.leaf(), run.leaf()

    class Meddling(Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            run.write(lambda: h.data.fill_(3))
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> Any:
            return grads[0]

    out = h * w  # saved
    Meddling.apply(out).sum().backward()
    return [w.grad]


@program(route=_CUSTOM, kind="innocent", twin_of="write_inside_a_custom_forward", truth="cloned saves")
def write_inside_a_custom_forward_before_the_save(run: Run) -> Any:
    w, h = run.leaf(), run.leaf()

    class Meddling(Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            run.write(lambda: h.data.fill_(3))
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> Any:
            return grads[0]

    out = Meddling.apply(w) * h
    out.sum().backward()
    return [w.grad]


# ---- hooks --------------------------------------------------------------------------------------------------------

_HOOK = "write in a hook"


def _hook(run: Run, write: Any) -> Any:
    def hook(*_: Any) -> None:
        run.write(write)

    return hook


@program(route=_HOOK, kind="corrupting")
def tensor_hook_before_the_read(run: Run) -> Any:
    w, h = run.leaf(), run.leaf()
    out = h * w  # saved
    out.register_hook(_hook(run, lambda: h.data.fill_(3)))
    out.sum().backward()
    return [w.grad]


@program(route=_HOOK, kind="innocent", twin_of="tensor_hook_before_the_read")
def tensor_hook_after_the_read(run: Run) -> Any:
    w, h = run.leaf(), run.leaf()
    middle = w * 1
    out = h * middle
    middle.register_hook(_hook(run, lambda: h.data.fill_(3)))
    out.sum().backward()
    return [w.grad]


@program(route=_HOOK, kind="corrupting")
def module_hook_writes_the_output_it_is_given(run: Run) -> Any:
    w = run.leaf()
    tanh = nn.Tanh()
    tanh.register_forward_hook(lambda module, args, out: _hook(run, lambda: out.data.round_())())
    out = tanh(w)  # saved
    out.sum().backward()
    return [w.grad]


@program(route=_HOOK, kind="innocent", twin_of="module_hook_writes_the_output_it_is_given")
def module_hook_writes_a_copy_of_the_output(run: Run) -> Any:
    w = run.leaf()
    tanh = nn.Tanh()
    tanh.register_forward_hook(lambda module, args, out: _hook(run, lambda: out.data.clone().round_())())
    tanh(w).sum().backward()
    return [w.grad]


@program(route=_HOOK, kind="corrupting")
def backward_hook_of_a_module_updates_its_own_weight(run: Run) -> Any:
    layer, x = nn.Linear(4, 4), run.leaf()
    layer.register_full_backward_pre_hook(_hook(run, lambda: layer.weight.data.zero_()))
    layer(x).sum().backward()  # saved
    return [x.grad]


@program(route=_HOOK, kind="innocent", twin_of="backward_hook_of_a_module_updates_its_own_weight")
def backward_hook_of_a_module_updates_its_weight_when_it_is_done(run: Run) -> Any:
    layer, x = nn.Linear(4, 4), run.leaf()
    layer.register_full_backward_hook(_hook(run, lambda: layer.weight.data.zero_()))
    layer(x).sum().backward()
    return [x.grad]


# ---- dtypes and sizes ---------------------------------------------------------------------------------------------

_SIZES = "dtypes and sizes"


def _zero_size(run: Run) -> Any:
    h = torch.ones(0, 4)
    w = torch.ones(0, 4, requires_grad=True)
    out = h * w
    c = h.data
    run.write(lambda: c.fill_(3))
    out.sum().backward()
    return [w.grad]


def _dtype_programs() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.complex128):
        short = str(dtype).removeprefix("torch.")

        def body(run: Run, dtype: torch.dtype = dtype) -> Any:
            w, h = run.leaf(dtype=dtype), run.leaf(dtype=dtype) * 1
            out = h * w  # saved
            c = h.data
            run.write(lambda: c.mul_(2))
            out.abs().sum().backward()
            return [w.grad]

        def other_half(run: Run, dtype: torch.dtype = dtype) -> Any:
            w, h = run.leaf(dtype=dtype), torch.ones(3, 8, dtype=dtype)
            out = h[:, :4] * w
            c = h.data
            run.write(lambda: c[:, 4:].mul_(2))
            out.abs().sum().backward()
            return [w.grad]

        add(body, name=f"dtype_{short}", route=_SIZES, kind="corrupting")
        add(other_half, name=f"dtype_{short}_other_half", route=_SIZES, kind="innocent", twin_of=f"dtype_{short}")
    add(_zero_size, name="zero_size", route=_SIZES, kind="innocent", twin_of="dtype_float32")


_dtype_programs()


@program(route=_SIZES, kind="corrupting")
def zero_dim(run: Run) -> Any:
    w, h = run.leaf(2.0), run.leaf(3.0)
    out = h * w  # saved
    run.write(lambda: h.data.fill_(5))
    out.backward()
    return [w.grad]


@program(route=_SIZES, kind="innocent", twin_of="zero_dim")
def zero_dim_after_backward(run: Run) -> Any:
    w, h = run.leaf(2.0), run.leaf(3.0)
    (h * w).backward()
    run.write(lambda: h.data.fill_(5))
    return [w.grad]


@program(route=_SIZES, kind="corrupting")
def large(run: Run) -> Any:
    w = torch.ones(300, 300, requires_grad=True)
    h = torch.ones(300, 300)
    out = h * w  # saved
    run.write(lambda: h.data[299, 299].fill_(5))
    out.sum().backward()
    return [w.grad]


@program(route=_SIZES, kind="innocent", twin_of="large")
def large_with_one_column_too_many(run: Run) -> Any:
    w = torch.ones(300, 299, requires_grad=True)
    h = torch.ones(300, 300)
    out = h[:, :299] * w
    run.write(lambda: h.data[:, 299].fill_(5))
    out.sum().backward()
    return [w.grad]


@program(route=_SIZES, kind="corrupting")
def negative_zero(run: Run) -> Any:
    """Equal as a number, another as a bit: and the gradient of the reciprocal tells them apart."""
    w = run.leaf([1.0])
    h = torch.tensor([0.0])
    out = h * w  # saved
    run.write(lambda: h.data.neg_())
    return [1 / grad(out.sum(), w)[0]]


@program(route=_SIZES, kind="innocent", twin_of="negative_zero")
def nan_written_over_the_same_nan(run: Run) -> Any:
    w = run.leaf([1.0])
    h = torch.tensor([float("nan")])
    out = h * w
    c = h.data
    run.write(lambda: c.copy_(h.clone()))
    out.sum().backward()
    return [w.grad]


@program(route=_SIZES, kind="corrupting")
def expanded_scalar(run: Run) -> Any:
    w, h = run.leaf(), torch.tensor(2.0)
    out = h.expand(3, 4) * w  # saved
    run.write(lambda: h.data.fill_(5))
    out.sum().backward()
    return [w.grad]


@program(route=_SIZES, kind="innocent", twin_of="expanded_scalar")
def expanded_scalar_after_backward(run: Run) -> Any:
    w, h = run.leaf(), torch.tensor(2.0)
    (h.expand(3, 4) * w).sum().backward()
    run.write(lambda: h.data.fill_(5))
    return [w.grad]


@program(route=_SIZES, kind="corrupting")
def saved_as_a_conjugate_view(run: Run) -> Any:
    w, h = run.leaf([1 + 1j], torch.complex64), torch.tensor([2 + 3j])
    out = h.conj() * w  # saved
    run.write(lambda: h.data.mul_(2))
    out.abs().sum().backward()
    return [w.grad]


@program(route=_SIZES, kind="innocent", twin_of="saved_as_a_conjugate_view")
def saved_as_a_conjugate_view_and_resolved(run: Run) -> Any:
    w, h = run.leaf([1 + 1j], torch.complex64), torch.tensor([2 + 3j])
    out = h.conj().resolve_conj() * w
    run.write(lambda: h.data.mul_(2))
    out.abs().sum().backward()
    return [w.grad]


# ---- what PyTorch refuses -----------------------------------------------------------------------------------------

_REFUSED = "refused by PyTorch"


@program(route=_REFUSED, kind="refused")
def in_place_on_a_leaf(run: Run) -> Any:
    w = run.leaf()
    run.write(lambda: w.add_(1))
    return [w]


@program(route=_REFUSED, kind="refused")
def in_place_on_a_view_of_a_leaf(run: Run) -> Any:
    w = run.leaf()
    run.write(lambda: w[0].add_(1))
    return [w]


@program(route=_REFUSED, kind="refused")
def saved_output_written_in_place(run: Run) -> Any:
    w = run.leaf()
    out = w.sigmoid()
    run.write(lambda: out.mul_(2))
    out.sum().backward()
    return [w.grad]


@program(route=_REFUSED, kind="refused")
def saved_input_written_in_place(run: Run) -> Any:
    w = run.leaf()
    h = w * 1
    out = h.sin()
    run.write(lambda: h.mul_(2))
    out.sum().backward()
    return [w.grad]


@program(route=_REFUSED, kind="refused")
def view_of_a_save_written_in_place(run: Run) -> Any:
    w = run.leaf()
    out = w.exp()
    run.write(lambda: out[1].zero_())
    out.sum().backward()
    return [w.grad]


@program(route=_REFUSED, kind="refused")
def other_rows_of_a_tracked_buffer(run: Run) -> Any:
    """PyTorch counts versions by buffer: it refuses what would have been right, and so must it stay."""
    w, b = run.leaf(), torch.ones(2, 3, 4)
    out = b[0] * w
    run.write(lambda: b[1].zero_())
    out.sum().backward()
    return [w.grad]


@program(route=_REFUSED, kind="refused")
def tracked_write_that_changes_nothing(run: Run) -> Any:
    w = run.leaf()
    out = w.exp()
    run.write(lambda: out.detach().mul_(1))
    out.sum().backward()
    return [w.grad]


@program(route=_REFUSED, kind="refused")
def tracked_write_then_a_silent_one(run: Run) -> Any:
    w, h = run.leaf(), run.leaf()
    out = h * w
    h.detach().zero_()
    run.write(lambda: h.data.fill_(3))
    out.sum().backward()
    return [w.grad]


@program(route=_REFUSED, kind="refused")
def saved_tensor_detached_in_place(run: Run) -> Any:
    w = run.leaf()
    h = w * 1
    out = (h * h).sum()
    run.write(lambda: h.detach_())
    out.backward()
    return [w.grad]


@program(route=_REFUSED, kind="refused")
def relu_in_place_after_a_save(run: Run) -> Any:
    w = run.leaf()
    out = w.exp()
    run.write(lambda: nn.functional.relu(out - 0, inplace=True) + nn.functional.dropout(out, 0.5, inplace=True))
    out.sum().backward()
    return [w.grad]


@program(route=_REFUSED, kind="refused")
def foreach_on_tracked_tensors(run: Run) -> Any:
    w, h = run.leaf(), run.leaf(requires_grad=False)
    out = h * w
    run.write(lambda: torch._foreach_mul_([h], 2.0))
    out.sum().backward()
    return [w.grad]


@program(route=_REFUSED, kind="refused", repairable=False)
def increment_of_the_version(run: Run) -> Any:
    w, h = run.leaf(), run.leaf(requires_grad=False)
    out = h * w
    run.write(lambda: torch.autograd.graph.increment_version(h))
    out.sum().backward()
    return [w.grad]


@program(route=_REFUSED, kind="refused")
def tracked_before_double_backward(run: Run) -> Any:
    w = run.leaf()
    out = w.tanh()
    (first,) = grad(out.sum(), w, create_graph=True)
    run.write(lambda: out.detach().zero_())
    return [grad(first.sum(), w)]


@program(route=_REFUSED, kind="refused")
def in_place_on_an_expanded_alias(run: Run) -> Any:
    w, h = run.leaf(), run.leaf(requires_grad=False)
    out = h * w
    c = h.data[:1].expand(3, 4)
    run.write(lambda: c.add_(1))
    out.sum().backward()
    return [w.grad]


@program(route=_REFUSED, kind="refused")
def shapes_that_do_not_fit(run: Run) -> Any:
    w, h = run.leaf(), run.leaf(requires_grad=False)
    out = h * w
    c = h.data
    run.write(lambda: c.add_(torch.ones(7)))
    out.sum().backward()
    return [w.grad]


@program(route=_REFUSED, kind="refused")
def index_out_of_range(run: Run) -> Any:
    w, h = run.leaf(), run.leaf(requires_grad=False)
    out = h * w
    c = h.data

    def write() -> None:
        c[7] = 1

    run.write(write)
    out.sum().backward()
    return [w.grad]


@program(route=_REFUSED, kind="refused")
def argument_that_does_not_exist(run: Run) -> Any:
    w, h = run.leaf(), run.leaf(requires_grad=False)
    out = h * w
    c = h.data
    run.write(lambda: c.add_(1, no_such_argument=2))
    out.sum().backward()
    return [w.grad]
