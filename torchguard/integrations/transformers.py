"""How is training with the Trainer of Transformers guarded, and the guard left however the training ends?

Note [Leaving]. No event tells a callback of an exception. Importing this module therefore wraps ``Trainer.train``,
once, in a function that leaves, when the training ends, the guards that were entered in it.
"""

from __future__ import annotations

import functools
import threading
from typing import Any

from torchguard.integrations._callback import GuardCallback, import_first

_transformers = import_first(__name__, ("transformers",), "transformers")


class _Trainings(threading.local):
    """The trainings that are under way in this thread, innermost last, each with the callbacks that have entered."""

    def __init__(self) -> None:
        self.entered: list[list[TorchguardCallback]] = []


_trainings = _Trainings()


class TorchguardCallback(GuardCallback, _transformers.TrainerCallback):  # type: ignore[misc, name-defined]
    """Watches the training of a Transformers ``Trainer``, each rank in its own process.

    Use it as ``Trainer(..., callbacks=[TorchguardCallback("warn")])`` or ``trainer.add_callback(...)``. The guard is
    entered at ``on_train_begin`` and left when ``train()`` ends, by whatever way. A violation's ``step`` is what
    ``state.global_step`` says at that moment: the optimizer steps that are done. (A subclass that replaces ``train()``
    without calling it leaves the guard at ``on_train_end`` only, and on after an exception.)

    Args:
        mode: one of torchguard's modes, ``"strict"`` or ``"warn"`` say; ``"off"`` does nothing.
        keywords: those of :class:`torchguard.Guard`; they count more than what the mode is made of.

    Raises:
        ValueError: for a mode, or a value of a keyword, that does not exist.
        TypeError: for a keyword that ``Guard`` does not have.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Enter. (Called by Transformers; again where it starts over with a smaller batch.)"""
        if _trainings.entered:
            _trainings.entered[-1].append(self)
        self.enter(lambda: int(state.global_step))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave. (Called by Transformers.)"""
        self.leave()


def _leaving_at_the_end(train: Any) -> Any:
    @functools.wraps(train)
    def guarded_train(*args: Any, **kwargs: Any) -> Any:
        entered: list[TorchguardCallback] = []
        _trainings.entered.append(entered)
        try:
            return train(*args, **kwargs)
        finally:
            _trainings.entered.pop()
            for callback in entered:
                callback.leave()

    return guarded_train


_transformers.Trainer.train = _leaving_at_the_end(_transformers.Trainer.train)
