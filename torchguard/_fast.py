"""Is the part of the hot paths that is written in C there, and is it wanted?"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from typing import Any

#: Of the part in C that this part in Python works with; one that was compiled from an earlier checkout is another.
_REVISION = 2

#: The module ``_native``. None where it was not built (no compiler), where ``TORCHGUARD_NATIVE=0`` asks for Python
#: alone, and where threads run freely: importing it would have Python switch its global lock on.
native: Any = None
if os.environ.get("TORCHGUARD_NATIVE") != "0" and getattr(sys, "_is_gil_enabled", lambda: True)():
    with contextlib.suppress(ImportError):
        native = importlib.import_module("torchguard._native")
    if getattr(native, "REVISION", None) != _REVISION:
        native = None
