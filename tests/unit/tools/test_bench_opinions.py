"""Opinions of every kind are taken by a daemon as what they are, and a pass is made of them."""

import argparse
import random
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny_passes import Learner
from tools import reviews, tiny_model
from tools.bench import opinions
from tools.bench.opinions import KINDS, SENTENCE, learned, line

ROW = {"text": "A fine film.", "label": "yes"}


def drawn(kind: str, n: int = 200) -> list[dict[str, Any]]:
    draw = random.Random(0)
    return [line(kind, ROW, draw) for _ in range(n)]


def test_a_pair_prefers_what_is_right() -> None:
    (pair,) = drawn("preference", 1)
    assert (pair["chosen"], pair["rejected"]) == (SENTENCE["yes"], SENTENCE["no"])


def test_thumbs_and_scores_are_on_either_sentence() -> None:
    thumbs, scores = drawn("thumb"), drawn("score")
    assert {(each["completion"], each["label"]) for each in thumbs} == {
        (SENTENCE["yes"], True),
        (SENTENCE["no"], False),
    }
    assert all((each["score"] >= 0.5) == (each["completion"] == SENTENCE["yes"]) for each in scores)
    assert 60 < sum(each["label"] for each in thumbs) < 140


@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_is_made_of_them(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opinions, "DaemonProcess", Learner)
    short = [{**row, "text": row["text"][:60]} for row in reviews.liked("train")]
    monkeypatch.setattr(reviews, "liked", lambda split: short)
    model = tiny_model.write(tmp_path / "tiny.gguf", blocks=2)
    row = learned(kind, argparse.Namespace(model=model, seed=0, examples=150, judged=4, method="suffix-bp"))
    assert row["outcome"] in ("committed", "rejected"), row
    assert row["method"].startswith("suffix-bp")
    assert row["seconds"] > 0
