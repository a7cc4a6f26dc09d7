"""The admin API on a daemon that has served a little and learned nothing."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agentd.ctl.status import summary
from tools import short_model
from tools.daemon import DaemonProcess, eventually, streaming


@pytest.fixture(scope="module")
def daemon(model_path: Path) -> Iterator[DaemonProcess]:
    """One of our own: totals are counted, and passes refused."""
    with DaemonProcess(model_path).start() as daemon:
        for i in range(5):
            id = daemon.ask(f"Question {i}", max_tokens=1).json["id"]
            kind, value = ("float", 0.5) if i % 2 else ("label", "yes")
            body = {"inference_id": id, "kind": kind, "value": value, "task": "reviews" if i < 3 else "others"}
            assert daemon.post("/v1/feedback", body).status == 201
        yield daemon


def get(daemon: DaemonProcess, path: str, status: int = 200) -> Any:
    answer = daemon.get(f"/admin/{path}", admin=True)
    assert answer.status == status, answer.body
    return answer.json if status == 200 else answer.error


def post(daemon: DaemonProcess, path: str, body: Any = None, status: int = 200) -> Any:
    answer = daemon.post(f"/admin/{path}", body, admin=True)
    assert answer.status == status, answer.body
    return answer.json if status < 300 else answer.error


DOCS = Path(__file__).parents[3] / "docs"
STATUS = {
    "backpropagation",
    "last_pass",
    "stale_examples",
    *("tcp", "keys"),
    *("version", "pid", "uptime_seconds", "model", "state", "problem", "held", "revision", "trial", "pass", "requests"),
    *("engine_restarts", "feedback", "examples", "unusable_examples", "memory", "next_trigger", "state_dir", "socket"),
}
MODEL = {"name", "path", "sha256", "n_layer", "n_embd", "n_ctx", "n_params", "size_bytes", "architecture"}


def test_status(daemon: DaemonProcess) -> None:
    status = get(daemon, "status")
    assert status.keys() == STATUS
    assert status["model"].keys() >= MODEL
    assert (status["state"], status["pid"], status["revision"]) == ("serving", daemon.pid, 0)
    assert (status["model"]["n_layer"], status["model"]["n_ctx"]) == (short_model.BLOCKS, 1024)
    assert status["requests"] == {"served": 5, "failed": 0, "active": 0, "waiting": 0}
    assert status["feedback"] == {"total": 5, "quarantined": 0}
    assert status["memory"]["processes"]["engine"] > status["memory"]["processes"]["daemon"] > 0
    assert status["memory"]["processes"]["daemon"] < 120 * 2**20
    assert status["next_trigger"]["enabled"] is False


def test_status_has_every_key_while_the_model_loads(model_path: Path) -> None:
    with DaemonProcess(model_path).start(wait=False) as daemon:
        eventually(daemon.admin.exists)
        status = get(daemon, "status")
        if status["state"] == "serving":
            pytest.skip("loaded before the first question")
        assert (status["state"], status["model"]["n_layer"]) == ("loading", None)
        assert status.keys() == STATUS
        assert status["model"].keys() >= MODEL
        assert status["model"]["architecture"] == "llama"
        assert "(llama, " in summary(status)["model"]  # what agentctl prints
        health = daemon.get("/health")
        assert (health.status, health.json["status"]) in ((503, "loading"), (200, "ok"))
        assert daemon.ask(max_tokens=1).status == 200  # waits for the engine


def test_nothing_learned_yet(daemon: DaemonProcess) -> None:
    assert get(daemon, "history")["activations"] == []
    (base,) = get(daemon, "revisions")["revisions"]
    assert (base["id"], base["state"], base["serving"], base["size_bytes"]) == (0, "base", True, 0)
    revision = get(daemon, "revisions/0")
    assert (revision["manifest"], revision["lineage"]) == (None, [0])


def test_feedback_is_filtered_and_its_total_with_it(daemon: DaemonProcess) -> None:
    assert get(daemon, "feedback")["total"] == 5
    for query, total in {"kind=label": 3, "kind=float": 2, "task=reviews": 3, "kind=label&task=reviews": 2}.items():
        page = get(daemon, f"feedback?{query}&limit=1")
        assert (page["total"], len(page["feedback"])) == (total, 1)
    assert get(daemon, "feedback?task=unknown") == {"feedback": [], "total": 0}
    assert "label, demonstration" in get(daemon, "feedback?kind=rating", 400)["message"]


def test_examples_are_filtered(daemon: DaemonProcess) -> None:
    everything = get(daemon, "examples")
    assert len(everything["examples"]) == 3
    by_split = [get(daemon, f"examples?split={split}")["examples"] for split in ("train", "holdout")]
    assert sum(map(len, by_split)) == 3
    assert len(get(daemon, "examples?task=reviews&state=new")["examples"]) == 2
    assert get(daemon, "examples?state=used")["examples"] == []
    for wrong in ("split=test", "state=old", "split=train&kind=label"):
        assert get(daemon, f"examples?{wrong}", 400)["code"] == "invalid_request"


def test_tasks_with_their_examples(daemon: DaemonProcess) -> None:
    tasks = {task["name"]: task for task in get(daemon, "tasks")["tasks"]}
    assert tasks.keys() == {"reviews", "others"}
    assert (tasks["reviews"]["source"], tasks["others"]["source"]) == ("config", "feedback")
    assert (tasks["others"]["choices"], tasks["others"]["open"]) == (["yes"], True)
    counts = tasks["reviews"]["examples"]
    assert counts["train"]["new"] + counts["holdout"] == 2


def test_pages(daemon: DaemonProcess) -> None:
    everything = [row["id"] for row in get(daemon, "inferences")["inferences"]]
    assert len(everything) == 5
    paged = [get(daemon, f"inferences?limit=2&offset={offset}")["inferences"] for offset in (0, 2, 4, 6)]
    assert [row["id"] for page in paged for row in page] == everything
    assert get(daemon, f"inferences/{everything[0]}")["input"]["messages"][0]["content"] == "Question 4"
    assert get(daemon, "inferences/unknown", 404)["code"] == "not_found"


@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        "limit=1001",
        "limit=-1",
        "limit=many",
        "limit=1.5",
        "limit=",
        "offset=-1",
        f"offset={1 << 63}",
        "page=2",
    ],
)
def test_pages_that_do_not_exist(daemon: DaemonProcess, query: str) -> None:
    for noun in ("inferences", "feedback", "examples", "passes"):
        error = get(daemon, f"{noun}?{query}", 400)
        assert error["param"] == query.partition("=")[0]


@pytest.mark.parametrize("number", ["7", "-1", "x", "1.5", "9" * 30, "9" * 5000, "%D9%A3"])
def test_numbers_of_nothing(daemon: DaemonProcess, number: str) -> None:
    for noun in ("revisions", "passes"):
        assert get(daemon, f"{noun}/{number}", 404)["code"] == "not_found"


def test_a_pass_with_nothing_to_learn_is_recorded_as_refused_with_its_reason(daemon: DaemonProcess) -> None:
    before = get(daemon, "events?limit=1000")["events"]
    number = post(daemon, "adapt", {"method": "suffix-bp", "blocks": 1}, 202)["pass"]
    eventually(lambda: get(daemon, f"passes/{number}")["pass"]["finished_at"], timeout=60)
    report = get(daemon, f"passes/{number}")
    assert (report["pass"]["state"], report["pass"]["trigger"]) == ("refused", "manual")
    assert "nothing to learn from" in report["pass"]["reason"]
    assert "gate.min_holdout" in report["pass"]["reason"]
    assert report["pass"]["options"] == {"method": "suffix-bp", "blocks": 1}
    assert get(daemon, "passes?limit=1")["passes"][0]["id"] == number
    eventually(lambda: get(daemon, "progress")["pass"]["done"])
    progress = get(daemon, "progress")["pass"]
    assert (progress["id"], progress["outcome"]) == (number, "refused")
    assert get(daemon, "status")["pass"] is None

    last = before[-1]["id"] if before else 0
    eventually(lambda: len(get(daemon, f"passes/{number}")["events"]) == 2)
    new = get(daemon, f"events?after={last}&limit=1000")["events"] if last else get(daemon, "events")["events"]
    assert [event["kind"] for event in new] == ["pass started", "pass refused"]
    assert [event["id"] for event in new] == sorted(event["id"] for event in new)
    assert get(daemon, f"events?after={new[0]['id']}")["events"] == new[1:]
    assert get(daemon, f"events?after={new[-1]['id']}")["events"] == []
    assert get(daemon, f"events?after={1 << 62}")["events"] == []


def test_a_dry_run_says_why_not_and_leaves_no_pass(daemon: DaemonProcess) -> None:
    passes = daemon.counts()["passes"]
    error = post(daemon, "adapt", {"dry_run": True}, 409)
    assert (error["code"], "nothing to learn from" in error["message"]) == ("pass_refused", True)
    assert daemon.counts()["passes"] == passes


@pytest.mark.parametrize(
    "body",
    [{"method": "magic"}, {"blocks": -1}, {"blocks": 10**30}, {"zo_steps": 10**9}, {"blocks": "4"}, {"force": True}],
)
def test_options_a_pass_does_not_have(daemon: DaemonProcess, body: dict[str, Any]) -> None:
    before = daemon.counts()
    assert post(daemon, "adapt", body, 400)["param"] == next(iter(body))
    assert daemon.counts() == before


def test_cancel_without_a_pass(daemon: DaemonProcess) -> None:
    assert post(daemon, "cancel", status=409)["code"] == "conflict"
    assert "no pass" in post(daemon, "cancel", status=409)["message"]
    assert post(daemon, "cancel", {"pass": 1}, 400)["param"] == "pass"


def test_rollback_to_what_is_not_there(daemon: DaemonProcess) -> None:
    before = daemon.counts()
    assert "nothing to go back to" in post(daemon, "rollback", status=409)["message"]
    assert "serves already" in post(daemon, "rollback", {"revision": 0}, 409)["message"]
    assert post(daemon, "rollback", {"revision": 7}, 404)["code"] == "not_found"
    for wrong in (-1, "0", 1.5, 10**30):
        assert post(daemon, "rollback", {"revision": wrong}, 400)["param"] == "revision"
    assert daemon.counts() == before


def test_speed_is_measured_while_no_one_is_served(daemon: DaemonProcess) -> None:
    inferences = daemon.get("/admin/inferences", admin=True).json
    speed = post(daemon, "speed")
    assert speed["prefill_tokens_per_second"] > 0
    assert speed["decode_tokens_per_second"] is None or speed["decode_tokens_per_second"] > 0
    assert 8 <= speed["prompt_tokens"] <= get(daemon, "status")["model"]["n_ctx"]
    assert speed["threads"] == 1
    assert daemon.get("/admin/inferences", admin=True).json == inferences
    body = {"messages": [{"role": "user", "content": "Tell."}], "max_tokens": 900, "logit_bias": {"2": -100}}
    with streaming(daemon.api, "/v1/chat/completions", body) as events:
        next(events)
        assert "are being served" in post(daemon, "speed", status=409)["message"]


def test_pause_and_resume(daemon: DaemonProcess) -> None:
    try:
        assert post(daemon, "pause") == {"paused": True}
        assert get(daemon, "status")["next_trigger"]["paused"] is True
        assert post(daemon, "pause") == {"paused": True}
    finally:
        assert post(daemon, "resume") == {"paused": False}
    assert get(daemon, "status")["next_trigger"]["paused"] is False


def test_metrics(daemon: DaemonProcess) -> None:
    answer = daemon.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain")
    samples = dict(line.rsplit(" ", 1) for line in answer.body.decode().splitlines() if not line.startswith("#"))
    assert float(samples['agentd_requests_total{outcome="served"}']) >= 5
    assert float(samples["agentd_requests_processing"]) == 0
    info = next(name for name in samples if name.startswith("agentd_revision_info"))
    assert {name for name, _ in re.findall(r'(\w+)="([^"]*)"', info)} == {"revision", "parent", "base_sha256"}
    assert 'revision="0"' in info
    names = {name.partition("{")[0] for name in samples}
    assert {"agentd_build_info", "agentd_uptime_seconds", "agentd_engine_restarts_total"} <= names
    assert all(float(value) >= 0 for value in samples.values())
    assert float(samples['agentd_tokens_total{kind="completion"}']) > 0
    n = float(samples["agentd_answer_seconds_count"])
    assert n == float(samples['agentd_answer_seconds_bucket{le="+Inf"}']) > 0
    assert float(samples['agentd_process_memory_bytes{process="engine"}']) > 1e6
    documented = set(re.findall(r"^\| `(agentd_\w+)`", (DOCS / "metrics.md").read_text(), re.MULTILINE))
    sent = {
        name for line in answer.body.decode().splitlines() if line.startswith("# TYPE ") for name in line.split()[2:3]
    }
    # of a counter without a sample only the type is sent, under its name without _total
    assert {name.removesuffix("_total") for name in documented} == {name.removesuffix("_total") for name in sent}
    queries = json.dumps([panel["targets"] for panel in json.loads((DOCS / "grafana.json").read_text())["panels"]])
    drawn = set(re.findall(r"agentd_\w+", queries))
    assert {name.removesuffix("_bucket") for name in drawn} == documented
