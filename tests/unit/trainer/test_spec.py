"""The specification is checked as a whole, and every mistake is named."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from agentd.learn.encoded import Encoded
from agentd.trainer.batches import Batch, Example, Layout, batches
from agentd.trainer.spec import InvalidSpec, parse_spec
from agentd.trainer.tap_file import TapFile

ENCODED = Encoded.of([[3, 4, 5, 6, 7]], [[(0, 4, 7)], [(0, 4, 8)]], 1, [(0, 4, 8)])
FORKED = Encoded.of([[3, 4, 5, 6, 7], [3, 4, 5, 8]], [[(0, 4, 7)], [(1, 3, 9)]], 1, [(1, 3, 9)])


@pytest.fixture
def good(tmp_path: Path) -> dict[str, Any]:
    lines = [asdict(ENCODED), {"error": "too long"}, asdict(FORKED)]
    (tmp_path / "encoded.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return {
        "model": "/m.gguf",
        "first_block": 29,
        "end_block": 30,
        "tap": "/t.f32",
        "encoded": str(tmp_path / "encoded.jsonl"),
        "prefix": 2,
        "train": [2],
        "dev": [0],
        "starts": [5, 2],
        "output": "/o.gguf",
    }


def test_a_specification_is_read_with_its_defaults_and_examples(good: dict[str, Any]) -> None:
    spec = parse_spec(good)
    assert spec.examples == (Example(2, FORKED, False), Example(0, ENCODED, True))
    assert spec.examples[0].encoded.sequences == [[3, 4, 5, 6, 7], [3, 4, 5, 8]]
    assert (spec.options.rank, spec.options.alpha, spec.initial, spec.control) == (8, 16.0, None, None)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"end_block": 29}, "end_block (29) is not above first_block (29)"),
        ({"first_block": True}, "first_block must be a whole number"),
        ({"output": ""}, "output must be a path"),
        ({"surprise": 1}, "surprise is unknown"),
        ({"examples": []}, "examples is unknown"),
        ({"tap": 3}, "tap must be a path"),
        ({"prefix": -1}, "prefix must be a whole number from 0, not -1"),
        ({"train": [1.5]}, "train must be a list of whole numbers"),
        ({"train": []}, "nothing to train on"),
        ({"train": [2, 7], "starts": [5, 9, 2]}, "example 7 is not there"),
        ({"train": [1]}, "example 1 is none"),
        ({"prefix": 4}, "begins with 3 shared tokens, and the prefix has 4"),
        ({"starts": [5]}, "starts has 1 rows for 2 examples"),
        ({"states": "found"}, "states must be one of tapped, computed, asked"),
        ({"states": "computed", "first_block": 0}, "there is no trunk"),
        ({"encoded": "/none"}, "/none: No such file"),
        ({"options": {"lr": -1}}, "options.lr must be a number above 0, not -1"),
        ({"options": {"lr": float("inf")}}, "options.lr must be a number"),
        ({"options": {"batch": 0}}, "options.batch must be a whole number from 1, not 0"),
        ({"options": {"rate": 1}}, "options.rate is unknown"),
        ({"options": {"checkpoint": 1}}, "options.checkpoint must be true or false"),
        ({"options": 3}, "options must be an object"),
    ],
)
def test_a_mistake_is_named(good: dict[str, Any], changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        parse_spec({**good, **changes})
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"correct": 2}, "choice 2 is right, and there are 2"),
        ({"target": []}, "nothing that could be scored"),
        ({"target": [(0, 5, 1)]}, "position 5 of sequence 0"),
        ({"target": [(2, 4, 1)]}, "position 4 of sequence 2"),
        ({"target": [(0, 4)]}, "example 2 is none"),
        ({"own": []}, "nothing that could be scored"),
    ],
)
def test_a_mistake_in_an_example_is_named(good: dict[str, Any], changes: dict[str, Any], said: str) -> None:
    changed = replace(FORKED, **changes)
    Path(good["encoded"]).write_text("\n".join(json.dumps(asdict(each)) for each in (ENCODED, ENCODED, changed)))
    with pytest.raises(InvalidSpec) as caught:
        parse_spec(good)
    assert said in str(caught.value)


def test_all_mistakes_come_at_once(good: dict[str, Any]) -> None:
    with pytest.raises(InvalidSpec) as caught:
        parse_spec({**good, "model": 1, "prefix": -1, "options": {"batch": 0}})
    assert len(caught.value.problems) == 3


@pytest.mark.parametrize("together", [True, False])
def test_rows_of_the_tap_are_where_the_terms_say(together: bool, tmp_path: Path) -> None:
    examples = [Example(7, FORKED), Example(1, ENCODED), Example(3, FORKED)]
    layout = Layout.in_order(examples, 2)
    assert layout.starts == {7: 2, 1: 6, 3: 9}
    # A row is the example it belongs to (0 for the prefix) and the token.
    rows = [(0, 3), (0, 4)]
    for example in examples:
        tokens = [*example.encoded.shared[2:], *(token for own in example.encoded.own for token in own)]
        rows += [(example.number, token) for token in tokens]
    np.array(rows, np.float32).tofile(tmp_path / "t.f32")
    tap = TapFile(tmp_path / "t.f32", 2, layout, writable=True)
    tap.check(examples)
    batch = Batch(examples, 2, together)
    inputs = tap.inputs(batch)
    assert inputs.shape[:2] == batch.shape == ((1, 13) if together else (5, 5))
    at = iter(batch.rows)
    for example in examples:
        for sequence, position, _ in example.terms:
            owner, token = inputs.flatten(0, 1)[next(at)].tolist()
            assert (owner, token) == (example.number, example.encoded.sequences[sequence][position])
    tap.replace(batch, inputs + 1)
    tap.replace_prefix(inputs[0, :2] + 1)
    assert torch.equal(tap.inputs(batch)[0], inputs[0] + 1)
    if batch.tree is not None:
        positions, sees = batch.tree.positions[0].tolist(), batch.tree.sees
        assert positions == [0, 1, 2, 3, 4, 3, 2, 3, 4, 2, 3, 4, 3]
        assert sees[4].tolist() == [True] * 5 + [False] * 8  # its own answer and its text
        assert sees[5].tolist() == [True] * 3 + [False, False, True] + [False] * 7


def test_a_tap_of_the_wrong_size_is_refused(tmp_path: Path) -> None:
    path, example = tmp_path / "t.f32", Example(0, ENCODED)
    layout = Layout(2, {0: 2})
    path.write_bytes(bytes(4 * 4 * 4))
    with pytest.raises(InvalidSpec, match="needs rows up to 5, and there are 4"):
        TapFile(path, 4, layout).check([example])
    path.write_bytes(bytes(70))
    with pytest.raises(InvalidSpec, match="not a number of rows"):
        TapFile(path, 4, layout)
    path.write_bytes(b"")
    with pytest.raises(InvalidSpec, match="not a number of rows"):
        TapFile(path, 4, layout)


def test_micro_batches_hold_similar_lengths_and_few_tokens() -> None:
    def example(n: int) -> Example:
        return Example(n, Encoded.of([[0] * n], [], 0, [(0, n - 1, 1)]))

    examples = [example(n) for n in (11, 5, 10, 6, 32)]
    parts = [[each.number for each in batch.examples] for batch in batches(examples, 2, 20, together=True)]
    assert parts == [[5, 6, 10], [11], [32]]
    apart = [[each.number for each in batch.examples] for batch in batches(examples, 2, 20, together=False)]
    assert apart == [[5, 6], [10], [11], [32]]
