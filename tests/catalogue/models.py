"""Which saves real layers and operations make, and what happens when those are written to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from harness import Run, add, program
from torch import nn

Build = Callable[[Run], tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]]

# ---- operations: what comes out, what is written to, whose gradients are returned ---------------------------------


def _leaves(run: Run) -> tuple[torch.Tensor, torch.Tensor]:
    return run.leaf(), run.leaf([[1.0, 2.0, 3.0, 4.0], [0.5, 0.25, 2.0, 1.0], [1.5, 3.0, 0.1, 0.2]])


#: op(x, y) -> out; the second entry picks what to write to from (x, y, out).
OPERATIONS: dict[str, tuple[Callable[..., torch.Tensor], int]] = {
    "mul": (lambda x, y: x * y, 1),  # saved
    "div": (lambda x, y: x / y, 1),  # saved
    "pow": (lambda x, y: y**3, 1),  # saved
    "matmul": (lambda x, y: x @ y.t(), 1),  # saved
    "einsum": (lambda x, y: torch.einsum("ij,kj->ik", x, y), 1),  # saved
    "bmm": (lambda x, y: torch.bmm(x[None], y.t()[None]), 1),  # saved
    "addmm": (lambda x, y: torch.addmm(torch.zeros(3, 3), x, y.t()), 1),  # saved
    "outer": (lambda x, y: torch.outer(x[0], y[0]), 1),  # saved
    "dot": (lambda x, y: x[0].dot(y[0]), 1),  # saved
    "addcmul": (lambda x, y: torch.addcmul(torch.zeros(3, 4), x, y), 1),  # saved
    "lerp_weight": (lambda x, y: torch.lerp(x, torch.zeros(3, 4), y), 1),  # saved
    "log": (lambda x, y: y.log(), 1),  # saved
    "sin": (lambda x, y: x.sin(), 0),  # saved
    "exp": (lambda x, y: x.exp(), 2),  # saved
    "sqrt": (lambda x, y: y.sqrt(), 2),  # saved
    "rsqrt": (lambda x, y: y.rsqrt(), 2),  # saved
    "reciprocal": (lambda x, y: y.reciprocal(), 2),  # saved
    "sigmoid": (lambda x, y: x.sigmoid(), 2),  # saved
    "tanh": (lambda x, y: x.tanh(), 2),  # saved
    "relu": (lambda x, y: x.relu(), 2),  # saved
    "gelu": (lambda x, y: F.gelu(x), 0),  # saved
    "silu": (lambda x, y: F.silu(x), 0),  # saved
    "softplus": (lambda x, y: F.softplus(x), 0),  # saved
    "elu": (lambda x, y: F.elu(x), 0),  # saved
    "leaky_relu": (lambda x, y: F.leaky_relu(x), 0),  # saved
    "hardtanh": (lambda x, y: F.hardtanh(x), 0),  # saved
    "abs": (lambda x, y: x.abs(), 0),  # saved
    "clamp": (lambda x, y: x.clamp(-1, 1), 0),  # saved
    "logsumexp": (lambda x, y: x.logsumexp(1), 0),  # saved
    "prod": (lambda x, y: y.prod(1), 1),  # saved
    "cumprod": (lambda x, y: y.cumprod(1), 1),  # saved
    "norm": (lambda x, y: x.norm(), 0),  # saved
    "std": (lambda x, y: x.std(), 0),  # saved
    "var": (lambda x, y: x.var(1), 0),  # saved
    "max": (lambda x, y: x.max(), 0),  # saved
    "maximum": (lambda x, y: torch.maximum(x, y), 0),  # saved
    "atan2": (lambda x, y: torch.atan2(x, y), 1),  # saved
    "cross": (lambda x, y: torch.linalg.cross(x[:, :3], y[:, :3]), 1),  # saved
    "inverse": (lambda x, y: torch.linalg.inv(x[:, :3] + 5 * torch.eye(3)), 2),  # saved
    "softmax": (lambda x, y: x.softmax(1), 2),  # saved
    "mse_loss": (lambda x, y: F.mse_loss(x, y), 1),  # saved
    "smooth_l1_loss": (lambda x, y: F.smooth_l1_loss(x, y), 1),  # saved
    "kl_div": (lambda x, y: F.kl_div(x.log_softmax(1), y, reduction="sum"), 1),  # saved
    "binary_cross_entropy_with_logits": (lambda x, y: F.binary_cross_entropy_with_logits(x, y.detach()), 0),  # saved
    "cosine_similarity": (lambda x, y: F.cosine_similarity(x, y), 1),  # saved
    "layer_norm": (lambda x, y: F.layer_norm(x, (4,)).pow(2) * torch.arange(4.0), 0),  # saved
    "scaled_dot_product_attention": (
        lambda x, y: F.scaled_dot_product_attention(x[None, None], y[None, None], x[None, None]),  # saved
        1,
    ),
    "in_place_chain": (lambda x, y: (x * y).mul_(2).add_(x), 1),  # saved
}


def _operations() -> None:
    for name, (operation, written) in OPERATIONS.items():

        def body(run: Run, operation: Any = operation, written: int = written, late: bool = False) -> Any:
            x, y = _leaves(run)
            out = operation(x, y)  # saved
            c = (x, y, out)[written].data
            if not late:
                run.write(lambda: c.mul_(-2).sub_(0.25))
            (out * torch.arange(1.0, out.numel() + 1).view_as(out)).sum().backward()
            if late:
                run.write(lambda: c.mul_(-2).sub_(0.25))
            return [x.grad, y.grad]

        def after(run: Run, body: Any = body) -> Any:
            return body(run, late=True)

        full = f"operation_{name}"
        add(body, name=full, route="operation", kind="corrupting", exact=False)
        add(after, name=f"{full}_after_backward", route="operation", kind="innocent", twin_of=full)


# ---- layers: make a layer, an input of this shape; write to this parameter (or what the layer shows) ---------------

LAYERS: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "linear": (lambda: nn.Linear(4, 3), (2, 4), "weight"),
    "linear_of_three_dimensions": (lambda: nn.Linear(4, 3), (2, 5, 4), "weight"),
    "bilinear": (lambda: nn.Bilinear(4, 4, 3), (2, 4), "weight"),
    "conv1d": (lambda: nn.Conv1d(2, 3, 2), (1, 2, 5), "weight"),
    "conv2d": (lambda: nn.Conv2d(1, 2, 3, padding=1), (1, 1, 4, 4), "weight"),
    "conv2d_grouped": (lambda: nn.Conv2d(2, 2, 3, groups=2), (1, 2, 4, 4), "weight"),
    "conv_transpose2d": (lambda: nn.ConvTranspose2d(1, 2, 3), (1, 1, 4, 4), "weight"),
    "batch_norm_training": (lambda: nn.BatchNorm1d(4), (5, 4), "weight"),
    "batch_norm_evaluating": (lambda: nn.BatchNorm1d(4).eval(), (5, 4), "weight"),
    "batch_norm_2d": (lambda: nn.BatchNorm2d(2), (3, 2, 2, 2), "weight"),
    "layer_norm": (lambda: nn.LayerNorm(4), (3, 4), "weight"),
    "group_norm": (lambda: nn.GroupNorm(2, 4), (2, 4, 3), "weight"),
    "rms_norm": (lambda: nn.RMSNorm(4), (3, 4), "weight"),
    "prelu": (lambda: nn.PReLU(), (3, 4), "weight"),
    "rnn": (lambda: nn.RNN(4, 3), (5, 2, 4), "weight_hh_l0"),
    "rnn_cell": (lambda: nn.RNNCell(4, 3), (2, 4), "weight_ih"),
    "gru": (lambda: nn.GRU(4, 3), (5, 2, 4), "weight_hh_l0"),
    "gru_cell": (lambda: nn.GRUCell(4, 3), (2, 4), "weight_ih"),
    "lstm": (lambda: nn.LSTM(4, 3), (5, 2, 4), "weight_ih_l0"),
    "attention": (lambda: nn.MultiheadAttention(4, 2), (5, 2, 4), "in_proj_weight"),
    "transformer_layer": (
        lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0),
        (5, 2, 4),
        "linear2.weight",
    ),
    "sequential": (lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), (3, 4), "2.weight"),
}


def _call(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    if isinstance(layer, nn.Bilinear):
        out = layer(x, x * 2)  # saved
    elif isinstance(layer, nn.MultiheadAttention):
        out = layer(x, x * 2, x * 3)  # saved
    else:
        out = layer(x)  # saved
    return out[0] if isinstance(out, tuple) else out


def _layers() -> None:
    for name, (make, shape, path) in LAYERS.items():

        def body(run: Run, late: bool, to_bias: bool, make: Any = make, shape: Any = shape, path: str = path) -> Any:
            layer = make()
            x = torch.randn(shape, requires_grad=True)
            out = _call(layer, x)
            c = layer.get_parameter(path.replace("weight", "bias") if to_bias else path).data
            if not late:
                run.write(lambda: c.mul_(2).add_(1))
            (out.pow(2) * torch.arange(1.0, out.numel() + 1).view_as(out)).sum().backward()
            if late:
                run.write(lambda: c.mul_(2).add_(1))
            return [x.grad] + [p.grad for p in layer.parameters()]

        def corrupting(run: Run, body: Any = body) -> Any:
            return body(run, False, False)

        def after_backward(run: Run, body: Any = body) -> Any:
            return body(run, True, False)

        def to_the_bias(run: Run, body: Any = body) -> Any:
            return body(run, False, True)

        full = f"layer_{name}"
        add(corrupting, name=full, route="layer", kind="corrupting", exact=False)
        add(after_backward, name=f"{full}_after_backward", route="layer", kind="innocent", twin_of=full)
        if name.startswith(("linear", "bilinear", "conv", "layer_norm", "sequential")) and name != "layer_norm":
            add(to_the_bias, name=f"{full}_to_the_bias", route="layer", kind="innocent", twin_of=full)


_operations()
_layers()

# ---- indexes and masks --------------------------------------------------------------------------------------------

_INDEX = "index or mask"


def _by_index(run: Run) -> Any:
    x = run.leaf()
    index = torch.tensor([0, 1])
    return x, x[index] * torch.tensor([[1.0], [2.0]]), index  # saved


def _by_embedding(run: Run) -> Any:
    table = run.leaf()
    index = torch.tensor([0, 1])
    return table, F.embedding(index, table) * torch.tensor([[1.0], [2.0]]), index  # saved


def _by_index_select(run: Run) -> Any:
    x = run.leaf()
    index = torch.tensor([0, 1])
    return x, x.index_select(0, index) * torch.tensor([[1.0], [2.0]]), index  # saved


def _by_take(run: Run) -> Any:
    x = run.leaf()
    index = torch.tensor([0, 1])
    return x, x.take(index) * torch.tensor([1.0, 2.0]), index  # saved


def _by_scatter(run: Run) -> Any:
    x = run.leaf([[1.0, 2.0, 3.0, 4.0]])
    index = torch.tensor([[2, 1, 1, 2]])
    return x, torch.zeros(3, 4).scatter(0, index, x) * torch.arange(12.0).view(3, 4), index  # saved


def _by_sort(run: Run) -> Any:
    x = run.leaf()
    values, index = x.sort(0)  # saved
    return x, values * torch.arange(12.0).view(3, 4), index


def _by_topk(run: Run) -> Any:
    x = run.leaf()
    values, index = x.topk(2)  # saved
    return x, values * torch.arange(6.0).view(3, 2), index


def _by_max(run: Run) -> Any:
    x = run.leaf()
    values, index = x.max(1)  # saved
    return x, values * torch.arange(1, 4), index


def _by_max_pool(run: Run) -> Any:
    x = run.leaf()
    values, index = F.max_pool1d(x[None], 2, return_indices=True)  # saved
    return x, values, index


def _by_nll_loss(run: Run) -> Any:
    x = run.leaf()
    target = torch.tensor([1, 1, 2])
    return x, F.cross_entropy(x, target), target  # saved


def _by_where(run: Run) -> Any:
    x = run.leaf()
    mask = torch.tensor([True, False, True, True])
    return x, torch.where(mask, x, x * 2), mask  # saved


def _by_masked_fill(run: Run) -> Any:
    x = run.leaf()
    mask = torch.tensor([True, False, True, True])
    return x, x.masked_fill(mask, 0.0), mask  # saved


def _indexes() -> None:
    for save in (
        _by_index,
        _by_embedding,
        _by_index_select,
        _by_take,
        _by_scatter,
        _by_sort,
        _by_topk,
        _by_max,
        _by_max_pool,
        _by_nll_loss,
        _by_where,
        _by_masked_fill,
    ):
        name = f"index{save.__name__}"

        def corrupting(run: Run, save: Any = save) -> Any:
            x, out, index = save(run)
            c = index.data
            run.write(lambda: c.zero_())
            out.sum().backward()
            return [x.grad]

        def refused(run: Run, save: Any = save) -> Any:
            x, out, index = save(run)
            run.write(lambda: index.zero_())
            out.sum().backward()
            return [x.grad]

        def after_backward(run: Run, save: Any = save) -> Any:
            x, out, index = save(run)
            c = index.data
            out.sum().backward()
            run.write(lambda: c.zero_())
            return [x.grad]

        add(corrupting, name=name, route=_INDEX, kind="corrupting")
        add(refused, name=f"{name}_tracked", route=_INDEX, kind="refused")
        add(after_backward, name=f"{name}_after_backward", route=_INDEX, kind="innocent", twin_of=name)


_indexes()


@program(route="layer", kind="innocent", twin_of="layer_batch_norm_training")
def layer_instance_norm_saves_a_copy_of_its_weight(run: Run) -> Any:
    layer, x = nn.InstanceNorm1d(4, affine=True), torch.randn(2, 4, 3, requires_grad=True)
    out = layer(x)
    run.write(lambda: layer.weight.data.mul_(2))
    (out.pow(2) * torch.arange(24.0).view(2, 4, 3)).sum().backward()
    return [x.grad]


@program(route=_INDEX, kind="corrupting")
def mask_of_a_boolean_index(run: Run) -> Any:
    x = run.leaf()
    mask = torch.tensor([True, False, True])
    out = x * mask[:, None] * 2  # saved
    run.write(lambda: mask.data.zero_())
    out.sum().backward()
    return [x.grad]


@program(route=_INDEX, kind="innocent", twin_of=["mask_of_a_boolean_index", "index_by_where"])
def boolean_index_that_saves_positions(run: Run) -> Any:
    x = run.leaf()
    mask = torch.tensor([True, False, True])
    out = x.index_select(0, mask.nonzero().flatten()) * 2
    run.write(lambda: mask.data.zero_())
    out.sum().backward()
    return [x.grad]


@program(route=_INDEX, kind="refused")
def boolean_index_whose_mask_is_saved(run: Run) -> Any:
    """PyTorch notices by chance: the shapes no longer fit."""
    x = run.leaf()
    mask = torch.tensor([True, False, True])
    out = x[mask] * 2
    run.write(lambda: mask.zero_())
    out.sum().backward()
    return [x.grad]


# ---- recurrence ---------------------------------------------------------------------------------------------------

_RECURRENT = "recurrence"


@program(route=_RECURRENT, kind="corrupting", truth="cloned saves")
def hidden_state_overwritten_in_a_loop(run: Run) -> Any:
    """One buffer for the hidden state of all steps."""
    w = run.leaf([0.5, 0.25])
    buffer = torch.ones(2)
    total: Any = 0
    for step in range(3):
        hidden = buffer * w  # saved
        total = total + hidden.sum()
        run.write(lambda hidden=hidden, step=step: buffer.data.copy_(hidden.detach() + step))
    total.backward()
    return [w.grad]


@program(route=_RECURRENT, kind="innocent", truth="cloned saves", twin_of="hidden_state_overwritten_in_a_loop")
def hidden_state_in_a_new_buffer_each_step(run: Run) -> Any:
    w = run.leaf([0.5, 0.25])
    buffer = torch.ones(4, 2)
    total: Any = 0
    for step in range(3):
        hidden = buffer[step] * w
        total = total + hidden.sum()
        run.write(lambda hidden=hidden, step=step: buffer.data[step + 1].copy_(hidden.detach() + step))
    total.backward()
    return [w.grad]


@program(route=_RECURRENT, kind="refused")
def hidden_state_in_a_new_row_of_a_tracked_buffer(run: Run) -> Any:
    w = run.leaf([0.5, 0.25])
    buffer = torch.ones(4, 2)
    total: Any = 0
    for step in range(3):
        hidden = buffer[step] * w
        total = total + hidden.sum()
        run.write(lambda hidden=hidden, step=step: buffer[step + 1].copy_(hidden.detach()))
    total.backward()
    return [w.grad]


@program(route=_RECURRENT, kind="innocent", truth="cloned saves", twin_of="hidden_state_overwritten_in_a_loop")
def hidden_state_detached_and_overwritten_between_sequences(run: Run) -> Any:
    cell = nn.GRUCell(2, 2)
    hidden = torch.zeros(1, 2)
    for step in range(3):
        out = cell(torch.ones(1, 2), hidden)
        out.sum().backward()
        run.write(lambda out=out, step=step: hidden.data.copy_(out.detach()))
    return [p.grad for p in cell.parameters()]


@program(route=_RECURRENT, kind="corrupting")
def input_batch_overwritten_by_the_next_one(run: Run) -> Any:
    """A prefetched batch lands in the memory of the one that is in flight."""
    layer, batch = nn.Linear(4, 2), torch.randn(3, 4)
    out = layer(batch)  # saved
    run.write(lambda: batch.data.copy_(torch.ones(3, 4)))
    out.pow(2).sum().backward()
    return [layer.weight.grad]


@program(route=_RECURRENT, kind="innocent", truth="cloned saves", twin_of="input_batch_overwritten_by_the_next_one")
def input_batch_overwritten_after_the_step(run: Run) -> Any:
    layer, batch = nn.Linear(4, 2), torch.randn(3, 4)
    for step in range(3):
        layer(batch).pow(2).sum().backward()
        run.write(lambda step=step: batch.data.fill_(step))
    return [layer.weight.grad]


@program(route=_RECURRENT, kind="corrupting")
def dropout_mask_reused(run: Run) -> Any:
    x, mask = run.leaf(), torch.ones(3, 4)
    out = x * mask.data.bernoulli_(0.5)  # saved
    run.write(lambda: mask.data.fill_(2))
    out.sum().backward()
    return [x.grad]


@program(route=_RECURRENT, kind="innocent", twin_of="dropout_mask_reused", truth="cloned saves")
def dropout_mask_drawn_before_the_forward(run: Run) -> Any:
    x, mask = run.leaf(), torch.ones(3, 4)
    run.write(lambda: mask.data.bernoulli_(0.5))
    out = x * mask
    out.sum().backward()
    return [x.grad]
