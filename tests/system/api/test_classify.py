"""POST /v1/classify in a real daemon: every way to send an input, every way to send a wrong one, and feedback."""

import atexit
import base64
import functools
import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.support.daemon import shared
from tests.support.int8_samples import CLASSES, classifier, images, png
from tools.daemon import Answer, DaemonProcess

BYTES = {"content-type": "application/octet-stream"}
QUERY = "/v1/classify?shape=1,12,12&dtype=uint8"


@functools.cache
def started() -> DaemonProcess:
    daemon = DaemonProcess(classifier(), {"engine": "int8", "tasks": None})
    atexit.register(daemon.close)
    return daemon.start()


@pytest.fixture(scope="module")
def daemon() -> DaemonProcess:
    return started()


@pytest.fixture(scope="module")
def image() -> Tensor:
    return images(1, 21)[0][0]


def send(daemon: DaemonProcess, image: Tensor, query: str = QUERY) -> Answer:
    return daemon.post(query, image.numpy().tobytes(), headers=BYTES)


def test_bytes_lists_and_a_png_get_the_same_answer(daemon: DaemonProcess, image: Tensor) -> None:
    plain = daemon.post("/v1/classify", {"input": image.tolist()}).json
    named = {"Agentd-Shape": "1,12,12", "Agentd-Dtype": "uint8"}
    floats = struct.pack("<144f", *image.flatten().tolist())
    others = [
        send(daemon, image),
        daemon.post("/v1/classify", image.numpy().tobytes(), headers={**BYTES, **named}),
        daemon.post("/v1/classify?shape=1,12,12&dtype=float32", floats, headers=BYTES),
        daemon.post("/v1/classify", png(image), headers={"content-type": "image/png"}),
    ]
    assert [answer.status for answer in others] == [200] * 4
    assert plain["label"] in CLASSES
    assert list(plain["probabilities"]) == list(CLASSES)
    assert sum(plain["probabilities"].values()) == pytest.approx(1)
    assert plain["label"] == max(plain["probabilities"], key=plain["probabilities"].__getitem__)
    assert plain["agentd"] == {"revision": 0}
    for answer in others:
        assert answer.json["probabilities"] == plain["probabilities"]
    assert len({answer.json["id"] for answer in others} | {plain["id"]}) == 5


def test_most_bars_are_recognised(daemon: DaemonProcess) -> None:
    x, labels = images(40, 22)
    right = [send(daemon, one).json["label"] == CLASSES[label] for one, label in zip(x, labels.tolist(), strict=True)]
    assert sum(right) >= 36


def test_the_inference_is_recorded_with_its_input(daemon: DaemonProcess, image: Tensor) -> None:
    answer = send(daemon, image, QUERY + "&task=classify&model=default").json
    row = daemon.inference(answer["id"])
    assert (row["kind"], row["task"], row["revision"]) == ("classification", "classify", 0)
    assert row["output"] == answer["label"]
    assert row["params"] == {"probability": answer["probabilities"][answer["label"]]}
    assert row["input"]["array"]["shape"] == [1, 12, 12]


def test_a_label_becomes_an_example_of_the_classifier_s_task(daemon: DaemonProcess, image: Tensor) -> None:
    answer = send(daemon, image).json
    body = {"inference_id": answer["id"], "kind": "label", "value": "lower"}
    stored = daemon.post("/v1/feedback", body)
    assert stored.status == 201
    assert stored.json["task"] == "classify"
    (example,) = [
        row
        for row in daemon.get("/admin/examples?limit=1000", admin=True).json["examples"]
        if row["id"] == stored.json["example_id"]
    ]
    assert (example["target"], example["input"]) == ("lower", daemon.inference(answer["id"])["input"])
    wrong = daemon.post("/v1/feedback", {**body, "value": "sideways"})
    assert (wrong.status, wrong.error["code"]) == (400, "label_not_in_choices")
    assert "'top', 'upper', 'lower', 'bottom'" in wrong.error["message"]


def test_labelled_arrays_and_images_are_imported(daemon: DaemonProcess) -> None:
    x, labels = images(4, 23)
    lines = [
        {"input": image.tolist(), "label": CLASSES[label]} for image, label in zip(x, labels.tolist(), strict=True)
    ]
    lines.append({"task": "classify", "png": base64.b64encode(png(x[0])).decode(), "label": "top"})
    stored = daemon.post("/v1/examples", "\n".join(map(json.dumps, lines)).encode())
    assert (stored.status, stored.json["tasks"]) == (200, {"classify": 5})
    for line, message in (
        ({"text": "a bar", "label": "top"}, "have an input (nested lists of numbers) or a png"),
        ({"input": [1], "label": "top"}, "input[0] is no list"),
        ({"input": x[0].tolist(), "completion": "top"}, "learns from labels"),
        ({"input": x[0].tolist(), "label": "sideways"}, "not one of the choices"),
    ):
        refused = daemon.post("/v1/examples", json.dumps(line).encode())
        assert (refused.status, refused.error["code"]) == (400, "invalid_line")
        assert message in refused.error["message"]


def test_a_language_model_imports_no_arrays(model_path: Path, image: Tensor) -> None:
    line = {"input": image.tolist(), "label": "top"}
    refused = shared(model_path).post("/v1/examples", json.dumps(line).encode())
    assert (refused.status, refused.error["code"]) == (400, "invalid_line")
    assert "for a classifier" in refused.error["message"]


WRONG: list[tuple[str, Any, dict[str, str], str | None, str]] = [
    ("/v1/classify", {}, {}, "input", "input: Field required"),
    ("/v1/classify", {"input": [1, 2]}, {}, "input", "input has 2 entries, and 1 are needed"),
    ("/v1/classify", {"input": [[[0] * 12] * 11]}, {}, "input", "input[0] has 11 entries, and 12 are needed"),
    ("/v1/classify", {"input": [[[0] * 12] * 11 + [7]]}, {}, "input", "input[0][11] is no list"),
    ("/v1/classify", {"input": [[[0] * 12] * 11 + [[0] * 11 + ["1"]]]}, {}, "input", "input[0][11][11] is no number"),
    ("/v1/classify", {"input": [[[0] * 12] * 11 + [[0] * 11 + [True]]]}, {}, "input", "is no number"),
    ("/v1/classify", {"input": [[[1e300] * 12] * 12]}, {}, "input", "too large for float32"),
    ("/v1/classify", b'{"input": [NaN]}', {}, None, "NaN is not a number that JSON has"),
    ("/v1/classify", {"input": [], "labels": 1}, {}, "labels", "unknown field"),
    ("/v1/classify", {"input": [[[0] * 12] * 12], "model": "gpt"}, {}, "model", "there is no model 'gpt'"),
    ("/v1/classify?format=raw", b"", BYTES, "format", "unknown query parameter"),
    ("/v1/classify", bytes(144), BYTES, "shape", "?shape=1,12,12&dtype=uint8"),
    ("/v1/classify?shape=1,12,12", bytes(144), BYTES, "dtype", "need a shape and a dtype"),
    (
        "/v1/classify?shape=12,12&dtype=uint8",
        bytes(144),
        BYTES,
        "shape",
        "has shape 12,12, and the model takes 1,12,12",
    ),
    ("/v1/classify?shape=1,12,12&dtype=uint128", bytes(144), BYTES, "dtype", "dtype is one of uint8"),
    ("/v1/classify?shape=1,12,12&dtype=float32", bytes(144), BYTES, "input", "144 bytes, and 576 are needed"),
    (QUERY, b"", BYTES, "input", "0 bytes, and 144 are needed"),
    (
        "/v1/classify?shape=1,12,12&dtype=float32",
        struct.pack("<144f", *[0.0] * 143, float("nan")),
        BYTES,
        "input",
        "NaN or infinite",
    ),
    ("/v1/classify", b"GIF89a", {"content-type": "image/png"}, "input", "no PNG image"),
    ("/v1/classify", png(torch.zeros(1, 10, 12, dtype=torch.uint8)), {"content-type": "image/png"}, "input", "12 x 10"),
    ("/v1/classify", b"x", {"content-type": "image/jpeg"}, "Content-Type", "not 'image/jpeg'"),
]


@pytest.mark.parametrize(("path", "body", "headers", "param", "message"), WRONG)
def test_a_wrong_input_is_refused(
    daemon: DaemonProcess, path: str, body: Any, headers: dict[str, str], param: str | None, message: str
) -> None:
    before = daemon.counts()
    answer = daemon.post(path, body, headers=headers)
    assert answer.status in (400, 404), answer.body
    assert message in answer.error["message"]
    assert answer.error["param"] == param
    assert daemon.counts() == before


def test_a_body_that_is_too_large_is_refused(daemon: DaemonProcess) -> None:
    answer = daemon.post(QUERY, bytes(2**20 + 1), headers=BYTES)
    assert (answer.status, answer.error["code"]) == (413, "body_too_large")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "stream": True}),
        ("/v1/completions", {"prompt": "Hi"}),
    ],
)
def test_a_classifier_does_not_chat(daemon: DaemonProcess, path: str, body: dict[str, Any]) -> None:
    answer = daemon.post(path, body)
    assert (answer.status, answer.error["code"]) == (400, "not_a_language_model")
    assert "POST /v1/classify" in answer.error["message"]


def test_a_language_model_does_not_classify(model_path: Path, image: Tensor) -> None:
    answer = send(shared(model_path), image)
    assert (answer.status, answer.error["code"]) == (400, "not_a_classifier")
    assert "engine: int8" in answer.error["message"]


def test_status_models_and_budget_describe_a_classifier(daemon: DaemonProcess) -> None:
    model = daemon.status()["model"]
    assert (model["architecture"], model["n_layer"], model["classes"]) == ("bars", 3, list(CLASSES))
    assert daemon.get("/v1/models").json["data"][0]["id"] == classifier().stem
    answer = daemon.get("/admin/budget", admin=True)
    assert (answer.status, answer.error["code"]) == (400, "not_a_language_model")


def test_the_daemon_itself_has_neither_torch_nor_numpy(daemon: DaemonProcess) -> None:
    mapped = Path(f"/proc/{daemon.pid}/maps").read_text()
    assert "_sqlite3" in mapped  # the file says what is loaded
    assert "torch" not in mapped
    assert "numpy" not in mapped


def test_wrong_files_and_tasks_are_refused_at_the_start(model_path: Path, tmp_path: Path) -> None:
    with DaemonProcess(classifier(), {"tasks": None}) as daemon:
        status, log = daemon.run_to_end()
        assert (status, "engine int8 does" in log) == (66, True), log
        daemon.configure(model_path, {"engine": "int8", "tasks": None})
        status, log = daemon.run_to_end()
        assert (status, "no safetensors file" in log) == (66, True), log
        daemon.configure(classifier(), {"engine": "int8", "tasks": {"reviews": {"choices": ["top", "dull"]}}})
        status, log = daemon.run_to_end()
        assert (status, "choices among its classes: top, upper, lower, bottom" in log) == (78, True), log
        tree = json.dumps({"__metadata__": {"format": "pt"}}).encode()
        (tmp_path / "float.safetensors").write_bytes(struct.pack("<Q", len(tree)) + tree)
        daemon.configure(tmp_path / "float.safetensors", {"engine": "int8", "tasks": None})
        status, log = daemon.run_to_end()
        assert (status, "python -m agentd.engine.int8.quantise" in log) == (66, True), log
