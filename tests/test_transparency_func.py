"""Do torch.func, forward-mode AD, gradcheck, checkpoint and the utilities of autograd work with the guard on as off?"""

from __future__ import annotations

import copy
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from test_transparency import GUARDS, attempt, frozen, transparent
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.autograd.graph import (
    Node,
    allow_mutation_on_saved_tensors,
    save_on_cpu,
    saved_tensors_hooks,
)
from torch.func import functional_call, grad, grad_and_value, hessian, jacfwd, jacrev, jvp, linearize, vjp, vmap
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import torchguard

pytestmark = pytest.mark.filterwarnings("ignore")


def corrupt() -> None:
    """The textbook program: plain PyTorch is silent."""
    a = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    out = a.sigmoid()
    out.data.zero_()
    out.sum().backward()


def caught() -> bool:
    try:
        corrupt()
    except torchguard.SavedTensorCorruptionError:
        return True
    return False


# ---- torch.func ---------------------------------------------------------------------------------------------------


def plain(x: torch.Tensor) -> torch.Tensor:
    return (x.sin() * x.exp()).sum()


def in_place(x: torch.Tensor) -> torch.Tensor:
    y = x * 2
    y.add_(1)
    torch.relu_(y)
    y = y * x
    y[0] = 3
    F.elu(y, inplace=True)
    z = y * 1
    z[1:] += 1
    return (z * z).sum()


def with_data(x: torch.Tensor) -> torch.Tensor:
    scale = x.data.abs().max()
    y = x / (scale.data + 1)
    z = y.exp()
    z.data
    copied = z.data.clone()
    copied.add_(1)
    return (z * copied.data).sum()


def rebinding(x: torch.Tensor) -> torch.Tensor:
    y = torch.zeros(3)
    y.data = torch.ones(3)
    y.data.mul_(2)
    return (x * y).sum()


def in_place_unary(x: torch.Tensor) -> torch.Tensor:
    return x.clone().sin_().mul_(x).exp_().sum()


FUNCTIONS = [plain, in_place, with_data, rebinding, in_place_unary]
TRANSFORMS: dict[str, Callable[[Callable[..., Any], torch.Tensor], Any]] = {
    "grad": lambda f, x: grad(f)(x),
    "grad_and_value": lambda f, x: grad_and_value(f)(x),
    "grad of grad": lambda f, x: grad(lambda t: grad(f)(t).sum())(x),
    "vjp": lambda f, x: (lambda out, pull: [out, pull(torch.ones_like(out)), pull(torch.ones_like(out))])(*vjp(f, x)),
    "jvp": lambda f, x: jvp(f, (x,), (torch.ones_like(x),)),
    "linearize": lambda f, x: linearize(f, x)[1](torch.ones_like(x)),
    "vmap": lambda f, x: vmap(f)(torch.stack([x, x + 1])),
    "vmap of grad": lambda f, x: vmap(grad(f))(torch.stack([x, x + 1])),
    "grad of vmap": lambda f, x: grad(lambda t: vmap(f)(torch.stack([t, t * 2])).sum())(x),
    "jacrev": lambda f, x: jacrev(lambda t: f(t) * t)(x),
    "jacfwd": lambda f, x: jacfwd(lambda t: f(t) * t)(x),
    "hessian": lambda f, x: hessian(f)(x),
    "vmap of hessian": lambda f, x: vmap(hessian(f))(torch.stack([x, x + 1])),
    "backward of grad": lambda f, x: torch.autograd.grad(grad(f)(x.requires_grad_()).sum(), x, allow_unused=True),
    "autograd.functional": lambda f, x: [
        torch.autograd.functional.jacobian(f, x),
        torch.autograd.functional.hessian(f, x),
        torch.autograd.functional.vjp(f, x),
    ],
}


@transparent
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms(transform: str, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    return attempt(TRANSFORMS[transform], function, torch.randn(3))


@transparent
def test_what_a_transformed_function_sees() -> Any:
    seen: list[Any] = []

    def program(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        alias = attempt(lambda: y.data)
        y.add_(1)
        seen.extend([type(x).__name__, str(alias), y._version, attempt(lambda: y.data_ptr() != 0)])
        seen.append(attempt(lambda: x.add_(1) is x))
        return y.sum()

    x = torch.ones(3)
    return [grad(program)(x), vmap(program)(torch.ones(2, 3)), x, seen]


@transparent
def test_functional_call() -> Any:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.BatchNorm1d(4), nn.Linear(4, 1))
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    x = torch.randn(5, 3)

    def loss(p: dict[str, torch.Tensor]) -> torch.Tensor:
        buffers = {name: b.clone() for name, b in model.named_buffers()}
        return functional_call(model, {**p, **buffers}, (x,)).square().mean()

    grads = grad(loss)(parameters)
    per_sample = vmap(grad(lambda p, s: functional_call(model.eval(), p, (s[None],)).sum()), (None, 0))(parameters, x)
    for name, p in model.named_parameters():
        p.data.sub_(grads[name])
    return [grads, per_sample, list(model.parameters())]


@transparent
def test_around_and_inside_ordinary_autograd() -> Any:
    w = torch.randn(3, requires_grad=True)
    out = w.exp()
    inner = grad(in_place)(w.detach())
    out2 = out * inner

    def uses_autograd(x: torch.Tensor) -> torch.Tensor:
        leaf = torch.ones(3, requires_grad=True)
        loss = (leaf * leaf).sum()
        (g,) = torch.autograd.grad(loss, leaf)
        return (x * g).sum()

    out2.sum().backward()
    return [w, inner, attempt(grad(uses_autograd), torch.ones(3))]


@pytest.mark.parametrize("every_call", [False, True])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_the_hooks_are_put_back(transform: str, every_call: bool) -> None:
    with torchguard.strict(every_call=every_call):
        assert caught()
        TRANSFORMS[transform](plain, torch.randn(3))
        assert caught()
        attempt(TRANSFORMS[transform], lambda x: (_ for _ in ()).throw(ValueError("no")), torch.randn(3))
        assert caught()


def test_the_hooks_are_put_back_in_nested_guards() -> None:
    with torchguard.warn(), torchguard.strict():
        hessian(plain)(torch.randn(3))
        assert caught()


def test_a_guard_entered_inside_a_transformed_function() -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        with torchguard.strict() as guard:
            y = in_place(x)
        assert guard.violations == []
        return y

    x = torch.randn(3)
    expected = [grad(in_place)(x), vmap(in_place)(x[None]), hessian(in_place)(x)]
    found = [grad(program)(x), vmap(program)(x[None]), hessian(program)(x)]
    assert frozen(found) == frozen(expected)
    with torchguard.strict():
        assert frozen(grad(program)(x)) == frozen(expected[0])
        assert caught()
    corrupt()


def test_a_guard_entered_inside_and_left_outside() -> None:
    guards = []

    def program(x: torch.Tensor) -> torch.Tensor:
        guards.append(torchguard.strict())
        guards[-1].__enter__()
        return (x * x).sum()

    grad(program)(torch.randn(3))
    try:
        assert caught()
    finally:
        guards[-1].__exit__(None, None, None)
    corrupt()


def test_a_guard_left_inside_a_transformed_function() -> None:
    guard = torchguard.strict()
    guard.__enter__()

    def program(x: torch.Tensor) -> torch.Tensor:
        guard.__exit__(None, None, None)
        return (x * x).sum()

    grad(program)(torch.randn(3))
    corrupt()


def test_a_write_before_the_transform_is_caught_after_it() -> None:
    with torchguard.strict():
        w = torch.randn(3, requires_grad=True)
        out = w.exp()
        grad(plain)(torch.randn(3))
        with pytest.raises(torchguard.SavedTensorCorruptionError):
            out.data.zero_()


def test_a_write_inside_a_transform_to_a_save_outside() -> None:
    """Memory that ordinary autograd saved is written to while a function is being transformed."""
    with torchguard.strict() as guard:
        w = torch.randn(3, requires_grad=True)
        out = w.exp()
        alias = out.data

        def program(x: torch.Tensor) -> torch.Tensor:
            alias.zero_()
            return (x * x).sum()

        # PyTorch refuses it, and has the word.
        with pytest.raises(RuntimeError, match="mutate a captured Tensor") as refused:
            grad(program)(torch.randn(3))
        assert type(refused.value) is RuntimeError
        out.sum().backward()
        assert guard.violations == []
        assert caught()


@transparent
def test_users_hooks_are_refused_as_ever() -> Any:
    x = torch.randn(3)
    with saved_tensors_hooks(lambda t: t, lambda t: t):
        results = [attempt(call, plain, x) for call in TRANSFORMS.values()]

    def pushes(t: torch.Tensor) -> torch.Tensor:
        with saved_tensors_hooks(lambda t: t, lambda t: t):
            return (t * t).sum()

    def saves_on_cpu(t: torch.Tensor) -> torch.Tensor:
        with save_on_cpu():
            return (t * t).sum()

    results += [attempt(grad(pushes), x), attempt(grad(saves_on_cpu), x), attempt(jvp, pushes, (x,), (x,))]
    results += [attempt(vmap(pushes), x[None])]
    with torch.autograd.graph.disable_saved_tensors_hooks("not here"):
        results += [attempt(pushes, x), attempt(grad(plain), x), attempt(lambda: (x * 1).requires_grad_().exp().sum())]
    w = torch.randn(3, requires_grad=True)
    with saved_tensors_hooks(lambda t: t, lambda t: t):
        out = w.exp()
    out.sum().backward()
    return [results, w]


def test_users_hooks_outside_the_guard_are_refused_as_ever() -> None:
    x = torch.randn(3)
    with saved_tensors_hooks(lambda t: t, lambda t: t):
        expected = attempt(grad(plain), x)
        with torchguard.strict():
            assert attempt(grad(plain), x) == expected
            assert caught()
    with torchguard.strict():
        with saved_tensors_hooks(lambda t: t, lambda t: t), torchguard.strict():
            assert attempt(grad(plain), x) == expected
            assert caught()
        assert caught()


# ---- disable_saved_tensors_hooks ----------------------------------------------------------------------------------


@transparent
def test_disabled_hooks() -> Any:
    w = torch.randn(3, requires_grad=True)
    with torch.autograd.graph.disable_saved_tensors_hooks("told so"):
        out = (w * w).exp()
        out.sum().backward()
        refused = attempt(lambda: saved_tensors_hooks(lambda t: t, lambda t: t).__enter__())
    return [w, refused, torch._C._autograd._saved_tensors_hooks_is_enabled()]


def test_after_disabled_hooks_the_guard_sees_again() -> None:
    with torchguard.strict():
        with torch.autograd.graph.disable_saved_tensors_hooks("told so"):
            pass
        assert caught()


# ---- forward-mode AD ----------------------------------------------------------------------------------------------


@transparent
@pytest.mark.parametrize("function", FUNCTIONS)
def test_forward_mode(function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    x, tangent = torch.randn(3, requires_grad=True), torch.randn(3)
    with fwAD.dual_level():
        dual = fwAD.make_dual(x, tangent)
        data = dual.data
        out = attempt(function, dual)
        if not isinstance(out, torch.Tensor):
            return out
        primal, forward = fwAD.unpack_dual(out)
        plain_data = fwAD.unpack_dual(data).tangent
        backward = torch.autograd.grad(primal, x, retain_graph=True)
        mixed = None if forward is None else torch.autograd.grad(forward, x, allow_unused=True)
    return [primal, forward, backward, mixed, plain_data]


@transparent
def test_forward_mode_in_place() -> Any:
    x = torch.randn(3)
    with fwAD.dual_level():
        dual = fwAD.make_dual(x, torch.ones(3))
        dual.mul_(2)
        dual[0] = 1
        torch.sin_(dual)
        dual.data.add_(1)
        module = nn.Linear(3, 2)
        module.weight.data.mul_(2)
        out = module(dual)
        result = [fwAD.unpack_dual(dual).tangent, fwAD.unpack_dual(out).tangent, dual._version]
    return [*result, x]


# ---- gradcheck ----------------------------------------------------------------------------------------------------


class WrongBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        (x,) = ctx.saved_tensors
        return grad * x.cos() * 2


CHECKED: dict[str, Callable[..., Any]] = {
    "sigmoid": torch.sigmoid,
    "relu_": lambda x: torch.relu_(x * 2),
    "in place": lambda x: (x * x).exp_().mul_(x),
    "matmul": lambda x: x @ x.t(),
    "softmax": lambda x: x.softmax(-1),
    "several": lambda x: torch.linalg.qr(x),
    "data": lambda x: x * x.data.clone().fill_(2),
    "views": lambda x: (x[0] * x[1], x.t()[1:].sin()),
    "wrong": WrongBackward.apply,
    "checkpoint": lambda x: checkpoint(torch.tanh, x, use_reentrant=False),
}


@transparent
@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("name", CHECKED)
def test_gradcheck(name: str, fast: bool) -> Any:
    x = torch.randn(3, 3, dtype=torch.double, requires_grad=True)
    arguments: dict[str, Any] = {"fast_mode": fast, "raise_exception": True}
    return [
        attempt(gradcheck, CHECKED[name], (x,), **arguments),
        attempt(gradcheck, CHECKED[name], (x,), check_forward_ad=True, check_batched_grad=True, **arguments),
        attempt(gradgradcheck, CHECKED[name], (x,), **arguments),
        x,
    ]


@transparent
@pytest.mark.parametrize("fast", [False, True])
def test_gradcheck_of_modules_and_several_inputs(fast: bool) -> Any:
    x = torch.randn(2, 3, dtype=torch.double, requires_grad=True)
    module = nn.Sequential(nn.Linear(3, 4), nn.Softplus(), nn.Linear(4, 2)).double()
    kept = x.exp()
    alias = x.data
    results = [
        gradcheck(lambda t, *p: module(t), (x, *module.parameters()), fast_mode=fast),
        gradgradcheck(lambda t, *p: module(t), (x, *module.parameters()), fast_mode=fast),
        gradcheck(F.bilinear, tuple(torch.randn(s, dtype=torch.double, requires_grad=True) for s in
                                    ((2, 3), (2, 4), (2, 3, 4))), fast_mode=fast),
        attempt(gradcheck, lambda t: t.detach() * t, (x,), fast_mode=fast),
        attempt(gradcheck, torch.sin, (x.float(),), fast_mode=fast),
        gradcheck(torch.abs, (torch.randn(2, dtype=torch.cdouble, requires_grad=True),), fast_mode=fast),
    ]  # fmt: skip
    kept.sum().backward()
    return [results, x, alias]


def test_corruption_inside_gradcheck_is_no_violation_but_after_it_is() -> None:
    with torchguard.strict():
        gradcheck(torch.sigmoid, (torch.randn(2, dtype=torch.double, requires_grad=True),))
        assert caught()


# ---- checkpoint ---------------------------------------------------------------------------------------------------


@transparent
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("early_stop", [False, True])
def test_checkpoint(reentrant: bool, early_stop: bool) -> Any:
    block = nn.Sequential(nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.Linear(4, 4), nn.Tanh())
    x = torch.randn(3, 4, requires_grad=True)
    with torch.utils.checkpoint.set_checkpoint_early_stop(early_stop):
        h = checkpoint(block, x * 1, use_reentrant=reentrant)
        h = checkpoint(lambda t: checkpoint(block, t, use_reentrant=reentrant) * t.data, h, use_reentrant=reentrant)
        h = checkpoint_sequential(block, 2, h, use_reentrant=reentrant)
        h.sum().backward()
    return [h, x, list(block.parameters()), torch.rand(1)]


@transparent
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_errors(reentrant: bool) -> Any:
    flag = [0]

    def changes(x: torch.Tensor) -> torch.Tensor:
        flag[0] += 1
        return x.sin() if flag[0] == 1 else x.sin().exp() * x

    def twice() -> None:
        out = checkpoint(torch.sin, torch.randn(3, requires_grad=True) * 1, use_reentrant=reentrant)
        out.sum().backward()
        out.sum().backward()

    def differs() -> None:
        flag[0] = 0
        checkpoint(changes, torch.randn(3, requires_grad=True), use_reentrant=reentrant).sum().backward()

    def grads() -> Any:
        x = torch.randn(3, requires_grad=True)
        return torch.autograd.grad(checkpoint(torch.sin, x, use_reentrant=reentrant).sum(), x)

    def retained() -> Any:
        x = torch.randn(3, requires_grad=True)
        out = checkpoint(torch.sigmoid, x, use_reentrant=reentrant)
        for _ in range(3):
            out.sum().backward(retain_graph=True)
        return x

    results = [attempt(call) for call in (twice, differs, grads, retained)]
    return [[r if not isinstance(r, tuple) else r[0:1] + tuple(str(r[1:]).split("\n")[:1]) for r in results]]


@transparent
def test_selective_checkpoint() -> Any:
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> Any:
        save = op in (torch.ops.aten.mm.default, torch.ops.aten.sigmoid.default)
        return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE

    w, x = torch.randn(3, 3, requires_grad=True), torch.randn(3, 3, requires_grad=True)

    def body(t: torch.Tensor) -> torch.Tensor:
        return (torch.mm(t, w).sigmoid() * t).exp()

    out = checkpoint(body, x, use_reentrant=False, context_fn=lambda: create_selective_checkpoint_contexts(policy))
    out.sum().backward()
    return [out, x, w]


# ---- anomaly mode and the graph -----------------------------------------------------------------------------------


@transparent
def test_anomaly_mode() -> Any:
    x = torch.randn(3, requires_grad=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.autograd.detect_anomaly():
            y = (x * 2).relu_().exp()
            y.sum().backward()
            nan = attempt(lambda: (x * 0).sqrt().mul(0).sum().backward())
    metadata = sorted((x * 2).grad_fn.metadata)
    return [x, nan, metadata]


@transparent
@pytest.mark.parametrize("kind", ["identity", "clone", "cpu", "pinned-less cpu", "none grad"])
def test_users_hooks(kind: str) -> Any:
    log: list[Any] = []

    def pack(t: torch.Tensor) -> Any:
        log.append(("pack", type(t).__name__, tuple(t.shape), t._version, t.requires_grad))
        return t.clone() if kind == "clone" else (t, t._version)

    def unpack(packed: Any) -> torch.Tensor:
        tensor = packed if kind == "clone" else packed[0]
        log.append(("unpack", tuple(tensor.shape), tensor._version))
        return tensor

    hooks = {"cpu": save_on_cpu, "pinned-less cpu": lambda: save_on_cpu(pin_memory=False)}.get(
        kind, lambda: saved_tensors_hooks(pack, unpack)
    )
    w = torch.randn(3, requires_grad=True)
    before = w.sin()
    with hooks():
        h = (before * w).exp()
        h2 = h * 1
        torch.relu_(h2)
        h2.data
        with hooks():
            inner = (h2 * h2).sum()
    after = inner * w.sum()
    after.backward(retain_graph=True)
    after.backward()
    return [w, h, log]


@pytest.mark.parametrize("guard", GUARDS)
@pytest.mark.parametrize("hooks", [save_on_cpu, lambda: saved_tensors_hooks(lambda t: [t], lambda packed: packed[0])])
def test_users_hooks_around_the_guard(hooks: Callable[[], Any], guard: str) -> None:
    def program() -> Any:
        torch.manual_seed(0)
        w = torch.randn(3, requires_grad=True)
        out = (w * w).exp()
        out.sum().backward()
        return out, w

    with hooks():
        expected = frozen(program())
        with GUARDS[guard]():
            assert frozen(program()) == expected
        assert frozen(program()) == expected


@transparent
def test_hooks_that_raise() -> Any:
    def fails(what: str) -> Callable[[Any], Any]:
        def hook(t: Any) -> Any:
            raise ValueError(what)

        return hook

    w = torch.randn(3, requires_grad=True)

    def pack() -> None:
        with saved_tensors_hooks(fails("pack"), lambda t: t):
            w.exp()

    def unpack() -> None:
        with saved_tensors_hooks(lambda t: t, fails("unpack")):
            out = w.exp()
        out.sum().backward()

    def wrong() -> None:
        with saved_tensors_hooks(lambda t: t, lambda t: "no"):
            out = w.exp()
        out.sum().backward()

    def writes() -> None:
        with saved_tensors_hooks(lambda t: t.add_(1), lambda t: t):
            (w * 1).exp()

    results = [attempt(call) for call in (pack, unpack, wrong, writes)]
    w.exp().sum().backward()
    return [results, w]


@transparent
def test_allow_mutation_on_saved_tensors() -> Any:
    results = []
    with allow_mutation_on_saved_tensors() as context:
        a = torch.randn(3, requires_grad=True)
        b = a.clone()
        out = (b**2).sum()
        b.sin_()
        (b * a).sum().backward()
        out.backward()
        results += [a, b, len(context.cloned)]
        results.append(attempt(lambda: allow_mutation_on_saved_tensors().__enter__()))
    c = torch.randn(3, requires_grad=True)
    d = c * 1
    out = d.sin()
    d.mul_(2)
    results.append(attempt(lambda: out.sum().backward()))
    return results


@pytest.mark.parametrize("guard", GUARDS)
def test_allow_mutation_around_the_guard(guard: str) -> None:
    def program() -> Any:
        torch.manual_seed(0)
        a = torch.randn(3, requires_grad=True)
        b = a.clone()
        out = (b * b).sum()
        out.backward()
        return a

    with allow_mutation_on_saved_tensors():
        expected = frozen(program())
        with GUARDS[guard]():
            assert frozen(program()) == expected


@transparent
def test_what_nodes_tell() -> Any:
    w = torch.randn(3, requires_grad=True)
    h = w * 2
    out = h.sigmoid()
    both = out * h
    indexed = w[torch.tensor([0, 1])]
    summed = both.sum(dim=0)
    node = both.grad_fn
    return [
        node.name(),
        [type(n).__name__ for n, _ in node.next_functions],
        node._saved_self,
        node._saved_other,
        out.grad_fn._saved_result,
        indexed.grad_fn._saved_indices,
        summed.grad_fn._saved_self_sym_sizes,
        sorted(name for name in dir(node) if name.startswith("_")),
        isinstance(node, Node),
        node._sequence_nr() - out.grad_fn._sequence_nr(),
        h.grad_fn._saved_other,
        attempt(lambda: node._saved_nothing),
    ]


@transparent
def test_hooks_on_tensors_and_nodes() -> Any:
    log: list[Any] = []
    w = torch.randn(3, requires_grad=True)
    h = w * 2
    h.retain_grad()
    out = h.sigmoid()
    out.register_hook(lambda g: log.append(("tensor", g.clone())))
    h.register_hook(lambda g: g * 2)
    h.grad_fn.register_hook(lambda gi, go: log.append(("node", len(gi), len(go))))
    h.grad_fn.register_prehook(lambda go: log.append(("prehook", len(go))))

    def update(p: torch.Tensor) -> None:
        p.data.sub_(p.grad, alpha=0.1)

    handle = w.register_post_accumulate_grad_hook(update)
    torch.autograd.graph.register_multi_grad_hook((w, h), lambda grads: log.append(len(grads)))
    out.sum().backward()
    handle.remove()
    module = nn.Linear(3, 3)
    module.register_full_backward_hook(lambda m, gi, go: log.append(("module", len(gi), len(go))))
    module.register_forward_hook(lambda m, i, o: o.mul(2))
    module(w).sum().backward()
    return [log, w, h.grad, list(module.parameters())]


# ---- threads ------------------------------------------------------------------------------------------------------


@transparent
def test_backward_in_another_thread() -> Any:
    w = torch.randn(3, requires_grad=True)
    out = (w * w).exp().sum()
    thread = threading.Thread(target=out.backward)
    thread.start()
    thread.join()
    return w


@transparent
def test_training_in_threads() -> Any:
    def train(seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)
        w = torch.randn(3, 3, generator=generator).requires_grad_()
        for _ in range(5):
            out = (w * 1).relu_().sigmoid() @ w
            out.sum().backward()
            w.data.sub_(w.grad, alpha=0.1)
            w.grad.data.zero_()
        return [w, threading.current_thread().name != "MainThread", type(threading.current_thread()).__name__]

    with ThreadPoolExecutor(3) as pool:
        pooled = list(pool.map(train, range(6)))
    results: list[Any] = [None] * 3

    class Worker(threading.Thread):
        def __init__(self, i: int) -> None:
            super().__init__(daemon=True)
            self.i = i

        def run(self) -> None:
            results[self.i] = train(self.i)

    workers = [Worker(i) for i in range(3)]
    for worker in workers:
        worker.start()
    started_twice = attempt(workers[0].start)
    for worker in workers:
        worker.join()
    facts = [(w.is_alive(), sorted(k for k in vars(w) if not k.startswith("_"))) for w in workers]
    return [pooled, results, started_twice, facts]


@transparent
def test_one_graph_read_by_many_threads() -> Any:
    w = torch.randn(3, requires_grad=True)
    out = (w.exp() * w).sum()

    def read(_: int) -> Any:
        return torch.autograd.grad(out, w, retain_graph=True)

    with ThreadPoolExecutor(3) as pool:
        return list(pool.map(read, range(20)))


@transparent
def test_errors_in_threads() -> Any:
    def refuse(_: int) -> Any:
        h = torch.randn(3, requires_grad=True) * 1
        out = h.sin()
        h.add_(1)
        return attempt(lambda: out.sum().backward())

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(refuse, range(4)))


@transparent
def test_data_parallel_helpers() -> Any:
    from torch.nn.parallel import parallel_apply

    model = nn.Linear(3, 2)
    twin = copy.deepcopy(model)
    outs = [module(torch.ones(1, 3)) for module in (model, twin)]
    sum(out.sum() for out in outs).backward()
    return [list(model.parameters()), list(twin.parameters()), callable(parallel_apply)]
