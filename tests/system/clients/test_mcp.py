"""`agentctl mcp` under the stock client, for a real daemon that learns."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest

from tests.support import tiny_passes
from tools import tiny_model
from tools.daemon import DaemonProcess

pytestmark = [
    pytest.mark.skipif(sys.version_info < (3, 11), reason="the library mcp has no pin for Python 3.10"),
    pytest.mark.slow,
]

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "lamp",
            "description": "Switches it.",
            "parameters": {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]},
        },
    }
]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    model = tiny_model.write(tmp_path_factory.mktemp("mcp") / "tiny.gguf")
    with DaemonProcess(model, tiny_passes.LLAMACPP) as running:
        running.start()
        yield running


def call(
    daemon: DaemonProcess, *calls: tuple[str, dict[str, Any]], agrees: bool | None = None, options: tuple[str, ...] = ()
) -> list[tuple[bool, Any]]:
    """(whether it failed, what it says) of each call of one session. `agrees`: what the owner says when asked; None:
    this client cannot ask."""
    from mcp import Client, StdioServerParameters
    from mcp.types import ElicitResult

    asked: list[str] = []

    async def elicit(context: Any, params: Any) -> Any:
        asked.append(params.message)
        return ElicitResult(action="accept" if agrees else "decline", content={"agreed": bool(agrees)})

    async def session() -> list[tuple[bool, Any]]:
        command = ["-m", "agentd.ctl.app", "mcp", "--socket", str(daemon.admin), *options]
        server = StdioServerParameters(command=sys.executable, args=command, cwd=str(Path(__file__).parents[3]))
        results: list[tuple[bool, Any]] = []
        ways = Client(
            server,
            elicitation_callback=elicit if agrees is not None else None,
            mode="legacy" if agrees else "auto",  # questions in the middle of a call, as before 2026, or as its result
        )
        async with ways as client:
            for name, arguments in calls:
                result = await client.call_tool(name, arguments)
                said = result.structured_content if not result.is_error else getattr(result.content[0], "text", "")
                results.append((bool(result.is_error), said))
        return results

    results = anyio.run(session)
    assert bool(asked) == (agrees is not None)
    return results


def test_an_agent_corrects_its_last_action(daemon: DaemonProcess) -> None:
    answer = daemon.ask("Light, please.", tools=TOOLS, metadata={"episode": "evening"})
    id = answer.json["id"]
    right = {"right_calls": [{"name": "lamp", "arguments": {"on": True}}]}
    (failed, given), (_, listed), (wrong, why) = call(
        daemon,
        ("give_feedback", right),
        ("answers", {"episode": "evening"}),
        ("give_feedback", {"right_text": "No.", "label": "no"}),
    )
    assert not failed, given
    assert given["about"] == {"inference_id": id}
    assert [row["id"] for row in listed["inferences"]] == [id]
    assert wrong
    assert "exactly one" in why
    (example,) = daemon.get("/admin/examples?limit=1", admin=True).json["examples"]
    assert json.loads(example["target"])["tool_calls"][0]["function"]["name"] == "lamp"


def test_it_starts_a_pass_and_rolls_back_when_the_owner_agrees(daemon: DaemonProcess) -> None:
    tiny_passes.teach(daemon)
    ((failed, ended),) = call(daemon, ("start_pass", {}))
    assert not failed, ended
    assert ended["state"] == "committed", ended
    revision = daemon.status()["revision"]
    assert revision == ended["revision"]
    ((cannot, why),) = call(daemon, ("roll_back", {}))
    assert cannot
    assert "agentctl rollback" in why
    ((declined, why),) = call(daemon, ("roll_back", {"reason": "a trial"}), agrees=False)
    assert declined
    assert "did not agree" in why
    assert daemon.status()["revision"] == revision
    ((failed, _),) = call(daemon, ("roll_back", {}), agrees=True)
    assert not failed
    assert daemon.status()["revision"] == 0
    ((failed, _),) = call(daemon, ("roll_back", {"revision": revision}), options=("--may-roll-back",))
    assert not failed
    assert daemon.status()["revision"] == revision


def test_what_reads_reads(daemon: DaemonProcess) -> None:
    status, tasks, history, missing = call(
        daemon, ("status", {}), ("tasks", {}), ("history", {"limit": 3}), ("show_pass", {"number": 4711})
    )
    assert status[1]["revision"] == daemon.status()["revision"]
    assert "tasks" in tasks[1]
    assert history[1]
    assert missing[0]
    assert "4711" in missing[1]
