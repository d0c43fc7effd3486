"""PyTorch refuses a save under ``watch()``: which alias, or which silent write, is behind that?

The refusal names a shape and two versions. The graph is walked for the node that refuses, its save tells the storage,
and ``_traces`` what was noted of that. Which call wrote through an alias is read from the source around the line that
took it, since no call is watched.
"""

from __future__ import annotations

import ast
import functools
import linecache
import re
import sys
import threading
from collections.abc import Iterator
from itertools import islice
from types import CodeType
from typing import Any, NamedTuple

from torchguard import _memory, _places, _policy, _torch
from torchguard._model import Place
from torchguard._patching import Patch, Routed
from torchguard._places import Instruction
from torchguard._saves import operation_of_node
from torchguard._traces import TRACES, Site, Written
from torchguard._violation import SavedTensorCorruptionError, Violation
from torchguard._writers import is_in_place, title_of


def patches() -> list[Patch]:
    """What is patched where backward passes enter the engine."""
    return [Patch(owner, name, Routed(getattr(owner, name), _run), rank=1) for owner, name in _torch.ENGINE_ENTRIES]


def _run(wrapped: Any, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    try:
        return wrapped(*args, **kwargs)
    except RuntimeError as error:
        if type(error) is not RuntimeError or _torch.REFUSES not in str(error):
            raise
        spoken = _answer(str(error), args[0] if args else kwargs.get("t_outputs", ()), sys._getframe(1))
        if spoken is None:
            raise
        raise spoken from error


def _answer(message: str, roots: Any, frame: Any) -> SavedTensorCorruptionError | None:
    """The guard's error for a refusal that an alias or a silent write is behind; None for any other."""
    guard = _policy.innermost_of_depth("watch")
    if guard is None:
        return None
    with _torch.no_torch_function():
        violation = next(_violations(message, roots, frame), None)
    if violation is None:
        return None
    try:
        guard.respond(violation)
    except SavedTensorCorruptionError as error:
        return error.with_traceback(None)
    return None  # suppressed: PyTorch's own error, which nothing can undo, goes on its way


def _violations(message: str, roots: Any, frame: Any) -> Iterator[Violation]:
    found = _torch.VERSIONS.search(message)
    if found is None:
        return
    now, expected = int(found[1]), int(found[2])
    read = _places.place_of(_places.user_instruction(frame))
    for node, tensor in list(_torch.refused_saves(roots, message)) or _out_of_sight(message, now):
        storage = _memory.storage_of(tensor)
        written = TRACES.written_by(storage, expected)
        aliases = [] if written is not None else TRACES.taken_at(storage, now)
        told = _told_by_write(written) if written else _told_by_aliases(aliases, expected)
        if told is None:
            continue
        operation, aliased, place = told
        yield Violation(
            kind="refused",
            operation=operation,
            saved=None,
            aliased=aliased,
            written=place or read,
            read=read,
            saved_by="" if node is None else operation_of_node(type(node).__name__),
            elements=tensor.numel(),
            of=tensor.numel(),
            caught="read",
            thread=threading.current_thread().name,
            refusal=message,
            **_memory.describe(tensor),
        )


def _out_of_sight(message: str, now: int) -> list[tuple[None, Any]]:
    """What PyTorch may have refused where no node shows it, as what operations in place on a view save (CopySlices).

    If there is just one memory of that version, with an alias taken of it, it is that one; of several, nobody can tell.
    """
    kind = _TYPE.search(message)
    found = {
        _memory.storage_of(tensor): tensor
        for tensor in TRACES.at_version(now)
        if kind is not None and tensor.type() == kind[1]
    }
    return [(None, tensor) for tensor in found.values()] if len(found) == 1 else []


#: The type of the tensor that a refusal is about.
_TYPE = re.compile(r"\[(torch\.\w+Tensor) \[")


#: What was called, where the alias was taken, where the call was made.
_Told = tuple[str, Place | None, Place | None]


def _told_by_write(written: Written) -> _Told:
    return written.title, None, _places.place_of(written.instruction)


def _told_by_aliases(aliases: list[Site], expected: int) -> _Told | None:
    """The alias through which something was written after version ``expected`` was saved, as far as the source tells;
    else the latest that may have been. None where each was written through earlier: then it was a call that PyTorch
    counts.
    """
    unknown: list[Instruction] = []
    for site in aliases:
        with_write = _write_through(site.instruction)
        if with_write is None:
            unknown.append(site.instruction)
        elif site.latest >= expected or not with_write.at_once:
            return with_write.operation, _places.place_of(site.instruction), with_write.place
    return ("", _places.place_of(unknown[0]), None) if unknown else None


# ---- reading the source --------------------------------------------------------------------------------------


class _Write(NamedTuple):
    """A call that, by the source, writes through an alias.

    Attributes:
        at_once: whether it does where the alias is taken: nobody keeps it for later.
    """

    operation: str
    place: Place
    at_once: bool


def _write_through(instruction: Instruction) -> _Write | None:
    """The call that, by the source, writes through the alias that an instruction takes."""
    place = _places.place_of(instruction)
    if instruction is None or place is None:
        return None
    code, offset = instruction
    source = _Source.of(code.co_filename)
    taken = None if source is None else source.attribute_at(code, offset, place.line)
    if source is None or taken is None:
        return None
    write = source.write_through(taken)
    if write is None:
        return None
    operation, line = write
    text = linecache.getline(code.co_filename, line).strip()
    return _Write(operation, Place(place.file, line, place.function, text), not source.is_kept)


class _Source:
    """The syntax tree of one file, with the way up."""

    def __init__(self, tree: ast.AST) -> None:
        self._tree = tree
        self._followed: set[ast.AST] = set()
        self.is_kept = False
        self._parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
        self._imported = {
            (name.asname or name.name).partition(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for name in node.names
        }

    @staticmethod
    @functools.lru_cache(maxsize=16)
    def of(filename: str) -> _Source | None:
        """The file's tree; None where there is no source, or another Python's."""
        try:
            return _Source(ast.parse("".join(linecache.getlines(filename))))
        except (SyntaxError, ValueError, RecursionError):
            return None

    def attribute_at(self, code: CodeType, offset: int, line: int) -> ast.Attribute | None:
        """The ``.data`` that an instruction evaluates."""
        position = None
        if hasattr(code, "co_positions"):
            position = next(islice(code.co_positions(), offset // 2, None), None)
        near = [node for node in ast.walk(self._tree) if isinstance(node, ast.Attribute) and node.attr == "data"]
        if position is not None and position[3] is not None:
            first, last, start, end = position
            return next(
                (
                    node
                    for node in near
                    if (node.lineno, node.end_lineno, node.col_offset, node.end_col_offset) == (first, last, start, end)
                ),
                None,
            )
        near = [node for node in near if node.lineno == line]
        return near[0] if len(near) == 1 else None

    def write_through(self, node: ast.AST) -> tuple[str, int] | None:
        """The operation that writes to what an expression stands for, and its line; None where none is found.

        Afterwards ``is_kept`` tells whether a variable holds it until then.
        """
        self._followed.clear()
        self.is_kept = False
        return self._write_to(node)

    def _write_to(self, node: ast.AST) -> tuple[str, int] | None:
        """The operation that writes to what an expression stands for, and its line."""
        while True:
            parent = self._parents.get(node)
            if isinstance(parent, ast.Attribute):
                call = self._parents.get(parent)
                if not isinstance(call, ast.Call) or call.func is not parent:
                    node = parent  # x.data.T
                elif is_in_place(parent.attr):
                    return title_of(parent.attr), call.lineno
                else:
                    node = call  # x.data.view(-1)
            elif isinstance(parent, ast.Subscript) and parent.value is node:
                if isinstance(parent.ctx, ast.Store) and not isinstance(self._parents.get(parent), ast.AugAssign):
                    return title_of("__setitem__"), parent.lineno
                node = parent
            elif isinstance(parent, ast.AugAssign) and parent.target is node:
                return f"{_SIGNS.get(type(parent.op), '')}=", parent.lineno
            elif isinstance(parent, ast.keyword) and parent.arg == "out":
                return "out=", getattr(node, "lineno", 0)
            elif isinstance(parent, ast.Call) and node in parent.args:
                name = self._name_of_function(parent.func)
                return (title_of(name), parent.lineno) if is_in_place(name) and parent.args[0] is node else None
            elif isinstance(parent, ast.Assign) and parent.value is node:
                return self._write_to_name(parent)
            elif isinstance(parent, ast.NamedExpr):
                self.is_kept = True
                node = parent
            else:
                return None

    def _name_of_function(self, called: ast.AST) -> str:
        """The last name of a function; ``""`` for a method, which writes to something else: ``y.mul_(x.data)``."""
        if not isinstance(called, ast.Attribute):
            return getattr(called, "id", "")
        owner = called.value
        while isinstance(owner, ast.Attribute):
            owner = owner.value
        return called.attr if isinstance(owner, ast.Name) and owner.id in self._imported else ""

    def _write_to_name(self, assignment: ast.Assign) -> tuple[str, int] | None:
        """The first write to the variable that an alias is assigned to, if it is in the same function."""
        if assignment in self._followed:
            return None
        self._followed.add(assignment)
        self.is_kept = True
        names = {target.id for target in assignment.targets if isinstance(target, ast.Name)}
        scope: ast.AST = assignment
        while scope in self._parents and not isinstance(scope, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            scope = self._parents[scope]
        later = [
            node
            for node in ast.walk(scope)
            if isinstance(node, ast.Name) and node.id in names and node.lineno >= assignment.lineno
        ]
        for node in sorted(later, key=lambda node: (node.lineno, node.col_offset)):
            if isinstance(node.ctx, ast.Load) or isinstance(self._parents.get(node), ast.AugAssign):
                write = self._write_to(node)
                if write is not None:
                    return write
        return None


_SIGNS: dict[type[ast.AST], str] = {
    ast.Add: "+",
    ast.Sub: "-",
    ast.Mult: "*",
    ast.Div: "/",
    ast.FloorDiv: "//",
    ast.Mod: "%",
    ast.Pow: "**",
    ast.MatMult: "@",
    ast.BitAnd: "&",
    ast.BitOr: "|",
    ast.BitXor: "^",
    ast.LShift: "<<",
    ast.RShift: ">>",
}
