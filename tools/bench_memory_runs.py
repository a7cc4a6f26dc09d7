"""One plan on one kind of example, run as a pass runs it, on as few examples as reach the peak."""

import json
import random
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from agentd.adapt.backpropagation import NLL_WEIGHT, Backpropagation
from agentd.adapt.dataset import Dataset, Member, usable
from agentd.adapt.neutral import neutral_texts
from agentd.adapt.planning import Setting, workload_of
from agentd.adapt.progress import MemoryWatch
from agentd.adapt.training import Training
from agentd.budget.architecture import Architecture
from agentd.budget.expectation import ZO_STEPS
from agentd.budget.plan import Dial, Plan
from agentd.budget.planner import Choice
from agentd.budget.workload import Workload
from agentd.engine.activity import Activity
from agentd.engine.protocol import Generate, Sampling
from agentd.engine.supervisor import Supervisor
from agentd.gguf_header import read_header
from agentd.processor import multiplies_bf16
from tools.bench_parts import THREADS, member, supervisor
from tools.extract_reviews import OUTPUT as REVIEWS

RANK = 8
QUESTION = "Did the reviewer like this movie? Answer yes or no.\n\n"
ANSWER = "I would say that the reviewer did like it, mostly for its actors and less for its plot, which is thin."
CHARACTERS_PER_TOKEN = 4.6  # of the reviews; a little high, so that examples stay just within their length


@dataclass(frozen=True)
class Case:
    """One plan on one kind of example. `length` in tokens, the chat template included; `context` is model.context.

    Matrices are multiplied in bfloat16 where the processor does so and `fp32` is not set.
    """

    method: str
    k: int
    length: int = 64
    batch: int = 16
    context: int = 2048
    objective: str = "choice"
    checkpoint: bool = False
    fp32: bool = False

    @property
    def setting(self) -> str:
        kept = ", one in memory" if self.checkpoint else ""
        return f"{self.method} k={self.k}{kept}{', fp32' if self.fp32 else ''}"

    @property
    def name(self) -> str:
        return f"{self.setting} batch={self.batch} length={self.length} context={self.context} {self.objective}"

    @property
    def examples(self) -> int:
        return 40 if self.length <= 128 else 10

    def plan(self, architecture: Architecture, workload: Workload) -> Plan:
        bf16 = multiplies_bf16() and not self.fp32
        return Dial(architecture, workload, bf16=bf16).plan(self.method, self.k, self.checkpoint)


async def measure(model: Path, case: Case, folder: Path) -> dict[str, Any]:
    """Runs the pass; its peaks and predictions in bytes, both beyond serving."""
    architecture = Architecture.from_header(read_header(model))
    activity = Activity()
    engine, training = supervisor(model, activity, case.context), Training(activity, folder / "trainer.log")
    started = time.monotonic()
    await engine.start()
    try:
        # One request first: only then all weights and buffers of serving are in memory.
        request = Generate("first", {"messages": [{"role": "user", "content": QUESTION}]}, Sampling(temperature=0), 16)
        async for _ in engine.generate(request):
            pass
        async with MemoryWatch(lambda: {"engine": engine.pid, "trainer": training.pid}, 0.05) as memory:
            data, tokens = await _encode(engine, case, folder)
            workload = workload_of(list(tokens.values()), case.context)
            workload = replace(workload, batch=case.batch, rank=RANK)
            plan = case.plan(architecture, workload)
            adapter = None
            if plan.blocks:
                adapter = await _backpropagate(model, engine, training, plan, case, data, tokens, folder)
            await _gate(engine, plan, case, adapter, folder)
    finally:
        await engine.stop()
    serving = memory.before["engine"]
    return {
        **asdict(case),
        "name": case.name,
        "seconds": round(time.monotonic() - started, 1),
        "longest": workload.longest,
        "workload": workload.as_json(),
        "serving": serving,
        "measured": {
            "engine": memory.peaks["engine"] - serving,
            "trainer": memory.peaks.get("trainer", 0),
            "together": memory.total - serving,
        },
        "predicted": predicted(plan),
    }


async def _encode(engine: Supervisor, case: Case, folder: Path) -> tuple[Dataset, dict[int, dict[str, Any]]]:
    source, encoded = folder / "examples.jsonl", folder / "tokens.jsonl"
    data = Dataset(examples(case), {})
    data.write(source)
    await engine.call("open")
    await engine.call("encode", source=str(source), target=str(encoded))
    data, tokens = usable(data, encoded)
    if data.left_out:
        raise SystemExit(f"{case.name}: {next(iter(data.left_out.values()))}")
    await engine.call("use", weights="0")
    return data, tokens


async def _backpropagate(
    model: Path,
    engine: Supervisor,
    training: Training,
    plan: Plan,
    case: Case,
    data: Dataset,
    tokens: dict[int, dict[str, Any]],
    folder: Path,
) -> Path:
    setting = Setting(plan.method, plan.blocks, ZO_STEPS[plan.method], RANK, Choice(plan, 0, 0, 0, ()))
    options = {**setting.train_options(0, THREADS, NLL_WEIGHT), "batch": case.batch, "max_epochs": 1}
    learning = Backpropagation(
        engine,
        training,
        model=model,
        folder=folder,
        setting=setting,
        members=data.members,
        tokens=tokens,
        options=options,
    )
    adapter = folder / "adapter.gguf"
    await learning.train(await learning.tap(lambda _: None), None, None, adapter, lambda _: None)
    await engine.stage("candidate", adapter, None)
    await engine.call("use", weights="candidate")
    return adapter


async def _gate(engine: Supervisor, plan: Plan, case: Case, adapter: Path | None, folder: Path) -> None:
    """What follows: zeroth-order steps where the method has them, the scores of the gate, and the drift."""
    numbers = list(range(16 if case.length <= 128 else 2))
    control = None
    if ZO_STEPS[plan.method]:
        for scale in (0.1, -0.1):
            await engine.call("loss", examples=numbers, nll_weight=NLL_WEIGHT, seed=1, scale=scale)
        await engine.call("update", seed=1, coefficient=1e-3)
        control = folder / "control.gguf"
        await engine.call("write_control", path=str(control))
    await engine.call("score", examples=numbers)
    await engine.stage("candidate", adapter, control)
    await engine.call("drift", texts=neutral_texts(), reference="0", candidate="candidate")
    await engine.call("abandon")


def examples(case: Case) -> list[Member]:
    """Reviews, one after the other, until an example has its length."""
    texts = [json.loads(line)["text"] for line in REVIEWS.read_text().splitlines()]
    chosen = random.Random(0)
    free = case.objective == "completion"
    characters = int(
        (case.length - 38 - (26 if free else 1)) * CHARACTERS_PER_TOKEN * (0.8 if case.length <= 128 else 0.9)
    )
    found = []
    for i in range(case.examples):
        text = ""
        while len(text) < characters:
            text += chosen.choice(texts) + " "
        asked = {"messages": [{"role": "user", "content": QUESTION + text[:characters]}]}
        role, target = "dev" if i % 8 == 0 else "train", ANSWER if free else "yes" if i % 2 else "no"
        found.append(member(i, role, "reviews", [] if free else ["yes", "no"], asked, target))
    return found


def predicted(plan: Plan) -> dict[str, int]:
    """Bytes by process and together. The daemon's part is left out: here the benchmark stands in for it."""
    parts = {name: plan.needed_by(name) for name in ("engine", "trainer")}
    return {**parts, "together": sum(parts.values()) + plan.needed_by("together")}
