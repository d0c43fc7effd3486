"""Is a save recorded as what it is? Each test here was asked for by a mutant of ``_packing``."""

from __future__ import annotations

import gc
import sys
import threading
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from catalogue.wrapped import Boxed

import torchguard
from torchguard import _packing, _places, _torch
from torchguard._saves import LEDGER, Save

#: Fetched while nothing is patched: what comes of these no guard sees.
from_numpy = torch.from_numpy
to_numpy: Callable[[torch.Tensor], Any] = torch.Tensor.numpy
point_at: Callable[[torch.Tensor, torch.Tensor], None] = torch.Tensor.data.__set__  # type: ignore[attr-defined]


def leaf(n: int = 3) -> torch.Tensor:
    return torch.linspace(0.5, 1.5, n).requires_grad_()


def unseen(tensor: torch.Tensor) -> None:
    """``out=`` is patched nowhere: only the counter tells."""
    torch.zeros(tensor.shape, out=tensor)


def source(code: Any, offset: int) -> str | None:
    place = _places.place_of(None if code is None else (code, offset))
    return None if place is None else place.source


def told_of(save: Save) -> tuple[str | None, int, int]:
    """Of what node it is an output, and which, and its version."""
    return None if save.node is None else save.node.__name__, save.output, save.version


class Records(torch.autograd.Function):
    """Its forward makes nodes of its own, so that its own is not the newest when it saves."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, more: Any = ()) -> torch.Tensor:
        with torch.enable_grad():
            x.detach().requires_grad_().sin().cos()
        out = x * 3
        ctx.save_for_backward(x, out, *more)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        return grad * 3, None


# ---- outputs and inputs -------------------------------------------------------------------------------------------


def squared_after_a_write() -> Any:
    h = leaf().clone()
    h.add_(1)
    return h * h


def squared_after_a_write_and_another_save() -> Any:
    h = leaf().clone()
    y = leaf().exp()
    h.add_(1)
    return h * h, y


def squared_after_a_write_that_saved() -> Any:
    h = leaf().clone()
    h.exp_()
    return h * h


def saves_a_copy_of_what_it_writes_over() -> Any:
    h = leaf().clone()
    leaf().sin()
    h.cumprod_(0)
    return h


def a_row_that_is_written_over() -> Any:
    h = leaf(4).clone()
    view = h[1:]
    view.exp_()
    return h, view


def lists_in_place() -> Any:
    hs = [leaf().clone() for _ in range(3)]
    torch._foreach_exp_(hs)
    return hs


def lists_in_place_after_other_saves() -> Any:
    y = leaf().exp().sigmoid().tanh()
    hs = [leaf().clone() for _ in range(2)]
    torch._foreach_exp_(hs)
    return [y, *hs]


def a_chain() -> Any:
    return leaf().cumprod(0).cumprod(0).cumprod(0)


def a_loop() -> Any:
    h = leaf()
    for _ in range(3):
        h = h.cumprod(0)
    return h


def a_function_of_its_own_output() -> Any:
    return Records.apply(Records.apply(leaf()))  # type: ignore[no-untyped-call]


def a_function_that_is_given_a_list() -> Any:
    a = Records.apply(leaf())  # type: ignore[no-untyped-call]
    return Records.apply(leaf(), [a]), a  # type: ignore[no-untyped-call]


class SavesAnothers(torch.autograd.Function):
    """Saves the output of another Function, which it is not given."""

    others: list[torch.Tensor]

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            x.detach().requires_grad_().sin()
        ctx.save_for_backward(*SavesAnothers.others)
        return x * 3

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        return grad * 3


def a_function_that_saves_anothers_output() -> Any:
    SavesAnothers.others = [Records.apply(leaf())]  # type: ignore[no-untyped-call]
    return SavesAnothers.apply(leaf()), SavesAnothers.others.pop()  # type: ignore[no-untyped-call]


INPUT = (None, 0, 0)
CUMPROD = ("CumprodBackward0", 0, 0)
RECORDS = ("RecordsBackward", 0, 0)


@pytest.mark.usefixtures("empty_ledger")
@pytest.mark.parametrize(
    ("program", "expected"),
    [
        (lambda: leaf().exp(), [("ExpBackward0", 0, 0)]),
        (squared_after_a_write, [(None, 0, 1), (None, 0, 1)]),
        (squared_after_a_write_and_another_save, [("ExpBackward0", 0, 0), (None, 0, 1), (None, 0, 1)]),
        (squared_after_a_write_that_saved, [("ExpBackward0", 0, 1), (None, 0, 1), (None, 0, 1)]),
        (saves_a_copy_of_what_it_writes_over, [("CloneBackward0", 0, 0), ("CumprodBackward0", 0, 1)]),
        (a_row_that_is_written_over, [("AsStridedBackward0", 0, 1)]),
        (lists_in_place, [("ExpBackward0", 0, 1)] * 3),
        (
            lists_in_place_after_other_saves,
            [(f"{name}Backward0", 0, 0) for name in ("Exp", "Sigmoid", "Tanh")] + [("ExpBackward0", 0, 1)] * 2,
        ),
        (a_chain, [INPUT, CUMPROD] * 3),
        (a_loop, [INPUT, CUMPROD] * 3),
        (lambda: torch.linalg.svd(torch.diag(leaf())), [("LinalgSvdBackward0", i, 0) for i in (1, 0, 2)]),
        (a_function_of_its_own_output, [INPUT, RECORDS] * 2),
        (a_function_that_is_given_a_list, [INPUT, RECORDS, INPUT, RECORDS, INPUT]),
        (a_function_that_saves_anothers_output, [INPUT, RECORDS, INPUT]),
    ],
)
def test_what_is_an_output_is_held_without_its_history(program: Callable[[], Any], expected: list[Any]) -> None:
    with torchguard.strict() as guard:
        kept = program()
        saves = LEDGER.all_alive()
        assert sorted(map(told_of, saves), key=repr) == sorted(expected, key=repr)
        assert all(save.tensor.grad_fn is None for save in saves if save.node is not None)
        views = [save for save in saves if save.remarks is not None and save.remarks.view is not None]
        assert [told_of(save)[0] for save in views] == (
            ["AsStridedBackward0"] if program is a_row_that_is_written_over else []
        )
        assert all(save.remarks.view() is kept[1] for save in views)  # type: ignore[union-attr, misc]
    assert guard.violations == []


@pytest.mark.parametrize("program", [lists_in_place, a_function_of_its_own_output, saves_a_copy_of_what_it_writes_over])
def test_what_is_saved_goes_with_the_last_who_holds_it(program: Callable[[], Any]) -> None:
    with torchguard.strict():
        program()
        gc.disable()
        try:
            kept = program()
            holds = [weakref.ref(kept)] if isinstance(kept, torch.Tensor) else [weakref.ref(one) for one in kept]
            saves = [weakref.ref(save) for save in LEDGER.all_alive()]
            assert any(hold() is not None for hold in saves)
            before = len([hold for hold in saves if hold() is not None])
            del kept
            assert [hold() for hold in holds] == [None] * len(holds)
            assert len([hold for hold in saves if hold() is not None]) < before
        finally:
            gc.enable()


def test_where_torch_does_not_tell_the_order_no_cycle_is_risked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_packing, "native", None)
    monkeypatch.setattr(_torch, "next_sequence_number", lambda: -1)
    pack = _packing.make_pack()
    y = leaf().sin()
    save = pack(y)
    assert told_of(save) == ("SinBackward0", 0, 0)
    assert save.tensor is not y

    first = F_like(pack, leaf())
    second = F_like(pack, leaf())
    assert source(first.code, first.offset) == "first = F_like(pack, leaf())"
    assert source(second.code, second.offset) == "second = F_like(pack, leaf())"


# ---- places -------------------------------------------------------------------------------------------------------

_LIKE_TORCHS: dict[str, Any] = {}
exec(compile("def call(pack, x):\n    return pack(x)\n", F.__file__, "exec"), _LIKE_TORCHS)
#: Calls from a file of torch.
F_like: Callable[[Any, torch.Tensor], Save] = _LIKE_TORCHS["call"]


def sparse_in_a_helper(x: torch.Tensor) -> Any:
    return torch.sparse.mm(torch.eye(3).to_sparse(), x[:, None])


def boxed_in_a_helper(x: Boxed) -> Any:
    return x * x


def nested_in_a_helper(x: torch.Tensor) -> Any:
    return x.cos()


@pytest.mark.usefixtures("empty_ledger")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore::torchguard.UnwatchedWarning")
def test_the_line_that_saved_is_told_whatever_was_saved() -> None:
    with torchguard.strict():
        kept: list[Any] = [F.elu(leaf())]
        kept.append(F.elu(leaf(4)))
        kept.append(sparse_in_a_helper(leaf()))
        kept.append(boxed_in_a_helper(Boxed(torch.ones(3)).requires_grad_()))
        nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], requires_grad=True)
        kept.append(nested_in_a_helper(nested))
        saves = [save for save in LEDGER.all_alive() if type(save) is Save]
        assert {source(save.code, save.offset) for save in saves} == {
            "kept: list[Any] = [F.elu(leaf())]",
            "kept.append(F.elu(leaf(4)))",
            "return torch.sparse.mm(torch.eye(3).to_sparse(), x[:, None])",
            "return x * x",
            "return x.cos()",
        }
        inner = {save.inner_code.co_name for save in saves if save.inner_code is not None}
        assert inner == {"elu", "sparse_in_a_helper", "boxed_in_a_helper", "nested_in_a_helper"}


class Quiet(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def called_in_a_mode(pack: Any, x: torch.Tensor) -> Save:
    save: Save = pack(x)
    return save


def test_the_line_that_saved_is_told_in_a_mode() -> None:
    pack = _packing.make_pack()
    x = leaf()
    with Quiet():
        save = called_in_a_mode(pack, x)
    assert source(save.code, save.offset) == "save: Save = pack(x)"
    assert save.remarks is not None  # it is read with the mode kept out


@pytest.mark.parametrize("python", [True, False])
def test_without_a_line_of_the_users_there_is_none(python: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that is on the stack is threading's, or nothing, as in a thread of the engine's."""
    monkeypatch.setattr(_packing, "native", None)

    def no_frame(depth: int = 0) -> Any:
        raise ValueError(depth)

    if not python:
        monkeypatch.setattr(sys, "_getframe", no_frame)
    pack = _packing.make_pack()
    monkeypatch.undo()
    y = leaf().exp()
    x = leaf()
    saves: list[Save] = []
    thread = threading.Thread(target=saves.extend, args=(map(pack, [x, y]),))
    thread.start()
    thread.join()
    assert [(save.code, save.offset) for save in saves] == [(None, 0)] * 2
    if not python:
        assert [(save.inner_code, save.inner_offset) for save in saves] == [(None, 0)] * 2
    assert [told_of(save) for save in saves] == [INPUT, INPUT]
    assert saves[0].tensor is x
    assert saves[1].tensor is y


@pytest.mark.parametrize("name", ["_packing", "_intercept", "_functorch", "_compiled", "_inputs"])
def test_what_the_guard_calls_is_called_by_its_caller(name: str) -> None:
    own: dict[str, Any] = {}
    file = _packing.__file__.replace("_packing", name)
    _places.is_library(file)
    exec(compile("def call(pack, x):\n    return pack(x)\n", file, "exec"), own)
    pack = _packing.make_pack()
    save = own["call"](pack, leaf())
    assert source(save.code, save.offset) == "save = own['call'](pack, leaf())".replace("'", '"')
    assert save.inner_code is sys._getframe().f_code

    saves: list[Save] = []
    thread = threading.Thread(target=saves.extend, args=(map(partial(own["call"], pack), [leaf()]),))
    thread.start()
    thread.join()
    assert [(save.code, save.offset) for save in saves] == [(None, 0)]


# ---- who else can write -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("empty_ledger")
@pytest.mark.parametrize("held", ["young", "old", "gone", "itself", "no"])
def test_a_copy_is_kept_where_an_alias_lives_and_only_there(held: str) -> None:
    with torchguard.strict() as guard:
        x = leaf()
        if held == "no":
            out = x.sin()
        elif held == "gone":
            _ = x.data
            del _
            out = x.sin()
        elif held == "itself":
            alias = x.data
            out = leaf() * alias
        else:
            alias = x.data
            if held == "old":
                x.cos()
            out = x.sin()
        copied = held in ("young", "old")
        assert guard.stats.bytes_held == (12 if copied else 0)
        if copied:
            kept = alias.clone()
            unseen(alias)
            torch.add(kept, 0, out=alias)
        out.sum().backward()
    assert guard.violations == []


def of_a_leaf(array: Any) -> tuple[Any, Any]:
    p = from_numpy(array).requires_grad_()
    return p, lambda: p * p


def of_a_view(array: Any) -> tuple[Any, Any]:
    p, w = from_numpy(array), leaf(2)
    return w, lambda: w * p[1:]


def of_a_view_of_torchs_making(array: Any) -> tuple[Any, Any]:
    p, w = from_numpy(array), leaf()
    return w, lambda: torch.einsum("i,j->ij", w, p)


def of_what_has_a_history(array: Any) -> tuple[Any, Any]:
    """Made, and given away, before the guard."""
    w = leaf()
    h = w * 1
    given = to_numpy(h.detach())
    return w, (lambda: h * h), given


def written_in_place(array: Any) -> tuple[Any, Any]:
    p, w = from_numpy(array), leaf()
    return w, lambda: p.mul_(w) * p


def an_output_in_place(array: Any) -> tuple[Any, Any]:
    p, w = from_numpy(array), leaf()
    return w, lambda: p.mul_(w).exp_()


def a_first_output_in_place(array: Any) -> tuple[Any, Any]:
    p, w = from_numpy(array), leaf()
    return w, lambda: p.pow_(w)


class Foreign(torch.autograd.Function):
    """Its output lies in memory that another library has given."""

    array: Any

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, saves: bool) -> torch.Tensor:
        out = from_numpy(Foreign.array)
        if saves:
            ctx.save_for_backward(out)
        ctx.saves = saves
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        return grad * ctx.saved_tensors[0] if ctx.saves else grad, None


def an_output_of_the_users(array: Any) -> tuple[Any, Any]:
    Foreign.array, w = array, leaf()
    return w, lambda: Foreign.apply(w, True)  # type: ignore[no-untyped-call]


def an_input_of_the_users_making(array: Any) -> tuple[Any, Any]:
    Foreign.array, w = array, leaf()
    return w, lambda: Foreign.apply(w, False).square()  # type: ignore[no-untyped-call]


FOREIGN: list[Callable[[Any], Any]] = [
    of_a_leaf,
    of_a_view,
    of_a_view_of_torchs_making,
    of_what_has_a_history,
    written_in_place,
    an_output_in_place,
    a_first_output_in_place,
    an_output_of_the_users,
    an_input_of_the_users_making,
]


@pytest.mark.usefixtures("empty_ledger")
@pytest.mark.parametrize("make", FOREIGN)
@pytest.mark.parametrize("after", [False, True])
def test_memory_that_another_library_can_write_to_is_asked_for(make: Callable[[Any], Any], after: bool) -> None:
    def gradient(write: bool, guard: Any = None) -> torch.Tensor:
        array = to_numpy(torch.tensor([1.0, 2.0, 3.0]))
        w, forward, *given = make(array)
        target = given[0] if given else array
        guard = guard or torch.enable_grad()
        with guard:
            if after:  # other memory of no one else's is known already
                other = leaf()
                kept = other * other
            out = forward()
            if write:
                target[:] = 0
            out.sum().backward()
            if after:
                kept.sum().backward()
        return w.grad.clone()  # type: ignore[no-any-return]

    plain = gradient(True)
    assert not torch.equal(plain, gradient(False))
    silent = torchguard.strict()
    gradient(False, silent)  # which learns the types of the nodes
    assert silent.violations == []
    guard = torchguard.Guard("record")
    assert torch.equal(gradient(True, guard), plain)
    assert [violation.kind for violation in guard.violations] == ["exported"]


@pytest.mark.usefixtures("empty_ledger")
def test_a_copy_for_an_array_that_has_gone_goes_with_the_next_save() -> None:
    with torchguard.strict():
        x = leaf()
        out = x.exp()
        array = out.detach().numpy()
        (save,) = LEDGER.all_alive()
        assert save.remarks is not None
        assert save.remarks.proof is not None
        del array
        other = leaf().exp()
        assert save.remarks.proof is None
        (out * other).sum().backward()


# ---- kinds of tensors ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("empty_ledger")
@pytest.mark.filterwarnings("ignore::torchguard.UnwatchedWarning")
def test_what_has_no_memory_to_compare_is_told_of() -> None:
    guard = torchguard.Guard("record")
    with guard:
        w = Boxed(torch.ones(3)).requires_grad_()
        kept: list[Any] = [w * w, leaf().exp(), torch.ones(3, device="meta", requires_grad=True).exp()]
        assert guard.unwatched == []
        (inside,) = {save.tensor.data_ptr() for save in LEDGER.all_alive() if type(save) is not Save}
        assert inside == w.inside.data_ptr()
        kept.append(torch.sparse.mm(torch.eye(3).to_sparse(), leaf()[:, None]))
    (told,) = guard.unwatched
    assert told == (
        "Tensor of layout sparse_coo: no memory to compare writes with; PyTorch's own version check still applies"
    )
    audit = torchguard.Guard("record", depth="bytes")
    with audit:
        kept.append(torch.sparse.mm(torch.eye(3).to_sparse(), leaf()[:, None]))
    assert audit.unwatched == []


def test_the_bytes_are_kept_where_that_is_wanted() -> None:
    assert _packing.make_pack(audits=True)(leaf()).remarks.proof is not None  # type: ignore[union-attr]
    assert _packing.make_pack()(leaf()).remarks is None
    assert _packing.make_pack(exotic=True)(leaf()).remarks is not None
    assert source(*place_of_exotic()) == "save = _packing.make_pack(exotic=True)(leaf())"


def place_of_exotic() -> tuple[Any, int]:
    save = _packing.make_pack(exotic=True)(leaf())
    return save.code, save.offset


def test_saves_are_filed_when_there_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    LEDGER.file()
    monkeypatch.setattr(_packing, "_FILE_AT", 8)
    pack = _packing.make_pack()
    x = leaf()
    saves = []
    for _ in range(40):
        saves.append(pack(x))
        assert len(LEDGER.pending) <= 9
    assert len([save for save in LEDGER.all_alive() if save.tensor is x]) == len(saves)


@pytest.mark.usefixtures("empty_ledger")
def test_what_a_double_backward_saves_is_what_it_was() -> None:
    def gradient(guard: Any) -> torch.Tensor:
        with guard:
            x = leaf()
            (slope,) = torch.autograd.grad((x**3).sum(), x, create_graph=True)
            point_at(x, torch.zeros(3))
            slope.sum().backward()
        assert x.grad is not None
        return x.grad

    guard = torchguard.Guard("record")
    assert torch.equal(gradient(guard), gradient(torch.enable_grad()))
    assert [violation.kind for violation in guard.violations] == ["rebind"]


# ---- who holds it, and what was there before -------------------------------------------------------------------------


@pytest.mark.parametrize("holders", [0, 1, 2, 5])
@pytest.mark.parametrize("writes", [True, False])
def test_an_array_from_before_the_guard_is_asked_about_however_many_hold_its_tensor(holders: int, writes: bool) -> None:
    arrays = [np.ones(3, np.float32) for _ in range(2)]
    held = [[torch.from_numpy(array)] * max(1, holders) for array in arrays]
    with torchguard.Guard("record") as guard:
        x = leaf()
        kept = torch._foreach_mul([x, x], [tensors.pop() if holders == 0 else tensors[0] for tensors in held])
        if writes:
            arrays[1].fill(5)
        torch.stack(kept).sum().backward()
    assert len(guard.violations) == writes


def test_a_mode_of_the_programs_makes_nothing_unwatched() -> None:
    with torchguard.strict() as guard, Quiet():
        x = leaf()
        (x * x.exp()).sum().backward()
    assert guard.unwatched == []


def test_a_foreach_after_what_is_gone() -> None:
    def program() -> list[torch.Tensor]:
        inputs = [leaf(), leaf()]
        for _ in range(2):
            leaf().exp().sigmoid()  # saved, and gone
            outputs = torch._foreach_exp(inputs)
        torch.stack(outputs).sum().backward()
        return [x.grad for x in inputs if x.grad is not None]

    plain = program()
    with torchguard.strict():
        found = program()
    assert len(found) == 2
    assert all(map(torch.equal, found, plain))


def test_what_is_gone_is_passed_over_where_outputs_are_looked_for() -> None:
    with torchguard.strict():
        node = type(leaf().exp().grad_fn)
        assert LEDGER.pending
        assert LEDGER.pending[-1]() is None
        _packing._mend_foreach(node, 10, None)


def test_nothing_is_unwatched_where_a_mode_is_on_while_autograd_saves() -> None:
    with torchguard.strict() as guard:
        pack = _packing.make_pack()
        with Quiet():
            save = called_in_a_mode(pack, leaf())
    assert save.remarks is not None
    assert guard.unwatched == []


def test_what_has_left_its_transform_is_handed_back_as_it_was() -> None:
    def program() -> tuple[str, torch.Tensor, torch.Tensor]:
        left: list[torch.Tensor] = []

        def loss(x: torch.Tensor) -> torch.Tensor:
            left.append(x)
            return x.sum()

        torch.func.grad(loss)(torch.linspace(1, 2, 3))
        x = leaf()
        out = x * left[0]
        saved = out.grad_fn._saved_other  # type: ignore[union-attr]
        out.sum().backward()
        assert x.grad is not None
        return repr(saved), torch.as_tensor(saved.tolist()), x.grad

    plain = program()
    with torchguard.strict() as guard:
        found = program()
    assert guard.violations == guard.unwatched == []
    assert found[0] == plain[0]
    assert all(map(torch.equal, found[1:], plain[1:]))
