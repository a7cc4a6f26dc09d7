"""Calls as passes learn them: the gate has holdout answered as it is served, and says what came out."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.tiny_passes import LLAMACPP, SETTINGS, adapt, ctl, directory, manifest
from tools import tiny_model
from tools.daemon import DaemonProcess

pytestmark = pytest.mark.slow

TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t.function.name }} {% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}{% for c in m.tool_calls or [] %}<tool_call>"
    "{{ {'name': c.function.name, 'arguments': c.function.arguments} | tojson }}</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "additionalProperties": False}}}
    for name in ("aa", "zz")
]


def lines(n: int) -> bytes:
    """Which of two tools is named by what a text is made of, the same where it is a choice to call, and talk that wants
    none of them."""
    rows = []
    for i in range(n):
        name = "az"[i % 2] * 2
        call = {"id": f"call_{i}", "type": "function", "function": {"name": name, "arguments": "{}"}}
        said = [{"role": "user", "content": name * (3 + i % 7) + f" {i}"}, {"role": "assistant", "tool_calls": [call]}]
        rows.append({"task": "home", "messages": said, "tools": TOOLS, "tool_choice": "required"})
        rows.append({"task": "free", "messages": said, "tools": TOOLS})
    rows += [
        {"task": "talk", "messages": [{"role": "user", "content": f"hello {i}"}], "completion": "Hi!", "tools": TOOLS}
        for i in range(30)
    ]
    return "\n".join(map(json.dumps, rows)).encode()


@pytest.fixture(scope="module", params=["llamacpp", "transformers"])
def learned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DaemonProcess]:
    folder = tmp_path_factory.mktemp("model")
    model = tiny_model.write(folder / "tiny.gguf", template=TEMPLATE)
    settings: dict[str, Any] = LLAMACPP
    if request.param == "transformers":
        model, settings = directory(folder, model), SETTINGS
    # What it learns is no matter: a few steps of MeZO need no trainer.
    adapting = {**settings["adapt"], "method": "mezo", "zo_steps": 6}
    settings = {**settings, "adapt": adapting, "model": {"threads": 1, "context": 512}}
    with DaemonProcess(model, settings) as daemon:
        daemon.start()
        answer = daemon.post("/v1/examples", lines(60))
        assert answer.status == 200, answer.body
        yield daemon


def test_the_gate_judges_calls(learned: DaemonProcess, capfd: pytest.CaptureFixture[str]) -> None:
    row = adapt(learned)
    assert row["state"] in ("committed", "rejected"), row["reason"]
    home, talk = row["gate"]["tasks"]["home"], row["gate"]["tasks"]["talk"]
    assert (home["metric"], talk["metric"]) == ("call", "loss")
    assert home["answered"] == home["n"] >= 5
    assert all(0 <= home[side]["accuracy"] <= 1 for side in ("before", "after"))
    assert "no_call" not in home
    free = row["gate"]["tasks"]["free"]
    for facts, n in ((talk, 100), (free, 100)):
        assert facts["no_call"]["n"] > n
        assert 0 <= facts["no_call"]["before"] <= 1
    answers = home["answers"]
    assert len(answers) == min(10, home["n"])
    assert {each["right"] for each in answers} == {"aa({})", "zz({})"}
    assert all(each["before"].startswith(("aa(", "zz(")) for each in answers)
    assert sum(each["after_right"] for each in answers) > 0 or home["after"]["accuracy"] == 0
    assert ctl(learned, "pass", str(row["id"]), "--json") == 0
    assert json.loads(capfd.readouterr().out)["pass"]["gate"]["tasks"]["home"]["answers"] == answers
    if row["state"] == "committed":
        assert "answers" not in manifest(learned, row["revision"])["tasks"]["home"]


def test_its_own_answers_in_words_are_learned_beside_calls(learned: DaemonProcess) -> None:
    number = learned.get("/admin/passes", admin=True).json["passes"][-1]["id"]
    events = learned.get(f"/admin/passes/{number}", admin=True).json["events"]
    (event,) = [each for each in events if each["kind"] == "replay"]
    answered, asked = map(int, re.findall(r"\b\d+\b", event["message"]))
    assert 0 < answered <= asked
    assert asked == pytest.approx(0.8 * 60, abs=12)
    lines = (learned.state / "passes" / str(number) / "replay.jsonl").read_text().splitlines()
    assert len(lines) == answered
    assert all(not json.loads(line)["target"].get("tool_calls") for line in lines)


def test_what_was_answered_is_forgotten_with_its_example(learned: DaemonProcess) -> None:
    number = learned.get("/admin/passes", admin=True).json["passes"][0]["id"]

    def answers() -> list[str]:
        gate = learned.get(f"/admin/passes/{number}", admin=True).json["pass"]["gate"]
        return [each["example"] for each in gate["tasks"]["home"]["answers"]]

    first, *rest = answers()
    assert ctl(learned, "feedback", "forget", "--example", first, "--yes") == 0
    assert answers() == rest
