"""Where recall is on, a pass learns some examples as they are served with it; then recall is judged again."""

import json
from contextlib import closing
from pathlib import Path
from typing import Any

from agentd.store import recall
from agentd.store.database import Store
from tests.support.tiny_passes import LLAMACPP, adapt, gguf, roll, teach
from tools.daemon import DaemonProcess, eventually

SETTINGS: dict[str, Any] = {
    **LLAMACPP,
    "adapt": {
        **LLAMACPP["adapt"],
        "enabled": True,
        "trigger": {"idle": "100ms", "check": "100ms", "min_examples": 10**6},
    },
}


def verdict(daemon: DaemonProcess) -> dict[str, Any]:
    (row,) = daemon.get("/admin/tasks", admin=True).json["tasks"]
    about: dict[str, Any] = row["recall"]
    return about


def another_than(daemon: DaemonProcess, old: dict[str, Any]) -> dict[str, Any]:
    eventually(lambda: verdict(daemon)["decided_at"] != old["decided_at"], 60)
    return verdict(daemon)


def user_texts(messages: list[dict[str, str]]) -> set[str]:
    return {message["content"] for message in messages if message["role"] == "user"}


def test_some_prompts_have_corrections_and_recall_is_judged_again(tmp_path: Path) -> None:
    with DaemonProcess(gguf(tmp_path), SETTINGS) as daemon:
        daemon.start()
        teach(daemon, 60)
        (task,) = daemon.get("/admin/tasks", admin=True).json["tasks"]
        n = sum(task["examples"]["train"].values())
        daemon.stop()
        on: dict[str, Any] = {
            "active": True,
            "k": 2,
            "reason": "it helped",
            "figures": {},
            "revision": 0,
            "corrections": n,
        }
        with closing(Store(daemon.state / "agentd.db")) as store:
            assert store.do(recall.judged, "reviews", **on)
        daemon.start()
        before = verdict(daemon)
        assert (before["on"], before["reason"]) == (True, "it helped")
        row = adapt(daemon, method="suffix-bp", blocks=1, zo_steps=0)
        assert row["state"] == "committed", row["reason"]

        events = daemon.get(f"/admin/passes/{row['id']}", admin=True).json["events"]
        (said,) = [event["message"] for event in events if event["kind"] == "recall"]
        lines = (daemon.state / "passes" / str(row["id"]) / "examples.jsonl").read_text().splitlines()
        members = [json.loads(line) for line in lines]
        prompted = [member for member in members if "recalled" in member]
        assert 0 < len(prompted) < len(members) / 2
        assert said.startswith(f"{len(prompted)} of ")
        held = daemon.get("/admin/examples?split=holdout&limit=1000", admin=True).json["examples"]
        held_out = {text for example in held for text in user_texts(example["input"]["messages"])}
        for member in prompted:
            own = user_texts(member["input"]["messages"])
            assert not own & held_out, "the gate asks without"
            recalled = {text for turn in member["recalled"]["turns"] for text in user_texts(turn)}
            assert recalled
            assert not recalled & (own | held_out)

        after = another_than(daemon, before)
        figures = after["figures"]
        assert figures["source"] == "holdout"
        if max(figures["with"].values()) <= figures["without"]:
            assert not after["on"], "the weights do as well alone"
        roll(daemon, 0)
        again = another_than(daemon, after)
        assert again["figures"]["n"] == figures["n"]
