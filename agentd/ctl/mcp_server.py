"""agentd as tools of an agent, over the Model Context Protocol (stdio). Needs the extra `agentd[mcp]`."""

import json
from collections.abc import Callable
from typing import Annotated, Any, Literal, TypeVar

import anyio.to_thread
from mcp.server.mcpserver import AcceptedElicitation, Context, Elicit, ElicitationResult, MCPServer, Resolve
from mcp.server.mcpserver.exceptions import ToolError
from mcp.types import ToolAnnotations
from pydantic import BaseModel, Field

from agentd import __version__
from agentd.ctl.client import JSON, Daemon, segment
from agentd.ctl.errors import CtlError
from agentd.ctl.progress import POLL, Ended, follow

T = TypeVar("T")

INSTRUCTIONS = (
    "agentd serves a language model on this device and learns from corrections. When an answer or a tool call of that"
    " model was wrong, say with give_feedback what would have been right; it counts in the next pass. start_pass learns"
    " now. Nothing is lost: roll_back serves an earlier revision, after the owner has agreed."
)

_CANNOT_ASK = (
    "this client cannot ask its owner; let the owner run `agentctl rollback`, or start `agentctl mcp` with"
    " --may-roll-back"
)
_READS = ToolAnnotations(read_only_hint=True)


class Call(BaseModel):
    """A tool call that would have been right."""

    name: str
    arguments: dict[str, Any] = {}


class Consent(BaseModel):
    """What the owner is asked."""

    agreed: bool = Field(description="Serve that revision from now on")


def server(daemon: Daemon, *, may_roll_back: bool) -> MCPServer:
    """The tools, for one daemon. `may_roll_back`: without asking the owner."""
    tools = MCPServer("agentd", instructions=INSTRUCTIONS, version=__version__, log_level="WARNING")

    @tools.tool(annotations=_READS)
    async def status() -> JSON:
        """What is served, what is being learned, and why nothing is learned where that is so."""
        return await _asked(lambda: daemon.get("/admin/status"))

    @tools.tool(annotations=_READS)
    async def tasks() -> JSON:
        """The tasks that there are corrections for, and how accuracy went."""
        return await _asked(lambda: daemon.get("/admin/tasks"))

    @tools.tool(annotations=_READS)
    async def history(limit: Annotated[int, Field(ge=1, le=200)] = 20) -> JSON:
        """Passes, swaps and rollbacks, the newest first."""
        return await _asked(lambda: daemon.get("/admin/history", limit=limit))

    @tools.tool(annotations=_READS)
    async def answers(episode: str | None = None, limit: Annotated[int, Field(ge=1, le=50)] = 5) -> JSON:
        """The last answers with their ids, the newest first: of everybody, or of one episode."""
        return await _asked(lambda: daemon.get("/admin/inferences", limit=limit, episode=episode))

    @tools.tool()
    async def give_feedback(
        answer: Annotated[
            str | None, Field(description="Id of the answer, as `answers` lists it; the last one if left out")
        ] = None,
        episode: Annotated[str | None, Field(description="Instead of an answer: how this episode came out")] = None,
        right_text: Annotated[str | None, Field(description="What should have been said")] = None,
        right_calls: Annotated[
            list[Call] | None, Field(description="The tool calls that should have been made; [] where none was wanted")
        ] = None,
        label: Annotated[str | None, Field(description="The right choice of the task")] = None,
        good: Annotated[bool | None, Field(description="Whether it was good")] = None,
        score: Annotated[float | None, Field(description="How good it was")] = None,
        comment: Annotated[str | None, Field(description="A remark; it is kept, not trained on")] = None,
        task: Annotated[str | None, Field(description="The task; the answer's own if left out")] = None,
        source: Annotated[
            Literal["human", "program"], Field(description="Whose judgement it is: `human` only if a person said so")
        ] = "program",
    ) -> JSON:
        """Say what was right or wrong about an answer or an episode. Exactly one kind of feedback at a time;
        right_text and right_calls may come together."""
        values = _values(right_text, right_calls, label, good, score, comment)
        if len(values) != 1:
            raise ToolError("give exactly one of right_text and right_calls, label, good, score, comment")
        if answer is not None and episode is not None:
            raise ToolError("give an answer or an episode, not both")
        ((kind, value),) = values.items()
        body: JSON = {"kind": kind, "value": value, "source": source, **({"task": task} if task else {})}

        def send() -> JSON:
            about = {"episode": episode} if episode else {"inference_id": answer or _last(daemon)}
            return {**daemon.post("/v1/feedback", {**body, **about}), "about": about}

        return await _asked(send)

    @tools.tool()
    async def start_pass(
        context: Context[Any],
        wait: Annotated[bool, Field(description="Answer when it has ended, with progress; else at once")] = True,
    ) -> JSON:
        """Learn now from what was corrected. What is learned is served only if it is better on held-out examples."""
        started = await _asked(lambda: daemon.post("/admin/adapt", {}))
        return _outcome(await _followed(daemon, started["pass"], context)) if wait else started

    @tools.tool(annotations=_READS)
    async def show_pass(
        context: Context[Any],
        number: Annotated[int, Field(ge=1)],
        wait: Annotated[bool, Field(description="Answer when it has ended, with progress")] = False,
    ) -> JSON:
        """A pass: its state, plan, figures and reason."""
        if wait:
            return _outcome(await _followed(daemon, number, context))
        answer = await _asked(lambda: daemon.get(f"/admin/passes/{segment(number)}"))
        row: JSON = answer["pass"]
        return row

    async def consent(context: Context[Any], revision: int | None, reason: str | None) -> Consent | Elicit[Consent]:
        """The owner's, who is asked by the client."""
        if may_roll_back:
            return Consent(agreed=True)
        if not (context.client_capabilities and context.client_capabilities.elicitation):
            raise ToolError(_CANNOT_ASK)
        what = "the revision before" if revision is None else f"revision {revision}"
        return Elicit(f"agentd: serve {what} from now on?{f' ({reason})' if reason else ''}", Consent)

    @tools.tool(annotations=ToolAnnotations(destructive_hint=True, idempotent_hint=True))
    async def roll_back(
        agreed: Annotated[ElicitationResult[Consent], Resolve(consent)],
        revision: Annotated[int | None, Field(description="The serving one's parent if left out")] = None,
        reason: Annotated[str | None, Field(description="Why, for the history")] = None,
    ) -> JSON:
        """Serve another committed revision, older or newer. The owner is asked first."""
        if not (isinstance(agreed, AcceptedElicitation) and agreed.data.agreed):
            raise ToolError("the owner did not agree; nothing was changed")
        body: JSON = {"revision": revision, **({"reason": reason} if reason else {})}
        return await _asked(lambda: daemon.post("/admin/rollback", body))

    return tools


def _values(
    text: str | None,
    calls: list[Call] | None,
    label: str | None,
    good: bool | None,
    score: float | None,
    comment: str | None,
) -> JSON:
    """The kinds of feedback that were given, with their values as the API takes them."""
    values: JSON = {"label": label, "boolean": good, "float": score, "comment": comment}
    if calls:
        functions = [{"name": call.name, "arguments": json.dumps(call.arguments)} for call in calls]
        tool_calls = [{"type": "function", "id": f"call_{i}", "function": each} for i, each in enumerate(functions)]
        values["demonstration"] = {"role": "assistant", "content": text, "tool_calls": tool_calls}
    elif text is not None:
        values["demonstration"] = text
    elif calls is not None:
        raise ToolError("where no call was wanted, say with right_text what should have been said")
    return {kind: value for kind, value in values.items() if value is not None}


def _last(daemon: Daemon) -> str:
    latest = daemon.get("/admin/inferences", limit=1)["inferences"]
    if not latest:
        raise ToolError("nothing has been answered yet")
    return str(latest[0]["id"])


async def _asked(work: Callable[[], T]) -> T:
    """What the daemon says, asked for in a thread. Raises ToolError with its message."""
    try:
        return await anyio.to_thread.run_sync(work)
    except CtlError as error:
        raise ToolError(str(error)) from None


async def _followed(daemon: Daemon, number: int, context: Context[Any]) -> Ended:
    """Waits for the end of a pass, and reports its progress."""
    reports: list[JSON] = []

    class Reports:
        def __enter__(self) -> "Reports":
            return self

        def __exit__(self, *error: object) -> None:
            return None

        def show(self, progress: JSON) -> None:
            reports.append(progress)

        def note(self, message: str) -> None:
            pass

    async def report() -> None:
        while True:
            await anyio.sleep(POLL)
            if reports:
                latest = reports[-1]
                reports.clear()
                total = latest["steps"] or None
                await context.report_progress(latest["step"], total, f"{latest['phase']}")

    async with anyio.create_task_group() as group:
        group.start_soon(report)
        ended = await _asked(lambda: follow(daemon, number, Reports()))
        group.cancel_scope.cancel()
    return ended


def _outcome(ended: Ended) -> JSON:
    row = ended.answer["pass"]
    return {"pass": row["id"], "state": ended.outcome, "revision": row["revision"], "reason": ended.reason}
