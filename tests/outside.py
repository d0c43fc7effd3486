"""How do tests run programs as users do: in processes of their own, with the package installed?"""

from __future__ import annotations

import functools
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torchguard

ROOT = Path(torchguard.__file__).parent.parent

CORRUPT = """
import torch

def corrupt(*_):
    a = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    out = a.sigmoid()
    c = out.data
    c.zero_()
    out.sum().backward()
    return a.grad

def clean(*_):
    a = torch.tensor([1.0, 2.0, 3.0], requires_grad=True)
    out = a.sigmoid()
    out.sum().backward()
    out.data.zero_()
    return a.grad
"""

#: In what `corrupt` is shown as, wherever it is reported in one line.
LINE = "c.zero_()  zero_() through .data would corrupt a tensor saved for backward"


@functools.cache
def _installed() -> str:
    """A directory that, on the path, makes Python find the entry points of this checkout's pyproject.toml."""
    directory = tempfile.TemporaryDirectory(prefix="torchguard-entry-points-")
    _kept.append(directory)
    info = Path(directory.name) / "torchguard_autograd-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: torchguard-autograd\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text(
        "".join(f"[{group}]\n{name} = {target}\n" for group, name, target in entry_points())
    )
    return directory.name


_kept: list[tempfile.TemporaryDirectory[str]] = []


def entry_points() -> list[tuple[str, str, str]]:
    """Group, name and target of what pyproject.toml declares."""
    toml = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    project = toml.loads((ROOT / "pyproject.toml").read_text())["project"]
    groups = {**project["entry-points"], "console_scripts": project["scripts"]}
    return [(group, name, target) for group, entries in groups.items() for name, target in entries.items()]


def environment(**variables: str) -> dict[str, str]:
    """This process's environment, with the package installed and no mode asked for."""
    variables = {
        "PYTHONPATH": os.pathsep.join((_installed(), str(ROOT))),
        "OMP_NUM_THREADS": "1",
        "PYTHONWARNINGS": "",
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "1",
        **variables,
    }
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("TORCHGUARD", "PYTEST_"))}
    return {**kept, **variables}


def python(
    arguments: Sequence[str | Path], cwd: Path = ROOT, timeout: int = 100, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run Python as a user does."""
    process = subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env=environment(**variables),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)  # with its own children
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def reported(path: Path) -> list[dict[str, Any]]:
    """The records of a report in JSON lines that tell of a violation."""
    records = map(json.loads, path.read_text().splitlines())
    return [record for record in records if record["record"] == "violation"]


def sources(path: Path) -> list[str]:
    """The lines that wrote, as a report has them."""
    return [record["violation"]["written"]["source"] for record in reported(path)]


def summary(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The lines of the summary at the end of standard error."""
    lines = done.stderr.splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith("torchguard: ")]
    return lines[starts[0] :] if starts else []
