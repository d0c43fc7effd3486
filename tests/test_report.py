"""Does a violation read as it should, word for word, and is it plain data?"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

import torchguard
from torchguard import (
    Guard,
    SavedTensorCorruptionError,
    SavedTensorCorruptionWarning,
    Violation,
    strict,
    warn,
)
from torchguard._model import Place
from torchguard._places import _short

HERE = _short(__file__)


def lines_of(program: Callable[..., Any]) -> dict[str, int]:
    """Line number of each ``# name`` comment in a function."""
    source, first = inspect.getsourcelines(program)
    return {m.group(1): first + n for n, text in enumerate(source) if (m := re.search(r"# (\w+)$", text.rstrip()))}


def caught(program: Callable[[], Any], **options: Any) -> Violation:
    with strict(**options):
        with pytest.raises(SavedTensorCorruptionError) as error:
            program()
    assert str(error.value) == str(error.value.violation)
    return error.value.violation


def leaf(*shape: int) -> torch.Tensor:
    count = torch.Size(shape).numel()
    return (torch.arange(1, count + 1) / count).reshape(shape).requires_grad_()


# ---- the exact text ----------------------------------------------------------------------------------------


def write_through_data() -> None:
    h = leaf(2, 3)
    y = torch.sigmoid(h)  # saved
    w = y.data  # aliased
    w.zero_()  # written


def test_a_write_through_data() -> None:
    at = lines_of(write_through_data)
    assert (
        str(caught(write_through_data))
        == f"""\
zero_() through .data would corrupt a tensor saved for backward

  saved     {HERE}:{at["saved"]}  y = torch.sigmoid(h)  # saved     float32[2, 3] on cpu, by sigmoid
  aliased   {HERE}:{at["aliased"]}  w = y.data  # aliased
  written   {HERE}:{at["written"]}  w.zero_()  # written     6 of 6 elements

  autograd cannot see this write: it does not move the version counter of the saved tensor.
  If backward reads the saved tensor, the gradient is wrong. Without torchguard, backward() would
  finish with wrong gradients and no error.
  fix:   do it after backward(), or on y.data.clone(); to have autograd check it, use y.detach() under torch.no_grad()
  allow: with torchguard.allow("why"): ..."""
    )


def write_through_alias_from_before(alias: torch.Tensor, x: torch.Tensor) -> None:
    y = x * x  # saved
    alias.mul_(2)  # written
    y.sum()


def test_a_write_through_an_alias_that_was_made_before_the_guard() -> None:
    x = leaf(3)
    alias = x.data
    at = lines_of(write_through_alias_from_before)
    assert (
        str(caught(lambda: write_through_alias_from_before(alias, x)))
        == f"""\
mul_(), which autograd cannot see, would corrupt a tensor saved for backward

  saved     {HERE}:{at["saved"]}  y = x * x  # saved     float32[3] on cpu, by mul
  aliased   (none was seen: it is from before the guard, of a route it does not follow, or of torch's own making)
  written   {HERE}:{at["written"]}  alias.mul_(2)  # written     3 of 3 elements

  autograd cannot see this write: it does not move the version counter of the saved tensor.
  If backward reads the saved tensor, the gradient is wrong. Without torchguard, backward() would
  finish with wrong gradients and no error.
  fix:   do it after backward(), or on a clone()
  allow: with torchguard.allow("why"): ..."""
    )


def test_where_there_is_no_alias_none_is_told() -> None:
    """What torch.func saves is a wrapper around ``x``, with a counter of its own."""

    def write() -> None:
        x = torch.ones(3)
        _, pull = torch.func.vjp(lambda t: t * t, x)
        x.mul_(2)
        pull(torch.ones(3))

    text = str(caught(write))
    assert text.startswith("mul_(), which autograd cannot see, would corrupt a tensor saved for backward\n")
    assert "through" not in text
    assert "x.data" not in text
    assert "  fix:   do it after backward(), or on a clone()\n" in text


def rebind() -> None:
    weight = leaf(2, 2)
    y = weight.exp() * weight  # saved
    weight.data = torch.zeros(2, 2)  # written
    y.sum()


def test_a_rebound_tensor() -> None:
    at = lines_of(rebind)
    assert (
        str(caught(rebind))
        == f"""\
x.data = y would corrupt a tensor saved for backward

  saved     {HERE}:{at["saved"]}  y = weight.exp() * weight  # saved     float32[2, 2] on cpu, by mul
  written   {HERE}:{at["written"]}  weight.data = torch.zeros(2, 2)  # written     4 of 4 elements

  autograd cannot see this: the tensor that it saved points to other memory from now on, and
  its version counter does not move. If backward reads it, the gradient is wrong. Without
  torchguard, backward() would finish with wrong gradients and no error.
  fix:   assign after backward(); to have autograd check it, use copy_() under torch.no_grad()
  allow: with torchguard.allow("why"): ..."""
    )


def write_unseen() -> None:
    x = leaf(3)
    y = x.sigmoid()  # saved
    alias = y.data  # aliased
    torch.zeros(3, out=alias)
    y.sum().backward()  # read


def test_a_write_that_only_the_counter_gave_away() -> None:
    at = lines_of(write_unseen)
    assert (
        str(caught(write_unseen))
        == f"""\
a write through an alias has corrupted a tensor saved for backward

  saved     {HERE}:{at["saved"]}  y = x.sigmoid()  # saved     float32[3] on cpu, by sigmoid
  aliased   {HERE}:{at["aliased"]}  alias = y.data  # aliased
  written   (between alias and read, by a call that is not patched: out=, torch.ops or an extension)
  read      {HERE}:{at["read"]}  y.sum().backward()  # read     3 of 3 elements, by up to 0.731

  The alias's own version counter moved, the saved tensor's did not: autograd cannot see that
  its memory was written to. Without torchguard, backward() would finish with wrong gradients
  and no error. To stop at the line that writes, use torchguard.strict(every_call=True).
  fix:   do it after backward(), or on y.data.clone(); to have autograd check it, use y.detach() under torch.no_grad()
  allow: with torchguard.allow("why"): ..."""
    )


def write_uncounted() -> None:
    x = leaf(3)
    y = x.sigmoid()  # saved
    w = y.detach()
    w.apply_(lambda value: value + 1)  # written


def test_a_write_that_moves_no_counter() -> None:
    at = lines_of(write_uncounted)
    assert (
        str(caught(write_uncounted))
        == f"""\
apply_(), which moves no version counter, would corrupt a tensor saved for backward

  saved     {HERE}:{at["saved"]}  y = x.sigmoid()  # saved     float32[3] on cpu, by sigmoid
  written   {HERE}:{at["written"]}  w.apply_(lambda value: value + 1)  # written     3 of 3 elements

  autograd cannot see this write: it does not move the version counter of the saved tensor.
  If backward reads the saved tensor, the gradient is wrong. Without torchguard, backward() would
  finish with wrong gradients and no error.
  fix:   do it after backward(), or use an operation that moves the counter, which autograd checks
  allow: with torchguard.allow("why"): ..."""
    )


def write_operators(how: str) -> None:
    x = leaf(4)
    y = x.sigmoid()
    alias = y.data
    if how == "x[i] = v":
        alias[1] = 5.0
    elif how == "+=":
        alias += 1
    elif how == "**=":
        alias **= 2
    else:
        torch.relu_(alias.neg_())


@pytest.mark.parametrize(
    ("how", "headline"),
    [
        ("x[i] = v", "x[i] = v through .data would corrupt a tensor saved for backward"),
        ("+=", "+= through .data would corrupt a tensor saved for backward"),
        ("**=", "**= through .data would corrupt a tensor saved for backward"),
        ("neg_()", "neg_() through .data would corrupt a tensor saved for backward"),
    ],
)
def test_the_headline_names_the_operation_as_the_program_writes_it(how: str, headline: str) -> None:
    assert str(caught(lambda: write_operators(how))).splitlines()[0] == headline


def test_a_write_to_what_is_inside_a_nested_tensor() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a prototype, says torch
        x = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], requires_grad=True)
    with torchguard.strict(), pytest.raises(SavedTensorCorruptionError) as caught:
        y = x * x
        x.data.unbind()[0].zero_()
        sum(row.sum() for row in y.unbind()).backward()
    told = str(caught.value)
    assert told.startswith("zero_() inside a nested or wrapping tensor has corrupted a tensor saved for backward\n")
    assert "  Autograd saved a tensor that others are inside of: a nested tensor, or a subclass that wraps them" in told


def test_every_kind_says_that_the_gradient_is_wrong_if_backward_reads_it() -> None:
    for program in (write_through_data, rebind, write_uncounted):
        assert "If backward reads" in str(caught(program))
        assert "the gradient is wrong" in str(caught(program))


def test_an_error_at_top_level_reads_like_the_design(capsys: Any) -> None:
    import traceback

    try:
        with strict():
            write_through_data()
    except SavedTensorCorruptionError as error:
        text = "".join(traceback.format_exception_only(error))
    assert (
        text.removeprefix("torchguard.")
        .removeprefix("_violation.")
        .startswith(
            "SavedTensorCorruptionError: zero_() through .data would corrupt a tensor saved for backward\n\n  saved "
        )
    )


def test_no_line_is_wider_than_a_wide_terminal() -> None:
    for program in (write_through_data, rebind, write_unseen, write_uncounted):
        assert max(map(len, str(caught(program)).splitlines())) <= 140


# ---- how much of what --------------------------------------------------------------------------------------


def row() -> None:
    y = leaf(3, 2).sigmoid()
    y.data[1, 0] = 9.0


def whole_row() -> None:
    y = leaf(3, 2).sigmoid()
    y.data[1].zero_()


def masked() -> None:
    y = leaf(3, 2).sigmoid()
    y.data[y.data > 0.65] = 0.0


def index_tensor() -> None:
    y = leaf(3, 2).sigmoid()
    y.data[torch.tensor([0, 0, 2])] = 0.0


def same_values() -> None:
    y = leaf(3, 2).sigmoid()
    y.data.clamp_(0.0, 0.66)


@pytest.mark.parametrize(
    ("program", "elements"),
    [(row, 1), (whole_row, 2), (index_tensor, 4), (masked, None), (same_values, None)],
)
def test_the_elements_that_change_are_counted(program: Callable[[], None], elements: int | None) -> None:
    y = leaf(3, 2).sigmoid()
    if program is masked:
        elements = int((y > 0.65).sum())
    elif program is same_values:
        elements = int((y > 0.66).sum())
    violation = caught(program)
    assert (violation.elements, violation.of) == (elements, 6)
    assert f"     {elements} of 6 elements\n" in str(violation)


@pytest.mark.parametrize(
    ("dtype", "name"),
    [(torch.float64, "float64"), (torch.bfloat16, "bfloat16"), (torch.complex64, "complex64")],
)
def test_dtype_shape_and_device(dtype: torch.dtype, name: str) -> None:
    def program() -> None:
        y = torch.ones(2, 1, 3, dtype=dtype, requires_grad=True).exp()
        y.data.zero_()

    violation = caught(program)
    assert (violation.dtype, violation.shape, violation.device) == (name, (2, 1, 3), "cpu")
    assert f"{name}[2, 1, 3] on cpu, by exp" in str(violation)


def test_a_scalar() -> None:
    def program() -> None:
        y = torch.ones((), requires_grad=True).exp()
        y.data.zero_()

    violation = caught(program)
    assert violation.shape == ()
    assert "float32[] on cpu, by exp" in str(violation)
    assert "1 of 1 elements" in str(violation)


def test_a_custom_function_is_named() -> None:
    class MyExp(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            y = x.exp()
            ctx.save_for_backward(y)
            return y

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> Any:
            return grads[0] * ctx.saved_tensors[0]

    def program() -> None:
        y = MyExp.apply(leaf(3))
        y.data.zero_()

    violation = caught(program)
    assert violation.saved_by == "MyExp"


def test_an_operation_of_several_words() -> None:
    def program() -> None:
        y = torch.nn.functional.log_softmax(leaf(3), 0)
        y.data.zero_()

    violation = caught(program)
    assert violation.saved_by == "log_softmax"


# ---- a value -----------------------------------------------------------------------------------------------


def test_a_violation_is_frozen_and_compares_by_value() -> None:
    violation = caught(write_through_data)
    with pytest.raises(dataclasses.FrozenInstanceError):
        violation.elements = 0  # type: ignore[misc]
    assert violation == caught(write_through_data)
    assert hash(violation) == hash(caught(write_through_data))
    assert violation != caught(rebind)
    assert violation.site == caught(write_through_data).site


def test_to_dict_is_plain_data_and_goes_through_json() -> None:
    for program in (write_through_data, rebind, write_unseen, write_uncounted):
        violation = caught(program)
        data = violation.to_dict()
        assert json.loads(json.dumps(data)) == data
        assert set(data) == {field.name for field in dataclasses.fields(Violation)}
        assert data["shape"] == list(violation.shape)
        assert data["saved"]["line"] == violation.saved.line if violation.saved else data["saved"] is None
    assert caught(rebind).to_dict()["aliased"] is None


def test_an_error_and_a_violation_can_be_copied_and_pickled() -> None:
    with pytest.raises(SavedTensorCorruptionError) as error, strict():
        write_through_data()
    back = pickle.loads(pickle.dumps(error.value))
    assert (type(back), str(back), back.violation) == (
        type(error.value),
        str(error.value),
        error.value.violation,
    )
    assert copy.deepcopy(error.value.violation) == error.value.violation


def test_a_report_survives_what_load_state_dict_makes_of_an_error() -> None:
    a, b = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    b.weight.data = a.weight.data
    x = torch.ones(1, 2, requires_grad=True)
    with strict():
        out = a(x)
        with pytest.raises(RuntimeError, match=r"would corrupt a tensor saved for backward"):
            b.load_state_dict({name: value + 1 for name, value in b.state_dict().items()})
    assert out.shape == (1, 2)


def test_errors_and_warnings_are_of_the_right_kind() -> None:
    assert issubclass(SavedTensorCorruptionError, RuntimeError)
    assert issubclass(SavedTensorCorruptionWarning, UserWarning)


ESCAPE = "\x1b["


def test_a_traceback_shows_the_name_that_users_import() -> None:
    for name in ("SavedTensorCorruptionError", "SavedTensorCorruptionWarning", "UnwatchedWarning", "Violation"):
        found = getattr(torchguard, name)
        assert f"{found.__module__}.{found.__qualname__}" == f"torchguard.{name}"


def test_plain_has_no_escape_codes_and_colour_has() -> None:
    for program in (write_through_data, rebind, write_unseen, write_uncounted):
        violation = caught(program)
        plain, colour = violation.render(), violation.render(color=True)
        assert ESCAPE not in plain
        assert plain == str(violation)
        assert ESCAPE in colour
        assert re.sub(r"\x1b\[[0-9;]*m", "", colour) == plain
        assert colour.count("\x1b[0m") == len(re.findall(r"\x1b\[(?!0m)", colour))


def plain(**changes: Any) -> Violation:
    place = Place("train.py", 7, "step", "w.zero_()", "w.zero_()")
    known: dict[str, Any] = {
        "kind": "write",
        "operation": "zero_()",
        "saved": place,
        "aliased": place,
        "written": place,
        "saved_by": "sigmoid",
        "dtype": "float32",
        "shape": (3,),
        "device": "cpu",
        "elements": 3,
        "of": 3,
    }
    return Violation(**{**known, **changes})


def test_places_that_are_not_known_say_so() -> None:
    text = str(plain(saved=None, aliased=None, written=None))
    assert "  saved     (no user code on the stack)     float32[3] on cpu, by sigmoid\n" in text
    assert (
        "  aliased   (none was seen: it is from before the guard, of a route it does not follow, or of torch's own making)\n"
        in text
    )
    assert "  written   (no user code on the stack)     3 of 3 elements\n" in text


def test_an_operation_that_is_not_known_is_left_out() -> None:
    assert "float32[3] on cpu\n" in str(plain(saved_by=""))


def test_a_place_without_source_is_the_place_alone() -> None:
    assert "  written   <stdin>:1     3 of 3 elements\n" in str(plain(written=Place("<stdin>", 1, "<module>")))


def test_the_fix_names_the_tensor_where_its_name_is_short() -> None:
    assert "on net.weight.data.clone()" in str(plain(aliased=Place("t.py", 1, "f", "w = ...", "net.weight.data")))
    long = Place("t.py", 1, "f", "w = ...", "the_model.the_layers[3].the_weight_of_it.data")
    assert "on x.data.clone()" in str(plain(aliased=long))
    assert "on x.data.clone()" in str(plain(aliased=Place("t.py", 1, "f", "w = ...", "f(x)")))


# ---- what the guard keeps ----------------------------------------------------------------------------------


def test_times_counts_how_often_a_site_was_hit() -> None:
    with Guard("record") as guard:
        for _ in range(5):
            write_through_data()
        rebind()
    first, second = guard.violations
    assert (first.kind, first.times) == ("write", 5)
    assert (second.kind, second.times) == ("rebind", 1)
    assert first.site != second.site


def test_a_warning_has_the_line_of_the_write() -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with warn():
            write_through_data()
    [warning] = told
    assert warning.category is SavedTensorCorruptionWarning
    assert warning.lineno == lines_of(write_through_data)["written"]
    assert warning.filename.endswith("test_report.py")
    assert str(warning.message).startswith("zero_() through .data would corrupt")


def test_the_thread_is_named() -> None:
    assert caught(write_through_data).thread == "MainThread"


def test_the_names_of_the_package() -> None:
    assert {"Guard", "SavedTensorCorruptionError", "SavedTensorCorruptionWarning", "Violation"} <= set(
        torchguard.__all__
    )
    assert all(hasattr(torchguard, name) for name in torchguard.__all__)
