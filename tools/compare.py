"""Of the catalogue's programs, how many does each tool catch, repair, alarm falsely or change?

Run by ``make compare``. Each program of ``tests/catalogue`` runs in plain PyTorch, under PyTorch's own tools and under
the guard; what is right is computed as the tests compute it.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import torch

import torchguard

TOOLS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "plain PyTorch": nullcontext,
    "detect_anomaly": lambda: torch.autograd.set_detect_anomaly(True),
    "allow_mutation_on_saved_tensors": torch.autograd.graph.allow_mutation_on_saved_tensors,
    "torchguard.strict()": torchguard.strict,
    "torchguard.strict(every_call=True)": lambda: torchguard.strict(every_call=True),
    'torchguard.strict(at="read")': lambda: torchguard.strict(at="read"),
    "torchguard.repair()": torchguard.repair,
    "torchguard.watch()": torchguard.watch,
    "torchguard.audit()": torchguard.audit,
}

#: The first three are of corrupting programs, the next two of those where speaking may do harm, the last two of those
#: that PyTorch refuses. ("Spoke" is right or wrong as one sees it: bytes of a save were changed, and no gradient is.)
COLUMNS = (
    "caught",
    "repaired",
    "missed",
    "false alarms",
    "innocent changed",
    "spoke of what is not read",
    "refused, then right",
    "refused, then wrong",
)


def verdict(case: Any, make: Callable[[], AbstractContextManager[Any]]) -> str | None:
    """In which column the program under the tool belongs; None where the tool did nothing, rightly."""
    from harness import Run, outcome_of, plain_run, run_with_cloned_saves, same_bits, same_values

    plain = plain_run(case)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outcome = outcome_of(case, Run(), make)
    if case.kind == "refused":
        if outcome.error is not None:
            return None
        right = same_values(outcome.results, run_with_cloned_saves(case).results)
        return "refused, then right" if right else "refused, then wrong"
    if case.kind == "corrupting":
        if outcome.error is not None:
            return "caught"
        return "repaired" if same_values(outcome.results, _truth(case)) else "missed"
    if case.kind == "unread":
        return None if outcome.error is None else "spoke of what is not read"
    if outcome.error is not None:
        return "false alarms"
    return None if same_bits(outcome.results, plain.results) else "innocent changed"


def _truth(case: Any) -> list[torch.Tensor | None]:
    from harness import Run, _cloning, outcome_of

    cloned = case.truth == "cloned saves"
    run = Run(threads=False, checkpoints=False) if cloned else Run(writes=False)
    truth: list[torch.Tensor | None] = outcome_of(case, run, _cloning if cloned else nullcontext).results
    return truth


def main() -> None:
    """Print one row a tool."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--route", default="", help="only programs whose route contains this")
    parser.add_argument("--names", action="store_true", help="also list the programs, by tool and column")
    options = parser.parse_args()
    torch.set_num_threads(1)
    from catalogue import PROGRAMS

    programs = [case for case in PROGRAMS if options.route in case.route and not case.allowed]
    kinds = Counter(case.kind for case in programs)
    print(f"{len(programs)} programs: " + ", ".join(f"{count} {kind}" for kind, count in kinds.items()))
    print(f"\n| tool | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}")
    named: dict[tuple[str, str], list[str]] = {}
    for tool, make in TOOLS.items():
        counts: Counter[str] = Counter()
        for case in programs:
            column = verdict(case, make)
            if column is not None:
                counts[column] += 1
                named.setdefault((tool, column), []).append(case.name)
        print(f"| {tool} | {' | '.join(str(counts[column]) for column in COLUMNS)} |", flush=True)
    if options.names:
        for (tool, column), names in named.items():
            print(f"\n{tool}, {column}:\n  " + "\n  ".join(names))


if __name__ == "__main__":
    main()
