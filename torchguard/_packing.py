"""How is a tensor recorded at the moment when autograd saves it?

An output is told from an input by the sequence number of the node that made it: the node that is saving right
now is the one created last in this thread, but for those of views that were out of date (see ``made_last``). These
are looked for only where a tensor is new to Python, or was written in place: any other can be no output.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from itertools import islice
from types import CodeType
from typing import Any

import torch

from torchguard import _memory, _places, _policy, _torch
from torchguard._aliases import ALIASES
from torchguard._exports import EXPORTS, FRESH, FRESH_IN_C, OWN_NODES, is_open
from torchguard._fast import native
from torchguard._inputs import read_recording, saved_before
from torchguard._saves import LEDGER, PROOF_BYTES_AT_SAVE, Part, Save, operation_of_node
from torchguard._torch import ref

#: A node that is a custom Function may have made other nodes in its forward, which upsets the sequence
#: numbers.
_APPLY_CODE = getattr(getattr(torch.autograd.Function.apply, "__func__", None), "__code__", None)

_FILE_AT = 4096

#: The type of node that a view has once it was written in place.
_VIEW_NODE = type(torch.ones(1, requires_grad=True).as_strided((1,), (1,)).grad_fn)

#: The type of node that a copy has.
_COPY_NODE = type(torch.ones(1, requires_grad=True).clone().grad_fn)

#: With ``every_call`` an operation is called from the override: what called the override is its caller.
OWN_FILES = frozenset(
    {
        __file__,
        *(
            os.path.join(os.path.dirname(__file__), f"{name}.py")
            for name in ("_intercept", "_functorch", "_compiled", "_inputs")
        ),
    }
)


def make_pack(exotic: bool = False, audits: bool = False) -> Callable[[torch.Tensor], Save]:
    """A new pack hook, or one for tensors that are known to be no plain ones, or one that keeps the bytes of each save.

    Everything it uses is bound to a local name: it runs once a save. Where there is a part in C, that records what is
    ordinary in the same way, and asks this for the rest (see decision record 12).
    """
    pending = LEDGER.pending
    file = LEDGER.file
    append = pending.append
    tensor_type, parameter_type = torch.Tensor, torch.nn.Parameter
    no_memory = _memory.NO_MEMORY
    mode_active = _torch.function_mode_active
    storage_id = _torch.storage_id
    next_number = _torch.next_sequence_number
    output_after_all = _is_output_after_all
    look_back = _look_back
    node_type, generic_node = _torch.node_type, _torch.GENERIC_NODE
    inside_library = _places.inside_library
    user_instruction = _places.user_instruction
    user_instruction_above = _places.user_instruction_above
    young = ALIASES.young
    aliases = ALIASES.by_storage
    getframe = sys._getframe
    disabled = _torch.no_torch_function
    exports = EXPORTS.by_storage
    dead_exports = EXPORTS.dead
    recording = read_recording
    references = sys.getrefcount
    first = next_number()
    apply_code = _APPLY_CODE
    held_by_none = FRESH - 2
    file_at = _FILE_AT
    own_nodes = OWN_NODES
    saves_no_output = _torch.SAVES_NO_OUTPUT
    own_files = OWN_FILES
    fresh = FRESH_IN_C
    view_node = _VIEW_NODE
    # What an operation saves, it saves between two nodes of its thread, and from one instruction: the way from there
    # to the user's code is walked once. (One tuple, so that a thread never sees half of what another wrote.)
    walked: tuple[Any, ...] = (None, None, 0, None, 0)
    # Code of the user's that has saved last: its file need not be looked at again.
    of_user: CodeType | None = None

    def pack(tensor: torch.Tensor, depth: int = 1) -> Save:
        nonlocal walked, of_user
        kind = type(tensor)
        if (kind is tensor_type or kind is parameter_type) and depth == 1:
            if mode_active():
                return pack_exotic(tensor, 3)
            try:
                storage = storage_id(tensor)
            except no_memory:  # sparse, opaque, a functorch wrapper
                return pack_exotic(tensor, 3)
            if tensor.is_nested:
                return pack_exotic(tensor, 3)
        elif depth == 1:
            return pack_exotic(tensor, 3)
        else:
            storage = _memory.storage_of(tensor)
        save = Save()  # attribute by attribute: half the time of a constructor with ten arguments
        save.remarks = None
        save.storage = storage
        save.version = tensor._version
        number = next_number()
        try:
            frame: Any = getframe(depth)
        except ValueError:  # an autograd thread: no Python code on the stack
            frame = code = None
            save.code = save.inner_code = None
            save.offset = save.inner_offset = 0
        else:
            code = frame.f_code
            offset = frame.f_lasti
            if code is of_user:
                save.code = code
                save.offset = offset
            elif walked[0] == number and walked[1] is code and walked[2] == offset:
                save.code = walked[3]
                save.offset = walked[4]
            elif (inside := inside_library.get(code.co_filename)) is False:
                save.code = of_user = code
                save.offset = offset
            elif code.co_filename in own_files:
                while code.co_filename in own_files and frame.f_back is not None:
                    frame = frame.f_back
                    code = frame.f_code
                offset = frame.f_lasti
                found = user_instruction(frame)
                save.code, save.offset = found if found is not None else (None, 0)
            else:
                found = user_instruction_above(depth + 1 if inside else depth)
                save.code, save.offset = found if found is not None else (None, 0)
                if number >= 0:  # torch may not tell
                    walked = (number, code, offset, save.code, save.offset)
            save.inner_code = code
            save.inner_offset = offset
        grad_fn = tensor.grad_fn
        if grad_fn is not None and (
            (made := grad_fn._sequence_nr()) == number - 1
            or number < 0  # this torch does not tell: never risk a cycle
            or (code is apply_code and code is not None and _may_be_output(tensor, grad_fn, frame))
            or (
                (save.version or exotic or (references(tensor) - depth <= held_by_none and not tensor._is_view()))
                and type(grad_fn) not in saves_no_output
                and output_after_all(save, grad_fn, number)
            )
        ):
            node: Any = type(grad_fn)
            if node is generic_node:
                node = node_type(grad_fn)
            save.node = node
            save.output = tensor.output_nr
            save.tensor = tensor.detach()
            if node is view_node:
                save.remark().view = ref(tensor)
            look_back(save, node, made)
        else:
            save.node = node = None
            save.output = 0
            if recording and storage in recording:
                tensor = saved_before(storage, tensor)
            save.tensor = tensor
        if storage in young or storage in aliases:
            latest = young.get(storage)
            if latest is not None and latest[0]() is None:
                young.pop(storage, None)  # a temporary of the last step
            if (storage in young or storage in aliases) and ALIASES.meet_save(storage, tensor):
                save.keep_small_proof(PROOF_BYTES_AT_SAVE)
        if storage in exports:
            known = exports.get(storage)
            if known is not None and known.exports:
                EXPORTS.keep(save, known)
        else:
            if node is not None:
                # Written in place, the node is younger than the memory.
                may_be_older = save.version > 0 or node not in own_nodes
            else:
                base = tensor._base
                if base is not None:
                    grad_fn = base.grad_fn
                    if grad_fn is not None:
                        made = grad_fn._sequence_nr()
                if grad_fn is None:
                    # Under one more holder than a fresh tensor: the save.
                    may_be_older = base is not None or references(tensor) - depth > held_by_none + 1
                else:
                    may_be_older = save.version > 0 or made < first or type(grad_fn) not in own_nodes
            if may_be_older and (
                exotic
                or depth != 1
                or grad_fn is None
                or type(grad_fn) not in own_nodes
                or is_open(tensor.untyped_storage())
            ):  # what is asked last is all that would be asked there
                EXPORTS.ask(save, storage, grad_fn)
        if dead_exports:
            EXPORTS.settle_dead()
        append(ref(save))
        if len(pending) > file_at:
            file()
        if audits:
            save.keep_contents()
        return save

    def pack_exotic(tensor: torch.Tensor, depth: int = 2) -> Save:
        given = tensor
        with disabled():
            tensor = _torch.within_what_is_over(given)
            save = pack(tensor, depth)
        remarks = save.remark()  # a save with remarks is read with user code kept out
        if tensor is not given:
            remarks.handed = given
        if _memory.span_of(tensor) is None:
            remarks.parts = tuple(
                Part(save, inner) for inner in _torch.parts_of(save.tensor) if _memory.storage_of(inner)
            )
            pending.extend(ref(part) for part in remarks.parts)
        if not (remarks.parts or remarks.contents) and _memory.span_of(tensor) is None and _torch.has_bytes(tensor):
            layout = str(tensor.layout).removeprefix("torch.")
            _policy.note_unwatched(
                f"{type(tensor).__name__} of layout {layout}: no memory to compare writes with; "
                "PyTorch's own version check still applies"
            )
        return save

    if exotic or audits or native is None or fresh < 0:
        return pack_exotic if exotic else pack

    in_c: Callable[[torch.Tensor], Save] = native.Pack(
        otherwise=pack,
        save_type=Save,
        tensor_type=tensor_type,
        parameter_type=parameter_type,
        mode_active=mode_active,
        storage_id=storage_id,
        next_number=next_number,
        output_after_all=_is_output_after_all,
        is_open=_is_open,
        mend_foreach=_mend_foreach,
        keep_small_proof=_keep_small_proof,
        inside_library=inside_library,
        own_files=own_files,
        apply_code=apply_code,
        generic_node=generic_node,
        view_node=view_node,
        own_nodes=own_nodes,
        saves_no_output=saves_no_output,
        young=young,
        aliases=aliases,
        exports=exports,
        dead_exports=dead_exports,
        recording=recording,
        pending=pending,
        append=append,
        file=file,
        file_at=file_at,
        fresh=fresh,
        first=first,
    )
    return in_c


def _keep_small_proof(save: Save) -> None:
    save.keep_small_proof(PROOF_BYTES_AT_SAVE)


def _is_open(tensor: torch.Tensor) -> bool:
    return is_open(tensor.untyped_storage())


def _latest(most: int) -> list[ref[Save]]:
    """The latest saves that are not filed yet, newest first."""
    try:
        return list(islice(reversed(LEDGER.pending), most))
    except RuntimeError:  # another thread saves or files
        return []


def _is_output_after_all(save: Save, grad_fn: Any, number: int) -> bool:
    """Whether ``grad_fn`` is the node that is saving, though it is not the one before the next ``number``."""
    return _torch.made_last(grad_fn, number - 1 if save.version and _copied_itself(save) else number)


@LEDGER.holds_saves
def _copied_itself(save: Save) -> bool:
    """Whether what is saving saved a copy of what it was about to write over: the copy has a node, too."""
    for item in _latest(1):
        before = item()
        return (
            save.version > 0
            and before is not None
            and before.node is _COPY_NODE
            and before.inner_code is save.inner_code
            and before.inner_offset == save.inner_offset
        )
    return False


@LEDGER.holds_saves
def _look_back(save: Save, node: type, number: int) -> None:
    """A ``_foreach_`` operator makes all its nodes before it saves: what was saved before may be an output, too."""
    try:
        before = LEDGER.pending[-1]()
    except IndexError:
        return
    if before is not None and before.node is None and before.inner_offset == save.inner_offset:
        _mend_foreach(node, number, save.inner_code)


@LEDGER.holds_saves
def _mend_foreach(node: type, number: int, code: CodeType | None) -> None:
    """A ``_foreach_`` operator makes all its nodes before it saves: only its last output was told as one.

    Going back from there, what one instruction saved, of one type of node, with numbers that run without a
    gap, are outputs as well. What saves its input and its output (``h = h.cumprod(0)`` in a loop) looks the same, but
    for the name that it is called by, and for the save that was made when its input was an output. (Where neither
    tells, its input is kept as an alias, and ``h.data = y`` on it is not reported.)
    """
    mended = False
    for item in _latest(1024):
        save = item()
        if save is None or save.node is not None or save.inner_code is not code:
            return
        grad_fn: Any = save.tensor.grad_fn
        number -= 1
        if grad_fn is None or _torch.node_type(grad_fn) is not node or _torch.sequence_number(grad_fn) != number:
            return
        if not mended and code and _places.operation_of((code, save.inner_offset)) == operation_of_node(node.__name__):
            return  # ``h.cumprod(0).cumprod(0)``
        if _was_saved_as_output(save, node):
            return  # ``linalg.vector_norm(x).norm()``
        mended = True
        save.node = node
        save.output = save.tensor.output_nr
        save.tensor = save.tensor.detach()


@LEDGER.holds_saves
def _was_saved_as_output(save: Save, node: type) -> bool:
    """Whether what is saved has been saved before, unchanged, as an output of such a node."""
    return any(
        other is not save
        and other.node is node
        and other.version == save.version
        and other.output == save.tensor.output_nr
        and other.shares_counter(save.tensor)
        for other in LEDGER.in_storage(save.storage)
    )


def _may_be_output(tensor: torch.Tensor, grad_fn: Any, frame: Any) -> bool:
    """Whether a custom Function, applied in ``frame``, may be saving an output of its own.

    Its forward can have recorded a graph, and then its node is not the newest. What it was given is an input.
    """
    local = frame.f_locals
    given = local.get("args", ())
    if any(one is tensor for item in given for one in (item if isinstance(item, (list, tuple)) else (item,))):
        return False
    return type(grad_fn) is _torch.node_class_of(local.get("cls"))
