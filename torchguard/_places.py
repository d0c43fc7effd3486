"""Where in the user's code did something happen?

A stack is walked on every save, so the walk keeps only what identifies an instruction (a code object and an
offset into it); line, source and expression are looked up when somebody reads a report.
"""

from __future__ import annotations

import ast
import linecache
import os
import re
import sys
from collections.abc import Callable
from itertools import islice
from types import CodeType, FrameType
from typing import Any

import torch

from torchguard import _torch
from torchguard._model import Place

#: A code object and the offset of an instruction in it; None where no Python code was on the stack.
Instruction = tuple[CodeType, int] | None

_TORCH = os.path.dirname(torch.__file__) + os.sep
_OURS = os.path.dirname(__file__) + os.sep
# contextlib and functools frames stand between a decorated function and its caller; wrapt's are in C.
_PLUMBING = tuple(
    os.path.abspath(module.__file__)
    for module in (
        sys.modules.get("contextlib"),
        sys.modules.get("copy"),
        sys.modules.get("functools"),
        sys.modules.get("threading"),
    )
    if module is not None and module.__file__ is not None
)

#: Whether a file belongs to torch, torchguard or the plumbing between; filled as files are met.
inside_library: dict[str, bool] = {}


def _library(filename: str) -> bool:
    answer = filename.startswith((_TORCH, _OURS, "<frozen ", "<eval_with_key>")) or filename in _PLUMBING
    inside_library[filename] = answer
    return answer


def is_library(filename: str) -> bool:
    """Whether a file belongs to torch, torchguard or the plumbing between."""
    inside = inside_library.get(filename)
    return _library(filename) if inside is None else inside


def user_instruction(frame: FrameType | None) -> Instruction:
    """The innermost instruction on the stack from ``frame`` on that is in neither torch nor torchguard."""
    inside: Any = inside_library
    at: Any = frame
    while True:
        try:  # a loop without calls: half the cost of a save is the walk
            while inside[(code := at.f_code).co_filename]:
                at = at.f_back
        except KeyError:
            _library(at.f_code.co_filename)
        except AttributeError:
            return None  # past the outermost frame
        else:
            return code, at.f_lasti


def user_instruction_above(
    depth: int,
    getframe: Callable[[int], Any] = sys._getframe,
    inside: dict[str, bool] = inside_library,
    call_impl: CodeType | None = _torch.CALL_IMPL,
) -> Instruction:
    """The same, from the frame ``depth`` frames above that of the caller on.

    It looks frames up by their depth, which steps over those that it need not see: what calls ``_call_impl`` of a
    module is its ``__call__``. Every frame that is looked at has a Python object made for it.
    """
    depth += 1
    try:
        while True:
            frame = getframe(depth)
            code = frame.f_code
            if not inside[code.co_filename]:
                return code, frame.f_lasti
            depth += 2 if code is call_impl else 1
    except KeyError:  # a file that was not met yet
        return user_instruction(frame)
    except ValueError:  # past the outermost frame
        return None


def called_from(frame: FrameType | None, files: tuple[str, ...]) -> bool:
    """Whether a frame of one of ``files`` (path endings) is on the stack."""
    while frame is not None:
        if frame.f_code.co_filename.endswith(files):
            return True
        frame = frame.f_back
    return False


def reached_through(frame: FrameType | None, parts: tuple[str, ...]) -> bool:
    """Whether a file whose path has one of ``parts`` in it is on the stack, above all code of the user's."""
    while frame is not None:
        filename = frame.f_code.co_filename
        inside = inside_library.get(filename)
        if inside is None:
            inside = _library(filename)
        if not inside:
            return False
        if any(part in filename for part in parts):
            return True
        frame = frame.f_back
    return False


def place_of(instruction: Instruction) -> Place | None:
    """The place of an instruction, with its source; None where there is none."""
    if instruction is None:
        return None
    code, offset = instruction
    line = _line(code, offset)
    source = linecache.getline(code.co_filename, line).strip()
    function = getattr(code, "co_qualname", code.co_name)
    return Place(_short(code.co_filename), line, function, source, expression_of(instruction))


def _short(filename: str) -> str:
    """The path relative to the working directory where the file is below it, else as it is."""
    if filename.startswith("<"):
        return filename
    try:
        relative = os.path.relpath(filename)
    except (ValueError, OSError):  # another drive on Windows; a working directory that is gone
        return filename
    return filename if relative.startswith("..") else relative


def _line(code: CodeType, offset: int) -> int:
    for start, end, line in code.co_lines():
        if start <= offset < end and line is not None:
            return line
    return code.co_firstlineno


def expression_of(instruction: Instruction) -> str:
    """Source text of the expression that the instruction evaluates; ``""`` where Python or the source is too
    old.
    """
    if instruction is None or not hasattr(CodeType, "co_positions"):
        return ""
    code, offset = instruction
    position = next(islice(code.co_positions(), offset // 2, None), None)
    if position is None:
        return ""
    first, last, start, end = position
    if first is None or first != last:
        return ""
    # Columns are byte offsets into the line's UTF-8.
    return linecache.getline(code.co_filename, first).encode()[start:end].decode(errors="replace")


_OPERATORS: dict[type[ast.AST], str] = {
    ast.Add: "add",
    ast.Sub: "sub",
    ast.Mult: "mul",
    ast.Div: "div",
    ast.Pow: "pow",
    ast.MatMult: "matmul",
    ast.Mod: "remainder",
    ast.FloorDiv: "floor_divide",
    ast.USub: "neg",
}


def is_ours(code: CodeType) -> bool:
    """Whether it is torchguard's own."""
    return code.co_filename.startswith(_OURS)


def operation_of(instruction: Instruction) -> str:
    """Name of the operation that the instruction calls, read from its source; ``""`` where that does not
    tell.
    """
    text = expression_of(instruction)
    try:
        node = ast.parse(text, mode="eval").body
    except SyntaxError:
        match = re.match(r"\S+\s*([-+*/@%]|\*\*|//)=\s", text)
        return _OPERATORS_BY_SIGN.get(match.group(1), "") if match else ""
    if isinstance(node, ast.Call):
        function = node.func
        if isinstance(function, ast.Attribute):
            return function.attr
        return function.id if isinstance(function, ast.Name) else ""
    if isinstance(node, (ast.BinOp, ast.UnaryOp)):
        return _OPERATORS.get(type(node.op), "")
    return ""


_OPERATORS_BY_SIGN = {
    "+": "add",
    "-": "sub",
    "*": "mul",
    "/": "div",
    "**": "pow",
    "@": "matmul",
    "%": "remainder",
    "//": "floor_divide",
}
