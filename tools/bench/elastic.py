"""Accuracy and held-out loss against time and memory: every setting of the dial, beside PEFT's LoRA, on real tasks.

    python -m tools.bench elastic MODEL.gguf --output RESULTS.jsonl                     movie reviews, three seeds
    python -m tools.bench elastic MODEL.gguf --output RESULTS.jsonl --sarcasm FILE      and headlines
    ... --methods blockwise-bp:30,peft-fp32 --seeds 0 --judge tune                      some of it, judged on other rows
    ... --methods default,peft-fp32 --lrs 3e-4,1e-3,3e-3 --epochs 1,3,5                 PEFT's grid

A method is NAME:K. What RESULTS.jsonl holds is not run again, so a run can be broken off and taken up; methods take
turns within a seed, so that what they are compared with ran beside them. Training is what a pass does: tap, train,
zeroth-order steps, by a real engine and a real trainer. Time counts from the first of these to the last, starting the
trainer included; memory is the peak of the proportional set sizes of all processes together (this one stands in for
the daemon). Accuracy is that of llama.cpp on the quantised model; PEFT's is that of torch, as it would serve it.
`python -m tools.bench elastic-report RESULTS.jsonl` prints the table and draws the picture. PEFT comes with
`pip install 'agentd[peft]'`.
"""

import argparse
import asyncio
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

from agentd.adapt.passes import zeroth_order
from agentd.adapt.passes.progress import MemoryWatch
from agentd.adapt.passes.trainer_job import NLL_WEIGHT, Backpropagation
from agentd.adapt.passes.trainer_process import Training
from agentd.adapt.planning.dataset import Member
from agentd.adapt.planning.setting import Setting
from agentd.budget.expectation import ZO_STEPS
from agentd.budget.model_shapes import ModelShapes
from agentd.budget.plan import PlanSpace
from agentd.budget.planner import Choice, choose
from agentd.budget.workload import Workload
from agentd.engine.operations import Abandon, Encode, Open, ScoreExamples, Use
from agentd.engine.process.activity import Activity
from agentd.formats.gguf_header import read_header
from agentd.host.cpu import multiplies_bf16
from agentd.learn.encoded import Encoded
from tools.bench.elastic_tasks import TRAIN, Task, reviews, sarcasm
from tools.bench.parts import THREADS, member, supervisor

RANK, DEV_EVERY = 8, 8
BUDGET = 1 << 30  # of the default plan
KEYS = ("task", "method", "blocks", "seed", "judge", "lr", "epochs")
METHODS = (
    "none:0,calibration:0,default:0,suffix-bp:1,suffix-bp:2,suffix-bp:4,suffix-bp:8,elasticzo:2,"
    "suffix-bp:16,blockwise-bp:30,peft-fp32:30,peft-bf16:30,mezo:0"
)


class Run:
    """One method on one task with one seed, in processes of its own."""

    def __init__(self, model: Path, task: Task, method: str, blocks: int, seed: int, folder: Path) -> None:
        self.model, self.task, self.method, self.blocks, self.seed = model, task, method, blocks, seed
        self.folder = folder
        activity = Activity()
        self.engine = supervisor(model, activity)
        self.training = Training(activity, folder / "trainer.log")
        self.judged: list[dict[str, Any]] = []

    async def measure(self) -> dict[str, Any]:
        await self.engine.start()
        try:
            source, target = self.folder / "examples.jsonl", self.folder / "tokens.jsonl"
            source.write_text("".join(json.dumps(example) + "\n" for example in self.task.examples()))
            await self.engine.call(Open())
            await self.engine.call(Encode(source, target))
            self.encoded = [Encoded.from_json(json.loads(line)) for line in target.read_text().splitlines()]
            await self.engine.call(Use("0"))
            pids = lambda: {"driver": os.getpid(), "engine": self.engine.pid, "trainer": self.training.pid}  # noqa: E731
            async with MemoryWatch(pids, 0.05) as memory:
                self.started = time.monotonic()
                self.shift = 0.0
                plan = await self._learn()
                seconds = time.monotonic() - self.started
            accuracy, loss = await self._judge()
            await self.engine.call(Abandon())
        finally:
            await self.engine.stop()
        return {
            "accuracy": accuracy,
            "loss": loss,
            "seconds": round(seconds, 1),
            "peak_bytes": memory.total,
            "serving_bytes": sum(memory.before.values()),
            "peaks": memory.peaks,
            "dev": self.judged,
            **plan,
        }

    async def _learn(self) -> dict[str, Any]:
        if self.method == "none":
            return {}
        if self.method == "calibration":
            scores = await self.engine.call(ScoreExamples(list(range(TRAIN))))
            margins = sorted(score.choices[1] - score.choices[0] for score in scores)
            self.shift = margins[len(margins) // 2]  # as many of one answer as of the other
            return {}
        members = [self._member(i) for i in range(TRAIN)]
        setting = self._setting()
        weights, adapter = "0", None
        if setting.blocks:
            options = setting.train_options(self.seed, THREADS, NLL_WEIGHT, TRAIN)
            learning = Backpropagation(
                self.engine,
                self.training,
                model=self.model,
                folder=self.folder,
                setting=setting,
                members=members,
                encoded=dict(enumerate(self.encoded)),
                file=self.folder / "tokens.jsonl",
                options=options,
            )
            index = await learning.tap(lambda _: None)
            adapter = self.folder / "adapter.gguf"
            await learning.train(index, None, None, adapter, self._on_event)
            await self.engine.stage("candidate", adapter, None)
            await self.engine.call(Use("candidate"))
            weights = "candidate"
        if setting.zo_steps:
            await zeroth_order.run(
                self.engine,
                train=[m.number for m in members if m.role == "train"],
                dev=[m.number for m in members if m.role == "dev"],
                steps=setting.zo_steps,
                nll_weight=NLL_WEIGHT,
                seed=self.seed,
                weights=weights,
                on_step=lambda _: None,
            )
        return {"plan": setting.choice.plan.setting, "zo_steps": setting.zo_steps}

    def _setting(self) -> Setting:
        architecture = ModelShapes.from_header(read_header(self.model))
        texts = [prompt for prompt, _ in (*self.task.train, *self.task.judged)]
        workload = Workload.estimated(texts, [set(self.task.answers)] * len(texts), rank=RANK)
        bf16 = multiplies_bf16()
        if self.method == "default":
            choice = choose(architecture, workload, available=BUDGET, reserve=0, bf16=bf16)
        else:
            plan = PlanSpace(architecture, workload, bf16=bf16).plan(self.method, self.blocks)
            choice = Choice(plan, BUDGET, BUDGET, 0, ())
        plan = choice.plan
        return Setting(plan.method, plan.blocks, ZO_STEPS[plan.method], RANK, choice)

    def _member(self, i: int) -> Member:
        prompt, right = self.task.train[i]
        answers, role = list(self.task.answers), "dev" if i % DEV_EVERY == 0 else "train"
        return member(i, role, self.task.name, answers, {"prompt": prompt}, answers[right])

    def _on_event(self, event: dict[str, Any]) -> None:
        if event["event"] == "dev":
            seconds = round(time.monotonic() - self.started, 1)
            self.judged.append({"seconds": seconds, "loss": event["loss"], "accuracy": event["accuracy"]})

    async def _judge(self) -> tuple[float, float]:
        """Accuracy and cross-entropy of the choices on the judged rows, in the engine."""
        n = len(self.task.judged)
        scores = await self.engine.call(ScoreExamples(list(range(TRAIN, TRAIN + n))))
        right, losses = 0, []
        for score, (_, answer) in zip(scores, self.task.judged, strict=True):
            margin = (score.choices[1] - score.choices[0] - self.shift) * (1 if answer else -1)
            right += margin > 0
            losses.append(max(0.0, -margin) + math.log1p(math.exp(-abs(margin))))
        return right / n, math.fsum(losses) / n


def peft(
    model: Path, task: Task, kind: str, seed: int, folder: Path, lr: float | None, epochs: int | None
) -> dict[str, Any]:
    source = folder / "task.json"
    source.write_text(json.dumps({"answers": task.answers, "train": task.train, "judged": task.judged}))
    arguments = [str(each) for each in (model, source, kind, seed, lr, epochs)]
    command = [sys.executable, "-m", "tools.bench.elastic_peft", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _listed(kind: Callable[[str], Any]) -> Callable[[str], list[Any]]:
    return lambda text: [kind(part) for part in text.split(",")]


def main() -> int:
    parser = argparse.ArgumentParser(description="The dial against PEFT's LoRA.")
    parser.add_argument("model", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--sarcasm", type=Path, help="sarcasm/samples.jsonl of evals 3.0.1.post1")
    parser.add_argument("--tasks", default="reviews,sarcasm")
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--lrs", type=_listed(float), default=[1e-3], metavar="LR,...", help="of PEFT")
    parser.add_argument("--epochs", type=_listed(int), default=[1], metavar="N,...", help="of PEFT")
    parser.add_argument("--judge", choices=("heldout", "tune"), default="heldout")
    options = parser.parse_args()
    tasks = [reviews(options.judge)] if "reviews" in options.tasks else []
    if options.sarcasm and "sarcasm" in options.tasks:
        tasks.append(sarcasm(options.judge, options.sarcasm))
    lines = options.output.read_text().splitlines() if options.output.exists() else []
    there = {tuple(json.loads(line).get(key) for key in KEYS) for line in lines}
    for seed, task, name in product(map(int, options.seeds.split(",")), tasks, options.methods.split(",")):
        method, _, k = name.partition(":")
        of_peft = method.startswith("peft-")
        for lr, epochs in product(options.lrs, options.epochs) if of_peft else [(None, None)]:
            key = (task.name, method, int(k or 0), seed, options.judge, lr, epochs)
            if key in there:
                continue
            with tempfile.TemporaryDirectory(dir="/tmp") as folder:
                if of_peft:
                    result = peft(options.model, task, method[5:], seed, Path(folder), lr, epochs)
                else:
                    run = Run(options.model, task, method, key[2], seed, Path(folder))
                    result = asyncio.run(run.measure())
            line = json.dumps(dict(zip(KEYS, key, strict=True)) | result)
            with options.output.open("a") as file:
                file.write(line + "\n")
            peak = f"{result['peak_bytes'] / 1e6:.0f} MB" if "peak_bytes" in result else ""
            how = f", lr {lr:g}, epochs {epochs}" if of_peft else ""
            print(f"{task.name} {name}{how}, seed {seed}: {result['accuracy']:.1%}, loss {result['loss']:.3f}, "
                  f"{result['seconds']:.0f} s, {peak} {result.get('plan', '')}", flush=True)  # fmt: skip
    return 0


if __name__ == "__main__":
    sys.exit(main())
