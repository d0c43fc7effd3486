"""What does each script of the gallery print, and what does the page that shows them say?

``make gallery`` runs every script in ``docs/gallery/`` and writes ``docs/gallery.md``: the script, the wrong gradient,
the report. ``make gallery ARGS=--check`` writes nothing and fails where the page is not what the scripts say.
"""

from __future__ import annotations

import argparse
import ast
import concurrent.futures
import difflib
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "docs" / "gallery"
PAGE = ROOT / "docs" / "gallery.md"

INTRODUCTION = """\
# A gallery of silent corruptions

Each script below runs in plain PyTorch to the end, without an error, and with a wrong gradient; and is refused under
`torchguard.strict()`. Some are mistakes of the program, as they are found in the wild, some are PyTorch's own. What is
shown was printed by torch 2.13.0 on a CPU; `make gallery` runs them all anew.

<!-- written by tools/gallery.py -->
"""

#: In this order on the page.
ORDER = (
    "two_losses",
    "wgan_clip",
    "rebound_parameters",
    "spectral_norm",
    "codebook",
    "adaptive_penalty",
    "learnable_fake_quantize",
    "numpy_memory",
    "fused_optimizer",
    "batch_norm",
    "checkpoint_closure",
    "save_hooks",
    "functional_transform",
    "inductor_views",
    "collective",
    "ddp_buffers",
    "dtensor_foreach",
)

_REPORT = "torchguard.SavedTensorCorruptionError: "


@dataclass(frozen=True)
class Shown:
    """A script and what it printed.

    Attributes:
        title: first line of its docstring.
        text: the rest of its docstring, Markdown.
        code: the script after its docstring.
        gradients: what it printed to standard output.
        report: what torchguard said.
    """

    title: str
    text: str
    code: str
    gradients: str
    report: str

    @property
    def page(self) -> str:
        """Its part of the page."""
        return (
            f"## {self.title}\n\n{self.text}\n\n```python\n{self.code}\n```\n\n"
            f"```text\n{self.gradients}\n```\n\n```text\n{self.report}\n```\n"
        )


def show(script: Path) -> Shown:
    """Run a script.

    Raises:
        RuntimeError: where it does not end in a report.
    """
    source = script.read_text(encoding="utf-8")
    tree = ast.parse(source)
    title, _, text = (ast.get_docstring(tree) or "").partition("\n\n")
    code = "\n".join(source.splitlines()[tree.body[0].end_lineno :]).strip()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore", "GLOO_SOCKET_IFNAME": "lo"}
    environment.pop("TORCHGUARD", None)
    done = subprocess.run(
        [sys.executable, script.name], cwd=script.parent, env=environment, capture_output=True, text=True, timeout=300
    )
    said = re.sub(r"(?m)^\[rank\d+\]: ?", "", done.stderr)  # torch marks what a rank prints as it ends
    report = said.rpartition(_REPORT)[2]
    if _REPORT not in said or "allow:" not in report:
        raise RuntimeError(f"{script.name} does not end in a report:\n{done.stdout}\n{done.stderr[-3000:]}")
    report = report[: report.index("\n", report.index("  allow:"))] if "\n" in report else report
    return Shown(title, text, code, done.stdout.strip(), _REPORT + report.strip())


def write_page(shown: list[Shown]) -> str:
    """The whole page."""
    return "\n".join([INTRODUCTION, *(one.page for one in shown)])


def main() -> int:
    """Run the scripts, write or check the page; the exit status."""
    parser = argparse.ArgumentParser(description="Run the scripts of the gallery and write docs/gallery.md.")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if the page is not up to date")
    check = parser.parse_args().check
    known = {script.stem for script in SCRIPTS.glob("*.py")}
    if known != set(ORDER):
        print(f"gallery: ORDER in {Path(__file__).name} lacks or has too much: {sorted(known ^ set(ORDER))}")
        return 1
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        page = write_page(list(pool.map(show, [SCRIPTS / f"{name}.py" for name in ORDER])))
    if not check:
        PAGE.write_text(page, encoding="utf-8")
        print(f"gallery: {len(ORDER)} scripts, written to {PAGE.relative_to(ROOT)}")
        return 0
    now = PAGE.read_text(encoding="utf-8")
    sys.stdout.writelines(difflib.unified_diff(now.splitlines(True), page.splitlines(True), "page", "scripts"))
    return int(now != page)


if __name__ == "__main__":
    sys.exit(main())
