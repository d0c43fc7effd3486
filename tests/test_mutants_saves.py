"""What a save keeps, compares and tells, where no other test would miss it: each test was asked for by a mutant of ``_saves``."""

from __future__ import annotations

import ctypes
import dis
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import CodeType
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.overrides import TorchFunctionMode

import torchguard
from torchguard import SavedTensorCorruptionWarning, Violation, _memory, _saves, _torch
from torchguard._counts import COUNTS
from torchguard._packing import make_pack
from torchguard._saves import LEDGER, PROOF_BYTES_AT_ALIAS, PROOF_BYTES_AT_SAVE, Part, Save

#: A forward, and what is written then: the leaf whose gradient is asked for, and what backward starts from.
Program = Callable[[], tuple[torch.Tensor, torch.Tensor]]

#: Fetched while nothing is patched: a route to ``x.data = y`` that no guard sees.
point_at: Callable[[torch.Tensor, torch.Tensor], None] = torch.Tensor.data.__set__  # type: ignore[attr-defined]

#: More than any machine has room for, of one element that is really there.
TOO_MANY = 1 << 48


def leaf(n: int = 3) -> torch.Tensor:
    return torch.linspace(0.5, 1.5, n).requires_grad_()


def unseen(tensor: torch.Tensor, value: torch.Tensor | None = None) -> None:
    """``out=`` is patched nowhere: only the counter tells."""
    torch.add(torch.zeros(tensor.shape) if value is None else value, 0, out=tensor)


def poke(tensor: torch.Tensor) -> None:
    """What a kernel does: no Python sees it, and no counter tells."""
    ctypes.memset(tensor.data_ptr(), 0x3C, tensor.element_size())


def gradient(program: Program, guard: AbstractContextManager[Any] | None = None) -> torch.Tensor:
    with guard or nullcontext():
        x, out = program()
        out.sum().backward()
    assert x.grad is not None
    return x.grad


def truth_of(program: Program) -> torch.Tensor:
    return gradient(program, saved_tensors_hooks(torch.Tensor.clone, lambda tensor: tensor))


def told(program: Program, guard: torchguard.Guard | None = None) -> Violation:
    """The one thing that is said of a program which corrupts; its result stays what it is without the guard."""
    plain = gradient(program)
    assert not torch.equal(plain, truth_of(program)), "it corrupts nothing"
    guard = guard or torchguard.Guard("record")
    assert torch.equal(gradient(program, guard), plain)
    (violation,) = guard.violations
    return violation


def nothing_told(program: Program, guard: torchguard.Guard | None = None) -> None:
    plain = gradient(program)
    assert torch.equal(plain, truth_of(program)), "it corrupts"
    guard = guard or torchguard.Guard("record")
    assert torch.equal(gradient(program, guard), plain)
    assert guard.violations == []


def save_of(tensor: torch.Tensor) -> Save:
    """A save of an input, made where there was no Python code on the stack."""
    save = Save()
    save.tensor, save.version, save.storage = tensor, _memory.version_of(tensor), _memory.storage_of(tensor)
    save.code = save.inner_code = save.node = save.remarks = None
    save.offset = save.inner_offset = save.output = 0
    return save


def proof_of(save: Save) -> torch.Tensor | None:
    return None if save.remarks is None else save.remarks.proof


class Named(torch.Tensor):
    """A subclass that takes down what is done with it."""

    calls: ClassVar[list[str]] = []

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        cls.calls.append(getattr(func, "__name__", str(func)))
        return super().__torch_function__(func, types, args, kwargs or {})


class Recording(TorchFunctionMode):
    """A mode that does the same with any tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append(getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))


# ---- what is kept, and how much of it ------------------------------------------------------------------------------


def plain(nbytes: int) -> torch.Tensor:
    return torch.ones(nbytes // 4)


def named(nbytes: int) -> torch.Tensor:
    return torch.ones(nbytes // 4).as_subclass(Named)


@pytest.mark.parametrize("make", [plain, named])
def test_a_copy_is_kept_of_what_is_small_enough(make: Callable[[int], torch.Tensor]) -> None:
    """docs/limits.md: 1 MiB, or 16 KiB if the alias was there when it was saved."""
    assert (PROOF_BYTES_AT_ALIAS, PROOF_BYTES_AT_SAVE) == (2**20, 2**14)
    for most in (PROOF_BYTES_AT_ALIAS, PROOF_BYTES_AT_SAVE):
        enough, more = save_of(make(most)), save_of(make(most + 4))
        enough.keep_small_proof(most)
        more.keep_small_proof(most)
        assert enough.is_intact
        assert proof_of(more) is None
        assert not more.is_intact
        more.keep_proof()
        assert more.is_intact


@pytest.mark.parametrize("guard", [torchguard.strict(at="read"), torchguard.repair()])
def test_a_guard_that_lets_the_bytes_decide_keeps_64_bits_of_what_is_larger(guard: torchguard.Guard) -> None:
    with guard:
        enough, more = save_of(plain(PROOF_BYTES_AT_ALIAS)), save_of(plain(PROOF_BYTES_AT_ALIAS + 4))
        enough.keep_small_proof(PROOF_BYTES_AT_SAVE)
        more.keep_small_proof(PROOF_BYTES_AT_SAVE)
    assert proof_of(enough) is not None
    assert proof_of(more) is None
    assert more.is_intact
    more.tensor[-1] = 2
    assert not more.is_intact


@pytest.mark.parametrize("nbytes", [PROOF_BYTES_AT_SAVE, 2 * PROOF_BYTES_AT_SAVE])
def test_what_was_saved_under_a_living_alias_and_is_put_back_is_told_only_where_it_is_large(nbytes: int) -> None:
    def program() -> tuple[torch.Tensor, torch.Tensor]:
        x = leaf(nbytes // 4)
        alias = x.data
        out = x * x
        kept = alias.clone()
        unseen(alias)
        unseen(alias, kept)
        return x, out

    if nbytes == PROOF_BYTES_AT_SAVE:
        nothing_told(program)
    else:
        guard = torchguard.Guard("record")
        assert torch.equal(gradient(program, guard), truth_of(program))
        assert [violation.kind for violation in guard.violations] == ["unseen"]  # docs/limits.md


@pytest.mark.parametrize("kind", [torch.Tensor, Named])
def test_a_copy_that_an_alias_needs_outlives_the_array_that_it_was_made_for(kind: type[torch.Tensor]) -> None:
    def program() -> tuple[torch.Tensor, torch.Tensor]:
        x = leaf()
        saved = x.as_subclass(kind)
        array = saved.detach().as_subclass(torch.Tensor).numpy()
        out = saved * saved
        alias = x.data
        del array
        x.exp()  # something is saved in between
        kept = alias.clone()
        unseen(alias)
        unseen(alias, kept)
        return x, out.as_subclass(torch.Tensor)

    nothing_told(program)


def test_a_copy_that_was_there_before_outlives_an_array() -> None:
    """Of what is saved under hooks of the program, a small copy is kept: for a tracked write that nobody sees coming."""

    def program() -> tuple[torch.Tensor, torch.Tensor]:
        x = leaf()
        with saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
            h = x.exp()
            array = h.detach().numpy()
            out = h.sin()
        with torch.no_grad():
            kept = h.detach().clone()
            del array
            x.exp()
            unseen(h.detach())
            unseen(h.detach(), kept)
        return x, out

    guard = torchguard.Guard("record")
    assert torch.equal(gradient(program, guard), gradient(program))
    assert guard.violations == []


def test_a_part_of_it_tells_nothing_to_the_programs_own_code() -> None:
    """A subclass and a mode of the program's own do not see what the guard looks at and copies."""
    tensor = torch.ones(3).as_subclass(Named)
    save, audited = save_of(tensor), save_of(tensor)
    Named.calls.clear()
    save.keep_proof()
    audited.keep_contents()
    assert not _saves.is_foreign(tensor)
    assert Named.calls == []
    assert save.is_intact
    assert audited.is_intact
    save, audited = save_of(torch.ones(3)), save_of(torch.ones(3))
    with Recording() as mode:
        save.keep_proof()
        audited.keep_contents()
        assert not _saves.is_foreign(save.tensor)
    assert mode.calls == []
    assert save.is_intact
    assert audited.is_intact


def test_of_a_wrapper_whose_transform_is_over_a_copy_is_kept() -> None:
    kept: list[torch.Tensor] = []

    def function(x: torch.Tensor) -> torch.Tensor:
        y = x.sin()
        kept.append(y)
        return y.sum()

    torch.func.grad(function)(leaf().detach())
    for keep in (Save.keep_proof, Save.keep_contents):
        save = save_of(kept[0])
        keep(save)
        assert save.is_intact
        with torch.no_grad():
            _torch.behind(kept[0])[0] += 1
        assert not save.is_intact
        assert save.changed_elements == 1


@pytest.mark.parametrize("kind", [torch.Tensor, Named])
def test_audit_tells_what_has_changed(kind: type[torch.Tensor]) -> None:
    def program() -> tuple[torch.Tensor, torch.Tensor]:
        x = leaf()
        saved = x.as_subclass(kind)
        out = saved * saved
        poke(x)
        return x, out.as_subclass(torch.Tensor)

    violation = told(program, torchguard.Guard("record", depth="bytes"))
    assert (violation.kind, violation.elements) == ("invisible", 1)
    assert violation.largest_difference is not None


# ---- copies ------------------------------------------------------------------------------------------------


def test_saves_of_the_same_memory_share_one_copy() -> None:
    memory = torch.arange(4.0)
    one, other = save_of(memory), save_of(memory.view(4))
    integers, half = save_of(memory.view(torch.int32)), save_of(memory[:2])
    empty, wide = save_of(torch.empty(0)), save_of(torch.empty(0, 5))
    named, named_too = save_of(memory.as_subclass(Named)), save_of(memory.view(4).as_subclass(Named))
    saves = [one, other, integers, half, empty, wide, named, named_too]
    before = COUNTS.copies
    with _saves.one_copy_each():
        for save in saves:
            save.keep_proof()
    assert proof_of(one) is proof_of(other)
    assert all(save.is_intact for save in saves)
    assert COUNTS.copies - before == len(saves) - 1
    later = save_of(memory)
    later.keep_proof()  # after the block memory may have been written to
    assert proof_of(later) is not proof_of(one)


class Full:
    """A tensor of which no copy can be made."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def detach(self) -> Full:
        return self

    def clone(self) -> Full:
        raise self.error


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("no room\nraised by C++"), "no room"),
        (MemoryError("no room\nraised by\nC++"), "no room"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_what_cannot_be_copied_is_told_and_ends_nothing(error: Exception, reason: str) -> None:
    full: Any = Full(error)
    with torchguard.strict() as guard:
        assert _saves.copy_of(full) is None
    assert guard.unwatched == [f"the bytes of some saves: they could not be copied ({reason})"]


def test_what_audit_has_no_room_for_is_told_and_ends_nothing() -> None:
    class Vast(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(torch.zeros(1).expand(TOO_MANY))
            return x * 2

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            assert ctx.saved_tensors[0].numel() == TOO_MANY
            return grad * 2

    def program() -> tuple[torch.Tensor, torch.Tensor]:
        x = leaf()
        return x, Vast.apply(x)

    guard = torchguard.audit()
    assert torch.equal(gradient(program, guard), gradient(program))
    (line,) = guard.unwatched
    assert line.startswith("the bytes of some saves: they could not be copied (")
    assert "allocate" in line


def test_what_there_is_no_room_to_copy_again_is_handed_out_itself() -> None:
    proof = torch.zeros(1).expand(TOO_MANY)
    assert _saves.handed_out(proof) is proof


# ---- what is handed to backward ----------------------------------------------------------------------------


class Weighted(torch.autograd.Function):
    """Tells of which type the weight is that it has saved."""

    found: ClassVar[list[type]] = []

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(weight)
        return (x * weight).as_subclass(torch.Tensor)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:  # type: ignore[override]
        (weight,) = ctx.saved_tensors
        Weighted.found.append(type(weight))
        return (weight * grad).as_subclass(torch.Tensor), None


@pytest.mark.parametrize("kind", [torch.Tensor, Named])
def test_a_repaired_save_is_of_the_type_that_was_saved(kind: type[torch.Tensor]) -> None:
    def program() -> tuple[torch.Tensor, torch.Tensor]:
        x, weight = leaf(), leaf().detach().as_subclass(kind)
        out = Weighted.apply(x, weight)
        alias = weight.data
        alias.zero_()
        return x, out

    truth, corrupt = truth_of(program), gradient(program)
    assert not torch.equal(truth, corrupt)
    Weighted.found.clear()
    with pytest.warns(SavedTensorCorruptionWarning):
        assert torch.equal(gradient(program, torchguard.repair()), truth)
    assert Weighted.found == [kind]


def test_a_wrapper_whose_transform_is_over_is_handed_back_itself() -> None:
    """As without the guard; what is computed from what it wraps may have another history."""
    kept: list[torch.Tensor] = []

    def function(x: torch.Tensor) -> torch.Tensor:
        kept.append(x.sin())
        return kept[0].sum()

    torch.func.grad(function)(leaf().detach())
    save = make_pack(exotic=True)(kept[0])
    assert save.given is kept[0]


# ---- who has written ---------------------------------------------------------------------------------------


def test_a_write_that_is_seen_is_named_though_an_invisible_one_came_before() -> None:
    def program() -> tuple[torch.Tensor, torch.Tensor]:
        x = leaf()
        out = x.sigmoid()
        poke(out)
        alias = out.data
        alias.zero_()
        return x, out

    violation = told(program, torchguard.Guard("record", at="read", depth="bytes"))
    assert (violation.kind, violation.operation) == ("write", "zero_()")


def test_the_first_writer_is_named() -> None:
    def program() -> tuple[torch.Tensor, torch.Tensor]:
        x = leaf()
        out = x.sigmoid()
        alias = out.data
        alias.zero_()
        alias.fill_(2)
        return x, out

    assert told(program, torchguard.Guard("record", at="read")).operation == "zero_()"


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("at", ["write", "read"])
def test_what_has_been_told_is_not_told_again(large: bool, at: Any) -> None:
    def program() -> tuple[torch.Tensor, torch.Tensor]:
        x = leaf(PROOF_BYTES_AT_ALIAS if large else 3)
        out = x.sigmoid()
        alias = out.data
        unseen(alias)
        out.sum().backward(retain_graph=True)
        return x, out

    told(program, torchguard.Guard("record", at=at))


def test_what_has_been_answered_leaves_no_name_behind() -> None:
    save = save_of(leaf())
    with torchguard.strict(at="read"):
        save.let_bytes_decide("write", "zero_()", None)
    assert save.is_taken
    save.tensor.detach().zero_()
    save.accept()
    remarks = save.remark()
    assert not save.is_taken
    assert save.is_intact
    assert (remarks.suspect, remarks.guard, remarks.writer, remarks.alias) == (None, None, None, None)
    assert (remarks.taken_by, remarks.healed) == (None, None)


def test_after_an_answer_as_much_is_kept_as_before() -> None:
    tensor = torch.ones(3)
    bare, proven, spoilt, audited = (save_of(tensor) for _ in range(4))
    bare.remark()
    proven.keep_proof()
    spoilt.keep_proof()
    spoilt.remark().spoilt = True
    audited.keep_contents()
    sparse = save_of(torch.ones(3).to_sparse())
    sparse.keep_contents()
    tensor.zero_()
    sparse.tensor._values().zero_()
    for save in (bare, proven, spoilt, audited, sparse):
        save.accept()
    assert proof_of(bare) is None
    assert proven.is_intact
    assert not proven.remark().audited
    assert not proven.remark().compare
    assert not spoilt.is_intact, "code outside torch has written to it, and nobody has allowed that"
    for save in (audited, sparse):
        assert save.is_intact
        assert save.remark().compare


# ---- memory that is given up and filled again --------------------------------------------------------------


def test_memory_that_comes_back_is_expected_to_hold_what_it_held() -> None:
    save = save_of(torch.arange(5.0))
    save.expect_back("resize_()")
    remarks = save.remark()
    assert (remarks.compare, remarks.writer) == (True, ("uncounted", "resize_()", None))
    assert proof_of(save) is None, "a copy would keep just the memory that is given up"
    assert save.is_intact
    save.tensor[1] = 7
    assert not save.is_intact
    save.tensor[1] = 1
    assert save.is_intact
    save.tensor[1] = 7
    save.accept()
    assert remarks.compare
    assert save.is_intact
    save.tensor[1] = 1
    assert not save.is_intact
    save.tensor.untyped_storage().resize_(0)
    assert save.is_intact, "nobody can read what is not there"
    save.accept()
    assert not remarks.compare


def test_of_what_has_a_copy_no_more_is_kept_while_its_memory_is_given_up() -> None:
    save = save_of(torch.arange(5.0))
    save.keep_proof()
    save.expect_back("resize_()")
    remarks = save.remark()
    assert remarks.fingerprint is None
    assert (remarks.compare, remarks.writer) == (True, ("uncounted", "resize_()", None))
    save.expect_back("another()")
    assert remarks.writer == ("uncounted", "resize_()", None)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_what_has_neither_copy_nor_fingerprint_is_not_compared() -> None:
    save = save_of(torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.quint8))
    save.expect_back("resize_()")
    assert not save.remark().compare
    assert save.remark().writer is None


def test_of_a_save_of_which_nothing_is_remarked_nothing_is_known() -> None:
    save = save_of(torch.ones(3))
    assert not save.is_intact
    assert not save.is_proven
    assert save.changed_elements == 3
    assert save.instruction is None
    assert save.operation == ""
    assert _torch.behind(save.given) is save.tensor


# ---- which guard answers -----------------------------------------------------------------------------------


def test_a_guard_that_was_left_says_nothing_of_what_is_written_then() -> None:
    with torchguard.Guard("record") as guard:
        x = leaf(PROOF_BYTES_AT_ALIAS)
        out = x.sigmoid()
        alias = out.data
    unseen(alias)
    out.sum().backward()
    assert guard.violations == []


def test_pytorchs_own_error_is_raised_after_the_guard_was_left() -> None:
    with torchguard.strict() as guard:
        x = leaf()
        out = x.sigmoid()
        alias = out.data
    assert torch.equal(alias, out)
    with torch.no_grad():
        out.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
    assert guard.violations == []


# ---- where it lies -----------------------------------------------------------------------------------------


def test_a_save_is_found_where_its_tensor_lies_now() -> None:
    one, other = torch.ones(3), torch.ones(3)
    x = one.clone()
    save = save_of(x)
    LEDGER.add(save)
    first = save.storage
    with torchguard.allow("looked at only"):
        for memory in (one, other, one):
            point_at(x, memory)
            save.follow()
            assert save.storage == _memory.storage_of(memory)
            assert [found for found in LEDGER.in_storage(save.storage) if found is save] == [save]
    assert save.storage != first


def crowd(memory: torch.Tensor) -> list[Save]:
    saves = [save_of(memory[i : i + 1]) for i in range(100)]
    for save in saves:
        LEDGER.add(save)
    return saves


def near(tensor: torch.Tensor) -> list[Save]:
    stretch = _memory.stretch_in_storage(tensor)
    assert stretch is not None
    return LEDGER.near(_memory.storage_of(tensor), *stretch)


def test_of_many_saves_in_a_buffer_those_are_found_that_a_write_may_concern() -> None:
    memory = torch.ones(200)
    saves = crowd(memory)
    part = Part(saves[0], memory[150:151])
    LEDGER.add(part)
    found = near(memory[5:6])
    assert [save for save in found if save is not part] == [saves[5]]
    assert any(save is part for save in found), "of a part no version tells where somebody writes"
    assert part.tensor.data_ptr() == memory[150:].data_ptr()
    point_at(saves[5].tensor, memory[120:121])
    saves[5].follow()
    assert [save for save in near(memory[120:121]) if save is not part] == [saves[5]]


def from_array() -> tuple[torch.Tensor, torch.Tensor]:
    array = np.array([1.0, 2.0, 3.0])
    x = torch.from_numpy(array).requires_grad_()
    out = x * x
    other = torch.from_numpy(array)
    other.zero_()
    return x, out


def a_row_of_an_array() -> tuple[torch.Tensor, torch.Tensor]:
    array = np.ones((2, 3))
    x = torch.from_numpy(array).requires_grad_()
    out = x * x
    other = torch.from_numpy(array[1])
    other.zero_()
    return x, out


def written_as_another_tensor() -> tuple[torch.Tensor, torch.Tensor]:
    x = leaf()
    out = x.sigmoid()
    other = torch.from_dlpack(out.detach())
    other.zero_()
    return x, out


def saved_as_another_tensor() -> tuple[torch.Tensor, torch.Tensor]:
    memory = torch.ones(3)
    x = torch.from_dlpack(memory).requires_grad_()
    out = x * x
    memory.zero_()
    return x, out


@pytest.mark.parametrize("kind", [torch.Tensor, Named])
@pytest.mark.parametrize("program", [from_array, a_row_of_an_array, written_as_another_tensor, saved_as_another_tensor])
def test_a_write_in_another_storage_over_the_same_memory_is_seen_at_the_write(
    program: Program, kind: type[torch.Tensor]
) -> None:
    def body() -> tuple[torch.Tensor, torch.Tensor]:
        if kind is torch.Tensor:
            return program()
        array = np.array([1.0, 2.0, 3.0])
        x = torch.from_numpy(array).requires_grad_()
        saved = x.as_subclass(kind)
        out = saved * saved
        other = torch.from_numpy(array)
        other.zero_()
        return x, out.as_subclass(torch.Tensor)

    violation = told(body)
    assert (violation.caught, violation.operation, violation.elements) == ("write", "zero_()", 3)


def test_storages_over_the_same_memory_find_each_other_and_no_others() -> None:
    array = np.zeros(8)
    x, apart = torch.from_numpy(array[:4]), torch.from_numpy(array[4:])
    save, own = save_of(x), save_of(torch.zeros(4))
    for one in (save, own):
        LEDGER.add(one)
    for tensor, found in ((torch.from_numpy(array[3:5]), [save]), (apart, []), (torch.from_numpy(array[2:3]), [save])):
        extent = _saves.extent_of(tensor)
        assert extent is not None
        assert extent == (tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * 8, True)
        across = LEDGER.across_storages(_memory.storage_of(tensor), extent)
        assert [one for one in across if one is save or one is own] == found
    assert _saves.is_foreign(x)
    assert _saves.is_foreign(x.as_subclass(Named))
    assert not _saves.is_foreign(own.tensor)
    assert not _saves.is_foreign(own.tensor.as_subclass(Named))
    assert _saves.extent_of(torch.ones(2).to_sparse()) is None
    assert _saves.extent_of(torch.empty(0)) is None
    assert not _saves.is_foreign(torch.empty(0).as_subclass(Named))


def test_what_torch_func_wraps_lies_where_its_memory_does() -> None:
    array = np.ones(3)
    found: list[Save] = []

    def function(x: torch.Tensor) -> torch.Tensor:
        save = save_of(x)
        save.remark()
        LEDGER.add(save)
        other = torch.from_numpy(array)
        extent = _saves.extent_of(other)
        assert extent is not None
        for foreign in (True, False):  # of the memory that is written to
            across = LEDGER.across_storages(_memory.storage_of(other), (*extent[:2], foreign))
            found.extend(one for one in across if one is save)
        return x.sum()

    torch.func.grad(function)(torch.from_numpy(array))
    assert len(found) == 2


# ---- what saved it -----------------------------------------------------------------------------------------


def calling(function: Callable[..., Any]) -> tuple[CodeType, int]:
    """The instruction of the one call that a function makes."""
    (offset,) = (step.offset for step in dis.get_instructions(function) if step.opname.startswith("CALL"))
    return function.__code__, offset


def users(x: torch.Tensor) -> torch.Tensor:
    return x.exp()


def of_torch(x: torch.Tensor) -> torch.Tensor:
    return x.sin()


def test_what_saved_it_is_told_by_the_innermost_call_that_is_not_the_guards() -> None:
    save = save_of(torch.ones(3))
    save.code, save.offset = calling(users)
    save.inner_code, save.inner_offset = calling(of_torch)
    assert save.instruction == calling(users)
    assert save.operation == "sin"
    save.inner_code, save.inner_offset = Save.remark.__code__, 0  # the guard makes the user's call
    assert save.operation == "exp"
    save.code, save.offset = None, 0
    assert save.operation == ""
    save.inner_code = None
    save.code, save.offset = calling(users)
    assert save.operation == ""


@pytest.mark.parametrize(
    ("node", "operation"),
    [
        ("MulBackward0", "mul"),
        ("LinalgSvdBackward0", "linalg_svd"),
        ("ConvolutionBackwardBackward0", "convolution_backward"),
        ("StdMeanBackward12", "std_mean"),
        ("MyFunctionBackward", "MyFunction"),
        ("BackwardFixBackward", "BackwardFix"),
        ("CopySlices", "CopySlices"),
        ("CopyBackwards", "Copy"),
    ],
)
def test_a_node_is_told_by_the_name_of_its_operation(node: str, operation: str) -> None:
    assert _saves.operation_of_node(node) == operation


def test_a_function_of_the_programs_own_keeps_its_name() -> None:
    class BackwardFix(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            out = x.exp()
            ctx.save_for_backward(out)
            return out

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            (out,) = ctx.saved_tensors
            return out * grad

    def program() -> tuple[torch.Tensor, torch.Tensor]:
        x = leaf()
        out = BackwardFix.apply(x)
        out.data.zero_()
        return x, out

    assert told(program).saved_by == "BackwardFix"
