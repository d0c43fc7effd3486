"""How is training with Lightning guarded: from setup to teardown, and out again at any exception?"""

from __future__ import annotations

import sys
from typing import Any

from torchguard.integrations._callback import GuardCallback, import_first

#: One package under two names, each with classes of its own.
_NAMES = ("lightning.pytorch", "pytorch_lightning")


def _callback_classes() -> tuple[Any, ...]:
    """``Callback`` of what the program has imported; of what is there if it has imported neither."""
    imported = [sys.modules[name] for name in _NAMES if sys.modules.get(name) is not None]
    modules = imported or [import_first(__name__, _NAMES, "lightning")]
    return tuple(module.Callback for module in modules)


class TorchguardCallback(GuardCallback, *_callback_classes()):  # type: ignore[misc]
    """Watches what a Lightning ``Trainer`` runs (fit, validate, test, predict), each rank in its own process.

    Use it as ``Trainer(callbacks=[TorchguardCallback("warn")])``. The guard is entered in ``setup()`` and left in
    ``teardown()`` or at an exception. While fitting, a violation's ``step`` is what ``trainer.global_step`` says at
    that moment: the optimizer steps that are done.

    Args:
        mode: one of torchguard's modes, ``"strict"`` or ``"warn"`` say; ``"off"`` does nothing.
        keywords: those of :class:`torchguard.Guard`; they count more than what the mode is made of.

    Raises:
        ValueError: for a mode, or a value of a keyword, that does not exist.
        TypeError: for a keyword that ``Guard`` does not have.
    """

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Enter. (Called by Lightning.)"""
        self.enter((lambda: int(trainer.global_step)) if stage == "fit" else None)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Leave. (Called by Lightning.)"""
        self.leave()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Leave. (Called by Lightning.)"""
        self.leave()
