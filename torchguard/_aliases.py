"""Which handles on watched memory have a version counter of their own, and has one of these moved unseen?

Note [Watching a counter without its memory]. ``counter = alias.detach(); counter.data = torch.empty(0)``
shares the alias's version counter and none of its storage, and outlives the alias. It is made only when a
save could need it: at once where a live save lies in the alias's storage, otherwise when such a save is made
and the alias still lives. The ``p.data.add_(...)`` of an optimiser's step, a temporary over memory that
nothing has saved, never has one.

A write that the guard saw and judged moves the expectation, so that only unseen writes stand out.

Note [Many aliases of one storage]. Parameters cut from one flat buffer are hundreds of aliases of one storage. A save,
a read and a write look at those only that share a byte with them, by an index that is drawn where there are many.
Aliases of other parts may share the counter that a judged write moves: what it moved is noted, and asked when they are.
"""

from __future__ import annotations

from dataclasses import replace
from types import CodeType
from typing import Any

import torch

from torchguard import _memory, _torch
from torchguard._counts import COUNTS
from torchguard._ledger import SpansByStorage
from torchguard._model import Span
from torchguard._overlap import overlaps
from torchguard._places import Instruction
from torchguard._saves import LEDGER, Save
from torchguard._torch import ref

_SLACK = 8
#: Up to so many young aliases are not swept.
FEW_YOUNG = 1024
#: Up to so many aliases of one storage are looked at one by one.
_FEW = 16
#: Counters that judged writes have moved, of one storage with many aliases.
_JUDGED_KEPT = 16
#: Dead aliases of one storage whose counter is still watched: a ``detach()`` of a dead alias could still
#: write.
_DEAD_KEPT = 64


class AliasRecord(ref[torch.Tensor]):
    """A weak hold on one alias, and what must be known of it.

    Attributes:
        instruction: where the alias was taken.
        own: whether its counter was made with it, so that only views of it share the counter.
        counter: a tensor that shares the alias's version counter and no memory, or None.
        expected: version of the alias after the last write that was judged.
        span: the alias's memory, once ``counter`` is there.
        start: where its storage began then: a storage can be moved.
    """

    __slots__ = ("counter", "expected", "instruction", "own", "span", "start")

    def __new__(cls, alias: torch.Tensor, instruction: Instruction, version: int) -> AliasRecord:
        self: AliasRecord = ref.__new__(cls, alias)
        self.instruction = instruction
        self.expected = version
        self.own = False
        self.counter = None
        self.span = None
        self.start = 0
        return self

    # ref defines __init__ with its own arguments
    def __init__(self, *_: Any) -> None: ...

    instruction: Instruction
    own: bool
    expected: int
    counter: torch.Tensor | None
    span: Span | None
    start: int

    def arm(self, alias: torch.Tensor) -> None:
        """Watch the alias's counter from now on, beyond its death."""
        span = _memory.span_of(alias)
        if span is None or _memory.version_of(alias) < 0:
            return  # no memory, or no counter
        self.span = span
        self.start = _torch.storage_address(_torch.behind(alias))
        if _torch.is_wrapper(alias):
            return  # what it writes moves the counter of the tensor behind it, too, and that one is watched
        counter = _memory.counter_of(alias)
        if (
            _memory.version_of(counter) >= 0
        ):  # a tensor that was pointed at what inference mode made shares its own with none
            self.counter = counter

    @property
    def stretch(self) -> tuple[int, int] | None:
        """First and one past the last byte of the alias, counted from the beginning of its storage; None if unknown."""
        if self.span is not None:
            low, high = self.span.bounds
            return low - self.start, high - self.start
        alias = self()
        return (0, 0) if alias is None else _memory.stretch_in_storage(alias)

    @property
    def is_quiet(self) -> bool:
        """Whether a quick look tells that the counter is watched and has not moved; asked where no mode is on."""
        counter = self.counter
        return type(counter) is torch.Tensor and counter._version == self.expected

    @property
    def version(self) -> int:
        """The counter's present value; the expected one where the alias is gone unwatched."""
        if self.counter is not None:
            return _memory.version_of(self.counter)
        alias = self()
        version = -1 if alias is None else _memory.version_of(alias)
        return self.expected if version < 0 else version

    def shares(self, tensor: torch.Tensor) -> bool:
        """Whether the alias shares its version counter with ``tensor``; False where the alias is gone unwatched."""
        alias = self() if self.counter is None else self.counter
        return alias is not None and _memory.shares_counter(alias, tensor)


class LentAlias(AliasRecord):
    """An alias to which ``watch()`` has given the counter of its source: plain ``.data`` would have its own."""

    __slots__ = ()

    def arm(self, alias: torch.Tensor) -> None:
        """Its counter is the save's: there is nothing to watch."""

    @property
    def version(self) -> int:
        """As expected: what moves the counter, PyTorch's check sees."""
        return self.expected


class _Judged:
    """A counter that a judged write has moved, and what is expected of it."""

    __slots__ = ("counter", "expected")

    def __init__(self, target: torch.Tensor) -> None:
        self.counter = _memory.counter_of(target)
        self.expected = _memory.version_of(self.counter)

    def is_counter_of(self, tensor: torch.Tensor) -> bool:
        """Whether what moves this one moves the tensor's."""
        return _memory.shares_counter(self.counter, tensor)


class Aliases:
    """The aliases with a counter of their own, by storage."""

    def __init__(self) -> None:
        self.by_storage: dict[int, list[AliasRecord]] = {}
        #: The latest alias of each storage, as long as nothing asks after it. Most are temporaries
        #: (``p.data.add_(...)``) and are dead when the next one comes.
        self.young: dict[int, tuple[ref[torch.Tensor], CodeType | None, int]] = {}
        self._spans = SpansByStorage(lambda record: record.stretch)  # of storages with many aliases
        #: What judged writes to a part of such a storage have moved: aliases of other parts may share the counter.
        self._judged: dict[int, list[_Judged]] = {}
        self._sweep_at = _SLACK
        self._sweep_young_at = FEW_YOUNG

    def near(self, storage: int, tensor: torch.Tensor) -> list[AliasRecord]:
        """The aliases of a storage that may share a byte with ``tensor``; all of them where they are few."""
        records = self.by_storage.get(storage, [])
        if len(records) <= _FEW:
            return records
        reach = _memory.stretch_in_storage(tensor)
        if reach is None:
            return records
        return self._spans.near(storage, records, *reach)

    def lies_elsewhere(self, storage: int, tensor: torch.Tensor) -> None:
        """``tensor`` reaches another part of its storage now."""
        self._spans.pop(storage, None)
        for record in self.by_storage.get(storage, ()):
            # It may reach a save now that it did not reach when that was made.
            if record() is tensor and (record.counter is not None or LEDGER.any_in_storage(storage)):
                record.arm(tensor)

    def _keep(self, storage: int, records: list[AliasRecord], kept: list[AliasRecord]) -> None:
        """Let go of those of the records of a storage that are not to be kept."""
        if not kept:
            self.by_storage.pop(storage, None)
            self._judged.pop(storage, None)
        elif len(kept) < len(records):
            self.by_storage[storage] = kept
        if len(kept) < len(records):
            self._spans.pop(storage, None)

    def enter_young(self, alias: torch.Tensor, storage: int, code: CodeType | None, offset: int) -> None:
        """Take down a fresh alias (at version 0) of a storage in which no live save lies."""
        young = self.young
        before = young.get(storage)
        if before is not None and before[0]() is not None:
            self._grow(storage)
        young[storage] = (ref(alias), code, offset)
        if len(young) > self._sweep_young_at:
            for key in [key for key, entry in list(young.items()) if entry[0]() is None]:
                young.pop(key, None)
            self._sweep_young_at = 2 * len(young) + FEW_YOUNG

    def _grow(self, storage: int) -> None:
        entry = self.young.pop(storage, None)
        if entry is not None:
            alias = entry[0]()
            if alias is not None:
                self.enter(alias, storage, None if entry[1] is None else (entry[1], entry[2]))

    def enter(
        self,
        alias: torch.Tensor,
        storage: int,
        instruction: Instruction,
        version: int | None = None,
        lent: bool = False,
    ) -> AliasRecord:
        """Take down an alias that has just been made; without a version, one that nothing shares its counter with."""
        if storage in self.young:
            self._grow(storage)
        COUNTS.aliases += 1
        record = (LentAlias if lent else AliasRecord)(alias, instruction, version or 0)
        record.own = version is None
        records = self.by_storage.get(storage)
        if records is None:
            self.by_storage[storage] = [record]
            if len(self.by_storage) > self._sweep_at:
                self._sweep()
        else:
            last = records[-1]
            if last.counter is None and last() is None:
                records[-1] = record
                if self._spans:
                    self._spans.shortened(storage, len(records) - 1)
            else:
                records.append(record)
                if len(records) > _DEAD_KEPT and not len(records) & (len(records) - 1):
                    self._thin(storage)
        return record

    def _thin(self, storage: int) -> None:
        self.sync(storage)  # what moved is put down to the saves before its record goes
        records = self.by_storage.get(storage, [])
        dead = [record for record in records if record() is None and record.counter is not None][-_DEAD_KEPT:]
        kept = [record for record in records if record() is not None or any(record is other for other in dead)]
        self._keep(storage, records, kept)

    def _sweep(self) -> None:
        for storage in list(self.by_storage):
            if not LEDGER.any_in_storage(storage):
                self.forget_dead(storage)
        self._sweep_at = 2 * len(self.by_storage) + _SLACK

    def forget_dead(self, storage: int) -> None:
        """No save of this storage is alive: what a dead alias did can matter to none."""
        records = self.by_storage.get(storage)
        if records is not None:
            self._keep(storage, records, [record for record in records if record() is not None])

    def forget_all_dead(self) -> None:
        """No save is alive at all."""
        for storage in list(self.by_storage):
            self.forget_dead(storage)

    def arm(self, storage: int, saved: torch.Tensor) -> bool:
        """A save is being made in this storage: watch the counters of the aliases that live and reach it. False if no
        counter is watched but that of what is being saved, which is the save's.
        """
        alive = False
        for record in self.near(storage, saved):
            alias = record()
            if alias is None:
                alive = alive or record.counter is not None  # a ``detach()`` of it may be there still
            else:
                alive = alive or alias is not saved
                if record.counter is None:
                    record.arm(alias)
        return alive

    def meet_save(self, storage: int, saved: torch.Tensor) -> bool:
        """A save is being made in this storage: :meth:`sync`, then :meth:`arm`, whose answer it is.

        Where aliases live on from step to step, nothing has happened to them, and nothing is to be done.
        """
        if storage not in self.young:
            alive = False
            if len(self.by_storage.get(storage, ())) > _FEW and not LEDGER.any_in_storage(storage):
                self.sync(storage)  # once for them all, while there is nothing to mark
            for record in self.near(storage, saved):
                alias = record()
                if alias is None or not record.is_quiet:
                    break
                alive = alive or alias is not saved
            else:
                return alive
        self.sync(storage, saved)
        return self.arm(storage, saved)

    def is_quiet(self, storage: int, saved: torch.Tensor) -> bool:
        """Whether a quick look tells that no counter of an alias that reaches a save has moved unseen."""
        return storage not in self.young and all(record.is_quiet for record in self.near(storage, saved))

    @LEDGER.holds_saves
    def sync(self, storage: int, reached: torch.Tensor | None = None, saves: list[Save] | None = None) -> None:
        """Mark the saves that an unseen write may have touched, and expect from now on what is there now.

        Args:
            reached: ask only the aliases that may share a byte with it.
            saves: the live saves of the storage, where they are known.
        """
        if storage in self.young:
            self._grow(storage)
        records = self.by_storage.get(storage)
        if records is None:
            return
        if not (LEDGER.any_in_storage(storage) if saves is None else saves):
            self.forget_dead(storage)
            self._judged.pop(storage, None)
            for record in self.by_storage.get(storage, []):
                record.expected = record.version
            return
        near_by = records if reached is None else self.near(storage, reached)
        unseen = False
        for record in near_by:
            version = record.version
            if version != record.expected:
                record.expected = version
                if storage in self._judged and self._is_judged(storage, record, version):
                    continue
                unseen = True
                stretch = record.stretch if saves is None else None
                near = saves or (LEDGER.near(storage, *stretch) if stretch else LEDGER.in_storage(storage))
                self._mark(record, storage, near)
        if unseen and len(near_by) < len(records):
            self.sync(storage, saves=saves)  # what shares that counter must not take it for judged later

    def _mark(self, record: AliasRecord, storage: int, saves: list[Save]) -> None:
        alias = record()
        span = record.span if record.span is not None or alias is None else _memory.span_of(alias)
        if span is None:
            return
        for save in saves:
            here = _memory.span_of(save.tensor)
            if here is not None and record.span is not None and save.storage == storage:
                # A storage that was resized, or put into shared memory, lies elsewhere now.
                moved = _torch.storage_address(_torch.behind(save.tensor)) - record.start
                span = replace(record.span, address=record.span.address + moved)
            if here is None or save.moved:
                continue
            if overlaps(span, here) is False:
                # A view of the alias may reach further than it (``as_strided``): where the bytes are kept, they tell.
                if save.storage == storage and save.remarks is not None and save.remarks.proof is not None:
                    save.remarks.compare = True
                continue
            remarks = save.remark()
            if remarks.suspect is None:
                remarks.suspect = record

    def forget(self, tensor: torch.Tensor) -> None:
        """Let go of one alias: something is about to ask for a tensor without weak references."""
        storage = _memory.storage_of(tensor)
        latest = self.young.get(storage)
        if latest is not None and latest[0]() is tensor:
            del self.young[storage]
        records = self.by_storage.get(storage)
        if records is not None:
            self._keep(storage, records, [record for record in records if record() is not tensor])

    def before_judged(self, storage: int, target: torch.Tensor) -> None:
        """A write to ``target`` in this storage is judged: :meth:`sync` what it may reach, or move."""
        if len(self.by_storage.get(storage, ())) > _FEW and not self._is_known(storage, target):
            self.sync(storage)  # aliases of other parts may share the counter, and it may have moved unseen
        else:
            self.sync(storage, target)

    def _is_known(self, storage: int, target: torch.Tensor) -> bool:
        """Whether the counter of ``target`` has not moved since somebody last looked."""
        version = _memory.version_of(target)
        return (
            version <= 0
            or any(
                judged.expected == version and judged.is_counter_of(target) for judged in self._judged.get(storage, ())
            )
            or any(
                (record.own and record() is target) or (record.expected == version and record.shares(target))
                for record in self.near(storage, target)
            )
        )

    def settle(self, storage: int, target: torch.Tensor | None = None) -> None:
        """A write into this storage, to ``target`` if that is known, has been judged: what moved by it is expected."""
        records = self.by_storage.get(storage, ())
        alone = target is None or len(records) <= _FEW
        for record in records if target is None else self.near(storage, target):
            record.expected = record.version
            alone = alone or (record.own and record() is target)
        if not alone and target is not None:
            self._note_judged(storage, target)

    def _note_judged(self, storage: int, target: torch.Tensor) -> None:
        version = _memory.version_of(target)
        if version <= 0 or type(target) not in _memory.PLAIN_TYPES or _torch.is_wrapper(target):
            return
        known = self._judged.setdefault(storage, [])
        for judged in known:
            if judged.is_counter_of(target):
                judged.expected = version
                return
        known.append(_Judged(target))
        if len(known) > _JUDGED_KEPT:
            for record in self.by_storage.get(storage, ()):
                if record.version != record.expected and self._is_judged(storage, record, record.version):
                    record.expected = record.version
            known.clear()

    def _is_judged(self, storage: int, record: AliasRecord, version: int) -> bool:
        """Whether it was by judged writes to other parts of the storage that the counter of an alias moved."""
        return any(
            judged.expected == version and record.shares(judged.counter) for judged in self._judged.get(storage, ())
        )

    def lent(self, tensor: torch.Tensor, storage: int) -> bool:
        """Whether ``tensor`` is, or is a view of, an alias with a counter that plain ``.data`` would not share."""
        base = tensor._base
        for record in self.near(storage, tensor if base is None else base):
            if isinstance(record, LentAlias):
                alias = record()
                if alias is not None and (alias is tensor or alias is base):
                    return True
        return False

    def taken_at(self, tensor: torch.Tensor, storage: int) -> Instruction:
        """Where the alias that ``tensor`` is, or is a view of, was taken; None where nobody saw it."""
        if storage in self.young:
            self._grow(storage)
        records = self.by_storage.get(storage, [])
        base = tensor._base
        for record in reversed(records):
            alias = record()
            if alias is not None and (alias is tensor or alias is base):
                return record.instruction
        return next((record.instruction for record in reversed(records) if record.shares(tensor)), None)


#: The aliases of this process.
ALIASES = Aliases()
LEDGER.on_empty = ALIASES.forget_all_dead
