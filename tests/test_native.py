"""Does the part in C do what the part in Python does, and can torchguard do without it?"""

from __future__ import annotations

import gc
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
import types
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import torchguard
from torchguard import _hooks, _packing, _reads, _torch
from torchguard._aliases import ALIASES
from torchguard._fast import native
from torchguard._saves import LEDGER, Save

ROOT = Path(torchguard.__file__).parent.parent

needs_native = pytest.mark.skipif(
    native is None, reason="torchguard was built without its part in C, or it is not wanted"
)


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        y = x * x * x
        ctx.save_for_backward(x, y)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        x, _ = ctx.saved_tensors
        return 3 * x * x * grads[0]


def leaf(*shape: int) -> torch.Tensor:
    return torch.linspace(0.1, 1.0, torch.Size(shape).numel()).reshape(shape).requires_grad_()


def outputs_and_inputs() -> Any:
    x = leaf(4)
    return (x.exp() * x.sin()).tanh().sum()


def layers() -> Any:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 2))
    return torch.nn.functional.cross_entropy(model(leaf(3, 4)), torch.tensor([0, 1, 0]))


def in_place() -> Any:
    h = leaf(4).sin()
    for _ in range(3):
        h = h.sin()
        h.add_(0.5)
        h = h.sigmoid()
    return h.sum()


def relu_in_place() -> Any:
    return torch.nn.functional.relu(leaf(4).sin(), inplace=True).square().sum()


def views() -> Any:
    x = leaf(4, 4)
    h = x.cos()
    h[0].mul_(2)
    return (h.t()[1:] * h[:, 1:].t() * x[1:]).sum() + h.view(-1)[3:9].exp().sum()


def view_written_in_place() -> Any:
    h = leaf(6).cos()
    v = h[:3]
    v.exp_()
    return (v.sigmoid() * v).sum()


def many_outputs() -> Any:
    values, places = leaf(3, 4).max(1)
    return (values * torch.linalg.svd(leaf(3, 3) + torch.eye(3)).S).sum() + places.sum()


def lists() -> Any:
    return sum(h.sum() for h in torch._foreach_exp([leaf(2).sin(), leaf(3), leaf(2)]))


def function_of_the_users() -> Any:
    x = leaf(3)
    return (Cube.apply(x.exp()) * Cube.apply(x)).sum()


def exported() -> Any:
    x = leaf(3)
    shared = torch.from_numpy(torch.ones(3).numpy())
    h = x * shared
    out = h.exp()
    out.detach().numpy()
    return (out * out.sin()).sum()


def aliases() -> Any:
    w, b = leaf(4), leaf(4)
    kept = w.data
    b.data.add_(0.0)
    out = (w.sin() * b.cos()).sum()
    return out + kept.sum()


def checkpointed() -> Any:
    return checkpoint(lambda x: x.sin().exp(), leaf(3), use_reentrant=False).sum()


def twice() -> Any:
    x = leaf(3)
    (g,) = torch.autograd.grad((x.exp() * x).sum(), x, create_graph=True)
    return (g.sin() * g).sum()


def odd_kinds() -> Any:
    sparse = torch.eye(3).to_sparse().requires_grad_()
    z = torch.complex(leaf(3), leaf(3))
    return (
        torch.sparse.mm(sparse, leaf(3, 2)).sum()
        + (z.exp() * z.conj()).real.sum()
        + leaf(0, 3).exp().sum()
        + torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], requires_grad=True).cos().to_padded_tensor(0).sum()
    )


def transformed() -> Any:
    return torch.func.grad(lambda x: (x.sin() * x).sum())(leaf(3).detach()).sum() * leaf(1).exp().sum()


PROGRAMS = [
    outputs_and_inputs, layers, in_place, relu_in_place, views, view_written_in_place, many_outputs, lists,
    function_of_the_users, exported, aliases, checkpointed, twice, odd_kinds, transformed,
]  # fmt: skip


def facts(save: Save) -> tuple[Any, ...]:
    return (
        save.node,
        save.output,
        save.version,
        save.code,
        save.offset,
        save.inner_code,
        save.inner_offset,
        save.remarks is None,
        None if save.remarks is None else (save.remarks.proof is None, len(save.remarks.exports)),
        save.tensor.dim(),
        save.tensor.is_leaf,
        save.tensor.grad_fn is None,
    )


def recorded(program: Callable[[], Any]) -> tuple[list[tuple[Any, ...]], list[Any]]:
    """What is recorded of the saves of a program that live when it ends, and the gradients of its leaves."""
    found: list[tuple[Any, ...]] = []
    gradients: list[Any] = []
    for _ in range(3):  # files and types of nodes that were not met before have been met the last time
        assert not LEDGER.any_alive()  # which lets go of the dead: a storage's identity may be used again
        ALIASES.forget_all_dead()
        with torchguard.strict():
            out = program()
            saves = LEDGER.all_alive()
            found = [facts(save) for save in saves]
            leaves = [save.tensor for save in saves if save.tensor.is_leaf and save.tensor.requires_grad]
            del saves
            if out.requires_grad:
                out.backward()
            gradients = [
                leaf.grad if leaf.grad is None else leaf.grad.to_dense().tolist()
                for leaf in leaves
                if not leaf.is_nested
            ]
            del out, leaves
        gc.collect()
    return found, gradients


@needs_native
@pytest.mark.usefixtures("empty_ledger")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_both_parts_record_the_same(program: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    in_c = recorded(program)
    monkeypatch.setattr(_packing, "native", None)
    monkeypatch.setattr(_reads, "native", None)
    monkeypatch.setattr(_hooks, "unpack", _reads.make_unpack())
    assert recorded(program) == in_c
    assert in_c[0]


@pytest.mark.usefixtures("empty_ledger")
def test_a_node_that_has_no_place_in_the_order_is_none_of_this_operation() -> None:
    """Its sequence number is the largest there is."""
    with torchguard.strict():
        y = leaf(4).sin()
        torch.normal(0.0, 1.0, y.shape, out=y)
        assert y.grad_fn is not None
        z = leaf(4) / y  # saves y, as an input
        assert {(save.node, save.tensor.grad_fn is y.grad_fn) for save in LEDGER.all_alive()} >= {(None, True)}
        assert z.requires_grad


@needs_native
def test_an_ordinary_save_takes_no_step_in_python() -> None:
    """Otherwise the comparison above would compare Python with itself."""
    steps = []

    def trace(frame: Any, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename == _packing.__file__:
            steps.append(frame.f_code.co_name)

    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.ReLU(), torch.nn.Linear(4, 2))
    x = torch.ones(3, 4)
    with torchguard.strict():
        for _ in range(3):
            model(x).exp().sum().backward()
        sys.setprofile(trace)
        try:
            model(x).exp().sum().backward()
        finally:
            sys.setprofile(None)
        assert [name for name in steps if name == "pack"] == []
        sys.setprofile(trace)
        try:
            torch.sparse.mm(torch.eye(2).to_sparse(), leaf(2, 2)).sum().backward()
        finally:
            sys.setprofile(None)
    assert "pack" in steps  # what is out of the ordinary


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env={**os.environ, **environment},
        cwd=ROOT,
    )


CORRUPTING = """
import torch, torchguard
from torchguard._aliases import ALIASES
from torchguard._fast import native
print(native)
x = torch.ones(3, requires_grad=True)
with torchguard.strict():
    out = x.exp()
    {write}
    out.sum().backward()
"""


@pytest.mark.parametrize(("write", "loud"), [("out.data.zero_()", True), ("out.data.add_(0)", False)])
def test_python_alone_does_as_well(write: str, loud: bool) -> None:
    ran = run(CORRUPTING.format(write=write), TORCHGUARD_NATIVE="0")
    assert ran.stdout == "None\n"
    assert ("SavedTensorCorruptionError" in ran.stderr) == loud
    assert (ran.returncode != 0) == loud


@needs_native
def test_a_hook_is_let_go_of_with_what_it_holds() -> None:
    class Held(dict[Any, Any]):
        pass

    held = Held()
    hook = native.Unpack(
        otherwise=held.get, collecting=[], tensor_type=torch.Tensor, mode_active=bool, storage_id=id, records=bool,
        young=held, aliases={},
    )  # fmt: skip
    held["a circle"] = hook
    weak = weakref.ref(held)
    del held, hook
    gc.collect()
    assert weak() is None


@needs_native
def test_what_a_hook_is_made_of_is_checked() -> None:
    with pytest.raises(TypeError, match="otherwise is missing"):
        native.Pack(save_type=Save)
    with pytest.raises(TypeError, match="keyword arguments"):
        native.Unpack(1)
    with pytest.raises(TypeError, match="a list and dictionaries are asked for"):
        native.Unpack(
            otherwise=id, collecting=(), tensor_type=torch.Tensor, mode_active=bool, storage_id=id, records=bool,
            young={}, aliases={},
        )  # fmt: skip


@needs_native
@pytest.mark.parametrize("name", ["Pack", "Unpack", "Method", "Data"])
def test_what_was_not_made_with_anything_does_nothing(name: str) -> None:
    kind = getattr(native, name)
    empty = kind.__new__(kind)
    uses: list[Callable[[], object]] = [lambda: empty(leaf(1))]
    if hasattr(kind, "__get__"):
        uses += [lambda: empty.__get__(leaf(1)), lambda: empty.__get__(None, torch.Tensor)]
    if hasattr(kind, "__set__"):
        uses += [lambda: empty.__set__(leaf(1), leaf(1)), lambda: empty.__delete__(leaf(1))]
    for use in uses:
        with pytest.raises(TypeError):
            use()


@needs_native
def test_an_exception_on_the_way_is_raised_and_nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted() -> bool:
        raise KeyboardInterrupt

    x = leaf(3)
    monkeypatch.setattr(_torch, "function_mode_active", interrupted)
    pack = _packing.make_pack()
    monkeypatch.undo()
    before = sys.getrefcount(x)
    with pytest.raises(KeyboardInterrupt):
        pack(x)
    assert sys.getrefcount(x) == before


@needs_native
def test_many_saves_leave_nothing() -> None:
    x = leaf(3)
    with torchguard.strict():

        def step() -> None:
            (x.exp() * x).sum().backward()
            x.data.mul_(1.0)
            x.grad = None

        for _ in range(50):
            step()
        gc.collect()
        before = len(gc.get_objects()), sys.getrefcount(type(x.exp().grad_fn)), sys.getrefcount(None)
        for _ in range(2000):
            step()
        gc.collect()
        after = len(gc.get_objects()), sys.getrefcount(type(x.exp().grad_fn)), sys.getrefcount(None)
    assert abs(after[0] - before[0]) < 50
    assert abs(after[1] - before[1]) < 10
    assert abs(after[2] - before[2]) < 100


def test_one_that_was_compiled_from_another_checkout_is_not_used() -> None:
    ran = run(
        "import sys, types; sys.modules['torchguard._native'] = types.ModuleType('_native')\n"
        + CORRUPTING.format(write="pass")
    )
    assert (ran.returncode, ran.stdout) == (0, "None\n"), ran.stderr


# ---- how it is built -----------------------------------------------------------------------------------------


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Any:
    """``hatch_build.py`` without hatchling, which pip has only while it builds."""
    plugin = types.ModuleType("hatchling.builders.hooks.plugin.interface")
    plugin.BuildHookInterface = dict  # type: ignore[attr-defined]
    for name in ("hatchling", "hatchling.builders", "hatchling.builders.hooks", "hatchling.builders.hooks.plugin"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, plugin.__name__, plugin)
    specification = importlib.util.spec_from_file_location("hatch_build", ROOT / "hatch_build.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def source(directory: Path) -> Path:
    package = directory / "torchguard"
    package.mkdir()
    shutil.copy(ROOT / "torchguard" / "_native.c", package)
    return directory


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_it_is_built_where_there_is_a_compiler(build: Any, tmp_path: Path) -> None:
    built = build.compile_native(source(tmp_path))
    assert built is not None
    assert built.exists()
    assert native is not None or os.environ.get("TORCHGUARD_NATIVE") == "0"


def test_without_a_compiler_that_is_said_and_nothing_else_happens(
    build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CC", str(tmp_path / "there-is-none"))
    assert build.compile_native(source(tmp_path)) is None
    assert "torchguard is built without its part in C: " in capfd.readouterr().err


# ---- what was broken ------------------------------------------------------------------------------------------


class Counting(TorchFunctionMode):
    """Notes the functions that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


class Dispatched(TorchDispatchMode):
    """Notes the operators that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Noting(torch.Tensor):
    """A subclass that notes what it is asked."""

    seen: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.seen.append(func.__name__)
        return super().__torch_function__(func, types, args, kwargs or {})


def data_seen_by_others() -> list[list[str]]:
    x = leaf(3)
    out = x.exp()
    kept = x.data
    with Counting() as functions:
        _ = x.data, out.data  # of storages with an alias that lives, and with a save
    with Dispatched() as operators:
        _ = x.data, out.data
    odd = torch.nn.Parameter(kept.clone().as_subclass(Noting))
    Noting.seen.clear()
    _ = odd.data
    return [functions.seen, operators.seen, list(Noting.seen)]


@pytest.mark.parametrize("mode", ["strict", "warn", "repair", "audit", "watch"])
def test_data_is_read_once(mode: str) -> None:
    """The part in C took the alias, and where it was out of the ordinary had Python take another."""
    plain = data_seen_by_others()
    assert len(plain[2]) == 1
    with getattr(torchguard, mode)():
        assert data_seen_by_others() == plain


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_it_compiles_without_a_warning() -> None:
    """What Python.h of 3.10 does not declare is taken to give an int: half of a pointer."""
    include = sysconfig.get_path("include")
    if not Path(include, "Python.h").exists():
        pytest.skip("no headers of Python")
    command = ["cc", "-fsyntax-only", "-Wall", "-Werror", f"-I{include}", str(ROOT / "torchguard" / "_native.c")]
    assert subprocess.run(command, capture_output=True, text=True, check=False).stderr == ""


@needs_native
def test_an_alias_is_held_by_torchs_own_kind_of_weak_reference() -> None:
    """Under torch 2.5 a plain one leaves a pointer to nothing behind."""
    with torchguard.strict():
        x = leaf(3)
        kept = x.data
        (entry,) = (entry for entry in ALIASES.young.values() if entry[0]() is kept)
        assert type(entry[0]) is _torch.ref


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_it_runs_alone_on_plain_objects() -> None:
    """For other Pythons: ``python3.12 tests/native_alone.py``."""
    ran = subprocess.run(
        [sys.executable, "-X", "dev", str(ROOT / "tests" / "native_alone.py")],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.endswith("rounds of the part in C\n")
