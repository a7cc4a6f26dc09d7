"""A home that learns to do what it is told: act, be corrected, learn, prove, swap, roll back and forward; every figure
is measured in this run."""

import sys
from pathlib import Path
from typing import ClassVar

from rich.markup import escape

from tools import home
from tools.daemon import ROOT
from tools.demo.agent import Answer
from tools.demo.home_agent import HomeAgent
from tools.demo.report import Promises
from tools.demo.story import Story, options_of, tell

SPOKEN = 12  # commands that someone gives and corrects one by one; what other homes have learned comes in bulk
SHOWN = 4  # commands whose outcome is printed
TALK = 40  # messages that want no call, to learn from


class Home(Story):
    title = "make demo-home"
    about = "an agent in a small home, whose model learns to act from corrections while it serves"
    config: Path = ROOT / "configs" / "home.yaml"
    task = home.TASK
    measured = "commands done right, of other sentence templates"
    sparse = 2.0  # behind its tools a request is ten times as long
    promises: ClassVar[Promises] = {
        "at most 10 % of the commands done right before": lambda figures: figures["accuracy_before"] <= 0.10,
        "at least 40 % after": lambda figures: figures["accuracy_after"] >= 0.40,
    }

    def agent(self) -> HomeAgent:
        self._held_out = home.commands("heldout")[: self.options.held_out]
        self._talk = home.chat("heldout")
        self._agent = HomeAgent(self.daemon.api)
        return self._agent

    def introduce(self) -> None:
        names = ", ".join(tool["function"]["name"].removeprefix("Hass") for tool in home.TOOLS)
        self.console.print(f"  its tools: [cyan]{names}[/cyan]")

    async def ask(self, n: int | None, when: str) -> list[Answer]:
        rows = self._held_out[:n]
        with self.bar() as bar:
            task = bar.add_task(f"  telling the home what to do, {when}", total=len(rows))
            return await self._agent.tell_all([row["text"] for row in rows], lambda: bar.advance(task))

    def right(self, answers: list[Answer]) -> float:
        right: int = sum(home.is_right(row, a.calls) for row, a in zip(self._held_out, answers, strict=True))
        return right / len(answers)

    async def more(self, when: str) -> list[str]:
        with self.bar() as bar:
            task = bar.add_task("  talking to it", total=len(self._talk))
            answers = await self._agent.hear_all([row["text"] for row in self._talk], lambda: bar.advance(task))
        called = sum(bool(answer.calls) for answer in answers) / len(answers)
        self.report.note(f"called_{when}", called)
        lines = [f"  greetings and questions answered by a call: {called:.1%}"]
        for row in self._held_out[:SHOWN]:
            done = await self._agent.act(row["text"])
            mark = "[green]✓[/]" if home.is_right(row, done.answer.calls) else "[red]✗[/]"
            lines.append(f'  {mark} [cyan]"{row["text"]}"[/cyan] → {escape(repr(done.outcome[:70]))}')
        return lines

    async def give_feedback(self) -> str:
        rows = home.commands("train")[: self.options.train]
        with self.bar() as bar:
            task = bar.add_task("  correcting what it does one by one", total=min(SPOKEN, len(rows)))
            wrong = 0
            for row in rows[:SPOKEN]:
                wrong += await self._agent.teach(row)
                bar.advance(task)
        talk = home.chat("train")[:TALK]
        added = await self._agent.import_examples(home.example(row) for row in (*rows[SPOKEN:], *talk))
        return f"{wrong} actions corrected, {added['added']} demonstrations imported"


def main() -> int:
    return tell(Home, options_of("python -m tools.demo", __doc__, train=110, held_out=30))


if __name__ == "__main__":
    sys.exit(main())
