"""Serve, collect feedback, adapt, prove, swap, roll back and forward; every figure is measured in this run."""

import argparse
import asyncio
import json
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from agentd import config
from agentd.ctl.errors import CtlError
from agentd.ctl.progress import Ended, follow, view
from tools.demo.agent import TASK, Agent, Answer, accuracy
from tools.demo.process import CONFIG, DemoDaemon, DemoFailed, reviews
from tools.demo.report import Report
from tools.demo.traffic import LENGTH, QUESTIONS, Traffic, contradictions

IDLE_SECONDS = 19.0  # one burst and nine single requests, the same mix as in any twenty seconds
SPOKEN = 32  # corrections given answer by answer; the others come in bulk
SAME = 60  # held-out reviews whose answers are compared after the rollback, besides the free texts


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.demo", description=__doc__)
    parser.add_argument("--train", type=int, default=560, metavar="N", help="reviews given as feedback (default: 560)")
    parser.add_argument("--held-out", type=int, default=300, metavar="N", help="reviews asked about (default: 300)")
    parser.add_argument("--method", default="auto", help="auto, mezo, suffix-bp or elasticzo (default: auto)")
    parser.add_argument("--blocks", default="auto", help="last blocks trained by backpropagation (default: auto)")
    parser.add_argument(
        "--state", type=Path, metavar="DIR", help="keep the state here (default: a temporary directory)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="also draw what was printed, as SVG")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # the daemon is ended on the way out
    console = Console(highlight=False, record=options.picture is not None, width=100 if options.picture else None)
    with DemoDaemon(options.state, trial_seconds=5) as daemon:
        try:
            report = asyncio.run(Demo(daemon, console, options).run())
        except (DemoFailed, CtlError) as error:
            console.print(f"[red]{error}[/red]", markup=True)
            return 1
    kept = report.promises_kept(console)
    if options.json:
        options.json.write_text(json.dumps(report.figures, indent=2) + "\n")
    if options.picture:
        # The picture must not fetch fonts from anywhere.
        svg = re.sub(r"@font-face \{.*?\}\s*", "", console.export_svg(title="make demo"), flags=re.DOTALL)
        options.picture.write_text(svg, encoding="utf-8")
    return 0 if kept else 1


class Demo:
    def __init__(self, daemon: DemoDaemon, console: Console, options: argparse.Namespace) -> None:
        self._daemon, self._console, self._options = daemon, console, options
        self._admin = daemon.admin
        self._prompt = config.load(CONFIG, {}).tasks[TASK].prompt or "{text}"
        self._held_out = reviews("heldout")[: options.held_out]
        self._train = reviews("train")[: options.train]
        self._report = Report()

    async def run(self) -> Report:
        started = time.monotonic()
        say, report = self._console.print, self._report
        say("[bold]agentd[/bold]: a model that learns from feedback while it serves\n")
        status = await asyncio.to_thread(self._daemon.wait_until_serving)
        model = status["model"]
        say(f"1 [bold]Serving[/bold] {model['architecture']} {model['n_params'] / 1e6:.0f}M on {self._daemon.socket}")
        say(f'  the question: [cyan]"{self._prompt.replace(chr(10), " ")}"[/cyan]')
        agent = Agent(self._daemon.socket, self._prompt)
        try:
            before, free = await self._ask_everything(agent, "before")
            report.note("accuracy_before", accuracy(before, self._held_out))
            say(f"  accuracy on {len(before)} held-out reviews: [bold]{report['accuracy_before']:.1%}[/bold]\n")

            say("2 [bold]Feedback[/bold]")
            await self._give_feedback(agent)

            say("3 [bold]Other clients[/bold]: a request every 2 s, ten at once every 20 s; first on the idle daemon")
            async with Traffic(agent) as idle:
                await asyncio.sleep(IDLE_SECONDS)

            say("4 [bold]A pass[/bold], with the same clients")
            async with Traffic(agent) as busy:
                ended = await self._adapt()
            report.add_pass(ended.answer["pass"], ended.answer["events"])
            report.print_pass(self._console)
            if ended.outcome != "committed":
                raise DemoFailed(f"the pass was {ended.outcome}: {ended.reason}")
            revision = ended.answer["pass"]["revision"]
            after, free_after = await self._ask_everything(agent, "after")
            report.note("accuracy_after", accuracy(after, self._held_out))
            say(f"  accuracy on the held-out reviews: [bold green]{report['accuracy_after']:.1%}[/bold green]\n")

            say("5 [bold]Back and forward[/bold]")
            report.add_swap("rollback", await self._switch(0))
            report.note("rollback_differences", await self._differences(agent, before, free))
            reference = {(0, question): answer.text for question, answer in zip(QUESTIONS, free, strict=True)}
            report.add_swap("roll forward", await self._switch(revision))
            report.note("forward_differences", await self._differences(agent, after, free_after))
            reference |= {(revision, q): answer.text for q, answer in zip(QUESTIONS, free_after, strict=True)}
            changed = sum(a.text != b.text for a, b in zip(before + free, after + free_after, strict=True))
            report.note("answers_changed_by_the_revision", changed)
            report.add_traffic(idle, busy, contradictions(idle.answers + busy.answers, reference))
        finally:
            await agent.close()
        report.note("seconds", time.monotonic() - started)
        report.print(self._console)
        return report

    async def _ask_everything(self, agent: Agent, when: str) -> tuple[list[Answer], list[Answer]]:
        """Answers to every held-out review, and to the free questions."""
        with self._bar() as bar:
            task = bar.add_task(f"  asking about held-out reviews {when}", total=len(self._held_out))
            answers = await agent.judge_all(self._held_out, lambda: bar.advance(task))
        return answers, [await agent.ask(question, max_tokens=LENGTH) for question in QUESTIONS]

    async def _give_feedback(self, agent: Agent) -> None:
        with self._bar() as bar:
            task = bar.add_task("  correcting answers one by one", total=min(SPOKEN, len(self._train)))
            for row in self._train[:SPOKEN]:
                answer = await agent.judge(row["text"])
                await agent.correct(answer, row["label"])
                bar.advance(task)
        added = await agent.import_examples(self._train[SPOKEN:])
        counts = (await asyncio.to_thread(self._admin.get, "/admin/examples", limit=1))["counts"][TASK]
        train = counts["train"]["new"]
        given = f"{SPOKEN} corrections, {added['added']} imported"
        self._console.print(f"  {given}: {train} to learn from, {counts['holdout']} held back for the gate\n")

    async def _adapt(self) -> Ended:
        wishes: dict[str, Any] = {}
        if self._options.method != "auto":
            wishes["method"] = self._options.method
        if self._options.blocks != "auto":
            wishes["blocks"] = int(self._options.blocks)
        number = (await asyncio.to_thread(self._admin.post, "/admin/adapt", wishes))["pass"]
        with view() as shown:
            return await asyncio.to_thread(follow, self._admin, number, shown)

    async def _switch(self, revision: int) -> dict[str, Any]:
        return await asyncio.to_thread(self._admin.post, "/admin/rollback", {"revision": revision})

    async def _differences(self, agent: Agent, expected: list[Answer], free: list[Answer]) -> int:
        """How many answers are not, character for character, the ones that were given before."""
        with self._bar() as bar:
            task = bar.add_task("  asking the same again", total=SAME)
            answers = await agent.judge_all(self._held_out[:SAME], lambda: bar.advance(task))
        answers += [await agent.ask(question, max_tokens=LENGTH) for question in QUESTIONS]
        same = [*expected[:SAME], *free]
        return sum((a.text, a.revision) != (b.text, b.revision) for a, b in zip(answers, same, strict=True))

    def _bar(self) -> Progress:
        columns = (TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn())
        return Progress(*columns, console=self._console, transient=True)


if __name__ == "__main__":
    sys.exit(main())
