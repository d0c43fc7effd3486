"""What is torchguard for, in ten lines that anybody can run?"""

from __future__ import annotations

import linecache
import sys
from collections.abc import Sequence
from typing import Any

_FILE = "demo.py"

_PROGRAM = """\
import torch

a = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
out = a.sigmoid()  # autograd saves `out` for backward
c = out.data  # the same memory, with a version counter of its own
c.zero_()  # the saved values are gone; nobody noticed
out.sum().backward()

print("a.grad is     ", [round(value, 4) for value in a.grad.tolist()])
"""


def main(arguments: Sequence[str]) -> int:
    """Show the program, run it bare, and run it guarded; the exit status."""
    if arguments:
        print(f"torchguard: demo takes no arguments, and not {arguments[0]!r}", file=sys.stderr)
        return 2
    import torchguard

    print(_PROGRAM)
    print("--- plain PyTorch: no error, and the gradient is wrong")
    code: Any = compile(_PROGRAM, _FILE, "exec")
    # The report quotes the line, which is in no file.
    linecache.cache[_FILE] = (len(_PROGRAM), None, _PROGRAM.splitlines(keepends=True), _FILE)
    exec(code, {})
    truth: Any = compile(_PROGRAM.replace("c.zero_()", "pass").replace(" is     ", " should be"), _FILE, "exec")
    exec(truth, {})
    print("\n--- under torchguard: refused, at the line that does it")
    try:
        with torchguard.strict():
            exec(code, {})
    except torchguard.SavedTensorCorruptionError as error:
        print(f"{type(error).__name__}: {error}")
        return 0
    print("torchguard saw nothing: that is a bug, please report it")
    return 1
