"""What `actions` learns from is what the daemon's passes learn from, and what it has measured it does not run again."""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agentd.learn.encoded import Encoded
from tests.support.tiny_passes import LLAMACPP, adapt
from tools import home
from tools.bench import actions, actions_peft, actions_rows
from tools.daemon import DaemonProcess, ToolFailed

LAMP: dict[str, Any] = {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]}
TOOLS = [{"type": "function", "function": {"name": "lamp", "parameters": LAMP}}]


def lines(n: int) -> bytes:
    """Calls and words, in the form of TRL."""
    rows = []
    for i in range(n):
        call = {"type": "function", "function": {"name": "lamp", "arguments": {"on": i % 2 == 0}}}
        answer = {"tool_calls": [call]} if i % 3 else {"content": "Hello!"}
        said = {"role": "user", "content": f"{'light' if i % 2 else 'dark'} {i}"}
        rows.append({"task": "home", "messages": [said, {"role": "assistant", **answer}], "tools": TOOLS})
    return "\n".join(map(json.dumps, rows)).encode()


@pytest.fixture(scope="module")
def learned() -> Iterator[DaemonProcess]:
    """A daemon that has had a pass on calls."""
    with DaemonProcess(None, {**LLAMACPP, "model": {"context": 4096, "threads": 1}}) as daemon:
        daemon.start()
        assert daemon.post("/v1/examples", lines(40)).status == 200
        adapt(daemon, blocks=1)
        yield daemon


@pytest.mark.slow
def test_peft_gets_the_tokens_of_the_pass(learned: DaemonProcess, tmp_path: Path) -> None:
    model = learned.directory / "tiny.gguf"
    actions_rows.encoded(model, learned.state, tmp_path / "tokens.jsonl")
    ours = (tmp_path / "tokens.jsonl").read_text().splitlines()
    theirs = (learned.state / "passes" / "1" / "encoded.jsonl").read_text().splitlines()
    assert len(ours) == 40
    assert len(theirs) > 40  # behind its examples the pass has the model's own answers in words
    assert sorted(ours) == sorted(theirs[:40])
    row = actions_peft.row_of(Encoded.from_json(json.loads(ours[0])))
    assert row[0][-len(row[1]) + 1 :] == row[1][:-1]


@pytest.mark.slow
def test_peft_learns_and_its_adapter_is_served(learned: DaemonProcess, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    model, tokens, adapter = learned.directory / "tiny.gguf", tmp_path / "tokens.jsonl", tmp_path / "adapter.gguf"
    actions_rows.encoded(model, learned.state, tokens)
    tokens.write_text("".join(tokens.read_text().splitlines(keepends=True)[:8]))
    result = actions_peft.train(model, tokens, adapter, seed=0, lr=2e-2, epochs=6, device="cpu")
    assert result["losses"][1] < 0.9 * result["losses"][0]
    assert 0 < result["seconds"] < result["whole"]
    assert result["peak_bytes"] > 100_000_000  # torch and transformers are in it
    with DaemonProcess(model, {"adapt": {"trial": {"duration": "300ms", "max_latency": 100}}}) as daemon:
        daemon.start()
        base = daemon.ask().json["choices"][0]["message"]["content"]
        actions.serve_adapter(daemon, adapter)
        assert daemon.status()["revision"] == 1
        assert daemon.ask().json["choices"][0]["message"]["content"] != base


def test_an_example_with_choices_is_no_row() -> None:
    example = Encoded.of([[1, 2, 3], [1, 2, 4]], [[(0, 1, 3)], [(1, 1, 4)]], 0, [(0, 1, 3)])
    with pytest.raises(ValueError, match="unpack"):
        actions_peft.row_of(example)


def test_an_epoch_has_every_row_once() -> None:
    rows = [([i], [i]) for i in range(40)]
    steps = list(actions_peft.batches(rows, 2, 0))
    assert [len(step) for step in steps] == [16, 16, 8] * 2
    assert sorted(row[0][0] for step in steps[:3] for row in step) == list(range(40))
    assert steps[:3] != steps[3:]


@pytest.mark.slow
def test_the_loss_is_that_of_the_answers_tokens() -> None:
    """Against every row alone, without padding."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    rows = [([5, 6, 7, 8], [8, 9]), ([4, 5, 6, 7, 8, 9, 10], [8, 9, 10, 2]), ([3, 4], [2])]
    alone = 0.0
    for fed, answer in rows:
        likely = model(torch.tensor([fed])).logits[0, -len(answer) :].log_softmax(-1)
        alone -= likely[range(len(answer)), answer].sum().item()
    together = actions_peft.loss_of(model, rows, 0, "cpu")
    assert together.item() == pytest.approx(alone, rel=1e-4)


def test_samples_are_of_training_rows() -> None:
    first, other = (actions_rows.sample(50, 5, seed) for seed in (0, 1))
    assert first[:50] == home.commands("train")[:50]
    assert first != other
    assert {row["split"] for row in (*first, *other)} == {"train"}
    assert [len([row for row in rows if "answer" in row]) for rows in (first, other)] == [5, 5]
    with pytest.raises(ToolFailed, match="commands to learn from"):
        actions_rows.sample(10**6, 0, 0)


def options(**changes: Any) -> argparse.Namespace:
    defaults = {"runs": ["base", "pass", "peft"], "examples": [25, 50], "talk": 0.1, "seeds": [0, 1], "judged": None}
    defaults["wrong"] = [0.0]
    how = {"memory": ["300MB", "none"], "method": "auto", "blocks": "auto", "lrs": [1e-3], "epochs": [1, 3]}
    return argparse.Namespace(**{**defaults, **how, "device": "cpu", **changes})


def test_runs_are_named_by_all_that_is_asked() -> None:
    keys = list(actions.keys(options(), "m"))
    assert len(keys) == 1 + 2 * 2 * (2 + 2)
    assert len({json.dumps(key) for key in keys}) == len(keys)
    assert {tuple(key) for key in keys} == {actions.KEYS}


def test_what_the_file_holds_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "results.jsonl"
    judged = actions_rows.Judgement(0.5, 0.75, 0.1, [{"text": "lights off"}]).as_json()
    learned = {"seconds": 3.0, "peak_bytes": 7e8}
    rows = [key | learned | judged for key in actions.keys(options(), "tiny")]
    output.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["tiny.gguf", "--output", str(output), "--examples", "25,50", "--seeds", "0,1", "--lrs", "1e-3"]
    monkeypatch.setattr(sys, "argv", ["actions", *arguments, "--epochs", "1,3", "--memory", "300MB,none"])
    assert actions.main() == 0
    printed = capsys.readouterr().out
    assert printed.count("\n") == len(rows) + 2
    assert "tiny: PEFT, lr 0.001, 3 epochs, cpu | 50 |  | 1 | 50.0% | 10.0% | 3 s |  | 700 MB |" in printed


def test_a_part_of_the_commands_is_corrected_to_something_else() -> None:
    rows = actions_rows.sample(50, 5, 0)
    wrong = actions_rows.poisoned(rows, 0.2, 0)
    changed = [(old, new) for old, new in zip(rows, wrong, strict=True) if old != new]
    assert len(changed) == 10
    for old, new in changed:
        assert new["text"] == old["text"]
        assert (new["name"], new["arguments"]) != (old["name"], old["arguments"])
    assert wrong == actions_rows.poisoned(rows, 0.2, 0)
    assert actions_rows.poisoned(rows, 0.0, 0) == rows
