"""Which past corrections of a task are about the most similar inputs: an index of the training examples' terms.

SQLite's FTS5 finds candidates; they are ranked here by BM25 (Robertson & Zaragoza 2009) with document frequencies of
the task alone, since FTS5's own are of all tasks, and nothing where a term stands in half of the examples, as it does
while there are few. A look-up reads a bounded number of entries, however many examples there are: common terms count
among the newest examples only. What is forgotten leaves the index with its example (a trigger), and `compact` rewrites
it so that none of its words is left in the file.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from sqlite_utils import Database

from agentd.store.normalise import input_text
from agentd.store.row import to_json
from agentd.store.terms import terms_of

_K1, _B = 1.2, 0.75
_COMMON = 250  # examples of a task; a term that stands in more is common
_READ = 1000  # entries that the rare terms of a query may have together; the newest examples that are all looked at
_CANDIDATES = 64
_QUERIED = 64  # different terms of an input: of a longer one those of both ends
_ALIKE = 0.8  # Jaccard index of two inputs' terms from which on they are near-duplicates


@dataclass(frozen=True)
class Match:
    """An example with what its likeness to the input is worth: BM25 times the example's weight."""

    id: str
    score: float
    weight: float
    updated_at: str
    terms: frozenset[str]


def scope_of(task: str) -> str:
    """The term that stands for a task."""
    return "t" + hashlib.sha256(task.encode()).hexdigest()[:16]


def entry(text: str) -> str:
    """A text as it is indexed."""
    return " ".join(terms_of(text))


def add(db: Database, example: str, task: str, text: str) -> None:
    """Puts a training example that is new into the index, in the transaction that is open."""
    statement = "INSERT INTO recall_texts (example_id, scope, terms) VALUES (?, ?, ?)"
    db.execute(statement, [example, scope_of(task), entry(text)])


def add_all(db: Database) -> None:
    """Indexes what was stored before there was an index."""
    prompts = dict(db.execute("SELECT name, prompt FROM tasks").fetchall())
    for row in list(db.query("SELECT id, task, input FROM examples WHERE split = 'train'")):
        add(db, row["id"], row["task"], input_text(json.loads(row["input"]), prompts.get(row["task"])))


def compact(db: Database) -> None:
    """Rewrites the index without what was taken out of it: until then its words are still in the file."""
    db.execute("INSERT INTO recall_index (recall_index) VALUES ('optimize')")


def nearest(
    db: Database,
    task: str,
    text: str,
    limit: int,
    suits: Callable[[str], bool] = lambda id: True,
    without: Collection[str] = (),
) -> list[str]:
    """Ids of at most `limit` usable training examples of the task, the most similar first, no two of them
    near-duplicates: of those the one of the highest weight, then the newest. Where fewer share a term with the text,
    the newest ones follow.

    suits    whether an example may be among them, by its id
    without  text keys of examples that are not to be among them
    """
    matches = _matches(db, task, terms_of(text), set(without))
    chosen: list[Match] = []
    for match in matches:
        if len(chosen) >= limit and not any(_alike(match, other) for other in chosen):
            continue
        if not suits(match.id):
            continue
        twin = next((i for i, other in enumerate(chosen) if _alike(match, other)), None)
        if twin is None:
            chosen.append(match)
        elif (match.weight, match.updated_at) > (chosen[twin].weight, chosen[twin].updated_at):
            chosen[twin] = match
    ids = [match.id for match in chosen]
    if len(ids) < limit:
        known = {match.id for match in matches}
        ids += [id for id in _newest(db, task, limit * 4, set(without)) if id not in known and suits(id)]
    return ids[:limit]


def _matches(db: Database, task: str, query: Sequence[str], without: set[str]) -> list[Match]:
    scope = scope_of(task)
    distinct = list(dict.fromkeys(query))
    if len(distinct) > _QUERIED:
        distinct = [*distinct[: _QUERIED // 2], *distinct[-_QUERIED // 2 :]]
    frequency = {term: n for term in distinct if (n := _frequency(db, scope, term))}
    total = _count(db, task)
    if not frequency or not total:
        return []
    rows: set[int] = set()
    rare, entries = [], 0
    for term in sorted(frequency, key=frequency.__getitem__):
        if frequency[term] > _COMMON or entries + frequency[term] > _READ:
            break
        rare.append(term)
        entries += frequency[term]
    if rare:
        rows |= _candidates(db, scope, rare)
    if len(rare) < len(frequency):
        (last,) = db.execute("SELECT max(id) FROM recall_texts").fetchone()
        rows |= _candidates(db, scope, list(frequency), newer_than=last - _READ)
    return _ranked(db, rows, frequency, total, without)


def _ranked(
    db: Database, rows: Collection[int], frequency: dict[str, int], total: int, without: set[str]
) -> list[Match]:
    entries = db.execute(
        "SELECT examples.id, weight, updated_at, text_key, terms FROM recall_texts JOIN examples"
        " ON examples.id = example_id WHERE recall_texts.id IN (SELECT value FROM json_each(?))"
        " AND split = 'train' AND state IN ('new', 'used')",
        [to_json(sorted(rows))],
    ).fetchall()
    counted = [(id, weight, at, key, Counter(terms.split())) for id, weight, at, key, terms in entries]
    mean = sum(terms.total() for *_, terms in counted) / max(1, len(counted))
    matches = []
    for id, weight, at, key, terms in counted:
        if key not in without:
            score = weight * _bm25(terms, frequency, total, mean)
            matches.append(Match(id, score, weight, at, frozenset(terms)))
    return sorted(matches, key=lambda match: (match.score, match.updated_at, match.id), reverse=True)


def _bm25(terms: Counter[str], frequency: dict[str, int], total: int, mean: float) -> float:
    length = _K1 * (1 - _B + _B * terms.total() / max(1.0, mean))
    score = 0.0
    for term, n in frequency.items():
        if occurrences := terms[term]:
            idf = math.log(1 + (max(total, n) - n + 0.5) / (n + 0.5))
            score += idf * occurrences * (_K1 + 1) / (occurrences + length)
    return score


def _frequency(db: Database, scope: str, term: str) -> int:
    """In how many examples of the task a term stands; counting ends where it is common."""
    counted = "SELECT count(*) FROM (SELECT 1 FROM recall_index WHERE recall_index MATCH ? LIMIT ?)"
    return int(db.execute(counted, [_query(scope, [term]), _COMMON + 1]).fetchone()[0])


def _count(db: Database, task: str) -> int:
    counted = "SELECT coalesce(sum(n), 0) FROM example_counts WHERE task = ? AND split = 'train'"
    return int(db.execute(counted, [task]).fetchone()[0])


def _candidates(db: Database, scope: str, terms: Sequence[str], newer_than: int = 0) -> set[int]:
    found = (
        "SELECT rowid FROM recall_index WHERE recall_index MATCH ? AND rowid > ?"
        " ORDER BY bm25(recall_index, 0.0, 1.0), rowid DESC LIMIT ?"
    )
    return {row for (row,) in db.execute(found, [_query(scope, terms), newer_than, _CANDIDATES])}


def _query(scope: str, terms: Sequence[str]) -> str:
    """In FTS5's syntax. Terms hold letters, marks and digits alone; in quotation marks none of them is an operator."""
    either = " OR ".join(f'"{term}"' for term in terms)
    return f'scope : "{scope}" AND terms : ({either})'


def _newest(db: Database, task: str, limit: int, without: set[str]) -> list[str]:
    rows: list[tuple[str, str]] = []
    for state in ("new", "used"):
        newest = (
            "SELECT updated_at, id, text_key FROM examples WHERE task = ? AND split = 'train' AND state = ?"
            " ORDER BY updated_at DESC LIMIT ?"
        )
        rows += [(at, id) for at, id, key in db.execute(newest, [task, state, limit]) if key not in without]
    return [id for _, id in sorted(rows, reverse=True)[:limit]]


def _alike(a: Match, b: Match) -> bool:
    return len(a.terms & b.terms) >= _ALIKE * len(a.terms | b.terms)
