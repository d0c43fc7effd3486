"""Do the example scripts do what they say, on real data, as people run them?"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = ["wgan_digits.py", "ema_digits.py", "actor_critic_digits.py"]


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
        check=False,
    )


def digest(done: subprocess.CompletedProcess[str]) -> str:
    found = re.search(r"^losses sha256: (\w{64})$", done.stdout, re.M)
    assert found is not None, done.stdout + done.stderr
    return found.group(1)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_right_script_is_silent_and_the_same_to_the_last_bit(script: str) -> None:
    plain, strict = (run(f"examples/{script}", "--steps", "30", "--guard", guard) for guard in ("off", "strict"))
    assert (plain.returncode, strict.returncode) == (0, 0), strict.stderr
    assert digest(plain) == digest(strict)
    assert strict.stderr == ""


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_mistake_is_silent_without_the_guard_and_refused_with_it(script: str) -> None:
    plain = run(f"examples/{script}", "--steps", "30", "--mistake")
    assert plain.returncode == 0, plain.stderr
    wrong = re.search(r"wrong by up to (\d+) %", plain.stdout)
    assert wrong is not None
    assert int(wrong.group(1)) > 0
    strict = run(f"examples/{script}", "--steps", "30", "--mistake", "--guard", "strict")
    assert strict.returncode != 0
    assert "SavedTensorCorruptionError" in strict.stderr
    assert re.search(rf"written +examples/{script}:\d+", strict.stderr), strict.stderr
    warned = run(f"examples/{script}", "--steps", "30", "--mistake", "--guard", "warn")
    assert warned.returncode == 0
    assert digest(warned) == digest(plain)
    assert "SavedTensorCorruptionWarning" in warned.stderr


def test_the_demo_shows_all_of_it() -> None:
    done = run("examples/demo.py")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "would corrupt a tensor saved for backward" in done.stdout
    assert "the same to the last bit" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr


@pytest.mark.parametrize("script", [*SCRIPTS, "demo.py"])
def test_the_other_project_of_this_name_is_told_in_one_line(script: str, tmp_path: Path) -> None:
    other = tmp_path / "torchguard"
    other.mkdir()
    (other / "__init__.py").write_text("def tensor_checked(f): return f\n")
    done = run(f"examples/{script}", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert len(done.stderr.strip().splitlines()) == 1
    assert "torchguard-autograd" in done.stderr
