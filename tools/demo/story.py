"""What the demos share: serve, collect feedback, adapt, prove, swap, roll back and forward, while others ask."""

import argparse
import asyncio
import json
import re
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from agentd.ctl.errors import CtlError
from agentd.ctl.progress import Ended
from tools.daemon import DaemonProcess, ToolFailed, end_daemons_on_sigterm, followed
from tools.demo.agent import Agent, Answer
from tools.demo.report import Promises, Report
from tools.demo.traffic import BURST_EVERY, EVERY, LENGTH, QUESTIONS, Traffic, contradictions

IDLE_SECONDS = 19.0  # one burst and nine single requests, the same mix as in any twenty seconds
BROKEN = 3  # the exit status where a promise was not kept


def options_of(prog: str, about: str | None, train: int, held_out: int) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=prog, description=about)
    parser.add_argument(
        "--train", type=int, default=train, metavar="N", help="given as feedback (default: %(default)s)"
    )
    parser.add_argument("--held-out", type=int, default=held_out, metavar="N", help="judged (default: %(default)s)")
    parser.add_argument("--method", default="auto", help="auto, mezo, suffix-bp or elasticzo (default: auto)")
    parser.add_argument("--blocks", default="auto", help="last blocks trained by backpropagation (default: auto)")
    parser.add_argument("--model", type=Path, metavar="FILE", help="a GGUF file (default: the default model)")
    parser.add_argument("--state", type=Path, metavar="DIR", help="keep the state here (default: a temporary one)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="also draw what was printed, as SVG")
    return parser.parse_args()


class Story(ABC):
    """One demo. A subclass says what is asked, what is right, and how the daemon is told."""

    title: str  # the command, as the picture has it
    about: str
    config: Path
    task: str
    measured: str  # what `right` is the share of
    promises: ClassVar[Promises]
    # times as long between the other clients' requests, on the idle daemon and during the pass
    sparse: ClassVar[tuple[float, float]] = (1.0, 1.0)
    same: ClassVar[int] = 60  # held-out questions whose answers are compared, besides the free texts

    def __init__(self, daemon: DaemonProcess, console: Console, options: argparse.Namespace) -> None:
        self.daemon, self.console, self.options = daemon, console, options
        self.report = Report(self.measured)

    # --- what differs

    @abstractmethod
    def agent(self) -> Agent:
        """Who asks."""

    @abstractmethod
    def introduce(self) -> None:
        """Says what is asked."""

    @abstractmethod
    async def ask(self, rows: slice, when: str, *, exact: bool) -> list[Answer]:
        """The answers to these held-out questions; `exact`: they are to be compared with others."""

    @abstractmethod
    def right(self, answers: list[Answer]) -> float:
        """The share of right answers."""

    @abstractmethod
    async def give_feedback(self) -> str:
        """Returns what was given, in words."""

    async def more(self, when: str) -> list[str]:
        """Lines about what else the model does."""
        return []

    # --- what is the same

    async def run(self) -> Report:
        started = time.monotonic()
        say, report = self.console.print, self.report
        say(f"[bold]agentd[/bold]: {self.about}\n")
        await asyncio.to_thread(self.daemon.start)
        model = self.daemon.ctl.get("/admin/status")["model"]
        say(f"1 [bold]Serving[/bold] {model['architecture']} {model['n_params'] / 1e6:.0f}M on {self.daemon.api}")
        self.introduce()
        self.client = self.agent()
        try:
            before, free = await self._ask_everything("before")
            say("2 [bold]Feedback[/bold]")
            summary = await self.give_feedback()
            counts = (await asyncio.to_thread(self.daemon.ctl.get, "/admin/examples", limit=1))["counts"][self.task]
            say(f"  {summary}: {counts['train']['new']} to learn from, {counts['holdout']} held back for the gate\n")

            quick, slow = self.sparse
            say(f"3 [bold]Other clients[/bold]: {_pace(quick)}; first on the idle daemon")
            async with Traffic(self.client, quick) as idle:
                await asyncio.sleep(IDLE_SECONDS * quick)

            say("4 [bold]A pass[/bold], with the same clients" + ("" if quick == slow else f": {_pace(slow)}"))
            async with Traffic(self.client, slow) as busy:
                ended = await self._adapt()
            report.add_pass(ended.answer["pass"], ended.answer["events"])
            report.print_pass(self.console)
            if ended.outcome != "committed":
                raise ToolFailed(f"the pass was {ended.outcome}: {ended.reason}")
            revision = ended.answer["pass"]["revision"]
            after, free_after = await self._ask_everything("after")

            say("5 [bold]Back and forward[/bold]")
            report.add_swap("rollback", await self._switch(0))
            report.note("rollback_differences", await self._differences(before, free))
            reference = {(0, question): answer.text for question, answer in zip(QUESTIONS, free, strict=True)}
            report.add_swap("roll forward", await self._switch(revision))
            report.note("forward_differences", await self._differences(after, free_after))
            reference |= {(revision, q): answer.text for q, answer in zip(QUESTIONS, free_after, strict=True)}
            pairs = zip(before[: self.same] + free, after[: self.same] + free_after, strict=True)
            report.note("answers_changed_by_the_revision", sum(a.said[:2] != b.said[:2] for a, b in pairs))
            report.add_traffic(idle, busy, contradictions(idle.answers + busy.answers, reference))
        finally:
            await self.client.close()
        report.note("seconds", time.monotonic() - started)
        report.print(self.console)
        return report

    async def _ask_everything(self, when: str) -> tuple[list[Answer], list[Answer]]:
        """Answers to every held-out question, and to the free ones."""
        answers = await self.ask(slice(self.same), when, exact=True)
        answers += await self.ask(slice(self.same, None), when, exact=False)
        self.report.note(f"accuracy_{when}", self.right(answers))
        color = "bold green" if when == "after" else "bold"
        share = f"[{color}]{self.report[f'accuracy_{when}']:.1%}[/]"
        self.console.print(f"  {self.measured}, {len(answers)} of them: {share}")
        for line in await self.more(when):
            self.console.print(line)
        self.console.print()
        return answers, [await self.client.ask(question, max_tokens=LENGTH) for question in QUESTIONS]

    async def _adapt(self) -> Ended:
        wishes: dict[str, Any] = {}
        if self.options.method != "auto":
            wishes["method"] = self.options.method
        if self.options.blocks != "auto":
            wishes["blocks"] = int(self.options.blocks)
        number = (await asyncio.to_thread(self.daemon.ctl.post, "/admin/adapt", wishes))["pass"]
        return await followed(self.daemon.ctl, number)

    async def _switch(self, revision: int) -> dict[str, Any]:
        return await asyncio.to_thread(self.daemon.ctl.post, "/admin/rollback", {"revision": revision})

    async def _differences(self, expected: list[Answer], free: list[Answer]) -> int:
        """How many answers are not, character for character, the ones that were given before."""
        answers = await self.ask(slice(self.same), "again", exact=True)
        answers += [await self.client.ask(question, max_tokens=LENGTH) for question in QUESTIONS]
        return sum(a.said != b.said for a, b in zip(answers, [*expected[: self.same], *free], strict=True))

    def bar(self) -> Progress:
        columns = (TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn(), TimeElapsedColumn())
        return Progress(*columns, console=self.console, transient=True)


def _pace(sparse: float) -> str:
    return f"a request every {EVERY * sparse:g} s, ten at once every {BURST_EVERY * sparse:g} s"


def tell(story: type[Story], options: argparse.Namespace) -> int:
    """The exit status: 0 where all promises were kept, BROKEN where some were not, 1 where it did not get so far."""
    end_daemons_on_sigterm()
    console = Console(highlight=False, record=options.picture is not None, width=100 if options.picture else None)
    settings = {"adapt": {"enabled": False, "trial": {"duration": "5s"}}}
    with DaemonProcess(options.model, settings, config=story.config, state=options.state) as daemon:
        try:
            report = asyncio.run(story(daemon, console, options).run())
        except (ToolFailed, CtlError) as error:
            console.print(f"[red]{error}[/red]", markup=True)
            return 1
    kept = report.promises_kept(console, story.promises)
    if options.json:
        options.json.write_text(json.dumps(report.figures, indent=2) + "\n")
    if options.picture:
        # The picture must not fetch fonts from anywhere.
        svg = re.sub(r"@font-face \{.*?\}\s*", "", console.export_svg(title=story.title), flags=re.DOTALL)
        options.picture.write_text(svg, encoding="utf-8")
    return 0 if kept else BROKEN
