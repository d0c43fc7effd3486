"""How does PyTorch itself word its refusal of a save whose version moved?

Save hooks switch PyTorch's check off, so the guard makes it; and the message must be PyTorch's own, whichever
version of torch it is. So PyTorch is made to produce it: the tensor is saved once more, natively, with its
counter set to the version at which it was saved first, and then unpacked.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from torchguard import _torch


@contextmanager
def _natively() -> Iterator[None]:
    """Save the way plain PyTorch does, wherever the guard is asked."""
    with _torch.unseen(), _torch.outside_transforms(), _torch.without_hooks(), torch.enable_grad():
        yield


class _Saver(torch.autograd.Function):
    """Saves a tensor of any dtype the way PyTorch saves an input."""

    @staticmethod
    def forward(ctx: Any, one: torch.Tensor, tensors: list[torch.Tensor]) -> torch.Tensor:
        ctx.save_for_backward(*tensors)  # in a list, it is saved and no input: no edge leads to it
        return one.clone()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> Any:
        return None, None


def refusal(tensor: torch.Tensor, expected: int, node: str | None, output: int) -> RuntimeError:
    """PyTorch's error for a save of ``tensor`` at version ``expected`` that is at another version now.

    Args:
        tensor: what was saved: the tensor itself, or for an output a detached alias.
        expected: its version when it was saved.
        node: name of the node whose output it is, None where an input or a leaf was saved.
        output: which output of that node.
    """
    if _torch.is_wrapper(tensor):
        # A custom Function cannot be called with it here: torch words the refusal of a look-alike.
        if node is None and tensor.grad_fn is not None:
            node, output = str(tensor.grad_fn.name()), tensor.output_nr
        tensor = _look_alike(tensor)
    message = _native_message(tensor, expected)
    if node is not None:
        message = message.replace(
            " is at version ", f", which is output {output} of {_as_torch_names(node)}, is at version ", 1
        )
    return RuntimeError(message)


def hold(tensor: torch.Tensor) -> Any:
    """The output of a node of PyTorch's own that has ``tensor`` saved, without the guard's hooks."""
    with _natively():
        # The node of a custom Function does not keep itself alive: in 2.5 it lets go when its output dies.
        return _Saver.apply(torch.ones((), requires_grad=True), [tensor])  # type: ignore[no-untyped-call]


def _look_alike(tensor: torch.Tensor) -> torch.Tensor:
    with _torch.hidden():
        version = tensor._version
        tensor = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        _torch.set_version(tensor, version)
    return tensor


def _native_message(tensor: torch.Tensor, expected: int) -> str:
    now = tensor._version
    _torch.set_version(tensor, expected)
    try:
        output = hold(tensor)
    finally:
        _torch.set_version(tensor, now)
    with _torch.unseen():
        return _unpacking(lambda: output.grad_fn.saved_tensors)


def _unpacking(unpack: Any) -> str:
    try:
        unpack()
    except RuntimeError as error:
        return str(error)
    raise AssertionError("torch accepted a save whose version had moved")


_style: list[bool] = []


def _as_torch_names(node: str) -> str:
    """``node`` as this torch names it in the message: ``ExpBackward0``, or ``Exp`` since 2.13."""
    if not _style:
        with _natively():
            result = torch.ones((), requires_grad=True).exp()
            saver: Any = result.grad_fn
            result.detach().add_(1)
            _style.append("ExpBackward" in _unpacking(lambda: _torch.saved_result(saver)))
    return node if _style[0] else re.sub(r"Backward0?$|Backward(?=\d+$)", "", node)


_detached: list[str] = []


def detached_refusal() -> RuntimeError:
    """PyTorch's error for a saved tensor that was detached in place."""
    if not _detached:
        with _natively():
            middle = torch.ones((), requires_grad=True) * 1
            saver: Any = (middle * middle).sum()
            middle.detach_()
            _detached.append(_unpacking(saver.backward))
    return RuntimeError(_detached[0])
