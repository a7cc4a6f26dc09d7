"""Learning everything again from the base: judged against what serves, and taken back as any other revision."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.tiny_passes import (
    LLAMACPP,
    SETTINGS,
    adapt,
    begin,
    ctl,
    examples,
    finished,
    gguf,
    progress,
    roll,
    teach,
)
from tools.daemon import DaemonProcess, eventually


def serving(daemon: DaemonProcess) -> int:
    number: int = daemon.status()["revision"]
    return number


def revision(daemon: DaemonProcess, number: int) -> dict[str, Any]:
    row: dict[str, Any] = daemon.get(f"/admin/revisions/{number}", admin=True).json
    return row


LEARN: dict[str, dict[str, Any]] = {
    "llamacpp": {"method": "suffix-bp", "blocks": 1, "zo_steps": 0},
    "transformers": {"method": "lora"},
}


@pytest.fixture(scope="module", params=list(LEARN))
def daemon(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    """What a pass has learned serves."""
    settings = {**(LLAMACPP if request.param == "llamacpp" else SETTINGS)}
    settings["adapt"] = {**settings["adapt"], **LEARN[request.param]}
    with DaemonProcess(gguf(tmp_path_factory.mktemp("model")), settings) as daemon:
        daemon.start()
        refused = daemon.post("/admin/adapt", {"consolidate": True}, admin=True)
        assert (refused.status, "base model serves" in refused.error["message"]) == (409, True)
        teach(daemon)
        row = adapt(daemon)
        assert row["state"] == "committed", row["reason"]
        assert daemon.post("/v1/examples", examples(20, first=1000, length=5)).status == 200
        yield daemon


def test_everything_is_learned_again_from_the_base(daemon: DaemonProcess) -> None:
    stack = serving(daemon)
    trained = {"new": 0, "used": 0}
    for row in daemon.get("/admin/tasks", admin=True).json["tasks"]:
        trained = {state: trained[state] + row["examples"]["train"][state] for state in trained}
    plan = daemon.post("/admin/adapt", {"consolidate": True, "dry_run": True}, admin=True).json["plan"]
    assert plan["examples"]["train"] + plan["examples"]["dev"] == sum(trained.values())
    assert serving(daemon) == stack
    row = adapt(daemon, consolidate=True)
    assert (row["options"], row["n_train"]) == ({"consolidate": True}, sum(trained.values()))
    assert row["state"] in ("committed", "rejected"), row["reason"]
    if row["state"] == "rejected":  # a random model; it is as good or it is not
        assert "lost" in row["reason"]
        assert serving(daemon) == stack
        return
    again = revision(daemon, serving(daemon))
    assert (again["parent"], again["manifest"]["instead_of"], again["lineage"]) == (0, stack, [again["id"], 0])
    assert "as good" in row["gate"]["reason"]
    history = daemon.get("/admin/history", admin=True).json["activations"]
    assert "learned again from the base" in history[0]["reason"]
    answer = daemon.post("/admin/rollback", {}, admin=True)
    assert (answer.status, answer.json["revision"]) == (200, stack)
    roll(daemon, again["id"])


def test_a_kill_changes_nothing(daemon: DaemonProcess) -> None:
    stack, number = serving(daemon), begin(daemon, consolidate=True)
    eventually(lambda: progress(daemon)["phase"] in ("tap", "train", "zo", "gate"), 60)
    daemon.kill()
    daemon.start()
    row = finished(daemon, number)
    assert (row["state"], serving(daemon)) == ("failed", stack)


def test_what_is_no_consolidation_is_none(daemon: DaemonProcess, capsys: pytest.CaptureFixture[str]) -> None:
    assert ctl(daemon, "consolidate", "--dry-run", "--json") == 0
    assert '"examples"' in capsys.readouterr().out
    assert daemon.post("/admin/adapt", {"consolidate": "perhaps"}, admin=True).status == 400
