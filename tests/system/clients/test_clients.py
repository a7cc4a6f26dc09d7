"""Clients as people have them, unchanged, against a real daemon: over its UNIX socket and over TCP."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.system.clients import agent_clients, openai_client
from tests.system.clients.support import MODEL, QUESTION, Colour, Place
from tools.daemon import DaemonProcess

pytestmark = [
    pytest.mark.skipif(sys.version_info < (3, 11), reason="these clients need newer pins than Python 3.10 has"),
    pytest.mark.slow,
]

CLIENTS: dict[str, Any] = {
    "openai, chat completions": openai_client.Chat(),
    "openai, responses": openai_client.Responses(),
    "openai-agents, responses": agent_clients.Agents(responses=True),
    "openai-agents, chat completions": agent_clients.Agents(responses=False),
    "pydantic-ai": agent_clients.PydanticAI(),
    "langchain-openai": agent_clients.LangChain(),
    "llm": agent_clients.LLM(),
}
ABILITIES = {
    "plain": "plain chat",
    "stream": "stream",
    "tools": "tools: ask, call, result, answer",
    "structured": "structured output",
    "turns": "several turns",
}
DOCUMENT = Path(__file__).parents[3] / "docs" / "clients.md"


@pytest.fixture(scope="module")
def places() -> Iterator[dict[str, Place]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {"model": {"context": 2048}, "serve": {"tcp": f"127.0.0.1:{port}"}}
    with DaemonProcess(None, settings) as daemon:
        daemon.start()
        yield {
            "socket": Place("socket", daemon, "http://agentd/v1"),
            "tcp": Place("tcp", daemon, f"http://127.0.0.1:{port}/v1"),
        }


@pytest.mark.parametrize("over", ["socket", "tcp"])
@pytest.mark.parametrize("ability", ABILITIES)
@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::PendingDeprecationWarning")
def test_clients(places: dict[str, Place], client: str, ability: str, over: str) -> None:
    try:
        getattr(CLIENTS[client], ability)(places[over])
    finally:
        places[over].close()


def test_llm_on_the_command_line(places: dict[str, Place], tmp_path: Path) -> None:
    """It has no option for tool_choice, and a random model calls nothing by itself: what is declared arrives."""
    place = places["tcp"]
    model = {"model_id": "board", "model_name": MODEL, "api_base": place.url}
    models = [{**model, "supports_tools": True, "supports_schema": True}]
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps(models))  # which is YAML
    functions = tmp_path / "functions.py"
    functions.write_text('def warmth(room: str) -> str:\n    "How warm a room is."\n    return "21 degrees"\n')

    def llm(*arguments: str) -> str:
        command = [sys.executable, "-m", "llm", "prompt", "-m", "board", "-o", "temperature", "0", *arguments]
        environment = {**os.environ, "LLM_USER_PATH": str(tmp_path)}
        options: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 120, "check": False}
        done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, **options)
        assert done.returncode == 0, done.stderr
        return str(done.stdout)

    llm("-o", "max_tokens", "6", "-T", "llm_version", "--functions", str(functions), QUESTION)
    tools = {tool["function"]["name"] for tool in place.seen()["input"]["tools"]}
    assert tools == {"llm_version", "warmth"}
    llm("-o", "max_tokens", "6", "-c", "And then?")
    assert [message["role"] for message in place.seen()["input"]["messages"]] == ["user", "assistant", "user"]
    answer = llm("-o", "max_tokens", "200", "--schema", json.dumps(Colour.model_json_schema()), QUESTION)
    Colour.model_validate_json(answer)


def test_the_document_has_the_matrix(note: Callable[[str], None]) -> None:
    head = ["client", *ABILITIES.values()]
    rows = [
        [name, *("✓" if hasattr(client, ability) else "" for ability in ABILITIES)] for name, client in CLIENTS.items()
    ]
    table = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
    for line in table:
        note(line)
    assert "\n".join(table) in DOCUMENT.read_text()
