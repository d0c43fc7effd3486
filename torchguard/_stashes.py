"""What does a custom Function keep on its ctx, past ``save_for_backward``, and is it still that when backward runs?

``ctx.x = x`` is no save: no hook is told of it and PyTorch never looks at its version. What lies there when the
forward has run is what backward will find, so it is copied then, and compared when the node is about to run.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from torchguard import _memory, _places, _policy, _torch
from torchguard._reads import examine_stashed
from torchguard._saves import LEDGER, Save
from torchguard._torch import ref

_GONE = torch.empty(0)


class StashedSave(Save):
    """A tensor that a custom Function keeps in an attribute of its ctx; held weakly: what the ctx lets go of, goes."""

    __slots__ = ("_hold", "_name")

    def __init__(self, tensor: torch.Tensor, name: str, instruction: _places.Instruction) -> None:
        self._hold = ref(tensor)
        self._name = name
        self.code, self.offset = instruction if instruction is not None else (None, 0)
        self.inner_code, self.inner_offset = None, -1
        self.node, self.output = None, 0
        self.storage = _memory.storage_of(tensor)
        self.version = _memory.version_of(tensor)
        self.remarks = None
        self.remark().stashed = True
        self.keep_contents()
        LEDGER.add(self)

    @property
    def tensor(self) -> torch.Tensor:  # type: ignore[override]
        """The tensor; one without memory once it is gone."""
        tensor = self._hold()
        return _GONE if tensor is None else tensor

    @property
    def is_gone(self) -> bool:
        """Whether nobody holds the tensor any more."""
        return self._hold() is None

    @property
    def operation(self) -> str:
        """The Function, and the attribute."""
        return self._name


#: ``Function.apply`` as torch has it: a class method, in Python or (2.15) in C.
_apply: Any = vars(torch.autograd.Function)["apply"]


def _apply_and_look(cls: Any, *args: Any, **kwargs: Any) -> Any:
    result = _apply.__get__(None, cls)(*args, **kwargs)
    guard = _policy.innermost()
    if guard is not None and guard.audits and not torch.compiler.is_compiling() and not _torch.tracing():
        with _torch.no_torch_function():
            _look(cls, result, _places.user_instruction(sys._getframe(1)))
    return result


functools.update_wrapper(_apply_and_look, getattr(_apply, "__func__", _apply))

#: What stands in the place of ``Function.apply`` while a guard audits.
APPLY = classmethod(_apply_and_look)


def _look(cls: Any, result: Any, here: _places.Instruction) -> None:
    if _places.is_library(getattr(sys.modules.get(cls.__module__), "__file__", None) or ""):
        return  # torch's own keep what they look after
    kind = _torch.node_class_of(cls)
    for tensor in _memory.tensors_in(result if isinstance(result, (list, tuple)) else (result,)):
        node = tensor.grad_fn
        if node is not None and type(node) is kind:
            saves = [StashedSave(stash, f"{cls.__name__}, as ctx.{name}", here) for name, stash in _stashed(node)]
            if saves:
                node.register_prehook(_examiner(saves))
            return


def _stashed(node: Any) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in list(vars(node).items()):
        items = list(value.values()) if isinstance(value, dict) else value
        for tensor in _memory.tensors_in(items):
            if _memory.strided_parts_of(tensor):
                yield name, tensor


def _examiner(saves: list[StashedSave]) -> Callable[[Any], None]:
    def examine(_: Any) -> None:
        for save in saves:
            if not save.is_gone:
                examine_stashed(save)

    return examine
