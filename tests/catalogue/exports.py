"""Memory that leaves torch's sight: NumPy arrays, DLPack consumers, buffers, what a tensor was made from."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from harness import VALUES, Run, add, lacks_versioned_capsules, lacks_writable_capsules, no_lack, program
from torch.utils import dlpack

import torchguard

Make = Callable[[torch.Tensor], Any]
Write = Callable[[Any], Any]

_ROUTE = "memory exported from torch"

copy.copy(torch.ones(()))  # the first copy has Python cache what it finds, on the class


def _apply(function: Any, *args: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = function.apply(*args)  # saved
    return result


def _negate(handle: Any) -> None:
    handle *= -1


def _negate_buffer(handle: Any) -> None:
    for i in range(len(handle)):
        handle[i] = -handle[i]


def _negate_unseen(handle: Any) -> None:
    torch.neg(handle, out=handle)


#: How memory gets out, and how it is then written to, always to its negative.
HANDLES: dict[str, tuple[Make, Write]] = {
    "numpy": (lambda x: x.numpy(), _negate),
    "numpy_forced": (lambda x: x.numpy(force=True), _negate),
    "numpy_view": (lambda x: x.numpy()[1:].T, _negate),
    "numpy_view_of_a_view": (lambda x: x.numpy()[1:][:, ::2], _negate),
    "numpy_called_on_the_class": (lambda x: torch.Tensor.numpy(x), _negate),
    "asarray": (lambda x: np.asarray(x), _negate),
    "dunder_array": (lambda x: x.__array__(), _negate),
    "numpy_reinterpreted": (lambda x: x.numpy().view(np.uint8), lambda a: np.bitwise_xor(a, 128, out=a)),
    "numpy_out": (lambda x: x.numpy(), lambda a: np.negative(a, out=a)),
    "numpy_put": (lambda x: x.numpy(), lambda a: np.put(a, [3, 5], [7.0, 8.0])),
    "memoryview": (lambda x: memoryview(x.numpy().reshape(-1)), _negate_buffer),
    "memoryview_cast": (
        lambda x: memoryview(x.numpy()).cast("B").cast("f"),
        _negate_buffer,
    ),
    "numpy_frombuffer": (lambda x: np.frombuffer(memoryview(x.numpy()), dtype=np.float32), _negate),
    "from_dlpack_by_numpy": (lambda x: np.from_dlpack(x), _negate),
    "from_dlpack_by_torch": (lambda x: torch.from_dlpack(x), _negate_unseen),
    "capsule": (lambda x: torch.from_dlpack(dlpack.to_dlpack(x)), _negate_unseen),
    "capsule_of_torch": (lambda x: dlpack.from_dlpack(torch.to_dlpack(x)), _negate_unseen),
    "dunder_dlpack": (lambda x: torch.from_dlpack(x.__dlpack__()), _negate_unseen),
    "dunder_dlpack_versioned": (lambda x: torch.from_dlpack(x.__dlpack__(max_version=(1, 0))), _negate_unseen),
    "dlpack_and_numpy": (lambda x: torch.from_dlpack(x).numpy(), _negate),
    "from_numpy_of_numpy": (lambda x: torch.from_numpy(x.numpy()), _negate_unseen),
    "as_tensor_of_numpy": (lambda x: torch.as_tensor(x.numpy()), _negate_unseen),
    "asarray_of_numpy": (lambda x: torch.asarray(x.numpy()), _negate_unseen),
    "frombuffer_of_numpy": (lambda x: torch.frombuffer(x.numpy(), dtype=torch.float32), _negate_unseen),
    "set_": (lambda x: torch.empty(0).set_(x), _negate_unseen),
    "set_of_the_storage": (
        lambda x: torch.empty(0).set_(x.untyped_storage(), x.storage_offset(), (3, 4)),
        _negate_unseen,
    ),
    "shallow_copy": (lambda x: copy.copy(x), _negate_unseen),
    "set_and_numpy": (lambda x: torch.empty(0).set_(x).numpy(), _negate),
}

#: Torch does not say that these were made, if it was before the guard.
_LEAVES_NO_TRACE = {
    "from_dlpack_by_numpy",
    "from_dlpack_by_torch",
    "capsule",
    "capsule_of_torch",
    "dunder_dlpack",
    "dunder_dlpack_versioned",
    "dlpack_and_numpy",
    "set_",
    "set_of_the_storage",
    "shallow_copy",
}


_LACKS = {"from_dlpack_by_numpy": lacks_writable_capsules, "dunder_dlpack_versioned": lacks_versioned_capsules}


def _exported(name: str, make: Make, write: Write) -> None:
    lacks = _LACKS.get(name, no_lack)

    def after_the_save(run: Run) -> Any:
        w, h = run.leaf(), run.leaf(requires_grad=False)
        out = h * w  # saved
        c = make(h)
        run.write(write, c)
        out.sum().backward()
        return [w.grad]

    def before_the_save(run: Run) -> Any:
        w, h = run.leaf(), run.leaf() * 1
        c = make(h.detach())
        out = h * w  # saved
        run.write(write, c)
        out.sum().backward()
        return [w.grad]

    def of_an_output(run: Run) -> Any:
        w = run.leaf()
        out = w.exp()  # saved
        c = make(out.detach())
        run.write(write, c)
        out.sum().backward()
        return [w.grad]

    def of_a_parameter(run: Run) -> Any:
        w, x = torch.nn.Parameter(torch.full((3, 4), 0.5)), run.leaf()
        c = make(w.detach())
        out = torch.nn.functional.linear(x, w)  # saved
        run.write(write, c)
        out.sum().backward()
        return [x.grad]

    def before_the_guard(run: Run) -> Any:
        w, h = run.leaf(), run.leaf() * 1
        c = make(h.detach())
        with run.guard():
            out = h * w  # saved
            run.write(write, c)
            out.sum().backward()
        return [w.grad]

    def after_backward(run: Run) -> Any:
        w, h = run.leaf(), run.leaf(requires_grad=False)
        c = make(h)
        (h * w).sum().backward()
        run.write(write, c)
        return [w.grad]

    def on_a_copy(run: Run) -> Any:
        w, h = run.leaf(), run.leaf(requires_grad=False)
        c = make(h.clone())
        out = h * w
        run.write(write, c)
        out.sum().backward()
        return [w.grad]

    def on_another_part(run: Run) -> Any:
        both = torch.arange(24.0).view(2, 3, 4)
        w = run.leaf()
        out = both[0] * w
        c = make(both[1])
        run.write(write, c)
        out.sum().backward()
        return [w.grad]

    def written_and_put_back(run: Run) -> Any:
        w, h = run.leaf(), run.leaf(requires_grad=False)
        out = h * w
        c = make(h)

        def there_and_back() -> None:
            old = h.clone()
            write(c)
            np.asarray(h)[...] = old.numpy()

        run.write(there_and_back)
        out.sum().backward()
        return [w.grad]

    corrupting = {
        name: after_the_save,
        f"{name}_before_the_save": before_the_save,
        f"{name}_of_an_output": of_an_output,
        f"{name}_of_a_parameter": of_a_parameter,
    }
    for full, body in corrupting.items():
        seen = _moment(write)
        add(body, name=f"export_{full}", route=_ROUTE, kind="corrupting", caught="read", every_call=seen, lacks=lacks)
    if name not in _LEAVES_NO_TRACE:
        full = f"{name}_before_the_guard"
        corrupting[full] = before_the_guard
        add(
            before_the_guard,
            name=f"export_{full}",
            route=_ROUTE,
            kind="corrupting",
            caught="read",
            every_call=_moment(write),
            enters_guard=True,
            lacks=lacks,
        )
    twins = [after_backward, on_a_copy, on_another_part]
    if write is not _negate_unseen:
        twins.append(written_and_put_back)
    for twin in twins:
        add(
            twin,
            name=f"export_{name}_{twin.__name__}",
            route=_ROUTE,
            kind="innocent",
            twin_of=[f"export_{full}" for full in corrupting],
            lacks=lacks,
        )


def _moment(write: Write) -> Any:
    """With ``every_call`` a write through a tensor is seen as it happens."""
    return "write" if write is _negate_unseen else "read"


for _name, (_make, _write) in HANDLES.items():
    _exported(_name, _make, _write)


# ---- what a tensor was made from -----------------------------------------------------------------------------

_ONES = np.ones((3, 4), dtype=np.float32)

#: A source, the tensor over it, and a write to the source.
SOURCES: dict[str, tuple[Callable[[], Any], Make, Write]] = {
    "from_numpy": (_ONES.copy, lambda a: torch.from_numpy(a), _negate),
    "from_numpy_of_a_view": (lambda: np.ones((6, 4), dtype=np.float32)[::2], lambda a: torch.from_numpy(a), _negate),
    "written_through_the_base": (
        lambda: np.ones((4, 4), dtype=np.float32),
        lambda a: torch.from_numpy(a[1:]),
        _negate,
    ),
    "as_tensor": (_ONES.copy, lambda a: torch.as_tensor(a), _negate),
    "asarray": (_ONES.copy, lambda a: torch.asarray(a), _negate),
    "from_dlpack": (_ONES.copy, lambda a: torch.from_dlpack(a), _negate),
    "frombuffer_of_an_array": (_ONES.copy, lambda a: torch.frombuffer(a, dtype=torch.float32).view(3, 4), _negate),
    "frombuffer": (
        lambda: bytearray(_ONES.tobytes()),
        lambda b: torch.frombuffer(b, dtype=torch.float32).view(3, 4),
        lambda b: b.__setitem__(slice(0, 8), bytes(8)),
    ),
    "asarray_of_a_memoryview": (
        lambda: memoryview(_ONES.copy()),
        lambda m: torch.asarray(m).view(3, 4),
        lambda m: m.cast("B").__setitem__(slice(0, 8), bytes(8)),
    ),
}


def _made_from(name: str, source: Callable[[], Any], make: Make, write: Write) -> None:
    def inside(run: Run) -> Any:
        w, a = run.leaf(), source()
        h = make(a)
        out = h * w  # saved
        run.write(lambda: write(a))
        out.sum().backward()
        return [w.grad]

    def made_before_the_guard(run: Run) -> Any:
        w, a = run.leaf(), source()
        h = make(a)
        with run.guard():
            out = h * w  # saved
            run.write(lambda: write(a))
            out.sum().backward()
        return [w.grad]

    def view_made_before_the_guard(run: Run) -> Any:
        w, a = run.leaf(), source()
        h = make(a)[:2]
        with run.guard():
            out = h.t() @ w[:2]  # saved
            run.write(lambda: write(a))
            out.sum().backward()
        return [w.grad]

    def requires_grad(run: Run) -> Any:
        a = source()
        h = make(a).requires_grad_()
        out = (h * h).sin()  # saved
        run.write(lambda: write(a))
        out.sum().backward()
        return [h.grad]

    def after_backward(run: Run) -> Any:
        w, a = run.leaf(), source()
        h = make(a)
        (h * w).sum().backward()
        run.write(lambda: write(a))
        return [w.grad]

    def cloned(run: Run) -> Any:
        w, a = run.leaf(), source()
        h = make(a).clone()
        out = h * w
        run.write(lambda: write(a))
        out.sum().backward()
        return [w.grad]

    def same_bytes(run: Run) -> Any:
        w, a = run.leaf(), source()
        h = make(a)
        out = h * w
        raw = memoryview(a) if not isinstance(a, np.ndarray) else a
        run.write(lambda: raw.__setitem__(0, raw[0] if raw.ndim == 1 else np.asarray(raw)[0]))
        out.sum().backward()
        return [w.grad]

    names = []
    for body in (inside, made_before_the_guard, view_made_before_the_guard, requires_grad):
        names.append(f"source_{name}_{body.__name__}")
        add(
            body,
            name=names[-1],
            route=_ROUTE,
            kind="corrupting",
            caught="read",
            every_call="read",
            enters_guard="guard" in body.__name__,
            truth="cloned saves" if body is requires_grad else "without the write",
        )
    twins = [after_backward, cloned] + ([same_bytes] if name != "asarray_of_a_memoryview" else [])
    for twin in twins:
        add(twin, name=f"source_{name}_{twin.__name__}", route=_ROUTE, kind="innocent", twin_of=names)


for _name, (_source, _make, _write) in SOURCES.items():
    _made_from(_name, _source, _make, _write)


# ---- single programs -----------------------------------------------------------------------------------------


@program(route=_ROUTE, kind="corrupting", caught="read", every_call="read")
def custom_function_that_returns_an_array(run: Run) -> Any:
    """Its output lies over an array that the function still holds."""
    held = np.zeros((3, 4), dtype=np.float32)

    class Exp(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            np.exp(x.detach().numpy(), out=held)
            result = torch.from_numpy(held)
            ctx.save_for_backward(result)
            return result

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> Any:
            (result,) = ctx.saved_tensors
            return grad * result

    w = run.leaf()
    out: Any = _apply(Exp, w)
    run.write(lambda: held.fill(0))
    out.sum().backward()
    return [w.grad]


@program(route=_ROUTE, kind="innocent", twin_of="custom_function_that_returns_an_array")
def custom_function_that_uses_numpy_and_lets_go(run: Run) -> Any:
    class Exp(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            result = torch.from_numpy(np.exp(x.detach().numpy()))
            ctx.save_for_backward(result)
            return result

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> Any:
            (result,) = ctx.saved_tensors
            return torch.from_numpy(grad.numpy() * result.numpy())

    w = run.leaf()
    out: Any = _apply(Exp, w)
    run.write(lambda: out.detach().numpy().mean())
    out.sum().backward()
    return [w.grad]


@program(route=_ROUTE, kind="corrupting", caught="read", every_call="read", truth="cloned saves")
def simulator_that_reuses_its_observation(run: Run) -> Any:
    """An environment hands out one buffer and fills it anew at every step."""
    observation = np.ones(4, dtype=np.float32)
    policy = run.leaf()
    loss: Any = 0.0

    def next_step() -> None:
        observation[:] = observation * 2 + 1

    for _ in range(3):
        loss = loss + (policy @ torch.from_numpy(observation)).sin().sum()  # saved
        run.write(next_step)
    loss.backward()
    return [policy.grad]


@program(route=_ROUTE, kind="innocent", twin_of="simulator_that_reuses_its_observation")
def simulator_whose_observation_is_copied(run: Run) -> Any:
    observation = np.ones(4, dtype=np.float32)
    policy = run.leaf()
    loss: Any = 0.0
    copies = iter([np.float32(i) * observation + i for i in range(3)])

    def next_step() -> None:
        observation[:] = 7

    for _ in range(3):
        loss = loss + (policy @ torch.tensor(next(copies))).sin().sum()
        run.write(next_step)
    loss.backward()
    return [policy.grad]


@program(route=_ROUTE, kind="innocent", twin_of=("export_numpy", "export_numpy_of_an_output"))
def metrics_and_logging(run: Run) -> Any:
    w, seen = run.leaf(), []
    optimizer = torch.optim.SGD([w], lr=0.1)
    for _ in range(3):
        out = w.tanh()
        loss = (out * out).sum()
        run.write(lambda out=out, loss=loss: seen.append((loss.detach().numpy(), out.detach().numpy().mean())))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return [w.grad, w.detach()]


@program(route=_ROUTE, kind="innocent", twin_of="export_numpy_of_a_parameter")
def snapshots_of_the_weights_are_held(run: Run) -> Any:
    """Arrays over the live weights and running statistics, which the optimiser and the module itself write to."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    held = {name: value.numpy() for name, value in model.state_dict().items()}
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(run.leaf(requires_grad=False)).pow(2).sum()
        run.write(lambda: [value.mean() for value in held.values()])
        loss.backward()
        optimizer.step()
    return [parameter.grad for parameter in model.parameters()]


@program(route=_ROUTE, kind="corrupting", caught="read", every_call="read")
def running_statistics_in_evaluation(run: Run) -> Any:
    norm = torch.nn.BatchNorm1d(4).eval()
    variance = np.asarray(norm.running_var)
    x = run.leaf()
    out = norm(x)  # saved
    run.write(lambda: variance.fill(9))
    out.pow(2).sum().backward()
    return [x.grad]


@program(route=_ROUTE, kind="innocent", twin_of="running_statistics_in_evaluation")
def running_statistics_in_training(run: Run) -> Any:
    norm = torch.nn.BatchNorm1d(4)
    variance = np.asarray(norm.running_var)
    x = run.leaf()
    out = norm(x)
    run.write(lambda: variance.mean())
    out.pow(2).sum().backward()
    return [x.grad]


@program(route=_ROUTE, kind="refused")
def tracked_write_beside_an_array(run: Run) -> Any:
    w, h = run.leaf(), run.leaf(requires_grad=False)
    held = h.numpy()
    out = h * w
    run.write(lambda: h.add_(1))
    out.sum().backward()
    return [w.grad, torch.from_numpy(held)]


@program(route=_ROUTE, kind="corrupting", caught="read", every_call="read", truth="cloned saves")
def array_that_dies_after_the_write(run: Run) -> Any:
    w, h = run.leaf(), run.leaf(requires_grad=False)
    out = h * w  # saved

    def write() -> None:
        h.numpy().fill(7)

    run.write(write)
    again = (h.clone() * w).sum()
    (out.sum() + again).backward()
    return [w.grad]


@program(route=_ROUTE, kind="innocent", twin_of="array_that_dies_after_the_write")
def array_that_dies_unwritten(run: Run) -> Any:
    w, h = run.leaf(), run.leaf(requires_grad=False)
    out = h * w
    run.write(lambda: h.numpy().sum())
    again = (h.clone() * w).sum()
    (out.sum() + again).backward()
    return [w.grad]


@program(route=_ROUTE, kind="corrupting", caught="read", every_call="read")
def array_written_in_another_thread(run: Run) -> Any:
    w, h = run.leaf(), run.leaf(requires_grad=False)
    array = h.numpy()
    out = run.in_thread(lambda: h * w)  # saved
    run.write(lambda: run.in_thread(lambda: array.fill(7)))
    out.sum().backward()
    return [w.grad]


@program(route=_ROUTE, kind="innocent", twin_of="array_written_in_another_thread")
def array_read_in_another_thread(run: Run) -> Any:
    w, h = run.leaf(), run.leaf(requires_grad=False)
    array = h.numpy()
    out = run.in_thread(lambda: h * w)
    run.write(lambda: run.in_thread(lambda: array.sum()))
    out.sum().backward()
    return [w.grad]


@program(route=_ROUTE, kind="unread")
def array_written_and_nobody_reads(run: Run) -> Any:
    w, h = run.leaf(), run.leaf(requires_grad=False)
    out = h * w
    array = h.numpy()
    run.write(lambda: array.fill(7))
    return [out.detach()]


@program(route=_ROUTE, kind="unread", allowed=True)
def array_written_in_an_allow_block(run: Run) -> Any:
    w, h = run.leaf(), run.leaf(requires_grad=False)
    out = h * w
    array = h.numpy()

    def write() -> None:
        with torchguard.allow("the test says so"):
            array.fill(7)

    run.write(write)
    run.write(lambda: None)
    return [out.detach()]


@program(route=_ROUTE, kind="corrupting", allowed=True)
def array_written_in_an_allow_block_and_read(run: Run) -> Any:
    w, h = run.leaf(), run.leaf(requires_grad=False)
    out = h * w  # saved
    array = h.numpy()

    def write() -> None:
        with torchguard.allow("the test says so"), torchguard.allow("and again"):
            array.fill(7)

    run.write(write)
    out.sum().backward()
    return [w.grad]


@program(route=_ROUTE, kind="innocent", twin_of="array_written_in_an_allow_block_and_read")
def array_read_in_an_allow_block(run: Run) -> Any:
    w, h = run.leaf(), run.leaf(requires_grad=False)
    out = h * w
    array = h.numpy()
    run.write(lambda: array.sum())
    out.sum().backward()
    return [w.grad]


@program(route=_ROUTE, kind="corrupting", caught="read", every_call="read")
def array_written_before_an_allow_block(run: Run) -> Any:
    w, h = run.leaf(), run.leaf(requires_grad=False)
    out = h * w  # saved
    array = h.numpy()

    def write() -> None:
        array[0] = 7
        with torchguard.allow("another write"):
            array[1] = 7

    run.write(write)
    out.sum().backward()
    return [w.grad]


@program(route=_ROUTE, kind="innocent", twin_of="array_written_before_an_allow_block")
def array_read_before_an_allow_block(run: Run) -> Any:
    w, h = run.leaf(), run.leaf(requires_grad=False)
    out = h * w
    array = h.numpy()

    def write() -> None:
        array.sum()
        with torchguard.allow("another write"):
            array.sum()

    run.write(write)
    out.sum().backward()
    return [w.grad]


def _of_dtype(dtype: torch.dtype) -> None:
    def body(run: Run, write: Write) -> Any:
        w = run.leaf(dtype=dtype if dtype.is_floating_point or dtype.is_complex else torch.float32)
        h = run.leaf([[1, 0, 3, 0], [0, 1, 1, 2], [1, 1, 1, 1]], dtype=dtype, requires_grad=False)
        if dtype == torch.bfloat16:
            array = h.view(torch.int16).numpy()
        else:
            array = h.numpy()
        out = torch.where(h, w, 2 * w) if dtype == torch.bool else h * w  # saved
        run.write(lambda: write(array))
        out.abs().sum().backward()
        return [w.grad]

    name = str(dtype).removeprefix("torch.")
    full = f"array_of_{name}"
    add(
        lambda run: body(run, lambda array: array.fill(7 if dtype != torch.bool else True)),
        name=full,
        route=_ROUTE,
        kind="corrupting",
        caught="read",
        every_call="read",
    )
    add(
        lambda run: body(run, lambda array: array.sum()),
        name=f"{full}_read",
        route=_ROUTE,
        kind="innocent",
        twin_of=full,
    )


for _dtype in (torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float64, torch.complex64):
    _of_dtype(_dtype)


@program(route=_ROUTE, kind="corrupting", caught="read", every_call="read")
def array_of_a_scalar(run: Run) -> Any:
    w, h = run.leaf(), torch.tensor(3.0)
    array = h.numpy()
    out = h * w  # saved
    run.write(lambda: array.fill(7))
    out.sum().backward()
    return [w.grad]


@program(route=_ROUTE, kind="innocent", twin_of="array_of_a_scalar")
def array_of_nothing(run: Run) -> Any:
    w, h = torch.ones(0, 4, requires_grad=True), torch.ones(0, 4)
    array = h.numpy()
    out = h * w
    run.write(lambda: array.fill(7))
    out.sum().backward()
    return [w.grad]


# ---- under a program's own save hooks, and in what a checkpoint reads again -----------------------------------------

PAIRS: dict[str, Callable[[], Any]] = {
    "identity": lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
    "container": lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: (t, "kept"), lambda kept: kept[0]),
    "alias": lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach(), lambda t: t),
    "array": lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach().numpy(), torch.from_numpy),
    "on_cpu": lambda: torch.autograd.graph.save_on_cpu(),
    "copy": lambda: torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t),
}


def _given_out_before(h: torch.Tensor) -> tuple[torch.Tensor, Callable[[], Any]]:
    array = h.numpy()
    return h, lambda: array


def _made_from_an_array(h: torch.Tensor) -> tuple[torch.Tensor, Callable[[], Any]]:
    array = h.numpy().copy()
    return torch.from_numpy(array), lambda: array


def _made_from_a_buffer(h: torch.Tensor) -> tuple[torch.Tensor, Callable[[], Any]]:
    buffer = bytearray(h.numpy().tobytes())
    made = torch.frombuffer(buffer, dtype=torch.float32).view(h.shape)
    return made, lambda: np.frombuffer(buffer, dtype=np.float32)


def _given_out_after(h: torch.Tensor) -> tuple[torch.Tensor, Callable[[], Any]]:
    return h, h.numpy


def _given_out_by_dlpack(h: torch.Tensor) -> tuple[torch.Tensor, Callable[[], Any]]:
    array = np.from_dlpack(h)
    return h, lambda: array


GIVEN_OUT = {
    function.__name__.removeprefix("_"): function
    for function in (
        _given_out_before,
        _given_out_after,
        _made_from_an_array,
        _made_from_a_buffer,
        _given_out_by_dlpack,
    )
}


def _elsewhere(name: str, body: Callable[[Run, Write], Any], kind: Any, **declared: Any) -> None:
    moments = {"caught": "read", "every_call": "read"} if kind == "corrupting" else {}
    add(lambda run: body(run, _negate), name=name, route=_ROUTE, kind=kind, **moments, **declared)  # type: ignore[arg-type]
    add(
        lambda run: body(run, lambda array: array.sum()),
        name=f"{name}_read",
        route=_ROUTE,
        kind="innocent",
        twin_of=name if kind == "corrupting" else (),
        **declared,
    )
    add(
        lambda run: body(run, lambda array: (_negate(array), _negate(array))),
        name=f"{name}_put_back",
        route=_ROUTE,
        kind="innocent",
        twin_of=name if kind == "corrupting" else (),
        **declared,
    )


def _lacks(given_out: str) -> Callable[[], str]:
    return lacks_writable_capsules if given_out == "given_out_by_dlpack" else no_lack


def _under_hooks(pair: str, given_out: str) -> None:
    def body(run: Run, write: Write) -> Any:
        w = run.leaf()
        h, array = GIVEN_OUT[given_out](run.leaf(requires_grad=False))
        with PAIRS[pair]():
            out = h * w  # saved
        handle = array()
        run.write(lambda: write(handle))
        out.sum().backward()
        return [w.grad]

    kind = "innocent" if pair == "copy" else "corrupting"
    _elsewhere(f"{given_out}_under_hooks_{pair}", body, kind, lacks=_lacks(given_out))


def _in_a_checkpoint(given_out: str, reentrant: bool, times: int) -> None:
    def body(run: Run, write: Write) -> Any:
        w = run.leaf()
        h, array = GIVEN_OUT[given_out](run.leaf([VALUES[0] * times], requires_grad=False))
        checkpoint = run.checkpoint(use_reentrant=reentrant)
        out = checkpoint(lambda w: torch.sin(h * w.repeat(1, times)[:1]), w)  # saved
        handle = array()
        run.write(lambda: write(handle))
        out.sum().backward()
        return [w.grad]

    how = "reentrant" if reentrant else "non_reentrant"
    _elsewhere(
        f"{given_out}_in_a_{how}_checkpoint_{times}", body, "corrupting", repairable=False, lacks=_lacks(given_out)
    )


for _given in GIVEN_OUT:
    for _pair in PAIRS:
        _under_hooks(_pair, _given)
    for _reentrant in (False, True):
        for _times in (1, 5000):
            _in_a_checkpoint(_given, _reentrant, _times)
