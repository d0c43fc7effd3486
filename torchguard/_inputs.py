"""Which very tensor does plain PyTorch keep, where the pack hook is given another object or cannot tell an input?

Note [Saves of saves]. Without hooks, unpacking a saved input gives the tensor that was saved, and a double backward
(``create_graph=True``) that saves it again saves that very tensor: ``x.data = y`` changes what the second one reads.
Under hooks PyTorch makes a new tensor of what unpack returns. Kept in its stead, the second backward would read the old
memory: right under the guard, wrong without, and nothing said. So unpack takes down what a node has read while it
records a graph, and pack finds the tensor by its memory and its place in the graph.
"""

from __future__ import annotations

from typing import Any
from weakref import ref

import torch

from torchguard import _memory, _torch

#: By storage: the node that last read saved inputs there while it recorded a graph, and their saves, held weakly.
read_recording: dict[int, tuple[tuple[int, str], list[ref[Any]]]] = {}


def note_read(save: Any) -> None:
    """The node that backward runs now reads a saved input, and what it does with it is recorded."""
    reader, storage = _torch.reader(), save.storage
    if reader is None or not storage:
        return
    known = read_recording.get(storage)
    saves = known[1] if known is not None and known[0] == reader else []

    def forget(_: Any) -> None:
        if (latest := read_recording.get(storage)) is not None and latest[1] is saves:
            read_recording.pop(storage, None)

    saves.append(ref(save, forget))
    read_recording[storage] = reader, saves


def forget_read(tensor: torch.Tensor) -> None:
    """A program's own unpack gave this tensor, PyTorch makes a new one of it, with or without the guard.

    To give it, a checkpoint reads its arguments in the name of the same node.
    """
    read_recording.pop(_memory.storage_of(tensor), None)


def saved_before(storage: int, tensor: torch.Tensor) -> torch.Tensor:
    """The tensor that was saved before, where ``tensor`` is what PyTorch made of it for a node that saves it again."""
    known = read_recording.get(storage)
    if known is None or known[0] != _torch.reader():
        return tensor
    with _torch.no_torch_function():
        for hold in known[1]:
            save = hold()
            if save is None:
                continue
            original: torch.Tensor = save.tensor
            if original is tensor or (
                _torch.is_wrapper(original) == _torch.is_wrapper(tensor) and _is_made_of(tensor, original)
            ):
                return original
    return tensor


def _is_made_of(tensor: torch.Tensor, original: torch.Tensor) -> bool:
    return (
        tensor.grad_fn is original.grad_fn
        and tensor.output_nr == original.output_nr
        and tensor.requires_grad == original.requires_grad
        and tensor._version == original._version
        and _layout(tensor) == _layout(original)
    )


def _layout(tensor: torch.Tensor) -> Any:
    strides = (tensor.storage_offset(), tensor.stride()) if tensor.layout is torch.strided else None
    return tensor.dtype, tensor.shape, strides, tensor.is_conj(), tensor.is_neg()


def save_argument(original: Any, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``_make_saved_tensor``, by which a checkpoint keeps its arguments.

    No node comes between that of an argument and this: to the pack hook the argument looks like an operation's output.
    """
    tensor = kwargs.get("tensor", args[0] if args else None)
    is_output = kwargs.get("is_output", args[1] if len(args) > 1 else True)
    if isinstance(tensor, torch.Tensor) and not is_output:
        with _torch.no_torch_function():
            node = tensor.grad_fn
        if node is not None and _torch.made_last(node, _torch.next_sequence_number()):
            _torch.make_node()
    return original(*args, **kwargs)
