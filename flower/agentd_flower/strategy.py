"""The fleet's server as a strategy of Flower: asks who is there and what they learn on, puts together what they give,
sends what came of it, once to each board. Boards on another base, quantisation, engine or type are left out with the
reason.

What the fleet has come to is one file (wire.FleetFile), which Flower's loop carries as an array of bytes.
"""

import base64
import json
import os
import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from logging import INFO, WARNING
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.common import log
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from agentd_flower import adapters, ledgers, wire
from agentd_flower.adapters import Factors
from agentd_flower.client_app import ANSWER, ORDER
from agentd_flower.ledgers import Pool
from agentd_flower.rounds import DONE
from agentd_flower.wire import ADAPTER, LEDGER, LORA, FleetFile, Unusable

KINDS = {"ledger": ("ledger",), "adapter": ("adapter",), "mixed": ("adapter", "ledger")}
_FILE = "file"
_WAIT = 3.0  # seconds between looks at who is there
Answer = dict[str, Any]


@dataclass
class Progress:
    """What has to outlive the server: the run's name, by which boards know rounds again, the number of the last round,
    and what the fleet has come to."""

    run: str = field(default_factory=lambda: secrets.token_hex(8))
    number: int = 0
    file: bytes = b""

    @classmethod
    def read(cls, path: Path | None) -> "Progress":
        if path is None or not path.exists():
            return cls()
        tree = json.loads(path.read_text(encoding="utf-8"))
        return cls(tree["run"], tree["number"], base64.b64decode(tree["file"]))

    def write(self, path: Path | None) -> None:
        """As a whole or not at all, power cuts included."""
        if path is None:
            return
        tree = {"run": self.run, "number": self.number, "file": base64.b64encode(self.file).decode()}
        temporary = path.with_name(f".{path.name}.tmp")
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(tree, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)


@dataclass(frozen=True)
class Settings:
    """As [tool.flwr.app.config] has them. Raises ValueError."""

    fleet: str = "home"
    strategy: str = "ledger"
    robust: str = "trimmed"
    trim: float = 0.2
    min_boards: int = 2
    fraction: float = 1.0
    patience: float = 600.0
    seeds: int = 32
    pool: int = 512
    rank: int = 8

    def __post_init__(self) -> None:
        if self.strategy not in KINDS:
            raise ValueError(f"strategy is one of {', '.join(KINDS)}, not {self.strategy!r}")
        if self.robust not in ("mean", "trimmed"):
            raise ValueError(f"robust is mean or trimmed, not {self.robust!r}")
        if not (0 <= self.trim < 0.5 and 0 < self.fraction <= 1 and self.min_boards >= 1 and self.rank >= 1):
            raise ValueError("trim is below 0.5, fraction in (0, 1], min-boards and rank 1 or more")
        Pool(self.pool, self.seeds)


@dataclass
class Round:
    """What a round took: bytes of messages' contents, seconds, boards by what became of them."""

    number: int
    asked: int = 0
    answered: int = 0
    down: int = 0
    up: int = 0
    largest: int = 0  # bytes up of one board
    seconds: float = 0.0
    statuses: dict[str, int] = field(default_factory=dict)


class FleetStrategy(Strategy):
    """`facts` are what the fleet learns on: base_sha256, engine, dtype. Unset, the first round takes what most boards
    have. `keep` is the file that outlives the server."""

    def __init__(
        self,
        settings: Settings,
        progress: Progress,
        *,
        keep: Path | None = None,
        seed: int | None = None,
        wait: float = 600.0,
    ) -> None:
        self.settings, self.progress, self._keep, self._wait = settings, progress, keep, wait
        self._pool = Pool(settings.pool, settings.seeds)
        self._dice = np.random.default_rng(seed)
        self._boards: dict[int, Answer] = {}  # what each said of itself
        self._has: dict[int, str] = {}  # the sha256 of the file that each has
        self._told: set[tuple[int, str]] = set()
        self.facts: dict[str, str] = {}
        if progress.file:
            facts = wire.decode(progress.file).facts
            self.facts = {name: facts.get(name, "") for name in ("base_sha256", "engine", "dtype")}
        self.rounds: list[Round] = []
        self._begun = 0.0

    def initial(self) -> ArrayRecord:
        return _array(self.progress.file)

    def summary(self) -> None:
        s = self.settings
        log(INFO, "\t├──> fleet %s, run %s, after round %d", s.fleet, self.progress.run, self.progress.number)
        log(INFO, "\t└──> %s, %s; %d directions a round of %d", s.strategy, s.robust, s.seeds, s.pool)

    # --- who is there

    def _eligible(self, grid: Grid) -> list[int]:
        """Boards that learn on what the fleet does; asks those that are new."""
        until = time.monotonic() + self._wait
        while True:
            nodes = list(grid.get_node_ids())
            self._ask(grid, [node for node in nodes if node not in self._boards])
            fits = [node for node in nodes if self._fits(node)]
            if len(fits) >= self.settings.min_boards or time.monotonic() >= until:
                return fits
            time.sleep(_WAIT)

    def _ask(self, grid: Grid, nodes: Sequence[int]) -> None:
        messages = [self._message(node, MessageType.QUERY, {"fleet": self.settings.fleet}) for node in nodes]
        for reply in grid.send_and_receive(messages, timeout=60.0) if messages else ():
            answer = _answer(reply)
            if answer.get("status") == DONE:
                self._boards[reply.metadata.src_node_id] = answer
            else:
                self._say(reply.metadata.src_node_id, str(answer.get("message") or answer.get("status")))
        if not self.facts and self._boards:
            known = [tuple(str(a[name]) for name in ("base_sha256", "engine", "dtype")) for a in self._boards.values()]
            most = max(sorted(set(known)), key=known.count)
            self.facts = dict(zip(("base_sha256", "engine", "dtype"), most, strict=True))

    def _fits(self, node: int) -> bool:
        board = self._boards.get(node)
        if board is None:
            return False
        if other := [name for name, value in self.facts.items() if board[name] != value]:
            said = ", ".join(
                f"{name} {board[name] or 'none'} instead of {self.facts[name] or 'none'}" for name in other
            )
            self._say(node, f"is left out: it learns on another base, quantisation, engine or type ({said})")
            return False
        return True

    def _say(self, node: int, what: str) -> None:
        if (node, what) not in self._told:
            self._told.add((node, what))
            log(WARNING, "board %s: %s", node, what)

    # --- a round

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        nodes = self._eligible(grid)
        wanted = KINDS[self.settings.strategy]
        nodes = [node for node in nodes if set(wanted) & set(self._boards[node].get("kinds", []))]
        n = min(len(nodes), max(self.settings.min_boards, round(self.settings.fraction * len(nodes))))
        chosen = [nodes[place] for place in sorted(self._dice.permutation(len(nodes))[:n])]
        number = self.progress.number + 1
        self.rounds.append(Round(number, asked=len(chosen)))
        self._begun = time.monotonic()
        first = self._pool.first(number)
        state = wire.digest(self.progress.file) if self.progress.file else ""
        messages = []
        for node in chosen:
            data = b"" if self._has.get(node) == state else self.progress.file
            wish = {"kinds": list(wanted), "first_seed": first, "seeds": self._pool.width, "state": state, "data": data}
            messages.append(self._message(node, MessageType.TRAIN, {**self._names(number), **wish}))
        self._count_down(messages)
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """What the fleet comes to. Nothing where fewer boards answered than `min_boards`: the round is taken up again,
        and those that had answered give what they have recorded."""
        given: dict[str, list[tuple[Any, int | None]]] = {"ledger": [], "adapter": []}
        this, number = self.rounds[-1], self.progress.number + 1
        start = self._start()
        for reply in replies:
            node, answer = reply.metadata.src_node_id, _answer(reply)
            status = str(answer.get("status", "no answer"))
            this.statuses[status] = this.statuses.get(status, 0) + 1
            size = _size(reply)
            this.up, this.largest = this.up + size, max(this.largest, size)
            if status != DONE:
                if status == "not_found":  # it has lost the file
                    self._has.pop(node, None)
                self._say(node, f"round {number}: {answer.get('message') or status}")
                continue
            try:
                kind, value = self._read(answer, number, start)
                examples = answer.get("examples")
                given[kind].append((value, int(examples) if examples is not None else None))
                this.answered += 1
            except Unusable as error:
                this.statuses["unusable"] = this.statuses.get("unusable", 0) + 1
                self._say(node, f"round {number}: what it sent is of no use: {error}")
        this.seconds = time.monotonic() - self._begun
        if this.answered < max(1, self.settings.min_boards):
            log(
                WARNING,
                "round %d: %d boards gave something, min-boards is %d",
                number,
                this.answered,
                self.settings.min_boards,
            )
            return None, self._metrics(this)
        self.progress.file = self._together(given, number, start)
        self.progress.number = number
        self.progress.write(self._keep)
        return _array(self.progress.file), self._metrics(this)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        if not self.progress.file:
            return []
        number, data = self.progress.number, self.progress.file
        nodes = [node for node in grid.get_node_ids() if self._fits(node) and self._has.get(node) != wire.digest(data)]
        order = {**self._names(number), "data": data}
        messages = [self._message(node, MessageType.EVALUATE, order) for node in nodes]
        self._count_down(messages)
        return messages

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """How the file did at the boards that tell, by numbers of held-out examples; and whether it led to the same
        bits everywhere."""
        digest = wire.digest(self.progress.file)
        this = self.rounds[-1] if self.rounds else Round(0)
        told: list[Answer] = []
        weights: set[str] = set()
        for reply in replies:
            node, answer = reply.metadata.src_node_id, _answer(reply)
            this.up += _size(reply)
            if answer.get("status") != DONE:
                said = answer.get("message") or answer.get("status", "no answer")
                self._say(node, f"round {self.progress.number}: {said}")
                continue
            self._has[node] = digest
            weights |= {str(answer["weights_sha256"])} if "weights_sha256" in answer else set()
            told += [answer] if "accepted" in answer else []
        if len(weights) > 1:
            log(WARNING, "round %d led to %d different weights", self.progress.number, len(weights))
        this.seconds = time.monotonic() - self._begun
        metrics: dict[str, Any] = {"boards": len(told), "weights": len(weights)}
        if told:
            metrics["accepted"] = sum(bool(answer["accepted"]) for answer in told)
            for name in ("accuracy_before", "accuracy_after", "loss_before", "loss_after"):
                known = [(int(answer["n"]), float(answer[name])) for answer in told if name in answer]
                if total := sum(n for n, _ in known):
                    metrics[name] = sum(n * value for n, value in known) / total
        return MetricRecord(metrics)

    # --- how

    def _start(self) -> FleetFile:
        return wire.decode(self.progress.file) if self.progress.file else FleetFile(self.facts, {})

    def _read(self, answer: Answer, number: int, start: FleetFile) -> tuple[str, Any]:
        """A board's numbers, or what it changes the fleet's low-rank factors by. Raises Unusable."""
        file = wire.decode(bytes(answer["data"]))
        if any(file.facts.get(name, "") != value for name, value in self.facts.items()):
            raise Unusable("it is of another base, engine or type")
        if LEDGER in file.files and "ledger" in KINDS[self.settings.strategy]:
            steps = wire.decode_ledger(file.files[LEDGER])
            return "ledger", ledgers.vector(steps, self._pool.first(number), self._pool.width)
        if LORA in file.files and "adapter" in KINDS[self.settings.strategy]:
            return "adapter", adapters.read_safetensors(file.files[LORA])  # beside what the fleet has come to
        if ADAPTER in file.files and "adapter" in KINDS[self.settings.strategy]:
            return "adapter", adapters.read_gguf(file.files[ADAPTER]).minus(_factors(start))  # with it
        raise Unusable(f"it holds {', '.join(sorted(file.files)) or 'nothing'}, which was not asked for")

    def _together(self, given: dict[str, list[tuple[Any, int | None]]], number: int, start: FleetFile) -> bytes:
        """Each kind's boards among themselves, each with their share of all: a board that gives one kind changes
        nothing by the other."""
        s, files = self.settings, dict(start.files)
        facts = {**self.facts, **({"ranks": start.facts["ranks"]} if "ranks" in start.facts else {})}
        counts = {kind: [examples for _, examples in those] for kind, those in given.items()}
        alike = any(n is None for those in counts.values() for n in those)
        sizes = {
            kind: len(those) if alike or s.robust != "mean" else sum(filter(None, those))
            for kind, those in counts.items()
        }
        total = sum(sizes.values()) or 1
        if given["ledger"]:
            share = sizes["ledger"] / total
            moved = ledgers.averaged([value for value, _ in given["ledger"]], counts["ledger"], s.robust, s.trim)
            known = wire.decode_ledger(files[LEDGER]) if LEDGER in files else {}
            sums = ledgers.added(known, self._pool.first(number), [share * value for value in moved])
            files[LEDGER] = wire.encode_ledger(sums)
        if given["adapter"]:
            factors, kept = adapters.averaged(
                _factors(start),
                [value for value, _ in given["adapter"]],
                counts["adapter"],
                robust=s.robust,
                trim=s.trim,
                rank=s.rank,
                share=sizes["adapter"] / total,
            )
            log(INFO, "round %d: rank %d keeps %.1f %% of the squared norm", number, factors.rank, 100 * kept)
            if self.facts["engine"] == "llamacpp":
                files[ADAPTER] = adapters.write_gguf(factors)
            else:
                files[LORA] = adapters.write_safetensors(factors)
                facts["ranks"] = str(factors.rank)
        return FleetFile(facts, files).encode()

    def _names(self, number: int) -> dict[str, Any]:
        return {"fleet": self.settings.fleet, "run": self.progress.run, "number": number, **self.facts,
                "patience": self.settings.patience}  # fmt: skip

    def _message(self, node: int, kind: str, order: dict[str, Any]) -> Message:
        return Message(RecordDict({ORDER: ConfigRecord(order)}), dst_node_id=node, message_type=kind)

    def _count_down(self, messages: Sequence[Message]) -> None:
        self.rounds[-1].down += sum(map(_size, messages)) if self.rounds else 0

    def _metrics(self, this: Round) -> MetricRecord:
        return MetricRecord(
            {"asked": this.asked, "answered": this.answered, "bytes-down": this.down, "bytes-up": this.up,
             "bytes-up-largest": this.largest, "seconds": this.seconds}
        )  # fmt: skip


def _factors(file: FleetFile) -> Factors:
    """The low-rank factors in the fleet's file."""
    if LORA in file.files:
        return adapters.read_safetensors(file.files[LORA])
    return adapters.read_gguf(file.files[ADAPTER]) if ADAPTER in file.files else Factors({})


def _array(data: bytes) -> ArrayRecord:
    return ArrayRecord({_FILE: Array(np.frombuffer(data, np.uint8))})


def _answer(reply: Message) -> Answer:
    """What a board answered; nothing where there is no answer."""
    if reply.has_error() or ANSWER not in reply.content.config_records:
        return {}
    return dict(reply.content.config_records[ANSWER])


def _size(message: Message) -> int:
    """Bytes of the data in a message, and of the other values and names as text."""
    if not message.has_content():
        return 0
    total = 0
    for record in message.content.config_records.values():
        for name, value in record.items():
            total += len(name) + (len(value) if isinstance(value, bytes) else len(str(value)))
    return total
