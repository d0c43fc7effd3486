"""repair(): does backward get the bytes that were saved, whatever was written, and does everybody hear of it?"""

from __future__ import annotations

import random
import subprocess
import sys
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.func import vjp

import torchguard
from torchguard import SavedTensorCorruptionError, SavedTensorCorruptionWarning

pytestmark = pytest.mark.filterwarnings("ignore::torchguard.SavedTensorCorruptionWarning")

Program = Callable[[], list[torch.Tensor]]


def cloning() -> AbstractContextManager[Any]:
    """The truth: what every save held when it was saved."""
    return saved_tensors_hooks(torch.Tensor.clone, lambda tensor: tensor)


def gradients(program: Program, guard: AbstractContextManager[Any]) -> list[torch.Tensor]:
    torch.manual_seed(3)
    with guard:
        return program()


def check(program: Program, **keywords: Any) -> torchguard.Guard:
    """Under repair(), bit for bit what cloned saves give; the guard that was on."""
    truth = gradients(program, cloning())
    guard = torchguard.repair(**keywords)
    found = gradients(program, guard)
    assert len(found) == len(truth)
    for one, other in zip(found, truth, strict=True):
        assert torch.equal(one, other), (one, other)
    return guard


# ---- what PyTorch's own tool repairs, and what it misses ----------------------------------------------------------


def leaf(*shape: int) -> torch.Tensor:
    return torch.rand(shape or (2, 3), requires_grad=True)


def on_a_copy(write: Callable[[torch.Tensor], Any], save: Callable[[torch.Tensor], torch.Tensor]) -> Program:
    """``b`` is no leaf, so that it can be written to in place; what is saved of it is told by ``save``."""

    def program() -> list[torch.Tensor]:
        a = leaf()
        b = a.clone()
        out = save(b).sum()
        write(b)
        return list(torch.autograd.grad(out, a))

    return program


SAVES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "base": lambda b: b**2,
    "view": lambda b: b[0] ** 2,
    "view at an offset": lambda b: b[1:, ::2] ** 3,
    "transposed": lambda b: b.t().pow(3),
    "output": lambda b: b.exp(),
    "twice": lambda b: b * b * b.sin(),
    "version 1": lambda b: b.mul_(2) ** 2,
    "reshaped": lambda b: b.view(3, 2) @ b,
}
WRITES: dict[str, Callable[[torch.Tensor], Any]] = {
    "in place": lambda b: b.sin_(),
    "in place twice": lambda b: (b.sin_(), b.cos_()),
    "a view": lambda b: b[0].sin_(),
    "a view twice": lambda b: (b[0].sin_(), b[0].mul_(3)),
    "the last column": lambda b: b.t()[-1].zero_(),
    "an item": lambda b: b.__setitem__((0, 1), 7.0),
    "out=": lambda b: torch.add(b.detach(), 1, out=b.detach()),
    "torch.ops": lambda b: torch.ops.aten.mul_(b.detach(), 3),
    "foreach": lambda b: torch._foreach_mul_([b], 2.0),
    "without grad": lambda b: torch.no_grad()(b.zero_)(),
    "nothing": lambda b: b.add_(0),
    "data": lambda b: b.data.zero_(),
    "data of a view": lambda b: b[1].data.fill_(2),
    "data rebound": lambda b: setattr(b, "data", torch.ones(2, 3)),
    "data rebound to another shape": lambda b: setattr(b, "data", torch.ones(5)),
    "numpy": lambda b: b.detach().numpy().fill(4),
    "storage": lambda b: b.untyped_storage().fill_(1),
    "storage freed": lambda b: b.untyped_storage().resize_(0),
    "set_": lambda b: b.detach().set_(torch.zeros(2)),
    "a dlpack alias": lambda b: torch.from_dlpack(b.detach()).zero_(),
    "transposed in place": lambda b: b.detach().t_(),
    "out= through data": lambda b: torch.zeros(2, 3, out=b.data),
    "everything": lambda b: (b.data.add_(1), b.detach().mul_(2), b.detach().numpy().fill(0), b.data[0].sub_(5)),
}


@pytest.mark.parametrize("save", SAVES)
@pytest.mark.parametrize("write", WRITES)
def test_backward_gets_what_was_saved(save: str, write: str) -> None:
    check(on_a_copy(WRITES[write], SAVES[save]))


def fused_step_before_backward() -> list[torch.Tensor]:
    w = torch.nn.Parameter(torch.rand(4, 4))
    x = leaf(3, 4)
    out = (x @ w).tanh() @ w
    w.grad = torch.ones(4, 4)
    torch.optim.Adam([w], fused=True).step()
    return list(torch.autograd.grad(out.sum(), x))


def step_before_the_second_backward() -> list[torch.Tensor]:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    x = leaf(5, 3)
    out = model(x)
    first = out.sum()
    second = (out * out).sum()
    first.backward(retain_graph=True)
    optimiser.step()
    second.backward()
    return [parameter.grad for parameter in model.parameters()]  # type: ignore[misc]


def running_statistics() -> list[torch.Tensor]:
    norm = torch.nn.BatchNorm1d(3).eval()
    out = norm(leaf(5, 3))
    norm.train()(torch.rand(5, 3))
    return list(torch.autograd.grad(out.pow(2).sum(), norm.weight))


def double_backward_of_a_write() -> list[torch.Tensor]:
    x = leaf(4)
    y = x.exp()
    z = y * y * x
    y.data.mul_(3)
    (first,) = torch.autograd.grad(z.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.pow(2).sum(), x)
    return [first.detach(), second]


def triple_backward_through_a_leaf() -> list[torch.Tensor]:
    x = leaf(4)
    y = x**5
    with torch.no_grad():
        x.add_(1)
    (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x, create_graph=True)
    (third,) = torch.autograd.grad(second.sum(), x)
    return [first.detach(), second.detach(), third]


def the_same_graph_twice_with_a_write_between() -> list[torch.Tensor]:
    x = leaf(4)
    y = x.sigmoid()
    z = y * x
    found = [*torch.autograd.grad(z.sum(), x, retain_graph=True)]
    y.detach().zero_()
    found += torch.autograd.grad(z.sum(), x, retain_graph=True)
    y.data.add_(1)
    return [*found, *torch.autograd.grad(z.sum(), x)]


class Doubling(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, y)
        return x * y

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        x, y = ctx.saved_tensors
        return grad * y, grad * x


def custom_function() -> list[torch.Tensor]:
    x, y = leaf(4), leaf(4)
    out = Doubling.apply(x, y)  # type: ignore[no-untyped-call]
    y.data.zero_()
    return list(torch.autograd.grad(out.sum(), [x, y]))


def hooks_of_the_program() -> list[torch.Tensor]:
    x = leaf(4)
    with torch.autograd.graph.save_on_cpu():
        y = x.exp()
    y.detach().zero_()
    return list(torch.autograd.grad(y.sum(), x))


def recurrent_state_in_place() -> list[torch.Tensor]:
    w, state = leaf(3, 3), torch.zeros(4, 3)
    total = torch.zeros(())
    for step in range(4):
        state[step] = (state[step - 1] @ w + step).tanh()
        total = total + (state[step] * w).sum()
    return list(torch.autograd.grad(total, w))


def complex_conjugate() -> list[torch.Tensor]:
    x = torch.randn(3, dtype=torch.complex64, requires_grad=True)
    y = x.clone()
    out = (y.conj() * x * y).abs().sum()
    y.detach().zero_()
    return list(torch.autograd.grad(out, x))


@pytest.mark.parametrize(
    "program",
    [
        fused_step_before_backward,
        step_before_the_second_backward,
        running_statistics,
        double_backward_of_a_write,
        triple_backward_through_a_leaf,
        the_same_graph_twice_with_a_write_between,
        custom_function,
        recurrent_state_in_place,
        complex_conjugate,
    ],
)
def test_whole_programs(program: Program) -> None:
    check(program)


def test_under_the_programs_own_hooks() -> None:
    x = gradients(hooks_of_the_program, torchguard.repair())[0]
    torch.manual_seed(3)
    assert torch.equal(x, torch.rand(4).exp())


# ---- programs that nobody has thought of ---------------------------------------------------------------------------

_STEPS: list[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = [
    lambda a, b: a * b,
    lambda a, b: a.sigmoid() + b,
    lambda a, b: (a - b).tanh(),
    lambda a, b: a @ b,
    lambda a, b: a.clone().mul_(b),
    lambda a, b: a[:2].repeat(2, 1) * b,
    lambda a, b: torch.where(a > b, a * a, b.sin()),
    lambda a, b: torch.softmax(a, 0) / (b * b + 1),
    lambda a, b: a.t() * b.exp().clamp(max=5),
]


def random_program(seed: int) -> Program:
    def program() -> list[torch.Tensor]:
        draw = random.Random(seed)
        leaves = [leaf(4, 4) for _ in range(2)]
        values = [leaf.clone() for leaf in leaves]
        total = (leaves[0] * leaves[1]).sum()
        for _ in range(8):
            values.append(draw.choice(_STEPS)(draw.choice(values), draw.choice(values)))
            total = total + values[-1].pow(2).mean()
            if draw.random() < 0.6:
                target = draw.choice(values).detach() if draw.random() < 0.5 else draw.choice(values).data
                part = draw.choice([target, target[1:3], target.t()[0], target.as_strided((5,), (3,))])
                name = draw.choice(["zero", "double", "shift", "item", "out", "numpy", "foreach"])
                if name == "zero":
                    part.zero_()
                elif name == "double":
                    part.mul_(2)
                elif name == "shift":
                    torch.ops.aten.add_(part, 0.5)
                elif name == "item":
                    part[0] = 3
                elif name == "out":
                    torch.mul(part, 0.5, out=part)
                elif name == "numpy":
                    part.numpy()[...] = 0.25
                else:
                    torch._foreach_neg_([part])
        return list(torch.autograd.grad(total, leaves))

    return program


@pytest.mark.parametrize("seed", range(120))
def test_random_programs(seed: int) -> None:
    check(random_program(seed))


# ---- what it says --------------------------------------------------------------------------------------------------


def test_it_warns_once_a_site_and_names_the_write() -> None:
    with warnings.catch_warnings(record=True) as said, torchguard.repair() as guard:
        warnings.simplefilter("always")
        for _ in range(3):
            y = leaf().sigmoid()
            y.data.zero_()
            y.sum().backward()
    (note,) = said
    assert issubclass(note.category, SavedTensorCorruptionWarning)
    lines = str(note.message).splitlines()
    assert lines[0] == (
        "zero_() through .data has corrupted a tensor saved for backward: backward is given what was saved"
    )
    assert "y.data.zero_()     6 of 6 elements, by up to" in str(note.message)
    (violation,) = guard.violations
    assert violation.repaired
    assert violation.times == 3


def test_it_ends_by_saying_what_it_repaired(capsys: pytest.CaptureFixture[str]) -> None:
    with torchguard.repair():
        y = leaf().sigmoid()
        y.data.zero_()
        z = leaf() * 1
        w = z * z
        z.mul_(2)
        (y.sum() + w.sum()).backward()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("torchguard: repair: backward was given the saved bytes of 3 saves that were written to at ")
    assert "test_repair.py" in line
    assert "(1)" in line
    assert "(2)" in line
    with torchguard.repair():
        leaf().sigmoid().sum().backward()
    assert capsys.readouterr().err == ""


def test_a_decorated_function_sums_up_when_the_process_ends() -> None:
    program = (
        "import torch, torchguard\n"
        "@torchguard.repair()\n"
        "def step():\n"
        "    y = torch.ones(2, requires_grad=True).sigmoid()\n"
        "    y.data.zero_()\n"
        "    y.sum().backward()\n"
        "for _ in range(5):\n"
        "    step()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=100)
    lines = [line for line in done.stderr.splitlines() if line.startswith("torchguard: ")]
    assert len(lines) == 1
    assert "of 5 saves" in lines[0]


def test_a_tracked_write_is_told_as_what_pytorch_refuses() -> None:
    with torchguard.repair() as guard:
        y = leaf().sigmoid()
        y.detach().zero_()
        y.sum().backward()
    (violation,) = guard.violations
    assert (violation.kind, violation.operation, violation.repaired) == ("tracked", "zero_()", True)
    assert str(violation).startswith("zero_(), at which PyTorch would refuse to go on, has corrupted")


def another_part() -> list[torch.Tensor]:
    base = torch.rand(4, 3)
    a, b = base[:2].requires_grad_(), base[2:]
    out = a.sin().sum()
    b.zero_()
    return list(torch.autograd.grad(out, a))


def other_columns() -> list[torch.Tensor]:
    a = leaf(3, 4)
    b = a * 1
    out = (b[:, ::2] ** 2).sum()
    with torch.no_grad():
        b[:, 1::2].mul_(3)
    return list(torch.autograd.grad(out, a))


def rebound_by_set() -> list[torch.Tensor]:
    a, b = leaf(), leaf()
    out = (a * b).sum()
    with torch.no_grad():
        a.set_(a.detach().clone())  # type: ignore[call-overload]
    return list(torch.autograd.grad(out, b))


def written_in_inference_mode() -> list[torch.Tensor]:
    a = leaf()
    y = a.exp()
    with torch.inference_mode():
        y.mul_(2)
    return list(torch.autograd.grad(y.sum(), a))


def no_elements() -> list[torch.Tensor]:
    a = leaf(0, 4)
    y = a.exp()
    y.detach().zero_()
    return list(torch.autograd.grad(y.sum(), a))


def no_elements_transposed() -> list[torch.Tensor]:
    a = leaf(0, 4)
    y = a.exp()
    out = y.sum()
    y.detach().t_()
    return list(torch.autograd.grad(out, a))


def times_one() -> list[torch.Tensor]:
    a = leaf()
    y = a.exp()
    y.detach().mul_(1)
    return list(torch.autograd.grad(y.sum(), a))


def there_and_back() -> list[torch.Tensor]:
    a = leaf()
    y = a.exp()
    y.detach().neg_()
    y.detach().neg_()
    return list(torch.autograd.grad(y.sum(), a, retain_graph=True)) + list(torch.autograd.grad(y.sum(), a))


def foreach_of_two_rows() -> list[torch.Tensor]:
    a = leaf(3, 4)
    b = a * 1
    out = (b[0] ** 2).sum()
    with torch.no_grad():
        torch._foreach_mul_([b[1], b[2]], 3.0)
    return list(torch.autograd.grad(out, a))


HARMLESS = [
    another_part,
    other_columns,
    rebound_by_set,
    no_elements,
    times_one,
    there_and_back,
    foreach_of_two_rows,
]


@pytest.mark.parametrize("program", HARMLESS)
@pytest.mark.filterwarnings("error::torchguard.SavedTensorCorruptionWarning")
def test_what_changes_no_saved_byte_is_let_go_on_in_silence(
    program: Program, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        program()  # plain PyTorch refuses it, and will again once repair() is taken away
    guard = check(program)
    assert guard.violations == []
    assert capsys.readouterr().err == ""


def test_one_call_that_writes_to_the_save_and_beside_it_is_told() -> None:
    def program() -> list[torch.Tensor]:
        a = leaf(3, 4)
        b = a * 1
        out = (b[0] ** 2).sum()
        with torch.no_grad():
            torch._foreach_mul_([b[1], b[0]], 3.0)
        return list(torch.autograd.grad(out, a))

    (violation,) = check(program).violations
    assert (violation.kind, violation.operation, violation.elements) == ("tracked", "_foreach_mul_()", 4)


@pytest.mark.parametrize("program", [no_elements_transposed, written_in_inference_mode])
def test_tracked_writes_of_a_rare_kind_are_repaired(program: Program) -> None:
    check(program)


@pytest.mark.parametrize(
    "write",
    [lambda x, y: x.mul_(2), lambda x, y: y.mul_(2), lambda x, y: x.data.mul_(2), lambda x, y: y.data.zero_()],
)
def test_what_a_pullback_returns_is_no_part_of_a_graph(write: Callable[[torch.Tensor, torch.Tensor], Any]) -> None:
    def program() -> list[torch.Tensor]:
        x = torch.rand(4)
        y, pull = vjp(lambda x: (x * x).sigmoid(), x)
        write(x, y)
        (found,) = pull(torch.ones(4))
        return [found, torch.tensor(found.requires_grad)]

    torch.manual_seed(3)
    x = torch.rand(4)
    y, pull = vjp(lambda x: (x * x).sigmoid(), x)
    truth = [pull(torch.ones(4))[0], torch.tensor(False)]
    assert [one.tolist() for one in gradients(program, torchguard.repair())] == [one.tolist() for one in truth]


def doubled(x: torch.Tensor) -> torch.Tensor:
    return x.mul_(2)


def written_by_a_script() -> list[torch.Tensor]:
    a = leaf()
    y = a.exp()
    out = y * 3
    scripted: Any = torch.jit.script(doubled)
    scripted(y.detach())
    return list(torch.autograd.grad(out.sum(), a))


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_what_torchscript_writes_is_left_to_pytorch_unless_the_bytes_of_every_save_are_kept() -> None:
    """docs/limits.md tells it."""
    with torchguard.repair() as guard, pytest.raises(RuntimeError, match="modified by an inplace operation"):
        written_by_a_script()
    assert guard.violations == []
    truth = gradients(written_by_a_script, cloning())
    guard = torchguard.Guard("repair", depth="bytes")
    assert [one.tolist() for one in gradients(written_by_a_script, guard)] == [one.tolist() for one in truth]
    assert [violation.repaired for violation in guard.violations] == [True]


# ---- what stays as it is -------------------------------------------------------------------------------------------


def test_identity_of_saved_tensors_that_nobody_wrote_to() -> None:
    met = []

    class Looks(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x, y)
            return x * y

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
            met.append(ctx.saved_tensors)
            return grad, grad

    with torchguard.repair():
        x, y = leaf(), leaf()
        kept = y.detach().clone()
        out = Looks.apply(x, y)  # type: ignore[no-untyped-call]
        y.data.zero_()
        out.sum().backward()
    ((found_x, found_y),) = met
    assert found_x is x
    assert found_y is not y
    assert torch.equal(found_y, kept)
    assert found_y.requires_grad


def test_what_backward_does_to_what_it_was_given_does_not_stay() -> None:
    class Destroys(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(x)
            return x * x

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            (x,) = ctx.saved_tensors
            result = 2 * grad * x
            with torch.no_grad():
                x.zero_()
            return result

    with torchguard.repair():
        x = leaf()
        out = Destroys.apply(x)  # type: ignore[no-untyped-call]
        truth = 2 * x.detach()
        x.data.add_(1)
        for _ in range(2):
            assert torch.equal(torch.autograd.grad(out.sum(), x, retain_graph=True)[0], truth)


def saves_of_one_tensor() -> torch.Tensor:
    b = leaf() * 1
    out = b * b * b.sin() + b.exp().tanh()
    b.mul_(2)
    return out


def many_writes() -> torch.Tensor:
    b = leaf() * 1
    out = b.exp().exp() + b.sin()
    for _ in range(5):
        b.mul_(2)
        b.data.add_(1)
    return out


def one_row() -> torch.Tensor:
    b = leaf(4, 5) * 1
    out = torch.stack([row.sin() for row in b.unbind()])  # type: ignore[no-untyped-call]
    with torch.no_grad():
        b[2].zero_()
    return out


def nothing() -> torch.Tensor:
    return leaf().sin().exp().tanh() @ leaf(3, 2)


def everything() -> torch.Tensor:
    a, b = leaf() * 1, leaf() * 1
    out = a * b
    torch._foreach_mul_([a, b], 2.0)
    return out


#: How many tensors these write to after they were saved.
WRITTEN_TO = {saves_of_one_tensor: 1, many_writes: 1, one_row: 1, nothing: 0, everything: 2}


@pytest.mark.parametrize("program", WRITTEN_TO)
def test_only_what_is_written_to_is_copied_and_once(program: Callable[[], torch.Tensor]) -> None:
    def all_of_it() -> list[torch.Tensor]:
        out = program()
        out.sum().backward(retain_graph=True)
        out.sum().backward()
        return [out]

    guard = check(all_of_it)
    assert guard.stats.copies == WRITTEN_TO[program]


# ---- what it does not repair ---------------------------------------------------------------------------------------


def checkpointed() -> torch.Tensor:
    from torch.utils.checkpoint import checkpoint

    x, w = leaf(), torch.rand(3)
    out = checkpoint(lambda x: (x * w).sin(), x, use_reentrant=False)
    w.add_(1)
    return out.sum()  # type: ignore[no-any-return]


def large_and_unseen() -> torch.Tensor:
    y = leaf(600, 600).exp()
    torch.zeros(600, 600, out=y.data)
    return y.sum()


def test_what_cannot_be_repaired_raises() -> None:
    with torchguard.repair(), pytest.raises(SavedTensorCorruptionError, match="a checkpoint reads again"):
        checkpointed().backward()
    with (
        torchguard.repair(every_call=False),
        pytest.raises(SavedTensorCorruptionError, match="a write through an alias"),
    ):
        large_and_unseen().backward()
    check(lambda: list(torch.autograd.grad((y := leaf(3)).mul(2).sum(), y)), every_call=False)


def test_a_tracked_write_that_nobody_sees_is_refused_in_pytorchs_words() -> None:
    with torchguard.repair(every_call=False) as guard:
        y = leaf().exp()
        torch.zeros(2, 3, out=y.detach())
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.sum().backward()
    assert guard.violations == []


def test_what_is_allowed_or_suppressed_is_left_as_it_is() -> None:
    with torchguard.repair() as guard:
        x = leaf()
        y = x.sigmoid()
        with torchguard.allow("a test"):
            y.data.zero_()
        y.sum().backward()
    assert torch.equal(x.grad, torch.zeros(2, 3))  # type: ignore[arg-type]
    assert guard.violations == []

    with torchguard.repair(suppressions=["test_repair.py -- a test"]) as guard:
        x = leaf()
        y = x.sigmoid()
        y.data.zero_()
        y.sum().backward()
        z = x.exp()
        z.detach().zero_()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            z.sum().backward()
    assert torch.equal(x.grad, torch.zeros(2, 3))  # type: ignore[arg-type]
    assert guard.violations == []


# ---- nesting -------------------------------------------------------------------------------------------------------


def test_the_inner_guard_decides_about_what_is_written_in_it() -> None:
    with torchguard.strict() as outer:
        x = leaf()
        y, z = x.sigmoid(), x.exp()
        with torchguard.repair() as inner:
            y.data.zero_()
        with pytest.raises(SavedTensorCorruptionError):
            z.data.zero_()
        truth = y.detach().new_tensor((x.detach().sigmoid() * (1 - x.detach().sigmoid())).tolist())
        y.sum().backward()
    assert torch.allclose(x.grad, truth)  # type: ignore[arg-type]
    assert [violation.repaired for violation in inner.violations] == [True]
    assert [violation.repaired for violation in outer.violations] == [False]


def test_backward_after_the_guard_was_left() -> None:
    with torchguard.repair() as guard:
        x = leaf()
        y = x.exp()
        truth = y.detach().clone()
        y.data.zero_()
    y.sum().backward()
    assert torch.equal(x.grad, truth)  # type: ignore[arg-type]
    assert len(guard.violations) == 1


def test_process_wide() -> None:
    guard = torchguard.enable("repair")
    try:
        assert (guard.action, guard.at, guard.every_call) == ("repair", "read", True)
        x = leaf()
        y = x.exp()
        truth = y.detach().clone()
        y.detach().zero_()
        y.sum().backward()
    finally:
        torchguard.disable()
    assert torch.equal(x.grad, truth)  # type: ignore[arg-type]


# ---- one write after another, of kinds that are judged in different ways --------------------------------------------


def by_an_optimiser(x: torch.Tensor) -> None:
    x.grad = torch.ones_like(x)
    torch.optim.SGD([x], lr=0.5).step()
    x.grad = None


ONE_AFTER_ANOTHER: dict[str, Callable[[torch.Tensor], object]] = {
    "counted": lambda x: x.add_(1),
    "foreach": lambda x: torch._foreach_add_([x], [torch.ones_like(x)]),
    "optimiser": by_an_optimiser,
    "silent": lambda x: x.data.mul_(3),
    "rebound": lambda x: setattr(x, "data", torch.full_like(x, 0.5)),
    "rebound to the same": lambda x: setattr(x, "data", x.data.clone()),
    "unseen": lambda x: torch.mul(x.data, 2, out=x.data),
}


@pytest.mark.parametrize("second", ONE_AFTER_ANOTHER)
@pytest.mark.parametrize("first", ONE_AFTER_ANOTHER)
def test_whichever_write_comes_first_what_was_saved_is_read_and_it_is_said(first: str, second: str) -> None:
    def program() -> list[torch.Tensor]:
        a = leaf()
        out = torch.nn.functional.silu(a)
        with torch.no_grad():
            ONE_AFTER_ANOTHER[first](a)
            ONE_AFTER_ANOTHER[second](a)
        out.sum().backward()
        assert a.grad is not None
        return [a.grad]

    guard = check(program)
    assert len(guard.violations) == (first != second or first != "rebound to the same")
