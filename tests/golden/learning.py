"""Learning where the weights are served: the methods of engine transformers, and ElasticZO in integers."""

import asyncio
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from agentd.adapt.passes import first_order, zeroth_order
from agentd.engine.int8.engine import Int8Engine
from agentd.engine.operations import Encode, Learn, SetRule, Use, WriteMoved
from agentd.engine.protocol import AdapterSpec, LearningRule
from agentd.engine.session import Session
from agentd.engine.transformers import image
from agentd.engine.transformers.engine import TransformersEngine
from agentd.learn.optimise import StepResult, Trajectory
from agentd.learn.spsa import growing_queries
from tools import tiny_model

from .samples import CLASSES, DEV, TRAIN, LocalEngine, array, classifier, examples, images, norm, sha256, write_lines
from .training import curve

_LORA = AdapterSpec("lora", rank=4, alpha=8.0, seed=1)
_RULES = {
    "mezo": LearningRule(),
    "sparse-mezo": LearningRule(sparsity=0.75),
    "mezo-lora": LearningRule(adapters=_LORA),
    "adazeta": LearningRule(adapters=AdapterSpec("tensor-train", rank=3, alpha=1.0, seed=1)),
    "elasticzo": LearningRule(blocks=2),
    "loho": LearningRule(blocks=2, everywhere=True),
    "bp": LearningRule(blocks=2),
    "lora": LearningRule(adapters=replace(_LORA, differentiated=True)),
}
_STEPS = 6
_SHOWN = 4  # tensors whose norms are recorded


def measure(folder: Path) -> dict[str, Any]:
    return {**_in_place(folder), "int8": {str(k): _int8(folder, k) for k in (0, 1, 2)}}


def _in_place(folder: Path) -> dict[str, Any]:
    engine = TransformersEngine(
        tiny_model.write(folder / "tiny.gguf"),
        folder=folder / "weights",
        key="0" * 20,
        context=512,
        slots=1,
        dtype="float32",
    )
    try:
        local = LocalEngine(Session(engine.background(lambda: False)))
        source = write_lines(folder / "examples.jsonl", examples())
        local.run(Encode(source, folder / "encoded.jsonl"))
        return {method: _learn(local, method, folder / f"{method}.safetensors") for method in _RULES}
    finally:
        engine.close()


def _learn(local: Any, method: str, moved: Path) -> dict[str, Any]:
    """A run by `method` from the base's weights, as a pass does it."""
    local.run(Use("0"))
    local.run(SetRule(_RULES[method]))
    results: list[StepResult] = []
    arguments: dict[str, Any] = {
        "train": TRAIN,
        "dev": DEV,
        "steps": _STEPS if method != "adazeta" else _STEPS // 2 + 1,  # each has more queries than the one before
        "nll_weight": 0.1,
        "seed": 3,
        "on_step": results.append,
    }

    async def run() -> Trajectory:
        if method in ("elasticzo", "loho", "bp", "lora"):
            period = 4 if method == "loho" else 1
            lr = 2e-2 if method == "lora" else 1e-2  # large enough for a weight decay to show
            epsilon = None if method in ("bp", "lora") else 1e-3
            return await first_order.run(local, **arguments, lr=lr, epsilon=epsilon, period=period, moved=moved)
        queries = growing_queries if method == "adazeta" else lambda epoch: 1
        epsilon = 1e-2 if _RULES[method].adapters else 1e-3
        return await zeroth_order.run(
            local, **arguments, weights="0", epsilon=epsilon, in_place=True, remade=False, queries=queries
        )

    record = curve(results, asyncio.run(run()))
    if method not in ("mezo", "sparse-mezo"):  # of these a ledger has everything
        local.run(WriteMoved(moved))
        tensors = image.read([moved]).open().tensors
        record["tensors"] = len(tensors)
        record["moved"] = {name: norm(tensors[name]) for name in sorted(tensors)[:_SHOWN]}
    return record


def _int8(folder: Path, bp_layers: int) -> dict[str, Any]:
    """Integers all the way: what is learned is the same on every machine, bit for bit."""
    engine = Int8Engine(classifier(folder))
    local = LocalEngine(engine.session(lambda: False, lambda: False))
    x, labels = images(48)
    lines = [
        {"input": array(image), "choices": CLASSES, "target": CLASSES[label]}
        for image, label in zip(x, labels.tolist(), strict=True)
    ]
    source = write_lines(folder / "images.jsonl", lines)
    local.run(Encode(source, folder / "correct.jsonl"))
    local.run(Use("0"))
    steps: list[dict[str, Any]] = []
    written, signs = folder / "network.safetensors", folder / "signs"
    signs.unlink(missing_ok=True)
    learn = Learn(
        train=list(range(40)),
        dev=list(range(40, 48)),
        parent=0,
        bp_layers=bp_layers,
        frozen=False,
        steps=20,
        batch=16,
        seed=9,
        noise=(15, 128),
        zo_bits=(2, 1),
        bp_bits=(4, 3),
        network=written,
        ledger=signs,
    )
    done = local.run(learn, lambda step: steps.append(asdict(step)))
    engine.close()
    return {
        "loss": [step["loss"] for step in steps],
        "sign": [step["sign"] for step in steps],
        "done": asdict(done),
        "network": sha256(written.read_bytes()),
        "ledger": sha256(signs.read_bytes()),
    }
