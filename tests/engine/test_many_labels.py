"""More answers than the context has sequences: in groups, and as if each were computed alone, but for the rounding of
keys and values to 16 bits, which follows how tokens are laid out."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from agentd.engine.llamacpp.background import LlamaCppBackground
from agentd.engine.llamacpp.engine import LlamaCppEngine
from agentd.engine.protocol import Generate, Sampling, TapIndex
from agentd.host.cpu import multiplies_bf16
from agentd.learn.encoded import Encoded
from tests.support.engine_samples import ENGINES, Interruption, ask, score
from tools import tiny_model

INPUT = {"messages": [{"role": "user", "content": "Where does this go?"}]}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LlamaCppEngine]:
    path = tiny_model.write(tmp_path_factory.mktemp("tiny") / "tiny.gguf")
    local = LlamaCppEngine(path, context=2048, slots=2, threads=1)
    yield local
    local.close()


@pytest.fixture(scope="module")
def interruption() -> Interruption:
    return Interruption()


@pytest.fixture(scope="module")
def background(engine: LlamaCppEngine, interruption: Interruption) -> Iterator[LlamaCppBackground]:
    opened = engine.background(interruption)
    yield opened
    opened.close()


def labels(n: int) -> list[str]:
    """Of several tokens each, many beginning alike, one the beginning of another."""
    return [f"{'desk' if i % 3 else 'shelf'} {i * 7}" for i in range(n)]


@pytest.mark.parametrize("n", [63, 64, 77, 126, 127, 200])
def test_scores_are_those_of_every_answer_alone(background: LlamaCppBackground, n: int) -> None:
    choices = labels(n)
    background.use("0")
    example = background.encode(INPUT, choices, choices[n // 2])
    assert len(example.own) > 50
    (scores,) = score(background, [example])
    # With the end of turn, as answers are scored of which one begins another.
    alone = [background.encode(INPUT, [], choice) for choice in choices]
    expected = [sum(each.target) for each in score(background, alone)]
    assert scores.choices == pytest.approx(expected, abs=0.03)
    assert sum(scores.target) == pytest.approx(expected[n // 2], abs=0.03)


@pytest.mark.parametrize("n", [77, 200])
def test_engine_transformers_computes_them_in_one_forward(n: int, tmp_path: Path) -> None:
    choices = labels(n)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.support.engine_samples.CONTEXT", 2048)
        engine = ENGINES["transformers"](tiny_model.write(tmp_path / "tiny.gguf"))
    background = engine.background(lambda: False)
    example, *alone = [background.encode(INPUT, choices, choices[n // 2])] + [
        background.encode(INPUT, [], choice) for choice in choices
    ]
    (scores,) = score(background, [example])
    # bfloat16, where the processor multiplies in it, has eight bits; another layout would be nats away.
    rounding = 2**-8 if multiplies_bf16() else None
    expected = [sum(each.target) for each in score(background, alone)]
    assert scores.choices == pytest.approx(expected, rel=rounding, abs=0.01)
    background.close()
    engine.close()


def test_a_batch_of_many_and_few_answers_is_what_each_is_alone(background: LlamaCppBackground) -> None:
    background.use("0")
    few = background.encode({"prompt": "Which one? "}, ["ab", "cd"], "ab")
    many = background.encode({"prompt": "Which one? "}, labels(130), labels(130)[9])
    together = score(background, [few, many, few])
    apart = [score(background, [each])[0] for each in (few, many, few)]
    for mine, other in zip(together, apart, strict=True):
        assert mine.choices == pytest.approx(other.choices, abs=0.03)


def test_an_interruption_in_any_group_changes_nothing(
    background: LlamaCppBackground, interruption: Interruption
) -> None:
    example = background.encode(INPUT, labels(150), labels(150)[0])
    background.use("0")
    interruption.polls, interruption.at = 0, set()
    plain = score(background, [example])
    polls = interruption.polls
    for part in range(1, 10):
        background.use("0")
        interruption.polls, interruption.at = 0, {polls * part // 10}
        assert score(background, [example]) == plain
        assert interruption.polls > polls
    interruption.at = set()


def test_the_tap_has_the_rows_of_every_group(background: LlamaCppBackground, tmp_path: Path) -> None:
    choices = labels(130)
    background.use("0")

    def tapped(example: Encoded) -> tuple[TapIndex, "np.typing.NDArray[np.float32]"]:
        *_, index = background.tap([example], range(3, 4), tmp_path / "tap")
        assert isinstance(index, TapIndex)
        return index, np.fromfile(tmp_path / "tap", np.float32).reshape(-1, index.n_embd)

    example = background.encode(INPUT, choices, choices[0])
    index, rows = tapped(example)
    assert len(rows) == index.rows == example.n_distinct
    at = len(example.shared)
    for own in example.own:
        one = Encoded.of([example.shared + own], [], 0, [(0, len(example.shared), own[0])])
        _, alone = tapped(one)
        np.testing.assert_allclose(rows[at : at + len(own)], alone[len(example.shared) :], atol=0.03)
        at += len(own)


@pytest.mark.parametrize("n", [77, 200])
def test_serving_chooses_the_answer_that_scores_best(
    engine: LlamaCppEngine, background: LlamaCppBackground, n: int
) -> None:
    choices = labels(n)
    background.use("0")
    (scores,) = score(background, [background.encode(INPUT, choices, choices[0])])
    request = Generate("many", INPUT, sampling=Sampling(temperature=0), max_tokens=32, choices=tuple(choices))
    said = "".join(piece.text for piece in ask(engine, request))
    assert scores.choices[choices.index(said)] == pytest.approx(max(scores.choices), abs=0.03)
