"""Passes: what was learned, at what cost, and why it was or was not taken."""

from typing import Annotated, Any

import typer

from agentd.ctl import chart, output, progress
from agentd.ctl.client import JSON, Daemon, segment
from agentd.ctl.errors import ExitCode
from agentd.ctl.options import Json, Limit, Offset, Socket
from agentd.ctl.output import Column

_PASSES = [
    Column("pass", "id", right=True),
    Column("created", "created_at"),
    Column("trigger", "trigger"),
    Column("state", "state"),
    Column("method", "method"),
    Column("blocks", "blocks", right=True),
    Column("train", "n_train", right=True),
    Column("holdout", "n_holdout", right=True),
    Column("predicted", "predicted_bytes", right=True),
    Column("peak", "peak_bytes", right=True),
    Column("revision", "revision", right=True),
    Column("reason", "reason", wide=True),
]
_STEPS = [
    Column("phase", "phase"),
    Column("step", "step", right=True),
    Column("loss", "loss", right=True),
    Column("dev loss", "dev_loss", right=True),
    Column("dev accuracy", "dev_accuracy", right=True),
    Column("seconds", "seconds", right=True),
    Column("seed", "seed"),
    Column("projected gradient", "projected_gradient", right=True),
    Column("lr", "lr", right=True),
    Column("epsilon", "epsilon", right=True),
]
_EVENTS = [Column("at", "at"), Column("kind", "kind"), Column("message", "message", wide=True)]
_SKILLS = [Column("skill", "skill"), *(Column(name, name, right=True) for name in ("before", "after", "n", "p"))]
_PHASES = {"bp": "backpropagation", "zo": "zeroth-order"}


def passes(limit: Limit = 20, offset: Offset = 0, as_json: Json = False, socket: Socket = None) -> None:
    """Every pass: what started it, how it ended, its memory."""
    answer = Daemon(socket).get("/admin/passes", limit=limit, offset=offset)
    output.document(answer) if as_json else output.listing(answer["passes"], _PASSES)


def pass_(
    pass_id: Annotated[int, typer.Argument(metavar="P", help="Number of a pass.", min=1)],
    steps: Annotated[bool, typer.Option("--steps", help="List every training step instead.")] = False,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Follow it until it ends.")] = False,
    as_json: Json = False,
    socket: Socket = None,
) -> None:
    """One pass: its plan, figures, loss curve and events."""
    daemon = Daemon(socket)
    if follow:
        watch(daemon, pass_id, as_json)
        return
    answer = daemon.get(f"/admin/passes/{segment(pass_id)}")
    if as_json:
        output.document(answer)
    elif steps:
        output.listing(answer["steps"], _STEPS, empty="no training step was taken")
    else:
        row, answers = _without_answers(answer["pass"])
        terminal = output.on_terminal()
        skills = row["gate"].get("skills") or {}
        output.facts({**row, "gate": {**row["gate"], "skills": {}}} if terminal else row)
        if terminal:
            list_skills(skills)
            _curves(answer["steps"])
            _answers(answers)
            if answer["events"]:
                print()
                output.listing(sorted(answer["events"], key=lambda event: event["id"]), _EVENTS)


def watch(daemon: Daemon, pass_id: int, as_json: bool) -> None:
    """Follows a pass, says how it ended, and exits with the code for that. Ctrl-C leaves the pass running."""
    try:
        with progress.view(quiet=as_json) as view:
            ended = progress.follow(daemon, pass_id, view)
    except KeyboardInterrupt:
        output.say(
            f"detached; pass {pass_id} goes on. Follow it again: `agentctl pass {pass_id} -f`. "
            f"Stop it: `agentctl cancel`"
        )
        raise typer.Exit(ExitCode.INTERRUPTED) from None
    row = ended.answer["pass"]
    if as_json:
        output.document(ended.answer)
    elif not output.on_terminal():
        output.facts({"pass": pass_id, "state": ended.outcome, "revision": row["revision"], "reason": ended.reason})
    elif ended.outcome == "committed":
        print(f"pass {pass_id} committed: revision {row['revision']} serves now (`agentctl show {row['revision']}`)")
    else:
        print(output.clean(f"pass {pass_id} {ended.outcome}: {ended.reason} (`agentctl pass {pass_id}`)", lines=False))
    raise typer.Exit(ended.exit_code)


def list_skills(skills: dict[str, JSON]) -> None:
    """What base and candidate scored in each group of probes, on a terminal."""
    if skills:
        print()
        output.listing([{"skill": group, **figures} for group, figures in skills.items()], _SKILLS)


def _without_answers(row: JSON) -> tuple[JSON, dict[str, list[JSON]]]:
    """The pass, and apart from it what was answered at the gate, by task."""
    gate = row["gate"]
    tasks = gate.get("tasks") or {}
    answers = {name: figures["answers"] for name, figures in tasks.items() if figures.get("answers")}
    bare = {name: {key: v for key, v in figures.items() if key != "answers"} for name, figures in tasks.items()}
    return {**row, "gate": {**gate, "tasks": bare} if tasks else gate}, answers


def _answers(answers: dict[str, list[JSON]]) -> None:
    """What was asked, what is right, and what was answered before and after."""
    for task, entries in answers.items():
        print(output.clean(f"\nanswers of task {task} at the gate", lines=False))
        for entry in entries:
            print()
            for name in ("input", "right", "before", "after"):
                mark = {True: " ✓", False: " ✗", None: ""}[entry.get(f"{name}_right")]
                text = output.clean(entry[name]).replace("\n", "\n" + " " * 10) or "(nothing)"
                print(f"{name + mark:<9} {text}")


def _curves(steps: list[dict[str, Any]]) -> None:
    """The training loss of each phase over its steps, and what the dev set said in between."""
    for phase in dict.fromkeys(step["phase"] for step in steps):
        mine: list[JSON] = [step for step in steps if step["phase"] == phase]
        lines = chart.line([step["loss"] for step in mine if step["loss"] is not None])
        if not lines:
            continue
        print(f"\nloss of {len(mine)} {_PHASES.get(phase, output.clean(phase))} steps")
        for line in lines:
            print(line)
        dev = [step for step in mine if step["dev_loss"] is not None]
        if dev:
            print("dev loss " + " → ".join(f"{step['dev_loss']:.3f}" for step in dev))
