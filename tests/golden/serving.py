"""What engines answer: greedy and sampled tokens, choices, likelihoods and drift, of the base and of a revision."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from agentd.engine.int8.engine import Int8Engine
from agentd.engine.llamacpp.engine import LlamaCppEngine
from agentd.engine.operations import Drift, Encode, Loss, ScoreExamples, Use
from agentd.engine.protocol import Engine, Generate, Sampling
from agentd.engine.session import Session
from agentd.engine.transformers import image
from agentd.engine.transformers.engine import TransformersEngine
from agentd.int8.tensor import Int8Tensor
from agentd.learn import ledger
from agentd.learn.encoded import Encoded
from tools import tiny_model

from .samples import (
    BARS,
    SCALING,
    LocalEngine,
    adapters,
    array,
    classifier,
    codes,
    examples,
    finished,
    fractions,
    images,
    network,
    sha256,
    write_lines,
)

REVISION = "1"
_GREEDY, _SEEDED = Sampling(temperature=0, seed=0), Sampling(temperature=1.0, seed=11)
_PROMPTS: dict[str, dict[str, Any]] = {
    "chat": {"messages": [{"role": "user", "content": "Is that all?"}]},
    "turns": {
        "messages": [
            {"role": "system", "content": "Say little."},
            {"role": "user", "content": "Grüße aus Köln, 你好"},
            {"role": "assistant", "content": "yes"},
            {"role": "user", "content": "Good."},
        ]
    },
    "raw": {"prompt": "Is that all? Once upon a time there was a"},
}
_NEUTRAL = ("The river runs past the mill and under the bridge.", "Two and two are four, and four and four are eight.")
_TIE = 0.02  # log-probabilities that are nearer than this might change places on another processor


def llamacpp(folder: Path) -> dict[str, Any]:
    """The revision is an adapter on some layers and a control vector."""
    model = tiny_model.write(folder / "tiny.gguf")
    engine = LlamaCppEngine(model, context=512, slots=3, threads=1)
    try:
        engine.stage(REVISION, *adapters(folder))
        return _answers(engine, folder)
    finally:
        engine.close()


def transformers(folder: Path) -> dict[str, Any]:
    """The revision is the second of a line: steps, and on top of them steps of other kinds and a low-rank change."""
    model, results = tiny_model.write(folder / "tiny.gguf"), {}
    for dtype in ("float32", "bfloat16"):
        engine = TransformersEngine(
            model,
            folder=folder / dtype,
            key="0" * 20,
            revisions=folder / "revisions",
            context=512,
            slots=3,
            dtype=dtype,
        )
        try:
            path = _line(folder / "revisions")
            results[f"weights in {dtype}"] = finished(engine.replaying(path))
            if dtype == "float32":
                engine.stage(REVISION, path, None)
                results |= _answers(engine, folder)
                results |= _collected(engine, folder)
        finally:
            engine.close()
    return results


def int8(folder: Path) -> dict[str, Any]:
    """The revision is the network with another bias at its end."""
    engine = Int8Engine(classifier(folder))
    other = network()
    other.parameters[-1].mantissa.copy_((codes(4, salt=31) - 128).clamp(-127, 127))
    engine.model.save(other, folder / "other.safetensors")
    engine.stage(REVISION, folder / "other.safetensors", None)
    x, _ = images(8)
    results: dict[str, Any] = {}
    for weights in ("0", REVISION):
        engine.swap(weights)
        results[f"probabilities at {weights}"] = [engine.classify(array(image)).probabilities for image in x]
    engine.close()
    mantissas = (codes(16, *BARS.input) - 128).clamp(-127, 127).char()
    together, _ = network().forward(Int8Tensor(mantissas, SCALING.exponent))
    results["logits"], results["exponent"] = together.mantissa.tolist(), together.exponent
    return results


def _answers(engine: Engine, folder: Path) -> dict[str, Any]:
    local = LocalEngine(Session(engine.background(lambda: False)))
    source, target = write_lines(folder / "examples.jsonl", examples()), folder / "encoded.jsonl"
    n = local.run(Encode(source, target))
    results: dict[str, Any] = {"encoded": sha256(_encoded(target).encode())}
    for weights in ("0", REVISION):
        engine.swap(weights)
        local.run(Use(weights))
        results[f"served at {weights}"] = dict(_served(engine))
        results[f"scores at {weights}"] = [
            {"choices": scores.choices, "target": scores.target} for scores in local.run(ScoreExamples(list(range(n))))
        ]
        results[f"loss at {weights}"] = local.run(
            Loss(list(range(n)), nll_weight=0.1, seed=5, scale=1e-3 if weights == "0" else 0.0)
        )
    results["drift"] = local.run(Drift(list(_NEUTRAL), "0", REVISION))
    return results


def _encoded(path: Path) -> str:
    """What the engine made of the examples, whichever way the file has it."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        each = Encoded.from_json(json.loads(line))
        whole = {"sequences": each.sequences, "choices": each.choices, "correct": each.correct, "target": each.target}
        lines.append(json.dumps(whole) + "\n")
    return "".join(lines)


def _served(engine: Engine) -> Iterator[tuple[str, Any]]:
    """Several requests at a time, since slots are shared."""
    requests = [Generate(name, input, _GREEDY, max_tokens=12, logprobs=2) for name, input in _PROMPTS.items()]
    requests += [Generate(f"{name}, sampled", _PROMPTS[name], _SEEDED, max_tokens=8, logprobs=0) for name in ("raw",)]
    requests.append(Generate("chat, a choice", _PROMPTS["chat"], _GREEDY, choices=("good", "not good"), logprobs=0))
    for request in requests:
        engine.submit(request)
    entries: dict[str, list[dict[str, Any]]] = {}
    ends: dict[str, list[Any]] = {}
    while engine.busy:
        for piece in engine.step():
            entries.setdefault(piece.key, []).extend(piece.logprobs)
            if piece.finish or piece.error:
                ends[piece.key] = [piece.finish, piece.error, piece.prompt_tokens, piece.completion_tokens]
    for request in requests:
        tokens = entries[request.key]
        for entry in tokens:
            best, *others = entry["top_logprobs"] or [entry]
            near = request.sampling is _GREEDY and others and best["logprob"] - others[0]["logprob"] < _TIE
            assert not near, f"{request.key}: two tokens are as likely; this prompt makes no golden"
        yield (
            request.key,
            {
                "tokens": [bytes(entry["bytes"]).hex() for entry in tokens],
                "logprobs": [entry["logprob"] for entry in tokens],
                "end": ends[request.key],
            },
        )


def _line(revisions: Path) -> Path:
    """The ledger of the second of two revisions, with what lies beside it."""
    first, second = revisions / "1", revisions / "2"
    for folder, parent, seed, n in ((first, 0, 100, 3), (second, 1, 200, 4)):
        folder.mkdir(parents=True, exist_ok=True)
        steps = [ledger.Step(seed + i, (-1.0) ** i, 4e-3, 1e-3) for i in range(n)]
        ledger.write(folder / "ledger", ledger.Ledger(parent, steps))
    (first / "manifest.json").write_text(json.dumps({"update": {"distribution": "rademacher", "sparsity": None}}))
    segments = [
        {"steps": 2, "update": {"distribution": "gaussian", "sparsity": None}},
        {"ranks": [2, 1]},
        {"steps": 2, "update": {"distribution": "rademacher", "sparsity": 0.75}},
    ]
    (second / "manifest.json").write_text(json.dumps({"segments": segments}))
    _write_change(second / "lora.safetensors", 3)
    return second / "ledger"


def _write_change(path: Path, rank: int) -> None:
    """Low-rank changes of two layers, by the names that PEFT gives them."""
    wide, high = tiny_model.N_EMBD, tiny_model.N_FF
    tensors = {}
    for i, (layer, n_in, n_out) in enumerate((("1.self_attn.q_proj", wide, wide), ("3.mlp.down_proj", high, wide))):
        name = f"base_model.model.model.layers.{layer}"
        tensors[f"{name}.lora_A.weight"] = fractions(rank, n_in, salt=40 + i) / 2
        tensors[f"{name}.lora_B.weight"] = fractions(n_out, rank, salt=50 + i) / 2
    image.write(path, tensors)


def _collected(engine: TransformersEngine, folder: Path) -> dict[str, str]:
    """A low-rank change as it is exported, for llama.cpp and for PEFT."""
    revision = folder / "revisions" / "3"
    revision.mkdir()
    ledger.write(revision / "ledger", ledger.Ledger(0, []))
    (revision / "manifest.json").write_text(json.dumps({"ranks": [3]}))
    _write_change(revision / "lora.safetensors", 3)
    digests = {}
    for kind in ("gguf", "safetensors"):
        finished(engine.collecting(revision / "ledger", folder / f"exported.{kind}", kind))
        digests[f"exported as {kind}"] = sha256((folder / f"exported.{kind}").read_bytes())
    return digests
