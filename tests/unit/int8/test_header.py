"""A classifier's header: what it says, and every way in which a file is no classifier."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from agentd.errors import ModelUnusable
from agentd.formats.safetensors_header import is_safetensors
from agentd.int8.header import parse, read_classifier
from tests.support.int8_samples import BARS, CLASSES, classifier


def metadata() -> dict[str, str]:
    data = classifier().read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    entries: dict[str, str] = json.loads(data[8 : 8 + length])["__metadata__"]
    return entries


def test_the_header_says_what_the_file_holds() -> None:
    header = read_classifier(classifier())
    assert header.network == BARS
    assert header.classes == CLASSES
    assert (header.exponent, header.mean, header.scale) == (-7, 127.5, 127.5)
    assert header.architecture == "bars"
    assert parse({**metadata(), **header.metadata()}) == header
    assert is_safetensors(classifier())


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"format": "pt"}, "no format agentd-int8"),
        ({"classes": '["a", "b"]'}, "tells 4 classes apart, and 2"),
        ({"classes": '["a", "b", "c", "c"]'}, "tells 4 classes apart, and 3"),
        ({"classes": '["a", "b", "c", ""]'}, "not a list of names"),
        ({"classes": "["}, "damaged"),
        ({"architecture": "[]"}, "damaged"),
        ({"architecture": '{"layers": []}'}, "input must be a list"),
        ({"input": '{"exponent": -7, "mean": 0}'}, "no scale"),
        ({"input": '{"exponent": -7, "mean": 0, "scale": 0}'}, "scale above 0"),
        ({"input": '{"exponent": 0.5, "mean": 0, "scale": 1}'}, "whole exponent"),
        ({"input": '{"exponent": -7, "mean": NaN, "scale": 1}'}, "finite mean"),
    ],
)
def test_wrong_metadata_is_named(changed: dict[str, str], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        parse({**metadata(), **changed})


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (lambda data: data[:4], "no safetensors file, or cut short"),
        (lambda data: b"GGUF" + data[4:], "no safetensors file, or cut short"),
        (lambda data: data[:50], "no safetensors file, or cut short"),
        (lambda data: data[:-7], "7 of .* bytes are missing"),
        (lambda data: data[:8] + b"x" + data[9:], "header is not JSON"),
        (lambda data: struct.pack("<Q", 2) + b"[]", "no table of tensors"),
        (lambda data: struct.pack("<Q", 14) + b'{"a": "tensor"', "header is not JSON"),
        (lambda data: struct.pack("<Q", 15) + b'{"a": "tensor"}', "no table of tensors"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, damage: Any, complaint: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(damage(classifier().read_bytes()))
    with pytest.raises(ModelUnusable, match=complaint):
        read_classifier(path)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelUnusable, match="No such file"):
        read_classifier(tmp_path / "nothing")
    assert not is_safetensors(tmp_path / "nothing")
