"""Have the hot paths grown? Counts what they execute, and compares with the figures of ``instructions.json``.

``make instructions`` runs this. Neither figure depends on the machine's load: *steps* are the bytecode instructions
that run in torchguard's own files and the calls that they make, for one operation, where the part in C is not used;
*instructions* are the processor's, of the whole operation, beyond those of the same operation without the guard, as
callgrind counts them, with the part in C where it was built (``ARGS=--callgrind``; x86-64 Linux with valgrind; some
minutes).

A figure that is more than its tolerance above the recorded one fails; one that is as much below should be recorded
(``ARGS=--record``). Figures of another Python or torch are not compared.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import mmap
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

import torchguard

_RECORDED = Path(__file__).with_name("instructions.json")
_OURS = os.path.dirname(torchguard.__file__)
#: How far a figure may lie from the recorded one, as a part of it.
TOLERANCE = {"steps": 0.03, "instructions": 0.08}
#: And how far at least: what is next to nothing has no percentage.
_SLACK = {"steps": 2, "instructions": 500}
_WARM = 60
#: What asks for torchguard without its part in C.
PYTHON_ALONE = {"TORCHGUARD_NATIVE": "0"}


def _operations() -> dict[str, Callable[[], object]]:
    """The hot paths. Each is called under a guard, with a save alive elsewhere, as in the middle of a step."""
    leaf = torch.randn(8, requires_grad=True)
    layers = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8))
    x, b, buffers = torch.randn(4, 8), torch.zeros(8), [torch.zeros(8) for _ in range(6)]

    weight = torch.randn(8, requires_grad=True)
    alias = weight.data  # kept by what follows

    def save_beside_an_alias() -> torch.Tensor:
        assert alias is not None
        return weight.sin()

    def save_what_was_written_in_place() -> torch.Tensor:
        h = leaf.sin()
        h.add_(0.1)
        return h.sin()

    def set_item() -> None:
        b[0] = 1.0

    return {
        "save of a leaf": lambda: leaf.sin(),
        "save of a leaf that has an alias": save_beside_an_alias,
        "save of what was written in place": save_what_was_written_in_place,
        "save of an output": lambda: leaf.exp(),
        "saves of a model": lambda: layers(x),
        "save and read": lambda: leaf.sin().sum().backward(),
        "in-place call": lambda: b.add_(1.0),
        "x[i] = v": set_item,
        ".data": lambda: b.data,
        "foreach": lambda: torch._foreach_add_(buffers, 1.0),
        "call that writes nothing": lambda: torch.add(b, 1.0),
    }


def _saves_alive() -> object:
    return [torch.ones(2, requires_grad=True).exp() for _ in range(4)]


# ---- steps -------------------------------------------------------------------------------------------------


def count_steps(once: Callable[[], object]) -> int:
    """Bytecode instructions of torchguard's own files, and calls from there, in one call."""
    steps = 0

    def trace(frame: Any, event: str, _: Any) -> Any:
        nonlocal steps
        if not frame.f_code.co_filename.startswith(_OURS):
            return None
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        steps += event == "opcode"
        return trace

    def profile(frame: Any, event: str, _: Any) -> None:
        nonlocal steps
        steps += event == "c_call" and frame.f_code.co_filename.startswith(_OURS)

    sys.settrace(trace)
    sys.setprofile(profile)
    try:
        once()
    finally:
        sys.setprofile(None)
        sys.settrace(None)
    return steps


def steps() -> dict[str, int]:
    """Bytecode instructions of torchguard and calls from there, for each hot path."""
    with torchguard.strict():
        alive = _saves_alive()
        found = {}
        for name, once in _operations().items():
            for _ in range(3):
                once()
            gc.collect()
            gc.disable()
            found[name] = count_steps(once)
            gc.enable()
        del alive
    found["enter and leave"] = count_steps(_enter_and_leave)
    return found


def steps_of_python() -> dict[str, int]:
    """:func:`steps`, of a process that does without the part in C."""
    command = [sys.executable, "-m", "benchmarks.instructions", "--steps"]
    done = subprocess.run(command, env={**os.environ, **PYTHON_ALONE}, check=True, capture_output=True, text=True)
    found: dict[str, int] = json.loads(done.stdout)
    return found


def _enter_and_leave() -> None:
    with torchguard.strict():
        pass


# ---- instructions ------------------------------------------------------------------------------------------

#: Valgrind's client request on x86-64: rotate rdi by 128 bits in all, exchange rbx with itself.
_REQUEST = bytes.fromhex("4889f831d248c1c70348c1c70d48c1c73d48c1c7334887db4889d0c3")
_DUMP, _ZERO, _START = 0x43540000, 0x43540001, 0x43540004


def _can_use_callgrind() -> bool:
    return shutil.which("valgrind") is not None and platform.machine() in ("x86_64", "AMD64")


def _run_under_callgrind() -> None:
    """Run each hot path a few times between two requests: one part of callgrind's output for each."""
    memory = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    memory.write(_REQUEST)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    call = ctypes.CFUNCTYPE(ctypes.c_uint64, ctypes.c_void_p)(address)

    def request(number: int) -> None:
        arguments = (ctypes.c_uint64 * 6)(number)  # alive until the call is over
        call(ctypes.addressof(arguments))

    torch.set_num_threads(1)
    modes: list[Callable[[], AbstractContextManager[Any]]] = [nullcontext, torchguard.strict]
    request(_START)
    for mode in modes:
        with mode():
            alive = _saves_alive()
            for once in _operations().values():
                for _ in range(_WARM):
                    once()
                gc.collect()
                gc.disable()
                request(_ZERO)
                for _ in range(10):
                    once()
                request(_DUMP)
                gc.enable()
            del alive


def instructions() -> dict[str, int]:
    """Instructions of the processor beyond those of the bare operation, for each hot path."""
    with tempfile.TemporaryDirectory() as directory:
        out = Path(directory) / "out"
        command = [
            "valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={out}",
            sys.executable, "-m", "benchmarks.instructions", "--inside",
        ]  # fmt: skip
        environment = {**os.environ, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
        print("callgrind runs: this takes minutes", file=sys.stderr)
        subprocess.run(command, env=environment, check=True, capture_output=True)
        parts = sorted(Path(directory).glob("out.*"), key=lambda path: int(path.suffix[1:]))
        counts = [_total(path.read_text()) for path in parts]
    names = list(_operations())
    if len(counts) < 2 * len(names):
        raise RuntimeError("callgrind wrote fewer parts than it was asked for")
    bare, guarded = counts[: len(names)], counts[len(names) :]
    return {name: (g - b) // 10 for name, g, b in zip(names, guarded, bare, strict=False)}


def _total(text: str) -> int:
    match = re.search(r"^(?:totals|summary): (\d+)", text, re.MULTILINE)
    return int(match.group(1)) if match else 0


# ---- the comparison ----------------------------------------------------------------------------------------


def compare(kind: str, found: dict[str, int], recorded: dict[str, int]) -> tuple[str, bool]:
    """A table of found and recorded figures, and whether none is more than its tolerance above."""
    tolerance, slack, good = TOLERANCE[kind], _SLACK[kind], True
    lines = [f"{kind} (tolerance {tolerance:.0%})"]
    for name, figure in found.items():
        before = recorded.get(name)
        if before is None:
            verdict = "not recorded"
        elif figure > before + abs(before) * tolerance + slack:
            verdict, good = f"MORE than the recorded {before}", False
        elif figure < before - abs(before) * tolerance - slack:
            verdict = f"less than the recorded {before}: record it"
        else:
            verdict = f"recorded {before}"
        lines.append(f"  {name:28}{figure:8}  {verdict}")
    return "\n".join(lines), good


def main() -> int:
    """Count, compare, and say so; 1 if something has grown."""
    parser = argparse.ArgumentParser(prog="make instructions", description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--callgrind", action="store_true", help="count the processor's instructions as well")
    parser.add_argument("--record", action="store_true", help="write the figures down as those to compare with")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--steps", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.inside:
        _run_under_callgrind()
        return 0
    if options.steps:
        print(json.dumps(steps()))
        return 0
    if options.callgrind and not _can_use_callgrind():
        parser.error("--callgrind needs valgrind, on x86-64")
    key = f"Python {platform.python_version().rpartition('.')[0]}, torch {torch.__version__.partition('+')[0]}"
    everything: dict[str, dict[str, dict[str, int]]] = json.loads(_RECORDED.read_text())
    recorded = everything.setdefault(key, {})
    found = {"steps": steps_of_python()}
    if options.callgrind:
        found["instructions"] = instructions()
    if options.record:
        recorded.update(found)
        _RECORDED.write_text(json.dumps(everything, indent=1) + "\n")
    good = True
    for kind, figures in found.items():
        text, kind_is_good = compare(kind, figures, recorded.get(kind, {}))
        print(text)
        good = good and kind_is_good
    if not recorded:
        print(f"nothing is recorded for {key}: ARGS=--record does it")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
