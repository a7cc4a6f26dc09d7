"""What a pass leaves in its folder to go on from after a restart: its examples as it has them, where its training is.

The latter is written by the trainer and, for zeroth-order steps, by the pass; a pass without it has lost less than a
minute, and is not gone on with. The former is needed because what feedback says changes: the same pass would select
other examples.
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
from agentd.store import transitions
from agentd.store.examples import Example
from agentd.store.passes import Pass
from agentd.store.row import to_json
from agentd.store.tasks import Task

STATE = "training.state"  # trainer/parking.py
LOSSES = "losses-{}.state"  # loss_journal.py; behind so many steps
_EXAMPLES = "parked.json"
_UNFINISHED = ".*.tmp"  # durable.replacement


@dataclass(frozen=True)
class Parked:
    """`state` is where the trainer is, `losses` what zeroth-order steps were told; one of them may be None. `own` are
    the model's own answers that are learned again, in the order in which the engine encodes them."""

    state: TrainingState | None
    losses: TrainingState | None
    data: Dataset
    own: tuple[Member, ...]

    @property
    def plan(self) -> tuple[str, int]:
        """Method and blocks with which it learned."""
        written = self.state or self.losses
        assert written is not None
        return written.header["method"], written.header["blocks"]

    @property
    def place(self) -> list[int]:
        """How far learning is: it stands still where a pass dies again and again before it is written the next time."""
        steps = [] if self.state is None else [self.state.header["moves"], self.state.header["place"]["step"]]
        return [*steps, 0 if self.losses is None else self.losses.path.stat().st_size]

    @property
    def description(self) -> str:
        if self.state is None:
            return "zeroth-order steps are taken again from the losses that are known"
        place = self.state.header["place"]
        return f"training goes on behind step {place['step']} of {place['steps']}"


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
        state = _whole(folder / STATE)
        last = max(folder.glob(LOSSES.format("*")), key=lambda path: path.stat().st_mtime_ns, default=None)
        losses = None if last is None else _whole(last)
        if state is None and losses is None:
            return None
        tree = json.loads((folder / _EXAMPLES).read_text(encoding="utf-8"))
        tasks = {name: Task(**values) for name, values in tree["tasks"].items()}
        members, own = ([_member(each, tasks) for each in tree[name]] for name in ("members", "own"))
        data = Dataset(members, tree["left_out"], undrawn=tree["undrawn"], objective=tree["objective"])
        return Parked(state, losses, data, tuple(own))
    return None


def clear(folder: Path) -> None:
    """The pass has ended."""
    _remove([folder / _EXAMPLES, *folder.glob("*.state"), *folder.glob(_UNFINISHED)])


def tidy(root: Path, keep: int | None) -> None:
    """After a start: clears the folders of all passes but one, and that one of what was being written."""
    for folder in root.glob("*"):
        if folder.name == str(keep):
            _remove(folder.glob(_UNFINISHED))
        else:
            clear(folder)


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


def forgotten(db: Database, data: Dataset) -> int:
    """How many of the examples are there no more. What was corrected since counts as it was read, as it does in a pass
    that nothing interrupts."""
    there = dict(db.execute("SELECT id, created_at FROM examples").fetchall())
    return sum(there.get(member.example.id) != member.example.created_at for member in data.members)


def resume(db: Database, row: Pass, parked: Parked | None, serving: int) -> str | None:
    """Notes that a pass goes on, where this revision serves; else that it does not, and returns why."""
    reason = None
    if parked is None:
        reason = "what it was to go on from is gone or damaged"
    elif row.parent_revision != serving:
        reason = f"it began at revision {row.parent_revision}, and revision {serving} serves now"
    elif lost := forgotten(db, parked.data):
        reason = f"{lost} of its examples were forgotten"
    if reason is not None:
        transitions.abandon(db, row.id, reason)
        return reason
    assert parked is not None
    return transitions.resume(db, row.id, parked.place)


def identity(base_sha256: str, origin: int, members: Iterable[Member]) -> str:
    """What training depends on besides its numbers: the model's file, the revision it begins at, and which examples."""
    examples = [[member.example.id, member.example.updated_at, member.role] for member in members]
    return hashlib.sha256(to_json([base_sha256, origin, examples]).encode()).hexdigest()


def _whole(path: Path) -> TrainingState | None:
    with contextlib.suppress(OSError, ValueError):
        return TrainingState.read(path)
    return None


def _as_json(member: Member) -> dict[str, Any]:
    return {**vars(member), "example": member.example.as_json(), "task": member.task.name}


def _member(tree: dict[str, Any], tasks: dict[str, Task]) -> Member:
    return Member(**{**tree, "example": Example(**tree["example"]), "task": tasks[tree["task"]]})
