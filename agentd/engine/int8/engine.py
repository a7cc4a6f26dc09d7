"""The int8 engine: one classifier, and the networks that were staged beside it.

A classification takes about a millisecond, so it is answered at once and nothing ever waits: `busy` is never true.
Each example goes through the network alone, because exponents follow the largest sum of a batch: what an input is
answered must not depend on what else was asked.
"""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from agentd.engine.int8 import inputs, model
from agentd.engine.int8.background import ClassifierSession
from agentd.engine.protocol import BASE, Background, Classification, Generate, ModelInfo, Piece, Weights
from agentd.errors import ModelUnusable, NotALanguageModel, RevisionCorrupt
from agentd.int8.network import Int8Network
from agentd.int8.tensor import Int8Tensor, dequantise


class Int8Engine:
    """Serves an int8 classifier's safetensors file. Raises ModelUnusable."""

    def __init__(self, path: Path, *, threads: int = 1) -> None:
        torch.set_num_threads(threads)
        self.model = model.load(path)
        network = self.model.network
        self._networks: dict[Weights, Int8Network] = {BASE: network}
        self._serving: Weights = BASE
        self.info = ModelInfo(
            name=network.architecture.name,
            architecture=network.architecture.name,
            n_layer=len(network.architecture.trained_layers()),
            n_embd=0,
            n_vocab=0,
            n_ctx=0,
            n_ctx_train=0,
            n_params=network.architecture.size,
            size_bytes=sum(p.mantissa.numel() for p in network.parameters),
            has_chat_template=False,
            input_shape=network.architecture.input,
            classes=self.model.header.classes,
        )

    def classify(self, input: dict[str, Any]) -> Classification:
        """Raises InvalidRequest for an input that is not one of this model's."""
        x = self.model.quantised(inputs.values(input, self.model.header.network.input)[None])
        probabilities = [math.exp(value) for value in log_probabilities(self._networks[self._serving], x)]
        return Classification(probabilities, int(self._serving))

    @property
    def busy(self) -> bool:
        return False

    def submit(self, request: Generate) -> None:
        raise NotALanguageModel(self.info.name)

    def cancel(self, key: str) -> None:
        """Nothing ever runs that could be cancelled."""

    def step(self) -> list[Piece]:
        return []

    def stage(self, weights: Weights, adapter: Path | None, control: Path | None) -> None:
        """`adapter` is a network of the same architecture; None stages the base again."""
        network = self.model.network
        if adapter is not None:
            try:
                candidate = model.load(adapter)
            except ModelUnusable as error:
                raise RevisionCorrupt(weights, str(error)) from None
            own, header = self.model.header, candidate.header
            if header.network != own.network or header.classes != own.classes:
                raise RevisionCorrupt(weights, "it is a network of another kind than the base")
            network = candidate.network
        self._networks[weights] = network

    def unstage(self, weights: Weights) -> None:
        if weights not in (BASE, self._serving):
            self._networks.pop(weights, None)

    def swap(self, weights: Weights) -> float:
        start = time.perf_counter()
        if weights not in self._networks:
            raise RevisionCorrupt(weights, "it is not staged")
        self._serving = weights
        return time.perf_counter() - start

    def session(self, interrupted: Callable[[], bool], serve: Callable[[], bool]) -> ClassifierSession:
        """Background work; it gives way after every step, which takes milliseconds."""
        return ClassifierSession(self.model, self._networks)

    def background(self, interrupted: Callable[[], bool], serve: Callable[[], bool] = lambda: False) -> Background:
        raise NotALanguageModel(self.info.name)

    def stats(self) -> dict[str, Any]:
        return {"active": 0, "waiting": 0, "weights": self._serving, "staged": list(self._networks), "leaving": 0}

    def close(self) -> None:
        self._networks.clear()


def log_probabilities(network: Int8Network, x: Int8Tensor) -> list[float]:
    """ln p of every class, for one example."""
    logits, _ = network.forward(network.check(x))
    return [float(value) for value in torch.log_softmax(dequantise(logits).double(), 1)[0]]
