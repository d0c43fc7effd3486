"""How is a report written until there is something better: text, or JSON lines where the path says so?

This is the one place where reports leave the package: whatever renders them takes the same two arguments.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

from torchguard._violation import Violation


def write(violations: Sequence[Violation], path: str) -> None:
    """Write all violations so far to ``path``, in the place of what an earlier call wrote there."""
    if path.endswith((".json", ".jsonl")):
        text = "".join(json.dumps(violation.to_dict()) + "\n" for violation in violations)
    elif violations:
        text = "\n\n".join(f"{violation}\n  seen:  {_times(violation)}" for violation in violations) + "\n"
    else:
        text = "no violations\n"
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    unfinished = f"{path}.{os.getpid()}.part"
    with open(unfinished, "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(unfinished, path)  # whoever reads it meanwhile finds a whole report


def _times(violation: Violation) -> str:
    times = "once" if violation.times == 1 else f"{violation.times} times"
    return times if violation.allowed is None else f"{times}; allowed: {violation.allowed}"
