"""How little of a failing program still fails in the same way?"""

from __future__ import annotations

from collections.abc import Callable

from generated.runs import Program


def shrink(program: Program, fails: Callable[[Program], bool]) -> Program:
    """The program without the lines that it fails without.

    Args:
        program: it fails.
        fails: whether a program fails in the same way.
    """
    step = max(1, len(program) // 2)
    while True:
        i, smaller = 0, False
        while i < len(program):
            shorter = program[:i] + program[i + step :]
            if shorter and fails(shorter):
                program, smaller = shorter, True
            else:
                i += step
        if step == 1 and not smaller:
            return _simpler(program, fails)
        step = max(1, step // 2)


_SIMPLER = (
    ("in_thread(lambda: ", ""),
    ("with torch.inference_mode(): ", ""),
    ("with torch.no_grad(): ", ""),
    (".detach().data", ".data"),
    (".requires_grad_()", ""),
)


def _simpler(program: Program, fails: Callable[[Program], bool]) -> Program:
    for i, line in enumerate(program):
        for old, new in _SIMPLER:
            if old in line:
                plainer = line.replace(old, new, 1)
                if old.startswith("in_thread"):
                    plainer = plainer[:-1]
                changed = (*program[:i], plainer, *program[i + 1 :])
                if fails(changed):
                    program, line = changed, plainer
    return program
