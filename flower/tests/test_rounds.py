"""What a board does in a round, with a real daemon behind a real socket, and with what can happen to it meanwhile."""

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from agentd_flower import rounds, wire
from agentd_flower.board import Board
from agentd_flower.ledgers import BOTTOM
from agentd_flower.rounds import DONE, NOT_NOW, UNREACHABLE, Clock

from .conftest import ServedBoard

FAST = Clock(look=0.05)


@pytest.fixture(scope="module")
def served(serve: Callable[..., ServedBoard]) -> ServedBoard:
    return serve()


@pytest.fixture(scope="module")
def board(served: ServedBoard) -> Board:
    return Board(served.admin)


def order(board: Board, number: int, **wish: Any) -> dict[str, Any]:
    facts = rounds.query(board, "home").facts
    assert facts is not None
    names = {name: facts[name] for name in ("engine", "base_sha256", "dtype")}
    return {"fleet": "home", "run": "r", "number": number, **names, **wish}


def learn(board: Board, number: int, patience: float = 60.0, **wish: Any) -> rounds.Outcome:
    wish = {"kinds": ["ledger"], "first_seed": BOTTOM, "seeds": 16, "state": None, **wish}
    return rounds.train(board, order(board, number, **wish), b"", patience, FAST)


def test_a_round_and_what_comes_of_it(board: Board) -> None:
    made = learn(board, 1)
    assert made.status == DONE
    assert made.facts is not None
    assert made.facts["kind"] == "ledger"
    steps = wire.decode_ledger(wire.decode(made.data).files["ledger"])
    assert steps
    assert learn(board, 1).data == made.data
    told = rounds.take(board, order(board, 1), made.data, 60.0, FAST)
    assert told.status == DONE
    assert told.facts is not None
    assert {"weights_sha256", "accepted", "n", "loss_before", "loss_after"} <= told.facts.keys()


def test_other_fleets_learn_nothing_of_a_board(board: Board) -> None:
    outcome = rounds.query(board, "strangers")
    assert (outcome.status, outcome.facts) == ("no_consent", None)
    assert rounds.train(
        board, {**order(board, 2), "fleet": "strangers", "kinds": ["ledger"]}, b"", 1.0, FAST
    ).status == ("no_consent")


def test_another_base_is_refused_with_the_reason(board: Board) -> None:
    outcome = rounds.take(board, {**order(board, 2), "base_sha256": "0" * 64}, b"x", 1.0, FAST)
    assert outcome.status == "other_base"
    assert "another quantisation" in outcome.message


def test_not_now_is_waited_for_and_then_told(board: Board) -> None:
    board.post("/admin/pause", {})
    try:
        outcome = learn(board, 3, patience=0.3)
        assert (outcome.status, outcome.message) == (NOT_NOW, "")
        threading.Timer(1.0, lambda: board.post("/admin/resume", {})).start()
        assert learn(board, 3).status == DONE
    finally:
        board.post("/admin/resume", {})


def test_a_daemon_that_dies_in_a_round_takes_it_up_again(served: ServedBoard, board: Board) -> None:
    outcomes: list[rounds.Outcome] = []
    wish = order(board, 4, kinds=["ledger"], first_seed=BOTTOM, seeds=400, state=None)
    thread = threading.Thread(target=lambda: outcomes.append(rounds.train(board, wish, b"", 120.0, FAST)))
    thread.start()
    until = time.monotonic() + 60
    while (board.get("/admin/progress")["pass"] or {}).get("phase") != "zo":
        assert time.monotonic() < until
        time.sleep(0.02)
    served.do("kill")
    served.do("start")
    thread.join(120)
    assert [outcome.status for outcome in outcomes] == [DONE]
    (row,) = [each for each in board.get("/admin/fleet")["rounds"] if each["number"] == 4]
    passes = {each["id"]: each["state"] for each in board.get("/admin/passes")["passes"]}
    assert passes[row["pass_id"]] == "contributed"
    assert passes[row["pass_id"] - 1] == "failed"


def test_where_no_daemon_is_no_one_waits_for_ever(tmp_path: Path) -> None:
    outcome = rounds.take(Board(tmp_path / "no.sock"), {"run": "r", "number": 1}, b"x", 0.2, FAST)
    assert outcome.status == UNREACHABLE
