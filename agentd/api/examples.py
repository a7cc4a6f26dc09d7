"""POST /v1/examples: inputs and their right answers, many at once, and GET /admin/examples, where they come back."""

import asyncio
from collections import Counter
from functools import partial
from typing import Any

import anyio
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from agentd.api.access import author
from agentd.api.classify import CLASSIFY_TASK, of_lists
from agentd.api.conversations import answers, judged, pair_of, target_of, unfolded
from agentd.api.messages import Message, plain
from agentd.api.requests import read, validate
from agentd.api.schemas import ExampleLine
from agentd.api.services import Services, services
from agentd.api.tools import tools_input
from agentd.engine.operations import Refusals
from agentd.errors import AgentdError, InvalidLine, InvalidRequest
from agentd.int8.header import ClassifierHeader
from agentd.store import imports, tasks
from agentd.store.examples import NewExample
from agentd.store.normalise import input_text
from agentd.store.tasks import Task

_KINDS_ASKED = 256  # of inputs in one import, of which the engine is asked whether it can read them
_UNFOLDED = 1 << 28  # characters of the inputs that all conversations of an import become
_WRITTEN = 4  # times what a request takes: its answer stands there too, and characters of two bytes may take six
_PATIENCE = 10.0  # seconds to wait for its answer, which comes between two forward passes


async def add_examples(request: Request) -> Response:
    """A JSONL body, stored whole or not at all."""
    s = services(request)
    body = await read(request, s.config.serve.max_import, "serve.max_import")
    known = {task.name: task for task in await s.store.call(tasks.all)}
    # in a thread: a long body takes seconds, in which the others want their tokens
    parse = partial(_parse_lines, longest=_WRITTEN * s.config.serve.max_body)
    new = await asyncio.to_thread(parse, body, known, s.model.classifier, author(request))
    if not new:
        raise InvalidRequest("the body holds no examples; send one JSON object a line")
    if s.model.classifier is None:
        await _check_prompts(s, new)
    prepared = await asyncio.to_thread(imports.prepare, new)
    stored = await imports.add(s.store, prepared)
    return JSONResponse({**stored, "tasks": Counter(example.task for example in new)})


async def _check_prompts(s: Services, new: list[NewExample]) -> None:
    """Raises InvalidLine for the first example that the model's chat template cannot render, as far as that depends on
    who says what kind of thing: one of each kind is asked for. Without an engine nothing is known yet; a pass finds it.
    """
    kinds: dict[Any, NewExample] = {}
    for example in new:
        kinds.setdefault(_kind(example.input), example)
    samples = list(kinds.values())[:_KINDS_ASKED]
    try:
        refusals = Refusals([example.input for example in samples])
        with anyio.fail_after(_PATIENCE):
            answers = await s.supervisor.call(refusals)
    except (AgentdError, TimeoutError):
        return
    for example, refusal in zip(samples, answers, strict=True):
        if refusal is not None:
            raise InvalidLine(example.line or 1, refusal)


def _kind(input: dict[str, Any]) -> Any:
    """What templates look at: who speaks in turn, and which fields a message has."""
    if "prompt" in input:
        return bool(input["prompt"])
    said = (
        (message.get("role"), *sorted(name for name, value in message.items() if value))
        for message in input["messages"]
    )
    return bool(input.get("tools")), *said


def _parse_lines(
    body: bytes, known: dict[str, Task], classifier: ClassifierHeader | None, who: str | None, *, longest: int = 1 << 22
) -> list[NewExample]:
    """The examples of a JSONL body, with the numbers of their lines. What could not be asked, because it has more than
    `longest` bytes, cannot be learned. Raises InvalidLine for the first wrong one."""
    new, room = [], _UNFOLDED
    for number, line in enumerate(body.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            if len(line) > longest:
                raise InvalidRequest(f"it is longer than {longest} bytes, {_WRITTEN} times serve.max_body")
            example = validate(line, ExampleLine)
            if classifier is None:
                room -= _unfolded(example)
                if room < 0:
                    raise InvalidRequest(
                        "every answer of a conversation is an example with all that was said before it, and up to here"
                        f" that is more than {_UNFOLDED >> 20} MiB; split the file, or the conversation"
                    )
                new += _examples(example, known, number, who)
            else:
                new.append(_classified(example, classifier, number, who))
        except InvalidRequest as error:
            raise InvalidLine(number, str(error)) from None
    return new


def _examples(line: ExampleLine, known: dict[str, Task], number: int, who: str | None) -> list[NewExample]:
    """The example of a line; of a conversation one for each answer in it."""
    name = line.task or "default"
    task = known.get(name)
    if line.input is not None or line.png is not None:
        raise InvalidRequest("arrays and images are for a classifier; this is a language model")
    prompt = (task.prompt if task else None) or "{text}"  # a task without a prompt is asked the text as it is

    def example(input: dict[str, Any], kind: str, target: str) -> NewExample:
        text = line.text if line.text is not None else input_text(input, prompt)
        return NewExample(task=name, kind=kind, input=input, target=target, line=number, author=who, text=text)

    fields = _asked(line)
    if line.is_conversation:
        messages = line.messages or []
        parts = answers(plain(messages), [message.weight for message in messages])
        if not parts:
            raise InvalidRequest("no message of the assistant's is to be learned from")
        inputs = [({"messages": before, **fields}, message) for before, message in parts]
        return [example(input, *target_of(message, input)) for input, message in inputs]
    if line.text is not None:
        input = {"messages": [{"role": "user", "content": prompt.replace("{text}", line.text)}], **fields}
    elif line.messages is not None:
        input = {"messages": plain(line.messages), **fields}
    else:
        input = {"prompt": line.prompt, **{k: v for k, v in fields.items() if k in ("response_format", "grammar")}}
        if line.special:
            input["special"] = True
    if isinstance(line.label, str):
        return [example(input, "label", line.label)]
    if line.chosen is not None and line.rejected is not None:
        _check_free(task)
        return [example(input, *pair_of(_answer(line.chosen), _answer(line.rejected), input))]
    if line.completion is not None and (line.label is not None or line.score is not None):
        _check_free(task)
        how = {"good": line.label} if line.score is None else {"score": line.score}
        return [example(input, *judged(_answer(line.completion), how, input))]
    if isinstance(line.completion, list):
        return [example(input, *target_of(line.completion[0].plain(), input))]
    return [example(input, "demonstration", line.completion or "")]


def _unfolded(line: ExampleLine) -> int:
    """Characters of the inputs that a conversation becomes."""
    if not line.is_conversation:
        return 0
    messages = line.messages or []
    return unfolded(plain(messages), [message.weight for message in messages], _asked(line))


def _check_free(task: Task | None) -> None:
    """Raises InvalidRequest."""
    if task is not None and (task.choices or task.open):
        raise InvalidRequest("pairs and judged answers are for free text; the answers of this task are labels")


def _answer(answer: str | list[Message]) -> str | dict[str, Any]:
    return answer if isinstance(answer, str) else answer[0].plain()


def _asked(line: ExampleLine) -> dict[str, Any]:
    """What a request's input has besides its messages."""
    fields = tools_input(line.tools or [], line.tool_choice, line.parallel_tool_calls)
    if line.response_format is not None and line.response_format.type != "text":
        fields["response_format"] = line.response_format.model_dump(by_alias=True, exclude_none=True)
    if line.grammar is not None:
        fields["grammar"] = line.grammar
    return {**fields, "chat_template_kwargs": line.chat_template_kwargs} if line.chat_template_kwargs else fields


def _classified(line: ExampleLine, classifier: ClassifierHeader, number: int, who: str | None) -> NewExample:
    if not isinstance(line.label, str):
        raise InvalidRequest("a classifier learns from labels")
    if line.input is not None:
        input = of_lists(line.input, classifier.network.input)
    elif line.png is not None:
        input = {"png": line.png}
    else:
        raise InvalidRequest("a classifier's examples have an input (nested lists of numbers) or a png (base64)")
    return NewExample(
        task=line.task or CLASSIFY_TASK, kind="label", input=input, target=line.label, line=number, author=who
    )
