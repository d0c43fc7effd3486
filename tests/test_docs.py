"""Are the pages true: do their examples do what they show, and is every page built into the documentation?"""

from __future__ import annotations

import doctest
import shutil
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import gallery

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")


def test_the_tutorial_does_what_it_shows() -> None:
    found = doctest.testfile(str(ROOT / "docs" / "tutorial.md"), module_relative=False)
    assert found.attempted > 30
    assert found.failed == 0


@pytest.mark.parametrize("name", gallery.ORDER)
def test_a_script_of_the_gallery_prints_what_the_page_shows(name: str) -> None:
    if name == "inductor_views" and not shutil.which("g++"):
        pytest.skip("inductor needs a C++ compiler")
    shown = gallery.show(ROOT / "docs" / "gallery" / f"{name}.py")
    truth, _, plain = shown.gradients.partition("plain PyTorch:")
    assert truth.removeprefix("the truth:").split() != plain.split()
    assert shown.page in PAGE


def test_every_script_is_on_the_page() -> None:
    scripts = {script.stem for script in (ROOT / "docs" / "gallery").glob("*.py")}
    assert scripts == set(gallery.ORDER)
    assert PAGE.count("\n## ") == len(scripts)


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in (ROOT / "docs").rglob("*.md"):
        assert page.relative_to(ROOT / "docs").as_posix() in navigation
