"""Which examples a pass takes: fair shares by task, label and age, found through indexes. A pass costs what it takes,
not what is stored."""

import heapq
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sqlite_utils import Database

from agentd.store.examples import NEWEST, USABLE, Example
from agentd.store.migrations import LABEL
from agentd.store.row import select, to_json

_Row = tuple[str, float]
"""Id and weight of an example."""
_GROUP = f"FROM examples WHERE task = ? AND split = ? AND state = ? AND {LABEL} = ?"
_Group = tuple[str, str, str, str]
"""Task, split, state and label of examples; the label of a demonstration is empty."""


@dataclass(frozen=True)
class Draw:
    """Training examples for a pass; `undrawn` are the ids of new ones whose turn came and whose weight was drawn
    against them."""

    examples: list[Example]
    undrawn: list[str]


def for_training(db: Database, limit: int, seed: int, tasks: Sequence[str] | None = None) -> Draw:
    """At most `limit` training examples of these tasks, of all by default: new ones, and a replay sample of used ones
    in the places that are left. While there are used ones, new ones leave them half of the places: else an import of
    one task that fills a pass would push out what the others have learned.

    Tasks take turns, so none pushes another out, and within a task every label has its share, of which the newest and
    the oldest are taken in turn: what arrived last, sorted or not, is not all that there is. An example of weight w
    takes part with probability w. All of it depends on `seed` and on nothing else but what is stored.
    """
    pivot = f"{random.Random(seed).getrandbits(128):032x}"
    sample = _by_task(db, "train", ["used"], tasks, lambda group, _: _from(db, group, pivot), seed)
    used = list(itertools.islice(_by_turns(sample), limit))
    undrawn: list[str] = []
    fresh = _by_task(db, "train", ["new"], tasks, lambda group, n: _both_ends(db, group, n), seed, undrawn)
    new = list(itertools.islice(_by_turns(fresh), limit - min(len(used), limit // 2)))
    return Draw(_newest_first(db, new) + _by_id(db, sorted(used[: limit - len(new)])), undrawn)


def for_relearning(db: Database, limit: int, seed: int, tasks: Sequence[str] | None = None) -> Draw:
    """At most `limit` training examples of these tasks, used ones and new ones alike; shares and turns as in
    `for_training`."""
    undrawn: list[str] = []
    every = _by_task(db, "train", ["new", "used"], tasks, lambda group, n: _both_ends(db, group, n), seed, undrawn)
    return Draw(_newest_first(db, list(itertools.islice(_by_turns(every), limit))), undrawn)


def holdout(db: Database, task: str, limit: int, known: set[str] | None = None) -> list[Example]:
    """At most `limit` of the task's held-out examples, the newest of each label in its share; those of weight w are a
    share w of theirs.

    Half of the places are kept for established ones (`known`, if the caller has asked already), as long as there are
    any: whoever sends many new ones cannot push out what the task has been judged by so far.
    """
    known = established(db).get(task, set()) if known is None else known
    # Those of weight below 1 that took part once do so for life: the draw is the same for every pass.
    old = list(_by_turns([_shares(_newest_of(db, known), 0)]))
    ids = _by_turns(_by_task(db, "holdout", ["new", "used"], [task], lambda group, _: _newest(db, group), 0))
    fresh = list(itertools.islice((id for id in ids if id not in known), limit))
    n_old = max(limit - len(fresh), min(len(old), limit // 2))
    return _newest_first(db, old[:n_old] + fresh[: max(0, limit - len(old[:n_old]))])


def held_out(db: Database, task: str, enough: int) -> int:
    """How many examples judge the task; counting ends at `enough`."""
    rows = db.execute(f"SELECT id, weight FROM examples WHERE task = ? AND split = 'holdout' AND {USABLE}", [task])
    return sum(1 for _ in itertools.islice((id for id, weight in rows if _takes_part(id, weight, 0)), enough))


def tells_apart(db: Database, task: str) -> bool:
    """Whether there is more than one answer to learn, or one that is no label."""
    statement = f"SELECT DISTINCT label FROM example_counts WHERE task = ? AND split = 'train' AND {USABLE} AND n > 0"
    labels = [label for (label,) in db.execute(statement, [task])]
    return len(labels) > 1 or "" in labels


def established(db: Database) -> dict[str, set[str]]:
    """By task, the held-out examples that judged a pass which was committed, and that no one has changed since."""
    judges = (
        "SELECT example_id, max(passes.created_at) AS at FROM passes CROSS JOIN pass_examples"
        " ON pass_id = passes.id AND role = 'holdout' WHERE passes.state = 'committed' GROUP BY example_id"
    )
    by_task: dict[str, set[str]] = {}
    for task, id in db.execute(
        f"SELECT task, id FROM ({judges}) CROSS JOIN examples ON examples.id = example_id"
        f" WHERE split = 'holdout' AND {USABLE} AND updated_at <= at"
    ):
        by_task.setdefault(task, set()).add(id)
    return by_task


# --- the groups of examples that have task, split, state and label in common, each in an order of its own


def _both_ends(db: Database, group: _Group, n: int) -> Iterator[_Row]:
    """The newest, the oldest, the newest but one, and so on, of a group of `n`."""
    newest, oldest = _newest(db, group), _rows(db, f"{_GROUP} ORDER BY updated_at, rowid", group)
    for place in range(n):
        if (row := next(oldest if place % 2 else newest, None)) is not None:
            yield row


def _newest(db: Database, group: _Group) -> Iterator[_Row]:
    return _rows(db, f"{_GROUP} {NEWEST}", group)


def _from(db: Database, group: _Group, pivot: str) -> Iterator[_Row]:
    """By their ids, which are hashes, from `pivot` on and round."""
    yield from _rows(db, f"{_GROUP} AND id >= ? ORDER BY id", (*group, pivot))
    yield from _rows(db, f"{_GROUP} AND id < ? ORDER BY id", (*group, pivot))


def _rows(db: Database, rest: str, parameters: Sequence[Any]) -> Iterator[_Row]:
    return iter(db.execute(f"SELECT id, weight {rest}", parameters))


# --- fair shares


def _by_task(
    db: Database,
    split: str,
    states: Sequence[str],
    tasks: Sequence[str] | None,
    order: Callable[[_Group, int], Iterator[_Row]],
    seed: int,
    undrawn: list[str] | None = None,
) -> list[Iterator[str]]:
    """For every task its ids, each label of each state in its share, in `order` (of a group and its number); see
    `_shares`."""
    counted = "SELECT task, state, label, n FROM example_counts WHERE split = ? AND state = ? AND n > 0"
    groups: dict[str, list[tuple[Iterator[_Row], int]]] = {}
    for state in states:
        for task, _, label, n in db.execute(counted, [split, state]).fetchall():
            if tasks is None or task in tasks:
                groups.setdefault(task, []).append((order((task, split, state, label), n), n))
    return [_shares(groups[task], seed, undrawn) for task in sorted(groups)]


def _shares(groups: Iterable[tuple[Iterable[_Row], int]], seed: int, undrawn: list[str] | None = None) -> Iterator[str]:
    """Ids of several groups so that of any number of them every group has its share. One of weight w is there with
    probability w; else its id is added to `undrawn`."""

    def placed(number: int, rows: Iterable[_Row], n: int) -> Iterator[tuple[float, int, str, float]]:
        return ((place / n, number, id, weight) for place, (id, weight) in enumerate(rows))

    merged = heapq.merge(*(placed(number, rows, n) for number, (rows, n) in enumerate(groups)))
    for _, _, id, weight in merged:
        if _takes_part(id, weight, seed):
            yield id
        elif undrawn is not None:
            undrawn.append(id)


def _by_turns(tasks: Iterable[Iterator[str]]) -> Iterator[str]:
    turns = list(tasks)
    while turns:
        for turn in list(turns):
            if (id := next(turn, None)) is None:
                turns.remove(turn)
            else:
                yield id


def _takes_part(id: str, weight: float, seed: int) -> bool:
    return weight >= 1 or random.Random(f"{seed}/{id}").random() < weight


def _newest_of(db: Database, ids: Iterable[str]) -> list[tuple[list[_Row], int]]:
    """The newest first, by label, each group with its number."""
    among = "WHERE id IN (SELECT value FROM json_each(?))"
    groups: dict[str, list[_Row]] = {}
    for id, weight, label in db.execute(
        f"SELECT id, weight, {LABEL} FROM examples {among} {NEWEST}", [to_json(sorted(ids))]
    ):
        groups.setdefault(label, []).append((id, weight))
    return [(rows, len(rows)) for rows in groups.values()]


def _newest_first(db: Database, ids: Sequence[str]) -> list[Example]:
    return select(db, Example, f"WHERE id IN (SELECT value FROM json_each(?)) {NEWEST}", [to_json(list(ids))])


def _by_id(db: Database, ids: Sequence[str]) -> list[Example]:
    """In the order of `ids`."""
    rows = select(db, Example, "WHERE id IN (SELECT value FROM json_each(?))", [to_json(list(ids))])
    by_id = {example.id: example for example in rows}
    return [by_id[id] for id in ids]
