"""Does a guard count what it does, from being entered to being left, and at no cost to what it counts?"""

from __future__ import annotations

import dataclasses
import gc
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from outside import python
from torch import nn

import torchguard
from torchguard._stats import Stats


def chain() -> None:
    x = torch.linspace(0.1, 1, 8, requires_grad=True)
    for _ in range(50):
        x = (x.sigmoid() * x.exp()).cos()
    x.sum().backward()


def mlp() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 1))
    optimizer = torch.optim.Adam(net.parameters())
    for _ in range(5):
        net(torch.ones(3, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def hand_written_optimizer() -> None:
    w = torch.ones(4, requires_grad=True)
    for _ in range(5):
        (w * w).exp().sum().backward()
        w.data.add_(w.grad, alpha=-0.1)
        w.grad = None


def in_a_thread() -> None:
    thread = threading.Thread(target=chain)
    thread.start()
    thread.join()


def many() -> None:
    """More than the ledger leaves waiting."""
    x = torch.ones(2, requires_grad=True)
    for _ in range(30):
        y = x
        for _ in range(300):
            y = y.exp()


PROGRAMS = [chain, mlp, hand_written_optimizer, many]


def saves_of(program: Callable[[], None]) -> int:
    """How many tensors autograd saves, as PyTorch's own hooks see it."""
    count = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal count
        count += 1
        return tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        program()
    return count


@pytest.mark.parametrize("every_call", [False, True])
@pytest.mark.parametrize("program", PROGRAMS)
def test_saves_are_those_that_pytorch_s_hooks_see(program: Callable[[], None], every_call: bool) -> None:
    with torchguard.strict(every_call=every_call) as guard:
        program()
    assert guard.stats.saves == saves_of(program)


def test_those_of_a_thread_are_counted_too() -> None:
    with torchguard.strict() as guard:
        in_a_thread()
    assert guard.stats.saves == saves_of(chain)


@pytest.mark.usefixtures("empty_ledger")
def test_alive_are_those_whose_graph_is_there() -> None:
    with torchguard.strict() as guard:
        x = torch.ones(3, requires_grad=True)
        graphs = [x.sigmoid().exp() for _ in range(10)]  # two each
        assert guard.stats.alive == 20
        del graphs[4:]
        assert guard.stats.alive == 8
        for y in graphs:
            y.sum().backward()
        assert guard.stats.alive == 0
        del y
    assert (guard.stats.saves, guard.stats.alive) == (20, 0)


def test_writes_are_counted_where_something_is_saved() -> None:
    with torchguard.warn() as guard:
        x = torch.ones(3, requires_grad=True)
        other = torch.ones(3)
        other.add_(1)
        assert guard.stats.writes == 0
        y = x.sigmoid()
        other.add_(1)
        assert guard.stats.writes == 0
        y.data.add_(0)  # changes nothing, and is judged all the same
        assert guard.stats.writes == 1
        with pytest.warns(torchguard.SavedTensorCorruptionWarning):
            y.data.zero_()
        assert guard.stats.writes == 2
        z = x.exp() * x
        with pytest.warns(torchguard.SavedTensorCorruptionWarning):
            x.data = torch.zeros(3)
        del z
    assert guard.stats.writes == 3


def test_aliases_and_exports() -> None:
    with torchguard.strict() as guard:
        x = torch.ones(3, requires_grad=True)
        y = x.sigmoid()
        assert (guard.stats.aliases, guard.stats.exports) == (0, 0)
        alias = y.data
        assert (guard.stats.aliases, guard.stats.exports) == (1, 0)
        array = y.detach().numpy()
        assert (guard.stats.aliases, guard.stats.exports) == (1, 1)
        del alias, array


@pytest.mark.usefixtures("empty_ledger")
def test_copies_and_the_bytes_that_are_held() -> None:
    with torchguard.strict() as guard:
        x = torch.ones(1000, requires_grad=True)
        y = x.sigmoid()
        before = guard.stats
        array = y.detach().numpy()
        after = guard.stats
        assert (after.copies - before.copies, after.bytes_held) == (1, 4000)
        z = y.sum()
        del array, y
        z.backward()
        del z
        assert guard.stats.bytes_held == 0
    assert guard.stats.copies == after.copies


def test_a_call_that_is_rehearsed_makes_a_copy_and_takes_time() -> None:
    start = time.perf_counter()
    with torchguard.warn() as guard:
        x = torch.ones(1000, requires_grad=True)
        y = x.sigmoid()
        assert guard.stats.seconds == 0
        with pytest.warns(torchguard.SavedTensorCorruptionWarning):
            y.data.zero_()
        assert guard.stats.copies >= 1
    assert 0 < guard.stats.seconds < time.perf_counter() - start


def reads() -> None:
    with torchguard.strict() as guard:
        chain()
        assert guard.stats.seconds == 0
        y = torch.ones(1000, requires_grad=True).sigmoid()
        array = y.detach().numpy()
        before = guard.stats.seconds
        y.sum().backward()
        assert guard.stats.seconds > before
        del array


def test_a_read_that_compares_takes_time_and_one_that_does_not_takes_none() -> None:
    """In a process of its own: memory that another test handed out, used again here, would be copied."""
    done = python(["-c", "import test_stats; test_stats.reads()"], cwd=Path(__file__).parent)
    assert done.returncode == 0, done.stderr


# ---- from when to when -----------------------------------------------------------------------------------------


def counts(stats: Stats) -> Stats:
    """Without what is told of this moment."""
    return dataclasses.replace(stats, alive=0, bytes_held=0)


def test_counting_begins_at_entering_and_ends_at_leaving() -> None:
    guard = torchguard.strict()
    with torchguard.strict():
        chain()
    assert counts(guard.stats) == Stats()
    with guard:
        chain()
    left = counts(guard.stats)
    with torchguard.strict():
        chain()
    assert counts(guard.stats) == left
    assert left.saves == saves_of(chain)


def test_a_guard_inside_another_is_counted_by_both() -> None:
    with torchguard.strict() as outer:
        chain()
        with torchguard.strict() as inner:
            chain()
    assert outer.stats.saves == 2 * inner.stats.saves == 2 * saves_of(chain)


def test_a_decorator_sums_its_calls_and_counts_one_inside_another_once() -> None:
    guard = torchguard.strict()

    @guard
    def run(depth: int) -> None:
        chain()
        if depth:
            run(depth - 1)

    run(0)
    run(1)
    assert guard.stats.saves == 3 * saves_of(chain)


def test_an_exception_ends_the_counting() -> None:
    with pytest.raises(ValueError, match="no"), torchguard.strict() as guard:
        chain()
        raise ValueError("no")
    left = counts(guard.stats)
    with torchguard.strict():
        chain()
    assert counts(guard.stats) == left


@pytest.mark.parametrize("every_call", [False, True])
def test_asking_keeps_nothing_alive_and_changes_nothing(every_call: bool) -> None:
    def run(ask: Callable[[Any], object]) -> torch.Tensor | None:
        with torchguard.strict(every_call=every_call) as guard:
            x = torch.linspace(0, 1, 8, requires_grad=True)
            y = x.sigmoid()
            held = weakref.ref(y.untyped_storage())
            ask(guard)
            array = y.detach().numpy()
            ask(guard)
            z = y.exp()
            del y, array
            ask(guard)
            z.sum().backward()
            ask(guard)
            del z
            gc.collect()
            assert held() is None
            ask(guard)
        return x.grad

    asked, plain = run(lambda guard: guard.stats), run(lambda guard: None)
    assert asked is not None
    assert plain is not None
    assert torch.equal(asked, plain)


def test_asking_while_other_threads_save_and_write() -> None:
    stop = threading.Event()
    failures: list[BaseException] = []

    def work() -> None:
        try:
            while not stop.is_set():
                hand_written_optimizer()
        except BaseException as error:
            failures.append(error)

    with torchguard.strict() as guard:
        threads = [threading.Thread(target=work) for _ in range(2)]
        for thread in threads:
            thread.start()
        found = [0]
        while found[-1] < 500 and all(thread.is_alive() for thread in threads):
            found.append(guard.stats.saves)
        stop.set()
        for thread in threads:
            thread.join()
        assert failures == []
        assert guard.stats.saves >= max(found) >= 500


# ---- how it reads ----------------------------------------------------------------------------------------------


def test_it_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        torchguard.strict().stats.saves = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("stats", "line"),
    [
        (
            Stats(),
            "0 saves (0 alive), 0 writes judged, 0 aliases, 0 exports, 0 copies (0 B held), 0.0 s on slow paths",
        ),
        (
            Stats(1, 1, 1, 1, 1, 1, 999, 0.06),
            "1 save (1 alive), 1 write judged, 1 alias, 1 export, 1 copy (999 B held), 0.1 s on slow paths",
        ),
        (
            Stats(12345678, 4, 45678, 2, 3, 4, 1_234_567, 75.04),
            "12,345,678 saves (4 alive), 45,678 writes judged, 2 aliases, 3 exports, 4 copies (1.23 MB held), 75.0 s on slow paths",
        ),
        (
            Stats(bytes_held=999_600_000_000_000),
            "0 saves (0 alive), 0 writes judged, 0 aliases, 0 exports, 0 copies (1e+03 TB held), 0.0 s on slow paths",
        ),
        (
            Stats(bytes_held=999_999),
            "0 saves (0 alive), 0 writes judged, 0 aliases, 0 exports, 0 copies (1 MB held), 0.0 s on slow paths",
        ),
    ],
)
def test_the_line(stats: Stats, line: str) -> None:
    assert str(stats) == line
