"""Which of a great many generated programs does the guard treat wrongly?

Run by ``make fuzz``. Each failure is cut down and printed, once for each way of failing. Programs run in a child
process: one that crashes it is named, and the rest goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

import torch

#: How many programs one child process runs.
CHUNK = 400


@dataclass
class Found:
    """What became of the programs.

    Attributes:
        kinds: how many of each kind there were, and of each way of failing.
        scripts: a script for each way of failing, with what is wrong as a comment.
        programs: how many were made.
    """

    kinds: Counter[str] = field(default_factory=Counter)
    scripts: list[str] = field(default_factory=list)
    programs: int = 0


def main(arguments: list[str] | None = None) -> int:
    """Make programs until the time is up. The exit status is 1 where any failed."""
    parser = argparse.ArgumentParser(prog="make fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, help="how long (default 10)")
    parser.add_argument("--seed", type=int, default=None, help="the first program's seed (default: the clock's)")
    parser.add_argument("--programs", type=int, default=None, help="stop after so many programs")
    parser.add_argument("--lines", type=int, default=14, help="how long a program may get (default 14 lines)")
    parser.add_argument("--keep", type=Path, default=None, help="write each failure there, as a script")
    parser.add_argument("--all-modes", action="store_true", help='under at="read", repair() and audit(), too')
    parser.add_argument(
        "--narrow", action="store_true", help="what a seed made before there were transforms, compiled regions, ..."
    )
    parser.add_argument("--worker", type=int, nargs=2, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.worker is not None:
        first, last = options.worker
        work(first, last, options.lines, options.minutes, not options.narrow)
        return 0
    seed = int(time.time()) if options.seed is None else options.seed
    found = search(
        seed,
        options.programs,
        options.minutes,
        options.lines,
        shown=lambda text: print(text, flush=True),
        wide=not options.narrow,
        modes="all" if options.all_modes else "",
    )
    if options.keep is not None:
        options.keep.mkdir(parents=True, exist_ok=True)
        for i, script in enumerate(found.scripts):
            (options.keep / f"{seed}_{i}.py").write_text(script)
    print(f"# {found.programs} programs from seed {seed}: {dict(found.kinds)}; {len(found.scripts)} different failures")
    return 1 if found.scripts else 0


def search(
    seed: int,
    programs: int | None = None,
    minutes: float = 10.0,
    lines: int = 14,
    shown: Callable[[str], None] = lambda _: None,
    wide: bool = True,
    modes: str = "",
) -> Found:
    """Run programs in one child process after the other.

    Args:
        seed: of the first program; the next one's is one more.
        programs: at most so many; as many as the time allows where it is None.
        minutes: how long.
        lines: how long a program may get.
        shown: is told of each failure, and once a minute how far it is.
        wide: whether programs may have the parts that came later.
        modes: ``"all"``, ``"read"`` for those that speak when backward reads, ``""`` for those that speak at the write.
    """
    found, first, seen = Found(), seed, set()
    environment = {**os.environ, "TORCHGUARD_FUZZ_MODES": modes} if modes else None
    end = time.monotonic() + 60 * minutes
    last_shown = time.monotonic()
    while time.monotonic() < end and (programs is None or seed < first + programs):
        last = seed + (CHUNK if programs is None else min(CHUNK, first + programs - seed))
        left = (end - time.monotonic()) / 60
        command = [sys.executable, __file__, "--worker", str(seed), str(last), "--lines", str(lines)]
        if not wide:
            command.append("--narrow")
        phase = "started"
        with subprocess.Popen(
            [*command, "--minutes", str(left)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        ) as child:
            assert child.stdout is not None
            for line in child.stdout:
                if not line.startswith(_MARK):
                    continue
                message = json.loads(line.removeprefix(_MARK))
                seed, phase = message["seed"], message["phase"]
                found.kinds.update(message.get("kinds", {}))
                for failure in message.get("failures", []):
                    if failure["signature"] not in seen:
                        seen.add(failure["signature"])
                        found.scripts.append(failure["script"])
                        shown(f"\n# ==== seed {seed}: {failure['what']}\n{failure['body']}\n")
                if time.monotonic() - last_shown > 60:
                    last_shown = time.monotonic()
                    shown(f"# {seed - first} programs: {dict(found.kinds)}")
        status = child.returncode
        if status:
            plain = phase in ("made", "known")  # without a guard: the next program, please
            found.kinds["crash of PyTorch" if plain else "crash"] += 1
            text = f"# seed {seed}: the process ended with {status} while the program was being {phase}"
            shown(text)
            if not plain:
                found.scripts.append(text)
        seed += 1
        if phase == "started":
            found.scripts.append("# the process that runs the programs does not start")
            break
    found.programs = seed - first
    return found


_MARK = "torchguard-fuzz: "


def work(first: int, last: int, lines: int, minutes: float, wide: bool) -> None:
    """Run the programs of some seeds, and tell what became of them."""
    from generated.maker import make_program
    from generated.properties import MODES, failures, known

    def tell(phase: str, **more: Any) -> None:
        print(_MARK + json.dumps({"seed": seed, "phase": phase, **more}), flush=True)

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    end = time.monotonic() + 60 * minutes
    for seed in range(first, last):
        if time.monotonic() > end:
            break
        tell("made")
        program = make_program(random.Random(seed), lines, wide)
        tell("known")
        facts = known(program)
        tell("guarded")
        found = failures(program, MODES, facts)
        tell("shrunk", kinds=Counter([facts.kind, *(failure.kind for failure in found)]))
        if found:
            tell("told", failures=[describe(program, seed, found[0])])


def describe(program: tuple[str, ...], seed: int, found: Any) -> dict[str, str]:
    """One failure, cut down."""
    from generated.properties import MODES, failures
    from generated.runs import as_script
    from generated.shrink import shrink

    def failing(shorter: tuple[str, ...]) -> list[str]:
        modes = {found.mode: MODES[found.mode]}
        return [str(one) for one in failures(shorter, modes) if one.kind == found.kind]

    again = failing(program)
    small = shrink(program, lambda shorter: bool(failing(shorter))) if again else program
    what = failing(small)[0] if again else f"{found}\n(not when it ran again)"
    return {
        "what": what,
        "signature": f"{found.kind} " + re.sub(r"\d+(\.\d+)?", "N", "; ".join(small)),
        "body": "\n".join(small),
        "script": as_script(small, f"seed {seed}\n{what}", "strict" if found.mode.startswith("strict") else "warn"),
    }


if __name__ == "__main__":
    sys.exit(main())
