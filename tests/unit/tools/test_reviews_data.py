from collections import Counter
from pathlib import Path

from tools import extract_reviews, reviews

ROWS = reviews.rows()


def test_the_extract_is_split_and_balanced() -> None:
    assert [row["split"] for row in ROWS] == ["train"] * 1100 + ["heldout"] * 400
    assert Counter((row["split"], row["label"]) for row in ROWS) == {
        ("train", "positive"): 550,
        ("train", "negative"): 550,
        ("heldout", "positive"): 200,
        ("heldout", "negative"): 200,
    }


def test_no_snippet_appears_twice() -> None:
    assert len({row["text"].lower() for row in ROWS}) == len({row["id"] for row in ROWS}) == 1500


def test_rows_have_the_label_of_their_rating() -> None:
    for row in ROWS:
        assert row.keys() == {"id", "text", "label", "rating", "split"}
        assert row["text"].strip() == row["text"] != ""
        assert abs(row["rating"]) >= 1
        assert row["label"] == ("positive" if row["rating"] > 0 else "negative")


def test_the_licence_comes_with_the_data() -> None:
    notice = Path(reviews.FILE).with_name("NOTICE").read_text()
    assert "Copyright (c) 2016 C.J. Hutto" in notice
    assert "The MIT License" in notice


def test_extraction_takes_the_same_rows_in_any_order() -> None:
    lines = [f"{n}\t{(n % 7 - 3) * 0.7}\tsnippet number {n}" for n in range(1, 4000)]
    rows = extract_reviews.extract("\n".join(lines))
    assert rows == extract_reviews.extract("\n".join(reversed(lines)))
    assert len(rows) == 1500
    assert [row["split"] for row in rows].count("heldout") == 400
