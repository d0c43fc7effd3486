"""How does a report read as SARIF 2.1.0, for code-scanning services and editors?

Locations are relative to the repository root. What the memory went through is told twice: as related locations, to
which the message links, and as a code flow. Numbers like §3.27.17 are sections of the standard.
"""

from __future__ import annotations

from pathlib import PurePath
from typing import Any
from urllib.parse import quote

from torchguard._report._records import SITE, Process, Report, Site, digest

SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"

_ROOT = "%SRCROOT%"

_RULES = {
    "write": ("silent-write", "A saved tensor is written to through an alias that autograd does not watch."),
    "uncounted": ("uncounted-write", "A saved tensor is written to by an operation that moves no version counter."),
    "rebind": ("rebound-data", "A saved tensor is pointed at other memory by assigning to its .data."),
    "unseen": ("unseen-write", "A saved tensor was written to by a call that only a version counter gave away."),
    "exported": (
        "outside-write",
        "A saved tensor was written to from outside torch: by NumPy, DLPack, another process.",
    ),
    "unchecked": (
        "unchecked-write",
        "A saved tensor is written to under save hooks, where PyTorch compares no versions.",
    ),
    "stashed": ("stashed-write", "A tensor that a compiled Function stashed on its ctx is written to."),
    "wrapped": (
        "wrapped-write",
        "What is inside a saved tensor, a nested one or a DTensor, is written to below autograd.",
    ),
    "tracked": ("tracked-write", "A saved tensor is written to in sight of autograd; PyTorch would refuse to use it."),
    "refused": ("refused-write", "A saved tensor was written to through .data; PyTorch's own check refuses it."),
    "invisible": ("invisible-write", "A saved tensor was written to by code that no Python sees."),
    "recompute": ("changed-recomputation", "A tensor that a checkpoint reads again in backward is written to."),
}
_KINDS = list(_RULES)
_HELP = (
    "Backward would use the changed memory and finish with wrong gradients and no error. Do the write after "
    "backward(), or on a clone; to have autograd check it, write through detach() under torch.no_grad()."
)


def document(report: Report) -> dict[str, Any]:
    """The report as a SARIF log with one run."""
    rules = [
        {
            "id": identity,
            "shortDescription": {"text": short},
            "fullDescription": {"text": f"{short} {_HELP}"},
            "help": {"text": _HELP},
            "defaultConfiguration": {"level": "error"},
            "properties": {"tags": ["correctness", "autograd"], "precision": "very-high"},
        }
        for identity, short in _RULES.values()
    ]
    run: dict[str, Any] = {
        "tool": {"driver": {"name": "torchguard", "rules": rules}},
        "originalUriBaseIds": {_ROOT: {"description": {"text": "The root of the repository."}}},
        "columnKind": "unicodeCodePoints",
        "invocations": [_invocation(process) for process in report.processes.values()],
        "results": _results(report),
        "properties": {"torchguard": list(report.records())},
    }
    notes = [{"level": "warning", "message": {"text": _escaped(note)}} for note in report.told()]
    notes += [{"level": "note", "message": {"text": _escaped(f"not watched: {what}")}} for what in report.unwatched]
    if notes:
        # They belong to the reading of the reports, not to one of the processes.
        run["invocations"].append({"executionSuccessful": True, "toolExecutionNotifications": notes})
    return {"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}


def _invocation(process: Process) -> dict[str, Any]:
    told: dict[str, Any] = {
        "executionSuccessful": bool(process.ended),
        "processId": process.pid,
        "machine": process.host,
    }
    for name, time in (("startTimeUtc", process.started), ("endTimeUtc", process.ended)):
        if time:
            told[name] = time.replace("+00:00", "Z")
    told["properties"] = {"rank": process.rank, "versions": process.versions}
    return told


def _results(report: Report) -> list[dict[str, Any]]:
    seen: dict[str, int] = {}
    results = []
    for site in sorted(report.sites.values(), key=_position):
        fingerprint = _fingerprint(site)
        seen[fingerprint] = seen.get(fingerprint, 0) + 1
        results.append(_result(report, site, f"{fingerprint}:{seen[fingerprint]}"))
    return results


def _position(site: Site) -> tuple[Any, ...]:
    places = (site.place("written") or {}, site.place("saved") or {})
    return (*((place.get("path") or place.get("file", ""), place.get("line", 0)) for place in places), site.id)


def _fingerprint(site: Site) -> str:
    # No line numbers: an edit further up in the file does not make it another finding.
    places = [
        place and [place["path"] or place["file"], place["function"], place["source"], place["expression"]]
        for place in map(site.place, SITE)
    ]
    return digest([site.violation["kind"], site.violation["operation"], *places])


def _result(report: Report, site: Site, fingerprint: str) -> dict[str, Any]:
    violation = site.as_violation()
    steps = site.steps()
    main = site.place("written") or site.place("read") or site.place("saved")
    related = [
        {"id": number, **_location(place), "message": {"text": _escaped(f"{label} here{f': {note}' if note else ''}")}}
        for number, (label, place, note) in enumerate(steps, 1)
        if place is not None and place is not main
    ]
    links = {
        label: number for number, (label, place, _) in enumerate(steps, 1) if place is not None and place is not main
    }
    text = _escaped(violation.headline)
    if "saved" in links:
        text += f". It was saved [here]({links['saved']})"
    if "aliased" in links:
        text += f", and the alias was taken [here]({links['aliased']})"
    text += ". " + _escaped(f"{violation.explanation} {violation.ways_out[0]}")
    identity, _ = _RULES[violation.kind]
    result: dict[str, Any] = {
        "ruleId": identity,
        "ruleIndex": _KINDS.index(violation.kind),
        "level": "error",
        "message": {"text": text},
        "locations": [_location(main)] if main else [],
        "relatedLocations": related,
        "partialFingerprints": {"torchguardSite/v1": fingerprint},
        # Present for all results or for none (§3.27.23).
        "suppressions": _suppressions(site),
        "occurrenceCount": max(1, site.times),
        "properties": {
            "ranks": report.ranks(site),
            "threads": sorted({hit.thread for hit in site.hits}),
            "tests": sorted({hit.test for hit in site.hits if hit.test}),
        },
    }
    if site.line_hash:
        result["partialFingerprints"]["primaryLocationLineHash"] = site.line_hash
    flow = [
        {"location": {**_location(place), "message": {"text": _escaped(f"{label}{f': {note}' if note else ''}")}}}
        for label, place, note in steps
        if place is not None
    ]
    if flow:
        result["codeFlows"] = [{"threadFlows": [{"locations": flow}]}]
    return result


def _suppressions(site: Site) -> list[dict[str, str]]:
    found = []
    if site.violation["allowed"] is not None:
        found.append({"kind": "inSource", "status": "accepted", "justification": site.violation["allowed"]})
    if site.suppressed is not None:
        found.append({"kind": "external", "status": "accepted", "justification": site.suppressed})
    return found


def _location(place: dict[str, Any]) -> dict[str, Any]:
    line = max(1, place["line"])
    region: dict[str, Any] = {"startLine": line}
    if place["source"]:
        region["snippet"] = {"text": place["source"]}
    physical: dict[str, Any] = {"artifactLocation": _artifact(place), "region": region}
    context = place["context"]
    if context and context["lines"] and context["first"] >= 1:
        lines = context["lines"]
        physical["contextRegion"] = {
            "startLine": context["first"],
            "endLine": context["first"] + len(lines) - 1,
            "snippet": {"text": "\n".join(lines)},
        }
    location: dict[str, Any] = {"physicalLocation": physical}
    if place["function"]:
        location["logicalLocations"] = [{"fullyQualifiedName": place["function"], "kind": "function"}]
    return location


def _artifact(place: dict[str, Any]) -> dict[str, Any]:
    if place["path"] is not None:
        return {"uri": _quoted(place["path"]), "uriBaseId": _ROOT}
    path = PurePath(place["file"])
    return {"uri": f"file://{_quoted(path.as_posix())}" if path.is_absolute() else _quoted(place["file"])}


def _quoted(path: str) -> str:
    return quote(path.encode("utf-8", "surrogatepass"), safe="/~-._")


def _escaped(text: str) -> str:
    """Braces are placeholders (§3.11.5) and ``[a](1)`` is a link (§3.11.6): what users wrote is neither."""
    return text.replace("{", "{{").replace("}", "}}").replace("](", "] (")
