"""Does the guard keep nothing that the program has let go of, and forget nothing that matters?"""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Callable
from typing import Any
from weakref import ref

import pytest
import torch

from torchguard import Guard, SavedTensorCorruptionError, strict
from torchguard._aliases import ALIASES
from torchguard._saves import LEDGER

STEPS = 2000


@pytest.fixture(autouse=True)
def saves_of_earlier_tests_are_forgotten() -> None:
    """A pack hook that returns an output itself makes a cycle that nobody collects, guarded or not."""
    gc.collect()
    LEDGER.file()
    for storage in list(LEDGER.groups):
        LEDGER._close(storage)
    ALIASES._sweep()


def entries() -> int:
    """How many things the guard's tables hold."""
    groups = list(LEDGER.groups.values())
    lists = list(ALIASES.by_storage.values())
    tables = (LEDGER.pending, LEDGER.foreign, groups, lists, ALIASES.young)
    return sum(map(len, tables)) + sum(map(len, groups)) + sum(map(len, lists))


def model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))


class Loops:
    """One step of each kind of program; called once a step."""

    def __init__(self) -> None:
        self.net = model()
        self.x = torch.ones(3, 4)
        self.kept: list[Any] = []
        self.aliases = [parameter.data for parameter in self.net.parameters()]
        self.state = torch.zeros(8, requires_grad=True)
        self.average = [parameter.detach().clone() for parameter in self.net.parameters()]

    def backward(self) -> None:
        self.net(self.x).sum().backward()

    def dropped_graphs(self) -> None:
        self.net(self.x)

    def hand_written_optimiser(self) -> None:
        self.net(self.x).sum().backward()
        for parameter, average in zip(self.net.parameters(), self.average, strict=True):
            assert parameter.grad is not None
            parameter.data.sub_(1e-6 * parameter.grad)
            parameter.grad = None
            average.data.lerp_(parameter.data, 0.01)

    def aliases_during_the_graph(self) -> None:
        y = self.net(self.x).sigmoid()
        _ = y.data.sum(), y.data.mean()
        for parameter in self.net.parameters():
            _ = parameter.data.norm()
        y.sum().backward()

    def long_lived_aliases(self) -> None:
        """The aliases were made once; after each backward they are written through."""
        self.net(self.x).sum().backward()
        for alias in self.aliases:
            alias.mul_(1.0)

    def rebinding(self) -> None:
        self.net(self.x).sum().backward()
        for parameter in self.net.parameters():
            parameter.data = parameter.data.clone()

    def new_memory_each_step(self) -> None:
        self.state = (torch.zeros(8) + self.state.detach()).requires_grad_()
        y = self.state.exp()
        _ = y.data
        y.sum().backward()

    def a_graph_that_is_kept_for_a_while(self) -> None:
        self.kept.append(self.net(self.x).sigmoid())
        _ = self.kept[-1].data.sum()
        del self.kept[:-10]

    def double_backward(self) -> None:
        x = torch.ones(3, requires_grad=True)
        (gradient,) = torch.autograd.grad(x.exp().sum(), x, create_graph=True)
        gradient.sum().backward()

    def from_numpy(self) -> None:
        pytest.importorskip("numpy")
        x = torch.from_numpy(torch.ones(3).numpy()).requires_grad_()
        y = x.exp() * x
        _ = y.data
        y.sum().backward()


NAMES = [name for name, value in vars(Loops).items() if callable(value) and not name.startswith("_")]


@pytest.mark.parametrize("name", NAMES)
def test_tables_and_memory_stay_bounded(name: str) -> None:
    step: Callable[[], None] = getattr(Loops(), name)
    gc.collect()
    before = entries()
    sizes = []
    with strict() as guard:
        for _ in range(STEPS // 4):
            step()
        gc.collect()
        tracemalloc.start()
        try:
            first = tracemalloc.get_traced_memory()[0]
            for n in range(STEPS * 3 // 4):
                step()
                if n % 50 == 0:
                    sizes.append(entries() - before)
            gc.collect()
            grown = tracemalloc.get_traced_memory()[0] - first
        finally:
            tracemalloc.stop()
    assert guard.violations == []
    assert max(sizes) < 12_000
    # Tables grow to a few thousand entries between sweeps; a leak of every save would come to more.
    assert grown < 2_500_000, f"{grown / (STEPS * 3 // 4):.0f} bytes a step"


@pytest.mark.parametrize("name", ["backward", "aliases_during_the_graph", "new_memory_each_step", "rebinding"])
def test_nothing_is_left_when_the_program_asks_again(name: str) -> None:
    """All saves are gone: the next write finds them dead and drops them."""
    loops = Loops()
    with strict():
        for _ in range(200):
            getattr(loops, name)()
        del loops
        gc.collect()
        assert len(LEDGER) == 0
        assert not LEDGER


def test_an_alias_that_is_kept_for_the_whole_run_has_one_record() -> None:
    weight = torch.ones(4, requires_grad=True)
    with strict():
        alias = weight.data
        storage = alias.untyped_storage()._cdata
        for _ in range(STEPS):
            (weight * weight).sum().backward()
            alias.mul_(1.0)
        assert storage
        records = [records for records in ALIASES.by_storage.values() if any(r() is alias for r in records)]
        assert sum(map(len, records)) <= 1


def test_temporaries_over_a_save_that_lives_on_are_bounded() -> None:
    """A weight whose graph is kept (two losses, one backward much later) and 5,000 looks at its ``.data``."""
    with strict() as guard:
        x = torch.ones(4, requires_grad=True)
        y = x.exp()
        before = entries()
        most = 0
        for n in range(5_000):
            y.data.sum()
            if n % 100 == 0:
                most = max(most, entries() - before)
        assert most < 500
        y.sum().backward()
    assert guard.violations == []


def test_aliases_that_the_program_keeps_are_forgotten_with_them() -> None:
    with strict():
        x = torch.ones(4, requires_grad=True)
        before = entries()
        kept = [x.data for _ in range(3_000)]
        assert len(kept) == 3_000
        del kept
        gc.collect()
        (x * x).sum().backward()
        x.data.mul_(1.0)
        gc.collect()
        assert entries() - before < 300


# ---- nothing is kept alive ---------------------------------------------------------------------------------


def test_the_guard_keeps_no_tensor_alive() -> None:
    with strict():
        x = torch.ones(4, requires_grad=True)
        y = x.exp()
        alias = y.data
        held = [ref(tensor) for tensor in (x, y, alias)]
        storage = ref(y.untyped_storage())
        y.sum().backward()
        gc.disable()
        try:
            del x, y, alias
            assert [tensor() for tensor in held] == [None, None, None]
        finally:
            gc.enable()
        assert storage() is None


def test_a_dropped_graph_frees_its_saves_at_once() -> None:
    with strict():
        x = torch.ones(4, requires_grad=True)
        y = (x.exp() * x).sigmoid()
        assert len(LEDGER) >= 3
        gc.disable()
        try:
            del y
            assert len(LEDGER) == 0
        finally:
            gc.enable()


def test_backward_frees_the_saves_at_once() -> None:
    with strict():
        x = torch.ones(4, requires_grad=True)
        y = x.exp().sum()
        assert len(LEDGER) == 1
        y.backward()
        assert len(LEDGER) == 0


def test_an_error_that_is_kept_keeps_no_save_alive() -> None:
    errors: list[SavedTensorCorruptionError] = []

    def program() -> Any:
        y = torch.ones(4, requires_grad=True).exp()
        held = ref(y)
        try:
            y.data.zero_()
        except SavedTensorCorruptionError as error:
            errors.append(error.with_traceback(None))
        return held

    with strict():
        held = program()
        gc.collect()
        assert held() is None
        assert len(LEDGER) == 0
    assert errors


def test_violations_that_are_kept_keep_no_tensor_alive() -> None:
    with Guard("record") as guard:
        y = torch.ones(4, requires_grad=True).exp()
        y.data.zero_()
        held = ref(y)
        del y
        gc.collect()
        assert held() is None
    assert len(guard.violations) == 1


def tensors() -> int:
    """How many tensors are alive."""
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def test_the_proof_that_is_kept_goes_with_its_save() -> None:
    with strict():
        x = torch.ones(1000, requires_grad=True)
        gc.collect()
        tracked = tensors()
        for _ in range(50):
            y = x.exp()
            y.data
            y.sum().backward()
        del y
        gc.collect()
        assert tensors() - tracked < 45  # of 50; dead aliases are swept when their number may have doubled


# ---- and nothing that matters is forgotten -----------------------------------------------------------------


def unseen_write(y: torch.Tensor) -> None:
    torch.zeros(y.shape, out=y.data)


def test_an_unseen_write_is_caught_though_a_thousand_other_storages_were_swept() -> None:
    """The alias that wrote is dead; the tables overflow and are cleaned before backward reads."""
    with strict():
        y = torch.ones(3, requires_grad=True).exp()
        unseen_write(y)
        others = [torch.ones(3, requires_grad=True).exp() for _ in range(3_000)]
        aliases = [other.data for other in others]
        assert len(aliases) == 3_000
        with pytest.raises(SavedTensorCorruptionError):
            y.sum().backward()


@pytest.mark.parametrize("looks", [10, 63, 64, 65, 130, 1_000])
def test_an_unseen_write_is_caught_though_many_aliases_came_and_went_since(looks: int) -> None:
    with strict():
        y = torch.ones(3, requires_grad=True).exp()
        unseen_write(y)
        for _ in range(looks):
            y.data.sum()
        with pytest.raises(SavedTensorCorruptionError):
            y.sum().backward()


@pytest.mark.parametrize("others", [10, 2_000])
def test_an_alias_from_before_the_save_is_not_lost_among_others(others: int) -> None:
    with strict():
        x = torch.ones(3, requires_grad=True)
        alias = x.data
        rest = [torch.ones(2).data for _ in range(others)]
        y = x * x
        torch.zeros(3, out=alias)
        assert len(rest) == others
        with pytest.raises(SavedTensorCorruptionError):
            y.sum().backward()


def test_a_write_that_is_seen_is_caught_among_ten_thousand_saves() -> None:
    with strict():
        ys = [torch.ones(2, requires_grad=True).exp() for _ in range(10_000)]
        with pytest.raises(SavedTensorCorruptionError):
            ys[5_000].data.zero_()
        ys[9_999].sum().backward()
        del ys[:5_000]
        with pytest.raises(SavedTensorCorruptionError):
            ys[10].data.zero_()
