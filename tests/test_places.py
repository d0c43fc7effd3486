"""Is the place that a report shows the line in the user's own code, whatever lies between?"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import threading
from collections.abc import Callable
from types import CodeType
from typing import Any

import pytest
import torch
from torch import nn

from torchguard import _places, strict
from torchguard._model import Place
from torchguard._places import (
    called_from,
    expression_of,
    operation_of,
    place_of,
    user_instruction,
    user_instruction_above,
)
from torchguard._violation import SavedTensorCorruptionError, Violation

HERE = _places._short(__file__)
POSITIONS = hasattr(CodeType, "co_positions")


def violation_of(program: Callable[[], Any]) -> Violation:
    with strict():
        with pytest.raises(SavedTensorCorruptionError) as caught:
            program()
    return caught.value.violation


def leaf() -> torch.Tensor:
    return torch.tensor([1.0, 2.0, 3.0], requires_grad=True)


# ---- the innermost frame that is the user's ----------------------------------------------------------------


def test_the_three_places_of_a_plain_program() -> None:
    def program() -> None:
        x = leaf()
        y = torch.sigmoid(x)
        w = y.data
        w.zero_()

    first = program.__code__.co_firstlineno
    violation = violation_of(program)
    assert violation.saved == Place(
        HERE, first + 2, qualified("program"), "y = torch.sigmoid(x)", "torch.sigmoid(x)" if POSITIONS else ""
    )
    assert violation.aliased == Place(
        HERE, first + 3, qualified("program"), "w = y.data", "y.data" if POSITIONS else ""
    )
    assert violation.written == Place(
        HERE, first + 4, qualified("program"), "w.zero_()", "w.zero_()" if POSITIONS else ""
    )


def qualified(name: str) -> str:
    """The qualified name of a function in the calling test, as this Python keeps it."""
    return f"{inspect.stack()[1].function}.<locals>.{name}" if sys.version_info >= (3, 11) else name


def test_through_a_module_the_place_is_the_call_in_the_users_forward() -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.nn.Sequential(self.layer, torch.nn.Tanh())(x)

    net = Net()

    def program() -> None:
        y = net(leaf())
        y.data.zero_()

    violation = violation_of(program)
    assert violation.saved is not None
    assert violation.saved.line == Net.forward.__code__.co_firstlineno + 1
    assert violation.saved.function.endswith("forward")
    assert violation.saved_by == "tanh"


def test_through_functional() -> None:
    def program() -> None:
        y = torch.nn.functional.softmax(leaf(), dim=0)
        torch.nn.functional.relu_(y.data.neg_())

    violation = violation_of(program)
    assert violation.saved is not None
    assert violation.written is not None
    assert violation.saved.source == "y = torch.nn.functional.softmax(leaf(), dim=0)"
    assert violation.saved_by == "softmax"
    assert violation.written.expression in ("y.data.neg_()", "")
    assert violation.operation == "neg_()"


def test_a_functional_that_writes_in_place() -> None:
    def program() -> None:
        y = leaf().sigmoid()
        torch.nn.functional.threshold(y.data, 0.99, 0.0, inplace=True)

    violation = violation_of(program)
    assert violation.written is not None
    assert violation.written.file == HERE
    assert violation.written.source.startswith("torch.nn.functional.threshold(y.data")


def test_nn_init() -> None:
    layer = torch.nn.Linear(3, 3)

    def program() -> None:
        loss = layer(leaf()).sum()
        torch.nn.init.zeros_(layer.weight.data)
        loss.backward()

    violation = violation_of(program)
    assert violation.written is not None
    assert violation.written.source == "torch.nn.init.zeros_(layer.weight.data)"


def test_in_a_lambda() -> None:
    write = lambda y: y.data.zero_()  # noqa: E731
    violation = violation_of(lambda: write(leaf().exp()))
    assert violation.written is not None
    assert violation.saved is not None
    assert violation.written.line == write.__code__.co_firstlineno
    assert violation.written.function.endswith("<lambda>")
    assert violation.saved.source == "violation = violation_of(lambda: write(leaf().exp()))"
    assert violation.saved_by == "exp"


def test_in_a_comprehension() -> None:
    def program() -> None:
        ys = [x.exp() for x in (leaf(), leaf())]
        _ = [y.data.zero_() for y in ys]

    first = program.__code__.co_firstlineno
    violation = violation_of(program)
    assert violation.saved is not None
    assert violation.written is not None
    assert (violation.saved.line, violation.written.line) == (first + 1, first + 2)


def test_in_a_generator() -> None:
    def values() -> Any:
        yield leaf().exp()

    def program() -> None:
        y = next(values())
        y.data.zero_()

    violation = violation_of(program)
    assert violation.saved is not None
    assert violation.saved.line == values.__code__.co_firstlineno + 1


def test_in_a_comparison_key_called_from_c() -> None:
    y = None

    def program() -> None:
        nonlocal y
        y = leaf().exp()
        sorted([1], key=lambda _: y.data.zero_().sum())

    violation = violation_of(program)
    assert violation.written is not None
    assert violation.written.function.endswith("<lambda>")


def test_in_code_from_a_string() -> None:
    names: dict[str, Any] = {"leaf": leaf}
    code = compile("y = leaf().exp()\nw = y.data\nw.zero_()\n", "<cell 3>", "exec")
    violation = violation_of(lambda: exec(code, names))
    assert violation.saved == Place("<cell 3>", 1, "<module>", "", "")
    assert violation.written is not None
    assert str(violation.written) == "<cell 3>:3"
    assert violation.saved_by == "exp"  # from the node: no source is needed


def test_in_decorated_functions() -> None:
    def plain(function: Callable[[], None]) -> Callable[[], None]:
        @functools.wraps(function)
        def inner() -> None:
            function()

        return inner

    @plain
    @functools.lru_cache
    @torch.enable_grad()
    def program() -> None:
        y = leaf().exp()
        y.data.zero_()

    violation = violation_of(program)
    assert violation.written is not None
    assert violation.written.source == "y.data.zero_()"
    assert violation.written.function.endswith("program")


def test_in_the_users_context_manager() -> None:
    @contextlib.contextmanager
    def block() -> Any:
        y = leaf().exp()
        yield
        y.data.zero_()

    def program() -> None:
        with block():
            pass

    violation = violation_of(program)
    assert violation.written is not None
    assert violation.written.function.endswith("block")


def test_on_a_thread_of_the_users() -> None:
    places: list[Place | None] = []

    def work() -> None:
        y = leaf().exp()
        try:
            y.data.zero_()
        except SavedTensorCorruptionError as error:
            places.append(error.violation.written)

    with strict():
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    [place] = places
    assert place is not None
    assert place.source == "y.data.zero_()"


def test_a_method_passed_to_torch_has_the_users_call_as_its_place() -> None:
    """``module.apply`` runs in torch; the write is in the user's function."""

    def clip(module: torch.nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            parameter.data.clamp_(-0.01, 0.01)

    net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 1))

    def program() -> None:
        loss = net(leaf()).sum()
        net.apply(clip)
        loss.backward()

    violation = violation_of(program)
    assert violation.written is not None
    assert violation.written.function.endswith("clip")
    assert violation.saved is not None
    assert violation.saved.source == "loss = net(leaf()).sum()"


def test_no_frame_at_all() -> None:
    assert user_instruction(None) is None
    assert place_of(None) is None
    assert expression_of(None) == ""
    assert operation_of(None) == ""


def test_called_from_finds_a_file_on_the_stack() -> None:
    frame = sys._getframe()
    assert called_from(frame, ("test_places.py",))
    assert not called_from(frame, ("torch/autograd/gradcheck.py",))


# ---- expression, operation, path ---------------------------------------------------------------------------


def instruction_at(source: str, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The instruction in ``source`` that calls ``probe`` or operates on a Probe."""
    import linecache

    seen: list[Any] = []

    class Probe:
        def note(self, *_: Any, **__: Any) -> Any:
            frame = sys._getframe(1)
            seen.append((frame.f_code, frame.f_lasti))
            return self

        __add__ = __sub__ = __mul__ = __truediv__ = __pow__ = __matmul__ = __mod__ = __floordiv__ = note
        __radd__ = __rmul__ = __neg__ = __iadd__ = __imul__ = __imatmul__ = __isub__ = __call__ = note
        sigmoid = mul = note

    name = f"<probe {source}>"
    monkeypatch.setitem(linecache.cache, name, (len(source), None, source.splitlines(keepends=True), name))
    exec(compile(source, name, "exec"), {"x": Probe(), "y": Probe(), "probe": Probe(), "f": lambda v: v})
    return seen[-1]


@pytest.mark.skipif(not POSITIONS, reason="this Python does not keep columns")
@pytest.mark.parametrize(
    ("source", "expression", "operation"),
    [
        ("x + y", "x + y", "add"),
        ("2 * x", "2 * x", "mul"),
        ("z = x - y", "x - y", "sub"),
        ("z = x / y", "x / y", "div"),
        ("z = f(x ** 2)", "x ** 2", "pow"),
        ("z = f(x @ y)", "x @ y", "matmul"),
        ("z = x % y", "x % y", "remainder"),
        ("z = x // y", "x // y", "floor_divide"),
        ("z = -x", "-x", "neg"),
        ("x += y", "x += y", "add"),
        ("x *= y", "x *= y", "mul"),
        ("x @= y", "x @= y", "matmul"),
        ("x -= y", "x -= y", "sub"),
        ("z = f(x.sigmoid())", "x.sigmoid()", "sigmoid"),
        ("z = x.mul(y)", "x.mul(y)", "mul"),
        ("z = probe(x)", "probe(x)", "probe"),
        ("é = 'ü'; z = x.mul('ß')", "x.mul('ß')", "mul"),
        ("z = [v + y for v in [x]]", "v + y", "add"),
        ("z = x.mul(\n    y)", "", ""),
    ],
)
def test_expression_and_operation(
    source: str, expression: str, operation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    instruction = instruction_at(source, monkeypatch)
    assert expression_of(instruction) == expression
    assert operation_of(instruction) == operation


def test_without_columns_a_place_has_line_and_source_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.10 has no ``co_positions``."""

    class OldCode:
        """What ``_places`` asks for: ``hasattr(CodeType, "co_positions")``."""

    monkeypatch.setattr(_places, "CodeType", OldCode)

    def write() -> None:
        x = leaf()
        y = x * x.exp()
        x.data.zero_()
        y.sum()

    violation = violation_of(write)
    assert violation.written is not None
    assert (violation.written.source, violation.written.expression) == ("x.data.zero_()", "")
    assert violation.saved is not None
    assert violation.saved.source == "y = x * x.exp()"
    assert violation.saved_by == ""  # an input, and no expression to read the operation from
    assert "on x.data.clone()" in str(violation)


def test_the_operation_of_an_input_is_read_from_the_expression() -> None:
    def program() -> None:
        x = leaf()
        loss = (x * x).sum()
        x.data.zero_()
        loss.backward()

    assert violation_of(program).saved_by == ("mul" if POSITIONS else "")


def test_a_path_below_the_working_directory_is_relative(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    code = compile("1", str(tmp_path / "sub" / "train.py"), "exec")
    place = place_of((code, 0))
    assert place is not None
    assert place.file == str(tmp_path / "sub" / "train.py")
    monkeypatch.chdir(tmp_path)
    place = place_of((code, 0))
    assert place is not None
    assert place.file in ("sub/train.py", "sub\\train.py")


def test_a_working_directory_that_is_gone_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    def gone(_: str) -> str:
        raise FileNotFoundError("no working directory")

    monkeypatch.setattr("os.path.relpath", gone)
    code = compile("1", "/somewhere/train.py", "exec")
    place = place_of((code, 0))
    assert place is not None
    assert place.file == "/somewhere/train.py"


def test_a_users_file_whose_name_only_begins_like_a_library_is_the_users() -> None:
    import torch as library

    beside = library.__file__.replace("torch/__init__.py", "torch_models/net.py")
    assert beside != library.__file__
    frames: list[Any] = []
    names: dict[str, Any] = {"frames": frames, "sys": sys}
    exec(compile("frames.append(sys._getframe())", beside, "exec"), names)
    found = user_instruction(frames[0])
    assert found is not None
    assert found[0].co_filename == beside


def test_the_walk_by_depth_steps_over_module_calls_and_over_nothing_else() -> None:
    """It finds what the walk from frame to frame finds, through modules, hooks and code of the user's between."""
    found: list[tuple[Any, Any]] = []

    class Users(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x) if hasattr(self, "inner") else look(x)

    class Asking(nn.Identity):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return look(x)

    def look(x: torch.Tensor) -> torch.Tensor:
        for depth in range(1, 13):
            found.append((user_instruction(sys._getframe(depth)), user_instruction_above(depth)))
        return x

    x = torch.ones(2)
    outer = Users()
    outer.inner = nn.Sequential(nn.Identity(), nn.Sequential(Asking()), Users())
    hooked = nn.Sequential(Asking())
    hooked.register_forward_hook(lambda module, args, output: look(output))
    hooked.register_forward_pre_hook(lambda module, args: None)
    for module in (outer, hooked, nn.Sequential(outer, hooked)):
        module(x)
        module.forward(x)
    assert len(found) > 100
    for by_frames, by_depth in found:
        assert by_depth == by_frames
    assert user_instruction_above(10_000) is None
