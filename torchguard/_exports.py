"""Which memory of torch can be written to from outside torch, for how long, and since which line?

Note [Exports]. Nobody sees a write through a NumPy array, a DLPack consumer, a buffer or another process. A
save in such memory keeps a copy of its bytes (proof), and backward's read compares. What the proof costs ends
with the export: an array or a capsule is held weakly, an array that a tensor was made from is asked who else
holds it.

Note [Asking a storage]. Torch makes a storage that is backed by somebody else's memory, or that was exported
to NumPy, not resizable; shared memory says so. That tells of exports from before the guard too, but the
Python object of a storage costs a microsecond when it is first asked for. So a save asks only where the
storage can be older than the guard, or come from a function of the user's: the fresh result of an operator
belongs to torch's allocator. From then on, exports are seen as they happen (``_interchange``).
"""

from __future__ import annotations

import contextlib
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from torchguard import _memory, _torch
from torchguard._counts import COUNTS
from torchguard._fast import native
from torchguard._model import Span
from torchguard._overlap import overlaps
from torchguard._places import Instruction
from torchguard._saves import LEDGER, Save
from torchguard._torch import ref

_PROOFS_KEPT = 16


class _Hold(ref[Any]):
    """A weak hold on what keeps an export, or a storage, alive; it knows the storage by its identity."""

    __slots__ = ("storage",)

    storage: int

    def __new__(cls, held: Any, storage: int, when_dead: Any) -> _Hold:
        self: _Hold = ref.__new__(cls, held, when_dead)
        self.storage = storage
        return self

    # ref defines __init__ with its own arguments
    def __init__(self, *_: Any) -> None: ...


class Export:
    """One way by which code outside torch can write to memory.

    Attributes:
        instruction: where it was handed out or taken in; None where that was before the guard.
        span: the memory that it reaches; None for all of the storage.
        hold: a weak hold on what it lives and dies with, None where only the storage's end ends it.
        source: whether ``hold`` is the array that the storage is made from: the storage keeps that alive, and
            the export lives while anybody else does.
    """

    __slots__ = ("hold", "instruction", "source", "span")

    def __init__(self, instruction: Instruction, span: Span | None, hold: ref[Any] | None, source: bool) -> None:
        self.instruction = instruction
        self.span = span
        self.hold = hold
        self.source = source

    @property
    def for_good(self) -> bool:
        """Whether all of the storage can be written to as long as it lives."""
        return self.hold is None and self.span is None

    @property
    def alive(self) -> bool:
        """Whether anybody can still write through it."""
        if self.hold is None:
            return True
        return not _held_by_torch_alone(self.hold) if self.source else self.hold() is not None

    def reaches(self, span: Span) -> bool:
        """Whether it shares a byte with ``span``, as far as can be told."""
        return self.span is None or overlaps(self.span, span) is not False


def _references(hold: Any) -> int:
    held = hold()
    return sys.getrefcount(held)


class _Sample: ...


_sample = _Sample()
#: What ``sys.getrefcount`` says of an object with one holder, asked in the way it is asked below.
_ONE_HOLDER = _references(ref(_sample))


def _held_by_torch_alone(hold: ref[Any]) -> bool:
    """Whether the storage is the only holder of the array that it was made from, and of that array's bases."""
    numpy = sys.modules.get("numpy")
    array: Any = hold()
    while numpy is not None and type(array) is numpy.ndarray:
        if sys.getrefcount(array) > _ONE_HOLDER:
            return False
        array = array.base
    return array is None or type(array) is bytes


class Shared:
    """The exports of one storage, and the saves that keep proof because of them."""

    __slots__ = ("exports", "hold", "proofs", "saves")

    def __init__(self, hold: _Hold) -> None:
        self.hold = hold
        self.exports: list[Export] = []
        self.saves: list[ref[Save]] = []
        #: Proofs of saves of the same elements are one copy as long as the bytes are the same.
        self.proofs: dict[tuple[Any, ...], ref[torch.Tensor]] = {}

    def drop(self, export: Export) -> None:
        """Forget an export that has died."""
        with contextlib.suppress(ValueError):  # another thread was faster
            self.exports.remove(export)


class Exports:
    """The storages that code outside torch can, or could, write to."""

    def __init__(self) -> None:
        self.by_storage: dict[int, Shared] = {}
        #: Storages of exports that have died since anybody looked.
        self.dead: deque[int] = deque()

    def _storage_died(self, hold: Any) -> None:
        shared = self.by_storage.get(hold.storage)
        if shared is not None and shared.hold is hold:
            del self.by_storage[hold.storage]

    def _export_died(self, hold: Any) -> None:
        shared = self.by_storage.get(hold.storage)
        if shared is not None:
            for export in list(shared.exports):
                if export.hold is hold:
                    shared.drop(export)
            if shared.saves:
                self.dead.append(hold.storage)

    def shared(self, untyped: torch.UntypedStorage, storage: int, foreign: bool) -> Shared:
        """The entry of a storage. ``foreign``: where there was none, others may have been able to write to it
        before.
        """
        shared = self.by_storage.get(storage)
        if shared is None:
            shared = self.by_storage[storage] = Shared(_Hold(untyped, storage, self._storage_died))
            if foreign:
                shared.exports.append(Export(None, None, None, False))
        return shared

    def enter(
        self,
        shared: Shared,
        span: Span | None,
        instruction: Instruction,
        handle: Any = None,
        *,
        source: bool = False,
    ) -> Export:
        """Take down an export that ends with ``handle``, or with the storage where there is none."""
        hold = None
        if handle is not None:
            with contextlib.suppress(TypeError):  # a bytearray, say, knows no weak references
                hold = _Hold(handle, shared.hold.storage, None if source else self._export_died)
        export = Export(instruction, span, hold, source)
        if hold is None:
            for other in shared.exports:
                if other.hold is None and (other.span is None or other.span == span):
                    return other  # nothing new
        COUNTS.exports += 1
        shared.exports.append(export)
        return export

    def ask(self, save: Save, storage: int, grad_fn: Any) -> None:
        """Have a save in a storage that is not known keep proof if others may hold its memory."""
        tensor = save.tensor
        if grad_fn is not None:
            learn_node(type(grad_fn))
        try:
            if _torch.is_wrapper(tensor):
                tensor = _torch.behind(tensor)
            untyped = tensor.untyped_storage()
            if is_open(untyped):
                self.keep(save, self.shared(untyped, storage, True))
            elif grad_fn is None:
                self.shared(untyped, storage, False)  # a parameter: not to be asked again
        except _memory.NO_MEMORY:
            return

    def meet(self, save: Save, storage: int, grad_fn: Any) -> None:
        """Have a save keep proof if somebody outside torch can write to it, known already or not."""
        known = self.by_storage.get(storage)
        if known is None:
            self.ask(save, storage, grad_fn)
        elif known.exports:
            self.keep(save, known)

    def keep(self, save: Save, shared: Shared) -> None:
        """Have a save keep proof if somebody outside torch can write to it."""
        span = _memory.span_of(save.tensor)
        if span is None:
            return
        reaching = []
        for export in list(shared.exports):
            if not export.alive:
                shared.drop(export)
            elif export.reaches(span):
                reaching.append(export)
        if reaching:
            self.keep_proof(save, shared, span, reaching)

    def keep_proof(self, save: Save, shared: Shared, span: Span, exports: list[Export]) -> None:
        """Have a save keep proof because of ``exports``."""
        remarks = save.remark()
        proof = remarks.proof
        if proof is None:
            key = (span.address, span.sizes, span.strides, save.tensor.dtype)
            earlier = shared.proofs.get(key)
            proof = None if earlier is None else earlier()
            if proof is not None and _memory.same_bytes(save.tensor, proof):
                remarks.proof = proof
            else:
                save.keep_proof()
                proof = remarks.proof
                if proof is None:
                    return
                if len(shared.proofs) > _PROOFS_KEPT:
                    shared.proofs = {key: proof for key, proof in shared.proofs.items() if proof() is not None}
                shared.proofs[key] = ref(proof)
            remarks.for_exports = True
        remarks.exports = [*remarks.exports, *exports]
        shared.saves.append(ref(save))
        if len(shared.saves) > 64 and not len(shared.saves) & (len(shared.saves) - 1):
            shared.saves = [hold for hold in shared.saves if hold() is not None]

    @LEDGER.holds_saves
    def settle_dead(self) -> None:
        """Nobody can write any more through what died: a save whose bytes are still there needs no proof."""
        while self.dead:
            try:
                shared = self.by_storage.get(self.dead.popleft())
            except IndexError:  # another thread took the last one
                return
            if shared is None or any(export.alive for export in shared.exports):
                continue
            saves, shared.saves = shared.saves, []
            shared.saves += [hold for hold in saves if not _let_go_of_proof(hold())]

    def saves(self) -> Iterator[Save]:
        """The live saves that keep proof because of an export."""
        for shared in list(self.by_storage.values()):
            yield from alive(shared.saves)

    def renew(self) -> None:
        """The first guard is entered: what happened since the last one was left, nobody saw."""
        for storage, shared in list(self.by_storage.items()):
            untyped = shared.hold()
            if untyped is None or not (shared.exports or is_open(untyped)):
                self.by_storage.pop(storage, None)
            elif is_open(untyped) and not any(export.for_good for export in shared.exports):
                shared.exports.append(Export(None, None, None, False))


def is_open(untyped: torch.UntypedStorage) -> bool:
    """Whether a storage says that others hold its memory, or have held it."""
    return not untyped.resizable() or (untyped.is_shared() and untyped.device.type == "cpu")


def alive(holds: Iterable[ref[Save]]) -> Iterator[Save]:
    """Those of some saves that are alive."""
    for hold in list(holds):
        save = hold()
        if save is not None:
            yield save


def _let_go_of_proof(save: Save | None) -> bool:
    """Whether nothing is left to compare: the save is gone, or intact for good."""
    if save is None or save.remarks is None:
        return True
    remarks = save.remarks
    if remarks.proof is not None:
        if not _memory.readable(save.tensor) or not _memory.same_bytes(save.tensor, remarks.proof):
            return False
        if remarks.for_exports and not remarks.compare and remarks.suspect is None:
            remarks.proof = None
            remarks.for_exports = False
    remarks.exports = []
    return True


#: The exports of this process.
EXPORTS = Exports()

#: Types of node of torch's own operators: their results are memory from torch's allocator.
OWN_NODES: set[type] = set()


def learn_node(node: type) -> None:
    """Take down a type of node, unless it belongs to a Function of the user's."""
    if _torch.is_of_torch(node):
        OWN_NODES.add(node)


def _holders_of_a_fresh_tensor(counting: Any = None) -> int:
    """What ``sys.getrefcount`` says, as deep below the pack hook as it is asked, of a tensor that no Python
    holds; or what the hook in C that ``counting`` makes says of it.
    """
    counts: list[int] = []

    def record(tensor: torch.Tensor, _: int) -> None:
        counts.append(sys.getrefcount(tensor))

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        record(tensor, 0)
        return tensor

    try:
        with _torch.no_torch_function(), torch.enable_grad():
            row = torch.ones(2, device="cpu", requires_grad=True)
            hook = pack if counting is None else counting(counts)
            with torch.autograd.graph.saved_tensors_hooks(hook, lambda tensor: tensor):
                row.max(0)  # saves the indices, which nobody has seen
    except RuntimeError:  # hooks are switched off right now
        return 0
    return min(counts, default=0)


#: A tensor with more holders than this may have been there before the operation that saves it.
FRESH = _holders_of_a_fresh_tensor()
#: The same as the part in C counts it, -1 where there is none.
FRESH_IN_C = -1 if native is None else _holders_of_a_fresh_tensor(native.counting)
