"""Scoring, tapping and perturbed losses: right, and the same bits however often serving cuts in."""

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import llama_cpp as lc
import numpy as np
import pytest

from agentd.engine.llamacpp.adapters import read_control_vector
from agentd.engine.operations import Encode, Loss, ScoreExamples, ScoreTexts
from agentd.engine.protocol import Background, Engine, Generate, Sampling, Scores, TapIndex
from agentd.engine.session import Session
from agentd.errors import InvalidRequest
from agentd.learn.encoded import Encoded
from agentd.learn.objectives import example_objective
from agentd.learn.philox import rademacher
from agentd.limits import MICRO_BATCH
from tests.support.engine_samples import (
    CHOICES,
    ENGINES,
    GREEDY,
    REVIEWS,
    Interruption,
    ask,
    needs,
    review,
    score,
    write_lora,
)


@pytest.fixture(scope="module", params=sorted(ENGINES))
def engine(request: pytest.FixtureRequest, model_path: Path) -> Iterator[Engine]:
    local = ENGINES[request.param](model_path)
    yield local
    local.close()


@pytest.fixture(scope="module")
def interruption() -> Interruption:
    return Interruption()


@pytest.fixture(scope="module")
def opened(engine: Engine, interruption: Interruption) -> Iterator[Background]:
    background = engine.background(interruption)
    yield background
    background.close()


@pytest.fixture
def background(opened: Background, interruption: Interruption) -> Background:
    interruption.at = set()
    opened.use("0")
    return opened


@pytest.fixture
def examples(background: Background) -> list[Encoded]:
    some = [background.encode(review(text), CHOICES, label) for text, label in REVIEWS]
    # Answers that part before their last token, which is never fed, are sequences of their own.
    answers = ["Wonderful, all of it", "Terrible, all of it"]
    some.append(background.encode(review("Fine."), answers, answers[1]))
    some.append(background.encode(review("So so."), [], "A film of two halves."))
    some.append(background.encode(review("Long?"), [], "Not at all, no.", rejected="Not at all long"))
    some.append(background.encode(review("Bad?"), [], "It is bad.", objective="unlikelihood", weight=0.5))
    # Decoded in parts: one is longer than a micro-batch, the other has more scored rows than one decode has logits of.
    whole = " ".join(text for text, _ in REVIEWS)
    some.append(background.encode(review(f"{whole} {whole} {whole}"), CHOICES, "negative"))
    some.append(background.encode(review("Say more."), [], whole))
    assert len(some[-2].sequences[0]) > 2 * MICRO_BATCH
    assert len(some[-1].target) > 64
    return some


@pytest.fixture
def short(examples: list[Encoded]) -> list[Encoded]:
    """Those that are decoded whole, at a quarter of the tokens: for what has nothing to do with parts."""
    return examples[:-2]


def loss(background: Background, examples: list[Encoded], seed: int = 0, scale: float = 0.0) -> float:
    *_, value = background.loss(examples, 0.1, seed, scale)
    assert value is not None
    return value


def tap(background: Background, examples: list[Encoded], block: int, path: Path) -> tuple[TapIndex, "Rows"]:
    *_, index = background.tap(examples, range(block, block + 1), path)
    assert isinstance(index, TapIndex)
    return index, np.fromfile(path, np.float32).reshape(-1, index.n_embd)


def whole(prefix: int, start: int, rows: "Rows", example: Encoded) -> list["Rows"]:
    """The rows (tokens, n_embd) of each of an example's sequences, out of a tap."""
    shared = len(example.shared) - prefix
    sequences, at = [], start + shared
    for own in example.own:
        sequences.append(np.concatenate([rows[:prefix], rows[start : start + shared], rows[at : at + len(own)]]))
        at += len(own)
    return sequences


Rows = np.typing.NDArray[np.float32]


def interrupted(interruption: Interruption, run: Callable[[], Any]) -> tuple[Any, Any]:
    """The result of a run, and of the same run interrupted at its beginning, in its middle and at its end."""
    interruption.polls = 0
    plain = run()
    whole, interruption.polls = interruption.polls, 0
    interruption.at = {2, whole // 5, whole // 2, whole * 9 // 10, whole}
    again = run()
    assert not interruption.at  # all of them happened
    return plain, again


def test_a_text_that_is_not_whole_teaches_no_end(background: Background) -> None:
    whole = background.encode(review("Say more."), [], "It is good")
    cut = background.encode(review("Say more."), [], "It is good", whole=False)
    assert cut.target == whole.target[:-1]
    assert cut.sequences[0] == whole.sequences[0][:-1]


def test_scores_are_the_log_probabilities_that_serving_reports(
    engine: Engine, background: Background, examples: list[Encoded]
) -> None:
    for example, (text, label) in zip(examples, REVIEWS, strict=False):
        scores = score(background, [example])[0]
        sure = Sampling(temperature=0)
        request = Generate(text, review(text), sampling=sure, max_tokens=8, logprobs=0, choices=(label,))
        served = [entry["logprob"] for entry in ask(engine, request)[0].logprobs]
        assert len(served) == len(example.choices[example.correct])
        assert scores.choices[example.correct] == pytest.approx(sum(served), abs=0.5)
        assert scores.target[:-1] == pytest.approx(served, abs=0.5)


def test_a_metric_is_how_far_a_greedy_answer_gets(engine: Engine, background: Background) -> None:
    """Measured in one forward pass over the target, against what serving answers."""
    compared = 0
    for text, _ in REVIEWS:
        answer = ask(engine, Generate(text, review(text), sampling=GREEDY, max_tokens=6, logprobs=2))[0]
        if min(_lead(entry) for entry in answer.logprobs) < 0.2:  # in nats; rounding follows the layout of a batch
            continue
        said = [entry["token"] for entry in answer.logprobs]
        tokens = [token for each in said for token in background.vocabulary.tokenize(each)]
        for other in ("", " Ünlike"):
            target = "".join(said) + other
            example = background.encode(review(text), [], target, objective="metric", whole=False)
            if [token for *_, token in example.target[: len(said)]] != tokens:
                continue  # its text is written with other tokens than it was said with
            wrong = len(example.target) - len(said)
            assert wrong > 0 or not other
            assert loss(background, [example]) == pytest.approx(wrong / len(example.target))
            compared += 1
    assert compared >= 2


def _lead(entry: dict[str, Any]) -> float:
    first, second = (each["logprob"] for each in entry["top_logprobs"])
    return float(first - second)


def test_scores_agree_with_a_plain_forward_pass(
    engine: Engine, background: Background, examples: list[Encoded], model_path: Path
) -> None:
    """Of llama.cpp, which rounds activations to 8 bits. An engine that does not is further away from it."""
    from llama_cpp import Llama

    near = 0.3 if type(engine).__name__ == "LlamaCppEngine" else 0.6
    model = Llama(str(model_path), n_ctx=512, logits_all=True, verbose=False, n_threads=1)
    try:
        scored = score(background, examples)
        for example, scores in zip(examples, scored, strict=True):
            expected = {}
            for s, sequence in enumerate(example.sequences):
                model.reset()
                model.eval(sequence)
                for at, p, token in {*example.target, *(term for terms in example.choices for term in terms)}:
                    if at == s:
                        logits = model.scores[p].astype(np.float64)
                        expected[s, p, token] = logits[token] - np.logaddexp.reduce(logits)
            for value, terms in zip(scores.choices, example.choices, strict=True):
                assert value == pytest.approx(sum(expected[term] for term in terms), abs=near * len(terms))
            apart = [abs(v - expected[term]) for v, term in zip(scores.target, example.target, strict=True)]
            assert max(apart) < 1  # 8-bit activations
            assert sum(apart) / len(apart) < near
    finally:
        model.close()


def test_scores_do_not_depend_on_what_was_scored_before(background: Background, examples: list[Encoded]) -> None:
    some = examples[:2]
    fresh = score(background, some)
    score(background, [background.encode({"prompt": "Something else. It was"}, ["good", "bad"], "bad"), *some])
    assert score(background, some) == fresh


def test_an_interrupted_score_is_the_same_to_the_bit(
    background: Background, interruption: Interruption, examples: list[Encoded]
) -> None:
    def run() -> list[Scores]:
        background.use("0")  # or the second run would find the prefix computed
        return score(background, examples)

    plain, again = interrupted(interruption, run)
    assert again == plain


def test_an_interruption_is_reported_before_the_work_is_repeated(
    background: Background, interruption: Interruption, examples: list[Encoded]
) -> None:
    score(background, examples[:1])
    interruption.polls = 0
    score(background, examples[:1])
    middle = interruption.polls // 2
    interruption.polls, interruption.at = 0, {middle, 2 * middle, 3 * middle}
    assert [len(some) for some in background.score(examples[:1])] == [0, 0, 0, 1]


def test_an_interrupted_loss_is_the_same_to_the_bit(
    background: Background, interruption: Interruption, examples: list[Encoded]
) -> None:
    plain, again = interrupted(interruption, lambda: loss(background, examples, 5, 0.1))
    assert again == plain


@pytest.mark.parametrize("block", [1, 15, -1])
def test_an_interrupted_tap_is_the_same_to_the_bit(
    engine: Engine,
    background: Background,
    interruption: Interruption,
    examples: list[Encoded],
    tmp_path: Path,
    block: int,
) -> None:
    needs(engine, "tap")
    block %= engine.info.n_layer
    (index, rows), (again, same) = interrupted(interruption, lambda: tap(background, examples, block, tmp_path / "tap"))
    assert again == index
    assert np.array_equal(same, rows)
    assert np.isfinite(rows).all()


def test_the_tap_index_says_where_every_sequence_is(
    engine: Engine, background: Background, examples: list[Encoded], tmp_path: Path
) -> None:
    needs(engine, "tap")
    index, rows = tap(background, examples, engine.info.n_layer - 1, tmp_path / "tap")
    assert index.n_embd == engine.info.n_embd
    assert index.prefix_rows > 8  # the chat template and the question are shared
    expected = index.prefix_rows
    for start, example in zip(index.starts, examples, strict=True):
        assert start == expected
        expected += example.n_distinct - index.prefix_rows
    assert len(rows) == expected == index.rows
    assert max(len(example.own) for example in examples) > 1
    for start, example in zip(index.starts, examples, strict=True):
        alone, apart = tap(background, [example], engine.info.n_layer - 1, tmp_path / "alone")
        assert alone.prefix_rows >= index.prefix_rows
        for mine, other in zip(
            whole(index.prefix_rows, start, rows, example),
            whole(alone.prefix_rows, alone.starts[0], apart, example),
            strict=True,
        ):
            cosine = (mine * other).sum(1) / np.linalg.norm(mine, axis=1) / np.linalg.norm(other, axis=1)
            assert cosine[1:].min() > 0.99


def test_a_range_of_blocks_is_tapped_as_each_of_them_is(
    engine: Engine, background: Background, short: list[Encoded], tmp_path: Path
) -> None:
    needs(engine, "tap")
    last = engine.info.n_layer
    for blocks in (range(3), range(last - 4, last), range(last)):
        *_, index = background.tap(short, blocks, tmp_path / "all")
        assert isinstance(index, TapIndex)
        planes = np.fromfile(tmp_path / "all", np.float32).reshape(len(blocks), index.rows, index.n_embd)
        for block in {blocks[0], blocks[len(blocks) // 2], blocks[-1]}:
            alone, rows = tap(background, short, block, tmp_path / "one")
            assert alone == index
            assert np.array_equal(planes[block - blocks[0]], rows)


def test_a_tap_computes_nothing_above_its_last_block_and_what_follows_is_whole(
    engine: Engine, background: Background, interruption: Interruption, examples: list[Encoded], tmp_path: Path
) -> None:
    needs(engine, "tap")
    plain = score(background, examples)
    interruption.polls = 0
    tap(background, examples, engine.info.n_layer - 1, tmp_path / "tap")
    whole, interruption.polls = interruption.polls, 0
    tap(background, examples, 1, tmp_path / "tap")
    assert interruption.polls < whole / 2  # it is asked at every node of the graph
    assert score(background, examples) == plain


def test_there_is_no_tap_outside_the_model(
    engine: Engine, background: Background, examples: list[Encoded], tmp_path: Path
) -> None:
    needs(engine, "tap")
    for blocks in (range(0), range(-1, 2), range(3, engine.info.n_layer + 1)):
        with pytest.raises(InvalidRequest):
            list(background.tap(examples, blocks, tmp_path / "tap"))


def test_the_input_of_the_first_block_is_the_embedding_of_each_token(
    engine: Engine, background: Background, examples: list[Encoded], tmp_path: Path, model_path: Path
) -> None:
    needs(engine, "tap")
    index, rows = tap(background, examples, 0, tmp_path / "tap")
    stored = next(tensor for tensor in gguf.GGUFReader(model_path).tensors if tensor.name == "token_embd.weight")
    for start, example in zip(index.starts, examples, strict=True):
        states = whole(index.prefix_rows, start, rows, example)
        for state, sequence in zip(states, example.sequences, strict=True):
            expected = gguf.quants.dequantize(stored.data[sequence], stored.tensor_type)
            np.testing.assert_allclose(state, expected, atol=1e-6)


def test_the_loss_is_the_mean_objective_of_the_scores(
    engine: Engine, background: Background, examples: list[Encoded]
) -> None:
    """To the last digits, or to the rounding of bfloat16 where a loss packs more examples together than scores do."""
    near = 1e-6 if type(engine).__name__ == "LlamaCppEngine" else 2e-3
    scores = score(background, examples)
    expected = [example_objective(e, s.choices, s.target, 0.1).loss for s, e in zip(scores, examples, strict=True)]
    assert loss(background, examples) == pytest.approx(sum(expected) / len(expected), rel=near)


def test_a_perturbation_leaves_no_trace(
    engine: Engine, background: Background, short: list[Encoded], tmp_path: Path
) -> None:
    needs(engine, "tap")
    plain, scores = loss(background, short), score(background, short)
    moved = loss(background, short, 9, 0.5)
    assert moved != plain
    assert loss(background, short, 9, -0.5) not in (plain, moved)
    assert score(background, short) == scores
    _, rows = tap(background, short[:2], 5, tmp_path / "a")
    loss(background, short, 9, 0.5)
    assert np.array_equal(tap(background, short[:2], 5, tmp_path / "b")[1], rows)
    assert loss(background, short) == plain


def test_updates_move_what_is_scored_and_replaying_them_gives_the_same_bits(
    engine: Engine, background: Background, short: list[Encoded], tmp_path: Path
) -> None:
    needs(engine, "control")
    updates = [(3, 0.25), (4, -0.125), (1 << 40, 0.3)]
    scores = score(background, short)
    for seed, coefficient in updates:
        background.update(seed, coefficient)
    moved = score(background, short)
    assert moved != scores
    background.write_control(tmp_path / "first.gguf")
    background.use("0")
    assert score(background, short) == scores
    for seed, coefficient in updates:
        loss(background, short[:1], seed, 0.1)  # the queries of a step leave no trace either
        background.update(seed, coefficient)
    background.write_control(tmp_path / "replayed.gguf")
    assert (tmp_path / "first.gguf").read_bytes() == (tmp_path / "replayed.gguf").read_bytes()

    n_layer, n_embd = engine.info.n_layer, engine.info.n_embd
    expected = np.zeros((n_layer - 1, n_embd), np.float32)
    for seed, coefficient in updates:
        z = np.stack([rademacher(seed, layer + 1, n_embd) for layer in range(n_layer - 1)])
        expected = expected + np.float32(coefficient) * z
    assert np.array_equal(read_control_vector(tmp_path / "first.gguf", n_layer, n_embd), expected)

    engine.stage("candidate", None, tmp_path / "first.gguf")
    background.use("candidate")
    assert score(background, short) == moved
    background.update(5, 1.0)
    background.use("candidate")  # what is staged was not moved
    assert score(background, short) == moved
    background.use("0")
    engine.unstage("candidate")


def test_a_control_vector_never_moved_is_written_as_zeros(
    engine: Engine, background: Background, tmp_path: Path
) -> None:
    needs(engine, "control")
    background.write_control(tmp_path / "zero.gguf")
    assert not read_control_vector(tmp_path / "zero.gguf", engine.info.n_layer, engine.info.n_embd).any()


def test_drift_is_zero_for_the_same_weights_and_grows_with_the_change(
    engine: Engine, background: Background, short: list[Encoded], tmp_path: Path, model_path: Path
) -> None:
    needs(engine, "control")
    texts = ["The river rises in the hills and flows south to the sea.", "x", "Bread is made from flour and water."]

    def drift(candidate: str) -> float:
        *_, value = background.drift(texts, "0", candidate)
        assert value is not None
        return value

    engine.stage("small", write_lora(tmp_path / "s.gguf", model_path, size=0.2), None)
    engine.stage("large", write_lora(tmp_path / "l.gguf", model_path, size=2.0), None)
    engine.stage("broken", write_lora(tmp_path / "b.gguf", model_path, size=1e35, alpha=1e8), None)
    background.use("small")
    scores = score(background, short)
    assert drift("0") == 0
    assert 0 < drift("small") < drift("large")
    assert drift("broken") == math.inf
    # As many distributions are kept as the footprint counts, however many tokens a text has.
    known, texts = texts, ["word " * 60]
    few = drift("small")
    texts = ["word " * 100]
    assert drift("small") == few > 0
    texts = known
    assert score(background, short) == scores  # it goes on with what it used
    background.use("broken")
    assert not math.isfinite(loss(background, short))
    background.use("0")
    for weights in ("small", "large", "broken"):
        engine.unstage(weights)
    assert math.isfinite(loss(background, short))


def test_what_does_not_fit_a_batch_is_refused(background: Background) -> None:
    with pytest.raises(InvalidRequest, match="tokens are more than"):
        background.encode(review("word " * 2000), CHOICES, "positive")
    with pytest.raises(InvalidRequest, match="not one of the choices"):
        background.encode(review("x"), CHOICES, "mixed")
    with pytest.raises(InvalidRequest, match="empty"):
        background.encode({"prompt": ""}, CHOICES, "positive")
    with pytest.raises(InvalidRequest, match="examples"):
        list(background.loss([], 0.1, 0, 0.0))
    with pytest.raises(InvalidRequest, match="two tokens"):
        list(background.drift([""], "0", "0"))
    assert list(background.score([])) == []


def test_many_long_answers_share_their_prompt(background: Background) -> None:
    """Ten answers to a prompt of a hundred tokens fit, because the prompt is computed once."""
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    answers = [f"{word} is the answer" for word in words]
    example = background.encode(review("word " * 100), answers, answers[4])
    assert example.n_tokens > 1000
    scores = score(background, [example])[0]
    assert len(scores.choices) == 10
    assert scores.choices[4] == pytest.approx(sum(scores.target[:-1]), abs=1e-3)


def test_a_session_reads_examples_with_any_line_separator_in_their_text(engine: Engine, tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"input": review("one\u2028two\x85three\x0cfour"), "choices": CHOICES, "target": "positive"},
        {"input": review("word " * 2000), "choices": CHOICES, "target": "positive"},
        {"input": review("Gorgeous."), "choices": CHOICES, "target": "positive"},
    ]
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    session = Session(engine.background(lambda: False))
    try:
        assert last(session.begin(Encode(source, target))) == 3
        written = [json.loads(line) for line in target.read_text(encoding="utf-8").split("\n")[:-1]]
        assert ["error" in tree for tree in written] == [False, True, False]
        scores = last(session.begin(ScoreExamples([2, 0])))
        assert scores[0] == last(session.begin(ScoreExamples([0, 2])))[1]
        for wrong in ([1], [3], [-1]):
            with pytest.raises(InvalidRequest, match="example"):
                last(session.begin(Loss(wrong, 0.1)))
    finally:
        session.close()


def last(steps: Iterator[Any]) -> Any:
    """What a session's command returns."""
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value


@pytest.mark.parametrize("work", ["tap", "choose", "speak", "score"])
def test_work_that_outlives_its_session_touches_no_freed_memory(
    work: str, model_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was begun and dropped is collected at some time, perhaps behind the model's end."""
    alive: set[int] = set()
    made, freed, cleared = lc.llama_init_from_model, lc.llama_free, lc.llama_memory_clear
    memories: dict[int, int] = {}

    def make(*arguments: Any) -> Any:
        context = made(*arguments)
        alive.add(context)
        memories[lc.llama_get_memory(context)] = context
        return context

    def free(context: int) -> None:
        alive.remove(context)
        freed(context)

    def clear(memory: int, data: bool) -> None:
        assert memories[memory] in alive
        cleared(memory, data)

    monkeypatch.setattr(lc, "llama_init_from_model", make)
    monkeypatch.setattr(lc, "llama_free", free)
    monkeypatch.setattr(lc, "llama_memory_clear", clear)
    engine = ENGINES["llamacpp"](model_path)
    background = engine.background(lambda: False)
    examples = [background.encode(review(text), CHOICES, label) for text, label in REVIEWS]
    choices = tuple(CHOICES) if work == "choose" else ()
    asked = [Generate(str(i), review(text), GREEDY, 8, choices=choices) for i, (text, _) in enumerate(REVIEWS)]
    begun: Iterator[Any] = {
        "tap": lambda: background.tap(examples, range(1, 3), tmp_path / "tap"),
        "score": lambda: background.score(examples),
    }.get(work, lambda: background.answer(asked, lambda piece: False))()
    for _ in range(1 if work in ("tap", "score") else len(asked) + 2):
        next(begun)
    engine.close()
    assert not alive
    begun.close()  # type: ignore[attr-defined]  # all of them are generators
    assert not alive


def test_texts_are_scored_beside_the_examples(background: Background, interruption: Interruption) -> None:
    """Of texts that the session has not encoded: the same figures as of examples, with interruptions or without."""
    prompts, answers = ["The sun rises in the", "Is ice cold?"], [["east", "north"], ["Yes", "No", "Maybe so"]]
    texts = ScoreTexts(prompts, answers, [False, True])
    inputs: list[dict[str, Any]] = [
        {"prompt": prompts[0]},
        {"messages": [{"role": "user", "content": prompts[1]}]},
    ]
    encoded = [background.encode(input, choices, choices[0]) for input, choices in zip(inputs, answers, strict=True)]

    def run() -> list[list[float]]:
        *_, result = _results(Session(background).begin(texts))
        assert isinstance(result, list)
        return result

    first = run()
    assert [len(each) for each in first] == [2, 3]
    for mine, theirs in zip(first, score(background, encoded), strict=True):
        assert mine == pytest.approx(theirs.choices, abs=1e-4)
    interruption.at = {1, 2}
    assert run() == first


def _results(steps: Any) -> Iterator[Any]:
    """What a generator yields, and what it returns."""
    returned = yield from steps
    yield returned
