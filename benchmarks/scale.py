"""What do a save and a write cost, and a live save hold, as the number of live saves grows; does a long run grow?

Each question is answered in a process of its own: ``python -m benchmarks.scale QUESTION MODE NUMBER`` prints JSON.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.instructions import PYTHON_ALONE, count_steps
from benchmarks.modes import MODES
from benchmarks.workloads import mlp_model
from torchguard._aliases import ALIASES
from torchguard._saves import LEDGER
from torchguard._traces import TRACES

FLAT = (25, 100, 400)
LIVE = (100, 1_000, 10_000, 100_000, 1_000_000)
STEPS = 100_000


def _resident() -> int:
    """Bytes of resident memory (Linux), 0 where that is not told."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    except OSError:
        return 0


def _best(once: Callable[[], object], batch: int = 200, rounds: int = 20) -> float:
    best = float("inf")
    for _ in range(rounds):
        start = time.perf_counter()
        for _ in range(batch):
            once()
        best = min(best, time.perf_counter() - start)
    return best / batch * 1e6


def _live(number: int) -> list[torch.Tensor]:
    """So many live saves: every tenth in a storage of its own, the others cut from one flat buffer."""
    flat = torch.ones(number, requires_grad=True)
    return [torch.ones(1, requires_grad=True).sin() if n % 10 == 0 else flat[n : n + 1].sin() for n in range(number)]


def _calls(number: int) -> tuple[dict[str, Callable[[], object]], list[torch.Tensor]]:
    """What is asked of a process with so many live saves in storages of their own, in one buffer, and in another."""
    buffer = torch.ones(number + 8)
    w = torch.ones(8, requires_grad=True)
    kept = _live(number) + [(buffer[n : n + 1] * w[:1]) for n in range(number)]
    elsewhere, beside = torch.ones(8), buffer[number:]
    beside.data.add_(1.0)
    gc.collect()
    gc.freeze()
    calls: dict[str, Callable[[], object]] = {
        "save": lambda: w.sin(),
        "write": lambda: elsewhere.add_(1.0),
        "write beside saves": lambda: beside.add_(1.0),
    }
    return calls, kept


def costs(mode: str, number: int) -> dict[str, float]:
    """Microseconds for an operation that saves, an in-place call elsewhere, and one in a buffer with saves in it."""
    with MODES[mode]():
        calls, kept = _calls(number)
        return {**{name: _best(once) for name, once in calls.items()}, "live": float(len(kept))}


def steps(mode: str, number: int) -> dict[str, float]:
    """The same, counted: bytecode instructions of torchguard and calls from there, whatever the machine's load.

    (Of a process without the part in C, where :func:`ask` makes it: that has no bytecode to count.)
    """
    with MODES[mode]():
        calls, kept = _calls(number)
        found = {}
        for name, once in calls.items():
            for _ in range(5):
                once()
            found[name] = float(count_steps(once))
        return {**found, "live": float(len(kept))}


def memory(mode: str, number: int) -> dict[str, float]:
    """Bytes of resident memory for each live save and what the program itself holds for it."""
    with MODES[mode]():
        _live(1000)
        gc.collect()
        before = _resident()
        kept = _live(number)
        gc.collect()
        return {"bytes": (_resident() - before) / len(kept)}


def _best_step(step: Callable[[], object], rounds: int) -> float:
    for _ in range(5):
        step()
    return _best(step, batch=1, rounds=rounds)


def aliases(mode: str, number: int) -> dict[str, float]:
    """Microseconds for a step of the multi-layer perceptron, the best of ``number``, without and with a list of all
    ``p.data`` kept.
    """
    with MODES[mode]():
        torch.manual_seed(0)
        model = mlp_model("cpu")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        x, y = torch.randn(64, 256), torch.randint(0, 10, (64,))

        def step() -> None:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()

        found = {"step": _best_step(step, number)}
        kept = [p.data for p in model.parameters()]
        found["step, aliases kept"] = _best_step(step, number)
        return {**found, "live": float(len(kept))}


def flat_buffer(mode: str, number: int) -> dict[str, float]:
    """Microseconds a parameter for a step with ``number`` of them, cut from one buffer, without and with a list of all
    ``p.data`` kept.
    """
    with MODES[mode]():
        torch.manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(16)) for _ in range(number)]
        buffer = torch.cat([p.detach() for p in parameters])
        for i, p in enumerate(parameters):
            p.data = buffer[16 * i : 16 * i + 16]
        optimizer = torch.optim.SGD(parameters, lr=1e-3)
        x = torch.randn(16)

        def step() -> None:
            h = x
            for p in parameters:
                h = torch.tanh(h * p)
            h.sum().backward()
            optimizer.step()
            optimizer.zero_grad()

        found = {"step": _best_step(step, 30) / number}
        kept = [p.data for p in parameters]
        found["step, aliases kept"] = _best_step(step, 30) / number
        return {**found, "live": float(len(kept))}


def long_run(mode: str, number: int) -> dict[str, Any]:
    """Resident memory over so many training steps, with a list of all ``p.data`` kept throughout, and what the guard
    holds at the end.
    """
    with MODES[mode]():
        model = torch.nn.Linear(4, 4)
        aliases = [p.data for p in model.parameters()]  # long-lived: they must neither slow it down nor make it grow
        x = torch.ones(2, 4)
        points = []
        for n in range(number + 1):
            model(x).exp().sum().backward()
            for p in model.parameters():
                p.data.add_(p.grad, alpha=-1e-6)  # type: ignore[arg-type]
                p.grad = None
            if n % max(1, number // 20) == 0:
                gc.collect()
                points.append((n, _resident()))
        left = {
            "saves alive": len(LEDGER.all_alive()),
            "aliases taken down": len(ALIASES.by_storage) + len(ALIASES.young),
            "traces of aliases": len(TRACES.by_tensor),
        }
        return {"points": points, "aliases": len(aliases), "left": left}


QUESTIONS: dict[str, Callable[[str, int], dict[str, Any]]] = {
    "costs": costs,
    "steps": steps,
    "memory": memory,
    "aliases": aliases,
    "flat_buffer": flat_buffer,
    "long_run": long_run,
}


def ask(question: str, mode: str, number: int, seconds: float) -> dict[str, Any]:
    """The answer of a process of its own; what went wrong under ``"error"``."""
    command = [sys.executable, "-m", "benchmarks.scale", question, mode, str(number)]
    environment = {**os.environ, **(PYTHON_ALONE if question == "steps" else {})}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=True, env=environment)
    except subprocess.TimeoutExpired:
        return {"error": f"more than {seconds:.0f} s"}
    except subprocess.CalledProcessError as error:
        return {"error": (error.stderr.strip() or f"exit status {error.returncode}").splitlines()[-1]}
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(QUESTIONS[sys.argv[1]](sys.argv[2], int(sys.argv[3]))))
