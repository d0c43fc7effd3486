"""Checkpoints run their function again in backward: what it reads must be what it was, whoever wrote to it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from harness import Run, add
from torch import nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

import torchguard

Body = Callable[..., Any]
Kind = Callable[..., Any]

ROUTE = "checkpoint"

torch.utils.swap_tensors(torch.ones(1), torch.ones(1))  # has Python note the slots of torch.Tensor, once and for all


# ---- kinds of checkpoint --------------------------------------------------------------------------------------------


def _reentrant(run: Run, body: Body, *args: Any) -> Any:
    return run.checkpoint(use_reentrant=True)(body, *args)  # saved


def _non_reentrant(run: Run, body: Body, *args: Any) -> Any:
    return run.checkpoint(use_reentrant=False)(body, *args)  # saved


def _to_the_end(run: Run, body: Body, *args: Any) -> Any:
    with set_checkpoint_early_stop(False):
        return run.checkpoint(use_reentrant=False, determinism_check="none")(body, *args)  # saved


def _selective(run: Run, body: Body, *args: Any) -> Any:
    """Products of matrices are kept, all else is computed again."""
    policy = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
    return run.checkpoint(use_reentrant=False, context_fn=policy)(body, *args)  # saved


def _selective_by_policy(run: Run, body: Body, *args: Any) -> Any:
    def policy(_: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        keep = op in (torch.ops.aten.addmm.default, torch.ops.aten.tanh.default)
        return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, policy)
    return run.checkpoint(use_reentrant=False, context_fn=contexts)(body, *args)  # saved


def _nested(run: Run, body: Body, *args: Any) -> Any:
    inner = run.checkpoint(use_reentrant=False)
    return run.checkpoint(use_reentrant=False)(lambda *args: inner(body, *args).sin(), *args)  # saved


def _nested_reentrant(run: Run, body: Body, *args: Any) -> Any:
    inner = run.checkpoint(use_reentrant=True)
    return run.checkpoint(use_reentrant=True)(lambda *args: inner(body, *args).sin(), *args)  # saved


KINDS: dict[str, Kind] = {
    "reentrant": _reentrant,
    "non_reentrant": _non_reentrant,
    "to_the_end": _to_the_end,
    "selective": _selective,
    "nested": _nested,
    "nested_reentrant": _nested_reentrant,
}


# ---- what is read, and how it is written ----------------------------------------------------------------------------


class _Block(nn.Module):
    """Reads a weight, a bias, a buffer, a mask, a table and a flag; each of them matters to some gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))
        self.bias = nn.Parameter(torch.randn(4))
        self.register_buffer("mean", torch.randn(4))
        self.mask = torch.tensor([1.0, 0.0, 1.0, 1.0])
        self.table = torch.randn(6, 4)
        self.rows = torch.tensor([1, 4, 2])
        self.keep = torch.tensor([True, False, True, True])
        self.scales = {"out": torch.tensor(1.5)}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.linear(x, self.weight, bias=self.bias).tanh()
        h = (h - self.mean).sigmoid() * self.mask
        h = (h + F.embedding(self.rows, self.table)).exp()
        h = torch.where(self.keep, h, h.sin())
        return torch.tanh(h * self.scales["out"])


WRITES: dict[str, Callable[[_Block], Any]] = {
    "tracked_weight": lambda m: m.weight.add_(1),
    "tracked_bias": lambda m: m.bias.mul_(-2),
    "tracked_buffer": lambda m: m.mean.copy_(torch.ones(4)),
    "tracked_mask": lambda m: m.mask.fill_(0.5),
    "tracked_mask_item": lambda m: m.mask.__setitem__(1, 1.0),
    "tracked_table": lambda m: m.table.neg_(),
    "tracked_row": lambda m: m.table[4].add_(1),
    "tracked_rows": lambda m: m.rows.sub_(1),
    "tracked_flags": lambda m: m.keep.logical_not_(),
    "tracked_scale": lambda m: m.scales["out"].add_(1),
    "silent_weight": lambda m: m.weight.data.add_(1),
    "silent_bias": lambda m: m.bias.data.mul_(-2),
    "silent_buffer": lambda m: m.mean.data.zero_(),
    "silent_mask": lambda m: m.mask.data.fill_(0.5),
    "silent_slice_of_the_bias": lambda m: m.bias.data[1:3].add_(1),
    "detached_bias": lambda m: m.bias.detach().exp_(),
    "foreach": lambda m: torch._foreach_mul_([m.weight, m.bias], 2.0),
    "rebound_weight": lambda m: setattr(m.weight, "data", torch.ones(4, 4)),
    "rebound_bias": lambda m: setattr(m.bias, "data", torch.ones(4)),
    "rebound_buffer": lambda m: setattr(m.mean, "data", torch.ones(4)),
    "loaded": lambda m: m.load_state_dict({key: value + 1 for key, value in m.state_dict().items()}),
    "initialised": lambda m: nn.init.constant_(m.bias, 0.25),
}
#: No patch sees these.
UNSEEN: dict[str, Callable[[_Block], Any]] = {
    "out_bias": lambda m: torch.add(m.bias.detach(), 1, out=m.bias.data),
    "out_buffer": lambda m: torch.add(m.mean, 1, out=m.mean),
    "ops_bias": lambda m: torch.ops.aten.mul_.Scalar(m.bias, 2.0),
    "set_buffer": lambda m: m.mean.set_(torch.ones(4)),
}


def _gradients(block: _Block, x: torch.Tensor) -> list[Any]:
    return [x.grad, block.weight.grad, block.bias.grad]


def _programs() -> None:
    for kind_name, kind in KINDS.items():
        for write_name, write in (WRITES | UNSEEN).items():
            name = f"checkpoint_{kind_name}_{write_name}"

            def corrupting(run: Run, kind: Kind = kind, write: Any = write) -> Any:
                block, x = _Block(), torch.randn(3, 4, requires_grad=True)
                out = kind(run, block, x)
                with torch.no_grad():
                    run.write(write, block)
                out.sum().backward()
                return _gradients(block, x)

            def after_backward(run: Run, kind: Kind = kind, write: Any = write) -> Any:
                block, x = _Block(), torch.randn(3, 4, requires_grad=True)
                out = kind(run, block, x)
                out.sum().backward()
                with torch.no_grad():
                    run.write(write, block)
                return _gradients(block, x)

            def on_another(run: Run, kind: Kind = kind, write: Any = write) -> Any:
                block, other, x = _Block(), _Block(), torch.randn(3, 4, requires_grad=True)
                kind(run, other, x).sum().backward()
                out = kind(run, block, x)
                with torch.no_grad():
                    run.write(write, other)
                out.sum().backward()
                return _gradients(block, x)

            def restored(run: Run, kind: Kind = kind, write: Any = write) -> Any:
                block, x = _Block(), torch.randn(3, 4, requires_grad=True)
                tensors = [*block.parameters(), *block.buffers(), block.mask, block.table, block.rows, block.keep]
                tensors.append(block.scales["out"])
                before = [tensor.detach().clone() for tensor in tensors]
                out = kind(run, block, x)
                with torch.no_grad():
                    run.write(write, block)
                    for tensor, value in zip(tensors, before, strict=True):
                        tensor.copy_(value)
                out.sum().backward()
                return _gradients(block, x)

            add(corrupting, name=name, route=ROUTE, kind="corrupting", caught="read", every_call="read")
            twins = [after_backward, on_another]
            if write_name in WRITES:
                twins.append(restored)
            for twin in twins:
                add(twin, name=f"{name}_{twin.__name__}", route=ROUTE, kind="innocent", twin_of=name)


_programs()

# ---- the usual mistake: a step between forward and backward ----------------------------------------------------------

OPTIMISERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, foreach=False),
    "sgd_foreach": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, foreach=True),
    "sgd_fused": lambda p: torch.optim.SGD(p, 0.1, fused=True),
    "adam_foreach": lambda p: torch.optim.Adam(p, 0.1, foreach=True),
    "adam_fused": lambda p: torch.optim.Adam(p, 0.1, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, 0.1),
    "adamw_fused": lambda p: torch.optim.AdamW(p, 0.1, fused=True),
    "adagrad_fused": lambda p: torch.optim.Adagrad(p, 0.1, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.1),
}


def _mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4), nn.Sigmoid())


def _biases(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.dim() == 1]


def _steps() -> None:
    for kind_name in ("reentrant", "non_reentrant"):
        kind = KINDS[kind_name]
        for which, parameters in (("all", lambda model: list(model.parameters())), ("biases", _biases)):
            for optimiser_name, make in OPTIMISERS.items():
                name = f"checkpoint_{kind_name}_step_of_{optimiser_name}_{which}"

                def before(run: Run, kind: Kind = kind, make: Any = make, parameters: Any = parameters) -> Any:
                    model, x = _mlp(), torch.randn(3, 4, requires_grad=True)
                    optimiser = make(parameters(model))
                    kind(run, model, x).sum().backward()
                    out = kind(run, model, x)
                    run.write(lambda: optimiser.step())
                    out.sum().backward()
                    return [x.grad, *(p.grad for p in model.parameters())]

                def after(run: Run, kind: Kind = kind, make: Any = make, parameters: Any = parameters) -> Any:
                    model, x = _mlp(), torch.randn(3, 4, requires_grad=True)
                    optimiser = make(parameters(model))
                    for _ in range(3):
                        model.zero_grad()
                        for _ in range(2):
                            loss = kind(run, model, x).sum()
                            loss.backward()  # and the loss stays bound
                        run.write(lambda: optimiser.step())
                    return [x.grad, *model.parameters()]

                add(before, name=name, route=ROUTE, kind="corrupting", caught="read", every_call="read")
                add(after, name=f"{name}_after", route=ROUTE, kind="innocent", twin_of=name, truth="cloned saves")


_steps()


# ---- read, and yet nothing depends on it -----------------------------------------------------------------------------


class _Tail(nn.Module):
    """What it ends with is added, and no gradient depends on that."""

    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), last

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x).tanh())


LAST: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(4, 4),
    "layer_norm": lambda: nn.LayerNorm(4),
    "group_norm": lambda: nn.GroupNorm(2, 4),
    "batch_norm": lambda: nn.BatchNorm1d(4),
    "conv": lambda: nn.Sequential(nn.Unflatten(0, (1, 3)), nn.Conv1d(3, 3, 1)),
    "two_linears": lambda: nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)),
}


def _last_bias(tail: _Tail) -> nn.Parameter:
    return _biases(tail.last)[-1]


def _ends() -> None:
    for kind_name, kind in KINDS.items():
        if kind_name.startswith("nested"):
            continue  # their outer function goes on computing
        for last_name, make in LAST.items():
            for write_name, write in {
                "tracked": lambda tail: _last_bias(tail).add_(1),
                "silent": lambda tail: _last_bias(tail).data.add_(1),
            }.items():
                name = f"checkpoint_{kind_name}_{write_name}_bias_of_the_last_{last_name}"

                def ends(run: Run, kind: Kind = kind, make: Any = make, write: Any = write) -> Any:
                    tail, x = _Tail(make()), torch.randn(3, 4, requires_grad=True)
                    out = kind(run, tail, x)
                    with torch.no_grad():
                        run.write(write, tail)
                    out.sum().backward()
                    return [x.grad, *(p.grad for p in tail.parameters())]

                def goes_on(run: Run, kind: Kind = kind, make: Any = make, write: Any = write) -> Any:
                    tail, x = _Tail(make()), torch.randn(3, 4, requires_grad=True)
                    out = kind(run, lambda x: tail(x).exp(), x)
                    with torch.no_grad():
                        run.write(write, tail)
                    out.sum().backward()
                    return [x.grad, *(p.grad for p in tail.parameters())]

                add(goes_on, name=f"{name}_but_one", route=ROUTE, kind="corrupting", caught="read", every_call="read")
                add(ends, name=name, route=ROUTE, kind="innocent", twin_of=f"{name}_but_one")


_ends()


def _other_parts() -> None:
    """The part of a tensor that is not looked at."""
    parts: dict[str, tuple[Body, Callable[[torch.Tensor], Any], Callable[[torch.Tensor], Any]]] = {
        "embedding": (
            lambda x, t: (x + F.embedding(torch.tensor([1, 2, 2]), t)).exp(),
            lambda t: t[2].add_(1),
            lambda t: t[3].add_(1),
        ),
        "row": (lambda x, t: (x * t[1]).exp(), lambda t: t[1].add_(1), lambda t: t[0].add_(1)),
        "rows": (lambda x, t: (x * t[torch.tensor([0, 2, 4])]).exp(), lambda t: t[4].zero_(), lambda t: t[3].zero_()),
        "masked": (
            lambda x, t: (x * t[:3].masked_fill(torch.eye(3, 4).bool(), 1.0)).exp(),
            lambda t: t[0, 1].add_(1),
            lambda t: t[0, 0].add_(1),
        ),
        "clamped": (
            lambda x, t: (x * (t[0] + 10).clamp(max=5.0)).exp(),
            lambda t: t[0].sub_(20),
            lambda t: t[0].add_(1),
        ),
        "flag": (
            lambda x, t: x.exp() if t.sum() > 100 else x.sin(),
            lambda t: t.add_(100),
            lambda t: t.add_(0.01),
        ),
        "number": (lambda x, t: (x * t[0, 0].item()).exp(), lambda t: t[0, 0].add_(1), lambda t: t[0, 1].add_(1)),
        "shape": (lambda x, t: (x * t.size(1)).exp() * t[0].exp(), lambda t: t[0].add_(1), lambda t: t[5].add_(1)),
    }
    for kind_name, kind in KINDS.items():
        for part_name, (body, inside, outside) in parts.items():
            if (kind_name, part_name) == ("selective", "flag"):
                continue  # PyTorch itself misses what it kept
            name = f"checkpoint_{kind_name}_part_{part_name}"

            def program_of(run: Run, write: Any, kind: Kind = kind, body: Body = body) -> Any:
                table = torch.randn(6, 4)
                x = torch.randn(3, 4, requires_grad=True)
                out = kind(run, lambda x: body(x, table), x)
                run.write(write, table)
                out.sum().backward()
                return [x.grad]

            add(
                lambda run, inside=inside, program_of=program_of: program_of(run, inside),
                name=name,
                route=ROUTE,
                kind="corrupting",
                caught="read",
                every_call="read",
            )
            add(
                lambda run, outside=outside, program_of=program_of: program_of(run, outside),
                name=f"{name}_beside_it",
                route=ROUTE,
                kind="innocent",
                twin_of=name,
            )


_other_parts()


# ---- what the function writes itself ---------------------------------------------------------------------------------


class _Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.cumulative = nn.BatchNorm1d(4, momentum=None)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))
        self.register_buffer("average", torch.zeros(4))
        self.register_buffer("cache", torch.zeros(3, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.steps += 1
        h = self.cumulative(self.norm(self.linear(x))).tanh()
        with torch.no_grad():
            self.average.mul_(0.9).add_(h.mean(0), alpha=0.1)
            self.cache.copy_(h)
        return (h * self.cache).exp()


def _own_writes() -> None:
    for kind_name, kind in KINDS.items():
        name = f"checkpoint_{kind_name}_weight_of_a_module_that_counts"

        def counting(run: Run, write: Any, kind: Kind = kind) -> Any:
            model, x = _Counting(), torch.randn(3, 4, requires_grad=True)
            out = kind(run, model, x)
            with torch.no_grad():
                run.write(write, model)
            out.sum().backward()
            return [x.grad, *(p.grad for p in model.parameters())]

        add(
            lambda run, counting=counting: counting(run, lambda model: model.norm.weight.mul_(3)),
            name=name,
            route=ROUTE,
            kind="corrupting",
            caught="read",
            every_call="read",
        )
        for what, write in {
            "statistics": lambda model: model.norm.running_mean.add_(1),
            "variance": lambda model: model.norm.running_var.data.mul_(2),
            "counter": lambda model: model.steps.add_(5),
            "its_average": lambda model: model.average.add_(5),
            "its_cache": lambda model: model.cache.add_(5),
            "batches": lambda model: model.cumulative.num_batches_tracked.add_(5),
            "bias_before_norm": lambda model: torch.zeros(3).add_(1),
        }.items():
            add(
                lambda run, counting=counting, write=write: counting(run, write),
                name=f"{name}_{what}",
                route=ROUTE,
                kind="innocent",
                twin_of=name,
            )

        def evaluated(run: Run, write: Any, kind: Kind = kind) -> Any:
            model, x = _Counting().eval(), torch.randn(3, 4, requires_grad=True)
            out = kind(run, lambda x: model.norm(model.linear(x)).tanh(), x)
            with torch.no_grad():
                run.write(write, model)
            out.sum().backward()
            return [x.grad, *(p.grad for p in model.parameters())]

        name = f"checkpoint_{kind_name}_statistics_in_evaluation"
        add(
            lambda run, evaluated=evaluated: evaluated(run, lambda model: model.norm.running_mean.add_(1)),
            name=name,
            route=ROUTE,
            kind="corrupting",
            caught="read",
            every_call="read",
        )
        add(
            lambda run, evaluated=evaluated: evaluated(run, lambda model: model.norm.num_batches_tracked.add_(1)),
            name=f"{name}_counter",
            route=ROUTE,
            kind="innocent",
            twin_of=name,
        )

        def writes_what_it_read(run: Run, kind: Kind = kind) -> Any:
            scale, x = torch.full((4,), 2.0), torch.randn(3, 4, requires_grad=True)

            def body(x: torch.Tensor) -> torch.Tensor:
                h = (x * scale).exp()
                run.write(lambda: scale.mul_(0.5))
                return h

            kind(run, body, x).sum().backward()
            return [x.grad]

        def reads_what_it_wrote(run: Run, kind: Kind = kind) -> Any:
            scale, x = torch.full((4,), 2.0), torch.randn(3, 4, requires_grad=True)

            def body(x: torch.Tensor) -> torch.Tensor:
                run.write(lambda: scale.add_(1))
                scale.copy_(x.detach()[0])
                return (x * scale).exp()

            kind(run, body, x).sum().backward()
            return [x.grad]

        if kind_name.endswith("reentrant") and kind_name != "non_reentrant":
            continue  # PyTorch refuses it: it computes the whole graph again
        name = f"checkpoint_{kind_name}_writes_what_it_read"
        add(writes_what_it_read, name=name, route=ROUTE, kind="corrupting", caught="read", every_call="read")
        add(reads_what_it_wrote, name=f"{name}_only_after", route=ROUTE, kind="innocent", twin_of=name)


_own_writes()


# ---- modules as they come --------------------------------------------------------------------------------------------


class _Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 4, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.lstm(x[None])[0][0].tanh()


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x[None])[0]


class _Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, scale)
        return x * x * scale

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        x, scale = ctx.saved_tensors
        return 2 * x * scale * grads[0], None


class _Custom(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Square.apply(self.linear(x), self.linear.bias)


class _InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = F.relu(self.first(x), inplace=True)
        h = self.second(h).mul_(2)
        h[0] = h[1] * 2
        return h.add_(1).sigmoid_()


class _Autocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.linear(x).float().tanh()


MODULES: dict[str, Callable[[], nn.Module]] = {
    "mlp": _mlp,
    "lstm": _Lstm,
    "attention": _Attention,
    "attention_in_evaluation": lambda: _Attention().eval(),
    "custom_function": _Custom,
    "in_place": _InPlace,
    "autocast": _Autocast,
    "dropout": lambda: nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Tanh(), nn.Linear(4, 4), nn.GELU()),
    "convolution": lambda: nn.Sequential(nn.Unflatten(0, (1, 3)), nn.Conv1d(3, 3, 3, padding=1), nn.Softmax(-1)),
    "norms": lambda: nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4), nn.GroupNorm(2, 4), nn.SiLU(), nn.LayerNorm(4)),
    "weight_norm": lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)), nn.Tanh()),
    "spectral_norm": lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)).eval(), nn.Tanh()),
}


def _modules() -> None:
    for kind_name in ("reentrant", "non_reentrant", "selective", "nested", "nested_reentrant"):
        kind = KINDS[kind_name]
        for module_name, make in MODULES.items():
            if (kind_name, module_name) == ("nested_reentrant", "attention_in_evaluation"):
                continue  # the fast path computes other bits, and the outer function saves them
            name = f"checkpoint_{kind_name}_module_{module_name}"

            def before(run: Run, kind: Kind = kind, make: Any = make) -> Any:
                module, x = make(), torch.randn(3, 4, requires_grad=True)
                out = kind(run, module, x)
                with torch.no_grad():
                    run.write(lambda: torch._foreach_mul_(list(module.parameters()), 0.5))
                out.sum().backward()
                return [x.grad, *(p.grad for p in module.parameters())]

            def after(run: Run, kind: Kind = kind, make: Any = make) -> Any:
                module, x = make(), torch.randn(3, 4, requires_grad=True)
                for _ in range(2):
                    kind(run, module, x).sum().backward()
                    with torch.no_grad():
                        run.write(lambda: torch._foreach_mul_(list(module.parameters()), 0.5))
                return [x.grad, *(p.grad for p in module.parameters())]

            add(before, name=name, route=ROUTE, kind="corrupting", caught="read", every_call="read")
            add(after, name=f"{name}_after", route=ROUTE, kind="innocent", twin_of=name, truth="cloned saves")


_modules()


# ---- arguments, and what else can be at hand -------------------------------------------------------------------------

GLOBAL = torch.ones(4)


def _body(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (x * scale).exp()


def _arguments() -> None:
    """How the function comes by a tensor; what is an argument is saved, and PyTorch and the guard watch it as ever."""
    forms: dict[str, Callable[[Run, Kind, torch.Tensor, torch.Tensor], Any]] = {
        "closure": lambda run, kind, x, t: kind(run, lambda x: _body(x, t), x),
        "default": lambda run, kind, x, t: kind(run, lambda x, t=t: _body(x, t), x),
        "partial": lambda run, kind, x, t: kind(run, functools.partial(_body, scale=t), x),
        "list": lambda run, kind, x, t: kind(run, lambda x, items: _body(x, items[0]), x, [t]),
        "dictionary": lambda run, kind, x, t: kind(run, lambda x, items: _body(x, **items), x, {"scale": t}),
        "view": lambda run, kind, x, t: kind(run, lambda x: _body(x, t[None].expand(3, 4).contiguous()), x),
        "data": lambda run, kind, x, t: kind(run, lambda x: _body(x, t.data), x),
        "array": lambda run, kind, x, t: kind(run, lambda x: _body(x, torch.tensor(t.tolist())), x),
        "ops": lambda run, kind, x, t: kind(run, lambda x: torch.ops.aten.mul.Tensor(x, t).exp(), x),
        "global": lambda run, kind, x, t: (GLOBAL.set_(t), kind(run, lambda x: _body(x, GLOBAL), x))[1],
    }
    for kind_name, kind in KINDS.items():
        for form_name, form in forms.items():
            if (kind_name, form_name) == ("selective", "array"):
                continue
            name = f"checkpoint_{kind_name}_reads_from_{form_name}"

            def corrupting(run: Run, kind: Kind = kind, form: Any = form) -> Any:
                x, t = torch.randn(3, 4, requires_grad=True), torch.randn(4)
                out = form(run, kind, x, t)
                run.write(lambda: t.add_(1))
                out.sum().backward()
                return [x.grad]

            def written_before(run: Run, kind: Kind = kind, form: Any = form) -> Any:
                x, t = torch.randn(3, 4, requires_grad=True), torch.randn(4)
                for _ in range(3):
                    run.write(lambda: t.add_(1))
                    form(run, kind, x, t).sum().backward()
                return [x.grad]

            add(corrupting, name=name, route=ROUTE, kind="corrupting", caught="read", every_call="read")
            add(written_before, name=f"{name}_later", route=ROUTE, kind="innocent", twin_of=name, truth="cloned saves")

        def argument(run: Run, write: Any, kind: Kind = kind) -> Any:
            x, t = torch.randn(3, 4, requires_grad=True), torch.randn(4)
            out = kind(run, _body, x, t)
            run.write(write, t)
            out.sum().backward()
            return [x.grad]

        def argument_after(run: Run, kind: Kind = kind) -> Any:
            x, t = torch.randn(3, 4, requires_grad=True), torch.randn(4)
            out = kind(run, _body, x, t)
            out.sum().backward()
            run.write(lambda: t.data.add_(1))
            return [x.grad]

        name = f"checkpoint_{kind_name}_argument"
        add(
            lambda run, argument=argument: argument(run, lambda t: t.add_(1)),
            name=f"{name}_tracked",
            route=ROUTE,
            kind="refused",
            repairable=True,
        )
        if kind_name != "nested_reentrant":
            add(
                lambda run, argument=argument: argument(run, lambda t: t.data.add_(1)),
                name=f"{name}_silent",
                route=ROUTE,
                kind="corrupting",
                repairable=True,
            )
            add(argument_after, name=f"{name}_after", route=ROUTE, kind="innocent", twin_of=f"{name}_silent")


_arguments()


def _beside_an_argument() -> None:
    """What lies in the storage of an argument is not what autograd saved of it."""
    for kind_name, kind in KINDS.items():

        def neighbour(run: Run, rows: slice, when: str, kind: Kind = kind) -> Any:
            both = torch.randn(8, 4)
            x, t = both[:3].requires_grad_(), both[3:6]
            w = torch.randn(3, 4, requires_grad=True)
            out = kind(run, lambda x, w: (x * w * t).exp(), x, w).sum()
            if when == "before":
                run.write(lambda: both[rows].data.add_(1))
            out.backward()
            if when == "after":
                run.write(lambda: both[rows].data.add_(1))
            return [x.grad, w.grad]

        name = f"checkpoint_{kind_name}_reads_beside_its_argument"
        read: dict[str, Any] = {"caught": "read", "every_call": "read"}
        add(
            functools.partial(neighbour, rows=slice(4, 5), when="before"),
            name=name,
            route=ROUTE,
            kind="corrupting",
            **read,
        )
        for twin, rows, when in (("after", slice(4, 5), "after"), ("beyond", slice(6, 8), "before")):
            body = functools.partial(neighbour, rows=rows, when=when)
            add(body, name=f"{name}_{twin}", route=ROUTE, kind="innocent", twin_of=name)

    def closed_over(run: Run, when: str) -> Any:
        x = torch.randn(3, 4, requires_grad=True)
        h = x * 1
        out = _non_reentrant(run, lambda y: (y.sin() * h).exp(), h).sum()
        if when == "before":
            run.write(lambda: h.data.add_(1))
        out.backward()
        if when == "after":
            run.write(lambda: h.data.add_(1))
        return [x.grad]

    name = "checkpoint_closes_over_its_own_argument"
    add(functools.partial(closed_over, when="before"), name=name, route=ROUTE, kind="corrupting")
    add(functools.partial(closed_over, when="after"), name=f"{name}_after", route=ROUTE, kind="innocent", twin_of=name)


_beside_an_argument()


# ---- several graphs, several backwards -------------------------------------------------------------------------------


def _lifetimes() -> None:
    for kind_name, kind in KINDS.items():

        def between_two_backwards(run: Run, kind: Kind = kind) -> Any:
            x, t = torch.randn(3, 4, requires_grad=True), torch.randn(4)
            out = kind(run, lambda x: _body(x, t), x).sum()
            out.backward(retain_graph=True)
            run.write(lambda: t.mul_(2))
            out.backward()
            return [x.grad]

        def after_two_backwards(run: Run, kind: Kind = kind) -> Any:
            x, t = torch.randn(3, 4, requires_grad=True), torch.randn(4)
            out = kind(run, lambda x: _body(x, t), x).sum()
            out.backward(retain_graph=True)
            out.backward()
            run.write(lambda: t.mul_(2))
            return [x.grad]

        def one_of_two_graphs(run: Run, kind: Kind = kind) -> Any:
            x, t = torch.randn(3, 4, requires_grad=True), torch.randn(4)
            one = kind(run, lambda x: _body(x, t), x).sum()
            other = kind(run, lambda x: _body(x, t), x).sum()
            one.backward()
            run.write(lambda: t.mul_(2))
            other.backward()
            return [x.grad]

        def dropped_graph(run: Run, kind: Kind = kind) -> Any:
            x, t = torch.randn(3, 4, requires_grad=True), torch.randn(4)
            out = kind(run, lambda x: _body(x, t), x).sum()
            del out
            run.write(lambda: t.mul_(2))
            kind(run, lambda x: _body(x, t), x).sum().backward()
            return [x.grad]

        def without_graph(run: Run, kind: Kind = kind) -> Any:
            x, t = torch.randn(3, 4, requires_grad=True), torch.randn(4)
            with torch.no_grad():
                out = kind(run, lambda x: _body(x, t), x)
            run.write(lambda: t.mul_(2))
            (out * x).sum().backward()
            return [x.grad]

        def between_segments(run: Run, kind: Kind = kind) -> Any:
            x, layers = torch.randn(3, 4, requires_grad=True), [nn.Linear(4, 4) for _ in range(3)]
            h = x
            for layer in layers:
                h = kind(run, lambda h, layer=layer: layer(h).tanh(), h)
            with torch.no_grad():
                run.write(lambda: layers[1].bias.sub_(1))
            h.sum().backward()
            return [x.grad, *(layer.weight.grad for layer in layers)]

        def averaged(run: Run, kind: Kind = kind) -> Any:
            x, layer, average = torch.randn(3, 4, requires_grad=True), nn.Linear(4, 4), nn.Linear(4, 4)
            for _ in range(2):
                with torch.no_grad():
                    target = kind(run, average, x)
                out = kind(run, lambda x: layer(x).tanh(), x)
                run.write(lambda: average.weight.data.lerp_(layer.weight.data, 0.1))
                (out * target).sum().backward()
            return [x.grad, layer.weight.grad]

        def updated_in_hooks(run: Run, kind: Kind = kind) -> Any:
            """``register_post_accumulate_grad_hook``: each parameter is updated as soon as its gradient is there."""
            x, layers = torch.randn(3, 4, requires_grad=True), [nn.Linear(4, 4) for _ in range(3)]

            def update(p: torch.Tensor) -> None:
                with torch.no_grad():
                    run.write(lambda: p.sub_(0.1 * p.grad))
                p.grad = None

            for layer in layers:
                for p in layer.parameters():
                    p.register_post_accumulate_grad_hook(update)
            for _ in range(2):
                h = x
                for layer in layers:
                    h = kind(run, lambda h, layer=layer: layer(h).tanh(), h)
                h.sum().backward()
            return [x.grad, *(p for layer in layers for p in layer.parameters())]

        def allowed(run: Run, kind: Kind = kind) -> Any:
            x, t = torch.randn(3, 4, requires_grad=True), torch.randn(4)
            out = kind(run, lambda x: _body(x, t), x).sum()
            with torchguard.allow("it is meant"):
                run.write(lambda: t.mul_(2))
            out.backward()
            return [x.grad]

        def in_another_thread(run: Run, kind: Kind = kind) -> Any:
            x, t = torch.randn(3, 4, requires_grad=True), torch.randn(4)
            out = kind(run, lambda x: _body(x, t), x).sum()
            run.in_thread(lambda: run.write(lambda: t.mul_(2)))
            out.backward()
            return [x.grad]

        def part_of_a_flat_buffer(run: Run, kind: Kind = kind) -> Any:
            flat, x = torch.randn(8), torch.randn(3, 4, requires_grad=True)
            one = nn.Parameter(flat[:4])
            out = kind(run, lambda x: _body(x, one), x).sum()
            run.write(lambda: flat[:4].add_(1))
            out.backward()
            return [x.grad, one.grad]

        def other_part_of_a_flat_buffer(run: Run, kind: Kind = kind) -> Any:
            flat, x = torch.randn(8), torch.randn(3, 4, requires_grad=True)
            one = nn.Parameter(flat[:4])
            out = kind(run, lambda x: _body(x, one), x).sum()
            run.write(lambda: flat[4:].add_(1))
            out.backward()
            return [x.grad, one.grad]

        def swapped(run: Run, kind: Kind = kind) -> Any:
            x, t = torch.randn(3, 4, requires_grad=True), torch.randn(4)
            out = kind(run, lambda x: _body(x, t), x).sum()
            run.write(lambda: torch.utils.swap_tensors(t, torch.ones(4)))
            out.backward()
            return [x.grad]

        def vector_to_parameters(run: Run, kind: Kind = kind) -> Any:
            layer, x = nn.Linear(4, 4), torch.randn(3, 4, requires_grad=True)
            out = kind(run, lambda x: layer(x).tanh(), x).sum()
            run.write(lambda: nn.utils.vector_to_parameters(torch.ones(20), layer.parameters()))
            out.backward()
            return [x.grad, layer.bias.grad]

        def name_of(body: Any, kind_name: str = kind_name) -> str:
            return f"checkpoint_{kind_name}_{body.__name__}"

        read = {"caught": "read", "every_call": "read"}
        for body in (one_of_two_graphs, between_segments, in_another_thread, part_of_a_flat_buffer, swapped):
            add(body, name=name_of(body), route=ROUTE, kind="corrupting", **read)
        add(vector_to_parameters, name=name_of(vector_to_parameters), route=ROUTE, kind="corrupting", **read)
        add(between_two_backwards, name=name_of(between_two_backwards), route=ROUTE, kind="corrupting", **read)
        add(allowed, name=name_of(allowed), route=ROUTE, kind="corrupting", allowed=True, **read)
        for body, twin_of in (
            (after_two_backwards, between_two_backwards),
            (dropped_graph, one_of_two_graphs),
            (dropped_graph, swapped),
            (without_graph, in_another_thread),
            (averaged, between_segments),
            (updated_in_hooks, vector_to_parameters),
            (other_part_of_a_flat_buffer, part_of_a_flat_buffer),
            (after_two_backwards, allowed),
        ):
            add(
                body,
                name=f"{name_of(body)}_twin_of_{twin_of.__name__}",
                route=ROUTE,
                kind="innocent",
                truth="without the write"
                if body in (after_two_backwards, other_part_of_a_flat_buffer)
                else "cloned saves",
                twin_of=name_of(twin_of),
            )


_lifetimes()


# ---- a checkpoint in a checkpoint, and nothing else ------------------------------------------------------------------


def _nested_only() -> None:
    for reentrant in (True, False):

        def nested(run: Run, write: Any, reentrant: bool = reentrant) -> Any:
            layer, x = nn.Linear(4, 4), torch.randn(3, 4, requires_grad=True)
            inner = run.checkpoint(use_reentrant=reentrant)
            out = run.checkpoint(use_reentrant=reentrant)(lambda x: inner(layer, x), x)  # saved
            with torch.no_grad():
                run.write(write, layer)
            out.sum().backward()
            return [x.grad, layer.weight.grad]

        name = f"checkpoint_that_is_only_a_checkpoint_{'reentrant' if reentrant else 'non_reentrant'}"
        add(
            lambda run, nested=nested: nested(run, lambda layer: layer.weight.mul_(2)),
            name=name,
            route=ROUTE,
            kind="corrupting",
            caught="read",
            every_call="read",
        )
        add(
            lambda run, nested=nested: nested(run, lambda layer: layer.bias.mul_(2)),
            name=f"{name}_bias",
            route=ROUTE,
            kind="innocent",
            twin_of=name,
        )


_nested_only()
