"""Does the guard work with another torch, or another Python?

Run by ``make compat ARGS="--torch 2.5.0"``. Makes a throw-away environment (an ordinary wheel of torch brings CUDA
libraries: up to 6 GB), runs the demo, the example and the tests there, file by file, prints a row of the table in
docs/compatibility.md, and deletes the environment.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
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
    *("exports", "counterless", "audit", "repair", "recompute", "compiled", "refusals"),
)

#: Of the extra ``test`` what the tests need; the trainers' tests skip themselves where their packages are missing.
NEEDED = ("hypothesis>=6.100", "jsonschema>=4.20", "pytest>=8.2", "pytest-timeout>=2.3", "scikit-learn>=1.4")


def counted(line: str) -> Counter[str]:
    """How many tests passed, failed, ... as the last line of pytest's output tells."""
    return Counter({what.rstrip("s"): int(number) for number, what in re.findall(r"(\d+) ([a-z]+)", line)})


def environment(python: str, torch: str, numpy: str, at: Path) -> str:
    """Make an environment with this torch in the folder ``at``; its interpreter."""
    subprocess.run([python, "-m", "venv", str(at)], check=True)
    interpreter = str(at / "bin" / "python")
    packages = [f"torch=={torch}", f"numpy{numpy}", "wrapt>=1.16", "tomli>=2; python_version < '3.11'", *NEEDED]
    subprocess.run([interpreter, "-m", "pip", "install", "--quiet", "--no-cache-dir", *packages], check=True)
    return interpreter


def run_tests(interpreter: str, files: list[Path]) -> Counter[str]:
    """Run test files one by one; what does not come to an end counts as failed."""
    total: Counter[str] = Counter()
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
        total += found
        print(f"{file.name}: {last or 'no answer'} ({time.monotonic() - began:.0f} s)", flush=True)
        if done.returncode:
            print(done.stdout[-6000:], done.stderr[-2000:], flush=True)
    return total


def row(interpreter: str, total: Counter[str], demos: str, what: str) -> str:
    """A row of the table in docs/compatibility.md."""
    ask = "import platform, torch, numpy; print(platform.python_version(), torch.__version__, numpy.__version__)"
    versions = subprocess.run([interpreter, "-c", ask], capture_output=True, text=True, check=True).stdout.split()
    failed = total["failed"] + total["error"]
    counts = f"{total['passed']} / {failed} / {total['skipped']}"
    cells = (*versions, f"{platform.system()} {platform.machine()}", demos, what, counts, f"{datetime.date.today()}")
    return "| " + " | ".join(cells) + " |"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--torch", required=True, metavar="VERSION", help="version of torch, 2.5.0 say")
    parser.add_argument("--python", default=sys.executable, help="the interpreter (default: this one)")
    parser.add_argument("--numpy", default=">=1.26", help="what NumPy has to be, '<2.2' say (default: %(default)s)")
    parser.add_argument("tests", nargs="*", type=Path, help="test files (default: those of the guard itself)")
    asked = parser.parse_args()
    files = asked.tests or [ROOT / "tests" / f"test_{name}.py" for name in FILES]
    with tempfile.TemporaryDirectory(prefix="torchguard-compat-") as folder:
        interpreter = environment(asked.python, asked.torch, asked.numpy, Path(folder) / "env")
        settings = {**os.environ, "PYTHONPATH": str(ROOT)}
        demos = [
            subprocess.run([interpreter, *demo], cwd=ROOT, env=settings, check=False).returncode
            for demo in (["-m", "torchguard", "demo"], ["examples/demo.py"])
        ]
        total = run_tests(interpreter, files)
        print(row(interpreter, total, "both" if not any(demos) else "failed", f"{len(files)} files"))
    return int(any(demos) or total["failed"] + total["error"] > 0)


if __name__ == "__main__":
    sys.exit(main())
