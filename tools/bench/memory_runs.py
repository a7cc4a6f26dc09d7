"""One plan on one kind of example, run as a pass runs it, on as few examples as reach the peak."""

import random
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from agentd.adapt.gate.drift_corpus import drift_corpus
from agentd.adapt.passes.base import ENCODED
from agentd.adapt.passes.progress import MemoryWatch
from agentd.adapt.passes.trainer_job import NLL_WEIGHT, Backpropagation
from agentd.adapt.passes.trainer_process import Training
from agentd.adapt.planning.dataset import Dataset, Member, usable
from agentd.adapt.planning.setting import Setting, workload_of
from agentd.budget.expectation import ZO_STEPS
from agentd.budget.model_shapes import ModelShapes
from agentd.budget.plan import Plan, PlanSpace
from agentd.budget.planner import Choice
from agentd.budget.workload import Workload
from agentd.engine.operations import Abandon, Drift, Encode, Loss, Open, ScoreExamples, Update, Use, WriteControl
from agentd.engine.process.activity import Activity
from agentd.engine.process.supervisor import Supervisor
from agentd.engine.protocol import Generate, Sampling
from agentd.formats.gguf_header import read_header
from agentd.host.cpu import multiplies_bf16
from agentd.learn.encoded import Encoded
from agentd.store.demonstrations import MESSAGE, checked_message, message_target
from tools import home
from tools.bench.parts import THREADS, member, supervisor
from tools.reviews import rows

RANK = 8
QUESTION = "Did the reviewer like this movie? Answer yes or no.\n\n"
_PARTS = ("plot", "cast", "score", "script", "pace", "camera work", "ending", "dialogue")
_FAULTS = (
    "too slow",
    "quite dull",
    "very loud",
    "well made",
    "overdone",
    "hard to follow",
    "moving",
    "plain",
    "thin",
    "odd",
)
LABELS = [f"{part} {fault}" for fault in _FAULTS for part in _PARTS]
ANSWER = "I would say that the reviewer did like it, mostly for its actors and less for its plot, which is thin."
_TEMPLATE, _END = 26.5, 4  # tokens around a question and behind an answer
CHARACTERS_PER_TOKEN = 4.6  # of the reviews; a little high, so that examples stay just within their length


@dataclass(frozen=True)
class Case:
    """One plan on one kind of example. `length` in tokens, the chat template included; `context` is model.context;
    of `labels` an example's right one is one, all of them of several tokens if there are more than two. The objective
    "call" takes the home's commands as they are, behind its tools, whatever `length` says. `characters` are those of a
    token.

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
    labels: int = 2
    characters: float = CHARACTERS_PER_TOKEN

    @property
    def setting(self) -> str:
        details = ", one in memory" if self.checkpoint else ""
        return f"{self.method} k={self.k}{details}{', fp32' if self.fp32 else ''}"

    @property
    def name(self) -> str:
        labels = f" labels={self.labels}" if self.labels != 2 else ""
        return f"{self.setting} batch={self.batch} length={self.length} context={self.context} {self.objective}{labels}"

    @property
    def examples(self) -> int:
        if self.objective == "call":
            return 40
        if self.labels != 2:
            return 16 if self.length <= 160 else 4
        return 40 if self.length <= 128 else 10

    def plan(self, architecture: ModelShapes, workload: Workload, runtime: Mapping[str, int] | None = None) -> Plan:
        bf16 = multiplies_bf16() and not self.fp32
        return PlanSpace(architecture, workload, runtime, bf16=bf16).plan(self.method, self.k, self.checkpoint)


class Watched:
    """When the trainer did what."""

    def __init__(self) -> None:
        self._last = time.monotonic()
        self.seconds: dict[str, list[float]] = {}

    def __call__(self, event: dict[str, Any]) -> None:
        """A step's time is that since the event before it, a look at dev's likewise."""
        now = time.monotonic()
        self.seconds.setdefault(str(event["event"]), []).append(now - self._last)
        self._last = now


async def measure(model: Path, case: Case, folder: Path, runtime: Mapping[str, int] | None = None) -> dict[str, Any]:
    """Runs the pass; its peaks and predictions in bytes, both beyond serving, and what took how many seconds.

    runtime  fixed costs by process, as measured on this machine
    """
    architecture = ModelShapes.from_header(read_header(model))
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
            data, encoded = await _encode(engine, case, folder)
            workload = replace(workload_of(list(encoded.values()), case.context, RANK), batch=case.batch)
            plan = case.plan(architecture, workload, runtime)
            adapter, watched = None, Watched()
            if plan.blocks:
                adapter = await _backpropagate(model, engine, training, plan, case, data, encoded, folder, watched)
            await _gate(engine, plan, case, adapter, folder, watched)
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
        "times": watched.seconds,
    }


async def _encode(engine: Supervisor, case: Case, folder: Path) -> tuple[Dataset, dict[int, Encoded]]:
    source, target = folder / "examples.jsonl", folder / ENCODED
    data = Dataset(examples(case), {})
    data.write(source)
    await engine.call(Open())
    await engine.call(Encode(source, target))
    data, encoded = usable(data, target)
    if data.left_out:
        raise SystemExit(f"{case.name}: {next(iter(data.left_out.values()))}")
    await engine.call(Use("0"))
    return data, encoded


async def _backpropagate(
    model: Path,
    engine: Supervisor,
    training: Training,
    plan: Plan,
    case: Case,
    data: Dataset,
    encoded: dict[int, Encoded],
    folder: Path,
    watched: Watched,
) -> Path:
    setting = Setting(plan.method, plan.blocks, ZO_STEPS[plan.method], RANK, Choice(plan, 0, 0, 0, ()))
    options = {**setting.train_options(0, THREADS, NLL_WEIGHT, len(data.members)), "batch": case.batch, "max_epochs": 1}
    learning = Backpropagation(
        engine,
        training,
        model=model,
        folder=folder,
        setting=setting,
        members=data.members,
        encoded=encoded,
        file=folder / ENCODED,
        options=options,
    )
    adapter = folder / "adapter.gguf"
    states = await learning.tap(lambda _: None)
    watched({"event": "tap"})
    await learning.train(states, None, None, adapter, watched)
    await engine.stage("candidate", adapter, None)
    await engine.call(Use("candidate"))
    return adapter


async def _gate(
    engine: Supervisor, plan: Plan, case: Case, adapter: Path | None, folder: Path, watched: Watched
) -> None:
    """What follows: zeroth-order steps where the method has them, the scores of the gate, and the drift."""
    numbers = list(range(min(case.examples, 16 if case.length <= 128 else 2)))
    control = None
    if ZO_STEPS[plan.method]:
        watched({"event": "before"})
        for scale in (0.1, -0.1):
            await engine.call(Loss(numbers, NLL_WEIGHT, 1, scale))
            watched({"event": "loss"})
        await engine.call(Update(1, 1e-3))
        control = folder / "control.gguf"
        await engine.call(WriteControl(control))
    await engine.call(ScoreExamples(numbers))
    await engine.stage("candidate", adapter, control)
    await engine.call(Drift(drift_corpus(), "0", "candidate"))
    await engine.call(Abandon())


def examples(case: Case) -> list[Member]:
    """Reviews, one after the other, until an example has its length; or the home's commands."""
    if case.objective == "call":
        return [_call(i, row) for i, row in enumerate(home.commands("train")[: case.examples])]
    texts = [row["text"] for row in rows()]
    chosen = random.Random(0)
    free = case.objective == "completion"
    room = case.length - len(QUESTION) / case.characters - _TEMPLATE
    room -= len(ANSWER) / case.characters + _END if free else 1
    characters = int(room * case.characters * (0.8 if case.length <= 128 else 0.9))
    answers = ["yes", "no"] if case.labels == 2 else LABELS[: case.labels]
    members = []
    for i in range(case.examples):
        text = ""
        while len(text) < characters:
            text += chosen.choice(texts) + " "
        input = {"messages": [{"role": "user", "content": QUESTION + text[:characters]}]}
        role, target = "dev" if i % 8 == 0 else "train", ANSWER if free else answers[(i + 1) % len(answers)]
        members.append(member(i, role, "reviews", [] if free else answers, input, target))
    return members


def _call(number: int, row: dict[str, Any]) -> Member:
    asked = {"messages": [{"role": "user", "content": row["text"]}], "tools": home.TOOLS}
    target = message_target(checked_message(home.answer(row), asked))
    said = member(number, "dev" if number % 8 == 0 else "train", home.TASK, [], asked, target)
    return replace(said, example=replace(said.example, kind=MESSAGE))


def predicted(plan: Plan) -> dict[str, int]:
    """Bytes by process and together. The daemon's part is left out: here the benchmark stands in for it."""
    parts = {name: plan.needed_by(name) for name in ("engine", "trainer")}
    return {**parts, "together": sum(parts.values()) + plan.needed_by("together")}
