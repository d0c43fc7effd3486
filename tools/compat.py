"""Does the guard work with another torch, or another Python?

Run by ``make compat ARGS="--torch 2.5.0"``; without ``--torch`` every package is what constraints.txt says. Makes a
throw-away environment (an ordinary wheel of torch brings CUDA libraries: up to 6 GB), runs the demo, the example and
the tests there, file by file, prints a row of the table in docs/compatibility.md, and deletes the environment.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]

#: What is run unless files are named: every way by which the guard stands on torch; a quarter of an hour.
FILES = (
    *("guard", "nesting_and_threads", "at_read", "hook_composition", "memory", "writers", "watch", "functorch"),
    *("exports", "counterless", "audit", "repair", "recompute", "compiled", "refusals", "native", "flat_buffers"),
)

#: Of the extra ``test`` what the tests need; the trainers' tests skip themselves where their packages are missing.
NEEDED = ("hypothesis>=6.100", "jsonschema>=4.20", "pytest>=8.2", "pytest-timeout>=2.3", "scikit-learn>=1.4")


def counted(line: str) -> Counter[str]:
    """How many tests passed, failed, ... as the last line of pytest's output tells."""
    return Counter({what.rstrip("s"): int(number) for number, what in re.findall(r"(\d+) ([a-z]+)", line)})


def packages(torch: str | None, numpy: str | None) -> list[str]:
    """What pip is asked for; nothing but this torch is held to a version unless constraints.txt holds all."""
    pinned = ["-c", str(ROOT / "constraints.txt")] if torch is None else []
    named = [f"torch=={torch}" if torch else "torch", f"numpy{numpy or '>=1.26'}"]
    return [*pinned, *named, "wrapt>=1.16", "tomli>=2; python_version < '3.11'", *NEEDED]


def environment(python: str, asked: list[str], at: Path) -> str:
    """Make an environment with what is asked of pip in the folder ``at``; its interpreter.

    Raises:
        SystemExit: the environment cannot be made; its text says why.
    """
    interpreter = str(at / "bin" / "python")
    try:
        subprocess.run([python, "-m", "venv", str(at)], check=True)
        subprocess.run([interpreter, "-m", "pip", "install", "--quiet", "--no-cache-dir", *asked], check=True)
    except OSError as error:
        sys.exit(f"compat: --python {python} cannot be run ({error.strerror}): give an interpreter, python3.12 say")
    except subprocess.CalledProcessError as error:
        step = "pip cannot install what was asked for" if "pip" in error.cmd else f"{python} -m venv does not work"
        sys.exit(f"compat: {step}: what it said stands above")
    return interpreter


def run_tests(interpreter: str, files: list[Path]) -> dict[str, Counter[str]]:
    """Run test files one by one, and count by file; what does not come to an end counts as failed."""
    counts: dict[str, Counter[str]] = {}
    settings = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [interpreter, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--timeout", "300", "--tb", "short"]
    for file in files:
        began = time.monotonic()
        done = subprocess.run(
            [*command, str(file)], cwd=ROOT, env=settings, capture_output=True, text=True, check=False
        )
        last = (done.stdout.strip().splitlines() or [""])[-1]
        found = counted(last.partition(" in ")[0])
        if done.returncode and not found["failed"] + found["error"]:
            found["failed"] += 1
        counts[file.stem] = found
        print(f"{file.name}: {last or 'no answer'} ({time.monotonic() - began:.0f} s)", flush=True)
        if done.returncode:
            print(done.stdout[-6000:], done.stderr[-2000:], flush=True)
    return counts


def failures(found: Counter[str]) -> int:
    """How many tests failed, or could not be run."""
    return found["failed"] + found["error"]


def row(python: str, torch: str, demos: str, counts: dict[str, Counter[str]]) -> str:
    """A row of the table in docs/compatibility.md."""
    tests = (f"`{name}` {it['passed']} / {failures(it)} / {it['skipped']}" for name, it in counts.items())
    return f"| {python} | {torch} | {demos} | {', '.join(tests)} |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--torch", metavar="VERSION", help="2.5.0 say (default: everything as in constraints.txt)")
    parser.add_argument("--python", default=sys.executable, help="the interpreter (default: this one)")
    parser.add_argument("--numpy", help="what NumPy has to be, '<2.2' say (default: >=1.26)")
    parser.add_argument("tests", nargs="*", type=Path, help="test files (default: those of the guard itself)")
    asked = parser.parse_args()
    files = asked.tests or [ROOT / "tests" / f"test_{name}.py" for name in FILES]
    with tempfile.TemporaryDirectory(prefix="torchguard-compat-") as folder:
        interpreter = environment(asked.python, packages(asked.torch, asked.numpy), Path(folder) / "env")
        # Compiles the part in C beside its source for this Python; where that fails it is said, and Python does it all.
        install = [interpreter, "-m", "pip", "install", "--quiet", "--no-deps", "--editable", str(ROOT)]
        subprocess.run(install, check=False)
        settings = {**os.environ, "PYTHONPATH": str(ROOT)}
        demos = [
            subprocess.run([interpreter, *demo], cwd=ROOT, env=settings, check=False).returncode
            for demo in (["-m", "torchguard", "demo"], ["examples/demo.py"])
        ]
        counts = run_tests(interpreter, files)
        ask = "import platform, torch; print(platform.python_version(), torch.__version__)"
        versions = subprocess.run([interpreter, "-c", ask], capture_output=True, text=True, check=True).stdout.split()
        print(row(versions[0], versions[1], "failed" if any(demos) else "both", counts))
    return int(any(demos) or any(failures(found) for found in counts.values()))


if __name__ == "__main__":
    sys.exit(main())
