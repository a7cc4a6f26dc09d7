"""The demos' parts against a real daemon; the whole of them needs a model that learns, and minutes."""

import asyncio
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
from rich.console import Console

from tests.support import tiny_passes
from tools import home
from tools.daemon import DaemonProcess, followed
from tools.demo.agent import Answer
from tools.demo.home_agent import HomeAgent
from tools.demo.report import Report

MAX_TOKENS = 80  # bytes: more than a call has in front of its arguments


@pytest.fixture(scope="module")
def daemon() -> Iterator[DaemonProcess]:
    with DaemonProcess(None, {"model": {"context": 8192, "threads": 1}}) as process:
        yield process.start()


class Forced(HomeAgent):
    """Asks for a call of one short tool: a random model calls nothing by itself, and with bytes for tokens all the
    home's tools are more than it was made for."""

    async def tell(self, text: str) -> Answer:
        return await self.ask(text, task=home.TASK, max_tokens=MAX_TOKENS, tools=home.TOOLS[:1], tool_choice="required")


async def corrected(socket: Path) -> tuple[dict[str, Any], HomeAgent, bool]:
    agent = Forced(socket)
    try:
        row = next(row for row in home.commands("train") if row["name"] == "HassTurnOn" and "area" in row["arguments"])
        return row, agent, await agent.teach(row)
    finally:
        await agent.close()


@pytest.mark.slow
def test_a_wrong_action_is_done_right_and_becomes_an_example(daemon: DaemonProcess) -> None:
    row, agent, wrong = asyncio.run(corrected(daemon.api))
    assert wrong
    assert agent.home.on[row["arguments"]["area"], row["arguments"]["domain"]]
    (example,) = daemon.get("/admin/examples", admin=True).json["examples"]
    assert (example["task"], example["kind"]) == (home.TASK, "message")
    (call,) = json.loads(example["target"])["tool_calls"]
    assert call["function"]["name"] == row["name"]
    assert json.loads(call["function"]["arguments"]) == row["arguments"]


async def answers_of(socket: Path) -> list[Answer]:
    agent = HomeAgent(socket)
    try:
        options: dict[str, Any] = {"tools": home.TOOLS[:1], "tool_choice": "required", "max_tokens": MAX_TOKENS}
        return await agent.ask_all(["lights on", "lights on", "say yes"], lambda: None, **options)
    finally:
        await agent.close()


@pytest.mark.slow
def test_streamed_calls_are_put_together(daemon: DaemonProcess) -> None:
    first, again, other = asyncio.run(answers_of(daemon.api))
    assert first.said == again.said
    for answer in (first, other):
        (call,) = answer.calls
        assert call["function"]["name"] == "HassTurnOn"
        assert call["id"]
        assert answer.id
        assert answer.revision == 0


@pytest.mark.parametrize("after", [0.2, 0.8])
def test_a_promise_that_is_not_kept_is_named(after: float) -> None:
    console = Console(file=io.StringIO(), width=120)
    report = Report("commands done right")
    report.note("accuracy_after", after)
    report.add_swap("rollback", {"swap_ms": 0.1})
    report.note("rollback_differences", 0)
    report.note("forward_differences", 0)
    report.figures["traffic"] = {"failures": [], "contradictions": [], "ttft_ratio": {"single": 1.0}}
    report.figures["pass"] = {"peaks": {"daemon": 50e6, "total": 400e6}}
    kept = report.promises_kept(console, {"at least half": lambda figures: figures["accuracy_after"] >= 0.5})
    printed = console.file.getvalue()  # type: ignore[attr-defined]
    assert kept == (after > 0.5)
    assert ("✗ at least half" in printed) != kept


@pytest.mark.slow
def test_who_stops_waiting_for_a_pass_does_not_stay_until_it_ends() -> None:
    with DaemonProcess(None, {**tiny_passes.LLAMACPP, "model": {"context": 1024, "threads": 1}}) as daemon:
        daemon.start()
        tiny_passes.teach(daemon)
        number = tiny_passes.begin(daemon, method="mezo", zo_steps=100_000)

        async def impatient() -> None:
            with anyio.fail_after(1):
                await followed(daemon.ctl, number)

        with pytest.raises(TimeoutError):
            asyncio.run(impatient())  # joins the threads that are left
        assert not tiny_passes.progress(daemon)["done"]
        assert daemon.post("/admin/cancel", admin=True).status == 200
