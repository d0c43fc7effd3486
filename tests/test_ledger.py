"""Does the ledger know exactly the saves that are alive, at the same cost however many there are?"""

from __future__ import annotations

import os
import random
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from weakref import ref

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchguard import _ledger
from torchguard._ledger import Ledger


class Entry:
    """All that the ledger knows of a save."""

    def __init__(self, storage: int, extent: tuple[int, int, bool] | None = None) -> None:
        self.storage = storage
        self.extent = extent


def new() -> Ledger[Entry]:
    return Ledger(lambda entry: entry.extent, lambda entry: entry.extent is not None and entry.extent[2])


def kept_by(thing: Any) -> int:
    """How many things the ledger holds on to, of whatever kind: all that its tables and their tables have."""
    count = 0
    if isinstance(thing, Ledger) or type(thing).__module__ == _ledger.__name__:
        count += sum(kept_by(value) for value in vars(thing).values())
    if isinstance(thing, dict):
        count += len(thing) + sum(kept_by(value) for value in thing.values())
    elif isinstance(thing, (list, deque, set)):
        count += len(thing) + sum(kept_by(value) for value in thing)
    return count


def test_in_storage_gives_the_live_entries_of_that_storage_in_order() -> None:
    ledger = new()
    a, b, c = Entry(1), Entry(2), Entry(1)
    for entry in (a, b, c):
        ledger.add(entry)
    assert ledger.in_storage(1) == [a, c]
    assert ledger.in_storage(2) == [b]
    assert ledger.in_storage(3) == []
    assert len(ledger) == 3


def test_an_entry_vanishes_with_its_save() -> None:
    ledger = new()
    a, b = Entry(1), Entry(1)
    ledger.add(a)
    ledger.add(b)
    assert len(ledger) == 2
    del a
    assert ledger.in_storage(1) == [b]
    del b
    assert ledger.in_storage(1) == []
    assert len(ledger) == 0


def test_an_entry_that_died_before_it_was_filed_is_never_filed() -> None:
    ledger = new()
    ledger.add(Entry(1))
    assert ledger.in_storage(1) == []
    assert not ledger
    assert kept_by(ledger) == 0


def test_it_is_true_while_a_save_may_be_alive_and_false_once_none_is() -> None:
    ledger = new()
    assert not ledger
    entry = Entry(1)
    ledger.add(entry)
    assert ledger
    assert ledger.in_storage(1)
    assert ledger
    del entry
    assert ledger.in_storage(1) == []
    assert not ledger


def test_the_ledger_keeps_no_entry_alive() -> None:
    from weakref import ref

    ledger = new()
    entry = Entry(1, (0, 8, True))
    held = ref(entry)
    ledger.add(entry)
    ledger.across_storages(2, (0, 8, True))
    del entry
    assert held() is None


@pytest.mark.parametrize("asked", ["in_storage", "across foreign", "across own", "never"])
@pytest.mark.parametrize("foreign", [False, True])
def test_a_hundred_thousand_steps_leave_a_bounded_ledger(asked: str, foreign: bool) -> None:
    ledger = new()
    ledger.across_storages(-1, (0, 1, True))  # the map has been drawn once, early in the run
    for step in range(100_000):
        ledger.add(Entry(step, (8 * step, 8 * step + 8, foreign)))
        if step % 100 == 0:
            if asked == "in_storage":
                ledger.in_storage(-1)
            elif asked != "never":
                ledger.across_storages(-1, (0, 8, asked == "across foreign"))
        elif len(ledger.pending) > 4096:
            ledger.file()  # as the pack hook does
    ledger.file()
    assert kept_by(ledger) < 10_000


def test_saves_that_live_on_for_a_while_leave_a_bounded_ledger() -> None:
    """Fifty saves are alive at any time; each is filed while it lives, and most are never asked for again."""
    ledger = new()
    ledger.across_storages(-1, (0, 1, True))
    alive: list[Entry] = []
    for step in range(50_000):
        alive.append(Entry(step, (8 * step, 8 * step + 8, step % 7 == 0)))
        ledger.add(alive[-1])
        del alive[:-50]
        if step % 10 == 0:
            assert len(ledger.in_storage(step)) == 1
    ledger.file()
    assert kept_by(ledger) < 20_000
    assert len(ledger) == 50


def test_one_storage_saved_again_and_again_stays_bounded() -> None:
    """A weight that lives for the whole run is saved once a step."""
    ledger = new()
    for _ in range(100_000):
        entry = Entry(7)
        ledger.add(entry)
        if len(ledger.pending) > 100:
            ledger.file()
    assert kept_by(ledger) < 2_000
    assert ledger.in_storage(7) == [entry]


# ---- other storages over the same memory -------------------------------------------------------------------


def overlapping(entries: list[Entry], storage: int, extent: tuple[int, int, bool]) -> list[Entry]:
    """What ``across_storages`` must find: torch's own storages never overlap, so one side is foreign."""
    low, high, foreign = extent
    return [
        entry
        for entry in entries
        if entry.storage != storage
        and entry.extent is not None
        and (foreign or entry.extent[2])
        and max(low, entry.extent[0]) < min(high, entry.extent[1])
    ]


def same(found: list[Entry], expected: list[Entry]) -> bool:
    return sorted(map(id, found)) == sorted(map(id, expected))


def test_a_foreign_storage_over_the_same_memory_is_found_from_both_sides() -> None:
    ledger = new()
    own, foreign = Entry(1, (1000, 2000, False)), Entry(2, (1500, 1600, True))
    ledger.add(own)
    assert not ledger.has_foreign
    assert ledger.across_storages(2, (1500, 1600, True)) == [own]
    ledger.add(foreign)
    assert ledger.has_foreign
    assert ledger.across_storages(1, (1000, 2000, False)) == [foreign]
    assert ledger.across_storages(2, (1500, 1600, True)) == [own]
    assert ledger.across_storages(1, (1000, 1500, False)) == []
    assert ledger.across_storages(1, (1600, 2000, False)) == []
    del foreign
    assert ledger.in_storage(2) == []
    assert not ledger.has_foreign


actions = st.lists(
    st.tuples(
        st.sampled_from(["save", "save", "save", "drop", "ask", "ask", "file"]),
        st.integers(0, 2),  # which storage
        st.integers(0, 8),  # where it lies
        st.integers(0, 400),  # how long it is
        st.booleans(),  # foreign?
    ),
    max_size=20,
)


@settings(max_examples=300, deadline=None)
@given(actions)
def test_across_storages_finds_what_a_search_through_all_entries_finds(steps: list[Any]) -> None:
    """Identities of storages are used again once their saves are gone, for memory that lies elsewhere."""
    ledger = new()
    alive: list[Entry] = []
    for action, storage, place, length, foreign in steps:
        extent = (100 * place, 100 * place + length, foreign)
        if action == "save":
            there = next((entry.extent for entry in alive if entry.storage == storage), extent)
            alive.append(Entry(storage, there))
            ledger.add(alive[-1])
        elif action == "drop":
            alive[:] = [entry for entry in alive if entry.storage != storage]
        elif action == "file":
            ledger.file()
        else:
            assert same(ledger.across_storages(storage, extent), overlapping(alive, storage, extent))
            assert same(ledger.in_storage(storage), [entry for entry in alive if entry.storage == storage])
            assert ledger.has_foreign or not any(entry.extent and entry.extent[2] for entry in alive)
    assert len(ledger) == len(alive)


def test_a_storage_whose_identity_is_used_again_is_found_where_it_lies_now() -> None:
    ledger = new()
    first = Entry(1, (0, 100, False))
    ledger.add(first)
    assert ledger.across_storages(9, (0, 100, True)) == [first]
    del first
    second = Entry(1, (5000, 5100, False))
    ledger.add(second)
    assert ledger.across_storages(9, (5050, 5060, True)) == [second]
    assert ledger.across_storages(9, (0, 100, True)) == []


def test_a_storage_whose_identity_is_used_again_for_foreign_memory_is_foreign() -> None:
    ledger = new()
    first = Entry(1, (0, 100, False))
    ledger.add(first)
    ledger.file()
    del first
    second = Entry(1, (5000, 5100, True))
    ledger.add(second)
    assert ledger.has_foreign
    assert ledger.across_storages(9, (5050, 5060, False)) == [second]


def test_entries_without_memory_are_found_by_storage_only() -> None:
    ledger = new()
    entry = Entry(3, None)
    ledger.add(entry)
    assert ledger.in_storage(3) == [entry]
    assert ledger.across_storages(1, (0, 2**48, True)) == []


# ---- cost --------------------------------------------------------------------------------------------------


@contextmanager
def counted() -> Iterator[list[int]]:
    """Counts the bytecode instructions that run inside the ledger's module: steps, not seconds."""
    steps = [0]

    def trace(frame: Any, event: str, _: Any) -> Any:
        if frame.f_code.co_filename != _ledger.__file__:
            return None
        frame.f_trace_opcodes = True
        frame.f_trace_lines = False
        if event == "opcode":
            steps[0] += 1
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        yield steps
    finally:
        sys.settrace(before)


def cost(question: Callable[[], Any]) -> int:
    with counted() as steps:
        question()
    return steps[0]


def filled(saves: int, foreign_every: int) -> tuple[Ledger[Entry], list[Entry]]:
    ledger = new()
    alive = [Entry(n, (1024 * n, 1024 * n + 1000, n % foreign_every == 0)) for n in range(saves)]
    for entry in alive:
        ledger.add(entry)
    ledger.across_storages(-1, (0, 1, True))
    return ledger, alive


@pytest.mark.parametrize("question", ["in_storage", "add", "across foreign", "has_foreign"])
def test_a_question_takes_the_same_steps_whatever_number_of_saves_is_alive(question: str) -> None:
    steps = []
    for saves in (100, 20_000):
        ledger, alive = filled(saves, foreign_every=10**9)
        middle = saves // 2
        one_more = Entry(-2, (0, 8, False))
        asked = {
            "in_storage": lambda ledger=ledger, middle=middle: ledger.in_storage(middle),
            "add": lambda ledger=ledger, entry=one_more: (ledger.add(entry), ledger.in_storage(-2)),
            "across foreign": lambda ledger=ledger, middle=middle: ledger.across_storages(
                -1, (1024 * middle, 1024 * middle + 5000, True)
            ),
            "has_foreign": lambda ledger=ledger: ledger.has_foreign,
        }[question]
        steps.append(cost(asked))
        assert len(alive) == saves
    few, many = steps
    assert 0 < many <= few + 100


def test_asking_for_one_live_save_takes_the_same_steps_however_many_have_died() -> None:
    ledger = new()
    kept = Entry(0, (0, 8, False))
    ledger.add(kept)
    few = cost(lambda: ledger.in_storage(0))
    for n in range(20_000):
        ledger.add(Entry(n % 50, (8 * n, 8 * n + 8, False)))
    ledger.file()
    assert cost(lambda: ledger.in_storage(0)) <= few + 100


@pytest.mark.parametrize("storages", [1, 20_000])
def test_whether_any_save_is_alive_takes_few_steps_though_many_have_died(storages: int) -> None:
    """Asked before every write: twenty thousand saves died since they were filed, the last one lives."""
    ledger = new()
    alive = [Entry(n % storages, (8 * n, 8 * n + 8, False)) for n in range(20_000)]
    for entry in alive:
        ledger.add(entry)
    assert ledger
    del alive[:-1], entry
    assert ledger  # may clear up
    assert cost(lambda: bool(ledger)) < 300
    assert len(alive) == 1


def test_filing_takes_a_flat_number_of_steps_a_save() -> None:
    def each(saves: int) -> float:
        ledger = new()
        alive = [Entry(n % (saves // 4), (0, 8, False)) for n in range(saves)]
        for entry in alive:
            ledger.add(entry)
        return cost(ledger.file) / saves

    assert each(8_000) <= 1.5 * each(1_000) + 5


def test_a_great_storage_does_not_make_small_questions_dear() -> None:
    """One foreign file of a terabyte over twenty thousand small saves."""
    ledger, alive = filled(20_000, foreign_every=10**9)
    whole = Entry(-5, (0, 2**40, True))
    ledger.add(whole)
    found: list[Entry] = []
    steps = cost(lambda: found.extend(ledger.across_storages(-1, (1024 * 300, 1024 * 300 + 8, True))))
    assert same(found, [alive[300], whole])
    assert steps < 3_000


# ---- threads and forks -------------------------------------------------------------------------------------


def test_four_threads_use_one_ledger() -> None:
    ledger = new()
    wrong: list[object] = []

    def work(seed: int) -> None:
        chance = random.Random(seed)
        mine: list[Entry] = []
        try:
            for step in range(3_000):
                storage = 1_000_000 * seed + chance.randrange(20)
                mine.append(Entry(storage, (8 * storage, 8 * storage + 8, chance.random() < 0.3)))
                ledger.add(mine[-1])
                if len(mine) > 30:
                    del mine[chance.randrange(30)]
                if step % 5 == 0:
                    found = ledger.in_storage(storage)
                    # Other threads' answers may keep an entry alive that this one has let go of.
                    missing = [e for e in mine if e.storage == storage and not any(e is f for f in found)]
                    if missing or any(entry.storage != storage for entry in found):
                        wrong.append((seed, step))
                    del found, missing
                    ledger.across_storages(storage, (0, 2**40, step % 2 == 0))
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(1, 5)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []
    assert len(ledger) == 0


def test_a_storage_that_another_thread_fills_anew_is_not_closed() -> None:
    """Its saves were dead when they were looked at; before the lock is taken a new one is filed."""
    ledger = new()
    first = Entry(1)
    ledger.add(first)
    ledger.file()
    del first
    second = Entry(1)
    lock = ledger._lock

    class Interrupted:
        def __enter__(self) -> None:
            ledger._lock = lock
            ledger.add(second)
            other = threading.Thread(target=ledger.file)
            other.start()
            other.join()
            lock.acquire()

        def __exit__(self, *_: object) -> None:
            lock.release()

    ledger._lock = Interrupted()  # type: ignore[assignment]
    ledger.in_storage(1)
    assert ledger.in_storage(1) == [second]


def test_a_save_that_another_thread_is_filing_is_found() -> None:
    """Between the queue and the index it must not be in neither: a write would be let through."""
    filing, on = threading.Event(), threading.Event()

    class Slow:
        extent = (0, 8, False)

        @property
        def storage(self) -> int:
            if threading.current_thread() is filer:
                filing.set()
                on.wait(20)
            return 7

    ledger = new()
    entry = Slow()
    ledger.add(entry)  # type: ignore[arg-type]
    filer = threading.Thread(target=ledger.file)
    filer.start()
    filing.wait(20)
    timer = threading.Timer(0.2, on.set)
    timer.start()
    try:
        assert ledger.in_storage(7) == [entry]
    finally:
        on.set()
        filer.join()
        timer.join()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_child_forked_while_another_thread_holds_the_lock_goes_on() -> None:
    import signal

    ledger = new()
    entry = Entry(1, (0, 8, False))
    ledger.add(entry)
    held, done = threading.Event(), threading.Event()

    def hold() -> None:
        with ledger._lock:
            held.set()
            done.wait(0.3)  # whether the fork waits for it or not

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(20)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(10)  # a deadlock ends the child by a signal
        good = ledger.in_storage(1) == [entry] and ledger.across_storages(2, (0, 8, True)) == [entry]
        os._exit(0 if good else 1)
    _, status = os.waitpid(child, 0)
    done.set()
    thread.join()
    assert os.waitstatus_to_exitcode(status) == 0


# ---- parts of a storage --------------------------------------------------------------------------------------


class Part(Entry):
    """An entry that occupies a part of its storage, or (None) whichever."""

    def __init__(self, reach: tuple[int, int] | None) -> None:
        super().__init__(1)
        self.reach = reach


def of_parts() -> Ledger[Part]:
    return Ledger(lambda entry: None, reach_of=lambda entry: entry.reach)


stretches = st.tuples(st.integers(0, 4000), st.integers(0, 600)).map(lambda pair: (pair[0], pair[0] + pair[1]))


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("save"), st.none() | stretches),
            st.tuples(st.just("many"), stretches),
            st.tuples(st.just("die"), st.integers(0, 10**6)),
            st.tuples(st.just("newest dies"), st.none()),
            st.tuples(st.just("write"), stretches),
            st.tuples(st.just("any"), st.none()),
            st.tuples(st.just("elsewhere"), stretches),
        ),
        max_size=60,
    )
)
@settings(max_examples=150, deadline=None)
def test_near_finds_what_a_search_through_all_entries_finds(steps: list[Any]) -> None:
    ledger, alive = of_parts(), list[Part]()
    for what, value in steps:
        if what == "save":
            alive.append(Part(value))
            ledger.add(alive[-1])
        elif what == "many":
            for n in range(50):
                alive.append(Part((value[0] + 13 * n, value[1] + 13 * n)))
                ledger.add(alive[-1])
        elif what == "die" and alive:
            del alive[value % len(alive)]
        elif what == "newest dies" and alive:
            alive.pop()
        elif what == "elsewhere" and alive:
            alive[0].reach = value
            ledger.lies_elsewhere(1)
        elif what == "any":
            assert ledger.any_in_storage(1) == bool(alive)
        elif what == "write":
            low, high = value
            found = ledger.near(1, low, high)
            assert len(set(map(id, found))) == len(found)
            must = {
                id(entry)
                for entry in alive
                if entry.reach is None or max(low, entry.reach[0]) < min(high, entry.reach[1])
            }
            assert must <= {id(entry) for entry in found} <= {id(entry) for entry in alive}
            if len(alive) > 200:
                assert {id(entry) for entry in found} == must
            del found  # it keeps them alive


def test_a_write_to_a_part_of_a_storage_takes_the_same_steps_however_many_saves_lie_in_it() -> None:
    steps = []
    for saves in (100, 20_000):
        ledger = of_parts()
        alive = [Part((64 * n, 64 * n + 64)) for n in range(saves)]
        for entry in alive:
            ledger.add(entry)
        ledger.near(1, 0, 64)  # draws the index

        def save_and_write(ledger: Ledger[Part] = ledger, saves: int = saves) -> None:
            newest = Part((32 * saves, 32 * saves + 8))
            ledger.add(newest)
            assert newest in ledger.near(1, 32 * saves, 32 * saves + 64)
            del newest
            assert len(ledger.near(1, 32 * saves, 32 * saves + 64)) == 1

        steps.append(cost(save_and_write))
        assert len(alive) == saves
    few, many = steps
    assert 0 < many <= few + 200


def test_saves_that_come_and_go_over_many_that_stay_leave_a_bounded_index() -> None:
    ledger = of_parts()
    stay = [Part((64 * n, 64 * n + 64)) for n in range(200)]
    for entry in stay:
        ledger.add(entry)
    most = 0
    for n in range(5_000):
        ledger.add(passing := Part((64 * (n % 200), 64 * (n % 200) + n % 7)))
        ledger.near(1, 0, 64)
        most = max(most, kept_by(ledger))
        del passing
    assert most < 3_000
    assert len(ledger.in_storage(1)) == len(stay)


# ---- a signal's handler, or a finaliser, saves and files in the middle of filing -----------------------------------


class Interrupting:
    """An entry that has code run while it is filed."""

    def __init__(self, storage: int, run: Callable[[], object]) -> None:
        self._storage = storage
        self._run = run

    @property
    def storage(self) -> int:
        run, self._run = self._run, int
        run()
        return self._storage


@pytest.mark.parametrize("number", [1, 3, 40])
def test_filing_in_the_middle_of_filing_loses_nothing(number: int) -> None:
    ledger: Ledger[Any] = Ledger(lambda entry: None)
    late = [Interrupting(storage, int) for storage in (1, 2, 7)]

    def interrupt() -> None:
        for entry in late:
            ledger.add(entry)
        assert ledger.any_in_storage(7)
        assert ledger.filing  # the one below is not done: other threads are to wait for it

    entries = [Interrupting(storage, int) for storage in range(number)]
    entries[0]._run = interrupt
    for entry in entries:
        ledger.add(entry)
    ledger.file()
    assert not ledger.filing
    assert len(ledger) == number + len(late)
    assert {id(entry) for entry in ledger.all_alive()} == {id(entry) for entry in [*entries, *late]}


def test_what_is_not_filed_when_it_is_interrupted_is_filed_later() -> None:
    ledger: Ledger[Any] = Ledger(lambda entry: None)

    def interrupt() -> None:
        raise KeyboardInterrupt

    entries = [Interrupting(storage, interrupt if storage == 3 else int) for storage in range(10)]
    for entry in entries:
        ledger.add(entry)
    with pytest.raises(KeyboardInterrupt):
        ledger.file()
    assert not ledger.filing
    assert all(ledger.any_in_storage(storage) for storage in range(10))


# ---- what other threads hold: see Note [Held by a look] -------------------------------------------------------------


class Beside:
    """A thread in the middle of ``function``, which is given something to wait in, until the end of the block."""

    def __init__(self, function: Callable[[Callable[[], None]], None]) -> None:
        self._inside, self._go_on = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=function, args=(self._wait,))

    def _wait(self) -> None:
        self._inside.set()
        self._go_on.wait(20)

    def finish(self) -> None:
        self._go_on.set()
        self._thread.join(20)

    def __enter__(self) -> Beside:
        self._thread.start()
        assert self._inside.wait(20)
        return self

    def __exit__(self, *_: object) -> None:
        self.finish()
        assert not self._thread.is_alive()


@Ledger.holds_saves
def holding(wait: Callable[[], None]) -> None:
    through(wait)


def through(wait: Callable[[], None]) -> None:
    wait()


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long this thread has slept, each time; others wait in earnest."""
    times: list[float] = []
    here = threading.get_ident()

    def sleep(seconds: float) -> None:
        if threading.get_ident() == here:
            times.append(seconds)
        threading.Event().wait(seconds)

    monkeypatch.setattr(_ledger, "time", SimpleNamespace(monotonic=time.monotonic, sleep=sleep))
    return times


def test_who_waits_for_others_goes_on_when_they_have_let_go(slept: list[float]) -> None:
    with Beside(holding) as other:
        timer = threading.Timer(0.05, other.finish)
        timer.start()
        new().outlast_looks()
        assert not other._thread.is_alive()
        timer.join()
    assert slept
    assert max(slept) < 0.01  # seconds


def test_who_waits_for_others_does_not_wait_for_good(slept: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_ledger, "_PATIENCE", 0.02)
    with Beside(holding):
        began = time.monotonic()
        new().outlast_looks()
        assert time.monotonic() - began < 10
    assert slept


def test_nobody_waits_for_who_holds_nothing(slept: list[float]) -> None:
    with Beside(through):
        new().outlast_looks()
    assert slept == []


def test_who_holds_saves_itself_does_not_wait_for_that(slept: list[float]) -> None:
    with Beside(through):
        holding(lambda: new().outlast_looks())
    assert slept == []


def test_two_that_wait_do_not_wait_for_each_other(slept: list[float]) -> None:
    with Beside(holding) as third:
        ledger = new()
        waits = threading.Thread(target=Ledger.holds_saves(lambda: ledger.outlast_looks()))
        waits.start()
        third.finish()
        ledger.outlast_looks()
        waits.join(20)
        assert not waits.is_alive()


def test_a_function_of_the_ledger_that_another_thread_is_in_is_waited_for(slept: list[float]) -> None:
    def reach(entry: Any) -> None:
        wait_in_it[0]()

    wait_in_it: list[Callable[[], None]] = []
    ledger: Ledger[Any] = Ledger(lambda entry: None, lambda entry: False, reach)
    entry = Entry(1)
    ledger.add(entry)

    def work(wait: Callable[[], None]) -> None:
        wait_in_it.append(wait)
        ledger._stretch_of(ref(entry))

    with Beside(work) as other:
        timer = threading.Timer(0.05, other.finish)
        timer.start()
        ledger.outlast_looks()
        timer.join()
    assert slept
