"""The tasks of the benchmark `elastic`: texts with one of two answers, split into train, tune and heldout rows."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from tools.reviews import rows

TRAIN, JUDGED = 512, 300


@dataclass(frozen=True)
class Task:
    """`train` rows to learn from, `judged` rows that nothing is learned from: (prompt, index of the right answer).

    Answers are single tokens after a raw prompt, as in the prototype whose figures the design quotes.
    """

    name: str
    answers: tuple[str, str]
    train: list[tuple[str, int]]
    judged: list[tuple[str, int]]

    def examples(self) -> list[dict[str, object]]:
        """Train rows, then judged rows, as an engine's session reads them."""
        return [
            {"input": {"prompt": prompt}, "choices": list(self.answers), "target": self.answers[right]}
            for prompt, right in (*self.train, *self.judged)
        ]


def reviews(judge: str) -> Task:
    """Movie-review snippets; `judge` is heldout, or tune: training rows that are not trained on."""
    splits = {
        split: [(f"{row['text']} It was", int(row["label"] == "positive")) for row in rows(split)]
        for split in ("train", "heldout")
    }
    judged = splits["heldout"] if judge == "heldout" else splits["train"][TRAIN:]
    return Task("reviews", (" terrible", " great"), splits["train"][:TRAIN], judged[:JUDGED])


def sarcasm(judge: str, source: Path) -> Task:
    """Headlines, sarcastic or not: `sarcasm/samples.jsonl` of the source distribution of evals 3.0.1.post1."""
    labels = {}
    for line in source.read_text().splitlines():
        tree = json.loads(line)
        labels[tree["input"][-1]["content"]] = int(tree["ideal"])
    rows = sorted(labels.items(), key=lambda row: hashlib.sha256(row[0].encode()).digest())
    prompts = [(f"Headline: {text}\nIs this headline sarcastic? Answer:", right) for text, right in rows]
    begin = TRAIN if judge == "tune" else TRAIN + JUDGED
    return Task("sarcasm", (" no", " yes"), prompts[:TRAIN], prompts[begin : begin + JUDGED])
