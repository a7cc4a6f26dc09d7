"""The server's side with simulated boards behind a Grid in this process: rounds, who is left out, and who lies."""

from pathlib import Path
from typing import Any

import pytest
from agentd_flower import simulated, wire
from agentd_flower.board import JSON, Refused, Unreachable
from agentd_flower.client_app import client_app
from agentd_flower.local_grid import LocalGrid
from agentd_flower.simulated import SimulatedBoard
from agentd_flower.strategy import FleetStrategy, Progress, Settings

NODES = list(range(1, 6))


class Down:
    """A board whose daemon does not answer."""

    def get(self, *_: Any) -> Any:
        raise Unreachable("no one there")

    post = download = get


class Other(SimulatedBoard):
    """A board with another quantisation."""

    def get(self, path: str) -> JSON:
        return {**super().get(path), "base_sha256": "f" * 64} if path == "/admin/fleet" else super().get(path)


class Replaying(SimulatedBoard):
    """A board that gives what it gave in its first round, again and again."""

    first: bytes = b""

    def download(self, path: str) -> bytes:
        made = super().download(path)
        self.first = self.first or made
        return self.first


class Garbage(SimulatedBoard):
    def download(self, path: str) -> bytes:
        return b"\xff" * 700


def strategy(progress: Progress | None = None, keep: Path | None = None, **settings: Any) -> FleetStrategy:
    given = {"fleet": "simulated", "seeds": 32, "pool": 128, "min_boards": 3, "patience": 0.0, **settings}
    return FleetStrategy(Settings(**given), progress or Progress(), keep=keep, seed=1, wait=0.0)


def learn(boards: dict[int, Any], rounds: int = 12, **settings: Any) -> FleetStrategy:
    fleet = strategy(**settings)
    grid = LocalGrid(client_app(lambda context: boards[context.node_id]), list(boards))
    fleet.start(grid, fleet.initial(), num_rounds=rounds)
    return fleet


def accuracy(fleet: FleetStrategy) -> float:
    return simulated.held_out().accuracy(simulated.weights_of(fleet.progress.file))


@pytest.mark.parametrize("robust", ["mean", "trimmed"])
def test_boards_that_each_see_half_of_it_learn_all_of_it(robust: str) -> None:
    fleet = learn({node: SimulatedBoard(node) for node in NODES}, robust=robust)
    assert fleet.progress.number == 12
    assert accuracy(fleet) > 0.7
    alone = learn({1: SimulatedBoard(1)}, min_boards=1, robust=robust)
    assert accuracy(alone) < 0.55


def test_a_round_takes_less_than_20_kb_of_each_board() -> None:
    fleet = learn({node: SimulatedBoard(node) for node in NODES})
    for each in fleet.rounds:
        assert each.statuses == {"done": 5}
        assert each.largest < 1500  # bytes up
        assert (each.down + each.up) / 5 < 20_000
    file = wire.decode(fleet.progress.file)
    assert len(wire.decode_ledger(file.files["ledger"])) == 128  # 12 rounds of 32, in a pool of 128


BAD = {
    "flipped signs": lambda sees: SimulatedBoard(5, harm=-1.0, sees=sees),
    "flipped, fifty times as long": lambda sees: SimulatedBoard(5, harm=-50.0, sees=sees),
    "garbage": lambda sees: Garbage(5, sees=sees),
    "replay": lambda sees: Replaying(5, sees=sees),
    "down": lambda sees: Down(),
}


@pytest.mark.parametrize("bad", sorted(BAD))
def test_one_of_five_boards_that_is_hostile_or_down(bad: str) -> None:
    boards: dict[int, Any] = {node: SimulatedBoard(node, sees=4) for node in NODES[:4]}
    honest, with_it = (accuracy(learn(each, rounds=24)) for each in (boards, {**boards, 5: BAD[bad](4)}))
    assert honest > 0.7
    assert with_it > honest - 0.1


@pytest.mark.parametrize("bad", sorted(BAD))
def test_a_hostile_board_among_boards_that_see_different_things(bad: str) -> None:
    """Where each sees half of it, one that unteaches what few others know cannot be told from one that knows otherwise:
    that part suffers, and the rest holds."""
    boards: dict[int, Any] = {node: SimulatedBoard(node) for node in NODES[:4]}
    assert accuracy(learn({**boards, 5: BAD[bad](2)}, rounds=24)) > 0.6


def test_what_a_replay_is_refused_for(caplog: pytest.LogCaptureFixture) -> None:
    fleet = learn({**{node: SimulatedBoard(node) for node in NODES[:4]}, 5: Replaying(5)}, rounds=3)
    assert [each.statuses.get("unusable", 0) for each in fleet.rounds] == [0, 1, 1]


def test_another_quantisation_is_left_out_with_the_reason() -> None:
    fleet = learn({**{node: SimulatedBoard(node) for node in NODES[:4]}, 5: Other(5)}, rounds=1)
    assert fleet.rounds[0].asked == 4
    (said,) = [what for node, what in fleet._told if node == 5]
    assert "another base, quantisation" in said


def test_a_round_with_too_few_boards_is_taken_up_again() -> None:
    boards: dict[int, Any] = {1: SimulatedBoard(1), 2: SimulatedBoard(2), 3: SimulatedBoard(3)}
    fleet = strategy()
    grid = LocalGrid(client_app(lambda context: boards[context.node_id]), list(boards))
    fleet.start(grid, fleet.initial(), num_rounds=1)
    before = fleet.progress.file
    boards[3] = Down()
    fleet.start(grid, fleet.initial(), num_rounds=1)
    assert (fleet.progress.number, fleet.progress.file) == (1, before)
    boards[3] = SimulatedBoard(3)  # it has lost the file, says so, and gets it with the next round
    fleet.start(grid, fleet.initial(), num_rounds=2)
    assert [each.statuses.get("not_found", 0) for each in fleet.rounds] == [0, 0, 1, 0]
    assert fleet.progress.number == 2


def test_a_server_goes_on_where_the_last_one_was(tmp_path: Path) -> None:
    keep = tmp_path / "fleet.json"
    boards = {node: SimulatedBoard(node) for node in NODES}
    grid = LocalGrid(client_app(lambda context: boards[context.node_id]), NODES)
    whole = strategy(Progress(run="r"))
    whole.start(grid, whole.initial(), num_rounds=4)
    for _ in range(2):
        part = strategy(Progress.read(keep) if keep.exists() else Progress(run="r"), keep)
        part.start(grid, part.initial(), num_rounds=2)
    again = Progress.read(keep)
    assert (again.run, again.number) == ("r", 4)
    assert again.file == whole.progress.file


def test_the_file_is_sent_to_each_board_once() -> None:
    boards = {node: SimulatedBoard(node) for node in NODES}
    fleet = learn(boards, rounds=3)
    size = len(fleet.progress.file)
    assert all(each.down < 5 * (size + 2000) for each in fleet.rounds)


def test_a_fleet_that_a_board_does_not_know_gets_nothing() -> None:
    fleet = learn({1: SimulatedBoard(1)}, rounds=1, fleet="strangers", min_boards=1)
    assert (fleet.rounds[0].asked, fleet.progress.file) == (0, b"")


def test_an_error_of_the_daemon_is_a_code(caplog: pytest.LogCaptureFixture) -> None:
    class Refusing(SimulatedBoard):
        def post(self, path: str, body: JSON) -> JSON:
            raise Refused(403, "pass_refused", "task secret: nothing to learn from")

    fleet = learn({**{node: SimulatedBoard(node) for node in NODES[:4]}, 5: Refusing(5)}, rounds=1)
    assert fleet.rounds[0].statuses == {"done": 4, "pass_refused": 1}
    assert not any("secret" in what for _, what in fleet._told)
