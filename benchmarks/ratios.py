"""How much slower is each workload under each mode, as a ratio to the bare one in the same run?

``python -m benchmarks.ratios`` (or ``make bench``) interleaves the modes round by round, so that a slow spell
of the machine meets all of them, and takes each mode's best. The bare workload is measured twice: what these
two differ by is noise, and a run in which it exceeds 3 % says so.
"""

from __future__ import annotations

import argparse
import contextlib
import platform
import sys
import time

import torch

from benchmarks.modes import MODES
from benchmarks.workloads import WORKLOADS, Step


def _best(step: Step, mode: str, steps: int, device: str) -> float:
    with MODES[mode]():
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(steps):
            step()
        if device == "cuda":
            torch.cuda.synchronize()
        return (time.perf_counter() - start) / steps


def measure(workload: str, device: str, rounds: int) -> dict[str, float]:
    """Best seconds a step for each mode, and for a second bare run (``"bare again"``)."""
    step = WORKLOADS[workload](device)
    steps = max(1, int(0.01 / _best(step, "bare", 3, device)))
    best = {mode: float("inf") for mode in (*MODES, "bare again")}
    for done in range(rounds):
        if sys.stderr.isatty():
            print(f"\r{workload}: round {done + 1} of {rounds} ", end="", file=sys.stderr)
        for mode in best:
            seconds = _best(step, mode.removesuffix(" again"), steps, device)
            best[mode] = min(best[mode], seconds)
    if sys.stderr.isatty():
        print("\r" + " " * 60 + "\r", end="", file=sys.stderr)
    return best


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help=f"of {', '.join(WORKLOADS)}; all of them")
    options = parser.parse_args()
    unknown = [name for name in options.workloads if name not in WORKLOADS]
    if unknown:
        parser.error(f"no workload {unknown[0]!r}; there are {', '.join(WORKLOADS)}")
    torch.set_num_threads(1)
    name = torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or platform.machine()
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {name}, one thread")
    modes = [mode for mode in MODES if mode != "bare"]
    print("| workload | bare, µs | " + " | ".join(modes) + " | noise |")
    print("|---" * (len(modes) + 3) + "|")
    for workload in options.workloads or WORKLOADS:
        best = measure(workload, options.device, options.rounds)
        bare = min(best["bare"], best["bare again"])
        noise = abs(best["bare again"] / best["bare"] - 1)
        cells = [f"{best[mode] / bare:.2f}" for mode in modes]
        verdict = f"{noise:.1%}" + (", too noisy" if noise > 0.03 else "")
        print(f"| {workload} | {bare * 1e6:.0f} | " + " | ".join(cells) + f" | {verdict} |")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
