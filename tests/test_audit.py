"""audit(): does backward notice what no Python sees, whatever the layout, and does looking change nothing?"""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import torchguard
from torchguard import SavedTensorCorruptionError, _audit, _memory, _torch

Make = Callable[[], torch.Tensor]


def poke(tensor: torch.Tensor) -> None:
    """What a kernel does: no Python sees it."""
    ctypes.memset(tensor.data_ptr(), 0x3C, tensor.element_size())


@pytest.fixture(params=["at once", "when backward ends"])
def asked(request: pytest.FixtureRequest) -> Iterator[str]:
    """Compared at the read, as on a CPU, and when backward ends, as on a GPU."""
    if request.param != "at once":
        _audit.SYNCHRONOUS.discard("cpu")
    yield str(request.param)
    _audit.SYNCHRONOUS.add("cpu")


# ---- what it notices -----------------------------------------------------------------------------------------------


class Passing(torch.autograd.Function):
    """Saves a tensor of any kind, and has no use for it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, saved: list[torch.Tensor]) -> torch.Tensor:
        ctx.save_for_backward(*saved)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        assert ctx.saved_tensors
        return grad, None


def strided(dtype: torch.dtype) -> Make:
    return lambda: torch.ones(3, 4).to(dtype)


KINDS: dict[str, Make] = {
    **{
        str(dtype).removeprefix("torch."): strided(dtype)
        for dtype in (
            torch.float64,
            torch.float16,
            torch.bfloat16,
            torch.complex64,
            torch.int64,
            torch.uint8,
            torch.bool,
            torch.float8_e4m3fn,
        )
    },
    "a scalar": lambda: torch.tensor(2.0),
    "transposed": lambda: torch.rand(3, 4).t(),
    "expanded": lambda: torch.rand(3, 1).expand(3, 4),
    "conjugated": lambda: torch.rand(3, dtype=torch.complex64).conj(),
    "sparse": lambda: torch.eye(3).to_sparse(),
    "sparse, not coalesced": lambda: torch.sparse_coo_tensor(torch.tensor([[0, 0]]), torch.tensor([1.0, 2.0]), (3,)),
    "compressed rows": lambda: torch.eye(4).to_sparse_csr(),
    "compressed columns": lambda: torch.eye(4).to_sparse_csc(),
    "blocks of rows": lambda: torch.eye(4).to_sparse_bsr((2, 2)),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)]),
    "jagged": lambda: torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(4, 3)], layout=torch.jagged),
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_a_write_that_no_python_sees_to_a_save_of_any_kind(kind: str, asked: str) -> None:
    for part in range(len(_memory.strided_parts_of(KINDS[kind]()))):
        with torchguard.audit() as guard:
            x, saved = torch.ones(2, requires_grad=True), KINDS[kind]()
            Passing.apply(x, [saved]).sum().backward()  # type: ignore[no-untyped-call]
            assert guard.violations == []
            out = Passing.apply(x, [saved])  # type: ignore[no-untyped-call]
            poke(_memory.strided_parts_of(saved)[part])
            with pytest.raises(SavedTensorCorruptionError) as error:
                out.sum().backward()
        violation = error.value.violation
        assert (violation.kind, violation.caught, violation.operation) == ("invisible", "read", "")
        assert violation.saved is not None
        assert "out = Passing.apply" in violation.saved.source
        assert 0 < violation.elements <= violation.of
        assert str(violation).startswith("a write that no Python sees has corrupted a tensor saved for backward")


def zero_size() -> torch.Tensor:
    return torch.empty(0, 3)


def on_no_device() -> torch.Tensor:
    return torch.empty(3, device="meta")


def fake() -> torch.Tensor:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.ones(3)


@pytest.mark.parametrize("make", [zero_size, on_no_device, fake])
def test_what_holds_no_bytes_is_left_alone(make: Make, asked: str) -> None:
    assert _memory.strided_parts_of(make()) == []
    with torchguard.audit() as guard:
        x = make().requires_grad_()
        (x * x).sum().backward()
    assert guard.violations == []


def test_where_the_write_may_have_happened_is_told() -> None:
    with torchguard.audit() as guard:
        x = torch.rand(3, requires_grad=True)
        y = x.exp()
        poke(y)
        with pytest.raises(SavedTensorCorruptionError) as error:
            y.sum().backward()
    text = str(error.value)
    assert "saved     " in text
    assert "written   (between save and read: a kernel or C++ code through data_ptr()" in text
    assert "read      " in text
    assert "1 of 3 elements, by up to" in text
    assert guard.violations == [error.value.violation]


# ---- what must stay as it is ---------------------------------------------------------------------------------------


def rrelu() -> list[torch.Tensor]:
    x = torch.linspace(-2, 2, 9, requires_grad=True)
    return list(torch.autograd.grad(F.rrelu(x, training=True).sum(), x))


def rrelu_in_place() -> list[torch.Tensor]:
    x = torch.linspace(-2, 2, 9, requires_grad=True)
    return list(torch.autograd.grad(F.rrelu_(x.clone(), training=True).sum(), x))


def rrelu_under_hooks() -> list[torch.Tensor]:
    x = torch.linspace(-2, 2, 9, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
        out = F.rrelu(x, training=True)
    return list(torch.autograd.grad(out.sum(), x))


def network() -> list[torch.Tensor]:
    model = torch.nn.Sequential(
        torch.nn.Conv2d(1, 2, 3),
        torch.nn.BatchNorm2d(2),
        torch.nn.ReLU(inplace=True),
        torch.nn.Dropout(0.3),
        torch.nn.Flatten(),
        torch.nn.Linear(72, 2),
    )
    optimiser = torch.optim.Adam(model.parameters(), fused=True)
    for _ in range(3):
        optimiser.zero_grad()
        model(torch.rand(2, 1, 8, 8)).square().sum().backward()
        optimiser.step()
    return [parameter.detach() for parameter in model.parameters()]


def recurrent() -> list[torch.Tensor]:
    model = torch.nn.LSTM(3, 4, 2, dropout=0.1)
    model(torch.rand(5, 2, 3))[0].sum().backward()
    return [parameter.grad for parameter in model.parameters()]  # type: ignore[misc]


def in_a_transform() -> list[torch.Tensor]:
    return [torch.func.grad(lambda t: (t * t.sin()).sum())(torch.rand(3))]


def twice_and_again() -> list[torch.Tensor]:
    x = torch.rand(4, requires_grad=True)
    y = x.exp() * x
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x, retain_graph=True)
    return [first.detach(), second, *torch.autograd.grad(y.sum(), x)]


@pytest.mark.parametrize(
    "program", [rrelu, rrelu_in_place, rrelu_under_hooks, network, recurrent, in_a_transform, twice_and_again]
)
def test_a_clean_program_has_the_results_that_it_has(program: Callable[[], list[torch.Tensor]], asked: str) -> None:
    torch.manual_seed(5)
    plain = program()
    torch.manual_seed(5)
    with torchguard.audit() as guard:
        found = program()
    assert guard.violations == []
    assert all(torch.equal(one, other) for one, other in zip(plain, found, strict=True))


def test_torch_is_left_as_it_was() -> None:
    before = vars(torch.autograd.Function)["apply"]
    with torchguard.audit():
        assert vars(torch.autograd.Function)["apply"] is not before
        with torchguard.audit():
            pass
        assert vars(torch.autograd.Function)["apply"] is not before
    assert vars(torch.autograd.Function)["apply"] is before
    with torchguard.strict():
        assert vars(torch.autograd.Function)["apply"] is before


def test_copies_go_with_the_saves(asked: str) -> None:
    class Graph(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.stash = x * 2
            return x * 1

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return grad

    with torchguard.audit():
        x = torch.rand(3, requires_grad=True)
        out = Graph.apply(x)  # type: ignore[no-untyped-call]
        stash = weakref.ref(out.grad_fn.stash)
        held = weakref.ref(out)
        (out.exp() * x).sum().backward()
        del out
        gc.collect()
        assert held() is None
        assert stash() is None


# ---- when it is asked ----------------------------------------------------------------------------------------------


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many comparisons were asked for, each time that anybody had to wait."""
    _audit.SYNCHRONOUS.discard("cpu")
    waited: list[int] = []
    stack = torch.stack

    def counting(tensors: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        result = stack(tensors, *args, **kwargs)
        if sys._getframe(1).f_code.co_name == "_settle":
            waited.append(len(tensors))
        return result

    monkeypatch.setattr(torch, "stack", counting)
    yield waited
    _audit.SYNCHRONOUS.add("cpu")


def test_one_backward_waits_once(waits: list[int]) -> None:
    with torchguard.audit():
        x = torch.rand(4, requires_grad=True)
        y = x
        for _ in range(10):
            y = y.exp().sigmoid()
        y.sum().backward()
        assert waits == [20]
        (x * x).sum().backward()
        assert waits == [20, 2]


def test_the_gradients_are_there_and_backward_raises_all_the_same(waits: list[int]) -> None:
    with torchguard.audit() as guard:
        x = torch.rand(4, requires_grad=True)
        y, z = x.exp(), x.sigmoid()
        poke(y)
        poke(z)
        with pytest.raises(SavedTensorCorruptionError):
            (y.sum() + z.sum()).backward()
        assert x.grad is not None
    assert len(guard.violations) == 1
    with torchguard.Guard("warn", depth="bytes") as guard, pytest.warns(torchguard.SavedTensorCorruptionWarning):
        y, z = x.exp(), x.sigmoid()
        poke(y)
        poke(z)
        (y.sum() + z.sum()).backward()
    assert [violation.saved_by for violation in guard.violations] in (["exp", "sigmoid"], ["sigmoid", "exp"])


def test_a_backward_that_fails_half_way_leaves_nothing_for_the_next(waits: list[int]) -> None:
    with torchguard.audit():
        x = torch.rand(4, requires_grad=True)
        y = x.exp()
        y.register_hook(lambda grad: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            y.exp().sum().backward()
        assert waits == []
        x.exp().sum().backward()
        assert waits == [1]


def test_a_save_that_is_looked_at_outside_backward_is_judged_at_once(waits: list[int]) -> None:
    with torchguard.audit():
        y = torch.rand(4, requires_grad=True).exp()
        poke(y)
        with pytest.raises(SavedTensorCorruptionError):
            y.grad_fn._saved_result  # type: ignore[union-attr]
    assert _torch.current_backward() < 0


def test_nothing_is_copied_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_torch, "is_capturing", lambda tensor: True)
    with torchguard.audit() as guard:
        y = torch.rand(4, requires_grad=True).exp()
        poke(y)
        y.sum().backward()
    assert guard.violations == []


# ---- combinations --------------------------------------------------------------------------------------------------


def test_repair_with_the_bytes_of_every_save_repairs_what_no_python_sees() -> None:
    with torchguard.Guard("repair", depth="bytes") as guard, pytest.warns(torchguard.SavedTensorCorruptionWarning):
        x = torch.rand(4, requires_grad=True)
        y = x.exp()
        truth = y.detach().clone()
        ctypes.memset(_torch.storage_address(y), 0x3C, 4)
        y.sum().backward()
    assert torch.equal(x.grad, truth)  # type: ignore[arg-type]
    assert [violation.kind for violation in guard.violations] == ["invisible"]


def test_an_allowed_write_is_what_backward_is_to_find() -> None:
    with torchguard.audit() as guard:
        y = torch.rand(4, requires_grad=True).exp()
        with torchguard.allow("a test"):
            y.data.zero_()
        y.sum().backward(retain_graph=True)
        poke(y)
        with pytest.raises(SavedTensorCorruptionError):
            y.sum().backward()
    assert len(guard.violations) == 1


@pytest.mark.parametrize("at", ["write", "read"])
def test_what_strict_sees_it_sees_at_the_same_moment(at: Any) -> None:
    with torchguard.audit(at=at):
        y = torch.rand(4, requires_grad=True).exp()
        if at == "write":
            with pytest.raises(SavedTensorCorruptionError):
                y.data.zero_()
        else:
            y.data.zero_()
        if at == "read":
            with pytest.raises(SavedTensorCorruptionError, match="zero_"):
                y.sum().backward()


def test_for_a_whole_process_and_its_threads() -> None:
    program = (
        "import ctypes, threading, torch\n"
        "def work():\n"
        "    y = torch.ones(2, requires_grad=True).exp()\n"
        "    ctypes.memset(y.data_ptr(), 0, 4)\n"
        "    try:\n"
        "        y.sum().backward()\n"
        "    except RuntimeError as error:\n"
        "        print(str(error).splitlines()[0])\n"
        "work()\n"
        "thread = threading.Thread(target=work)\n"
        "thread.start()\n"
        "thread.join()\n"
    )
    command = [sys.executable, "-c", f"import torchguard; torchguard.enable('audit')\n{program}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100)
    assert done.stdout.splitlines() == ["a write that no Python sees has corrupted a tensor saved for backward"] * 2


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_a_compiled_function_with_a_stash() -> None:
    class Scaling(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.factor = x.sum()
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            return grad * 2

    compiled = torch.compile(lambda x: Scaling.apply(x).sin(), backend="aot_eager", fullgraph=True)  # type: ignore[no-untyped-call]
    with torchguard.audit() as guard:
        x = torch.rand(3, requires_grad=True)
        compiled(x).sum().backward()
    assert guard.violations == []
    torch._dynamo.reset()


class _Stashes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        ctx.y = y
        return x * y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return grads[0] * ctx.y, None


@pytest.mark.parametrize("stashed", [False, True], ids=["raw_pointer", "stash"])
def test_what_is_written_in_an_allow_block_is_allowed_and_what_came_before_is_not(stashed: bool) -> None:
    def program(before: bool) -> torchguard.Guard:
        x, y = torch.ones(3, requires_grad=True), torch.tensor([4.0, 5.0, 6.0])
        with torchguard.audit() as guard:
            out = _Stashes.apply(x, y) if stashed else x * y
            if before:
                poke(y)
            with torchguard.allow("a test"):
                y.zero_() if stashed else ctypes.memset(y.data_ptr(), 0, 12)
            out.sum().backward()
        return guard

    guard = program(before=False)
    assert (guard.violations, [violation.allowed for violation in guard.allowed]) == ([], ["a test"])
    with pytest.raises(SavedTensorCorruptionError):
        program(before=True)
