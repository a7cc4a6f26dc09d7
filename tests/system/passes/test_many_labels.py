"""Passes and answers with more labels than the engine has sequences."""

import json

import pytest

from tests.support.tiny_passes import Learner, adapt

pytestmark = pytest.mark.slow


def test_a_pass_learns_and_judges_many_labels() -> None:
    n = 140  # several groups, the last one not full; tests/engine/test_many_labels.py has other numbers
    labels = [f"c{i}" for i in range(n)]
    settings = {
        "tasks": {"parts": {"choices": labels, "prompt": "Which part is it? {text}"}},
        "adapt": {"enabled": False, "max_examples": 32, "trial": {"duration": "1s"}, "gate": {"max_holdout": 20}},
    }
    with Learner(None, settings).start() as daemon:
        lines = [{"task": "parts", "text": f"item {i}", "label": labels[i * 7 % n]} for i in range(130)]
        stored = daemon.post("/v1/examples", "\n".join(map(json.dumps, lines)).encode())
        assert stored.json["added"] == len(lines)
        row = adapt(daemon)
        assert row["state"] in ("committed", "rejected", "rolled_back"), row["reason"]
        assert row["n_train"] > 20
        judged = row["gate"]["tasks"]["parts"]
        assert judged["n"] == 20
        status = daemon.status()
        assert status["unusable_examples"] == {}
        answer = daemon.ask("Which part is it? item 3", metadata={"task": "parts"}, max_tokens=16).json
        assert answer["choices"][0]["message"]["content"] in labels
        about = {"inference_id": answer["id"], "kind": "label", "value": labels[-1]}
        assert daemon.post("/v1/feedback", about).status == 201


def test_holdout_is_judged_as_far_as_there_is_time_for_it() -> None:
    """Many long answers take a slow board hours: a pass ends all the same, and says of how many it has judged."""
    labels = [f"{i} " * 20 for i in range(8)]
    gate = {"max_holdout": 60, "min_holdout": 5, "max_time": "1ms", "max_skill_loss": 1}
    settings = {
        "tasks": {"parts": {"choices": labels, "prompt": "Which part is it? {text}"}},
        "adapt": {"enabled": False, "max_examples": 16, "trial": {"duration": "1s"}, "gate": gate},
    }
    with Learner(None, settings).start() as daemon:
        lines = [{"task": "parts", "text": f"item {i}", "label": labels[i % 8]} for i in range(200)]
        assert daemon.post("/v1/examples", "\n".join(map(json.dumps, lines)).encode()).status == 200
        row = adapt(daemon)
        assert row["state"] in ("committed", "rejected", "rolled_back"), row["reason"]
        n = row["gate"]["tasks"]["parts"]["n"]
        assert 0 < n < row["n_holdout"]
        events = daemon.get(f"/admin/passes/{row['id']}", admin=True).json["events"]
        (judged,) = [event["message"] for event in events if event["kind"] == "judged"]
        assert judged.startswith(f"{n} of {row['n_holdout']} held-out examples are judged")


def test_the_gate_says_of_what_serves_how_it_serves() -> None:
    """Of a random model all choices are about as good, so that every answer is looked at twice."""
    labels = [f"{name} {i}" for i, name in enumerate(("hall", "attic", "cellar", "roof"))]
    settings = {
        "tasks": {"parts": {"choices": labels, "prompt": "Which part is it? {text}"}},
        "adapt": {"enabled": False, "max_examples": 16, "trial": {"duration": "1s"}, "gate": {"max_skill_loss": 1}},
    }
    with Learner(None, settings).start() as daemon:
        lines = [{"task": "parts", "text": f"item {i} " * (i % 9 + 1), "label": labels[i % 4]} for i in range(130)]
        assert daemon.post("/v1/examples", "\n".join(map(json.dumps, lines)).encode()).status == 200
        held = daemon.get("/admin/examples?split=holdout&limit=100", admin=True).json["examples"]
        served = [
            daemon.post("/v1/chat/completions", {**each["input"], "metadata": {"task": "parts"}}) for each in held
        ]
        said = [answer.json["choices"][0]["message"]["content"] for answer in served]
        right = [answer == each["target"] for answer, each in zip(said, held, strict=True)]
        row = adapt(daemon)
        judged = row["gate"]["tasks"]["parts"]
        assert (judged["n"], judged["before"]["accuracy"]) == (len(held), sum(right) / len(right))
        asked = (daemon.state / "passes" / str(row["id"]) / "chosen.jsonl").read_text().splitlines()
        assert len(asked) > len(held) / 2
