"""Passes of engine llama.cpp on the tiny model: the real trainer's process, and the engine that it takes turns with."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from agentd.adapt.passes import zeroth_order
from agentd.engine.llamacpp.adapters import read_control_vector
from agentd.engine.llamacpp.engine import LlamaCppEngine
from agentd.engine.operations import Encode, ScoreExamples, Tap, Use, WriteControl
from agentd.engine.session import Session
from agentd.learn.encoded import Encoded, shared_prefix
from agentd.learn.optimise import StepResult, Trajectory
from agentd.nn.lora_blocks import read_adapter
from tools import tiny_model

from .comparison import NEARLY, ROUGHLY
from .samples import DEV, TRAIN, LocalEngine, adapters, examples, norm, write_lines

_ROOT = Path(__file__).parents[2]
_N_LAYER, _N_EMBD = tiny_model.N_BLOCKS, tiny_model.N_EMBD
_OPTIONS = {"rank": 4, "alpha": 8.0, "batch": 4, "max_epochs": 3, "patience": 9, "lr": 3e-3, "seed": 5, "threads": 1}
_ZO_STEPS = 14
_NLL_WEIGHT = 0.1

Answer = Callable[[dict[str, Any]], dict[str, Any]]


def measure(folder: Path) -> dict[str, Any]:
    learning = _Pass(folder)
    try:
        suffix = learning.suffix_bp(folder / "suffix.gguf")
        blockwise = learning.blockwise_bp(folder / "blockwise.gguf")
        elastic = learning.zeroth_order(folder / "suffix.gguf", folder / "control.gguf")
        stacked = learning.on_top(*adapters(folder), folder / "stacked.gguf")
    finally:
        learning.close()
    return {
        "suffix-bp": suffix,
        "blockwise-bp": blockwise,
        "elasticzo, its zeroth-order steps after those of suffix-bp": elastic,
        "suffix-bp on top of a revision, a block and a few tokens at a time": stacked,
    }


class _Pass:
    """What a pass does, in small: the engine is in this process, the trainer in one of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._model = tiny_model.write(folder / "tiny.gguf")
        self._engine = LlamaCppEngine(self._model, context=512, slots=2, threads=1)
        self._local = LocalEngine(Session(self._engine.background(lambda: False)))
        source, target = write_lines(folder / "examples.jsonl", examples()), folder / "encoded.jsonl"
        self._local.run(Encode(source, target))
        self._file = target
        self._local.run(Use("0"))

    def close(self) -> None:
        self._engine.close()

    def suffix_bp(self, output: Path) -> dict[str, Any]:
        """Two blocks, on hidden states that the engine tapped."""
        index = self._local.run(
            Tap([*TRAIN, *DEV], first=_N_LAYER - 2, end=_N_LAYER - 1, path=self._folder / "tap.f32")
        )
        states = {"states": "tapped", "prefix": index.prefix_rows, "starts": index.starts}
        return self._train(2, output, states)

    def blockwise_bp(self, output: Path) -> dict[str, Any]:
        """Every block, one at a time; the engine is asked in every step."""
        return self._train(_N_LAYER, output, {"states": "asked"}, self._answer)

    def zeroth_order(self, adapter: Path, control: Path) -> dict[str, Any]:
        """Steps on the control vectors of the trunk, below an adapter."""
        self._engine.stage("candidate", adapter, None)
        self._local.run(Use("candidate"))
        results: list[StepResult] = []

        async def run() -> Trajectory:
            local: Any = self._local
            return await zeroth_order.run(
                local,
                train=TRAIN,
                dev=DEV,
                steps=_ZO_STEPS,
                nll_weight=_NLL_WEIGHT,
                seed=3,
                weights="candidate",
                on_step=results.append,
            )

        trajectory = asyncio.run(run())
        self._local.run(WriteControl(control))
        vectors = read_control_vector(control, _N_LAYER, _N_EMBD)
        record = curve(results, trajectory)
        record[ROUGHLY]["control"] = [norm(torch.from_numpy(row)) for row in vectors]
        # The engine keeps keys and values in 16 bits: its losses have a grain, and every step builds on the one before.
        return record | {NEARLY: {key: record.pop(key) for key in ("loss", "dev_loss")}}

    def on_top(self, adapter: Path, control: Path, output: Path) -> dict[str, Any]:
        """Goes on from an adapter, over a control vector; the trainer runs the trunk and keeps one block in memory."""
        lines = self._file.read_text(encoding="utf-8").splitlines()
        prefix = shared_prefix([Encoded.from_json(json.loads(line)) for line in lines])
        options = {**_OPTIONS, "max_epochs": 2, "checkpoint": True, "micro_tokens": 64}
        changes: dict[str, Any] = {"initial": str(adapter), "control": str(control), "options": options}
        return self._train(2, output, {"states": "computed", "prefix": prefix}, **changes)

    def _train(
        self,
        blocks: int,
        output: Path,
        states: dict[str, Any],
        answer: Answer | None = None,
        **changes: Any,
    ) -> dict[str, Any]:
        spec = {
            "model": str(self._model),
            "first_block": _N_LAYER - blocks,
            "end_block": _N_LAYER,
            "tap": str(self._folder / "tap.f32"),
            "encoded": str(self._file),
            "train": TRAIN,
            "dev": DEV,
            **states,
            "options": _OPTIONS,
            "initial": None,
            "control": None,
            "output": str(output),
            **changes,
        }
        path = self._folder / "spec.json"
        path.write_text(json.dumps(spec), encoding="utf-8")
        events = _run(path, answer)
        done = events[-1]
        assert done["event"] == "done", done
        steps = [event for event in events if event["event"] == "step"]
        judged = [event for event in events if event["event"] == "dev"]
        adapter = read_adapter(output)
        return {
            "loss": [event["loss"] for event in steps],
            "dev_loss": [event["loss"] for event in judged],
            "dev_accuracy": [event["accuracy"] for event in judged],
            "best_step": done["best_step"],
            "alpha": adapter.alpha,
            "norms": {name: [norm(a), norm(b)] for name, (a, b) in sorted(adapter.pairs.items())},
        }

    def _answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """What the engine says of examples with the adapter as it is at this step."""
        self._engine.stage("training", Path(request["adapter"]), None)
        self._local.run(Use("training"))
        if request["ask"] == "score":
            scores = self._local.run(ScoreExamples(request["examples"]))
            return {"scores": [asdict(each) for each in scores]}
        return asdict(
            self._local.run(Tap(request["examples"], request["first"], request["end"], Path(request["path"])))
        )


def curve(results: list[StepResult], trajectory: Trajectory) -> dict[str, Any]:
    """What a run of zeroth-order steps, or of steps of both kinds, went through."""
    return {
        "loss": [result.loss for result in results],
        "dev_loss": [result.dev_loss for result in results],
        "seeds": [[step.seed for step in result.applied] for result in results],
        "forwards": [result.forwards for result in results],
        "best_step": trajectory.best_step,
        ROUGHLY: {  # differences of two losses, in which little is left of the digits that these have in common
            "lr": [result.lr for result in results],
            "projected_gradient": [result.projected_gradient for result in results],
        },
    }


def _run(spec: Path, answer: Answer | None) -> list[dict[str, Any]]:
    """The events of the trainer's process but for those that it was answered."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    events: list[dict[str, Any]] = []
    with subprocess.Popen(
        [sys.executable, "-m", "agentd.trainer", str(spec)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=_ROOT,
        env=environment,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for line in process.stdout:
            event = json.loads(line)
            if event["event"] != "ask":
                events.append(event)
            else:
                assert answer is not None, "the trainer asks, and no one is there to answer"
                process.stdin.write(json.dumps(answer(event)) + "\n")
                process.stdin.flush()
    return events
