"""Which past corrections of a task are about the most similar inputs: an index of the training examples' terms.

SQLite's FTS5 holds which examples of a task a term stands in. Its own ranking is not asked: it counts every term's
documents, of all tasks, at every query, and gives nothing where a term stands in half of them, as it does while there
are few. A look-up reads a bounded number of entries, however many examples there are: of each term the newest ones,
from which the frequency of a common one is estimated. What shares most with the input is read and ranked by BM25
(Robertson & Zaragoza 2009). What is forgotten leaves the index with its example (a trigger), and `compact` rewrites it
so that none of its words is left in the file.
"""

import hashlib
import heapq
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

from sqlite_utils import Database

from agentd.store.row import to_json
from agentd.store.terms import terms_of

_K1, _B = 1.2, 0.75
_READ = 2000  # entries of the index that the terms of an input may have together
_MOST, _LEAST = 250, 50  # of one term
_CANDIDATES = 48
_QUERIED = 60  # different terms of an input: of a longer one those of both ends
_NEWEST = 250  # examples that are looked at where no others are alike
_ALIKE = 0.8  # Jaccard index of two inputs' terms from which on they are near-duplicates


@dataclass(frozen=True)
class Match:
    """An example with what its likeness to the input is worth: BM25 times the example's weight."""

    id: str
    score: float
    weight: float
    updated_at: str
    terms: frozenset[str]


@dataclass(frozen=True)
class _Postings:
    """The newest entries of a term in a task, at most as many as were asked for; `frequency` is in how many of the
    task's examples it stands, estimated where there are more."""

    rows: Sequence[int]
    frequency: int
    all: bool


def scope_of(task: str) -> str:
    """The term that stands for a task; in the index every term of its examples begins with it."""
    return "t" + hashlib.sha256(task.encode()).hexdigest()[:16]


def entry(text: str) -> str:
    """A text as it is indexed."""
    return " ".join(terms_of(text))


def add(db: Database, example: str, task: str, text: str) -> None:
    """Puts a training example that is new into the index, in the transaction that is open."""
    statement = "INSERT INTO recall_texts (example_id, scope, terms) VALUES (?, ?, ?)"
    db.execute(statement, [example, scope_of(task), entry(text)])


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
    apart: bool = False,
) -> list[str]:
    """Ids of at most `limit` usable training examples of the task, the most similar first, no two of them
    near-duplicates: of those the one of the highest weight, then the newest. Where fewer share a term with the text,
    the newest ones follow.

    suits    whether an example may be among them, by its id
    without  text keys of examples that are not to be among them
    apart    nor near-duplicates of the text itself
    """
    own = frozenset(terms_of(text))
    matches = _matches(db, task, terms_of(text), set(without))
    chosen: list[Match] = []
    for match in matches:
        if len(chosen) >= limit and not any(_alike(match.terms, other.terms) for other in chosen):
            continue
        if (apart and _alike(match.terms, own)) or not suits(match.id):
            continue
        twin = next((i for i, other in enumerate(chosen) if _alike(match.terms, other.terms)), None)
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
    distinct = list(dict.fromkeys(query))
    if len(distinct) > _QUERIED:
        distinct = [*distinct[: _QUERIED // 2], *distinct[-_QUERIED // 2 :]]
    total = _count(db, task)
    if not distinct or not total:
        return []
    postings = _postings(db, scope_of(task), distinct, total)
    frequency = {term: each.frequency for term, each in postings.items()}
    shared: dict[int, float] = defaultdict(float)  # by entry, what the terms are worth that it has
    for each in postings.values():
        worth = _idf(each.frequency, total)
        for row in each.rows:
            shared[row] += worth
    common = sorted((term for term, each in postings.items() if not each.all), key=frequency.__getitem__)
    if len(common) > 1:  # what two such terms stand in together may be older than what either is read of
        worth = sum(_idf(frequency[term], total) for term in common[:2])
        for row in _newest_entries(db, scope_of(task), common[:2], _CANDIDATES):
            shared[row] = max(shared[row], worth)
    rows = heapq.nlargest(_CANDIDATES, shared, key=lambda row: (shared[row], row))
    return _ranked(db, task, rows, frequency, total, without)


def _postings(db: Database, scope: str, terms: Sequence[str], total: int) -> dict[str, _Postings]:
    """Of those terms that stand anywhere in the task."""
    limit = max(_LEAST, min(_MOST, _READ // len(terms)))
    newest, oldest = (_end(db, scope, order) for order in ("DESC", "ASC"))
    postings: dict[str, _Postings] = {}
    for term in terms:
        rows = _newest_entries(db, scope, [term], limit)
        if len(rows) < limit:
            postings[term] = _Postings(rows, len(rows), all=True)
        else:  # as often before as lately
            frequency = limit * (newest - oldest + 1) // (newest - rows[-1] + 1)
            postings[term] = _Postings(rows, max(limit, min(total, frequency)), all=False)
    return {term: each for term, each in postings.items() if each.rows}


def _ranked(
    db: Database, task: str, rows: Collection[int], frequency: Mapping[str, int], total: int, without: set[str]
) -> list[Match]:
    entries = db.execute(
        "SELECT examples.id, weight, updated_at, text_key, terms FROM recall_texts CROSS JOIN examples"
        " ON examples.id = example_id WHERE recall_texts.id IN (SELECT value FROM json_each(?))"
        " AND task = ? AND split = 'train' AND state IN ('new', 'used')",
        [to_json(sorted(rows)), task],
    ).fetchall()
    counted = [(id, weight, at, key, Counter(terms.split())) for id, weight, at, key, terms in entries]
    mean = sum(terms.total() for *_, terms in counted) / max(1, len(counted))
    matches = []
    for id, weight, at, key, terms in counted:
        if key not in without:
            score = weight * _bm25(terms, frequency, total, mean)
            matches.append(Match(id, score, weight, at, frozenset(terms)))
    return sorted(matches, key=lambda match: (match.score, match.updated_at, match.id), reverse=True)


def _bm25(terms: Counter[str], frequency: Mapping[str, int], total: int, mean: float) -> float:
    length = _K1 * (1 - _B + _B * terms.total() / max(1.0, mean))
    score = 0.0
    for term, n in frequency.items():
        if occurrences := terms[term]:
            score += _idf(n, total) * occurrences * (_K1 + 1) / (occurrences + length)
    return score


def _idf(n: int, total: int) -> float:
    return math.log(1 + (max(total, n) - n + 0.5) / (n + 0.5))


def _count(db: Database, task: str) -> int:
    counted = "SELECT coalesce(sum(n), 0) FROM example_counts WHERE task = ? AND split = 'train'"
    return int(db.execute(counted, [task]).fetchone()[0])


def _newest_entries(db: Database, scope: str, terms: Sequence[str], limit: int) -> list[int]:
    """Of examples of the task in which all of these terms stand. Terms hold letters, marks and digits alone; in
    quotation marks none of them is an operator of FTS5."""
    query = " AND ".join(f'"{scope}{term}"' for term in terms)
    newest = "SELECT rowid FROM recall_index WHERE recall_index MATCH ? ORDER BY rowid DESC LIMIT ?"
    return [row for (row,) in db.execute(newest, [query, limit])]


def _end(db: Database, scope: str, order: str) -> int:
    """The newest or oldest entry of a task; 0 where there is none."""
    statement = f"SELECT rowid FROM recall_index WHERE recall_index MATCH ? ORDER BY rowid {order} LIMIT 1"
    row = db.execute(statement, [f'"{scope}"']).fetchone()
    return int(row[0]) if row else 0


def _newest(db: Database, task: str, limit: int, without: set[str]) -> list[str]:
    """Ids of the task's usable examples that came last."""
    rows = _newest_entries(db, scope_of(task), [""], _NEWEST)
    usable = (
        "SELECT examples.id, text_key FROM recall_texts CROSS JOIN examples ON examples.id = example_id"
        " WHERE recall_texts.id IN (SELECT value FROM json_each(?)) AND task = ? AND split = 'train'"
        " AND state IN ('new', 'used') ORDER BY recall_texts.id DESC"
    )
    return [id for id, key in db.execute(usable, [to_json(rows), task]) if key not in without][:limit]


def _alike(a: frozenset[str], b: frozenset[str]) -> bool:
    return len(a & b) >= _ALIKE * len(a | b)
