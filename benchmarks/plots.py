"""What do the results of ``make bench`` look like? Drawn with matplotlib, where it is installed."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

from benchmarks.workloads import KERNELS

_SHOWN = ("identity hooks", "strict", "warn", "strict, at read", "repair", "watch", "audit")


def draw(results: dict[str, Any], directory: Path) -> str:
    """Write the plots as SVG; returns a line that says what was written, or why nothing was."""
    try:
        matplotlib = importlib.import_module("matplotlib")
        matplotlib.use("svg")
        pyplot = importlib.import_module("matplotlib.pyplot")
    except ImportError:
        return "no plots: matplotlib is not installed (it comes with the extra torchguard-autograd[bench])"
    names = list(results["workloads"])
    drawn = []
    for name, shown in (
        ("ratios.svg", [name for name in names if name not in KERNELS]),
        ("kernels.svg", [name for name in names if name in KERNELS]),
    ):
        if shown:
            drawn.append(_ratios(pyplot, results, shown, directory / name))
    if all(question in results.get("scale", {}) for question in ("costs", "memory", "long_run")):
        drawn += [_costs(pyplot, results, directory), _memory(pyplot, results, directory)]
        drawn.append(_long_run(pyplot, results, directory))
    return "plots: " + ", ".join(str(path) for path in drawn)


def _save(pyplot: Any, figure: Any, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path)
    pyplot.close(figure)
    return path


def _ratios(pyplot: Any, results: dict[str, Any], names: list[str], path: Path) -> Path:
    modes = [mode for mode in _SHOWN if any(mode in results["workloads"][name]["modes"] for name in names)]
    figure, axes = pyplot.subplots(figsize=(8, 1 + 0.12 * len(names) * (len(modes) + 1)))
    height = 0.85 / max(1, len(modes))
    for place, mode in enumerate(modes):
        known = [(n, results["workloads"][name]["modes"].get(mode)) for n, name in enumerate(names)]
        spots = [(n + place * height, one) for n, one in known if one is not None]
        axes.barh([at for at, _ in spots], [one["ratio"] - 1 for _, one in spots], height, left=1, label=mode)
    axes.set_yticks([n + 0.4 for n in range(len(names))], names)
    axes.invert_yaxis()
    axes.set_xlabel("time as a ratio to the bare workload")
    axes.axvline(1, color="black", linewidth=0.5)
    axes.legend()
    return _save(pyplot, figure, path)


def _costs(pyplot: Any, results: dict[str, Any], directory: Path) -> Path:
    figure, axes = pyplot.subplots(figsize=(7, 4))
    for mode, by_live in results["scale"]["costs"].items():
        for what in ("save", "write", "write beside saves"):
            points = [(int(live), one[what]) for live, one in by_live.items() if what in one]
            axes.plot([live for live, _ in points], [cost for _, cost in points], "o-", label=f"{what}, {mode}")
    axes.set_xscale("log")
    axes.set_ylim(bottom=0)
    axes.set_xlabel("live saves")
    axes.set_ylabel("µs for a call")
    axes.legend(fontsize="small")
    return _save(pyplot, figure, directory / "live-saves.svg")


def _memory(pyplot: Any, results: dict[str, Any], directory: Path) -> Path:
    found = {
        mode: one["bytes"]
        for mode, by_live in results["scale"]["memory"].items()
        for one in by_live.values()
        if "bytes" in one
    }
    figure, axes = pyplot.subplots(figsize=(6, 3))
    axes.bar(list(found), list(found.values()))
    axes.set_ylabel("bytes for a live save,\nthe graph included")
    return _save(pyplot, figure, directory / "memory.svg")


def _long_run(pyplot: Any, results: dict[str, Any], directory: Path) -> Path:
    figure, axes = pyplot.subplots(figsize=(7, 4))
    runs = [(mode, one) for mode, by in results["scale"]["long_run"].items() for one in by.values() if "points" in one]
    for mode, one in runs:
        points = one["points"][1:]
        axes.plot([n for n, _ in points], [(resident - points[0][1]) / 1e6 for _, resident in points], label=mode)
    axes.set_xlabel("steps")
    axes.set_ylabel("MB of resident memory more than at the start")
    axes.legend()
    return _save(pyplot, figure, directory / "long-run.svg")
