"""Going through answers that no one has judged: right, wrong, or what should have been said."""

import json
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from agentd.ctl import output
from agentd.ctl.client import JSON, Daemon
from agentd.ctl.errors import CtlError, NotReachable, UsageError
from agentd.ctl.keys import keys
from agentd.ctl.options import Limit, Socket, TaskFilter

_PAGE = 50
_EDITORS = ("VISUAL", "EDITOR")


def review(limit: Limit = 1000, task: TaskFilter = None, socket: Socket = None) -> None:
    """Go through answers that nobody has judged, the newest first, and say what was right."""
    if not (sys.stdin.isatty() and output.on_terminal()):
        raise UsageError("review asks a person, on a terminal; programs use `agentctl feedback add`")
    daemon = Daemon(socket)
    choices = {row["name"]: row["choices"] for row in daemon.get("/admin/tasks")["tasks"]}
    walk = _Walk(daemon, choices)
    try:
        walk.go(_unjudged(daemon, task, limit, walk))
    except KeyboardInterrupt:
        print()
    output.say(f"{len(walk.given)} judged, {len(walk.skipped)} skipped")


def _unjudged(daemon: Daemon, task: str | None, limit: int, walk: "_Walk") -> Iterator[JSON]:
    """At most `limit` answers that no one has judged, newest first; what was skipped is passed over."""
    seen: set[str] = set()
    while len(seen) < limit:
        rows = daemon.get("/admin/inferences", judged="false", task=task, limit=_PAGE, offset=len(walk.skipped))
        fresh = [row for row in rows["inferences"] if row["id"] not in seen]
        if not fresh:
            return
        for row in fresh[: limit - len(seen)]:
            seen.add(row["id"])
            yield row


@dataclass
class _Walk:
    daemon: Daemon
    choices: dict[str, list[str]]
    given: list[tuple[JSON, str]] = field(default_factory=list)  # the answer, and the feedback's id
    skipped: list[JSON] = field(default_factory=list)

    def go(self, answers: Iterator[JSON]) -> None:
        waiting: list[JSON] = []
        while answer := waiting.pop() if waiting else next(answers, None):
            _show(answer)
            again = self._ask(answer)
            if again is _QUIT:
                return
            if again is not None:  # undone: that one first, then this one
                waiting += [answer, again]
        print("nothing is left to review" if self.given or self.skipped else "every answer has been judged")

    def _ask(self, answer: JSON) -> JSON | None:
        """What a person says of one answer. None, or an answer that is to be judged again first."""
        choices = [] if answer["tool_calls"] else self.choices.get(answer["task"] or "", [])[:9]
        numbered = "  ".join(f"[{i}] {output.clean(each, lines=False)}" for i, each in enumerate(choices, 1))
        prompt = f"{numbered}{'  ' if numbered else ''}[r]ight  [w]rong  [e]dit  [s]kip  [u]ndo  [q]uit"
        while True:
            with keys() as pressed:
                if prompt:
                    print(prompt, flush=True)
                key, prompt = pressed(None).lower(), ""
            try:
                if key in ("q", "\x04"):
                    return _QUIT
                if key == "s":
                    self.skipped.append(answer)
                    return None
                if key == "u":
                    if (before := self._undo()) is not None:
                        return before
                elif key in ("r", "w"):
                    self._give(answer, "boolean", key == "r")
                    return None
                elif key.isdigit() and 0 < int(key) <= len(choices):
                    self._give(answer, "label", choices[int(key) - 1])
                    return None
                elif key == "e":
                    if (said := _edited(answer)) is not None:
                        self._give(answer, "demonstration", said)
                        return None
                    output.say("nothing was changed")
            except NotReachable:
                raise
            except CtlError as error:  # such as a call that the tools do not allow: another try
                output.say(f"not taken: {error}")
            except ValueError as error:
                output.say(f"not valid JSON: {error}")

    def _give(self, answer: JSON, kind: str, value: Any) -> None:
        body = {"inference_id": answer["id"], "kind": kind, "value": value}
        said = self.daemon.post("/v1/feedback", body)
        self.given.append((answer, said["id"]))
        effect = f", without effect: {said['reason']}" if said.get("state") else f" for {said['task'] or 'no task'}"
        print(output.clean(f"stored{effect}", lines=False))

    def _undo(self) -> JSON | None:
        if not self.given:
            output.say("there is nothing to undo")
            return None
        answer, feedback = self.given.pop()
        self.daemon.post("/admin/forget", {"feedback": [feedback], "keep_inferences": True})
        print("taken back")
        return answer


_QUIT: JSON = {}


def _show(answer: JSON) -> None:
    about = [answer["task"], answer["episode"] and f"episode {answer['episode']}", f"revision {answer['revision']}"]
    from rich.rule import Rule
    from rich.text import Text

    console = output.console()
    title = " · ".join(str(each) for each in [*about, answer["created_at"][:16].replace("T", " ")] if each)
    console.print(Rule(Text(output.clean(title, lines=False)), align="left", style="dim"))
    messages = answer["input"].get("messages") or [{"role": "prompt", "content": answer["input"].get("prompt")}]
    if len(messages) > 1:
        console.print(Text(f"({len(messages) - 1} earlier messages: `agentctl inferences {answer['id']}`)", "dim"))
    for role, text in ((messages[-1]["role"], _text(messages[-1])), ("answer", _text(_message(answer)))):
        style = "bold cyan" if role == "answer" else "bold"
        console.print(Text.assemble((f"{role}  ", style), output.clean(text) or "(nothing)"))


def _message(answer: JSON) -> JSON:
    return {"content": answer["output"], "tool_calls": answer["tool_calls"]}


def _text(message: JSON) -> str:
    """A message as a person reads it, its calls included."""
    content = message.get("content")
    text = content if isinstance(content, str) else "" if content is None else json.dumps(content, ensure_ascii=False)
    calls = [f"{call['function']['name']}({call['function']['arguments']})" for call in message.get("tool_calls") or ()]
    return "\n".join([*([text] if text else []), *calls])


def _edited(answer: JSON) -> Any:
    """What should have been said, from the person's editor; None where nothing was changed. Where the request has tools
    it is JSON: a text, and calls by name and arguments. Raises ValueError, CtlError."""
    tools = [tool.get("function", {}) for tool in answer["input"].get("tools") or ()]
    if not tools:
        text = _edit(answer["output"] + "\n", ".txt").removesuffix("\n")
        return text if text.strip() and text != answer["output"].removesuffix("\n") else None
    functions = [call["function"] for call in answer["tool_calls"]]
    calls = [{"name": each["name"], "arguments": _arguments(each["arguments"])} for each in functions]
    before = json.dumps({"content": answer["output"], "calls": calls}, indent=2, ensure_ascii=False)
    names = ", ".join(str(tool.get("name")) for tool in tools)
    text = _edit(f"// What should have been said. Functions: {names}\n{before}\n", ".json")
    bare = "\n".join(line for line in text.splitlines() if not line.startswith("//"))
    if not bare.strip() or bare.strip() == before.strip():
        return None
    said = json.loads(bare)
    if not isinstance(said, dict) or not isinstance(said.get("calls", []), list):
        raise ValueError('an object with "content" and "calls" is needed')
    made = []
    for call in said.get("calls") or []:
        if not isinstance(call, dict):
            raise ValueError('a call is {"name": ..., "arguments": {...}}')
        arguments = json.dumps(call.get("arguments") or {}, ensure_ascii=False)
        made.append({"type": "function", "function": {"name": call.get("name"), "arguments": arguments}})
    content = said.get("content") or None
    return {"content": content, "tool_calls": made} if made else content


def _arguments(said: Any) -> Any:
    """Arguments as an object; those of an answer that was cut off are no JSON."""
    try:
        return json.loads(said) if isinstance(said, str) else said
    except ValueError:
        return {}


def _edit(text: str, suffix: str) -> str:
    """The text as it comes back from $VISUAL or $EDITOR. Raises CtlError."""
    editor = next((os.environ[name] for name in _EDITORS if os.environ.get(name)), "vi")
    with tempfile.TemporaryDirectory(prefix="agentctl-") as folder:  # for no one else: 0700
        path = Path(folder, f"answer{suffix}")
        path.write_text(text, encoding="utf-8")
        try:
            code = subprocess.run([*shlex.split(editor), str(path)], check=False).returncode
        except OSError as error:
            raise CtlError(f"{editor} does not start: {error.strerror}; name an editor in EDITOR") from None
        if code:
            raise CtlError(f"{editor} ended with {code}; nothing was stored")
        return path.read_text(encoding="utf-8")
