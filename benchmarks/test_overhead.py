"""Each workload under each mode beside the bare one, for pytest-benchmark: ``pytest benchmarks --benchmark-json FILE``.

A round of the bare workload comes before each round of the guarded one, so a slow spell of the machine meets both;
the ratio of the best rounds is in the JSON as ``extra_info``.
"""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from benchmarks.modes import MODES
from benchmarks.workloads import KERNELS, WORKLOADS

_ALL = {**WORKLOADS, **KERNELS}
_ROUNDS = 20


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return str(request.param)


@pytest.mark.parametrize("mode", [mode for mode in MODES if mode != "bare"])
@pytest.mark.parametrize("workload", _ALL)
def test_overhead(benchmark: Any, device: str, workload: str, mode: str) -> None:
    torch.set_num_threads(1)
    step = _ALL[workload](device)
    bare: list[float] = []

    def timed() -> None:
        step()
        if device == "cuda":
            torch.cuda.synchronize()

    def round_of_bare() -> None:
        start = time.perf_counter()
        timed()
        bare.append(time.perf_counter() - start)

    def guarded() -> float:
        with MODES[mode]():
            timed()  # entering is not the step's cost
            start = time.perf_counter()
            timed()
            return time.perf_counter() - start

    try:
        guarded()
    except Exception as error:
        pytest.skip(f"{mode} cannot run it: {type(error).__name__}: {str(error).splitlines()[0]}")
    timed()
    best = []
    benchmark.group = f"{workload} on {device}"
    benchmark.pedantic(lambda: best.append(guarded()), setup=round_of_bare, rounds=_ROUNDS)
    benchmark.extra_info.update(bare=min(bare), guarded=min(best), ratio=min(best) / min(bare))
