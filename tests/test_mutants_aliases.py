"""Is each alias watched that could write unseen, and no other? Each test here was asked for by a mutant that survived."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

import torchguard
from benchmarks.instructions import count_steps
from torchguard import Guard, SavedTensorCorruptionError, strict
from torchguard._aliases import _DEAD_KEPT, ALIASES, Aliases, AliasRecord
from torchguard._counts import COUNTS
from torchguard._memory import storage_of
from torchguard._saves import LEDGER, Save

#: So many aliases of one storage are asked by an index.
MANY = 20
#: So many elements are too many for a copy to be kept of them when they are saved: nothing else than counters decides.
LARGE = 6000

HERE = (sys._getframe().f_code, 0)
THERE = (sys._getframe().f_code, 2)


def cut(number: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A buffer, and aliases of it, of four elements each, that nobody has taken down."""
    buffer = torch.ones(4 * number)
    return buffer, [buffer[4 * i : 4 * i + 4].data for i in range(number)]


def saved(tensor: torch.Tensor) -> Save:
    """A save of ``tensor``, as a pack hook makes one."""
    save = Save()
    save.tensor, save.version, save.storage = tensor, tensor._version, storage_of(tensor)
    save.code = save.inner_code = save.node = save.remarks = None
    save.offset = save.inner_offset = save.output = 0
    LEDGER.add(save)
    return save


def entered(book: Aliases, *aliases: torch.Tensor) -> list[AliasRecord]:
    return [book.enter(alias, storage_of(alias), None, 0) for alias in aliases]


def dead(book: Aliases, tensor: torch.Tensor) -> torch.Tensor:
    """What has the counter of an alias that was watched, and is gone."""
    alias = tensor.data
    entered(book, alias)[0].arm(alias)
    return alias.detach()


def numbers(found: list[AliasRecord], records: list[AliasRecord]) -> list[int]:
    """Which of the records were found; as often as they were."""
    return sorted(i for i, record in enumerate(records) for other in found if other is record)


def is_suspected(save: Save) -> bool:
    return save.remarks is not None and save.remarks.suspect is not None


# ---- one alias ----------------------------------------------------------------------------------------------------


def test_a_record_knows_the_version_and_the_memory_of_its_alias() -> None:
    alias = torch.ones(8)[2:6].data
    record = AliasRecord(alias, None, 3)
    assert (record.version, record.stretch) == (0, (8, 24))
    alias.add_(1)
    assert record.version == 1
    assert not record.is_quiet  # it is not watched
    record.arm(alias)
    record.expected = 1
    assert record.is_quiet
    handle = alias.detach()
    del alias
    assert record.is_quiet
    assert (record(), record.version, record.stretch) == (None, 1, (8, 24))
    handle.add_(1)
    assert not record.is_quiet
    assert record.version == 2


def test_the_record_of_an_alias_that_is_gone_unwatched_knows_nothing() -> None:
    alias = torch.ones(8)[2:6].data
    record = AliasRecord(alias, None, 3)
    del alias
    assert record.version == 3
    assert record.stretch is not None
    assert record.stretch[0] == record.stretch[1]


@pytest.mark.parametrize("alias", [torch.eye(2).to_sparse(), torch.empty(2, device="meta")], ids=["sparse", "meta"])
def test_what_has_no_memory_is_not_watched(alias: torch.Tensor) -> None:
    record = AliasRecord(alias, None, 0)
    record.arm(alias)
    assert record.counter is None


def test_an_alias_that_was_lent_a_counter_has_none_to_watch() -> None:
    book, tensor = Aliases(), torch.ones(8)
    lent, own, storage = tensor.detach(), tensor.data, storage_of(tensor)
    record = book.enter(lent, storage, None, 0, lent=True)
    entered(book, own)
    record.arm(lent)
    lent.add_(1)
    assert (record.counter, record.version) == (None, 0)
    assert book.lent(lent, storage)
    assert book.lent(lent[2:], storage)
    assert not book.lent(own, storage)
    assert not book.lent(own[2:], storage)
    assert not book.lent(tensor, storage)
    del lent
    assert not book.lent(own, storage)
    assert not book.lent(torch.ones(2), 1)


def test_a_view_of_what_was_lent_a_counter_may_reach_further() -> None:
    book = Aliases()
    buffer, aliases = cut(MANY)
    entered(book, *aliases)
    lent = buffer[:4].detach()
    book.enter(lent, storage_of(buffer), None, 0, lent=True)
    assert book.lent(lent.as_strided((4,), (1,), 40), storage_of(buffer))
    assert not book.lent(aliases[10], storage_of(buffer))


# ---- where it was taken -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("armed", [False, True], ids=["", "watched"])
def test_where_an_alias_was_taken(armed: bool) -> None:
    book, tensor = Aliases(), torch.ones(8)
    gone, alias, other, storage = tensor.data, tensor.data, tensor.data, storage_of(tensor)
    for one, place in ((gone, THERE), (alias, HERE), (other, THERE)):
        record = book.enter(one, storage, place, 0)
        if armed:
            record.arm(one)
    handle = gone.detach()
    del gone, one
    other.add_(1)  # its version is another one
    assert book.taken_at(alias, storage) == HERE
    assert book.taken_at(alias[2:], storage) == HERE
    assert book.taken_at(alias.detach(), storage) == HERE
    assert book.taken_at(other.detach(), storage) == THERE
    assert book.taken_at(handle, storage) == (THERE if armed else None)
    assert book.taken_at(tensor, storage) is None
    assert book.taken_at(tensor.data, storage) is None
    assert book.taken_at(torch.ones(2), 1) is None


def test_where_one_of_those_was_taken_that_share_a_counter() -> None:
    book, tensor = Aliases(), torch.ones(8)
    first, second, storage = tensor.detach(), tensor.detach(), storage_of(tensor)
    for one, place in ((first, HERE), (second, THERE)):
        book.enter(one, storage, place, 0, lent=True)
    assert book.taken_at(first, storage) == book.taken_at(first[2:], storage) == HERE
    assert book.taken_at(second, storage) == book.taken_at(second[2:], storage) == THERE


@pytest.mark.parametrize("place", [HERE, THERE, None])
def test_where_a_young_alias_was_taken(place: Any) -> None:
    book, alias = Aliases(), torch.ones(2).data
    book.enter_young(alias, storage_of(alias), *(place or (None, 0)))
    assert book.taken_at(alias, storage_of(alias)) == place


def test_the_place_that_is_told_is_the_latest() -> None:
    """``y = x.data; z.data = y`` takes ``y`` down twice, whether or not something was saved meanwhile."""
    book, alias = Aliases(), torch.ones(2).data
    book.enter_young(alias, storage_of(alias), *THERE)
    book.enter(alias, storage_of(alias), HERE, 0)
    assert book.taken_at(alias, storage_of(alias)) == HERE


# ---- the young ----------------------------------------------------------------------------------------------------


def test_a_young_alias_that_nobody_wrote_to_puts_no_save_under_suspicion() -> None:
    book, tensor = Aliases(), torch.ones(2)
    alias, storage = tensor.data, storage_of(tensor)
    book.enter_young(alias, storage, None, 0)
    save = saved(tensor)
    book.sync(storage)
    assert not is_suspected(save)
    torch.neg(alias, out=alias)
    book.sync(storage)
    assert is_suspected(save)


def test_young_aliases_go_when_they_are_dead_and_not_before() -> None:
    book = Aliases()
    tensors = [torch.empty(1) for _ in range(7000)]
    kept = [tensor.data for tensor in tensors[::20]]
    for i, tensor in enumerate(tensors):
        book.enter_young(kept[i // 20] if i % 20 == 0 else tensor.data, storage_of(tensor), None, 0)
    assert len(book.young) < 3000
    assert all(storage_of(alias) in book.young for alias in kept)


@pytest.mark.parametrize("alive", [False, True])
def test_a_young_alias_costs_the_same_however_many_there_were(alive: bool) -> None:
    book = Aliases()
    tensors = [torch.empty(1) for _ in range(1250)]
    storages = [storage_of(tensor) for tensor in tensors]
    aliases = [tensor.data for tensor in tensors]
    warm = Aliases()  # what is counted is hidden from those who ask which lines a test runs
    for alias, storage in zip(aliases, storages, strict=True):
        warm.enter_young(alias, storage, None, 0)

    def enter(start: int) -> int:
        them = range(start, start + 50)
        return count_steps(lambda: [book.enter_young(aliases[i], storages[i], None, 0) for i in them])

    first = enter(0)
    for i in range(50, 1150):
        book.enter_young(aliases[i] if alive else tensors[i].data, storages[i], None, 0)
    # Somewhere the dead may be looked for, but not twice in a row.
    assert min(enter(1150), enter(1200)) < 2 * first


# ---- many aliases -------------------------------------------------------------------------------------------------


def test_many_aliases_are_found_by_their_memory() -> None:
    book = Aliases()
    buffer, aliases = cut(MANY)
    storage = storage_of(buffer)
    records = entered(book, *aliases)

    def near(part: int) -> list[int]:
        return numbers(book.near(storage, buffer[4 * part : 4 * part + 4]), records)

    assert near(3) == [3]
    book.forget(aliases[3])
    again = buffer[12:16].data
    records += entered(book, again)
    assert near(3) == [MANY]
    assert near(MANY - 2) == [MANY - 2]
    del again  # the next one takes its place
    again = buffer[16:20].data
    records[MANY:] = entered(book, again)
    assert near(4) == [4, MANY]
    assert near(MANY - 1) == [MANY - 1]


def test_an_alias_that_lies_elsewhere_is_found_there() -> None:
    book = Aliases()
    buffer, aliases = cut(MANY)
    storage = storage_of(buffer)
    records = entered(book, *aliases)
    for record, alias in zip(records, aliases, strict=True):
        record.arm(alias)
    assert numbers(book.near(storage, buffer[4:8]), records) == [1]
    aliases[5].as_strided_((4,), (1,), 4)
    book.lies_elsewhere(storage, aliases[5])
    assert numbers(book.near(storage, buffer[4:8]), records) == [1, 5]
    assert [record.stretch for record in records[4:7]] == [(64, 80), (16, 32), (96, 112)]
    book.lies_elsewhere(1, torch.ones(2))  # a storage that has no alias


def test_only_the_aliases_that_reach_a_save_are_watched() -> None:
    book = Aliases()
    buffer, aliases = cut(MANY)
    records = entered(book, *aliases)
    book.meet_save(storage_of(buffer), buffer[4:8])
    assert [record.counter is not None for record in records[:3]] == [False, True, False]


def test_each_alias_is_counted_once() -> None:
    before = COUNTS.aliases
    _, aliases = cut(3)
    entered(Aliases(), *aliases)
    assert COUNTS.aliases == before + 3


# ---- what a save meets --------------------------------------------------------------------------------------------


def test_what_is_saved_is_no_stranger_to_itself() -> None:
    book, tensor = Aliases(), torch.ones(2)
    storage = storage_of(tensor)
    entered(book, tensor)
    for _ in range(2):  # the first has it watched, the second finds it quiet
        assert not book.meet_save(storage, tensor)
    other = tensor.data
    entered(book, other)
    for _ in range(2):
        assert book.meet_save(storage, tensor)
    assert book.arm(storage, tensor)


def test_an_alias_that_is_gone_may_have_left_its_counter() -> None:
    book, tensor = Aliases(), torch.ones(2)
    storage, save = storage_of(tensor), saved(tensor)
    handle = dead(book, tensor)
    entered(book, tensor)
    assert book.meet_save(storage, tensor)
    assert book.arm(storage, tensor)
    assert not is_suspected(save)
    del handle, save
    assert not book.meet_save(storage, tensor)  # it was no save that lives that it could have written to
    assert [record() for record in book.by_storage[storage]] == [tensor]


@pytest.mark.parametrize("young", [False, True], ids=["", "young"])
def test_an_alias_is_watched_though_another_is_already(young: bool) -> None:
    book, tensor = Aliases(), torch.ones(2)
    first, storage = tensor.data, storage_of(tensor)
    entered(book, first)
    book.meet_save(storage, tensor)
    second = tensor.data
    if young:
        book.enter_young(second, storage, None, 0)
    else:
        entered(book, second)
    book.meet_save(storage, tensor)
    save = saved(tensor)
    handle = second.detach()
    del second
    assert book.is_quiet(storage, tensor)
    torch.neg(handle, out=handle)
    assert not book.is_quiet(storage, tensor)
    book.sync(storage, tensor)
    assert is_suspected(save)


def test_where_nobody_has_an_alias_a_save_meets_none() -> None:
    tensor = torch.ones(2)
    assert Aliases().meet_save(storage_of(tensor), tensor) is False
    assert Aliases().arm(storage_of(tensor), tensor) is False


def test_what_was_written_while_nothing_was_saved_is_expected_of_all_aliases() -> None:
    book = Aliases()
    buffer, aliases = cut(MANY)
    records = entered(book, *aliases)
    for record, alias in zip(records, aliases, strict=True):
        record.arm(alias)
    aliases[9].add_(1)
    book.meet_save(storage_of(buffer), buffer[:4])
    assert all(record.is_quiet for record in records)


def test_a_save_costs_less_where_nothing_was_written() -> None:
    book, tensor = Aliases(), torch.ones(2)
    aliases, storage = [tensor.data for _ in range(3)], storage_of(tensor)
    entered(book, *aliases)
    book.meet_save(storage, tensor)
    aliases[0].add_(1)
    meeting = count_steps(lambda: book.meet_save(storage, tensor))
    assert count_steps(lambda: book.meet_save(storage, tensor)) < meeting / 2


def test_a_save_costs_the_same_however_many_aliases_there_are() -> None:
    each = {}
    for number in (30, 150):
        book = Aliases()
        buffer, aliases = cut(number)
        for record, alias in zip(entered(book, *aliases), aliases, strict=True):
            record.arm(alias)
        storage, part = storage_of(buffer), buffer[:4]
        save = saved(part)
        aliases[0].add_(1)
        book.meet_save(storage, part)  # draws the index, and finds the write: that is put down for the whole storage
        each[number] = count_steps(lambda book=book, storage=storage, part=part: book.meet_save(storage, part))
        assert is_suspected(save)
    assert each[150] < 1.2 * each[30]


def test_an_unseen_write_costs_the_same_however_many_saves_there_are() -> None:
    each = {}
    for number in (100, 400):
        book = Aliases()
        buffer, aliases = cut(number)
        saves = [saved(buffer[4 * i : 4 * i + 4]) for i in range(number)]
        (record,) = entered(book, aliases[7])
        record.arm(aliases[7])
        aliases[7].add_(1)
        book.sync(storage_of(buffer))  # draws the index
        aliases[7].add_(1)
        each[number] = count_steps(lambda book=book, buffer=buffer: book.sync(storage_of(buffer)))
        assert [i for i, save in enumerate(saves) if is_suspected(save)] == [7]
    assert each[400] < 1.2 * each[100]


# ---- who is forgotten, and when -----------------------------------------------------------------------------------


def test_the_latest_dead_aliases_of_a_storage_are_kept() -> None:
    book, tensor = Aliases(), torch.ones(2)
    storage, save = storage_of(tensor), saved(tensor)
    alive = [tensor.data for _ in range(16)]
    entered(book, *alive[:5])
    handles = [dead(book, tensor) for _ in range(112)]
    for alias in alive[5:]:  # the last is the 128th: there are too many
        entered(book, alias)[0].arm(alias)
    assert len(book.by_storage[storage]) == 16 + _DEAD_KEPT
    assert not is_suspected(save)
    torch.neg(handles[-_DEAD_KEPT], out=handles[-_DEAD_KEPT])
    book.sync(storage)
    assert is_suspected(save)


def test_what_a_dead_alias_has_done_is_known_after_it_is_forgotten() -> None:
    book, tensor = Aliases(), torch.ones(2)
    save = saved(tensor)
    handle = dead(book, tensor)
    torch.neg(handle, out=handle)
    for _ in range(300):
        dead(book, tensor)
    assert len(book.by_storage[storage_of(tensor)]) <= 128
    assert is_suspected(save)


def test_temporary_aliases_of_many_storages_leave_few_records() -> None:
    book, tensor = Aliases(), torch.ones(2)
    save, handle = saved(tensor), dead(book, tensor)
    tensors = [torch.empty(1) for _ in range(500)]
    for other in tensors:
        dead(book, other)
    assert len(book.by_storage) < 50
    torch.neg(handle, out=handle)  # that one matters to a save that lives
    book.sync(storage_of(tensor))
    assert is_suspected(save)
    book.forget_all_dead()
    assert book.by_storage == {}
    book._sweep()


@pytest.mark.usefixtures("empty_ledger")
def test_with_the_last_save_go_the_dead_aliases() -> None:
    with strict():
        a = torch.ones(3, requires_grad=True)
        out = a.sigmoid()
        handle = out.data.detach()
        assert storage_of(out) in ALIASES.by_storage
        out.sum().backward()
        del out
        assert not LEDGER
        assert ALIASES.by_storage == {}
    assert handle.shape == (3,)


def test_without_a_save_the_dead_aliases_of_a_storage_go() -> None:
    book, tensor = Aliases(), torch.ones(2)
    kept = tensor.data
    entered(book, kept)
    handles = [dead(book, tensor) for _ in range(3)]
    book.sync(storage_of(tensor))
    assert [record() for record in book.by_storage[storage_of(tensor)]] == [kept]
    assert len(handles) == 3


@pytest.mark.parametrize("storages", ["one", "many"])
def test_an_alias_costs_the_same_however_many_there_are(storages: str) -> None:
    book = Aliases()
    aliases = cut(140)[1] if storages == "one" else [torch.empty(1) for _ in range(140)]
    entered(Aliases(), *aliases)
    first = count_steps(lambda: entered(book, *aliases[:20]))
    entered(book, *aliases[20:100])
    last = [count_steps(lambda i=i: entered(book, *aliases[i : i + 20])) for i in (100, 120)]
    assert min(last) < 2 * first  # somewhere the dead are looked for, but not twice in a row


def test_a_write_costs_the_same_however_many_aliases_there_are() -> None:
    each = {}
    for number in (30, 150):
        with strict():
            buffer, plain = cut(number)
            aliases = [alias.data for alias in plain]
            weight = torch.ones(4, requires_grad=True)
            loss = (weight * buffer[:4]).sum()  # the save that all writes are asked about

            def write(aliases: list[torch.Tensor] = aliases) -> None:
                for alias in aliases[-5:]:
                    alias.mul_(2)

            write()
            each[number] = count_steps(write)
            loss.backward()
    assert each[150] < 1.2 * each[30]


# ---- programs -----------------------------------------------------------------------------------------------------

#: Computes a loss of ``a``, and writes.
Program = Callable[[torch.Tensor], torch.Tensor]


def gradient(program: Program, elements: int) -> torch.Tensor:
    a = torch.linspace(0.5, 2.0, elements).requires_grad_()
    program(a).backward()
    assert a.grad is not None
    return a.grad


def unseen(tensor: torch.Tensor, *factors: float) -> None:
    for factor in factors:
        torch.mul(tensor, factor, out=tensor)


def through_a_handle(a: torch.Tensor, *factors: float) -> torch.Tensor:
    """The alias is gone, another one was taken meanwhile, and what was made of the first one writes."""
    out = a.sigmoid()
    handle = out.data.detach()
    assert out.data.sum() > 0
    unseen(handle, *factors)
    return out.sum()


def through_a_handle_from_before(a: torch.Tensor, *factors: float) -> torch.Tensor:
    alias = a.data
    handle = alias.detach()
    loss = a.square().sum()
    del alias
    unseen(handle, *factors)
    return loss


def where_the_storage_has_moved(a: torch.Tensor, *factors: float) -> torch.Tensor:
    out = a.sigmoid()
    alias = out.data
    blocks = [torch.empty(a.numel()) for _ in range(8)]  # so that it cannot grow where it is
    out.untyped_storage().resize_(1 << 16)
    unseen(alias, *factors)
    assert blocks
    return out.sum()


def after_a_save_that_was_written_to(a: torch.Tensor, *factors: float) -> torch.Tensor:
    factor = torch.ones(a.shape)
    given_up = a * factor
    factor.add_(1)  # PyTorch would refuse that save
    loss = (a * factor).sum()
    unseen(factor.data, *factors)
    loss.given_up = given_up  # type: ignore[attr-defined]  # as long as the loss
    return loss


def before_a_seen_one_elsewhere(a: torch.Tensor, *factors: float) -> torch.Tensor:
    """Through one of many aliases of one storage."""
    buffer, plain = cut(MANY)
    aliases = [alias.data for alias in plain]
    loss = (a[:4] * buffer[4:8]).sum()
    unseen(aliases[1], *factors)
    aliases[9].mul_(2)
    return loss


def through_a_far_one_that_was_moved(a: torch.Tensor, *factors: float) -> torch.Tensor:
    buffer, plain = cut(MANY)
    aliases = [alias.data for alias in plain]
    loss = (a[:4] * buffer[4:8]).sum()
    aliases[9].as_strided_((4,), (1,), 4)
    unseen(aliases[9], *factors)
    return loss


@pytest.mark.parametrize(
    "program",
    [
        through_a_handle,
        through_a_handle_from_before,
        where_the_storage_has_moved,
        after_a_save_that_was_written_to,
        before_a_seen_one_elsewhere,
        through_a_far_one_that_was_moved,
    ],
)
def test_an_unseen_write(program: Callable[..., torch.Tensor]) -> None:
    right = gradient(program, 8)
    assert not torch.equal(gradient(lambda a: program(a, 2.0), 8), right)
    with pytest.raises(SavedTensorCorruptionError), strict():
        gradient(lambda a: program(a, 2.0), 8)
    assert torch.equal(gradient(lambda a: program(a, 2.0, 0.5), 8), right)
    with strict() as guard:
        assert torch.equal(gradient(lambda a: program(a, 2.0, 0.5), 8), right)
    assert guard.violations == []


def written_before_the_save(a: torch.Tensor) -> torch.Tensor:
    alias = a.data
    unseen(alias, 2.0)
    return a.square().sum()


def seen_and_without_effect(a: torch.Tensor) -> torch.Tensor:
    alias = a.data
    loss = a.square().sum()
    alias.mul_(1)
    return loss


def another_row(a: torch.Tensor) -> torch.Tensor:
    rows = torch.ones(2, a.numel())
    alias = rows[1].data
    loss = (a * rows[0]).sum()
    unseen(alias, 2.0)
    return loss


def another_row_in_a_block_that_puts_counters_back(a: torch.Tensor) -> torch.Tensor:
    rows = torch.ones(2, a.numel())
    alias = rows.data
    loss = (a * rows[0]).sum()
    with torch.autograd._unsafe_preserve_version_counter(alias):
        alias[1].mul_(2)
    return loss


def nothing_in_a_block_that_puts_counters_back(a: torch.Tensor) -> torch.Tensor:
    loss = a.square().sum()
    with torch.autograd._unsafe_preserve_version_counter(a):
        pass
    return loss


@pytest.mark.parametrize(
    "program",
    [
        written_before_the_save,
        seen_and_without_effect,
        another_row,
        another_row_in_a_block_that_puts_counters_back,
        nothing_in_a_block_that_puts_counters_back,
    ],
)
def test_an_innocent_write_where_no_copy_is_kept(program: Program) -> None:
    right = gradient(program, LARGE)
    with strict() as guard:
        assert torch.equal(gradient(program, LARGE), right)
    assert guard.violations == []


def test_what_was_reported_is_not_reported_again() -> None:
    guard = Guard(action="record")
    a = torch.ones(LARGE, requires_grad=True)
    with guard:
        alias = a.data
        loss = a.square().sum()
        unseen(alias, 2.0)
        loss.backward(retain_graph=True)
        assert len(guard.violations) == 1
        loss.backward(retain_graph=True)
        assert len(guard.violations) == 1
        unseen(alias, 2.0)
        loss.backward()
        assert len(guard.violations) == 2


def test_memory_that_was_given_up_is_no_concern() -> None:
    book, tensor = Aliases(), torch.ones(2)
    storage, save = storage_of(tensor), saved(tensor)
    handle = dead(book, tensor)
    torch.neg(handle, out=handle)
    tensor.untyped_storage().resize_(0)
    book.sync(storage)
    assert not is_suspected(save)


def test_a_young_alias_can_be_swapped() -> None:
    with strict():
        a = torch.ones(2, requires_grad=True)
        alias, other = a.data, torch.zeros(3)
        torch.utils.swap_tensors(alias, other)
    assert (alias.shape, other.shape) == ((3,), (2,))


def test_the_report_says_where_a_young_alias_was_taken() -> None:
    a = torch.ones(2, requires_grad=True)
    with pytest.raises(SavedTensorCorruptionError) as caught, torchguard.strict():
        young = a.data
        loss = a.square().sum()
        young.zero_()
    aliased = caught.value.violation.aliased
    assert aliased is not None
    assert aliased.source == "young = a.data"
    assert loss.shape == ()
