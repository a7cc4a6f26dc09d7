"""Movie reviews: did the reviewer like the movie? `make demo`; every figure is measured in this run."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from agentd.config import schema
from tools import reviews
from tools.daemon import REVIEWS
from tools.demo.agent import Agent, Answer
from tools.demo.report import Promises
from tools.demo.story import Story, options_of, tell

TASK = "reviews"
SPOKEN = 32  # corrections given answer by answer; the others come in bulk


class ReviewAgent(Agent):
    def __init__(self, socket: Path, prompt: str) -> None:
        super().__init__(socket)
        self._prompt = prompt

    async def judge(self, review: str) -> Answer:
        """Did the reviewer like the movie? The task's choices restrict the answer."""
        return await self.ask(self._prompt.replace("{text}", review), task=TASK)

    async def judge_all(
        self, rows: Sequence[dict[str, Any]], tick: Callable[[], None], *, exact: bool = True
    ) -> list[Answer]:
        """The answers to all reviews, in their order."""
        texts = [self._prompt.replace("{text}", row["text"]) for row in rows]
        return await self.ask_all(texts, tick, task=TASK, exact=exact)

    async def teach(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Sends labels in bulk."""
        return await self.import_examples({"task": TASK, "text": row["text"], "label": row["label"]} for row in rows)


class Reviews(Story):
    title = "make demo"
    about = "a model that learns from feedback while it serves"
    config = REVIEWS
    task = TASK
    measured = "served accuracy, held-out reviews"
    promises: ClassVar[Promises] = {
        "accuracy of at most 62 % before": lambda figures: figures["accuracy_before"] <= 0.62,
        "accuracy of at least 80 % after": lambda figures: figures["accuracy_after"] >= 0.80,
        "all processes together within 900 MB": lambda figures: figures["pass"]["peaks"]["total"] <= 900e6,
    }

    def agent(self) -> ReviewAgent:
        self._held_out = reviews.liked("heldout")[: self.options.held_out]
        self._agent = ReviewAgent(self.daemon.api, prompt())
        return self._agent

    def introduce(self) -> None:
        self.console.print(f'  the question: [cyan]"{prompt().replace(chr(10), " ")}"[/cyan]')

    async def ask(self, rows: slice, when: str, *, exact: bool) -> list[Answer]:
        asked = self._held_out[rows]
        with self.bar() as bar:
            task = bar.add_task(f"  asking about held-out reviews {when}", total=len(asked))
            return await self._agent.judge_all(asked, lambda: bar.advance(task), exact=exact)

    def right(self, answers: list[Answer]) -> float:
        return accuracy(answers, self._held_out)

    async def give_feedback(self) -> str:
        rows = reviews.liked("train")[: self.options.train]
        with self.bar() as bar:
            task = bar.add_task("  correcting answers one by one", total=min(SPOKEN, len(rows)))
            for row in rows[:SPOKEN]:
                await self._agent.correct(await self._agent.judge(row["text"]), "label", row["label"])
                bar.advance(task)
        added = await self._agent.teach(rows[SPOKEN:])
        return f"{SPOKEN} corrections, {added['added']} imported"


def prompt() -> str:
    """What the configuration asks."""
    return schema.load(REVIEWS, {}).tasks[TASK].prompt or "{text}"


def accuracy(answers: Sequence[Answer], rows: Sequence[dict[str, Any]]) -> float:
    right: int = sum(answer.text == row["label"] for answer, row in zip(answers, rows, strict=True))
    return right / len(rows)


def main() -> int:
    return tell(Reviews, options_of("python -m tools.demo.reviews", __doc__, train=560, held_out=300))


if __name__ == "__main__":
    sys.exit(main())
