"""How much has a guard done so far, and how is that told in one line?"""

from __future__ import annotations

from dataclasses import dataclass

from torchguard import _torch
from torchguard._counts import COUNTS
from torchguard._saves import LEDGER


@dataclass(frozen=True)
class Stats:
    """What was done while a guard was on, by all threads of the process and for all its guards.

    Attributes:
        saves: tensors that autograd saved, and those that a checkpoint's function read.
        alive: how many of the process's saves are alive at this moment.
        writes: calls that write and were looked at closely, because a save was alive in that memory (or, for
            functions and calls that no patch sees, anywhere).
        aliases: aliases that had to be followed: taken of memory with a save alive in it, or alive when the next alias
            of the same storage was taken or something in it was saved. Temporaries between steps are not counted.
        exports: arrays, capsules, storages and other ways by which code outside torch could write to memory.
        copies: copies of memory made, to compare a save with or to rehearse a call on.
        bytes_held: bytes of those copies that are kept at this moment. (A save's own record is not counted: some
            hundred bytes each.)
        seconds: time spent on slow paths: rehearsals, comparisons of a read that is not plainly right, copies, verdicts
            and reports. The microseconds that each save, each read and each call cost are *not* in it: to measure them
            would cost as much again. (``docs/performance.md`` says what they are.)
    """

    saves: int = 0
    alive: int = 0
    writes: int = 0
    aliases: int = 0
    exports: int = 0
    copies: int = 0
    bytes_held: int = 0
    seconds: float = 0.0

    def __str__(self) -> str:
        return (
            f"{_counted(self.saves, 'save')} ({self.alive:,} alive), {_counted(self.writes, 'write')} judged, "
            f"{_counted(self.aliases, 'alias', 'aliases')}, {_counted(self.exports, 'export')}, "
            f"{_counted(self.copies, 'copy', 'copies')} ({_size(self.bytes_held)} held), "
            f"{self.seconds:.1f} s on slow paths"
        )


def _counted(number: int, one: str, many: str = "") -> str:
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def _size(count: int) -> str:
    size = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"


class Tally:
    """The counts between :meth:`begin` and :meth:`end`, of one block or, for a decorator, the sum of several."""

    def __init__(self) -> None:
        self._ended: tuple[int, ...] = (0,) * 6
        self._begun: list[tuple[int, ...]] = []

    def begin(self) -> None:
        """From now on."""
        self._begun.append(_now())

    def end(self) -> None:
        """Until now; nothing where it never began."""
        if not self._begun:
            return
        begun = self._begun.pop()
        if not self._begun:  # one call inside another counts once
            self._ended = tuple(a + b - c for a, b, c in zip(self._ended, _now(), begun, strict=True))

    def stats(self) -> Stats:
        """What has been counted, and what is there at this moment."""
        totals = self._ended
        if self._begun:
            totals = tuple(a + b - c for a, b, c in zip(totals, _now(), self._begun[0], strict=True))
        saves, writes, aliases, exports, copies, nanoseconds = totals
        alive, held = _present()
        return Stats(saves, alive, writes, aliases, exports, copies, held, nanoseconds / 1e9)


def _now() -> tuple[int, ...]:
    saves = LEDGER.filed + len(LEDGER.pending)
    return saves, COUNTS.writes, COUNTS.aliases, COUNTS.exports, COUNTS.copies, COUNTS.nanoseconds


@LEDGER.holds_saves
def _present() -> tuple[int, int]:
    """How many saves are alive, and how many bytes of copies they hold.

    Looks at each of them, without the ledger's lock and without filing anything: other threads go on meanwhile, and one
    save more or less does not matter.
    """
    alive = 0
    held: dict[int, int] = {}
    with _torch.no_torch_function():
        for group in [*LEDGER.groups.values(), LEDGER.pending]:
            for item in list(group):
                save = item()
                if save is None:
                    continue
                alive += 1
                proof = None if save.remarks is None else save.remarks.proof
                if proof is not None:
                    held[id(proof)] = proof.numel() * proof.element_size()
                del save  # not to be kept alive until the next one is looked at
    return alive, sum(held.values())
