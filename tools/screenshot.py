"""What does the page that a report makes look like? A browser takes the picture in ``docs/howto/reading.md``.

``python tools/screenshot.py`` needs Chromium (``apt-get install chromium``) and Pillow, which matplotlib brings. The
program that is reported on is the one of ``docs/howto/script.md``.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "howto" / "script.md"
PICTURE = ROOT / "docs" / "figures" / "report.png"
SIZE = (1080, 900)


def main() -> int:
    """Make the report, take the picture; the exit status."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        print("screenshot: there is no Chromium: apt-get install chromium", file=sys.stderr)
        return 1
    from PIL import Image

    program = re.search(r'```python title="train.py"\n(.*?)```', PAGE.read_text(encoding="utf-8"), re.S)
    assert program is not None
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "train.py").write_text(program[1], encoding="utf-8")
        guarded = [sys.executable, "-m", "torchguard", "--mode", "warn", "--exitcode", "0", "--report", "report.html"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run([*guarded, "train.py"], cwd=folder, env=environment, capture_output=True, check=True)
        camera = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        camera += [f"--window-size={SIZE[0]},{SIZE[1]}", "--screenshot=report.png", f"file://{folder}/report.html"]
        subprocess.run(camera, cwd=folder, capture_output=True, check=True, timeout=120)
        with Image.open(Path(folder) / "report.png") as picture:
            picture.convert("RGB").quantize(256).save(PICTURE, optimize=True)
    print(f"screenshot: {PICTURE.relative_to(ROOT)}, {PICTURE.stat().st_size / 1000:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
