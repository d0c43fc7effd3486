"""What does a report look like as a page?"""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from torchguard._report._highlight import highlight, visible
from torchguard._report._records import Hit, Report, ReportError, Site, counted

#: Rows of the table of who hit a site that are shown before the rest is folded.
_SHOWN = 12


def page(report: Report) -> str:
    """The report as one HTML page that needs nothing else and runs nothing.

    Raises:
        ReportError: without jinja2, which comes with torch.
    """
    try:
        import jinja2
    except ImportError:
        raise ReportError("an .html report needs jinja2, which comes with torch: pip install jinja2") from None
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["visible"] = visible
    environment.filters["time"] = lambda time: time.replace("T", " ").partition(".")[0].removesuffix("+00:00")
    source = files("torchguard._report").joinpath("page.html").read_text(encoding="utf-8")
    findings = [_view(report, site) for site in report.findings]
    answered = [_view(report, site) for site in report.answered]
    return environment.from_string(source).render(
        title=_title(report),
        numbers=_numbers(report),
        several=len(findings) + len(answered) > 1,
        findings=findings,
        answered=answered,
        most=max((one["times"] for one in findings + answered), default=1),
        processes=sorted(report.processes.values(), key=lambda one: (one.rank is None, one.rank or 0, one.name)),
        notes=report.told(),
        unwatched=sorted(report.unwatched),
        records=list(report.records()),
    )


def _title(report: Report) -> str:
    if not report.findings:
        return "No silent write to a saved tensor"
    return f"{counted(len(report.findings), 'site')} with a silent write to a saved tensor"


def _numbers(report: Report) -> list[tuple[str, int, str]]:
    """Name, number and class of what is told first."""
    findings = report.findings
    hits = [hit for site in findings for hit in site.hits]
    ranks = {process.rank for process in report.processes.values()} - {None}
    told = [
        ("sites", len(findings), "bad" if findings else "good"),
        ("hits", sum(site.times for site in findings), ""),
        ("processes", len(report.processes), ""),
        ("ranks", len(ranks), ""),
        ("threads", len({(hit.process, hit.thread) for hit in hits}), ""),
        ("tests", len({hit.test for hit in hits if hit.test}), ""),
        ("allowed or suppressed", len(report.answered), ""),
    ]
    return [entry for entry in told if entry[1] or entry[0] in ("sites", "processes")]


def _view(report: Report, site: Site) -> dict[str, Any]:
    violation = site.as_violation()
    excerpts, rows = _excerpts(site)
    hits = [
        {"process": report.processes[hit.process], "thread": hit.thread, "test": hit.test, "times": times}
        for hit, times in sorted(
            site.hits.items(), key=lambda item: (report.processes[item[0].process].name, str(item[0]))
        )
    ]
    ranks = report.ranks(site)
    tests = {hit.test for hit in site.hits if hit.test}
    where = site.place("written") or site.place("read") or site.place("saved")
    # One row alone behind a fold would take as much room as the fold.
    shown = _SHOWN if len(hits) > _SHOWN + 1 else len(hits)
    return {
        "id": site.id,
        "where": _at(where) if where else "(no user code on the stack)",
        "what": violation.operation or f"{violation.kind} write",
        "headline": violation.headline,
        "kind": violation.kind,
        "caught": violation.caught,
        "of": violation.of,
        "times": site.times,
        "counted": counted(site.times, "hit"),
        "ranks": _ranks(ranks),
        "tests": counted(len(tests), "test") if tests else "",
        "short_who": ", ".join(_who(ranks, tests, site.hits)),
        "has_shares": len(hits) > 1,
        "has_ranks": bool(ranks),
        "has_tests": bool(tests),
        "reason": site.reason,
        "suppressed": site.suppressed is not None,
        "steps": _steps(site, rows),
        "excerpts": excerpts,
        "explanation": violation.explanation,
        "ways_out": [line.partition(": ") for line in violation.ways_out],
        "hits": hits[:shown],
        "more": hits[shown:],
    }


def _ranks(ranks: list[int]) -> str:
    """``ranks 0, 1, 2``, ``ranks 0–7, 12``; ``""`` for none."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][-1] == rank - 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    told = [f"{run[0]}–{run[-1]}" if len(run) > 3 else ", ".join(map(str, run)) for run in runs]
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(told)}" if ranks else ""


def _who(ranks: list[int], tests: set[str], hits: dict[Hit, int]) -> list[str]:
    told = [_ranks(ranks)] if ranks else []
    told += [counted(len(tests), "test")] if tests else []
    threads = sorted({hit.thread for hit in hits} - {"MainThread"})
    if threads:
        told.append(visible(threads[0]) if len(threads) == 1 else counted(len(threads), "thread"))
    return told


def _at(place: dict[str, Any]) -> str:
    return f"{place['path'] or place['file']}:{place['line']}"


# ---- the life of the memory


def _steps(site: Site, rows: dict[tuple[str, int], str]) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = []
    corrupt = False
    elements = site.violation["elements"]
    for label, place, note in site.steps():
        corrupt = corrupt or label == "written"
        counts = f"{elements} of {site.violation['of']} elements" in note
        step: dict[str, Any] = {"label": label, "place": place, "note": note, "corrupt": corrupt, "ahead": False}
        step["part"] = elements if counts else None
        if place is not None:
            step["where"] = _at(place)
            step["row"] = rows[place["path"] or place["file"], place["line"]]
            step["pieces"] = highlight(place["source"])
        steps.append(step)
    if steps[-1]["label"] == "written":  # stopped there, or nobody has looked yet
        steps.append({"label": "read", "place": None, "note": "", "corrupt": True, "ahead": True, "part": None})
    return steps


# ---- the source


def _excerpts(site: Site) -> tuple[list[dict[str, Any]], dict[tuple[str, int], str]]:
    """The lines around the places, file by file, lines that are shown for two places once; and the id of the row of
    each place.
    """
    by_file: dict[str, tuple[dict[int, str], dict[int, list[str]]]] = {}
    for label, place, _ in site.steps():
        if place is None:
            continue
        lines, marks = by_file.setdefault(place["path"] or place["file"], ({}, {}))
        context = place["context"] or {"first": place["line"], "lines": [place["source"]]}
        lines.update(enumerate(context["lines"], context["first"]))
        lines.setdefault(place["line"], place["source"])  # a damaged report may have it elsewhere
        marks.setdefault(place["line"], []).append(label)
    excerpts, ids = [], {}
    for number, (file, (lines, marks)) in enumerate(by_file.items()):
        rows = _rows(lines, marks, f"row-{site.id}-{number}")
        ids.update({(file, row["number"]): row["id"] for row in rows})
        excerpts.append({"file": file, "rows": rows})
    return excerpts, ids


def _rows(lines: dict[int, str], marks: dict[int, list[str]], prefix: str) -> list[dict[str, Any]]:
    blank = {number for number, line in lines.items() if not line.strip() and number not in marks}
    for step in (1, -1):  # an excerpt neither begins nor ends with blank lines
        for number in sorted(blank, reverse=step < 0):
            if number in lines and number - step not in lines:
                del lines[number]
    lines = {number: line.expandtabs(4) for number, line in lines.items()}
    indents = [len(line) - len(line.lstrip()) for line in lines.values() if line.strip()]
    indent = min(indents, default=0)
    rows: list[dict[str, Any]] = []
    before = None
    for number in sorted(lines):
        here = marks.get(number, [])
        rows.append(
            {
                "id": f"{prefix}-{number}",
                "gap": before is not None and number != before + 1,
                "number": number,
                "marks": here,
                "bad": "written" in here or "read" in here,
                "pieces": highlight(lines[number][indent:]),
            }
        )
        before = number
    return rows
