"""Schemas and grammars that are meant to hurt, against a running daemon: `python -m tools.fuzz --hostile 2000`.

Generated from a seed: depth, width, repetition, ambiguity, Unicode, references, patterns. Each is answered or refused;
the engine does not restart, another client is served meanwhile at its pace, and memory stays where it is.
"""

import json
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

_SLOWER = 3.0  # times as long as in peace another client's requests may take: the median, and the 95th percentile
_MASK = 0.015  # seconds that the limits of engine/constraints leave one mask, in a step that all requests share
_TOKENS = 24  # of an answer
_OTHER = 8  # tokens of another client's
_TOLD = 200  # constraints between two lines of progress
_IDLE = 60  # requests that show what is usual

Body = dict[str, Any]


class Sender(Protocol):
    def close(self) -> None: ...

    def send(self, method: str, target: str, body: bytes | None, headers: dict[str, str]) -> tuple[int, bytes]: ...


@dataclass
class Attack:
    """What came back; seconds are those of another client's requests."""

    cases: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    slowest: float = 0.0
    idle: list[float] = field(default_factory=list)
    beside: list[float] = field(default_factory=list)
    slowest_beside: dict[str, float] = field(default_factory=dict)  # by the kind of what was sent meanwhile
    problems: list[str] = field(default_factory=list)
    sizes: dict[str, tuple[int, int]] = field(default_factory=dict)  # of the daemon's processes, before and after

    def summary(self) -> str:
        kinds = ", ".join(f"{kind}: {n}" for kind, n in sorted(self.cases.items()))
        statuses = ", ".join(f"{status}: {n}" for status, n in sorted(self.statuses.items()))
        others = ", ".join(
            f"{name} {1e3 * _quantile(self.idle, q):.0f} -> {1e3 * _quantile(self.beside, q):.0f} ms"
            f" ({_quantile(self.beside, q) / max(1e-9, _quantile(self.idle, q)):.2f} x)"
            for name, q in (("median", 0.5), ("95 %", 0.95), ("slowest", 1.0))
        )
        lines = [f"{self.cases.total()} hostile constraints ({kinds}): {statuses}; slowest {self.slowest:.2f} s"]
        late = sum(seconds > _SLOWER * _quantile(self.idle, 0.5) for seconds in self.beside)
        others += f"; {late} of {len(self.beside)} took more than {_SLOWER:g} x the median alone"
        lines.append(f"another client, alone -> meanwhile: {others}")
        slowest = sorted(self.slowest_beside.items(), key=lambda item: -item[1])
        lines.append("its slowest beside " + ", ".join(f"{kind}: {1e3 * seconds:.0f} ms" for kind, seconds in slowest))
        return "\n".join([*lines, *(f"{name}: {before} -> {after}" for name, (before, after) in self.sizes.items())])


def attack(connect: Callable[[], Sender], cases: int, seed: int, limit: float = 3600.0) -> Attack:
    """Sends `cases` constraints, for at most `limit` seconds, while another client asks."""
    report, stop, sent = Attack(), threading.Event(), ""
    other = connect()
    report.idle = [_ask(other) for _ in range(_IDLE)]

    def beside() -> None:
        try:
            while not stop.is_set():
                before = sent
                report.beside.append(_ask(other))
                for kind in {before, sent} - {""}:
                    report.slowest_beside[kind] = max(report.slowest_beside.get(kind, 0.0), report.beside[-1])
        except (OSError, RuntimeError) as error:
            report.problems.append(f"another client got no answer: {error}")

    thread = threading.Thread(target=beside, daemon=True)
    thread.start()
    client, began = connect(), time.monotonic()
    try:
        for kind, body in constraints(seed, cases):
            if time.monotonic() - began > limit:
                break
            sent, start = kind, time.monotonic()
            data = json.dumps({"prompt": "x", "max_tokens": _TOKENS, "temperature": 1.5, "seed": 1, **body}).encode()
            status, answer = client.send("POST", "/v1/completions", data, {"content-type": "application/json"})
            report.slowest = max(report.slowest, time.monotonic() - start)
            report.cases[kind] += 1
            if report.cases.total() % _TOLD == 0:
                print(f"{report.cases.total()} of {cases} sent", file=sys.stderr, flush=True)
            report.statuses[status] += 1
            if status not in (200, 400):
                report.problems.append(f"{status}: {kind}: {json.dumps(body)[:300]}: {answer[:300]!r}")
    finally:
        stop.set()
        thread.join()
        client.close()
    report.idle += [_ask(other) for _ in range(_IDLE)]  # alone again: other programs may have come or gone meanwhile
    other.close()
    # Of a tiny model, whose step takes a millisecond or two, masks are the larger part where they are at their limit.
    masks = _OTHER * _MASK
    for name, q in (("median", 0.5), ("95th percentile", 0.95)):
        alone, meanwhile = _quantile(report.idle, q), _quantile(report.beside, q)
        if meanwhile > _SLOWER * alone + masks:
            report.problems.append(f"another client's {name} went from {alone:.3f} to {meanwhile:.3f} s")
    return report


def _ask(client: Sender) -> float:
    body = json.dumps({"prompt": "Tell.", "max_tokens": _OTHER, "temperature": 0}).encode()
    start = time.monotonic()
    status, answer = client.send("POST", "/v1/completions", body, {"content-type": "application/json"})
    if status != 200:
        raise RuntimeError(f"{status}: {answer[:300]!r}")
    return time.monotonic() - start


def _quantile(values: list[float], q: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * q))] if values else 0.0


def constraints(seed: int, n: int) -> Iterator[tuple[str, Body]]:
    """`n` constraints with the kind of each. The same seed gives the same ones."""
    draw = random.Random(seed)
    kinds = list(_KINDS.items())
    for i in range(n):
        kind, make = kinds[i % len(kinds)]
        yield kind, make(draw)


def _schema(tree: Any) -> Body:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": tree}}}


def _size(draw: random.Random, most: int) -> int:
    """A number up to `most`, of any magnitude."""
    return int(most ** draw.random())


def _deep(draw: random.Random) -> Body:
    tree: Any = draw.choice([{"type": "integer"}, {"type": "string"}, {}])
    for _ in range(_size(draw, 50)):
        tree = draw.choice([{"type": "array", "items": tree}, {"properties": {"a": tree}, "required": ["a"]},
                            {"anyOf": [tree, {"type": "null"}]}])  # fmt: skip
    return _schema(tree)


def _wide(draw: random.Random) -> Body:
    n = _size(draw, 3000)
    one = draw.choice([{"type": "integer"}, {"type": "string", "maxLength": _size(draw, 10**6)}])
    if draw.random() < 0.3:
        return _schema({"enum": [f"{'x' * _size(draw, 200)}{i}" for i in range(n)]})
    names = [f"p{i}" for i in range(n)]
    return _schema({"properties": dict.fromkeys(names, one), "required": names[: _size(draw, n)]})


def _long(draw: random.Random) -> Body:
    bound = _size(draw, 10**9)
    keys = [("string", "minLength"), ("string", "maxLength"), ("array", "minItems"), ("array", "maxItems"),
            ("object", "minProperties"), ("integer", "multipleOf"), ("number", "maximum")]  # fmt: skip
    kind, key = draw.choice(keys)
    return _schema({"type": kind, key: bound, "items": {"type": draw.choice(["string", "integer"])}})


def _pattern(draw: random.Random) -> Body:
    text = draw.choice(["a", "[a-z]", "\\w", ".", "(a|aa)", "(a|b|ab)", "\\p{L}", "[^\\x00-\\x7f]"])
    for _ in range(_size(draw, 8)):
        text = f"({text}){draw.choice(['*', '+', '?', f'{{0,{_size(draw, 1000)}}}', f'{{{_size(draw, 200)}}}'])}"
    return _schema({"type": "string", "pattern": f"^{text}{draw.choice(['$', '', text + '$'])}"})


def _reference(draw: random.Random) -> Body:
    n = _size(draw, 200)
    parts = {
        f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{draw.randrange(n)}"}, {"$ref": f"#/$defs/d{draw.randrange(n)}"},
                            {"type": "array", "items": {"$ref": f"#/$defs/d{draw.randrange(n)}"}}]}
        for i in range(n)
    }  # fmt: skip
    return _schema({"$defs": parts, "$ref": "#/$defs/d0"})


def _combined(draw: random.Random) -> Body:
    def part() -> dict[str, Any]:
        return {"pattern": "a" * _size(draw, 20) + "*", "minLength": _size(draw, 50)}

    return _schema({draw.choice(["allOf", "anyOf", "oneOf"]): [part() for _ in range(_size(draw, 60))]})


def _ambiguous(draw: random.Random) -> Body:
    texts = ['"a"', '"b"', "s", "t", '"é"', "[a-c]", "."]

    def rule() -> str:
        return " | ".join(" ".join(draw.choices(texts, k=draw.randint(1, 4))) for _ in range(draw.randint(1, 6)))

    return {"grammar": f'root ::= s+\ns ::= {rule()} | "a"\nt ::= {rule()} | "b"'}


def _repeated(draw: random.Random) -> Body:
    text = draw.choice(['"a"', "[a-z]", '("a" | "aa")', '("a"?)', '""', "."])
    for _ in range(_size(draw, 45)):
        low = _size(draw, 3000)
        bounds = draw.choice([f"{low}", f"{low},", f"{low},{low + _size(draw, 3000)}"])
        text = f"({text}){draw.choice(['*', '+', '?', f'{{{bounds}}}'])}"
    return {"grammar": f"root ::= {text}"}


def _large(draw: random.Random) -> Body:
    n = _size(draw, 1500)
    rules = [f'r{i} ::= "{i}" r{draw.randrange(n)} | r{draw.randrange(n)} "x" | [0-9]' for i in range(n)]
    return {"grammar": "root ::= r0\n" + "\n".join(rules)}


def _broken(draw: random.Random) -> Body:
    text = "".join(draw.choices('root::="a"[](){}|*+?<>!\\\n# é😀\u2028.,0123456789x', k=_size(draw, 400)))
    return {"grammar": f"root ::= {text}"}


def _unicode(draw: random.Random) -> Body:
    def text() -> str:
        points = [draw.choice([draw.randrange(1, 0xD800), draw.randrange(0xE000, 0x110000)]) for _ in range(20)]
        return "".join(map(chr, points))

    return _schema({"properties": {text(): {"const": text()}}, "required": [text()], "patternProperties": {".": {}}})


_EDGES = (0, -0.0, 0.1, 1e-7, 5e-324, 1e15, -1e15, 2**53 - 1, 2**53 + 1, -(2**63), 2**63, 2**64, 1e17, -1e17, -1e308)


def _numbers(draw: random.Random) -> Body:
    keys = draw.sample(["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf", "const"], 2)
    tree: dict[str, Any] = {key: draw.choice(_EDGES) for key in keys}
    if draw.random() < 0.5:
        tree["enum"] = draw.sample(_EDGES, 2)
    return _schema({**tree, "type": draw.choice(["integer", "number", ["integer", "number"]])})


def _choices(draw: random.Random) -> Body:
    return {"choices": [("ab" * _size(draw, 60) + str(i))[:200] for i in range(max(2, _size(draw, 256)))]}


_KINDS: dict[str, Callable[[random.Random], Body]] = {
    "depth": _deep,
    "width": _wide,
    "bounds": _long,
    "patterns": _pattern,
    "references": _reference,
    "combinations": _combined,
    "unicode": _unicode,
    "numbers": _numbers,
    "ambiguity": _ambiguous,
    "repetition": _repeated,
    "large grammars": _large,
    "broken grammars": _broken,
    "choices": _choices,
}
