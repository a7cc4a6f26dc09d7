"""python -m agentd.engine.int8.quantise: float weights in, a classifier out, and mistakes named."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from agentd.engine.int8 import quantise
from agentd.engine.int8.engine import Int8Engine
from tests.support.int8_samples import BARS, CLASSES, array, classifier, float_weights, images


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Arguments that work, with the architecture in a YAML file."""
    (tmp_path / "bars.yaml").write_text(yaml.safe_dump(BARS.as_dict()))
    np.save(tmp_path / "calibration.npy", images(128, 7)[0].numpy())
    arguments = [float_weights(), "--architecture", tmp_path / "bars.yaml", "--output", tmp_path / "out.safetensors"]
    arguments += ["--calibration", tmp_path / "calibration.npy", "--mean", 127.5, "--scale", 127.5]
    return list(map(str, arguments))


def test_the_file_is_a_classifier(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert quantise.main([*files, "--classes", ", ".join(CLASSES)]) == 0
    assert f"bars, {BARS.size} parameters" in capsys.readouterr().out
    assert (tmp_path / "out.safetensors").read_bytes() == classifier().read_bytes()


def test_classes_are_numbered_where_they_have_no_names(files: list[str], tmp_path: Path) -> None:
    assert quantise.main(files) == 0
    engine = Int8Engine(tmp_path / "out.safetensors")
    assert engine.info.classes == ("0", "1", "2", "3")
    assert len(engine.classify(array(images(1, 1)[0][0])).probabilities) == 4


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        (["--classes", "a,b"], "tells 4 classes apart, and 2"),
        (["--architecture", "lenet5"], "(n, 1, 28, 28) is needed"),
        (["--architecture", "nothing.yaml"], "No such file"),
        (["--calibration", "nothing.npy"], "No such file"),
        (["--scale", "0"], "NaN or infinite"),
        (["--scale", "-1"], "scale above 0"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], changed: list[str], complaint: str
) -> None:
    assert quantise.main([*files, *changed]) == 1
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()


def test_another_network_s_weights_are_named(
    files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tree = BARS.as_dict()
    layers = json.loads(json.dumps(tree["layers"]))
    layers[-3]["linear"]["out"] = 17
    (tmp_path / "bars.yaml").write_text(yaml.safe_dump({**tree, "layers": layers}))
    assert quantise.main(files) == 1
    assert "fc1.weight has shape (16, 144) instead of (17, 144)" in capsys.readouterr().err
