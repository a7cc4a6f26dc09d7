"""The short version of tools/fuzz.py: the daemon's own OpenAPI document, over the socket."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from agentd.api import schemas
from tests.support.daemon import shared
from tools.daemon import DaemonProcess


def test_the_document_names_every_path_and_the_handlers_own_schemas(model_path: Path) -> None:
    daemon: DaemonProcess = shared(model_path)
    document = daemon.get("/openapi.json", admin=True).json
    assert {"/v1/chat/completions", "/v1/feedback", "/admin/forget", "/admin/passes/{id}"} <= document["paths"].keys()
    public = daemon.get("/openapi.json").json
    assert not [path for path in public["paths"] if path.startswith("/admin")]
    body = document["components"]["schemas"]["ChatCompletion"]
    assert body["properties"].keys() == schemas.ChatCompletion.model_fields.keys()
    assert body["additionalProperties"] is True  # of others, named in a header
    assert document["components"]["schemas"]["FeedbackBody"]["additionalProperties"] is False
    references = set(json.dumps(document).split('"#/components/schemas/')[1:])
    assert {reference.split('"')[0] for reference in references} <= document["components"]["schemas"].keys()


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Schemathesis needs Python 3.11")
def test_nothing_that_schemathesis_thinks_of_breaks_it(note: Callable[[str], None]) -> None:
    from tools.fuzz import fuzz

    with DaemonProcess() as daemon:
        daemon.start()
        report = fuzz(daemon.admin, daemon.pids(), cases=500, limit=300)
        log = daemon.log
    note(f"fuzz: {report.summary()}")
    assert not report.problems, report.summary()
    assert report.cases >= 300
    assert report.statuses[200] > 50
    assert report.statuses[400] > 50
    assert "Traceback" not in log, log[-3000:]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tools.intruders needs Schemathesis, which needs Python 3.11")
def test_no_one_gets_in_where_they_may_not(note: Callable[[str], None]) -> None:
    from tools import intruders

    report = intruders.run(cases=400, limit=120)
    note(f"fuzz: {report.summary()}")
    assert not report.problems, report.summary()
    assert report.cases >= 300
    assert {*report.statuses} >= {"no key", "wrong key", "malformed header", "key for ask", "written by hand"}
    assert report.statuses["no key"][401] > 20
    assert report.statuses["wrong key"][429] > 20
    assert report.statuses["key for admin"][200] > 5


@pytest.mark.exclusive
@pytest.mark.skipif(sys.version_info < (3, 11), reason="tools.fuzz needs Schemathesis, which needs Python 3.11")
def test_hostile_schemas_and_grammars_do_no_harm(note: Callable[[str], None]) -> None:
    from tools.fuzz import hostile

    with DaemonProcess() as daemon:
        daemon.start()
        report, problems = hostile(daemon.admin, daemon.pids(), cases=96, limit=60)
        restarts = daemon.status()["engine_restarts"]
    note(f"fuzz: {report.summary()}")
    assert not problems, problems
    assert report.cases.total() >= 24
    assert report.statuses.keys() == {200, 400}
    assert restarts == 0
