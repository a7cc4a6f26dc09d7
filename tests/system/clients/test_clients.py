"""Clients as people have them, unchanged, against a real daemon: over its UNIX socket and over TCP."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ollama
import pytest

from tests.system.clients import agent_clients, ollama_client, openai_client
from tests.system.clients.support import MODEL, QUESTION, Colour, Place
from tools.daemon import DaemonProcess, eventually

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
    "ollama": ollama_client.Ollama(),
}
KEYED: dict[str, Any] = {
    "openai, over TCP with an API key": openai_client.Chat(),
    "ollama, over TCP with an API key": ollama_client.Ollama(),
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


@pytest.fixture(scope="module")
def guarded() -> Iterator[Place]:
    """A daemon on every address, which lets no one in without a key."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with DaemonProcess(None, {"model": {"context": 2048}, "serve": {"tcp": f"0.0.0.0:{port}"}}) as daemon:
        daemon.start()
        made = daemon.post("/admin/keys", {"name": "client", "scopes": ["ask"]}, admin=True)
        place = Place("tcp", daemon, f"http://127.0.0.1:{port}/v1", made.json["key"])
        eventually(lambda: listens(port))
        yield place


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.mark.parametrize("ability", ABILITIES)
@pytest.mark.parametrize("client", KEYED)
def test_clients_with_a_key(guarded: Place, client: str, ability: str) -> None:
    try:
        getattr(KEYED[client], ability)(guarded)
    finally:
        guarded.close()
    assert guarded.seen()["author"] == "key:client"


@pytest.mark.parametrize("over", ["socket", "tcp"])
def test_the_rest_of_ollamas_client(places: dict[str, Place], over: str) -> None:
    with ollama_client.client(places[over]) as server:
        (listed,), (running,) = server.list().models, server.ps().models
        assert listed.model == running.model == f"{MODEL}:latest"
        assert listed.size == running.size == (places[over].daemon.directory / "tiny.gguf").stat().st_size
        shown = server.show(listed.model or "")
        assert "tools" in (shown.capabilities or [])
        assert (shown.modelinfo or {})["general.architecture"] == "llama"
        vectors = server.embed(MODEL, ["one", "two"]).embeddings
        assert len(vectors) == 2
        assert list(server.embeddings(MODEL, "one").embedding) == list(vectors[0])
        options = {"num_predict": 6, "temperature": 0, "seed": 1}
        parts = list(server.generate(MODEL, QUESTION, stream=True, options=options))
        whole = server.generate(MODEL, QUESTION, options=options, keep_alive="5m")
        assert "".join(part.response or "" for part in parts) == whole.response
        assert server.generate(MODEL).done_reason == "load"
        with pytest.raises(ollama.ResponseError, match="no model 'llama9'") as refused:
            server.chat("llama9", [{"role": "user", "content": "Hi."}])
        assert refused.value.status_code == 404


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
    clients = CLIENTS | KEYED
    rows = [
        [name, *("✓" if hasattr(client, ability) else "" for ability in ABILITIES)] for name, client in clients.items()
    ]
    table = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
    for line in table:
        note(line)
    assert "\n".join(table) in DOCUMENT.read_text()
