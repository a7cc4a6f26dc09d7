"""The specification is checked as a whole, and every mistake is named."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from agentd.trainer.spec import InvalidSpec, Rows, Term, parse_spec
from agentd.trainer.tap import Tap, batches

GOOD: dict[str, Any] = {
    "model": "/m.gguf",
    "first_block": 29,
    "end_block": 30,
    "tap": {"path": "/t.f32", "n_embd": 4},
    "prefix": {"offset": 0, "n": 2},
    "examples": [
        {
            "id": "a",
            "dev": False,
            "task": "t",
            "sequences": [{"offset": 2, "n": 3}],
            "choices": [[[0, 4, 7]], [[0, 4, 8]]],
            "correct": 1,
            "target": [[0, 4, 8]],
        }
    ],
    "output": "/o.gguf",
}


def test_a_specification_is_read_with_its_defaults() -> None:
    spec = parse_spec(GOOD)
    assert spec.examples[0].sequences == (Rows(2, 3),)
    assert spec.examples[0].choices[1] == (Term(0, 4, 8),)
    assert (spec.train.rank, spec.train.alpha, spec.initial, spec.control) == (8, 16.0, None, None)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("end_block", 29, "end_block (29) is not above first_block (29)"),
        ("first_block", True, "first_block must be a whole number"),
        ("output", "", "output must be a path"),
        ("surprise", 1, "surprise is unknown"),
        ("tap.n_embd", 0, "tap.n_embd must be a whole number from 1"),
        ("train", {"lr": -1}, "train.lr must be a positive number"),
        ("train", {"lr": float("inf")}, "train.lr must be a positive number"),
        ("train", {"rate": 1}, "train.rate is unknown"),
        ("train", {"checkpoint": 1}, "train.checkpoint must be true or false"),
        ("examples", [], "at least one example"),
        ("examples.0.dev", True, "nothing to train on"),
        ("examples.0.correct", 2, "correct is 2, and there are 2 choices"),
        ("examples.0.choices", [[[0, 4, 7]]], "at least two choices"),
        ("examples.0.target", [], "examples[0].target must be a list"),
        ("examples.0.target", [[0, 5, 1]], "position 5 is beyond the sequence's 5 tokens"),
        ("examples.0.target", [[1, 4, 1]], "there is no sequence 1"),
        ("examples.0.target", [[0, 4]], "must be [sequence, position, token]"),
        ("examples.0.sequences", [{"offset": 2}], "sequences[0].n is missing"),
    ],
)
def test_a_mistake_is_named(path: str, value: Any, said: str) -> None:
    data = copy.deepcopy(GOOD)
    *way, last = path.split(".")
    place: Any = data
    for key in way:
        place = place[int(key) if key.isdigit() else key]
    place[last] = value
    with pytest.raises(InvalidSpec) as caught:
        parse_spec(data)
    assert said in str(caught.value)


def test_all_mistakes_come_at_once() -> None:
    with pytest.raises(InvalidSpec) as caught:
        parse_spec({**GOOD, "model": 1, "prefix": {"offset": -1, "n": 2}, "train": {"batch": 0}})
    assert len(caught.value.problems) == 3


def test_the_tap_reads_rows_and_pads_them(tmp_path: Path) -> None:
    rows = np.arange(9 * 4, dtype=np.float32).reshape(9, 4)
    (tmp_path / "t.f32").write_bytes(rows.tobytes())
    example = {**GOOD["examples"][0], "sequences": [{"offset": 2, "n": 3}, {"offset": 7, "n": 2}]}
    spec = parse_spec({**GOOD, "examples": [example]})
    tap = Tap(tmp_path / "t.f32", 4, spec.prefix)
    tap.check(spec.examples)
    assert np.array_equal(tap.prefix()[0].numpy(), rows[:2])
    (batch,) = batches(spec.examples, 2, 100, shared=True)
    inputs = tap.inputs(batch).numpy()
    assert np.array_equal(inputs[0], rows[2:5])
    assert np.array_equal(inputs[1], np.concatenate([rows[7:9], np.zeros((1, 4))]))


def test_a_tap_of_the_wrong_size_is_refused(tmp_path: Path) -> None:
    path, spec = tmp_path / "t.f32", parse_spec(GOOD)
    path.write_bytes(bytes(4 * 4 * 4))
    with pytest.raises(InvalidSpec, match="needs rows up to 5, and there are 4"):
        Tap(path, 4, spec.prefix).check(spec.examples)
    path.write_bytes(bytes(70))
    with pytest.raises(InvalidSpec, match="not a number of rows"):
        Tap(path, 4, spec.prefix)
    path.write_bytes(b"")
    with pytest.raises(InvalidSpec, match="not a number of rows"):
        Tap(path, 4, spec.prefix)


def test_micro_batches_hold_similar_lengths_and_few_tokens() -> None:
    examples = [{**GOOD["examples"][0], "id": str(n), "sequences": [{"offset": 0, "n": n}]} for n in (9, 3, 8, 4, 30)]
    spec = parse_spec({**GOOD, "examples": examples})
    parts = [[example.id for example in batch.examples] for batch in batches(spec.examples, 2, 20, shared=True)]
    assert parts == [["3", "4"], ["8", "9"], ["30"]]
    apart = [[example.id for example in batch.examples] for batch in batches(spec.examples, 8, 20, shared=False)]
    assert apart == [["3"], ["4"], ["8"], ["9"], ["30"]]
