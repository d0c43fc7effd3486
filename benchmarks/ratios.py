"""How much slower is each workload under each mode, as a ratio to the bare one in the same run?

``make bench`` runs this. The modes are interleaved round by round, so that a slow spell of the machine meets all of
them, and each mode's best is taken. The bare workload is measured twice: what these two differ by is noise, and where
it is more than 3 % that is said and the workload is measured again. What is done is written to a JSON file at once; a
run that was interrupted goes on from there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import plots, scale
from benchmarks.modes import MODES
from benchmarks.workloads import KERNELS, WORKLOADS, Step

_ALL = {**WORKLOADS, **KERNELS}
_NOISE = 0.03
_ATTEMPTS = 3
_MODES_AT_SCALE = ("bare", "identity hooks", "strict")
#: Seconds after which a question of scale is given up.
_PATIENCE = 400
#: What a process with so many live saves holds for each, three graphs and all.
_BYTES_A_SAVE = 8000


def _say(line: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{line:<100}", end="", file=sys.stderr, flush=True)
    else:
        print(line, file=sys.stderr, flush=True)


def _once(step: Step, mode: str, steps: int, device: str) -> float:
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


def _rounds(step: Step, modes: list[str], device: str, seconds: float, rounds: int) -> dict[str, list[float]]:
    steps = max(1, int(0.005 / _once(step, "bare", 2, device)))
    times: dict[str, list[float]] = {mode: [] for mode in [*modes, "bare again"]}
    end = time.perf_counter() + seconds
    while len(times["bare"]) < 3 or (len(times["bare"]) < rounds and time.perf_counter() < end):
        for mode, seen in times.items():
            seen.append(_once(step, mode.removesuffix(" again"), steps, device))
    return times


def measure(workload: str, device: str, seconds: float, rounds: int) -> dict[str, Any]:
    """Ratios with their spread, the bare time, and the noise, of the quietest of up to three attempts."""
    torch.manual_seed(0)
    step = _ALL[workload](device)
    modes, cannot = [], {}
    for mode in MODES:
        try:
            _once(step, mode, 1, device)
            modes.append(mode)
        except Exception as error:
            cannot[mode] = f"{type(error).__name__}: {str(error).splitlines()[0][:100]}"
    best: dict[str, Any] = {}
    for attempt in range(1, _ATTEMPTS + 1):
        _say(f"{workload}: {seconds:.0f} s, attempt {attempt}")
        times = _rounds(step, modes, device, seconds / _ATTEMPTS, rounds)
        bare = min(*times["bare"], *times["bare again"])
        noise = abs(min(times["bare again"]) / min(times["bare"]) - 1)
        if not best or noise < best["noise"]:
            ratios = {}
            for mode in modes:
                of_rounds = sorted(t / b for t, b in zip(times[mode], times["bare"], strict=True))
                low, _, high = statistics.quantiles(of_rounds, n=4)
                ratios[mode] = {"ratio": min(times[mode]) / bare, "low": low, "high": high}
            best = {
                "bare_us": bare * 1e6,
                "modes": ratios,
                "cannot": cannot,
                "noise": noise,
                "rounds": len(times["bare"]),
                "attempts": attempt,
            }
        if noise <= _NOISE:
            break
        _say(f"{workload}: bare against bare differs by {noise:.1%}, too noisy: again")
    return best


def _entering() -> dict[str, float]:
    """Milliseconds to enter and leave a guard: the first one of a process, and the best of those after it."""
    program = (
        "import time, torch, torchguard\n"
        "def once():\n"
        "    start = time.perf_counter()\n"
        "    with torchguard.strict(): pass\n"
        "    return (time.perf_counter() - start) * 1e3\n"
        "print(once(), min(once() for _ in range(30)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    first, later = map(float, done.stdout.split())
    return {"first": first, "later": later}


def _at_scale(found: dict[str, Any], most: int, steps: int, keep: Callable[[], None]) -> None:
    """Ask what has no answer yet; ``keep`` after each."""
    questions: list[tuple[str, str, int, str]] = []
    for mode in _MODES_AT_SCALE:
        # The last power of ten takes gigabytes and most of the time: of the guard alone.
        sizes = [n for n in scale.LIVE if n <= most and (n < scale.LIVE[-1] or mode == "strict")]
        questions += [("costs", mode, n, f"cost of a save and of a write, {mode}, {n} live saves") for n in sizes]
    questions += [
        ("steps", "strict", n, f"steps of a save and of a write, {n} live saves") for n in scale.LIVE if n <= most
    ]
    for mode in _MODES_AT_SCALE:
        questions.append(("memory", mode, min(100_000, most), f"memory of a live save, {mode}"))
    for mode in ("bare", "strict"):
        questions.append(("aliases", mode, 300, f"a step while aliases of all parameters are kept, {mode}"))
        questions += [("flat_buffer", mode, n, f"{n} parameters cut from one buffer, {mode}") for n in scale.FLAT]
    for mode in (*_MODES_AT_SCALE, "watch"):
        questions.append(("long_run", mode, steps, f"memory over {steps} steps, {mode}"))
    for done, (question, mode, number, title) in enumerate(questions):
        answers = found.setdefault(question, {}).setdefault(mode, {})
        if str(number) not in answers:
            _say(f"{done + 1} of {len(questions)}: {title}")
            answers[str(number)] = scale.ask(question, mode, number, _PATIENCE)
            keep()


def _room_for(live: int) -> int:
    """So many live saves, or the last power of ten below for which there is memory."""
    try:
        available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        with contextlib.suppress(OSError):
            told = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
            available = available if told is None else int(told.group(1)) * 1024
    except (ValueError, OSError, AttributeError):
        return live
    return max([n for n in scale.LIVE if n <= live and n * _BYTES_A_SAVE < available], default=scale.LIVE[0])


def _about(device: str) -> dict[str, str]:
    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                cpu = line.partition(":")[2].strip()
                break
    return {
        "commit": git("rev-parse", "--short", "HEAD") + ("-dirty" if git("status", "--porcelain") else ""),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": device,
        "machine": torch.cuda.get_device_name() if device == "cuda" else f"{cpu}, {os.cpu_count()} cores",
    }


def table(results: dict[str, Any], names: list[str]) -> str:
    """The ratios as a Markdown table: the best, and the middle half of the rounds."""
    modes = [mode for mode in MODES if mode != "bare"]
    lines = ["| workload | bare, µs | " + " | ".join(modes) + " | noise |", "|---" * (len(modes) + 3) + "|"]
    for name in names:
        found = results["workloads"].get(name)
        if found is None:
            continue
        cells = []
        for mode in modes:
            one = found["modes"].get(mode)
            cells.append("–" if one is None else f"{one['ratio']:.2f} ({one['low']:.2f}–{one['high']:.2f})")
        noise = f"{found['noise']:.1%}" + (", too noisy" if found["noise"] > _NOISE else "")
        lines.append(f"| {name} | {found['bare_us']:.0f} | " + " | ".join(cells) + f" | {noise} |")
    return "\n".join(lines)


def main() -> None:
    """Run what is not done yet; print the tables; write the JSON and the plots."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--minutes", type=float, default=8, help="for the workloads at most (default 8)")
    parser.add_argument("--rounds", type=int, default=60, help="at most so many a workload (default 60)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--out", type=Path, default=Path(".benchmarks"), help="directory for JSON and plots")
    parser.add_argument("--fresh", action="store_true", help="begin anew, even where a run was interrupted")
    parser.add_argument("--live", type=int, default=scale.LIVE[-1], help="live saves, at most (a million takes 8 GB)")
    parser.add_argument("--steps", type=int, default=scale.STEPS, help="of the long run")
    parser.add_argument("--no-scale", action="store_true", help="leave the cost against live saves and memory out")
    parser.add_argument("workloads", nargs="*", metavar="WORKLOAD", help=f"of {', '.join(_ALL)}; all of them")
    options = parser.parse_args()
    unknown = [name for name in options.workloads if name not in _ALL]
    if unknown:
        parser.error(f"no workload {unknown[0]!r}; there are {', '.join(_ALL)}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here")
    warnings.filterwarnings("ignore", category=UserWarning)
    torch.set_num_threads(1)
    names = options.workloads or list(_ALL)
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"bench-{options.device}.json"
    about = _about(options.device)
    results: dict[str, Any] = {"about": about, "workloads": {}}
    if path.exists() and not options.fresh:
        before = json.loads(path.read_text())
        if before.get("about") == about:
            results = before
            _say(f"going on with {path}: {len(results['workloads'])} workloads are done\n")

    def keep(change: Callable[[], None]) -> None:
        change()
        path.write_text(json.dumps(results, indent=1))

    # Large workloads get more than kernels.
    left = [name for name in names if name not in results["workloads"]]
    shares = {name: 3 if name in WORKLOADS else 1 for name in names}
    second = options.minutes * 60 / max(1, sum(shares.values()))
    for done, name in enumerate(left):
        _say(f"{done + 1} of {len(left)}: {name}")
        found = measure(name, options.device, second * shares[name], options.rounds)
        keep(lambda name=name, found=found: results["workloads"].update({name: found}))  # type: ignore[misc]
    if not options.no_scale:
        if "entering_ms" not in results:
            keep(lambda: results.update(entering_ms=_entering()))
        if options.device == "cpu":
            found = results.setdefault("scale", {})
            most = _room_for(options.live)
            if most < options.live:
                print(f"not {options.live} but {most} live saves: there is no memory for more", file=sys.stderr)
            _at_scale(found, most, options.steps, lambda: keep(lambda: None))
    _say("\n")
    print(", ".join(f"{key} {value}" for key, value in about.items()) + ", one thread")
    print(table(results, names))
    for name, found in results["workloads"].items():
        for mode, reason in found["cannot"].items():
            print(f"cannot run {name}: {mode}: {reason}")
    if "entering_ms" in results:
        entering = results["entering_ms"]
        print(f"entering and leaving: {entering['later']:.2f} ms, the first of a process {entering['first']:.0f} ms")
    print(scale_table(results.get("scale", {})), end="")
    print(f"written: {path}")
    print(plots.draw(results, options.out))


def scale_table(found: dict[str, Any]) -> str:
    """Cost against live saves, memory a live save and over a long run, in lines."""
    lines = []
    for question, unit, of in (
        ("costs", "µs", "live"),
        ("steps", "steps", "live"),
        ("aliases", "µs", "steps"),
        ("flat_buffer", "µs a parameter", "parameters of one buffer"),
    ):
        for mode, by_number in found.get(question, {}).items():
            for number, one in by_number.items():
                cells = one.get("error") or ", ".join(f"{k} {v:.4g} {unit}" for k, v in one.items() if k != "live")
                lines.append(f"{mode}, {number} {of}: {cells}")
    for mode, by_live in found.get("memory", {}).items():
        for one in by_live.values():
            told = one.get("error") or format(one["bytes"], ".0f") + " bytes a live save, the graph included"
            lines.append(f"{mode}: {told}")
    for mode, by_live in found.get("long_run", {}).items():
        for one in by_live.values():
            if "error" in one:
                lines.append(f"{mode}: long run: {one['error']}")
                continue
            (_, first), (steps, last) = one["points"][1], one["points"][-1]
            left = ", ".join(f"{count} {what}" for what, count in one["left"].items())
            lines.append(f"{mode}: {(last - first) / 1e6:+.2f} MB of resident memory over {steps} steps; left: {left}")
    return "".join(line + "\n" for line in lines)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
