"""An engine whose weights learn where they serve, with a tiny model, in both types of weights."""

from collections.abc import Iterator

import pytest

from agentd.engine.protocol import BASE
from agentd.engine.transformers.background import TransformersBackground
from agentd.engine.transformers.engine import TransformersEngine
from agentd.learn.encoded import Encoded
from tests.support.engine_samples import CHOICES, REVIEWS, review
from tools import tiny_model


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def shared_engine(dtype: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TransformersEngine]:
    folder = tmp_path_factory.mktemp(dtype)
    engine = TransformersEngine(
        tiny_model.write(folder / "tiny.gguf"),
        folder=folder / "weights",
        key="0" * 20,
        revisions=folder / "revisions",
        context=512,
        slots=2,
        dtype=dtype,
    )
    yield engine
    engine.close()


@pytest.fixture
def engine(shared_engine: TransformersEngine) -> Iterator[TransformersEngine]:
    yield shared_engine
    shared_engine.swap(BASE)
    for weights in shared_engine.stats()["staged"]:
        shared_engine.unstage(weights)


@pytest.fixture
def background(engine: TransformersEngine) -> Iterator[TransformersBackground]:
    opened = engine.background(lambda: False)
    yield opened
    opened.close()


@pytest.fixture
def examples(background: TransformersBackground) -> list[Encoded]:
    return [background.encode(review(text), CHOICES, label) for text, label in REVIEWS]
