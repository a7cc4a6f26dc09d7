"""The trainer as the daemon sees it: a process, its events, its exit status and the file it leaves."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agentd.nn.lora_blocks import read_adapter, write_adapter
from tests.engine.trainer.conftest import N_LAYER


@pytest.fixture(scope="module")
def tap(write_tap: Any) -> Path:
    path: Path = write_tap(N_LAYER - 1)
    return path


def test_a_pass_from_start_to_adapter_and_on_from_there(
    tap: Path, make_spec: Any, run_trainer: Any, tmp_path: Path, llama: Any
) -> None:
    run = run_trainer(make_spec(1, tap))
    assert run.status == 0, run.log
    assert [event["event"] for event in run.events[:3]] == ["started", "ready", "dev"]
    steps, devs, done = run.kind("step"), run.kind("dev"), run.events[-1]
    assert [event["step"] for event in steps] == [1, 2, 3, 4]
    assert {event["steps"] for event in steps} == {4}
    assert [event["epoch"] for event in steps] == [0, 0, 1, 1]
    assert [event["step"] for event in devs] == [0, 1, 2, 3, 4]
    assert done["event"] == "done"
    assert done["dev_loss_before"] == devs[0]["loss"]
    assert done["dev_loss_after"] == min(event["loss"] for event in devs) < devs[0]["loss"]
    assert done["dev_accuracy_before"] in (0.0, 0.5, 1.0)
    assert done["best_step"] == [event["step"] for event in devs if event["best"]][-1]
    assert 200e6 < done["peak_rss"] < 700e6
    adapter = read_adapter(Path(done["output"]))
    assert {name.split(".")[1] for name in adapter.pairs} == {str(N_LAYER - 1)}
    with llama.adapted(Path(done["output"])):
        llama.logits(llama.tokens("a film"))

    # The same specification trains the same adapter.
    first = Path(done["output"]).read_bytes()
    assert run_trainer(make_spec(1, tap)).status == 0
    assert Path(done["output"]).read_bytes() == first

    # A second pass begins where the first one ended, and leaves other blocks alone.
    other = {"blk.3.ffn_up.weight": (np_tensor(8, 576), np_tensor(1536, 8))}
    parent = tmp_path / "parent.gguf"
    write_adapter(parent, "llama", adapter.alpha, {**adapter.pairs, **other})
    again = run_trainer(make_spec(1, tap, initial=str(parent), output=str(tmp_path / "second.gguf")))
    assert again.status == 0, again.log
    assert again.kind("dev")[0]["loss"] == pytest.approx(done["dev_loss_after"], rel=1e-4)
    second = read_adapter(tmp_path / "second.gguf")
    assert second.pairs["blk.3.ffn_up.weight"][1].equal(other["blk.3.ffn_up.weight"][1])


def np_tensor(rows: int, columns: int) -> Any:
    import torch

    return torch.from_numpy(np.arange(rows * columns, dtype=np.float32).reshape(rows, columns))


def test_the_probe_reads_the_metadata(model_path: Path, run_trainer: Any) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "agentd.trainer", "--probe", str(model_path)], capture_output=True, text=True, check=True
    )
    answer = json.loads(run.stdout)
    # torch alone takes more than the one, all of it less
    assert 100 * 2**20 < answer.pop("runtime_bytes") < answer.pop("start_bytes") < 1024 * 2**20
    flags = Path("/proc/cpuinfo").read_text().split()
    per_rank = (576 + 192) + (576 + 576) + 3 * (576 + 1536)  # v, o, gate, up, down
    assert answer == {
        "supported": True,
        "reason": None,
        "most_blocks": N_LAYER,
        "cosines": None,
        "architecture": "llama",
        "blocks": N_LAYER,
        "hidden_size": 576,
        "trainable_per_block": {"rank_1": per_rank},
        "bf16": any(flag in flags for flag in ("avx512_bf16", "amx_bf16", "bf16")),
    }


def test_an_unknown_architecture_is_unsupported(
    tap: Path, make_spec: Any, run_trainer: Any, tmp_path: Path, small_model: Any
) -> None:
    path = small_model(tmp_path / "model.gguf", "nosuch")
    probe = run_trainer(None, "--probe", str(path))
    assert probe.status == 0
    assert probe.events[0]["supported"] is False
    assert "nosuch" in probe.events[0]["reason"]
    run = run_trainer(make_spec(1, tap, model=str(path)))
    assert run.status == 3
    assert "nosuch" in run.events[-1]["message"]


def test_bad_input_ends_with_an_error_that_says_what_is_wrong(
    tap: Path, make_spec: Any, run_trainer: Any, tmp_path: Path
) -> None:
    short = tmp_path / "short.f32"
    short.write_bytes(tap.read_bytes()[: -10 * 4 * 576])
    for spec, said in (
        (make_spec(1, tmp_path / "missing.f32"), "missing.f32: No such file"),
        (make_spec(1, short), "cut short"),
        (make_spec(1, tap, model=str(tmp_path / "no.gguf")), "no.gguf"),
        ('{"model": 1', "is no JSON"),
    ):
        run = run_trainer(spec)
        assert run.status == 1
        assert run.events[-1]["event"] == "error"
        assert said in run.events[-1]["message"]
    assert not (tmp_path / "adapter.gguf").exists()


def test_terminating_it_is_quick_and_leaves_no_file(tap: Path, make_spec: Any, tmp_path: Path) -> None:
    spec = make_spec(1, tap, options={"max_epochs": 100000, "patience": 100000, "batch": 4})
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    command = [sys.executable, "-m", "agentd.trainer", str(tmp_path / "spec.json")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if json.loads(line)["event"] == "step":
                break
        assert Path(f"/proc/{process.pid}/oom_score_adj").read_text().strip() == "1000"
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.2)
        process.send_signal(signal.SIGCONT)
        assert "step" in process.stdout.readline() + process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        start = time.monotonic()
        process.wait(timeout=10)
        assert time.monotonic() - start < 5
    assert process.returncode == 128 + signal.SIGTERM
    assert not (tmp_path / "adapter.gguf").exists()


def test_nobody_listening_ends_it(tap: Path, make_spec: Any, tmp_path: Path) -> None:
    """A daemon that was killed must not leave a trainer running for a result that no one takes."""
    spec = make_spec(1, tap, options={"max_epochs": 100000, "patience": 100000})
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    command = [sys.executable, "-m", "agentd.trainer", str(tmp_path / "spec.json")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(timeout=60) == 1


def test_steps_that_are_too_large_are_taken_back(tap: Path, make_spec: Any, run_trainer: Any) -> None:
    run = run_trainer(make_spec(1, tap, options={"batch": 4, "max_epochs": 20, "patience": 20, "lr": 1e4}))
    assert run.status == 0, run.log
    backs, done = run.kind("back"), run.events[-1]
    assert backs, "the first step may help by chance, the next ones do not"
    assert done["dev_loss_after"] < done["dev_loss_before"], "smaller steps from the same start lead down"


def test_who_has_little_time_takes_fewer_steps_and_looks_at_the_last(
    tap: Path, make_spec: Any, run_trainer: Any
) -> None:
    options = {"batch": 4, "max_epochs": 100_000, "patience": 1_000_000, "seconds": 10.0}
    run = run_trainer(make_spec(1, tap, options=options))
    assert run.status == 0, run.log
    steps, judged = run.kind("step"), run.kind("dev")
    assert 3 < len(steps) < steps[0]["steps"]
    assert steps[-1]["steps"] == steps[-1]["step"] == judged[-1]["step"] == run.events[-1]["steps"]


def test_a_few_examples_of_dev_do_not_say_where_it_ends(tap: Path, make_spec: Any, run_trainer: Any) -> None:
    spec = make_spec(1, tap, options={"batch": 4, "max_epochs": 6, "patience": 1, "lr": 1e-3})
    assert 0 < len(spec["dev"]) < 24
    run = run_trainer(spec)
    assert run.status == 0, run.log
    done = run.events[-1]
    assert done["steps"] == done["best_step"] == run.kind("step")[0]["steps"]
    assert done["dev_loss_after"] == run.kind("dev")[-1]["loss"] < done["dev_loss_before"]
