"""What would a call that writes change, tried on a copy of the memory that it writes to?

Note [Rehearsal]. Where a silent write to a live save is about to happen, the call is first made on a copy of
the memory that it writes to. That shows which bytes it changes, whatever picks them (a slice, a mask, an
index tensor, a scatter, values that happen to be there already), so the verdict is about bytes and not about
what a call might do. It is paid for only by a call that would otherwise be reported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from torchguard import _memory, _torch
from torchguard._writers import Writer, substituted


class Rehearsal:
    """A call on a copy of the memory that it writes to.

    Attributes:
        targets: the tensors that it writes to.
        replicas: for each of them, by its id, the copy.
        result: what the call returned.
        failure: what it raised half-way, where it is not to be made again.
    """

    def __init__(self, targets: Sequence[torch.Tensor], replicas: dict[int, torch.Tensor]) -> None:
        self.targets = targets
        self.replicas = replicas
        self.result: Any = None
        self.failure: Exception | None = None
        self._versions = {key: _memory.version_of(replica) for key, replica in replicas.items()}

    def changed_bytes(self, target: torch.Tensor) -> torch.Tensor:
        """Which bytes of the target's memory, from first to last, the call changes."""
        return _memory.changed_bytes(target, self.replicas[id(target)])

    def moves(self, target: torch.Tensor) -> int:
        """By how much the call moves the target's version, where only the rehearsal tells."""
        return _memory.version_of(self.replicas[id(target)]) - self._versions[id(target)]

    def put_down(self) -> None:
        """Put what the call made into place."""
        with _torch.hidden():
            for target in {id(target): target for target in self.targets}.values():
                _memory.overwrite(target, self.replicas[id(target)])
                for _ in range(self.moves(target)):
                    torch.autograd.graph.increment_version(target)

    def with_originals(self, value: Any) -> Any:
        """The same value, with the targets in the place of their copies."""
        return substituted(value, {id(self.replicas[id(target)]): target for target in self.targets})


def rehearse(writer: Writer, call: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Rehearsal:
    """Make the call on copies of what it writes to, which can be copied (see :func:`_memory.can_be_copied`)."""
    targets = writer.targets(args, kwargs)
    with _torch.hidden():
        replicas = _memory.replicas_of(targets, _memory.tensors_in([*args, *kwargs.values()]))
        rehearsal = Rehearsal(targets, replicas)
        args = [substituted(value, replicas) for value in args]
        kwargs = {name: substituted(value, replicas) for name, value in kwargs.items()}
    if writer.collective:  # it is the call: whoever watches calls is to see it
        rehearsal.result = call(*args, **kwargs)
        return rehearsal
    given = [*args, *kwargs.values()]
    with _memory.same_random_numbers(targets if writer.draws else (), given), _torch.rehearsing():
        try:
            rehearsal.result = call(*args, **kwargs)
        except Exception as error:
            if not writer.once:
                raise
            rehearsal.failure = error  # the user's function raised, half-way: so far the memory is written
    return rehearsal
