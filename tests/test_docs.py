"""Are the pages true: do their examples do what they show, and is every page built into the documentation?"""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pages
import pytest
from report_samples import faults
from sarif_subset import SCHEMA

import torchguard
from torchguard import _suppressions

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

import gallery
import griffe_roles

ROOT = Path(__file__).resolve().parent.parent
HOWTO = ROOT / "docs" / "howto"
PAGE = (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")


def test_the_tutorial_does_what_it_shows() -> None:
    page = ROOT / "docs" / "tutorial.md"
    found = doctest.testfile(str(page), module_relative=False, optionflags=doctest.ELLIPSIS)
    assert found.attempted == page.read_text(encoding="utf-8").count("\n>>> ") > 20
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
    sections = PAGE.split("\n## ")[1:]
    assert len(sections) == len(scripts)
    assert all("\nUpstream: " in section for section in sections), "where it was reported, or that we know no report"


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in (ROOT / "docs").rglob("*.md"):
        assert page.relative_to(ROOT / "docs").as_posix() in navigation


# ---- examples --------------------------------------------------------------------------------------------------------

DONE = [
    ROOT / "README.md",
    *(ROOT / "docs" / f"{name}.md" for name in ("index", "tutorial", "choosing", "switching-on", "reports")),
    *sorted(HOWTO.glob("*.md")),
]
NEEDS = {"lightning": "lightning", "transformers": "transformers"}


@pytest.mark.parametrize("page", DONE, ids=lambda page: page.stem)
def test_a_page_does_what_it_shows(page: Path, tmp_path: Path) -> None:
    needed = NEEDS.get(page.stem, "torch")
    if importlib.util.find_spec(needed) is None:  # not imported here: Lightning replaces torch.compile
        pytest.skip(f"needs {needed}")
    assert pages.do(page.read_text(encoding="utf-8"), tmp_path) > 0


#: Made of scripts, and compared with what they print, by a test above; commands for those who develop.
SHOWN = {"gallery", "compatibility", "performance", "reference"}


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))], ids=lambda page: page.stem
)
def test_every_example_is_on_a_page_that_is_done(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    languages = {block.language for block in pages.blocks(text) if block.title or block.language != "text"}
    if page in DONE:
        assert all(block.title for block in pages.blocks(text) if block.language == "python")
        languages -= {"pycon"} if page.stem == "tutorial" else set()
        assert languages <= {"console", "python", "text", "toml", "yaml", "ini", "bash", ""}, languages
    elif page.stem not in SHOWN:
        assert languages <= {""}, "an example that no test runs"
    if page.stem not in SHOWN:  # indented code is no block to pages.py
        prose = re.sub(r"^( *)```.*?^\1```$", "", text, flags=re.M | re.S)
        told = re.findall(r"(?<=\n\n) {4}\S.*", prose)
        assert all(re.match(r" {4}(make|pip install) ", line) for line in told), told


@pytest.mark.parametrize("page", DONE, ids=lambda page: page.stem)
def test_every_program_of_a_page_is_a_file_that_a_command_uses(page: Path) -> None:
    blocks = pages.blocks(page.read_text(encoding="utf-8"))
    programs = [block.title for block in blocks if block.language == "python"]
    text = "".join(block.text for block in blocks)
    for title in programs:
        stem = Path(title).stem
        assert re.search(rf"(?:{re.escape(title)}|(?:from|import) (?:\w+\.)*{stem}|pytest .*)\b", text), title


def test_what_is_printed_otherwise_than_shown_is_told(tmp_path: Path) -> None:
    page = '```python title="a.py"\nprint("one\\ntwo")\n```\n\n```console\n$ python a.py\n{}\n```\n'
    assert pages.do(page.format("one\n..."), tmp_path) == 1
    with pytest.raises(AssertionError, match="--- printed\none\ntwo\n"):
        pages.do(page.format("one"), tmp_path)
    with pytest.raises(AssertionError, match=r"false\nended with 1"):
        pages.do("```console\n$ false\n$ true\n```\n", tmp_path)
    assert pages.do("```console\n$ false\n$ echo $?\n1\n```\n", tmp_path) == 2


def test_the_workflow_is_one_and_its_commands_make_the_report_that_it_hands_in(tmp_path: Path) -> None:
    yaml = pytest.importorskip("yaml")
    for block in pages.blocks((HOWTO / "ci.md").read_text(encoding="utf-8")):
        if block.title:
            file = tmp_path / block.title
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(block.text, encoding="utf-8")
    workflow: dict[Any, Any] = yaml.safe_load((tmp_path / ".github" / "workflows" / "torchguard.yml").read_text())
    assert set(workflow) == {"name", True, "permissions", "jobs"}  # True: YAML 1.1 has it that "on" is a truth value
    assert workflow["permissions"]["security-events"] == "write"
    (job,) = workflow["jobs"].values()
    assert set(job) == {"runs-on", "steps"}
    steps = job["steps"]
    for step in steps:
        assert set(step) <= {"name", "uses", "with", "run", "if"}
        assert ("uses" in step) != ("run" in step)
        assert re.fullmatch(r"[\w-]+(/[\w-]+)+@v\d+", step.get("uses", "actions/checkout@v1"))
    install, tests = (step["run"] for step in steps if "run" in step)
    assert all(line.startswith("pip install ") for line in install.splitlines())
    assert '"torchguard-autograd"' in (ROOT / "pyproject.toml").read_text()
    (upload,) = [step for step in steps if "upload-sarif" in step.get("uses", "")]
    assert upload["if"] == "${{ !cancelled() }}"
    (tmp_path / ".git").mkdir()
    status, printed = pages.say(tests, tmp_path)
    assert (status, "1 failed" in printed) == (1, True), printed
    report = json.loads((tmp_path / upload["with"]["sarif_file"]).read_text())
    assert faults(report, SCHEMA, SCHEMA) == []
    assert [result["level"] for result in report["runs"][0]["results"]] == ["error"]
    (tmp_path / "tests" / "test_model.py").write_text("def test_nothing():\n    pass\n")
    status, printed = pages.say(tests, tmp_path)
    assert status == 0, printed
    report = json.loads((tmp_path / upload["with"]["sarif_file"]).read_text())
    assert (faults(report, SCHEMA, SCHEMA), report["runs"][0]["results"]) == ([], [])


def test_every_kind_of_violation_is_explained() -> None:
    page = (HOWTO / "reading.md").read_text(encoding="utf-8").partition("\n## Kinds\n")[2]
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.M)) == set(_suppressions.KINDS)


# ---- the README ------------------------------------------------------------------------------------------------------


def test_the_readme_is_one_screen_with_what_belongs_there() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 70
    for command in ("make demo", "make test"):
        assert command in text
    for mode in ("strict", "warn", "repair", "audit", "watch"):
        assert f"`{mode}(" in text
    shares = [f"{int(share) / 100:.2f}" for share in re.findall(r"(\d+) %", text)]
    performance = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert shares
    assert all(f"| {share} |" in performance for share in shares), "what performance.md says is not what README says"


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    """In pages that mkdocs does not build."""
    links = re.findall(r"\]\(([^)]+)\)", page.read_text(encoding="utf-8"))
    assert links
    for link in links:
        file, _, _ = link.partition("#")
        assert "://" in link or (ROOT / file).is_file(), link


# ---- the reference ---------------------------------------------------------------------------------------------------


def test_every_public_name_is_in_the_reference() -> None:
    reference = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    named = re.findall(r"^::: (\S+)$", reference, re.M)
    assert {f"torchguard.{name}" for name in torchguard.__all__} <= set(named)
    for integration in ("lightning", "transformers"):
        assert f"torchguard.integrations.{integration}.TorchguardCallback" in named
    for name in named:
        module, _, attribute = name.rpartition(".")
        if not module.startswith("torchguard.integrations"):
            assert hasattr(importlib.import_module(module), attribute)


def test_roles_become_links_where_there_is_an_entry_and_code_where_not() -> None:
    text = "See :class:`Guard`, :func:`torchguard.allow`, :meth:`leave` and ``x``."
    public = {"Guard": "torchguard.Guard", "allow": "torchguard.allow"}
    assert griffe_roles.linked(text, public) == (
        "See [`Guard`][torchguard.Guard], [`allow`][torchguard.allow], `leave` and ``x``."
    )


# ---- the map ---------------------------------------------------------------------------------------------------------

MODULES = {path.stem for path in (ROOT / "torchguard").glob("*.py")} - {"__init__"}


def test_every_module_is_on_the_map() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`(\w+)\.py`", text)) >= MODULES
    for package in ("_report", "integrations"):
        (row,) = re.findall(rf"^\| `{package}/` \|.*", text, re.M)
        modules = {path.stem for path in (ROOT / "torchguard" / package).glob("*.py")} - {"__init__"}
        assert set(re.findall(r"`(\w+)`", row)) == modules


@pytest.mark.parametrize("page", ["CONTRIBUTING.md", "docs/how-it-works.md"])
def test_no_page_speaks_of_a_module_that_is_gone(page: str) -> None:
    named = set(re.findall(r"`(_\w+)\.py`", (ROOT / page).read_text(encoding="utf-8")))
    assert named
    assert named <= MODULES | {"_torchguard_autostart"}
