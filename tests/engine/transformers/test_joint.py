"""Several sequences in one forward: each gets what it would get alone, to the bit where that is asked for."""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from agentd.budget.footprint import MIB
from agentd.budget.in_place import joint_bytes, served_shapes
from agentd.engine.protocol import Generate, Interrupted, Sampling
from agentd.engine.transformers import few_rows
from agentd.engine.transformers.context import Context
from agentd.engine.transformers.engine import TransformersEngine
from agentd.engine.transformers.joint import may_join
from agentd.engine.transformers.model import Model
from agentd.formats.gguf_header import read_header
from tests.support.engine_samples import Answer, ask, chat, finish, raw
from tools import tiny_model

FREE = Sampling(temperature=0)
WARM = Sampling(temperature=1.0, seed=5)
SLOTS = 4
QUESTIONS = ["Who?", "The wind and the sea. " * 8 + "Where?", "When was it, and why? " * 3, "The lighthouse. " * 30]


@pytest.fixture(scope="module")
def own_engine(dtype: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TransformersEngine]:
    folder = tmp_path_factory.mktemp(f"joint-{dtype}")
    path = tiny_model.write(folder / "tiny.gguf")
    engine = TransformersEngine(path, folder=folder / "w", key="0" * 20, context=768, slots=SLOTS, dtype=dtype)
    yield engine
    engine.close()


@pytest.fixture
def sizes(own_engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of every forward, how many sequences it had."""
    counted: list[int] = []
    forward = Model.forward

    def counting(model: Model, tokens: Sequence[int], *rest: Any, **more: Any) -> torch.Tensor:
        counted.append(len(getattr(more["past_key_values"], "sizes", [0])))
        return forward(model, tokens, *rest, **more)

    monkeypatch.setattr(Model, "forward", counting)
    return counted


def alone(engine: TransformersEngine, *requests: Generate) -> list[Answer]:
    return [ask(engine, request)[0] for request in requests]


def close(engine: TransformersEngine, some: Sequence[Answer], others: Sequence[Answer]) -> None:
    """The same tokens greedily, and nearly the same numbers; in bfloat16 these are coarse, and texts may part where two
    tokens are as good as equal."""
    coarse = engine.model.dtype == torch.bfloat16
    for one, other in zip(some, others, strict=True):
        if not coarse:
            assert one.text == other.text
        for a, b in zip(one.logprobs, other.logprobs, strict=False):
            if a["token"] != b["token"]:
                assert coarse
                break
            assert a["logprob"] == pytest.approx(b["logprob"], abs=0.15 if coarse else 1e-3)


def test_together_each_says_what_it_says_alone(own_engine: TransformersEngine, sizes: list[int]) -> None:
    requests = [chat(str(i), text, FREE, max_tokens=12, logprobs=0) for i, text in enumerate(QUESTIONS)]
    expected = alone(own_engine, *requests)
    assert max(sizes) == 1
    sizes.clear()
    close(own_engine, ask(own_engine, *requests), expected)
    assert max(sizes) == SLOTS
    assert len(sizes) < 30, "twelve steps for all, and a few for the prompts"


def test_an_exact_answer_is_the_same_to_the_bit_whatever_the_company(
    own_engine: TransformersEngine, sizes: list[int]
) -> None:
    exact = chat("exact", QUESTIONS[1], WARM, max_tokens=12, logprobs=2)
    (expected,) = alone(own_engine, exact)
    company = [chat(f"c{i}", text, FREE, max_tokens=20) for i, text in enumerate(QUESTIONS[1:])]
    for requests in ([*company, exact], [exact, *company]):
        answer = next(each for each in ask(own_engine, *requests) if each.last.key == "exact")
        assert (answer.text, answer.logprobs) == (expected.text, expected.logprobs)
    assert max(sizes) == len(company)
    choice = Generate("choice", {"prompt": "It was "}, FREE, choices=("good", "bad", "very good"), logprobs=0)
    (expected,) = alone(own_engine, choice)
    assert ask(own_engine, *company, choice)[-1].logprobs == expected.logprobs


def test_what_was_read_in_company_is_no_part_of_an_exact_answer(own_engine: TransformersEngine) -> None:
    """Even where the piece of a prompt ends at a boundary."""
    prompt, other = "a" * 63, "b" * 20
    exact = raw("exact", prompt + "cc", WARM, max_tokens=8, logprobs=0)
    own_engine.forget(None)
    (expected,) = alone(own_engine, exact)
    own_engine.forget(None)
    ask(own_engine, raw("first", prompt, FREE, max_tokens=2), raw("second", other, FREE, max_tokens=2))
    (answer,) = alone(own_engine, exact)
    assert answer.last.cached_tokens == 0
    assert answer.logprobs == expected.logprobs


@pytest.mark.parametrize("cancelled", [False, True])
def test_who_leaves_in_the_middle_leaves_the_others_as_they_were(
    own_engine: TransformersEngine, cancelled: bool
) -> None:
    stay = [chat(str(i), QUESTIONS[i], FREE, max_tokens=14, logprobs=0) for i in (0, 1)]
    expected = alone(own_engine, *stay)
    own_engine.submit(chat("leaves", QUESTIONS[2], FREE, max_tokens=99 if cancelled else 4))
    for request in stay:
        own_engine.submit(request)
    answers: dict[str, Answer] = {}
    for _ in range(6):
        for piece in own_engine.step():
            answers.setdefault(piece.key, Answer()).pieces.append(piece)
    own_engine.cancel("leaves")
    late = chat("late", QUESTIONS[3], FREE, max_tokens=6, logprobs=0)  # takes the place that is free
    own_engine.submit(late)
    finish(own_engine, answers)
    close(own_engine, [answers[request.key] for request in stay], expected)
    close(own_engine, [answers["late"]], alone(own_engine, late))
    assert (answers["leaves"].last.finish is None) == cancelled


def test_a_constraint_binds_its_own_answer_alone(own_engine: TransformersEngine, sizes: list[int]) -> None:
    yes = Sampling(temperature=0, grammar='root ::= "yes " root | "no"')
    requests = [chat("free", QUESTIONS[0], FREE, logprobs=0), raw("bound", "Well? ", yes, max_tokens=9, logprobs=0)]
    expected = alone(own_engine, *requests)
    together = ask(own_engine, *requests)
    assert max(sizes) == 2
    assert set(together[1].text.split()) <= {"yes", "no"} | {"y", "ye", "n"}
    close(own_engine, together, expected)


def test_a_short_request_is_answered_beside_a_long_prompt(
    own_engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    serving = own_engine._serving
    monkeypatch.setattr(serving, "_noted", lambda tokens, seconds: None)
    monkeypatch.setattr(serving, "_prompt_rate", 100.0)
    requests = [chat("short", "Hm?", FREE, max_tokens=12, logprobs=0), chat("long", "one two " * 70, FREE, logprobs=0)]
    expected = alone(own_engine, *requests)
    own_engine.forget(None)
    answers: dict[str, Answer] = {}
    own_engine.submit(requests[0])
    while "short" not in answers:
        for piece in own_engine.step():
            answers.setdefault(piece.key, Answer()).pieces.append(piece)
    own_engine.submit(requests[1])
    while "long" not in answers:
        for piece in own_engine.step():
            answers.setdefault(piece.key, Answer()).pieces.append(piece)
    assert len(answers["short"].pieces) > 4, "it went on between the pieces of the long one"
    finish(own_engine, answers)
    close(own_engine, [answers["short"], answers["long"]], expected)


def test_a_forward_that_is_given_up_leaves_all_caches_as_they_were(own_engine: TransformersEngine) -> None:
    model = own_engine.model
    context = Context(model, 2)
    context.joins = True
    for sequence, n in ((0, 9), (1, 4)):
        context.decode([3] * n, range(n), [(sequence,)] * n, [])
    step: tuple[Any, ...] = ([7, 8], [9, 4], [(0,), (1,)], [0, 1])
    polls = 0

    def give_up() -> None:
        nonlocal polls
        polls += 1
        if polls == tiny_model.N_BLOCKS:
            raise Interrupted

    with model.giving_way(give_up), pytest.raises(Interrupted):
        context.decode(*step)
    assert [each.get_seq_length() for each in context._caches] == [9, 4]
    context.decode(*step)
    after = [context.logits(row).copy() for row in (0, 1)]
    for sequence, n in ((0, 9), (1, 4)):
        context.forget(sequence, n)
    context.decode(*step)
    assert all(np.array_equal(context.logits(row), values) for row, values in enumerate(after))


def test_requests_in_the_middle_of_a_joint_forward_are_computed_as_ever(own_engine: TransformersEngine) -> None:
    """As where a session that answers several at once gives way."""
    model, request = own_engine.model, chat("q", QUESTIONS[1], WARM, max_tokens=4, logprobs=0)
    pair = [chat(str(i), QUESTIONS[i], FREE, max_tokens=3, logprobs=0) for i in (0, 2)]
    expected = alone(own_engine, request)[0].logprobs
    own_engine.forget(None)
    both = ask(own_engine, *pair)
    context = Context(model, 2)
    context.joins = True
    run: Callable[[], None] = lambda: context.decode([3, 4, 5], [0, 1, 0], [(0,), (0,), (1,)], [1, 2])  # noqa: E731
    run()
    plain = [context.logits(row).copy() for row in (1, 2)]
    context.close()
    served = 0

    def serve() -> None:
        nonlocal served
        with model.set_aside():
            assert alone(own_engine, request)[0].logprobs == expected
            own_engine.forget(None)
            assert [answer.logprobs for answer in ask(own_engine, *pair)] == [answer.logprobs for answer in both]
        served += 1

    with model.giving_way(serve):
        run()
    assert served == tiny_model.N_BLOCKS
    assert all(np.array_equal(context.logits(row), values) for row, values in zip((1, 2), plain, strict=True))
    assert {config._attn_implementation for config in model.configs} == {model.attention}


def test_a_model_that_differs_is_computed_one_by_one(
    own_engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    own: Any = next(module for module in own_engine.model.module.modules() if hasattr(module, "o_proj"))
    attend = type(own).forward
    monkeypatch.setattr(type(own), "forward", lambda self, *args, **more: (1.5 * attend(self, *args, **more)[0], None))
    context = Context(own_engine.model, 2)
    context.warm_up(64)
    assert context.joins, "it is another model, the same together and alone"

    def by_rows(self: Any, hidden_states: torch.Tensor, *args: Any, **more: Any) -> Any:
        output, _ = attend(self, hidden_states, *args, **more)
        return output * hidden_states.shape[1], None

    monkeypatch.setattr(type(own), "forward", by_rows)
    context.warm_up(64)
    assert not context.joins


def test_rotations_that_follow_the_longest_sequence_keep_a_model_from_it(own_engine: TransformersEngine) -> None:
    model = own_engine.model
    assert may_join(model.module, model.config)
    for kind in ("dynamic", {"full_attention": "longrope", "sliding_attention": "default"}):
        rotary: Any = torch.nn.Module()
        rotary.rope_type = kind
        assert not may_join(torch.nn.ModuleList([model.module, rotary]), model.config)
    chunked = copy.copy(model.config)
    chunked.layer_types = ["chunked_attention"] * tiny_model.N_BLOCKS
    assert not may_join(model.module, chunked)


class Rows(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch's own
    """Bytes of what was made for every token of a vocabulary."""

    def __init__(self, n_vocab: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._n_vocab, self._held = n_vocab, dict[int, torch.UntypedStorage]()

    @property
    def total(self) -> int:
        return sum(storage.nbytes() for storage in self._held.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = {each.untyped_storage().data_ptr() for each in args if isinstance(each, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and self._n_vocab in result.shape:
            storage = result.untyped_storage()
            if storage.data_ptr() not in before:
                self._held[storage.data_ptr()] = storage
        return result


@pytest.mark.parametrize("n", [2, SLOTS])
def test_all_slots_at_once_take_what_is_predicted(own_engine: TransformersEngine, n: int, dtype: str) -> None:
    header = read_header(own_engine._path)
    shapes = served_shapes(header, dtype)
    context = own_engine._context
    step: tuple[Any, ...] = ([5] * n, [0] * n, [(sequence,) for sequence in range(n)], range(n))
    with Rows(own_engine.info.n_vocab) as rows:
        context.decode(*step)
    for sequence in range(n):
        context.forget(sequence)
    code = 5 * MIB if dtype == "bfloat16" else 0
    assert 0 < rows.total <= joint_bytes(shapes, n) - code
    if n == SLOTS:
        assert joint_bytes(shapes, n) - code <= 1.25 * rows.total


def test_products_of_few_rows_are_the_same_products() -> None:
    torch.manual_seed(1)
    for bias in (False, True):
        layer = torch.nn.Sequential(torch.nn.Linear(24, 40, bias=bias))
        x = torch.randn(1, 3, 24)
        plain = layer(x)
        with few_rows.turned(layer):
            other = layer(x)
        assert other.is_contiguous()
        torch.testing.assert_close(other, plain)
        assert torch.equal(layer(x), plain)
