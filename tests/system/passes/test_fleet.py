"""Boards that learn together, as their daemons see it: rounds asked for over the admin socket by whoever speaks for a
fleet. Here the test does, and adds up what boards give as a fleet's server would."""

import base64
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agentd.learn import ledger
from agentd.learn.ledger import Ledger, Step
from agentd.revision import fleet_file
from agentd.revision.fleet_file import FleetFile
from tests.support.tiny_passes import LLAMACPP, SETTINGS, ctl, examples, gguf, said
from tools import tiny_model
from tools.daemon import Answer, DaemonProcess, eventually

pytestmark = pytest.mark.slow

FLEET = {"name": "home", "send": ["ledger", "adapter", "figures"]}
SECRET = "aaaaa"  # what all examples of label yes are made of
RUN = "run-1"


def settings(base: dict[str, Any] = SETTINGS, **fleet: Any) -> dict[str, Any]:
    gate = {**base["adapt"]["gate"], "max_regression": 1}
    return {**base, "adapt": {**base["adapt"], "gate": gate}, "fleet": {**FLEET, **fleet}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return gguf(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def boards(model: Path) -> Iterator[list[DaemonProcess]]:
    """Two, with examples of their own each."""
    with DaemonProcess(model, settings()) as one, DaemonProcess(model, settings()) as two:
        for board in (one, two):
            board.start(wait=False)
        for first, board in enumerate((one, two)):
            board.wait_until_ready()
            assert board.post("/v1/examples", examples(60, first=1000 * first, length=5)).status == 200
        yield [one, two]


def ask(board: DaemonProcess, action: str, number: int, **body: Any) -> Answer:
    facts = board.get("/admin/fleet", admin=True).json
    own = {"fleet": "home", "run": RUN, "number": number, "peer": "server:9092"}
    own |= {name: facts[name] for name in ("base_sha256", "engine", "dtype")}
    own |= {"kinds": ["ledger"], "seeds": 16} if action == "train" else {}
    return board.post(f"/admin/fleet/{action}", {**own, **body}, admin=True)


def done(board: DaemonProcess, action: str, number: int) -> dict[str, Any]:
    """The action's row once its pass is over and nothing runs."""

    def look() -> dict[str, Any] | None:
        row: dict[str, Any] = board.get(f"/admin/fleet/rounds/{RUN}/{number}", admin=True).json[action]
        return row if row["done"] and board.get("/admin/fleet", admin=True).json["waits_for"] is None else None

    row = eventually(look, 60)
    assert row is not None
    return row


def trained(board: DaemonProcess, number: int, **body: Any) -> dict[str, Any]:
    answer = ask(board, "train", number, **body)
    assert answer.status == 202, answer.body
    row = done(board, "train", number)
    assert row["state"] == "contributed", row["reason"]
    return row


def result(board: DaemonProcess, number: int) -> bytes:
    answer = board.get(f"/admin/fleet/rounds/{RUN}/{number}/result", admin=True)
    assert answer.status == 200, answer.body
    return answer.body


def averaged(results: list[bytes]) -> bytes:
    """The fleet's file, of ledgers that count alike."""
    files = [fleet_file.decode(each) for each in results]
    sums: dict[int, float] = {}
    for file in files:
        for step in ledger.decode(file.files["ledger"]).steps:
            sums[step.seed] = sums.get(step.seed, 0.0) + step.coefficient / len(files)
    steps = [Step(seed, -value, 1.0, 1e-3) for seed, value in sorted(sums.items())]
    return FleetFile(files[0].facts, {"ledger": ledger.encode(Ledger(0, steps))}).encode()


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def test_two_boards_learn_together_and_come_to_the_same_bits(boards: list[DaemonProcess]) -> None:
    before = [said(board) for board in boards]
    results = []
    for board in boards:
        row = trained(board, 1, first_seed=5)
        assert (row["kind"], row["state"], row["revision"]) == ("ledger", "contributed", None)
        results.append(result(board, 1))
    assert [said(board) for board in boards] == before  # nothing that serves has changed
    assert results[0] != results[1]
    for each in results:
        file = fleet_file.decode(each)
        seeds = [step.seed for step in ledger.decode(file.files["ledger"]).steps]
        assert seeds
        assert set(seeds) <= set(range(5, 21))
        assert len(each) < 1500
        assert SECRET.encode() not in each
        assert b"reviews" not in each  # nor what the owner calls a task

    whole = averaged(results)
    for board in boards:
        assert ask(board, "take", 1, data=text(whole)).status == 202
        row = done(board, "take", 1)
        assert row["state"] == "committed", row["reason"]
        assert row["revision"] == board.status()["revision"] == 1
    assert said(boards[0]) == said(boards[1]) != before[0]
    told = [board.get(f"/admin/fleet/rounds/{RUN}/1/figures", admin=True).json for board in boards]
    assert told[0]["weights_sha256"] == told[1]["weights_sha256"]
    assert told[0]["accepted"]
    assert told[0]["n"] > 0
    assert "reviews" not in json.dumps(told)
    # The next round begins there, and the fleet need not send the file again.
    state = fleet_file.digest(whole)
    row = trained(boards[0], 2, first_seed=21, state=state)
    assert (row["bytes_in"], row["state"]) == (0, "contributed")
    answer = ask(boards[0], "train", 3, state="0" * 64)
    assert (answer.status, answer.error["code"]) == (404, "not_found")


def test_a_round_asked_for_again_is_answered_with_what_is_recorded(boards: list[DaemonProcess]) -> None:
    board = boards[1]
    first = trained(board, 10)
    again = ask(board, "train", 10)
    assert again.status == 200
    assert again.json["pass_id"] == first["pass_id"]
    assert result(board, 10) == result(board, 10)
    other = ask(board, "train", 10, first_seed=999)
    assert (other.status, other.error["code"]) == (409, "conflict")
    old = ask(board, "train", 9)
    assert old.status == 409
    assert "is over" in old.error["message"]


def test_a_board_says_who_it_learns_with_and_on_what(boards: list[DaemonProcess], tmp_path: Path) -> None:
    board = boards[0]
    wrong = ask(board, "train", 20, fleet="other")
    assert (wrong.status, wrong.error["code"]) == (403, "no_consent")
    base = ask(board, "train", 20, base_sha256="0" * 64)
    assert (base.status, base.error["code"]) == (409, "other_base")
    assert "another quantisation" in base.error["message"]
    dtype = ask(board, "train", 20, dtype="bfloat16")
    assert (dtype.status, dtype.error["code"]) == (409, "other_base")
    assert "transformers in float32" in dtype.error["message"]
    garbage = ask(board, "take", 20, data=text(b"garbage"))
    assert garbage.status == 400
    other = FleetFile({"engine": "transformers", "base_sha256": "0" * 64}, {"ledger": b""}).encode()
    assert ask(board, "take", 20, data=text(other)).status == 400
    assert ask(board, "take", 20, data="%%%").error["param"] == "data"
    assert board.get(f"/admin/fleet/rounds/{RUN}/20", admin=True).status == 404


def configure(board: DaemonProcess, model: Path, changed: dict[str, Any]) -> None:
    """Lets it run on with other settings."""
    known = len(reloads(board))
    board.configure(model, changed)
    os.kill(board.pid, signal.SIGHUP)
    eventually(lambda: len(reloads(board)) > known)


def reloads(board: DaemonProcess) -> list[Any]:
    happened = board.get("/admin/events?limit=1000", admin=True).json["events"]
    return [event for event in happened if event["kind"] == "reloaded"]


def test_what_harms_is_refused_by_the_gate(boards: list[DaemonProcess], model: Path) -> None:
    """The steps of a flipped ledger, a hundred times as long."""
    board = boards[0]
    serving, answers = board.status()["revision"], said(board)
    steps = [Step(seed, 1.0, -0.1, 1e-3) for seed in range(16)]
    facts = fleet_file.decode(result(board, 2)).facts
    harm = FleetFile(facts, {"ledger": ledger.encode(Ledger(0, steps))}).encode()
    strict = settings()
    strict["adapt"]["gate"] = {**strict["adapt"]["gate"], "max_drift": 0.5}
    configure(board, model, strict)
    assert ask(board, "take", 30, data=text(harm)).status == 202
    row = done(board, "take", 30)
    assert row["state"] == "rejected"
    assert "drift" in row["reason"]
    assert (board.status()["revision"], said(board)) == (serving, answers)
    told = board.get(f"/admin/fleet/rounds/{RUN}/30/figures", admin=True).json
    assert told["accepted"] is False
    configure(board, model, settings())


def test_not_now(boards: list[DaemonProcess]) -> None:
    board = boards[1]
    board.post("/admin/pause", admin=True)
    answer = ask(board, "train", 40)
    assert (answer.status, answer.error["code"]) == (503, "not_now")
    assert "paused" in answer.error["message"]
    assert "Retry-After" in {name.title() for name in answer.headers}
    board.post("/admin/resume", admin=True)
    assert ask(board, "train", 40).status == 202
    busy = ask(board, "train", 41)
    assert (busy.status, busy.error["code"]) == (503, "not_now")
    assert done(board, "train", 40)["state"] == "contributed"


def test_a_board_that_is_killed_takes_the_round_up_again(boards: list[DaemonProcess]) -> None:
    board = boards[1]
    trained(board, 49)
    made = result(board, 49)
    assert ask(board, "train", 50, seeds=2000).status == 202
    eventually(lambda: (board.get("/admin/progress", admin=True).json["pass"] or {}).get("phase") == "zo")
    board.kill()
    board.start()
    row = done(board, "train", 50)
    assert row["state"] == "failed"
    assert "the daemon stopped" in row["reason"]
    assert board.get(f"/admin/fleet/rounds/{RUN}/50/result", admin=True).status == 404
    again = ask(board, "train", 50, seeds=2000)
    assert again.status == 202
    assert again.json["pass_id"] > row["pass_id"]
    assert board.post("/admin/cancel", admin=True).status == 200
    assert done(board, "train", 50)["reason"] == "cancelled by the owner"
    assert ask(board, "train", 49).status == 200
    assert result(board, 49) == made


def test_steps_of_some_and_low_rank_factors_of_others_are_one_revision(boards: list[DaemonProcess]) -> None:
    large, small = boards
    assert trained(large, 60, kinds=["adapter", "ledger"])["kind"] == "adapter"
    assert trained(small, 60, kinds=["ledger"])["kind"] == "ledger"
    factors, steps = (fleet_file.decode(result(board, 60)) for board in boards)
    assert set(factors.files) == {"lora.safetensors"}
    whole = FleetFile(factors.facts, {**factors.files, **steps.files}).encode()
    revisions = []
    for board in boards:
        assert ask(board, "take", 60, data=text(whole)).status == 202
        row = done(board, "take", 60)
        assert row["state"] == "committed", row["reason"]
        facts = board.get(f"/admin/revisions/{row['revision']}", admin=True).json["manifest"]
        assert facts["fleet"] == f"round {RUN}/60 of fleet home"
        assert [set(segment) for segment in facts["segments"]] == [{"steps", "update"}, {"ranks"}]
        revisions.append(facts["weights_sha256"])
    assert revisions[0] == revisions[1]
    assert said(large) == said(small)
    # and learning goes on from there
    assert trained(small, 61, kinds=["ledger"], state=fleet_file.digest(whole))["kind"] == "ledger"


def test_the_owner_sees_what_left(boards: list[DaemonProcess], capfd: pytest.CaptureFixture[str]) -> None:
    board = boards[1]
    status = board.get("/admin/fleet", admin=True).json
    assert status["bytes_out"] > 0
    assert (status["name"], status["epsilon"]) == ("home", None)
    assert ctl(board, "fleet") == 0
    rows = [line.split("\t") for line in capfd.readouterr().out.splitlines()]
    (sent,) = [row for row in rows if row[2:4] == ["49", "train"]]
    assert sent[4:6] == ["contributed", "ledger"]
    assert int(sent[6]) > 0
    assert sent[8] == "server:9092"
    assert ctl(board, "fleet", "--json") == 0
    printed = json.loads(capfd.readouterr().out)
    assert printed["send"] == ["ledger", "adapter", "figures"]
    assert SECRET not in json.dumps(printed)


def test_a_board_of_no_fleet_answers_none_and_noise_is_accounted_for(model: Path) -> None:
    with DaemonProcess(model, SETTINGS) as board:
        board.start()
        assert board.post("/v1/examples", examples(60, length=5)).status == 200
        answer = ask(board, "train", 1)
        assert (answer.status, answer.error["code"]) == (403, "no_consent")
        assert board.get("/admin/fleet", admin=True).json["name"] is None
        private = settings(send=["ledger"], clip=1e-3, noise=20.0, max_epsilon=0.6)
        configure(board, model, private)
        assert ask(board, "train", 1, kinds=["adapter"]).error["code"] == "no_consent"
        row = trained(board, 1, seeds=32)
        assert (row["examples"], row["norm"]) == (None, None)
        coefficients = [
            step.coefficient for step in ledger.decode(fleet_file.decode(result(board, 1)).files["ledger"]).steps
        ]
        assert len(coefficients) == 32  # noise on every direction, taken or not
        spread = (sum(value**2 for value in coefficients) / 32) ** 0.5
        assert 0.01 < spread < 0.04  # 20 clips of 0.001
        # rho 2 / 400; 0.005 + 2 sqrt(0.005 ln 1e5)
        assert board.get("/admin/fleet", admin=True).json["epsilon"] == pytest.approx(0.4848, abs=1e-3)
        answer = ask(board, "train", 2)
        assert (answer.status, answer.error["code"]) == (403, "no_consent")
        assert "max_epsilon" in answer.error["message"]


def test_engine_llamacpp_gives_and_takes_adapters(tmp_path: Path) -> None:
    with DaemonProcess(tiny_model.write(tmp_path / "tiny.gguf"), settings(LLAMACPP)) as board:
        board.start()
        assert board.post("/v1/examples", examples(60, length=5)).status == 200
        refused = ask(board, "train", 1)
        assert (refused.status, refused.error["code"]) == (403, "no_consent")
        assert "makes adapter" in refused.error["message"]
        base = said(board)
        row = trained(board, 1, kinds=["ledger", "adapter"])
        assert row["kind"] == "adapter"
        assert 40 < row["examples"] < 60
        made = result(board, 1)
        file = fleet_file.decode(made)
        assert set(file.files) == {"adapter.gguf"}
        assert said(board) == base
        assert ask(board, "take", 1, data=text(made)).status == 202
        assert done(board, "take", 1)["state"] == "committed"
        assert said(board) != base
        # it goes on from there
        row = trained(board, 2, kinds=["adapter"], state=fleet_file.digest(made))
        assert result(board, 2) != made
