"""Does the ledger keep what no other test would miss? Each test here was asked for by a mutant of ``_ledger``."""

from __future__ import annotations

import linecache
import os
import random
import sys
import threading
import traceback
from collections.abc import Callable
from typing import Any
from weakref import ref

import pytest
from test_ledger import Entry, Part, cost, kept_by, new, of_parts

from torchguard import _ledger
from torchguard._ledger import Ledger, _AddressMap

#: More saves in one storage than are looked through one by one.
CROWD = 100


def added(ledger: Ledger[Any], *entries: Entry) -> None:
    for entry in entries:
        ledger.add(entry)


# ---- an interruption at any line -------------------------------------------------------------------------------


def interrupted(function: str, call: Callable[[], object], line: int, run: Callable[[], object]) -> bool:
    """Have ``run`` run before the so-manieth line of a function of the ledger; whether there is such a line."""
    before = sys.gettrace()
    left = [line]

    def trace(frame: Any, event: str, argument: Any) -> Any:
        inner = before(frame, event, argument) if before is not None else None
        if frame.f_code.co_filename != _ledger.__file__ or frame.f_code.co_name != function:
            return inner

        def each_line(frame: Any, event: str, argument: Any) -> Any:
            nonlocal inner
            inner = inner(frame, event, argument) if inner is not None else None
            # No signal's handler runs at these, and what is raised there misses the blocks around, too: what was being
            # handled would stay so in this thread.
            here = linecache.getline(_ledger.__file__, frame.f_lineno).strip()
            if event == "line" and not here.startswith(("try:", "except ", "break")):
                left[0] -= 1
                if left[0] == 0:
                    run()  # nothing in it is traced
            return each_line

        return each_line

    sys.settrace(trace)
    try:
        call()
    finally:
        sys.settrace(before)
    return left[0] <= 0


def at_each_line(case: Callable[[int], bool]) -> None:
    """Runs a case that interrupts the first, the second, ... line for as long as there is such a line."""
    if not hasattr(os, "fork"):
        pytest.skip("no fork on this system")
    # In a process of its own: an error that a trace raises may leave the one that was handled there behind for good.
    child = os.fork()
    if child == 0:
        try:
            line = 1
            while case(line):
                line += 1
            assert line > 3  # something was interrupted
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("number", [3, 10])
def test_an_interrupt_at_any_line_of_filing_loses_no_save(number: int) -> None:
    def case(line: int) -> bool:
        ledger, entries = new(), [Entry(storage) for storage in range(number)]
        added(ledger, *entries)

        def interrupt() -> None:
            raise KeyboardInterrupt

        try:
            there = interrupted("file", ledger.file, line, interrupt)
        except KeyboardInterrupt:
            there = True
        for entry in entries:
            assert entry in ledger.in_storage(entry.storage)
        return there

    at_each_line(case)


@pytest.mark.parametrize("number", [3, 10])
def test_a_handler_that_saves_and_asks_at_any_line_of_filing_loses_no_save_and_counts_each_once(number: int) -> None:
    def case(line: int) -> bool:
        ledger, entries, late = new(), [Entry(storage) for storage in range(number)], Entry(1)
        added(ledger, *entries)

        def handler() -> None:
            ledger.add(late)
            assert late in ledger.in_storage(1)

        there = interrupted("file", ledger.file, line, handler)
        expected = [*entries, late] if there else entries
        assert sorted(map(id, ledger.all_alive())) == sorted(map(id, expected))
        assert ledger.filed == len(expected)
        return there

    at_each_line(case)


def test_a_save_that_a_finaliser_makes_while_it_is_asked_whether_any_is_alive_counts() -> None:
    ledger, late = new(), Entry(7)

    class Interrupting(ref[Entry]):
        def __call__(self) -> Entry | None:
            entry = super().__call__()
            if entry is None and late not in ledger.in_storage(7):
                ledger.add(late)
                ledger.file()
            return entry

    dead = Entry(1)
    ledger.pending.append(Interrupting(dead))  # as the pack hook does
    ledger.file()
    del dead
    assert ledger
    assert ledger.in_storage(7) == [late]


def test_a_storage_whose_last_save_ends_while_another_is_looked_up_is_passed_over() -> None:
    others = [Entry(2, (100, 200, False))]

    def extent_of(entry: Entry) -> Any:
        if entry.storage == 1 and others:
            others.clear()
            assert not ledger.any_in_storage(2)
        return entry.extent

    ledger: Ledger[Entry] = Ledger(extent_of, lambda entry: False)
    entry = Entry(1, (0, 50, False))
    added(ledger, entry, *others)
    assert ledger.across_storages(9, (0, 1000, True)) == [entry]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_after_a_fork_other_threads_can_ask_in_the_parent_and_in_the_child() -> None:
    ledger, entry = new(), Entry(1)
    ledger.add(entry)

    def answered() -> bool:
        found: list[Entry] = []
        asking = threading.Thread(target=lambda: found.extend(ledger.all_alive()), daemon=True)
        asking.start()
        asking.join(10)
        return found == [entry]

    child = os.fork()
    if child == 0:
        os._exit(0 if answered() else 1)
    in_parent = answered()
    _, status = os.waitpid(child, 0)
    assert in_parent
    assert os.waitstatus_to_exitcode(status) == 0


# ---- what is alive ---------------------------------------------------------------------------------------------


def test_it_counts_what_has_been_filed_dead_or_alive() -> None:
    ledger, entries = new(), [Entry(n) for n in range(13)]
    assert ledger.filed == 0
    added(ledger, *entries[:3])
    ledger.file()
    assert ledger.filed == 3
    added(ledger, *entries[3:])
    del entries[5:9]
    ledger.file()
    assert ledger.filed == 13
    added(ledger, *entries[:2])
    ledger.file()
    assert ledger.filed == 15


def test_all_that_are_alive_are_told_before_anything_else_is_asked() -> None:
    ledger, entries = new(), [Entry(1), Entry(2)]
    added(ledger, *entries)
    assert ledger.all_alive() == entries


@pytest.mark.parametrize("saves", [1, 2, 3])
def test_whether_any_is_alive_is_told_by_the_saves_alone(saves: int) -> None:
    ledger, entries = new(), [Entry(1) for _ in range(saves)]
    added(ledger, *entries)
    assert ledger
    assert ledger.in_storage(1) == entries
    entries.clear()
    assert not ledger


@pytest.mark.parametrize(
    "ask", [lambda ledger: bool(ledger), lambda ledger: ledger.any_in_storage(1), lambda ledger: ledger.in_storage(1)]
)
def test_once_the_last_save_is_gone_nothing_is_kept_and_it_is_told_once(ask: Callable[[Ledger[Entry]], object]) -> None:
    told: list[int] = []
    ledger = new()
    ledger.on_empty = lambda: told.append(len(ledger.groups))
    entries = [Entry(1, (0, 100, True)), Entry(2, (100, 200, False)), Entry(1, (0, 100, True))]
    added(ledger, *entries)
    assert len(ledger.across_storages(9, (0, 300, True))) == 3
    entries[1] = entries[0]
    assert ledger.in_storage(2) == []
    assert told == []
    entries.clear()
    assert not ask(ledger)
    assert told == [0]
    assert kept_by(ledger) == 0


def test_once_many_have_died_filing_one_is_cheap_again() -> None:
    ledger, entries = new(), [Entry(n) for n in range(1_000)]
    added(ledger, *entries)
    ledger.file()
    entries[600:] = [Entry(n) for n in range(1_000, 1_100)]
    added(ledger, *entries[600:])
    ledger.file()  # sweeps
    added(ledger, last := Entry(-1))
    assert cost(ledger.file) < 600  # does not look at each that lives
    assert (len(ledger), last.storage) == (701, -1)


# ---- where storages lie ----------------------------------------------------------------------------------------


def test_a_storage_whose_identity_is_used_again_for_memory_of_torchs_own_is_not_foreign() -> None:
    ledger, first = new(), Entry(1, (0, 100, True))
    ledger.add(first)
    assert ledger.has_foreign
    del first
    ledger.add(second := Entry(1, (5000, 5100, False)))
    assert ledger.across_storages(9, (0, 100, False)) == []
    assert not ledger.has_foreign
    assert ledger.in_storage(1) == [second]


def test_without_a_cheaper_way_the_extent_tells_what_is_foreign() -> None:
    ledger: Ledger[Entry] = Ledger(lambda entry: entry.extent)
    entries = [Entry(1, (0, 100, False)), Entry(2, None)]
    added(ledger, *entries)
    assert not ledger.has_foreign
    ledger.add(foreign := Entry(3, (50, 60, True)))
    assert ledger.has_foreign
    assert ledger.across_storages(1, (0, 100, False)) == [foreign]


def test_no_byte_of_an_empty_stretch_is_another_storages() -> None:
    ledger = new()
    entries = [Entry(1, (0, 100, True)), Entry(2, (50, 50, True)), Entry(3, (200, 300, False))]
    added(ledger, *entries)
    for foreign in (False, True):
        assert ledger.across_storages(9, (50, 50, foreign)) == []
        assert ledger.across_storages(1, (0, 100, foreign)) == []
        assert ledger.across_storages(9, (250, 250, foreign)) == []


@pytest.mark.parametrize("drawn", [False, True])
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("after", [False, True])
def test_a_storage_that_has_moved_is_found_where_it_lies_now(drawn: bool, before: bool, after: bool) -> None:
    ledger, entry = new(), Entry(1, (0, 100, before))
    ledger.add(entry)
    ledger.file()
    if drawn:
        assert ledger.across_storages(9, (0, 10_000, True)) == [entry]
    entry.extent = (5000, 5100, after)
    ledger.moved(1)
    assert ledger.has_foreign == after
    assert ledger.across_storages(9, (0, 100, True)) == ledger.across_storages(9, (0, 100, False)) == []
    assert ledger.across_storages(9, (5000, 5100, True)) == [entry]
    assert ledger.across_storages(9, (5000, 5100, False)) == ([entry] if after else [])


@pytest.mark.parametrize("drawn", [False, True])
def test_a_storage_without_saves_or_memory_may_move(drawn: bool) -> None:
    ledger = new()
    entries = [Entry(1, (0, 100, True)), Entry(2, (200, 300, True))]
    added(ledger, *entries)
    ledger.file()
    if drawn:
        assert ledger.across_storages(9, (0, 1000, True)) == entries
    ledger.moved(77)  # nobody has saved it
    entries[1].extent = None  # it has lost its memory
    ledger.moved(2)
    del entries[0]  # its save is gone
    ledger.moved(1)
    assert not ledger.has_foreign
    assert ledger.across_storages(9, (0, 1000, True)) == ledger.across_storages(9, (0, 1000, False)) == []
    assert ledger.in_storage(2) == entries


# ---- parts of a storage ----------------------------------------------------------------------------------------


def newest_gone(ledger: Ledger[Part], alive: list[Part]) -> None:
    del alive[-1]


def newest_gone_and_any_asked(ledger: Ledger[Part], alive: list[Part]) -> None:
    del alive[-1]
    assert ledger


def newest_gone_and_its_storage_asked(ledger: Ledger[Part], alive: list[Part]) -> None:
    del alive[-1]
    assert ledger.any_in_storage(1)


def one_gone_and_all_asked(ledger: Ledger[Part], alive: list[Part]) -> None:
    del alive[3]
    assert len(ledger.in_storage(1)) == CROWD - 1


def one_gone_and_swept(ledger: Ledger[Part], alive: list[Part]) -> None:
    del alive[3]
    others = [Entry(storage) for storage in range(100, 1_300)]
    added(ledger, *others)
    ledger.file()


def many_gone_and_thinned_out(ledger: Ledger[Part], alive: list[Part]) -> None:
    for n in range(1, 200):
        # The newest lives, so that the dead lie in the middle.
        added(ledger, one := Part((5000, 5008)), last := Part((6000 + n, 6008 + n)))
        ledger.file()
        del one
        alive[-1] = last
        assert ledger.near(1, 6000 + n, 6001 + n)[-1] is last


@pytest.mark.parametrize(
    "meanwhile",
    [
        newest_gone,
        newest_gone_and_any_asked,
        newest_gone_and_its_storage_asked,
        one_gone_and_all_asked,
        one_gone_and_swept,
        many_gone_and_thinned_out,
    ],
)
def test_a_save_made_after_others_have_gone_is_found_in_its_part(
    meanwhile: Callable[[Ledger[Part], list[Part]], None],
) -> None:
    ledger = of_parts()
    alive = [Part((8 * n, 8 * n + 8)) for n in range(CROWD)]
    added(ledger, *alive)
    assert ledger.near(1, 80, 88) == [alive[10]]  # draws the index
    meanwhile(ledger, alive)
    ledger.add(late := Part((80, 84)))
    there = next(entry for entry in alive if entry.reach == (80, 88))
    assert {id(entry) for entry in ledger.near(1, 80, 88)} == {id(there), id(late)}


def test_what_lies_in_one_stretch_or_nobody_knows_where_is_found_and_what_is_gone_is_not() -> None:
    ledger = of_parts()
    alive = [Part((8 * (n // 2), 8 * (n // 2) + 8)) for n in range(CROWD)]
    alive[50:50] = [Part(None), Part(None)]
    added(ledger, *alive)
    ledger.file()
    gone = alive.pop(7)
    same_stretch = alive[6]
    assert gone.reach == same_stretch.reach
    del gone
    found = ledger.near(1, 24, 32)
    assert {id(entry) for entry in found} == {id(alive[6]), id(alive[49]), id(alive[50])}
    found = ledger.near(1, 16, 24)
    assert {id(entry) for entry in found} == {id(alive[4]), id(alive[5]), id(alive[49]), id(alive[50])}


def test_without_anybody_to_tell_its_part_a_save_is_concerned_by_every_write() -> None:
    ledger, alive = new(), [Entry(1) for _ in range(CROWD)]
    added(ledger, *alive)
    assert ledger.near(1, 0, 1) == alive


def test_an_index_is_kept_by_questions_that_find_nothing_gone() -> None:
    """It is drawn anew at the cost of a step for each save."""
    ledger, alive = of_parts(), [Part((8 * n, 8 * n + 8)) for n in range(2_000)]
    added(ledger, *alive)
    ledger.file()
    assert ledger.is_crowded(1)
    assert not ledger.is_indexed(1)
    assert ledger.near(1, 0, 8) == alive[:1]
    assert ledger.is_indexed(1)
    assert ledger.in_storage(1) == alive
    assert cost(lambda: ledger.near(1, 0, 8)) < 2_000


def test_an_index_does_not_grow_with_the_saves_that_have_come_and_gone() -> None:
    ledger = of_parts()
    stay = [Part((64 * n, 64 * n + 64)) for n in range(CROWD)]
    added(ledger, *stay)
    most = 0
    for n in range(1_000):
        ledger.add(passing := Part((64 * (n % CROWD), 64 * (n % CROWD) + 1 + n % 7)))
        ledger.near(1, 0, 64)
        most = max(most, sum(kept_by(spans) for spans in ledger._spans.values()))
        del passing
    assert most < 2_000
    assert len(ledger.in_storage(1)) == CROWD


@pytest.mark.parametrize("seed", range(3))
def test_near_finds_exactly_what_a_search_through_a_crowd_finds(seed: int) -> None:
    chance = random.Random(seed)
    ledger, alive = of_parts(), list[Part]()

    def stretch() -> tuple[int, int]:
        low = 32 * chance.randrange(40) + chance.randrange(2)
        return low, low + chance.choice([0, 1, 31, 32, 33, 64, 65, 500])

    for _ in range(300):
        for _ in range(chance.choice([1, 1, 60])):
            alive.append(Part(chance.choice([stretch(), stretch(), stretch(), None])))
            ledger.add(alive[-1])
        for _ in range(chance.choice([0, 1, 3, 70])):
            if alive:
                del alive[chance.choice([-1, chance.randrange(len(alive))])]
        what = chance.randrange(5)
        if what == 0:
            assert ledger.any_in_storage(1) == bool(alive)
        elif what == 1:
            assert len(ledger.in_storage(1)) == len(alive)
        elif what == 2 and alive:
            alive[0].reach = stretch()
            ledger.lies_elsewhere(1)
        low, high = stretch()
        must = [entry for entry in alive if entry.reach is None or max(low, entry.reach[0]) < min(high, entry.reach[1])]
        ledger.file()
        exact = ledger.is_crowded(1)
        found = ledger.near(1, low, high)
        if exact and ledger.is_crowded(1):
            assert sorted(map(id, found)) == sorted(map(id, must))
        else:
            assert {id(entry) for entry in must} <= {id(entry) for entry in found} <= {id(entry) for entry in alive}
        del found, must  # they keep them alive


# ---- addresses ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("smallest", [0, 5, 9])
def test_the_map_of_addresses_finds_what_a_search_through_all_stretches_finds(smallest: int) -> None:
    """About the edges of buckets, with stretches that are empty, and keys that are entered again elsewhere."""
    chance = random.Random(smallest)
    edges = [0, 1, 31, 32, 33, 511, 512, 513, 1023, 1024, 1025, 1536, 2048, 2049, 4096, 8192]
    known, stretches = _AddressMap(smallest), dict[int, tuple[int, int]]()
    for _ in range(400):
        key = chance.randrange(12)
        low, high = sorted((chance.choice(edges), chance.choice(edges)))
        if chance.random() < 0.6:
            known.add(key, low, high)
            stretches[key] = (low, high)
        elif chance.random() < 0.5:
            known.discard(key)
            stretches.pop(key, None)
        for low, high in [(a, b) for a in edges for b in edges if a <= b and chance.random() < 0.2]:
            expected = {key for key, (start, end) in stretches.items() if max(low, start) < min(high, end)}
            assert known.find(low, high) == expected
    for key in range(12):
        known.discard(key)
    assert kept_by(known) == 0
