"""The int8 engine alone: what it answers, what it refuses, and revisions staged, swapped and taken back."""

import base64
from pathlib import Path
from typing import Any

import pytest
import torch

from agentd.engine.int8.engine import Int8Engine
from agentd.engine.protocol import Classifier
from agentd.errors import InvalidRequest, ModelUnusable, NotALanguageModel, RevisionCorrupt
from agentd.int8.tensor import dequantise
from agentd.int8.weights import load_int8, save_int8
from tests.support.engine_samples import chat
from tests.support.int8_samples import BARS, CLASSES, array, classifier, images, png


@pytest.fixture
def engine() -> Int8Engine:
    return Int8Engine(classifier())


def test_it_recognises_bars(engine: Int8Engine) -> None:
    assert isinstance(engine, Classifier)
    assert engine.info.classes == CLASSES
    assert engine.info.input_shape == (1, 12, 12)
    assert engine.info.n_params == BARS.size
    x, labels = images(100, 1)
    answers = [engine.classify(array(image)) for image in x]
    assert all(abs(sum(answer.probabilities) - 1) < 1e-9 for answer in answers)
    assert {answer.revision for answer in answers} == {0}
    right = [max(range(4), key=a.probabilities.__getitem__) == label for a, label in zip(answers, labels, strict=True)]
    assert sum(right) >= 95


def test_the_answer_is_the_network_s_softmax(engine: Int8Engine) -> None:
    x, _ = images(1, 2)
    network = load_int8(classifier())
    logits, _ = network.forward(engine.model.quantised(x.double()))
    expected = torch.softmax(dequantise(logits).double(), 1)[0].tolist()
    assert engine.classify(array(x[0])).probabilities == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("dtype", ["int16", "int32", "int64", "float16", "float32", "float64"])
def test_the_same_values_in_another_dtype_get_the_same_answer(engine: Int8Engine, dtype: str) -> None:
    image = images(1, 3)[0][0]
    assert engine.classify(array(image, dtype)) == engine.classify(array(image))


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P"])
def test_a_png_is_the_array_of_its_pixels(engine: Int8Engine, mode: str) -> None:
    image = images(1, 4)[0][0]
    assert engine.classify({"png": base64.b64encode(png(image, mode)).decode()}) == engine.classify(array(image))


def _with(**changed: Any) -> dict[str, Any]:
    whole = array(images(1, 5)[0][0])
    return {"array": {**whole["array"], **changed}}


def _png(image: torch.Tensor, mode: str = "L") -> dict[str, Any]:
    return {"png": base64.b64encode(png(image, mode)).decode()}


@pytest.mark.parametrize(
    ("input", "complaint"),
    [
        (_with(shape=[12, 12]), r"has shape \[12, 12\], and the model takes \[1, 12, 12\]"),
        (_with(dtype="complex64"), "dtype is one of uint8"),
        (_with(data="AAAA"), "has 3 bytes, and 144 are needed"),
        (_with(data="?"), "not base64"),
        (array(torch.full((1, 12, 12), torch.nan), "float32"), "NaN or infinite"),
        (array(torch.full((1, 12, 12), torch.inf), "float64"), "NaN or infinite"),
        ({"png": base64.b64encode(b"\x89PNG\r\n").decode()}, "no PNG image"),
        ({"png": base64.b64encode(png(images(1, 5)[0][0])[:80]).decode()}, "no PNG image"),
        (_png(torch.zeros(1, 12, 13, dtype=torch.uint8)), "is 13 x 12 pixels, and the model takes 12 x 12"),
        (_png(images(1, 5)[0][0], "I;16"), "more than 8 bits"),
        ({"messages": []}, "takes an array or a PNG image"),
    ],
)
def test_what_does_not_fit_is_refused(engine: Int8Engine, input: dict[str, Any], complaint: str) -> None:
    with pytest.raises(InvalidRequest, match=complaint):
        engine.classify(input)


def test_language_models_requests_are_refused(engine: Int8Engine) -> None:
    with pytest.raises(NotALanguageModel, match="is a classifier"):
        engine.submit(chat("a", "hello"))
    with pytest.raises(NotALanguageModel):
        engine.background(lambda: False)
    assert not engine.busy
    assert engine.step() == []


def _changed(path: Path, engine: Int8Engine) -> Path:
    network = engine.model.network.copy()
    network.parameters[-1].mantissa.copy_(torch.tensor([-127, -127, 127, -127], dtype=torch.int8))
    engine.model.save(network, path)
    return path


def test_a_swap_changes_the_answers_and_back(engine: Int8Engine, tmp_path: Path) -> None:
    image = array(images(1, 6)[0][0])
    before = engine.classify(image)
    engine.stage("3", _changed(tmp_path / "network.safetensors", engine), None)
    assert engine.classify(image) == before
    assert engine.swap("3") < 0.1
    after = engine.classify(image)
    assert after.revision == 3
    assert after.probabilities[2] > before.probabilities[2]
    engine.unstage("3")  # it serves, so it stays
    assert engine.classify(image) == after
    engine.swap("0")
    assert engine.classify(image) == before
    engine.unstage("3")
    assert engine.stats()["staged"] == ["0"]
    with pytest.raises(RevisionCorrupt, match="not staged"):
        engine.swap("3")


def test_a_network_that_is_damaged_or_another_is_not_staged(engine: Int8Engine, tmp_path: Path) -> None:
    path = _changed(tmp_path / "network.safetensors", engine)
    whole = path.read_bytes()
    path.write_bytes(whole[:-10])
    with pytest.raises(RevisionCorrupt, match="cut short: 10 of"):
        engine.stage("1", path, None)
    about = {**engine.model.header.metadata(), "classes": '["a", "b", "c", "d"]'}
    save_int8(engine.model.network, path, about)
    with pytest.raises(RevisionCorrupt, match="another kind"):
        engine.stage("1", path, None)
    with pytest.raises(RevisionCorrupt, match="No such file"):
        engine.stage("1", tmp_path / "nothing", None)
    assert engine.stats()["staged"] == ["0"]


def test_a_mantissa_that_must_not_be_is_noticed(tmp_path: Path) -> None:
    data = bytearray(classifier().read_bytes())
    data[-1] = 0x80
    path = tmp_path / "bars.safetensors"
    path.write_bytes(data)
    with pytest.raises(ModelUnusable, match="mantissa -128"):
        Int8Engine(path)
