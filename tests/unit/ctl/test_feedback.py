import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.scripted_daemon import RECORDED, Answer, ScriptedDaemon

LAST = RECORDED["GET /admin/inferences"]["inferences"][0]["id"]


@pytest.fixture
def daemon() -> Iterator[ScriptedDaemon]:
    with ScriptedDaemon() as daemon:
        yield daemon


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--label", "positive"], {"kind": "label", "value": "positive"}),
        (["--demonstration", "-"], {"kind": "demonstration", "value": "typed text"}),
        (["--boolean", "no"], {"kind": "boolean", "value": False}),
        (["--float", "0"], {"kind": "float", "value": 0.0}),
        (["--chosen", "a"], {"kind": "preference", "value": {"chosen": "a"}}),
        (["--chosen", "a", "--rejected", "b"], {"kind": "preference", "value": {"chosen": "a", "rejected": "b"}}),
        (["--comment", "hm"], {"kind": "comment", "value": "hm"}),
    ],
)
def test_add_sends_each_kind(daemon: ScriptedDaemon, arguments: list[str], expected: dict[str, Any]) -> None:
    result = daemon.run("feedback", "add", "last", *arguments, stdin="typed text")
    assert result.returncode == 0
    assert daemon.asked_for("POST /v1/feedback")[0].json == {"inference_id": LAST, "source": "human"} | expected


def test_add_sends_all_that_is_said_about_it(daemon: ScriptedDaemon) -> None:
    options = [
        "--task",
        "t",
        "--choice",
        "a",
        "--choice",
        "b",
        "--source",
        "program",
        "--tag",
        "who=me=x",
        "--key",
        "k",
    ]
    daemon.run("feedback", "add", "019c", "--label", "a", *options)
    assert daemon.asked_for("POST /v1/feedback")[0].json == {
        "inference_id": "019c",
        "kind": "label",
        "value": "a",
        "task": "t",
        "choices": ["a", "b"],
        "source": "program",
        "tags": {"who": "me=x"},
        "idempotency_key": "k",
    }


def test_import_sends_the_file_as_it_is(daemon: ScriptedDaemon, tmp_path: Path) -> None:
    lines = '{"task": "s", "text": "schön", "label": "positive"}\n\n{"task": "s", "text": "b", "label": "negative"}\n'
    file = tmp_path / "examples.jsonl"
    file.write_text(lines, encoding="utf-8")
    result = daemon.run("feedback", "import", str(file))
    assert result.stdout == "added\t2\nreplaced\t0\nunchanged\t0\ntasks.sentiment\t2\n"
    assert daemon.run("feedback", "import", "-", stdin=lines).returncode == 0
    assert [request.body for request in daemon.asked_for("POST /v1/examples")] == [lines.encode()] * 2


def test_import_names_the_file_and_the_line_that_is_broken(daemon: ScriptedDaemon, tmp_path: Path) -> None:
    message = "line 2: not a JSON object; nothing of this file was stored"
    daemon.refuse("POST /v1/examples", 400, message, "invalid_line")
    file = tmp_path / "broken.jsonl"
    file.write_text('{"task": "s", "text": "a", "label": "positive"}\n{broken\n')
    result = daemon.run("feedback", "import", str(file))
    assert (result.returncode, result.stdout, result.stderr) == (1, "", f"agentctl: {file}: {message}\n")


def test_list_passes_its_filters_on(daemon: ScriptedDaemon) -> None:
    result = daemon.run("feedback", "list", "--kind", "label", "--task", "sentiment", "-n", "5", "--offset", "10")
    assert [line.split("\t")[8] for line in result.stdout.splitlines()] == ["positive", "false"]
    query = daemon.asked_for("GET /admin/feedback")[0].query
    assert query == {"limit": "5", "offset": "10", "kind": "label", "task": "sentiment"}


def test_export_reads_every_page_and_each_row_once(daemon: ScriptedDaemon) -> None:
    rows = [RECORDED["GET /admin/feedback"]["feedback"][0] | {"id": str(number)} for number in range(4)]
    pages = [rows[:2], rows[1:4], []]  # a new row arrived after the first page, and moved the rest by one
    daemon.on("GET /admin/feedback", *(Answer({"feedback": page, "total": 4}) for page in pages))
    exported = [json.loads(line) for line in daemon.run("feedback", "export").stdout.splitlines()]
    assert exported == rows
    assert [request.query["offset"] for request in daemon.asked_for("GET /admin/feedback")] == ["0", "2", "5"]


def test_exported_examples_can_be_imported(daemon: ScriptedDaemon) -> None:
    page = RECORDED["GET /admin/examples"]
    daemon.on("GET /admin/examples", Answer(page), Answer(page | {"examples": []}))
    lines = [json.loads(line) for line in daemon.run("feedback", "export", "--examples").stdout.splitlines()]
    messages = page["examples"][0]["input"]["messages"]
    said = {"role": "assistant", "content": "positive"}
    assert lines == [
        {"task": "sentiment", "messages": [*messages, said], "label": "positive"},
        {"task": "sentiment", "messages": [*messages, {"role": "assistant", "content": "It was fine."}]},
    ]
