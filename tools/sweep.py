"""Is every write to what PyTorch's own operators save seen, and nothing else reported?

Run by ``make sweep``: all operators of PyTorch's database that have a gradient, with their sample inputs. It prints
what it found; the exit status is 1 where anything is wrong.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import torch


def main(arguments: list[str] | None = None) -> int:
    """Examine the operators, and print the result."""
    parser = argparse.ArgumentParser(prog="make sweep", description=__doc__)
    parser.add_argument("--only", default="", help="operators whose name contains this")
    parser.add_argument("--samples", type=int, default=8, help="at most so many sample inputs of each (default 8)")
    parser.add_argument("--minutes", type=float, default=30.0, help="stop after so long (default 30)")
    options = parser.parse_args(arguments)

    from sweep_operators import examine, operators

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
    return 1 if any(one.failures for one in results) or len(results) < len(chosen) else 0


if __name__ == "__main__":
    sys.exit(main())
