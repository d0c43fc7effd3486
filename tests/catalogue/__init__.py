"""Which programs must the guard tell apart? The one place where a new case goes.

Each module holds the routes of one family; what a program is, and how it is judged, stands in ``harness``.
"""

from catalogue import textbook  # isort: skip - the four textbook programs come first
from harness import PROGRAMS

from catalogue import (
    aliases,
    compiled,
    counterless,
    exports,
    functorch,
    graphs,
    hooked,
    invisible,
    itself,
    methods,
    models,
    nested,
    rebinding,
    recompute,
    storages,
    training,
    unseen,
    wrapped,
)

__all__ = [
    "PROGRAMS",
    "aliases",
    "compiled",
    "counterless",
    "exports",
    "functorch",
    "graphs",
    "hooked",
    "invisible",
    "itself",
    "methods",
    "models",
    "nested",
    "rebinding",
    "recompute",
    "storages",
    "textbook",
    "training",
    "unseen",
    "wrapped",
]
