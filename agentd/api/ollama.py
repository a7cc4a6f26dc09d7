"""Ollama's API over the same internal request: /api/chat, generate, embed, and what there is to say of the model.

One model is served and always loaded, so `keep_alive` and loading by an empty prompt are answered and change nothing.
Answers have `agentd` besides, with an id for feedback and the revision that answered.
"""

import json
import time
from collections import Counter
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from datetime import datetime, timezone
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, RedirectResponse, Response

from agentd import __version__
from agentd.api.access import author
from agentd.api.answer import Answer
from agentd.api.embeddings import embedded
from agentd.api.lenient import Lenient
from agentd.api.ollama_body import OllamaChat, OllamaEmbed, OllamaEmbeddings, OllamaGenerate, OllamaShow
from agentd.api.requests import episode, ignored_fields, parse, refuse_unknown
from agentd.api.schemas import ChatCompletion, TextCompletion
from agentd.api.services import Services, services
from agentd.api.streaming import First, LineStream, all_of, one_line
from agentd.engine.protocol import Piece
from agentd.errors import AgentdError, UnknownModel
from agentd.formats.gguf_header import Header

_SPOKEN = "0.12.0"  # the version of Ollama's API; some clients ask for one that is new enough
_NEVER = "2318-01-01T00:00:00Z"  # when the model goes; Ollama's own word for keep_alive -1 is about that
_TAG = ":latest"
Tree = dict[str, Any]


async def chat(request: Request) -> Response:
    s = services(request)
    body = await parse(request, OllamaChat, s.config.serve.max_body)
    refuse_unknown(body, s.config.serve.strict)
    name = resolve(s, body.model)
    if not body.messages:
        return _loaded(body, name, {"message": {"role": "assistant", "content": ""}}, body.unloads)
    return await _answer(request, s, body, body.chat(), name)


async def generate(request: Request) -> Response:
    s = services(request)
    body = await parse(request, OllamaGenerate, s.config.serve.max_body)
    refuse_unknown(body, s.config.serve.strict)
    name = resolve(s, body.model)
    if not body.prompt:
        return _loaded(body, name, {"response": ""}, body.unloads)
    return await _answer(request, s, body, body.completion(), name)


async def embed(request: Request) -> Response:
    s = services(request)
    body = await parse(request, OllamaEmbed, s.config.serve.max_body)
    refuse_unknown(body, s.config.serve.strict)
    name, begin = resolve(s, body.model), time.perf_counter()
    texts = [body.input] if isinstance(body.input, str) else body.input
    texts = [] if texts == [""] else texts
    pieces = await embedded(request, s, [{"prompt": text} for text in texts], body.dimensions) if texts else []
    answer = {
        "model": name,
        "embeddings": [piece.embedding for piece in pieces],
        "total_duration": _nanoseconds(time.perf_counter() - begin),
        "load_duration": 0,
        "prompt_eval_count": sum(piece.prompt_tokens for piece in pieces),
    }
    return JSONResponse(answer, headers=ignored_fields(body))


async def embeddings(request: Request) -> Response:
    s = services(request)
    body = await parse(request, OllamaEmbeddings, s.config.serve.max_body)
    refuse_unknown(body, s.config.serve.strict)
    resolve(s, body.model)
    pieces = await embedded(request, s, [{"prompt": body.prompt}], None) if body.prompt else []
    return JSONResponse({"embedding": pieces[0].embedding if pieces else []}, headers=ignored_fields(body))


async def tags(request: Request) -> Response:
    s = services(request)
    names = [s.model_name, *(name for name in s.config.serve.aliases if name != s.model_name)]
    about = {"modified_at": _time(s.model_created), "size": s.model.size, "digest": s.model.sha256}
    details = _details(s)
    return JSONResponse({"models": [{**_named(name), **about, "details": details} for name in names]})


async def ps(request: Request) -> Response:
    s = services(request)
    loaded = {
        **_named(s.model_name),
        "size": s.model.size,
        "digest": s.model.sha256,
        "details": _details(s),
        "expires_at": _NEVER,
        "size_vram": 0,
        "context_length": s.config.context,
    }
    return JSONResponse({"models": [loaded] if s.supervisor.ready else []})


async def show(request: Request) -> Response:
    s = services(request)
    body = await parse(request, OllamaShow, s.config.serve.max_body)
    name = resolve(s, body.model or body.name)
    info, metadata = s.supervisor.info, s.model.header.metadata if isinstance(s.model.header, Header) else {}
    architecture = s.model.header.architecture
    facts: Tree = {"general.architecture": architecture}
    if info is not None:
        facts |= {
            "general.parameter_count": info.n_params,
            f"{architecture}.block_count": info.n_layer,
            f"{architecture}.context_length": info.n_ctx_train,
            f"{architecture}.embedding_length": info.n_embd,
        }
    template = str(metadata.get("tokenizer.chat_template") or "")
    language = [] if s.model.classifier else ["completion", "tools", "embedding"]
    answer = {
        "modelfile": f"# served by agentd\nFROM {name}\n",
        "parameters": f"num_ctx {s.config.context}",
        "template": template,
        "license": str(metadata.get("general.license") or ""),
        "details": _details(s),
        "model_info": facts,
        "capabilities": [*language, *(["thinking"] if "think" in template else [])],
        "modified_at": _time(s.model_created),
    }
    return JSONResponse(answer, headers=ignored_fields(body))


async def version(request: Request) -> Response:
    return JSONResponse({"version": _SPOKEN, "agentd": __version__})


async def alive(request: Request) -> Response:
    """GET /: what Ollama's own command and many programs ask before all else, in Ollama's words. Who comes with a
    browser looks for the dashboard."""
    if request.app.state.door.has_admin and "text/html" in request.headers.get("accept", ""):
        return RedirectResponse("/ui/", 307, {"Vary": "Accept"})
    return PlainTextResponse("Ollama is running", headers={"Vary": "Accept"})


def resolve(s: Services, name: str | None) -> str:
    """The name under which the answer comes: as it was asked for, with its tag. Raises UnknownModel."""
    try:
        resolved = s.resolve(name)
    except UnknownModel:
        bare = (name or "").removesuffix(_TAG)
        if bare not in ("default", s.model_name, *s.config.serve.aliases):
            raise
        resolved = bare
    return name or resolved


async def _answer(
    request: Request,
    s: Services,
    body: OllamaChat | OllamaGenerate,
    inner: ChatCompletion | TextCompletion,
    name: str,
) -> Response:
    answer = Answer(
        s,
        inner,
        input=inner.input(),
        logprobs=body.alternatives,
        max_tokens=inner.max_tokens,
        kind="chat" if isinstance(inner, ChatCompletion) else "completion",
        author=author(request),
        episode=episode(request, body.metadata),
        traceparent=request.headers.get("traceparent"),
    )
    form = _Lines(answer, name, chat=isinstance(body, OllamaChat))
    pieces, headers = answer.pieces(), ignored_fields(body)
    if body.stream:
        first = await First.of(request, pieces)
        return LineStream(_lines(form, first, pieces), headers)
    await all_of(request, pieces)
    return JSONResponse(form.whole(), headers=headers)


async def _lines(
    form: "_Lines", first: First[Piece], pieces: AsyncGenerator[Piece, None]
) -> AsyncGenerator[bytes, None]:
    """A line of JSON for every piece, and one at the end; an error in the middle is a line, too. While the prompt is
    read, lines that say nothing tell that it goes on."""
    try:
        async with aclosing(first.comments()) as comments:
            async for _ in comments:
                yield form.nothing()
        for line in form.of(first.result()):
            yield line
        async for piece in pieces:
            for line in form.of(piece):
                yield line
    except AgentdError as error:
        yield _line({"error": str(error)})
    finally:
        await pieces.aclose()


class _Lines:
    """The forms of one answer."""

    def __init__(self, answer: Answer, name: str, *, chat: bool) -> None:
        self._answer, self._name, self._chat = answer, name, chat
        self._calls = 0  # that have been sent

    def whole(self) -> Tree:
        reply = self._answer.reply
        said = self._said(reply.text, reply.reasoning, _complete(reply.calls), self._answer.logprobs)
        return {**self._head(), **said, **self._end()}

    def nothing(self) -> bytes:
        return _line({**self._head(), **self._said("", "", [], []), "done": False})

    def of(self, piece: Piece) -> list[bytes]:
        """What there is to send of a piece. A call is sent whole: as soon as the next one begins, or all is said."""
        calls = self._answer.reply.calls if piece.finish else self._answer.reply.calls[:-1]
        ready, self._calls = _complete(calls[self._calls :]), max(self._calls, len(calls))
        lines = []
        if piece.text or piece.reasoning or ready or piece.logprobs:
            lines.append(
                {**self._head(), **self._said(piece.text, piece.reasoning, ready, piece.logprobs), "done": False}
            )
        if piece.finish:
            lines.append({**self._head(), **self._said("", "", [], []), **self._end()})
        return [_line(line) for line in lines]

    def _head(self) -> Tree:
        about = {"id": self._answer.id, **self._answer.agentd()}
        return {"model": self._name, "created_at": _time(time.time()), "agentd": about}

    def _said(self, text: str, reasoning: str, calls: list[Tree], logprobs: list[Tree]) -> Tree:
        beside: Tree = {"logprobs": logprobs} if logprobs else {}
        more: Tree = {"thinking": reasoning} if reasoning else {}
        if not self._chat:
            return {"response": text, **more, **beside}
        more |= {"tool_calls": calls} if calls else {}
        return {"message": {"role": "assistant", "content": text, **more}, **beside}

    def _end(self) -> Tree:
        """Times are in nanoseconds; up to the first token it is the prompt's."""
        answer, total = self._answer, self._answer.seconds
        first = answer.first_token_seconds
        reading = total if first is None else first
        return {
            "done": True,
            "done_reason": "length" if answer.finish == "length" else "stop",
            "total_duration": _nanoseconds(total),
            "load_duration": 0,
            "prompt_eval_count": answer.last.prompt_tokens,
            "prompt_eval_duration": _nanoseconds(reading),
            "eval_count": answer.last.completion_tokens,
            "eval_duration": _nanoseconds(total - reading),
        }


def _complete(calls: list[Tree]) -> list[Tree]:
    """Calls as Ollama has them, whose arguments are objects; one that was cut off is none."""
    whole = []
    for call in calls:
        try:
            arguments = json.loads(call["function"]["arguments"] or "{}")
        except ValueError:
            continue
        whole.append({"id": call["id"], "function": {"name": call["function"]["name"], "arguments": arguments}})
    return whole


def _loaded(body: Lenient, name: str, said: Mapping[str, Any], unloads: bool) -> Response:
    """What an empty request gets: it is there to have the model loaded."""
    reason = "unload" if unloads else "load"
    answer = {"model": name, "created_at": _time(time.time()), **said, "done": True, "done_reason": reason}
    return JSONResponse(answer, headers=ignored_fields(body))


def _named(name: str) -> Tree:
    tagged = name if ":" in name else name + _TAG
    return {"name": tagged, "model": tagged}


def _details(s: Services) -> Tree:
    header, info = s.model.header, s.supervisor.info
    sizes: Counter[str] = Counter()
    if isinstance(header, Header):
        for tensor in header.tensors:
            sizes[tensor.type] += tensor.size
    return {
        "parent_model": "",
        "format": "gguf" if isinstance(header, Header) else "safetensors",
        "family": header.architecture,
        "families": [header.architecture],
        "parameter_size": _size(info.n_params) if info else "",
        "quantization_level": sizes.most_common(1)[0][0] if sizes else "",
    }


def _size(parameters: int) -> str:
    """134.5M, 1.2B."""
    return f"{parameters / 1e9:.1f}B" if parameters >= 10**9 else f"{parameters / 1e6:.2f}M"


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, timezone.utc).isoformat().replace("+00:00", "Z")


def _nanoseconds(seconds: float) -> int:
    return max(0, int(1e9 * seconds))


def _line(data: Mapping[str, Any]) -> bytes:
    return one_line(data).encode() + b"\n"
