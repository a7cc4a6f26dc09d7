"""Movie-review snippets with a label: tools/data/movie_reviews.jsonl, which tools/extract_reviews.py makes."""

import json
from pathlib import Path
from typing import Any

FILE = Path(__file__).resolve().parent / "data" / "movie_reviews.jsonl"


def rows(split: str | None = None) -> list[dict[str, Any]]:
    """{"text", "label": positive | negative, "split", …} of `train` or `heldout`; without `split`, all."""
    reviews = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]
    return [row for row in reviews if split in (None, row["split"])]


def liked(split: str) -> list[dict[str, Any]]:
    """The same as {"text", "label": yes | no}: the task `reviews` of configs/reviews.yaml."""
    return [{"text": row["text"], "label": "yes" if row["label"] == "positive" else "no"} for row in rows(split)]
