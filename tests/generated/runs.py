"""What does a generated program do in plain PyTorch, with its saves cloned, under a recorder, and under a guard?

A program is a list of lines of Python, each a whole statement. It runs line by line in a namespace of its own, so that
something can look at the memory of live saves between two lines.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import gc
import inspect
import linecache
import math
import operator
import re
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from types import CodeType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils import dlpack
from torch.utils.checkpoint import checkpoint

import torchguard
from generated import parts

Program = tuple[str, ...]

_PARTS = {name: value for name, value in vars(parts).items() if getattr(value, "__module__", None) == parts.__name__}
_MODULES = {
    "copy": copy,
    "math": math,
    "np": np,
    "torch": torch,
    "F": F,
    "dlpack": dlpack,
    "operator": operator,
    "checkpoint": checkpoint,
}
_HEADER = (
    "import copy, math, operator, threading\n"
    "from collections.abc import Callable\n"
    "from typing import Any\n"
    "\n"
    "import numpy as np\n"
    "import torch\n"
    "import torch.nn.functional as F\n"
    "from torch.utils import dlpack\n"
    "from torch.utils.checkpoint import checkpoint\n"
    "\n"
    "import torchguard\n"
)
_BEGINS = "# ---- the program"
FILE = "<generated>"


def namespace() -> dict[str, Any]:
    """What a program's names mean before its first line."""
    return {**_MODULES, **_PARTS, "__name__": "generated_program"}


def as_script(program: Program, note: str = "", mode: str = "strict") -> str:
    """The program as a Python script that runs by itself."""
    text = "\n".join(program)
    used = [inspect.getsource(value) for name, value in _PARTS.items() if re.search(rf"\b{name}\b", text)]
    body = "\n".join(f"    {line}" for line in program)
    head = "".join(f"# {line}\n" for line in note.splitlines())
    return "\n\n".join(
        [head + _HEADER, *used, f"{_BEGINS}\ntorch.manual_seed(20)\nwith torchguard.{mode}():\n{body}\n"]
    )


def from_script(text: str) -> Program:
    """The program of a script that :func:`as_script` wrote."""
    body = text.partition(_BEGINS)[2].splitlines()
    return tuple(line.strip() for line in body[3:] if line.strip())


_compiled: dict[Program, list[CodeType]] = {}


def compiled(program: Program) -> list[CodeType]:
    """The lines, each compiled at its own number."""
    if program not in _compiled:
        if len(_compiled) > 64:
            _compiled.clear()
        _compiled[program] = [compile("\n" * i + line, FILE, "exec") for i, line in enumerate(program)]
    return _compiled[program]


@dataclass
class Outcome:
    """What a run came to.

    Attributes:
        results: name of a variable, or of its gradient, and its value.
        error: what ended it, with the number of the line that raised; None where it came to its end.
        alive: names of variables whose tensor outlived the run although nothing of the program refers to it.
        held: those that are there although no gradient leads back to them (the cycle that ``create_graph=True`` makes).
    """

    results: dict[str, Any] = field(default_factory=dict)
    error: tuple[str, str] | None = None
    line: int = 0
    corruption: bool = False
    alive: list[str] = field(default_factory=list)
    held: list[str] = field(default_factory=list)


def run(
    program: Program,
    around: AbstractContextManager[Any] | None = None,
    between: Callable[[], None] | None = None,
    threads: bool = True,
    collecting: bool = False,
    places: dict[str, Any] | None = None,
) -> Outcome:
    """Run a program; ``between`` is called after each line, and where a hook of the program says that it wrote.

    ``places``: what takes the place of a part. ``collecting`` leaves the garbage collector on. Save hooks of its own belong to one thread: with ``threads=False`` the work of others is done there.
    """
    outcome = Outcome()
    codes = compiled(program)
    linecache.cache[FILE] = (0, None, [f"{line}\n" for line in program], FILE)
    space = namespace()
    if between is not None:
        space["looked"] = lambda result=None: between()
    if not threads:
        space["in_thread"] = lambda work: work()
    space.update(places or {})
    torch.manual_seed(20)
    enabled = gc.isenabled()
    if not collecting:
        gc.disable()  # what outlives the run does so because of a cycle
    try:
        with around or nullcontext():
            for number, code in enumerate(codes):
                outcome.line = number
                exec(code, space)
                if between is not None:
                    between()
    except Exception as error:
        outcome.error = (type(error).__name__, str(error))
        outcome.corruption = isinstance(error, torchguard.SavedTensorCorruptionError)
        error.__traceback__ = None
        error.__context__ = None
        del error
    finally:
        if enabled:
            gc.enable()
    _take_down(space, outcome)
    return outcome


def _take_down(space: dict[str, Any], outcome: Outcome) -> None:
    own = {
        name: value
        for name, value in space.items()
        if name not in _MODULES and name not in _PARTS and name != "__builtins__"
    }
    held = {}
    for name, value in own.items():
        if isinstance(value, torch.Tensor):
            held[name] = weakref.ref(value)
            outcome.results[name] = taken_down(value)
            with contextlib.suppress(RuntimeError):  # a view whose graph cannot be told any more
                if value.is_leaf and value.grad is not None:
                    outcome.results[f"{name}.grad"] = taken_down(value.grad)
        elif isinstance(value, np.ndarray):
            outcome.results[name] = taken_down(torch.from_numpy(np.array(value, copy=True)))
        elif isinstance(value, torch.nn.Module):
            for key, parameter in [*value.named_parameters(), *value.named_buffers()]:
                outcome.results[f"{name}.{key}"] = taken_down(parameter)
                if parameter.grad is not None:
                    outcome.results[f"{name}.{key}.grad"] = taken_down(parameter.grad)
                held[f"{name}.{key}"] = weakref.ref(parameter)
        elif isinstance(value, (str, int, float)):
            outcome.results[name] = value
    own.clear()
    value = parameter = None
    space.clear()
    outcome.alive = [name for name, hold in held.items() if hold() is not None]
    for name in outcome.alive:
        tensor = held[name]()
        if tensor is not None:  # what is no leaf has one, too, where it was asked for (``inputs=[y]``)
            tensor.grad = None
        del tensor
    outcome.held = [name for name in outcome.alive if held[name]() is not None]


def taken_down(tensor: torch.Tensor) -> tuple[Any, ...]:
    """The value of a tensor, in a form that nothing can write to."""
    if tensor.layout != torch.strided:
        return (str(tensor.layout), tuple(tensor.shape))
    with torch.no_grad():
        plain = tensor.detach().resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)
    return (plain.dtype, tuple(plain.shape), plain)


def same_bits(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """The names whose values are not the same, bit for bit."""
    return [name for name in {**a, **b} if name not in a or name not in b or not _same(a[name], b[name], exact=True)]


def differ(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """The names whose values are clearly not the same numbers. (Versions are counted anew where a copy stands in.)"""
    return [
        name
        for name in {**a, **b}
        if name not in a or name not in b or not (_is_version(name) or _same(a[name], b[name], exact=False))
    ]


def _is_version(name: str) -> bool:
    return name.startswith("v") and name[1:].isdigit()


def _same(a: Any, b: Any, exact: bool) -> bool:
    if not (isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b) == 3):
        return bool(a == b) or (a != a and b != b)  # or both are no number
    if a[:2] != b[:2]:
        return False
    x, y = a[2], b[2]
    if exact:
        return torch.equal(x.reshape(-1).view(torch.uint8), y.reshape(-1).view(torch.uint8))
    if not (x.is_floating_point() or x.is_complex()):
        return torch.equal(x, y)
    if x.dtype in (torch.float16, torch.bfloat16):
        # Added up in another order, large numbers that cancel leave something of their own last digit.
        largest = float(y.float().nan_to_num(0, 0, 0).abs().max()) if y.numel() else 0.0
        return torch.allclose(x, y, rtol=1e-2, atol=max(1e-4, 1e-2 * largest), equal_nan=True)
    return torch.allclose(x, y, rtol=1e-4, atol=1e-6, equal_nan=True)


@contextlib.contextmanager
def quiet() -> Any:
    """All warnings, recorded."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught


# ---- saves, cloned and recorded -----------------------------------------------------------------------------------


def _by_a_checkpoint() -> bool:
    """Whether a checkpoint keeps its argument: no node of its own comes after that argument's."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename == __file__:
        frame = frame.f_back
    return frame.f_code.co_filename == torch.utils.checkpoint.__file__


class Save:
    """A save as PyTorch keeps it: an input is the very tensor, an output a detached alias. The check of versions, which
    save hooks switch off, is made here.
    """

    def __init__(self, tensor: torch.Tensor, is_output: bool | None = None) -> None:
        node = tensor.grad_fn
        if is_output is None:
            latest = torch._C._autograd._get_sequence_nr() - 1  # type: ignore[attr-defined]
            is_output = node is not None and node._sequence_nr() == latest and not _by_a_checkpoint()
        self.tensor = tensor.detach() if is_output else tensor
        #: What backward is given, and what has the version that PyTorch compares.
        self.given = self.counter = self.tensor
        #: None where PyTorch compares none.
        self.version: int | None = tensor._version

    def check(self) -> None:
        if self.counter._version != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation"
            )


def exact_clone(tensor: torch.Tensor) -> torch.Tensor:
    """A copy with the same strides over a copy of the whole storage, so that every kernel does the same."""
    with torch.no_grad():
        if tensor.layout != torch.strided:
            return tensor.clone()
        storage = tensor.untyped_storage().clone()
        copied = torch.empty(0, dtype=tensor.dtype).set_(
            storage, tensor.storage_offset(), tensor.shape, tensor.stride()
        )
        if tensor.is_conj():
            copied = copied.conj()
        if tensor.is_neg():
            copied = torch._neg_view(copied)
        return copied


def cloning(refusing: bool = True) -> AbstractContextManager[Any]:
    """The truth: what backward reads is what was saved. ``refusing``: what PyTorch would refuse is refused."""

    def pack(tensor: torch.Tensor) -> tuple[torch.Tensor, Save]:
        return exact_clone(tensor), Save(tensor)

    def unpack(packed: tuple[torch.Tensor, Save]) -> torch.Tensor:
        if refusing:
            packed[1].check()
        return packed[0]

    def under(pair: Hooks) -> Hooks:
        return lambda tensor: pair[0](exact_clone(tensor)), pair[1]

    return _also_under_the_programs_hooks((pack, unpack), under)


@contextlib.contextmanager
def _lifted() -> Iterator[None]:
    """Without the one pair of save hooks that is on the stack; those of the program stay, and are refused as ever."""
    autograd: Any = torch._C._autograd
    pair = autograd._top_saved_tensors_default_hooks(True)
    autograd._pop_saved_tensors_default_hooks()
    program = autograd._top_saved_tensors_default_hooks(True)
    if program is not None:
        autograd._push_saved_tensors_default_hooks(*pair)
    try:
        yield
    finally:
        if program is None:
            autograd._push_saved_tensors_default_hooks(*pair)


def on_copies(work: Callable[..., Any], *tensors: torch.Tensor) -> Any:
    """The truth of what torch.func, torch.compile and checkpoints save and read again: nobody else has that memory."""
    copies = [tensor.clone() for tensor in tensors]
    with _lifted():
        result = work(*copies)
    return result.clone() if isinstance(result, torch.Tensor) else tuple(one.clone() for one in result)


#: To make the truth with.
COPYING = {"transformed": on_copies, "region": on_copies}

Hooks = tuple[Callable[[torch.Tensor], Any], Callable[[Any], torch.Tensor]]


@contextlib.contextmanager
def _also_under_the_programs_hooks(pair: Hooks, make: Callable[[Hooks], Hooks]) -> Iterator[None]:
    """A pair of save hooks; where the program pushes one of its own, that is replaced by what ``make`` makes of it.

    Only the innermost pair runs. A checkpoint's is left alone.
    """
    autograd: Any = torch._C._autograd
    push = autograd._push_saved_tensors_default_hooks

    def pushed(pack: Any, unpack: Any) -> None:
        own = pack.__code__.co_filename == torch.utils.checkpoint.__file__
        push(*((pack, unpack) if own else make((pack, unpack))))

    push(*pair)
    autograd._push_saved_tensors_default_hooks = pushed
    try:
        yield
    finally:
        autograd._push_saved_tensors_default_hooks = push
        autograd._pop_saved_tensors_default_hooks()


def bytes_of(tensor: torch.Tensor) -> Any:
    """The bytes of the elements of a tensor, whatever they mean."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor._is_zerotensor():
        return None
    size = tensor.element_size()
    storage = tensor.untyped_storage()
    offset = tensor.storage_offset() * size
    if tensor.numel() == 0:
        return b""
    if tensor.is_contiguous():
        length = tensor.numel() * size
        if offset + length > storage.nbytes():
            return "freed"
        return ctypes.string_at(storage.data_ptr() + offset, length)
    last = offset + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)) * size + size
    if last > storage.nbytes():
        return "freed"
    memory = np.frombuffer(ctypes.string_at(storage.data_ptr(), storage.nbytes()), np.uint8)
    strides = [s * size for s in tensor.stride()]
    return np.lib.stride_tricks.as_strided(memory[offset:], (*tensor.shape, size), (*strides, 1)).tobytes()


class Recorder:
    """Sees whether the bytes of a live save have changed without its version having moved.

    Attributes:
        changed: whether any has, at any moment that was looked at.
        read: whether backward has read one that had.
        touched: whether the bytes of any have changed, in whatever way.
        closed_over: whether the bytes of anything have changed that a region reads again when backward recomputes it.
        saves: how many there were.

    Args:
        refusing: what PyTorch would refuse is refused; otherwise backward reads what is there.
    """

    def __init__(self, refusing: bool = True) -> None:
        self._refusing = refusing
        self._live: weakref.WeakSet[_Recorded] = weakref.WeakSet()
        self.changed = False
        self.read = False
        self.touched = False
        self.closed_over = False
        self.saves = 0
        self._again: list[tuple[weakref.ref[torch.Tensor], Any]] = []

    def hooks(self) -> AbstractContextManager[Any]:
        """The pair, to run a program under. Under hooks of the program PyTorch compares no versions."""

        def under(pair: Hooks) -> Hooks:
            def pack(tensor: torch.Tensor) -> Any:
                packed = pair[0](tensor)
                save = self._pack(tensor)
                save.version = None
                return packed, save

            def unpack(both: Any) -> torch.Tensor:
                self.look()
                result = pair[1](both[0])
                save = both[1]
                # A copy holds what was saved, whatever has become of the memory since.
                self.read = self.read or (save.is_changed() and bytes_of(result) != save.bytes)
                # What was reshaped in place is something else, if with the same bytes.
                self.read = self.read or _meaning(result) != save.meaning
                self.changed = self.changed or self.read
                self.touched = self.touched or self.read
                return result

            return pack, unpack

        return _also_under_the_programs_hooks((self._pack, self._unpack), under)

    def region(self, work: Callable[..., Any], *tensors: torch.Tensor) -> Any:
        """Take down what a checkpoint inside closes over: autograd does not save that."""
        self._again += [(weakref.ref(tensor), bytes_of(tensor)) for tensor in tensors]
        return work(*tensors)

    @property
    def places(self) -> dict[str, Any]:
        """What takes the place of parts of the program."""
        return {"transformed": self.transformed, "region": self.region}

    def transformed(self, work: Callable[..., Any], *tensors: torch.Tensor) -> Any:
        """Record what the nodes save that a transform of torch.func makes: it switches save hooks off."""
        first = torch._C._autograd._get_sequence_nr()  # type: ignore[attr-defined]
        with _lifted():
            result = work(*tensors)
        todo, seen = [result.grad_fn], set()
        while todo:
            node = todo.pop()
            if node is None or node in seen or not hasattr(node, "_sequence_nr") or node._sequence_nr() < first:
                continue
            seen.add(node)
            todo.extend(following for following, _ in node.next_functions)
            self._record_node(node)
        return result

    def _record_node(self, node: Any) -> None:
        for name in dir(node):
            if not name.startswith("_raw_saved_"):
                continue
            with contextlib.suppress(RuntimeError):
                raw, saved = getattr(node, name), getattr(node, name.replace("_raw", ""))
                for one, tensor in zip(raw, saved, strict=True) if isinstance(raw, tuple) else [(raw, saved)]:
                    if tensor is not None:
                        kept = None if tensor.grad_fn is node else tensor
                        one.register_hooks(lambda x, kept=kept: self._pack(x, kept is None, kept), self._unpack)

    def _pack(self, tensor: torch.Tensor, is_output: bool | None = None, kept: torch.Tensor | None = None) -> _Recorded:
        """``kept``: the tensor that PyTorch keeps, where it gives an alias of it to the hook."""
        save = _Recorded(tensor if kept is None else _innermost(kept), is_output)
        if kept is not None:
            save.given, save.counter, save.version = tensor, kept, kept._version
        self._live.add(save)
        self.saves += 1
        return save

    def _unpack(self, save: _Recorded) -> torch.Tensor:
        if self._refusing:
            save.check()
        self.touched = self.touched or save.is_changed(refused=True)
        self.read = self.read or save.is_changed()
        self.changed = self.changed or self.read
        # Pointed at memory of inference mode's since: PyTorch would read it, and takes it from no hook.
        return save.given.clone() if save.given.is_inference() else save.given

    def look(self) -> None:
        """Look at all live saves."""
        self.changed = self.changed or any(save.is_changed() for save in list(self._live))
        self.touched = self.touched or any(save.is_changed(refused=True) for save in list(self._live))
        self.closed_over = self.closed_over or any(
            (tensor := hold()) is not None and bytes_of(tensor) != before for hold, before in self._again
        )


def _innermost(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with the memory that is behind a wrapper of torch.func."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        tensor = functorch.get_unwrapped(tensor)
    return tensor


def _meaning(tensor: torch.Tensor) -> Any:
    return tensor.dtype, tensor.shape, tensor.is_conj(), tensor.is_neg()


class _Recorded(Save):
    def __init__(self, tensor: torch.Tensor, is_output: bool | None = None) -> None:
        super().__init__(tensor, is_output)
        self.bytes = bytes_of(tensor)
        self.meaning = _meaning(tensor)

    def is_changed(self, refused: bool = False) -> bool:
        """Whether it has other bytes now, or lies elsewhere; ``refused``: also where PyTorch would refuse it."""
        return (refused or self.version is None or self.counter._version == self.version) and (
            bytes_of(self.tensor) != self.bytes or _meaning(self.tensor) != self.meaning
        )
