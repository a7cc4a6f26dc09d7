"""What a pass leaves in its folder to go on from after a restart: its examples as it has them, where its training is.

The latter is the trainer's (trainer/parking.py); a pass without it has lost less than it takes to begin anew, and is
not gone on with. The former is needed because what feedback says changes: the same pass would select other examples.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sqlite_utils import Database

from agentd.adapt.planning.dataset import Dataset, Member
from agentd.durable import new_file, replacement
from agentd.formats.training_state import TrainingState
from agentd.store.examples import Example
from agentd.store.row import to_json
from agentd.store.tasks import Task

STATE = "training.state"
_EXAMPLES = "parked.json"


@dataclass(frozen=True)
class Parked:
    """`state` is where training is; `own` are the model's own answers that are learned
    again, in the order in which the engine encodes them."""

    state: TrainingState
    data: Dataset
    own: tuple[Member, ...]

    @property
    def place(self) -> list[int]:
        """How far training is: it stands still where a pass dies again and again before its next state is written."""
        return [self.state.header["moves"], self.state.header["place"]["step"]]


def write(folder: Path, data: Dataset, own: Sequence[Member]) -> None:
    """Notes the examples of a pass that is about to learn. Raises OSError."""
    tasks = {member.task.name: asdict(member.task) for member in (*data.members, *own)}
    tree = {
        "tasks": tasks,
        "members": [_as_json(member) for member in data.members],
        "own": [_as_json(member) for member in own],
        "left_out": data.left_out,
        "undrawn": list(data.undrawn),
        "objective": data.objective,
    }
    with replacement(folder / _EXAMPLES) as temporary, new_file(temporary) as file:
        file.write(json.dumps(tree, ensure_ascii=False).encode())


def read(folder: Path) -> Parked | None:
    """What a pass that was cut short may go on from; None where there is nothing, or nothing whole."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        state = TrainingState.read(folder / STATE)
        tree = json.loads((folder / _EXAMPLES).read_text(encoding="utf-8"))
        tasks = {name: Task(**values) for name, values in tree["tasks"].items()}
        members, own = ([_member(each, tasks) for each in tree[name]] for name in ("members", "own"))
        data = Dataset(members, tree["left_out"], undrawn=tree["undrawn"], objective=tree["objective"])
        return Parked(state, data, tuple(own))
    return None


def clear(folder: Path) -> None:
    """The pass has ended; with what a killed trainer was about to write."""
    for path in (folder / STATE, folder / _EXAMPLES, *folder.glob(".*.tmp")):
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def tidy(root: Path, keep: int | None) -> None:
    """Clears the folders of all passes but one, after a start."""
    for folder in root.glob("*"):
        if folder.name != str(keep):
            clear(folder)


def forgotten(db: Database, data: Dataset) -> int:
    """How many of the examples are there no more. What was corrected since counts as it was read, as it does in a pass
    that nothing interrupts."""
    there = dict(db.execute("SELECT id, created_at FROM examples").fetchall())
    return sum(there.get(member.example.id) != member.example.created_at for member in data.members)


def identity(base_sha256: str, origin: int, members: Iterable[Member]) -> str:
    """What training depends on besides its numbers: the model's file, the revision it begins at, and which examples."""
    examples = [[member.example.id, member.example.updated_at, member.role] for member in members]
    return hashlib.sha256(to_json([base_sha256, origin, examples]).encode()).hexdigest()


def _as_json(member: Member) -> dict[str, Any]:
    return {**vars(member), "example": member.example.as_json(), "task": member.task.name}


def _member(tree: dict[str, Any], tasks: dict[str, Task]) -> Member:
    return Member(**{**tree, "example": Example(**tree["example"]), "task": tasks[tree["task"]]})
