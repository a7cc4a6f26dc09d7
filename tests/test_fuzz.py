"""The short version of tools/fuzz.py: the daemon's own OpenAPI document, over the socket."""

import json
import sys
from pathlib import Path

import pytest
from daemon_process import DaemonProcess, shared

from agentd.api import schemas
from tools.processes import TinyDaemon


def test_the_document_names_every_path_and_the_handlers_own_schemas(model_path: Path) -> None:
    daemon: DaemonProcess = shared(model_path)
    document = daemon.get("/openapi.json", admin=True).json
    assert {"/v1/chat/completions", "/v1/feedback", "/admin/forget", "/admin/passes/{id}"} <= document["paths"].keys()
    public = daemon.get("/openapi.json").json
    assert not [path for path in public["paths"] if path.startswith("/admin")]
    body = document["components"]["schemas"]["ChatCompletion"]
    assert body["properties"].keys() == schemas.ChatCompletion.model_fields.keys()
    assert body["additionalProperties"] is False
    references = set(json.dumps(document).split('"#/components/schemas/')[1:])
    assert {reference.split('"')[0] for reference in references} <= document["components"]["schemas"].keys()


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Schemathesis needs Python 3.11")
def test_nothing_that_schemathesis_thinks_of_breaks_it(capsys: pytest.CaptureFixture[str]) -> None:
    from tools.fuzz import fuzz

    with TinyDaemon() as daemon:
        report = fuzz(daemon.admin.path, daemon.pids(), cases=1000, limit=40)
        log = daemon.log.read_text()
    with capsys.disabled():
        print(f"\nfuzz: {report.told()}")
    assert not report.problems, report.told()
    assert report.cases >= 300
    assert report.statuses[200] > 50
    assert report.statuses[400] > 50
    assert "Traceback" not in log, log[-3000:]
