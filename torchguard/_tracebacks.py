"""What of a traceback is the program's, and what is only there because the guard is on?"""

from __future__ import annotations

import os
import types

from torchguard._violation import SavedTensorCorruptionError

_HERE = os.path.dirname(os.path.abspath(__file__)) + os.sep


def of_program(
    error: BaseException, traceback: types.TracebackType | None, runner: str | None = None
) -> types.TracebackType | None:
    """The traceback without frames of this package.

    Args:
        runner: the file that runs the program: all that leads up to its last frame is left out as well.
    """
    entries: list[types.TracebackType] = []
    while traceback is not None:
        entries.append(traceback)
        if traceback.tb_frame.f_code.co_filename == runner:
            entries.clear()
        traceback = traceback.tb_next
    ours = [entry.tb_frame.f_code.co_filename.startswith(_HERE) for entry in entries]
    if ours and ours[-1] and not isinstance(error, (SavedTensorCorruptionError, RuntimeError)):
        ours = [False] * len(ours)  # a mistake in the guard: its frames are what is wanted
    shown = None
    for entry, hidden in zip(reversed(entries), reversed(ours), strict=True):
        if not hidden:
            shown = types.TracebackType(shown, entry.tb_frame, entry.tb_lasti, entry.tb_lineno)
    return shown
