"""A fleet on this machine: SuperLink, SuperNodes and daemons with a real model, each board with two of four kinds of
commands; what they come to alone, together, and pooled, and what travels.

    python -m tools.bench fleet FLOWER [--strategy adapter|ledger|mixed] [--model MODEL] [--boards 4] [--rounds 2]
                                       [--examples 48] [--judged 80] [--steps N] [--kill daemon,supernode,superlink]
                                       [--what together,alone,pooled] [--output FILE.jsonl]

FLOWER is the bin folder of an environment with agentd-flower's dependencies. `--strategy ledger` and `mixed` serve the
model with engine transformers. `--kill` ends that process with SIGKILL in the middle of a round, starts it again, and
says how the round and the next one end. What FILE holds is printed again in the table; each run adds a row.
"""

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from agentd import models
from tools import home, tiny_model
from tools.daemon import ROOT, DaemonProcess, ToolFailed, eventually, lives

TASK, FLEET = "kind", "bench"
KINDS = {
    "HassLightSet": "light",
    "HassClimateSetTemperature": "climate",
    "HassStartTimer": "timer",
    "HassShoppingListAddItem": "shopping",
}
PROMPT = "Command: {text}\nKind (light, climate, timer or shopping):"
_RESTART = 60.0  # seconds that the SuperLink may take to notice that a node is gone, and to come back
_ROUND = 900.0


def settings(strategy: str, steps: int | None) -> dict[str, Any]:
    """Of a board: short trials, and a gate for the small holdout that there is."""
    gate = {"min_holdout": 5, "max_drift": 5, "max_skill_loss": 1}
    adapt: dict[str, Any] = {
        "enabled": False,
        "recall": "off",
        "gate": gate,
        "trial": {"duration": "1s", "max_latency": 100},
    }
    if steps is not None:
        adapt["zo_steps"] = steps
    return {
        "engine": "llamacpp" if strategy == "adapter" else "transformers",
        "model": {"context": 512, "threads": 1},
        "serve": {"slots": 2, "prefixes": {"disk": 0}},
        "memory": {"reserve": 0, "floor": 0},
        "adapt": adapt,
        "fleet": {"name": FLEET, "send": ["ledger", "adapter", "figures"]},
        "tasks": {TASK: {"choices": list(KINDS.values()), "prompt": PROMPT}},
    }


def rows(split: str) -> list[tuple[str, str]]:
    """Commands with their kind."""
    return [(row["text"], KINDS[row["name"]]) for row in home.commands(split) if row["name"] in KINDS]


def of_board(board: int, n: int, boards: int) -> list[tuple[str, str]]:
    """`n` training rows of the two kinds that a board sees, its own ones."""
    kinds = list(KINDS.values())
    mine = []
    for kind in (kinds[board % 4], kinds[(board + 1) % 4]):
        those = [row for row in rows("train") if row[1] == kind]
        mine += those[board :: max(1, boards)][: n // 2]
    return [mine[i // 2 + (i % 2) * (len(mine) // 2)] for i in range(2 * (len(mine) // 2))]


class Flower:
    """SuperLink and SuperNodes on this machine, and runs of the app."""

    def __init__(self, bin: Path, folder: Path) -> None:
        self._bin, self.folder = bin.absolute(), folder
        self._port = _free_ports(1)[0]
        self._nodes: dict[int, tuple[Path, int]] = {}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        home_ = folder / "flwr"
        home_.mkdir()
        (home_ / "config.toml").write_text(
            f'[superlink]\ndefault = "bench"\n[superlink.bench]\naddress = "127.0.0.1:{self._port}"\ninsecure = true\n'
        )
        path = f"{self._bin}{os.pathsep}{os.environ.get('PATH', '')}"
        own = {"FLWR_HOME": str(home_), "FLWR_TELEMETRY_ENABLED": "0", "PATH": path, "OMP_NUM_THREADS": "1"}
        self._environment = {**os.environ, **own}

    def superlink(self) -> None:
        arguments = ("--insecure", "--host", "127.0.0.1", "--port", str(self._port))
        self._start("superlink", "flower-superlink", *arguments, "--database", str(self.folder / "superlink.db"))
        _listening(self._port)

    def supernode(self, board: int, admin: Path | None = None) -> None:
        if admin is not None:
            self._nodes[board] = admin, _free_ports(1)[0]
        socket_, port = self._nodes[board]
        address = f"127.0.0.1:{self._port}"
        config = f"admin-socket='{socket_}' superlink='{address}'"
        self._start(
            f"supernode {board}",
            "flower-supernode",
            *(
                "--insecure",
                "--superlink",
                address,
                "--host",
                "127.0.0.1",
                "--port",
                str(port),
                "--node-config",
                config,
            ),
        )

    def run(self, **config: Any) -> subprocess.Popen[bytes]:
        """A run of the app; its log is what it prints."""
        given = {"fleet": FLEET, "state": str(self.folder / "fleet.json"), **config}
        text = " ".join(f"{name}={json.dumps(value)}" for name, value in given.items())
        command = [str(self._bin / "flwr"), "run", str(ROOT / "flower"), "bench", "--stream", "--run-config", text]
        log = (self.folder / "run.log").open("wb")
        with log:
            return subprocess.Popen(command, env=self._environment, stdout=log, stderr=log, cwd=self.folder)

    @property
    def log(self) -> str:
        return (self.folder / "run.log").read_text(errors="replace")

    def rounds(self) -> list[dict[str, Any]]:
        """What the server said of each round of the last run."""
        found = []
        for line in self.log.splitlines():
            _, brace, rest = line.partition('{"number"')
            with contextlib.suppress(ValueError):
                found += [json.loads(brace + rest)] if brace else []
        return found

    def state(self) -> dict[str, Any]:
        """What the server keeps."""
        path = self.folder / "fleet.json"
        tree: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {"number": 0}
        return tree

    def kill(self, name: str) -> None:
        """SIGKILL, to all that it started, too."""
        process = self.processes.pop(name)
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for each in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        process.wait(10)
        eventually(lambda: not any(map(lives, family)))

    def close(self) -> None:
        for name in list(self.processes):
            self.kill(name)

    def _start(self, name: str, program: str, *arguments: str) -> None:
        with (self.folder / f"{name.replace(' ', '-')}.log").open("ab") as log:
            self.processes[name] = subprocess.Popen(
                [str(self._bin / program), *arguments], env=self._environment, stdout=log, stderr=log, cwd=self.folder
            )


@contextlib.contextmanager
def fleet(bin: Path, model: Path, options: argparse.Namespace) -> Iterator[tuple[Flower, list[DaemonProcess]]]:
    """Everything up, and every board taught its own examples."""
    folder = Path(tempfile.mkdtemp(prefix="fleet-", dir="/tmp"))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        boards = []
        for number in range(options.boards):
            board = stack.enter_context(DaemonProcess(model, settings(options.strategy, options.steps)))
            board.start()
            teach(board, of_board(number, options.examples, options.boards))
            boards.append(board)
        flower = Flower(bin, folder)
        stack.callback(flower.close)
        flower.superlink()
        for number, board in enumerate(boards):
            flower.supernode(number, board.admin)
        yield flower, boards


def teach(board: DaemonProcess, examples: Sequence[tuple[str, str]]) -> None:
    lines = [json.dumps({"task": TASK, "text": text, "label": kind}) for text, kind in examples]
    answer = board.post("/v1/examples", "\n".join(lines).encode())
    if answer.status != 200:
        raise ToolFailed(f"the examples were refused: {answer.body[:300]!r}")


def accuracy(board: DaemonProcess, judged: Sequence[tuple[str, str]]) -> float:
    """The share of held-out commands, of all four kinds, whose kind the board says right."""
    right = 0
    for text, kind in judged:
        body = {"messages": [{"role": "user", "content": PROMPT.replace("{text}", text)}], "temperature": 0}
        answer = board.post("/v1/chat/completions", {**body, "metadata": {"task": TASK}, "store": False})
        right += answer.json["choices"][0]["message"]["content"] == kind
    return right / len(judged)


def pass_of(board: DaemonProcess, strategy: str) -> dict[str, Any]:
    """An ordinary pass of a board by itself, in the way that its fleet learns."""
    method = {"adapter": "suffix-bp", "ledger": "mezo", "mixed": "lora"}[strategy]
    answer = board.post("/admin/adapt", {"method": method}, admin=True)
    if answer.status != 202:
        raise ToolFailed(f"no pass: {answer.body[:300]!r}")
    number = answer.json["pass"]
    eventually(lambda: board.get(f"/admin/passes/{number}", admin=True).json["pass"]["finished_at"], _ROUND / 5)
    row: dict[str, Any] = board.get(f"/admin/passes/{number}", admin=True).json["pass"]
    return row


def idle(board: DaemonProcess) -> bool:
    return board.get("/admin/fleet", admin=True).json["waits_for"] is None


def together(flower: Flower, boards: list[DaemonProcess], options: argparse.Namespace, judged: Any) -> dict[str, Any]:
    """Rounds one after the other, each a run of its own that goes on from the last one's state, as after a break."""
    config = {"strategy": options.strategy, "robust": options.robust, "min-boards": max(1, options.boards - 1)}
    told: list[dict[str, Any]] = []
    for _ in range(options.rounds):
        begin = time.monotonic()
        if flower.run(
            **config, rounds=1, seeds=options.seeds, pool=8 * options.seeds, timeout=_ROUND, patience=_ROUND / 2
        ).wait():
            raise ToolFailed(f"flwr run failed:\n{flower.log[-3000:]}")
        (facts,) = flower.rounds() or [{}]
        for board in boards:
            eventually(lambda board=board: idle(board), 60)  # type: ignore[misc]
        told.append(
            {**facts, "wall": round(time.monotonic() - begin, 1), "accuracy": [accuracy(b, judged) for b in boards]}
        )
        print(json.dumps(told[-1]), file=sys.stderr, flush=True)
    sent = [board.get("/admin/fleet", admin=True).json for board in boards]
    return {
        "rounds": told,
        "bytes_out": [each["bytes_out"] for each in sent],
        "bytes_in": [each["bytes_in"] for each in sent],
    }


def killed(flower: Flower, boards: list[DaemonProcess], what: str, options: argparse.Namespace) -> dict[str, Any]:
    """One round in the middle of which a process is killed and started again, and the next one."""
    config = {"strategy": options.strategy, "robust": options.robust, "min-boards": max(1, options.boards - 1)}
    config |= {"rounds": 1, "seeds": options.seeds, "pool": 8 * options.seeds, "timeout": 240.0, "patience": 120.0}
    before, examples = flower.state()["number"], [board.counts()["examples"] for board in boards]
    revisions = [board.status()["revision"] for board in boards]
    begin = time.monotonic()
    run = flower.run(**config)
    eventually(
        lambda: (
            (boards[0].get("/admin/progress", admin=True).json["pass"] or {}).get("phase") in ("train", "zo", "tap")
        ),
        60,
    )
    if what == "daemon":
        boards[0].kill()
        boards[0].start()
    elif what == "supernode":
        flower.kill("supernode 0")
        flower.supernode(0)
    else:
        flower.kill("superlink")
        flower.superlink()
    try:
        code: int | None = run.wait(_RESTART if what == "superlink" else 300)
    except subprocess.TimeoutExpired:
        run.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            run.wait(20)
        run.kill()
        code = None
    row: dict[str, Any] = {"killed": what, "run": code, "seconds": round(time.monotonic() - begin, 1)}
    row["rounds"] = [flower.state()["number"] - before]
    row["this"] = flower.rounds()[-1:]
    for board in boards:
        eventually(lambda board=board: idle(board), 60)  # type: ignore[misc]
    if flower.run(**config).wait():
        raise ToolFailed(f"the next run failed:\n{flower.log[-3000:]}")
    row["next"] = flower.rounds()[-1:]
    row["rounds"].append(flower.state()["number"] - before)
    row["examples_kept"] = [board.counts()["examples"] for board in boards] == examples
    row["serving"] = [board.status()["state"] for board in boards]
    row["revisions"] = [revisions, [board.status()["revision"] for board in boards]]
    return row


@dataclass(frozen=True)
class Bench:
    options: argparse.Namespace
    model: Path

    def run(self) -> Iterator[dict[str, Any]]:
        options = self.options
        judged = [
            row
            for i in range(4)
            for row in [r for r in rows("heldout") if r[1] == list(KINDS.values())[i]][: options.judged // 4]
        ]
        facts = {
            "strategy": options.strategy,
            "model": self.model.name,
            "boards": options.boards,
            "judged": len(judged),
        }
        wanted = options.what.split(",")
        if "together" in wanted or options.kill:
            with fleet(options.flower, self.model, options) as (flower, boards):
                if "together" in wanted:
                    base = accuracy(boards[0], judged)
                    yield {**facts, "what": "together", "base": base, **together(flower, boards, options, judged)}
                for what in filter(None, options.kill.split(",")):
                    yield {**facts, "what": "kill -9", **killed(flower, boards, what, options)}
        if "alone" in wanted:
            for number in range(options.boards):
                yield {
                    **facts,
                    "what": "alone",
                    "board": number,
                    **self._single(of_board(number, options.examples, options.boards), judged),
                }
        if "pooled" in wanted:
            every = [
                row for number in range(options.boards) for row in of_board(number, options.examples, options.boards)
            ]
            yield {**facts, "what": "pooled", **self._single(every, judged)}

    def _single(self, examples: list[tuple[str, str]], judged: list[tuple[str, str]]) -> dict[str, Any]:
        with DaemonProcess(self.model, settings(self.options.strategy, self.options.steps)) as board:
            board.start()
            teach(board, examples)
            row = pass_of(board, self.options.strategy)
            seconds = round(sum(row["phases"].values()), 1)
            return {
                "outcome": row["state"],
                "reason": row["reason"],
                "seconds": seconds,
                "accuracy": accuracy(board, judged),
            }


def _free_ports(n: int) -> list[int]:
    held = [socket.socket() for _ in range(n)]
    try:
        for each in held:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in held]
    finally:
        for each in held:
            each.close()


def _listening(port: int) -> None:
    def look() -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return True
        return False

    eventually(look, 30)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tools.bench fleet", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("flower", type=Path)
    parser.add_argument("--strategy", choices=("adapter", "ledger", "mixed"), default="adapter")
    parser.add_argument("--robust", choices=("mean", "trimmed"), default="mean")
    parser.add_argument("--model", default="default")
    for name, default in (("boards", 4), ("rounds", 2), ("examples", 48), ("judged", 80), ("seeds", 32)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--kill", default="")
    parser.add_argument("--what", default="together,alone,pooled")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.model == "tiny":
            model = tiny_model.write(Path(folder) / "tiny.gguf")
        else:
            model = asyncio.run(asyncio.to_thread(models.resolve, options.model))
        for row in Bench(options, model).run():
            print(json.dumps(row), flush=True)
            if options.output:
                with options.output.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
