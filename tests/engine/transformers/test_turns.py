"""Requests in the middle of background work: answered by the committed weights, and the work ends in the same bits."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from agentd.engine.protocol import BASE, AdapterSpec, Interrupted, LearningRule
from agentd.engine.transformers import background as backgrounds
from agentd.engine.transformers.background import TransformersBackground
from agentd.engine.transformers.engine import TransformersEngine
from agentd.learn import ledger
from agentd.learn.encoded import Encoded
from agentd.learn.ledger import Step
from tests.support.engine_samples import CHOICES, REVIEWS, ask, chat, last, raw, review
from tools import tiny_model

EPSILON, LR = 1e-2, 3e-3
LORA = AdapterSpec("lora", 4, 8.0, 1, differentiated=True)
Work = Callable[[TransformersBackground, Sequence[Encoded]], list[Any]]


def descend(background: TransformersBackground, examples: Sequence[Encoded], epsilon: float) -> list[Any]:
    """Two steps on the same examples: where a frozen trunk is kept, the second finds it."""
    return [last(background.descend(examples, 0.1, seed, epsilon, LR)) for seed in (5, 6)]


WORK: dict[str, tuple[LearningRule, Work]] = {
    "score": (LearningRule(), lambda b, examples: list(b.score(examples))),
    "loss": (LearningRule(), lambda b, examples: list(b.loss(examples, 0.1, 5, EPSILON))),
    "pair": (LearningRule(), lambda b, examples: list(b.pair(examples, 0.1, 5, EPSILON))),
    "sparse": (LearningRule(sparsity=0.75), lambda b, examples: list(b.pair(examples, 0.1, 5, EPSILON))),
    "drift": (LearningRule(), lambda b, examples: list(b.drift(["The river rises in the hills."], BASE, BASE))),
    "bp of the last block": (LearningRule(blocks=1), lambda b, examples: descend(b, examples, 0.0)),
    "bp": (LearningRule(blocks=tiny_model.N_BLOCKS), lambda b, examples: descend(b, examples, 0.0)),
    "elasticzo": (LearningRule(blocks=2), lambda b, examples: descend(b, examples, EPSILON)),
    "loho": (
        LearningRule(blocks=1, everywhere=True),
        lambda b, examples: [*b.pair(examples, 0.1, 5, EPSILON), *descend(b, examples, 0.0)],
    ),
    "lora": (LearningRule(adapters=LORA), lambda b, examples: descend(b, examples, 0.0)),
    "mezo-lora": (
        LearningRule(adapters=AdapterSpec("lora", 4, 8.0, 1)),
        lambda b, examples: list(b.pair(examples, 0.1, 5, EPSILON)),
    ),
    "tensor train": (
        LearningRule(adapters=AdapterSpec("tensor-train", 3, 1.0, 1)),
        lambda b, examples: list(b.pair(examples, 0.1, 5, EPSILON)),
    ),
}


class Turns:
    """Asked before every block, it lets somebody in at some of them: `serve`, or without it the work is given up."""

    def __init__(self) -> None:
        self.polls, self.at = 0, set[int]()
        self.serve: Callable[[], bool] | None = None

    def interrupted(self) -> bool:
        self.polls += 1
        return self.polls in self.at

    def answered(self) -> bool:
        return self.serve is not None and self.serve()


@pytest.fixture
def turns() -> Turns:
    return Turns()


@pytest.fixture
def busy(engine: TransformersEngine, turns: Turns) -> Iterator[TransformersBackground]:
    opened = engine.background(turns.interrupted, turns.answered)
    yield opened
    opened.close()


@pytest.mark.parametrize("name", WORK)
def test_work_that_others_cut_into_ends_in_the_same_bits(
    engine: TransformersEngine,
    busy: TransformersBackground,
    dtype: str,
    turns: Turns,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backgrounds, "LOSS_TOKENS", 192)  # several packs
    examples = [busy.encode(review(text), CHOICES, label) for text, label in REVIEWS]
    requests = chat("q", "What now?", logprobs=0, max_tokens=3), raw("r", "Long. " * 40, logprobs=0, max_tokens=1)
    clean = [answer.logprobs for answer in ask(engine, *requests)]
    rule, work = WORK[name]

    def run(at: set[int]) -> tuple[list[Any], int, float, str]:
        turns.at = set()
        busy.use(BASE)
        busy.rule(rule)
        if rule.adapters is None and rule.blocks < tiny_model.N_BLOCKS:
            busy.update(1, 1e-4)  # what learns is not what serves any more
        turns.polls, turns.at = 0, at
        results, polls = work(busy, examples), turns.polls
        turns.at = set()
        return results, polls, last(busy.loss(examples, 0.1, 0, 0.0)), busy.digest()

    run(set())  # the first one tries out what the model obeys
    plain = run(set())
    whole = plain[1]
    assert whole >= tiny_model.N_BLOCKS
    answered = 0

    def serve() -> bool:
        nonlocal answered
        some = len(requests) if answered % 4 == 0 else 1  # the long prompt not every time
        answered += 1
        assert [answer.logprobs for answer in ask(engine, *requests[:some])] == clean[:some]
        return True

    turns.serve = serve
    assert run(set(range(1, whole + 1))) == plain  # no part of the work is done twice
    assert answered == whole
    turns.serve = None
    # Where work begins again does not depend on the type of weights: each has its half of the places.
    for place in {"float32": (1, whole // 2, whole), "bfloat16": (2, whole // 3, whole - 1)}[dtype]:
        pieces, polls, *after = run({place})
        assert (pieces[-1], *after) == (plain[0][-1], *plain[2:])
        assert polls > whole  # it was repeated
    assert [answer.logprobs for answer in ask(engine, *requests)] == clean
    assert all("forward" not in vars(module) for module in engine.model.module.modules())
    assert all(parameter.grad is None for parameter in engine.model.module.parameters())


def test_work_on_other_weights_than_those_that_serve(
    engine: TransformersEngine, busy: TransformersBackground, turns: Turns, tmp_path: Path
) -> None:
    """As at the gate, where a candidate is judged that no one may be answered by."""
    request = chat("q", "What now?", logprobs=0, max_tokens=3)
    clean = ask(engine, request)[0].logprobs
    examples = [busy.encode(review(text), CHOICES, label) for text, label in REVIEWS]
    of_base = last(busy.score(examples))
    ledger.write(tmp_path / "ledger", ledger.Ledger(0, [Step(7, 1.0, 1e-2, 1e-3)]))
    engine.stage("candidate", tmp_path / "ledger", None)
    busy.use("candidate")
    plain = last(busy.score(examples))
    assert plain != of_base

    def serve() -> bool:
        assert ask(engine, request)[0].logprobs == clean
        return True

    turns.serve, turns.polls, turns.at = serve, 0, set(range(1, 99))
    assert last(busy.score(examples)) == plain


def test_a_model_gives_way_only_where_it_was_allowed(engine: TransformersEngine) -> None:
    def refuse() -> None:
        raise Interrupted

    with engine.model.giving_way(refuse), pytest.raises(Interrupted):
        engine.model.forward([1, 2, 3], [2], use_cache=False)
    with engine.model.giving_way(refuse), engine.model.set_aside():
        engine.model.forward([1, 2, 3], [2], use_cache=False)
    assert engine.model.forward([1, 2, 3], [2], use_cache=False).shape == (1, engine.info.n_vocab)
