"""Is every write to what PyTorch's own operators save seen, and nothing else reported?

Run by ``make sweep``: all operators of PyTorch's database that have a gradient, with their sample inputs. It prints
what it found; the exit status is 1 where anything is wrong.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import torch
from sweep_operators import Result, examine, operators


def main(arguments: list[str] | None = None) -> int:
    """Examine the operators, and print the result."""
    parser = argparse.ArgumentParser(prog="make sweep", description=__doc__)
    parser.add_argument("--only", default="", help="operators whose name contains this")
    parser.add_argument("--samples", type=int, default=8, help="at most so many sample inputs of each (default 8)")
    parser.add_argument("--minutes", type=float, default=30.0, help="stop after so long (default 30)")
    parser.add_argument("--page", type=Path, default=None, help="write the result there, where all operators were run")
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)
    chosen = [operator for operator in operators() if options.only in operator.formatted_name]
    end = time.monotonic() + 60 * options.minutes
    shown = time.monotonic()
    results = []
    for operator in chosen:
        if time.monotonic() > end:
            break
        results.append(examine(operator, options.samples))
        for failure in results[-1].failures[:3]:
            print(f"{results[-1].name}: {failure}", flush=True)
        if time.monotonic() - shown > 30:
            shown = time.monotonic()
            print(f"# {len(results)} of {len(chosen)} operators", flush=True)
    corrupting, caught = sum(one.corrupting for one in results), sum(one.caught for one in results)
    print("\na save is written to that the gradient does not use (strict() speaks at the write):")
    for one in results:
        if one.unread:
            print(f"  {one.name}: {', '.join(sorted(one.unread))}")
    unsampled = [one.name for one in results if not one.samples]
    print(f"\nwithout a sample that can be copied: {', '.join(unsampled) or 'none'}")
    print(
        f"{len(results)} of {len(chosen)} operators, {sum(one.samples for one in results)} samples, "
        f"{sum(one.writes for one in results)} writes, {corrupting} of them corrupt a gradient, "
        f"{caught} of these caught; {sum(len(one.failures) for one in results)} failures"
    )
    wrong = any(one.failures for one in results) or len(results) < len(chosen)
    if options.page is not None and not options.only and not wrong:
        options.page.write_text(page(results, options.samples), encoding="utf-8")
    return 1 if wrong else 0


def page(results: Sequence[Result], samples: int) -> str:
    """The result as a page of the documentation."""
    corrupting, caught = sum(one.corrupting for one in results), sum(one.caught for one in results)
    unread = [f"| `{one.name}` | {', '.join(sorted(one.unread))} |" for one in results if one.unread]
    unsampled = ", ".join(f"`{one.name}`" for one in results if not one.samples) or "none"
    share = f"{100 * caught / max(corrupting, 1):.2f}".rstrip("0").rstrip(".")
    return "\n".join(
        [
            "# PyTorch's operators, one by one",
            "",
            "PyTorch tests its operators with a database of sample inputs. `make sweep` runs each operator that has",
            "a gradient with and without `strict()`, which must make no difference; then it writes to each input and",
            "each output in turn, through `.data`, between forward and backward, and compares the gradients with those",
            "of the run without the write.",
            "",
            f'Written by `make sweep ARGS="--samples {samples} --page docs/operators.md"`, with torch',
            f"{torch.__version__}:",
            "",
            "| | |",
            "|---|---|",
            f"| operators | {len(results)} |",
            f"| sample inputs | {sum(one.samples for one in results)} (at most {samples} of each operator) |",
            f"| writes | {sum(one.writes for one in results)} |",
            f"| of these corrupt a gradient | {corrupting} |",
            f"| of these are caught | {caught}: a recall of {share} % |",
            "| false alarms | 0: nothing is reported where no live save's bytes changed |",
            f"| without a sample that can be copied | {unsampled} |",
            "",
            "## A save is written to that the gradient does not use",
            "",
            "Autograd keeps more than it needs. At the write nobody can know that, so `strict()` speaks, and the",
            'gradient would have been right all the same. With `at="read"` what backward does not take out is not',
            "reported; what it takes out and multiplies by zero still is.",
            "",
            "| operator | written to |",
            "|---|---|",
            *unread,
            "",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
