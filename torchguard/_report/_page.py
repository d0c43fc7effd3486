"""What does a report look like as a page?"""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from torchguard._report._highlight import highlight, visible
from torchguard._report._records import Report, ReportError, Site, counted


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
    source = files("torchguard._report").joinpath("page.html").read_text(encoding="utf-8")
    findings, answered = report.findings, report.answered
    return environment.from_string(source).render(
        title=_title(findings),
        summary=report.summary(),
        findings=[_view(report, site) for site in findings],
        answered=[_view(report, site) for site in answered],
        processes=sorted(report.processes.values(), key=lambda one: (one.rank is None, one.rank or 0, one.name)),
        notes=report.told(),
        unwatched=sorted(report.unwatched),
        records=list(report.records()),
    )


def _title(findings: list[Site]) -> str:
    if not findings:
        return "No silent write to a saved tensor"
    return f"{counted(len(findings), 'site')} with a silent write to a saved tensor"


def _view(report: Report, site: Site) -> dict[str, Any]:
    violation = site.as_violation()
    steps = []
    corrupt = False
    for label, place, note in site.steps():
        corrupt = corrupt or label == "written"
        steps.append({"label": label, "place": place, "note": note, "corrupt": corrupt})
    return {
        "id": site.id,
        "headline": violation.headline,
        "kind": violation.kind,
        "caught": violation.caught,
        "times": counted(site.times, "hit"),
        "ranks": report.ranks(site),
        "reason": site.reason,
        "suppressed": site.suppressed is not None,
        "steps": steps,
        "excerpts": _excerpts(site),
        "explanation": violation.explanation,
        "ways_out": [line.partition(": ") for line in violation.ways_out],
        "hits": [
            {"process": report.processes[hit.process], "thread": hit.thread, "test": hit.test, "times": times}
            for hit, times in sorted(
                site.hits.items(), key=lambda item: (report.processes[item[0].process].name, str(item[0]))
            )
        ],
    }


def _excerpts(site: Site) -> list[dict[str, Any]]:
    """The lines around the places, file by file; lines that are shown for two places are shown once."""
    by_file: dict[str, tuple[dict[int, str], dict[int, list[str]]]] = {}
    for label, place, _ in site.steps():
        if place is None:
            continue
        lines, marks = by_file.setdefault(place["path"] or place["file"], ({}, {}))
        context = place["context"] or {"first": place["line"], "lines": [place["source"]]}
        lines.update(enumerate(context["lines"], context["first"]))
        marks.setdefault(place["line"], []).append(label)
    return [{"file": file, "rows": _rows(lines, marks)} for file, (lines, marks) in by_file.items()]


def _rows(lines: dict[int, str], marks: dict[int, list[str]]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    before = None
    for number in sorted(lines):
        gap = before is not None and number != before + 1
        rows.append({"gap": gap, "number": number, "marks": marks.get(number, []), "pieces": highlight(lines[number])})
        before = number
    return rows
