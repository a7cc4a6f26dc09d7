"""What the demo measured: a table a person reads, figures a program reads, and whether the promises were kept."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from tools.demo.traffic import Traffic

MB = 1e6
PHASES = ("plan", "tap", "train", "zo", "gate", "stage", "swap", "trial")


Promises = Mapping[str, Callable[[dict[str, Any]], bool]]
"""What a demo has to show beside what all of them have, in words, and whether its figures do."""


class Report:
    """`measured` is what `accuracy_before` and `accuracy_after` are shares of."""

    def __init__(self, measured: str) -> None:
        self._measured = measured
        self.figures: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        return self.figures[name]

    def note(self, name: str, value: Any) -> None:
        self.figures[name] = value

    def add_pass(self, row: Mapping[str, Any], happened: Sequence[Mapping[str, Any]]) -> None:
        names = ("method", "blocks", "n_train", "n_holdout", "phases", "peaks", "peak_bytes", "predicted_bytes", "gate")
        self.figures["pass"] = {name: row[name] for name in names}
        swapped = [event["data"]["swap_ms"] for event in happened if "swap_ms" in (event.get("data") or {})]
        self.figures.setdefault("swap_ms", {}).update({"pass": swapped[0]} if swapped else {})

    def add_swap(self, name: str, answer: Mapping[str, Any]) -> None:
        self.figures.setdefault("swap_ms", {})[name] = answer["swap_ms"]

    def add_traffic(self, idle: Traffic, busy: Traffic, contradictions: list[str]) -> None:
        self.figures["traffic"] = {
            "idle": {"served": len(idle.answers), "failed": len(idle.failures), "ttft_ms": idle.ttft},
            "adapting": {"served": len(busy.answers), "failed": len(busy.failures), "ttft_ms": busy.ttft},
            "ttft_ratio": {kind: busy.ttft[kind] / idle.ttft[kind] for kind in idle.ttft},
            "failures": idle.failures + busy.failures,
            "contradictions": contradictions,
        }

    def print_pass(self, console: Console) -> None:
        row = self["pass"]
        phases, peaks = row["phases"], row["peaks"]
        table = Table(box=None, padding=(0, 2), show_header=False)
        table.add_row("method", f"{row['method']}, k = {row['blocks']}, {row['n_train']} examples")
        table.add_row("time", "  ".join(f"{name} {phases[name]:.1f} s" for name in PHASES if name in phases))
        processes = "  ".join(
            f"{name} {peaks[name] / MB:.0f} MB" for name in ("daemon", "engine", "trainer") if name in peaks
        )
        if peaks:
            table.add_row("peak memory", f"{processes}  together {peaks['total'] / MB:.0f} MB")
            table.add_row(
                "beyond serving",
                f"{row['peak_bytes'] / MB:.0f} MB; {(row['predicted_bytes'] or 0) / MB:.0f} MB predicted",
            )
        if row["gate"]:
            table.add_row("gate", f"{row['gate']['reason']} ({row['n_holdout']} held back)")
        console.print(table)

    def print(self, console: Console) -> None:
        figures, traffic = self.figures, self["traffic"]
        table = Table(title="\nWhat was measured", title_justify="left", title_style="bold")
        for column in ("", "before", "after", "ratio"):
            table.add_column(column, justify="left" if not column else "right")
        gain = figures["accuracy_after"] - figures["accuracy_before"]
        table.add_row(
            self._measured,
            f"{figures['accuracy_before']:.1%}",
            f"[bold green]{figures['accuracy_after']:.1%}[/]",
            f"{100 * gain:+.1f} points",
        )
        idle, adapting = traffic["idle"], traffic["adapting"]
        for kind, what in (("single", "a single request"), ("burst", "ten at once")):
            table.add_row(
                f"median time to first token, {what}",
                f"{idle['ttft_ms'][kind]:.0f} ms",
                f"{adapting['ttft_ms'][kind]:.0f} ms",
                f"{traffic['ttft_ratio'][kind]:.2f} x",
            )
        table.add_row(
            "requests of other clients, failed",
            f"{idle['served']}, {idle['failed']}",
            f"{adapting['served']}, {adapting['failed']}",
            "",
        )
        console.print(table)
        swaps = ", ".join(f"{name} {value:.2f} ms" for name, value in figures["swap_ms"].items())
        console.print(f"swap: {swaps}")
        console.print(
            f"after the rollback {figures['rollback_differences']} answers differ from the old ones, after rolling "
            f"forward {figures['forward_differences']} from the new ones; of all that were compared "
            f"{figures['answers_changed_by_the_revision']} differ between the two revisions"
        )
        console.print(f"answers that contradict the revision they name: {len(traffic['contradictions'])}")
        for problem in (traffic["failures"] + traffic["contradictions"])[:5]:
            console.print(f"  {problem}", markup=False)
        console.print(f"the whole demo took {figures['seconds']:.0f} s")

    def promises_kept(self, console: Console, own: Promises) -> bool:
        """Whether this run shows what agentd promises; says which promise it does not."""
        figures, traffic = self.figures, self["traffic"]
        promises = {
            **{text: holds(figures) for text, holds in own.items()},
            "no request failed": not traffic["failures"],
            "no answer from another revision than the one it names": not traffic["contradictions"],
            "time to first token within 1.3 x of the idle daemon's": max(traffic["ttft_ratio"].values()) <= 1.3,
            "every swap within 20 ms": max(figures["swap_ms"].values()) <= 20,
            "the rollback brought back every answer": figures["rollback_differences"] == 0,
            "so did rolling forward": figures["forward_differences"] == 0,
            "daemon within 120 MB": figures["pass"]["peaks"]["daemon"] <= 120e6,
        }
        figures["promises"] = promises
        for text, holds in promises.items():
            console.print(f"  [{'green' if holds else 'red'}]{'✓' if holds else '✗'}[/] {text}")
        console.print(f"{sum(promises.values())} of {len(promises)} promises held")
        return all(promises.values())
