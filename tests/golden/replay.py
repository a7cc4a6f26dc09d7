"""Ledgers replayed on fixed weights: a revision is its parent and its ledger, bit for bit and on every machine."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from agentd.engine.llamacpp.engine import LlamaCppEngine
from agentd.engine.operations import Update, Use, WriteControl
from agentd.engine.session import Session
from agentd.int8 import sign_ledger as int8_ledger
from agentd.int8.noise import Noise
from agentd.int8.sign_ledger import SignLedger, SignStep
from agentd.learn import ledger
from agentd.nn.lora import merge
from agentd.nn.mezo import InPlace
from tools import tiny_model

from .samples import LocalEngine, fractions, network, sha256, sha256_of

_RULES: dict[str, dict[str, Any]] = {
    "signs": {},
    "gaussian": {"distribution": "gaussian"},
    "sparse": {"sparsity": 0.75},
    "a part": {"parameters": lambda name: name != "1.weight"},
}


def measure(folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for dtype in ("float32", "bfloat16"):
        for rule, options in _RULES.items():
            results[f"mezo, {dtype}, {rule}"] = _mezo(folder, getattr(torch, dtype), options)
        results[f"low-rank change, {dtype}"] = _merged(getattr(torch, dtype))
    for bp_layers in (0, 1):
        results[f"int8, {bp_layers} layers by backpropagation"] = _int8(bp_layers)
    results["control vector"] = _control(folder)
    return results


def steps() -> list[ledger.Step]:
    """Of either sign, of very different sizes, with seeds of up to 64 bits."""
    seeds = (0, 1, 1 << 20, (1 << 63) + 7, (1 << 64) - 1)
    return [ledger.Step(seed, (-1.7) ** i, 3e-3 / (1 + i), 1e-3) for i, seed in enumerate(seeds)]


def _module(dtype: torch.dtype) -> nn.Module:
    """The first matrix is larger than a piece of an update, and it is no whole number of pieces."""
    module = nn.Sequential(nn.Embedding(1100, 600), nn.Linear(600, 40), nn.LayerNorm(40)).to(dtype)
    with torch.no_grad():
        for i, parameter in enumerate(module.parameters()):
            parameter.copy_(fractions(*parameter.shape, salt=i))
    return module


def _mezo(folder: Path, dtype: torch.dtype, options: dict[str, Any]) -> str:
    path = folder / "ledger"
    ledger.write(path, ledger.Ledger(0, steps()))
    model = _module(dtype)
    InPlace(model, **options).replay(ledger.read(path).steps)
    return sha256_of(model.parameters())


def _merged(dtype: torch.dtype) -> str:
    weight = fractions(300, 2000).to(dtype)
    merge(weight, fractions(3, 2000, salt=1), fractions(300, 3, salt=2), 5)
    return sha256_of([weight])


def _int8(bp_layers: int) -> dict[str, str]:
    """The file's bytes, and those of the weights that it leads to."""
    signs = [SignStep((1 << 63) + 977 * i, (1, -1, 0, -1)[i % 4], 4 - i % 3) for i in range(9)]
    data = int8_ledger.encode(SignLedger(3, Noise(31, 200), bp_layers, signs))
    net = network()
    int8_ledger.replay(int8_ledger.decode(data), net)
    return {"ledger": sha256(data), "weights": sha256_of(p.mantissa for p in net.parameters)}


def _control(folder: Path) -> str:
    """What engine llama.cpp makes of steps on its control vector, as the file that it writes."""
    engine = LlamaCppEngine(tiny_model.write(folder / "tiny.gguf"), context=256, slots=1)
    try:
        local = LocalEngine(Session(engine.background(lambda: False)))
        local.run(Use("0"))
        for seed, coefficient in ledger.fold(steps()):
            local.run(Update(seed, coefficient))
        local.run(WriteControl(folder / "control.gguf"))
    finally:
        engine.close()
    return sha256((folder / "control.gguf").read_bytes())
