"""Each workload under each mode, for pytest-benchmark: ``pytest benchmarks --benchmark-json FILE``."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.modes import MODES
from benchmarks.workloads import WORKLOADS


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return str(request.param)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("workload", WORKLOADS)
def test_overhead(benchmark: Any, device: str, workload: str, mode: str) -> None:
    torch.set_num_threads(1)
    step = WORKLOADS[workload](device)

    def timed() -> None:
        step()
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.group = f"{workload} on {device}"
    with MODES[mode]():
        benchmark(timed)
