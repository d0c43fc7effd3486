"""Writes inside PyTorch that move no counter: running statistics, preserved counters, fused and observing operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from harness import Run, add, lacks_blocks_of_several, no_lack, program
from torch import nn

Norm = Callable[[], Any]
Update = Callable[[Any, torch.Tensor], Any]

_preserve = torch.autograd._unsafe_preserve_version_counter

STATISTICS = "running statistics"
PRESERVED = "preserved counter"
FUSED = "fused optimiser"
OPERATOR = "operator that moves no counter"


# ---- running statistics -------------------------------------------------------------------------------------------

#: What changes the statistics of a module, given a batch.
UPDATES: dict[str, Update] = {
    "module": lambda bn, v: bn.train()(v),
    "functional": lambda bn, v: F.batch_norm(v, bn.running_mean, bn.running_var, training=True),
    "functional_by_keyword": lambda bn, v: F.batch_norm(
        training=True, running_var=bn.running_var, running_mean=bn.running_mean, input=v
    ),
    "torch": lambda bn, v: torch.batch_norm(v, None, None, bn.running_mean, bn.running_var, True, 0.1, 1e-5, True),
    "native": lambda bn, v: torch.native_batch_norm(v, None, None, bn.running_mean, bn.running_var, True, 0.1, 1e-5),
    "legit": lambda bn, v: torch._native_batch_norm_legit(
        v, None, None, bn.running_mean, bn.running_var, True, 0.1, 1e-5
    ),
    "impl_index": lambda bn, v: torch._batch_norm_impl_index(
        v, None, None, bn.running_mean, bn.running_var, True, 0.1, 1e-5, True
    ),
    "update_stats": lambda bn, v: torch.batch_norm_update_stats(v, bn.running_mean, bn.running_var, 0.1),
    "variable_functions": lambda bn, v: torch._VF.batch_norm(
        v, None, None, bn.running_mean, bn.running_var, True, 0.1, 1e-5, True
    ),
    "looked_up": lambda bn, v: getattr(torch, "_".join(["batch", "norm"]))(
        v, None, None, bn.running_mean, bn.running_var, True, 0.1, 1e-5, True
    ),
    "without_grad": lambda bn, v: torch.no_grad()(bn.train())(v),
    "another_module": lambda bn, v: _sharing(bn)(v),
}

NORMS: dict[str, Norm] = {
    "batch_norm": lambda: nn.BatchNorm1d(4),
    "no_affine": lambda: nn.BatchNorm1d(4, affine=False),
    "cumulative": lambda: nn.BatchNorm1d(4, momentum=None),
    "sync": lambda: nn.SyncBatchNorm(4),
    "double": lambda: nn.BatchNorm1d(4).double(),
}


def _sharing(bn: Any) -> Any:
    """Another module over the same statistics."""
    other = nn.BatchNorm1d(4)
    other.running_mean, other.running_var = bn.running_mean, bn.running_var
    return other


def _batch(bn: Any) -> torch.Tensor:
    """Values whose statistics are others than the module's."""
    return torch.linspace(-3, 9, 12, dtype=bn.running_mean.dtype).reshape(3, 4)


def _leaf(run: Run, bn: Any) -> torch.Tensor:
    return run.leaf(dtype=bn.running_mean.dtype)


def _add_updates(name: str, make: Norm, update: Update) -> None:
    def evaluated(run: Run) -> Any:
        bn = make().eval()
        x = _leaf(run, bn)
        out = bn(x)  # saved
        run.write(lambda: update(bn, _batch(bn)))
        out.square().sum().backward()
        return [x.grad]

    def before_the_forward(run: Run) -> Any:
        """The truth is under cloned saves: the output is another."""
        bn = make().eval()
        x = _leaf(run, bn)
        run.write(lambda: update(bn, _batch(bn)))
        bn.eval()(x).square().sum().backward()
        return [x.grad]

    def after_backward(run: Run) -> Any:
        bn = make().eval()
        x = _leaf(run, bn)
        bn(x).square().sum().backward()
        run.write(lambda: update(bn, _batch(bn)))
        return [x.grad]

    def of_another(run: Run) -> Any:
        bn, other = make().eval(), make().eval()
        x = _leaf(run, bn)
        out = bn(x)
        run.write(lambda: update(other, _batch(bn)))
        out.square().sum().backward()
        return [x.grad]

    def in_training(run: Run) -> Any:
        """D(real), D(fake), then backward: what the first saved of the statistics its backward does not use."""
        bn = make().train()
        x = _leaf(run, bn)
        out = bn(x)
        run.write(lambda: update(bn, _batch(bn)))
        out.square().sum().backward()
        return [x.grad]

    full = f"statistics_{name}"
    add(evaluated, name=full, route=STATISTICS, kind="corrupting", caught="read", every_call="read")
    add(
        before_the_forward,
        name=f"{full}_before_the_forward",
        route=STATISTICS,
        kind="innocent",
        truth="cloned saves",
        twin_of=full,
    )
    add(after_backward, name=f"{full}_after_backward", route=STATISTICS, kind="innocent", twin_of=full)
    add(of_another, name=f"{full}_of_another", route=STATISTICS, kind="innocent", twin_of=full)
    add(in_training, name=f"{full}_in_training", route=STATISTICS, kind="unread")


for _name, _update in UPDATES.items():
    _add_updates(f"by_{_name}", NORMS["batch_norm"], _update)
for _name, _make in NORMS.items():
    if _name != "batch_norm":
        _add_updates(f"of_{_name}", _make, UPDATES["module"])


@program(route=STATISTICS, kind="corrupting", caught="read", every_call="read")
def statistics_in_two_dimensions(run: Run) -> Any:
    bn = nn.BatchNorm2d(3).eval()
    x = run.leaf([[[[0.5, 2.0]], [[1.0, -1.0]], [[3.0, 0.1]]]] * 2)
    out = bn(x)  # saved
    run.write(lambda: bn.train()(torch.arange(12.0).reshape(2, 3, 1, 2)))
    out.square().sum().backward()
    return [x.grad]


@program(route=STATISTICS, kind="innocent", twin_of="statistics_in_two_dimensions")
def statistics_that_no_momentum_moves(run: Run) -> Any:
    bn = nn.BatchNorm2d(3, momentum=0.0).eval()
    x = run.leaf([[[[0.5, 2.0]], [[1.0, -1.0]], [[3.0, 0.1]]]] * 2)
    out = bn(x)
    run.write(lambda: bn.train()(torch.arange(12.0).reshape(2, 3, 1, 2)))
    out.square().sum().backward()
    return [x.grad]


@program(route=STATISTICS, kind="innocent", twin_of="statistics_in_two_dimensions")
def statistics_that_are_not_tracked(run: Run) -> Any:
    bn = nn.BatchNorm1d(4, track_running_stats=False).eval()
    x = run.leaf()
    out = bn(x)
    run.write(lambda: bn.train()(torch.arange(12.0).reshape(3, 4)))
    out.square().sum().backward()
    return [x.grad]


@program(route=STATISTICS, kind="innocent", twin_of="statistics_in_two_dimensions")
def evaluated_twice(run: Run) -> Any:
    bn = nn.BatchNorm1d(4).eval()
    x = run.leaf()
    out = bn(x)
    second = run.write(lambda: bn(x * 2))
    (out.square().sum() + (0 if second is None else 0 * second.sum())).backward()
    return [x.grad]


@program(route=STATISTICS, kind="innocent", twin_of="statistics_in_two_dimensions", truth="cloned saves")
def frozen_in_a_training_loop(run: Run) -> Any:
    """The statistics are frozen, the rest of the model learns."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4).eval(), nn.Linear(4, 1))
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.linspace(-1, 1, p.numel()).reshape(p.shape))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for _ in range(3):
        optimiser.zero_grad()
        model(run.leaf(requires_grad=False)).square().sum().backward()
        run.write(optimiser.step)
    return [p.grad for p in model.parameters()]


@program(route=STATISTICS, kind="corrupting", caught="read", every_call="read")
def statistics_that_another_operation_saved(run: Run) -> Any:
    bn = nn.BatchNorm1d(4)
    w = run.leaf()
    out = w * bn.running_var  # saved
    run.write(lambda: bn(torch.arange(12.0).reshape(3, 4)))
    out.sum().backward()
    return [w.grad]


@program(route=STATISTICS, kind="innocent", twin_of="statistics_that_another_operation_saved")
def statistics_that_another_operation_copied(run: Run) -> Any:
    bn = nn.BatchNorm1d(4)
    w = run.leaf()
    out = w * bn.running_var.clone()
    run.write(lambda: bn(torch.arange(12.0).reshape(3, 4)))
    out.sum().backward()
    return [w.grad]


@program(route=STATISTICS, kind="corrupting", caught="read", every_call="read")
def statistics_between_two_backwards(run: Run) -> Any:
    """Read a second time by double backward."""
    bn = nn.BatchNorm1d(4).eval()
    x = run.leaf()
    out = bn(x)  # saved
    (g,) = torch.autograd.grad((out**3).sum(), x, create_graph=True)  # saved
    run.write(lambda: bn.train()(torch.arange(12.0).reshape(3, 4)))
    g.square().sum().backward()
    return [x.grad]


@program(route=STATISTICS, kind="unread")
def gradient_penalty_in_training(run: Run) -> Any:
    """WGAN-GP: double backward through batch normalisation, with another batch in between."""
    bn = nn.BatchNorm1d(4)
    x = run.leaf()
    (g,) = torch.autograd.grad((bn(x) ** 3).sum(), x, create_graph=True)
    run.write(lambda: bn(torch.arange(12.0).reshape(3, 4)))
    (g.norm() - 1).square().backward()
    return [x.grad]


@program(route=STATISTICS, kind="innocent", twin_of="statistics_between_two_backwards")
def statistics_after_two_backwards(run: Run) -> Any:
    bn = nn.BatchNorm1d(4).eval()
    x = run.leaf()
    (g,) = torch.autograd.grad((bn(x) ** 3).sum(), x, create_graph=True)
    g.square().sum().backward()
    run.write(lambda: bn.train()(torch.arange(12.0).reshape(3, 4)))
    return [x.grad]


@program(route=STATISTICS, kind="unread")
def evaluated_and_trained_and_never_read(run: Run) -> Any:
    bn = nn.BatchNorm1d(4).eval()
    x = run.leaf()
    out = bn(x)
    run.write(lambda: bn.train()(torch.arange(12.0).reshape(3, 4)))
    return [out.detach()]


@program(route=STATISTICS, kind="unread")
def statistics_put_back_before_backward(run: Run) -> Any:
    bn = nn.BatchNorm1d(4).eval()
    x = run.leaf()
    kept = bn.running_mean.clone(), bn.running_var.clone()
    out = bn(x)

    run.write(lambda: bn.train()(torch.arange(12.0).reshape(3, 4)))
    run.write(lambda: torch._foreach_copy_([bn.running_mean.data, bn.running_var.data], list(kept)))
    out.square().sum().backward()
    return [x.grad]


@program(route=STATISTICS, kind="corrupting")
def statistics_zeroed_through_data(run: Run) -> Any:
    bn = nn.BatchNorm1d(4).eval()
    with torch.no_grad():
        bn.running_var.add_(2)
    x = run.leaf()
    out = bn(x)  # saved
    run.write(lambda: bn.running_var.data.zero_())
    out.square().sum().backward()
    return [x.grad]


@program(route=STATISTICS, kind="unread")
def statistics_zeroed_through_data_in_training(run: Run) -> Any:
    bn = nn.BatchNorm1d(4)
    x = run.leaf()
    out = bn(x)
    run.write(lambda: bn.running_var.data.zero_())
    out.square().sum().backward()
    return [x.grad]


@program(route=STATISTICS, kind="unread")
def statistics_zeroed_by_out_in_training(run: Run) -> Any:
    """No patch sees this write, and backward does not use what it finds."""
    bn = nn.BatchNorm1d(4)
    x = run.leaf()
    out = bn(x)
    c = bn.running_var.data
    run.write(lambda: torch.zeros(4, out=c))
    out.square().sum().backward()
    return [x.grad]


@program(route=STATISTICS, kind="innocent", twin_of="statistics_zeroed_through_data")
def statistics_zeroed_through_data_after_backward(run: Run) -> Any:
    bn = nn.BatchNorm1d(4).eval()
    x = run.leaf()
    bn(x).square().sum().backward()
    run.write(lambda: bn.running_var.data.zero_())
    return [x.grad]


@program(route=STATISTICS, kind="refused")
def statistics_reset_after_evaluation(run: Run) -> Any:
    bn = nn.BatchNorm1d(4).eval()
    x = run.leaf()
    out = bn(x)
    run.write(bn.reset_running_stats)
    out.square().sum().backward()
    return [x.grad]


@program(route=STATISTICS, kind="innocent", twin_of="statistics_in_two_dimensions")
def instance_norm_evaluated_and_trained(run: Run) -> Any:
    """It normalises with a copy of its statistics."""
    norm = nn.InstanceNorm1d(3, track_running_stats=True, affine=True).eval()
    x = run.leaf([[[0.5, 2.0], [1.0, -1.0], [3.0, 0.1]]] * 2)
    out = norm(x)
    run.write(lambda: norm.train()(torch.arange(12.0).reshape(2, 3, 2)))
    out.square().sum().backward()
    return [x.grad]


@program(route=STATISTICS, kind="innocent", twin_of="statistics_in_two_dimensions")
def instance_norm_trained_twice(run: Run) -> Any:
    norm = nn.InstanceNorm1d(3, track_running_stats=True, affine=True)
    x = run.leaf([[[0.5, 2.0], [1.0, -1.0], [3.0, 0.1]]] * 2)
    out = norm(x)
    run.write(lambda: norm(torch.arange(12.0).reshape(2, 3, 2)))
    out.square().sum().backward()
    return [x.grad]


@program(route=STATISTICS, kind="corrupting", caught="read", every_call="read")
def two_modes_of_one_discriminator(run: Run) -> Any:
    """A GAN whose generator's loss is taken in evaluation mode, before the discriminator learns in training mode."""
    critic = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.LeakyReLU(0.2))
    with torch.no_grad():
        for p in critic.parameters():
            p.copy_(torch.linspace(-1, 1.5, p.numel()).reshape(p.shape))
    x = run.leaf()
    loss = critic.eval()(x).square().sum()  # saved
    run.write(lambda: critic.train()(torch.arange(12.0).reshape(3, 4)))
    loss.backward()
    return [x.grad]


@program(route=STATISTICS, kind="unread")
def one_mode_of_one_discriminator(run: Run) -> Any:
    critic = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.LeakyReLU(0.2))
    with torch.no_grad():
        for p in critic.parameters():
            p.copy_(torch.linspace(-1, 1.5, p.numel()).reshape(p.shape))
    x = run.leaf()
    loss = critic(x).square().sum()
    run.write(lambda: critic(torch.arange(12.0).reshape(3, 4)))
    loss.backward()
    return [x.grad]


@program(
    route=STATISTICS,
    kind="innocent",
    twin_of=(
        "two_modes_of_one_discriminator",
        "statistics_of_a_batch_allowed",
        "statistics_of_another_batch_allowed",
        "preserved_and_allowed",
    ),
    truth="cloned saves",
)
def one_discriminator_at_a_time(run: Run) -> Any:
    critic = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.LeakyReLU(0.2))
    x = run.leaf()
    critic.eval()(x).square().sum().backward()
    run.write(lambda: critic.train()(torch.arange(12.0).reshape(3, 4)))
    critic.eval()(x).square().sum().backward()
    return [x.grad]


@program(route=STATISTICS, kind="unread", allowed=True)
def statistics_allowed(run: Run) -> Any:
    """Only direct writes are judged at the write: this one is allowed there."""
    import torchguard

    bn = nn.BatchNorm1d(4)
    x = run.leaf()
    out = bn(x)
    with torchguard.allow("the statistics are reset on purpose"):
        run.write(lambda: bn.running_var.data.zero_())
    out.square().sum().backward()
    return [x.grad]


@program(route=STATISTICS, kind="corrupting", allowed=True)
def statistics_of_a_batch_allowed(run: Run) -> Any:
    import torchguard

    bn = nn.BatchNorm1d(4).eval()
    x = run.leaf()
    out = bn(x)
    with torchguard.allow("the statistics are warmed up on purpose"):
        run.write(lambda: bn.train()(torch.arange(12.0).reshape(3, 4)))
    out.square().sum().backward()
    return [x.grad]


@program(route=STATISTICS, kind="corrupting", caught="read", every_call="read")
def statistics_of_another_batch_allowed(run: Run) -> Any:
    import torchguard

    bn = nn.BatchNorm1d(4).eval()
    x = run.leaf()
    out = bn(x)  # saved
    with torchguard.allow("nothing that is saved"):
        nn.BatchNorm1d(4)(x)
    run.write(lambda: bn.train()(torch.arange(12.0).reshape(3, 4)))
    out.square().sum().backward()
    return [x.grad]


# ---- counters that are put back -----------------------------------------------------------------------------------

#: What writes to a tensor whose counter is preserved.
HIDDEN: dict[str, Callable[[torch.Tensor], Any]] = {
    "in_place": lambda h: h.zero_(),
    "item": lambda h: h.__setitem__(1, 7.0),
    "view": lambda h: h.t()[1:].mul_(3),
    "detached": lambda h: h.detach().add_(1),
    "ops": lambda h: torch.ops.aten.zero_(h),
    "out": lambda h: torch.neg(h, out=h),
    "foreach": lambda h: torch._foreach_mul_([h], 2.0),
    "numpy": lambda h: h.numpy().fill(7.0),
    "base_class": lambda h: torch._C.TensorBase.zero_(h),
}


def _add_hidden(name: str, hide: Callable[[torch.Tensor], Any]) -> None:
    def corrupting(run: Run) -> Any:
        w, h = run.leaf(), run.leaf(requires_grad=False)
        out = w * h  # saved

        def write() -> None:
            with _preserve(h):
                hide(h)  # written

        run.write(write)
        out.sum().backward()
        return [w.grad]

    def of_an_output(run: Run) -> Any:
        w = run.leaf()
        out = w.exp()  # saved

        def write() -> None:
            h = out.detach()
            with _preserve(h):
                hide(h)  # written

        run.write(write)
        out.sum().backward()
        return [w.grad]

    def with_others(run: Run) -> Any:
        w, h, other = run.leaf(), run.leaf(requires_grad=False), run.leaf(requires_grad=False)
        out = w * h  # saved

        def write() -> None:
            with _preserve((other, h)):
                hide(other)
                hide(h)  # written

        run.write(write)
        out.sum().backward()
        return [w.grad]

    def of_another(run: Run) -> Any:
        w, h, other = run.leaf(), run.leaf(requires_grad=False), run.leaf(requires_grad=False)
        out = w * h

        def write() -> None:
            with _preserve((other, h)):
                hide(other)

        run.write(write)
        out.sum().backward()
        return [w.grad]

    def after_backward(run: Run) -> Any:
        w, h = run.leaf(), run.leaf(requires_grad=False)
        (w * h).sum().backward()

        def write() -> None:
            with _preserve(h):
                hide(h)

        run.write(write)
        return [w.grad]

    def another_part(run: Run) -> Any:
        both = torch.ones(2, 3, 4)
        w = run.leaf()
        out = w * both[0]

        def write() -> None:
            with _preserve(both):
                hide(both[1])

        run.write(write)
        out.sum().backward()
        return [w.grad]

    full = f"preserved_{name}"
    names = [full]
    add(corrupting, name=full, route=PRESERVED, kind="corrupting", caught="read", every_call="read")
    for body in (of_an_output, with_others):
        names.append(f"{full}_{body.__name__}")
        lacks = lacks_blocks_of_several if body is with_others else no_lack
        add(body, name=names[-1], route=PRESERVED, kind="corrupting", caught="read", every_call="read", lacks=lacks)
    for twin in (of_another, after_backward, another_part):
        lacks = lacks_blocks_of_several if twin is of_another else no_lack
        add(twin, name=f"{full}_{twin.__name__}", route=PRESERVED, kind="innocent", twin_of=names, lacks=lacks)


for _name, _hide in HIDDEN.items():
    _add_hidden(_name, _hide)


@program(route=PRESERVED, kind="innocent", twin_of="preserved_in_place")
def preserved_and_nothing_written(run: Run) -> Any:
    w, h = run.leaf(), run.leaf(requires_grad=False)
    out = w * h

    def write() -> None:
        with _preserve(h):
            h.sum()

    run.write(write)
    out.sum().backward()
    return [w.grad]


@program(route=PRESERVED, kind="innocent", twin_of="preserved_in_place")
def preserved_and_put_back_in_the_block(run: Run) -> Any:
    w, h = run.leaf(), run.leaf(requires_grad=False)
    out = w * h
    kept = h.clone()

    def write() -> None:
        with _preserve(h):
            h.zero_()
            h.copy_(kept)

    run.write(write)
    out.sum().backward()
    return [w.grad]


@program(route=PRESERVED, kind="unread")
def preserved_and_put_back_in_another_block(run: Run) -> Any:
    """Memory that is freed after the forward and filled again before backward."""
    w, h = run.leaf(), run.leaf(requires_grad=False)
    out = w * h
    kept = h.clone()

    def free() -> None:
        with _preserve(h):
            h.zero_()

    def refill() -> None:
        with _preserve(h):
            h.copy_(kept)

    run.write(free)
    run.write(refill)
    out.sum().backward()
    return [w.grad]


@program(route=PRESERVED, kind="corrupting", caught="read", every_call="read")
def saved_in_the_block(run: Run) -> Any:
    w, h = run.leaf(), run.leaf(requires_grad=False)
    with _preserve(h):
        out = w * h  # saved
        run.write(lambda: h.zero_())
    out.sum().backward()
    return [w.grad]


@program(route=PRESERVED, kind="innocent", twin_of="saved_in_the_block", truth="cloned saves")
def saved_in_the_block_after_the_write(run: Run) -> Any:
    w, h = run.leaf(), run.leaf(requires_grad=False)
    with _preserve(h):
        run.write(lambda: h.data.mul_(2))
        out = w * h
    out.sum().backward()
    return [w.grad]


@program(route=PRESERVED, kind="refused", repairable=False)
def written_and_saved_in_the_block(run: Run) -> Any:
    """The save's version is one that the counter loses: PyTorch refuses it."""
    w, h = run.leaf(), run.leaf(requires_grad=False)
    with _preserve(h):
        run.write(lambda: h.mul_(2))
        out = w * h
    out.sum().backward()
    return [w.grad]


@program(route=PRESERVED, kind="refused")
def read_in_the_block(run: Run) -> Any:
    w, h = run.leaf(), run.leaf(requires_grad=False)
    out = w * h
    with _preserve(h):
        run.write(lambda: h.zero_())
        out.sum().backward()
    return [w.grad]


@program(route=PRESERVED, kind="refused")
def written_before_the_block(run: Run) -> Any:
    w, h = run.leaf(), run.leaf(requires_grad=False)
    out = w * h
    run.write(lambda: h.zero_())
    with _preserve(h):
        h.add_(1)
    out.sum().backward()
    return [w.grad]


@program(route=PRESERVED, kind="corrupting")
def through_data_in_the_block(run: Run) -> Any:
    w, h = run.leaf(), run.leaf(requires_grad=False)
    out = w * h  # saved

    def write() -> None:
        with _preserve(h):
            h.data.zero_()  # written

    run.write(write)
    out.sum().backward()
    return [w.grad]


@program(route=PRESERVED, kind="innocent", twin_of="through_data_in_the_block")
def through_data_of_a_clone_in_the_block(run: Run) -> Any:
    w, h = run.leaf(), run.leaf(requires_grad=False)
    out = w * h

    def write() -> None:
        with _preserve(h):
            h.data.clone().zero_()

    run.write(write)
    out.sum().backward()
    return [w.grad]


@program(route=PRESERVED, kind="corrupting", caught="read", every_call="read")
def weight_updated_under_a_preserved_counter(run: Run) -> Any:
    w, x = run.leaf(), run.leaf()
    out = (w * x).square()  # saved

    def write() -> None:
        with torch.no_grad(), _preserve(w):
            w.sub_(0.5)  # written

    run.write(write)
    out.sum().backward()
    return [x.grad]


@program(route=PRESERVED, kind="innocent", twin_of="weight_updated_under_a_preserved_counter")
def weight_updated_under_a_preserved_counter_in_time(run: Run) -> Any:
    w, x = run.leaf(), run.leaf()
    (w * x).square().sum().backward()

    def write() -> None:
        with torch.no_grad(), _preserve(w):
            w.sub_(0.5)

    run.write(write)
    return [x.grad]


@program(route=PRESERVED, kind="corrupting", allowed=True)
def preserved_and_allowed(run: Run) -> Any:
    import torchguard

    w, h = run.leaf(), run.leaf(requires_grad=False)
    out = w * h

    def write() -> None:
        with torchguard.allow("a test"), _preserve(h):
            h.zero_()

    run.write(write)
    out.sum().backward()
    return [w.grad]


@program(route=PRESERVED, kind="corrupting", caught="read", every_call="read")
def nested_blocks(run: Run) -> Any:
    w, h = run.leaf(), run.leaf(requires_grad=False)
    out = w * h  # saved

    def write() -> None:
        with _preserve(h), _preserve(h):
            h.zero_()  # written

    run.write(write)
    out.sum().backward()
    return [w.grad]


@program(route=PRESERVED, kind="innocent", twin_of="nested_blocks")
def nested_blocks_around_nothing(run: Run) -> Any:
    w, h = run.leaf(), run.leaf(requires_grad=False)
    out = w * h

    def write() -> None:
        with _preserve(h), _preserve(h):
            h.mul_(1)

    run.write(write)
    out.sum().backward()
    return [w.grad]


#: What points a saved tensor at elements 40 to 43 of its buffer, which hold the same values.
MOVES: dict[str, Callable[[torch.Tensor], Any]] = {
    "as_strided_": lambda h: h.as_strided_((4,), (1,), 40),
    "as_strided_function": lambda h: torch.as_strided_(h, (4,), (1,), 40),
    "as_strided_unbound": lambda h: torch.Tensor.as_strided_(h, (4,), (1,), 40),
    "set_": lambda h: h.set_(h.untyped_storage(), 40, (4,), (1,)),
    "set_unbound": lambda h: torch.Tensor.set_(h, h.untyped_storage(), 40, (4,), (1,)),
    "data_of_data": lambda h: setattr(h, "data", h.data.as_strided((4,), (1,), 40)),
    "resize_and_back": lambda h: h.as_strided_((2,), (1,), 40).resize_(4),
}


def _moved_within_a_crowded_storage(name: str, move: Callable[[torch.Tensor], Any]) -> None:
    """Many saves lie in one storage, and which part each occupies has been looked up before one is moved."""

    def body_for(first: int) -> Callable[[Run], Any]:
        def body(run: Run) -> Any:
            b, ws = torch.arange(600.0) % 40, [run.leaf([1.0] * 4) for _ in range(100)]
            kept = [(b[100 + 4 * i : 104 + 4 * i] * w).sum() for i, w in enumerate(ws)]
            w, h = run.leaf([1.0] * 4), b[:4]
            out = w * h  # saved
            b[550:].data.zero_()
            with _preserve(h):
                move(h)
            run.write(lambda: b[first : first + 2].data.fill_(7.0))
            (out.sum() + torch.stack(kept).sum()).backward()
            return [w.grad, *(w.grad for w in ws)]

        return body

    full = f"crowded_{name}_elsewhere"
    add(body_for(41), name=full, route=PRESERVED, kind="corrupting")
    add(body_for(1), name=f"{full}_old_place_written", route=PRESERVED, kind="innocent", twin_of=full)


for _name, _move in MOVES.items():
    _moved_within_a_crowded_storage(_name, _move)


# ---- optimisers, scaling ------------------------------------------------------------------------------------------

OPTIMISERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
    "sgd_momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
    "adam_amsgrad": lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, fused=True),
}


def _add_optimiser(name: str, make: Callable[[Any], torch.optim.Optimizer]) -> None:
    def between(run: Run) -> Any:
        w, x = run.leaf(), run.leaf()
        optimiser = make([w])
        (w * 2).sum().backward()
        out = w * x  # saved
        run.write(lambda: optimiser.step())
        out.sum().backward()
        return [x.grad]

    def after(run: Run) -> Any:
        w, x = run.leaf(), run.leaf()
        optimiser = make([w])
        (w * x).sum().backward()
        run.write(lambda: optimiser.step())
        return [x.grad]

    def of_other_parameters(run: Run) -> Any:
        w, x, other = run.leaf(), run.leaf(), run.leaf()
        optimiser = make([other])
        (other * 2).sum().backward()
        out = w * x
        run.write(lambda: optimiser.step())
        out.sum().backward()
        return [x.grad]

    full = f"fused_{name}"
    add(between, name=full, route=FUSED, kind="corrupting")
    add(after, name=f"{full}_after_backward", route=FUSED, kind="innocent", twin_of=full)
    add(of_other_parameters, name=f"{full}_of_other_parameters", route=FUSED, kind="innocent", twin_of=full)


for _name, _optimiser in OPTIMISERS.items():
    _add_optimiser(_name, _optimiser)


@program(route=FUSED, kind="corrupting")
def momentum_saved_and_stepped(run: Run) -> Any:
    """The optimiser's state is in a graph."""
    w, x = run.leaf(), run.leaf()
    optimiser = torch.optim.SGD([w], lr=0.1, momentum=0.9, fused=True)
    (w * 2).sum().backward()
    optimiser.step()
    out = x * optimiser.state[w]["momentum_buffer"]  # saved
    run.write(lambda: optimiser.step())
    out.sum().backward()
    return [x.grad]


@program(route=FUSED, kind="innocent", twin_of="momentum_saved_and_stepped")
def momentum_copied_and_stepped(run: Run) -> Any:
    w, x = run.leaf(), run.leaf()
    optimiser = torch.optim.SGD([w], lr=0.1, momentum=0.9, fused=True)
    (w * 2).sum().backward()
    optimiser.step()
    out = x * optimiser.state[w]["momentum_buffer"].clone()
    run.write(lambda: optimiser.step())
    out.sum().backward()
    return [x.grad]


def _scaler(w: torch.Tensor) -> Callable[[], Any]:
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    optimiser = torch.optim.SGD([w], lr=0.1)
    scaler.scale(torch.ones(()))
    return lambda: scaler.unscale_(optimiser)


@program(route=FUSED, kind="corrupting")
def gradients_unscaled_that_are_saved(run: Run) -> Any:
    """A penalty on the gradient is in the graph while the scaler divides the gradient in place."""
    w, x = run.leaf(), run.leaf()
    unscale = _scaler(w)
    w.grad = torch.full((3, 4), 8.0)
    out = x * w.grad  # saved
    run.write(unscale)
    out.sum().backward()
    return [x.grad]


@program(route=FUSED, kind="innocent", twin_of="gradients_unscaled_that_are_saved")
def gradients_unscaled(run: Run) -> Any:
    w, x = run.leaf(), run.leaf()
    unscale = _scaler(w)
    w.grad = torch.full((3, 4), 8.0)
    out = x * w.grad.clone()
    run.write(unscale)
    out.sum().backward()
    return [x.grad]


@program(route="rebinding", kind="corrupting")
def vector_to_saved_parameters(run: Run) -> Any:
    w, x = run.leaf(), run.leaf()
    out = w * x  # saved
    run.write(lambda: nn.utils.vector_to_parameters(torch.arange(12.0), [w]))
    out.sum().backward()
    return [x.grad]


@program(route="rebinding", kind="innocent", twin_of="vector_to_saved_parameters")
def vector_to_parameters_that_backward_has_read(run: Run) -> Any:
    w, x = run.leaf(), run.leaf()
    (w * x).sum().backward()
    run.write(lambda: nn.utils.vector_to_parameters(torch.arange(12.0), [w]))
    return [x.grad]


@program(route="rebinding", kind="innocent", twin_of="vector_to_saved_parameters")
def vector_of_the_same_values_to_parameters(run: Run) -> Any:
    w, x = run.leaf(), run.leaf()
    out = w * x
    run.write(lambda: nn.utils.vector_to_parameters(nn.utils.parameters_to_vector([w]).detach().clone(), [w]))
    out.sum().backward()
    return [x.grad]


# ---- operators ----------------------------------------------------------------------------------------------------


def _observed(minimum: torch.Tensor, on: int) -> list[Any]:
    state = [torch.tensor([on]), torch.tensor([1]), minimum, torch.ones(1), torch.ones(1)]
    return [torch.arange(6.0) - 3, *state, torch.zeros(1, dtype=torch.int32), 0.5, 0, 255, 0]


WRITERS: dict[str, tuple[Callable[[torch.Tensor], Any], tuple[int, ...]]] = {
    "observer": (lambda h: torch.fused_moving_avg_obs_fake_quant(*_observed(h, 1)), (1,)),
    "noise": (lambda h: torch._C._nn.rrelu_with_noise(-torch.ones(3, 4), h, 0.2, 0.4, True), (3, 4)),
    "noise_in_place": (lambda h: torch._C._nn.rrelu_with_noise_(-torch.ones(3, 4), h, 0.2, 0.4, True), (3, 4)),
    "unscale": (lambda h: torch._amp_foreach_non_finite_check_and_unscale_([h], torch.zeros(1), torch.ones(1) / 4), (3,)),
    "cummax": (lambda h: torch._cummax_helper(torch.arange(3.0), h, torch.zeros(3, dtype=torch.long), 0), (3,)),
    "apply": (lambda h: h.apply_(lambda v: v + 1), (3, 4)),
    "map": (lambda h: h.map_(torch.ones(3, 4), lambda v, u: v + u), (3, 4)),
}  # fmt: skip


def _add_writer(name: str, write: Callable[[torch.Tensor], Any], shape: tuple[int, ...]) -> None:
    def saved(run: Run) -> Any:
        w, h = torch.ones(shape, requires_grad=True), torch.full(shape, 5.0)
        out = w * h  # saved
        run.write(write, h)
        out.sum().backward()
        return [w.grad]

    def through_data(run: Run) -> Any:
        w, h = torch.ones(shape, requires_grad=True), torch.full(shape, 5.0)
        out = w * h  # saved
        run.write(write, h.data)
        out.sum().backward()
        return [w.grad]

    def a_clone(run: Run) -> Any:
        w, h = torch.ones(shape, requires_grad=True), torch.full(shape, 5.0)
        out = w * h
        run.write(write, h.clone())
        out.sum().backward()
        return [w.grad]

    def after_backward(run: Run) -> Any:
        w, h = torch.ones(shape, requires_grad=True), torch.full(shape, 5.0)
        (w * h).sum().backward()
        run.write(write, h)
        return [w.grad]

    names = [f"writer_{name}", f"writer_{name}_through_data"]
    add(saved, name=names[0], route=OPERATOR, kind="corrupting", exact=False)
    add(through_data, name=names[1], route=OPERATOR, kind="corrupting", exact=False)
    for twin in (a_clone, after_backward):
        add(twin, name=f"writer_{name}_{twin.__name__}", route=OPERATOR, kind="innocent", twin_of=names)


for _name, (_write, _shape) in WRITERS.items():
    _add_writer(_name, _write, _shape)


@program(route=OPERATOR, kind="innocent", twin_of="writer_observer")
def observer_that_is_off(run: Run) -> Any:
    w, h = torch.ones(1, requires_grad=True), torch.full((1,), 5.0)
    out = w * h
    run.write(lambda: torch.fused_moving_avg_obs_fake_quant(*_observed(h, 0)))
    out.sum().backward()
    return [w.grad]


@program(route=OPERATOR, kind="innocent", twin_of="writer_observer")
def quantisation_aware_training(run: Run) -> Any:
    """The observer's own graph saves nothing that it writes."""
    fake = torch.ao.quantization.FusedMovingAvgObsFakeQuantize()
    x = run.leaf()
    out = fake(x)
    run.write(lambda: fake(torch.arange(12.0).reshape(3, 4)))
    out.sum().backward()
    return [x.grad]
