"""One answer of a language model, from the request's body to its record and its forms in the OpenAI API."""

import codecs
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from typing import Any

import anyio

from agentd.adapt.recall.turns import Recollection, recollect
from agentd.api.lenient import MAX_INTEGER
from agentd.api.schemas import Completion
from agentd.api.services import Services
from agentd.api.telemetry import Told
from agentd.engine.protocol import Generate, Piece, Sampling
from agentd.engine.reply import Reply, delta, with_function_call
from agentd.engine.response_format import FormatConstraint
from agentd.errors import AgentdError, InvalidRequest, NotALanguageModel
from agentd.ids import now, uuid7
from agentd.store import implicit, inferences, scores, tasks
from agentd.store.inferences import Inference

logger = logging.getLogger(__name__)

_PREFIXES = {"chat": "chatcmpl-", "completion": "cmpl-", "response": "resp_"}
_PATIENCE = 0.25  # seconds that a request waits for past corrections; a look-up takes some milliseconds
_NOTHING: Mapping[str, Any] = {}
_INPUT = (
    *("messages", "prompt", "tools", "tool_choice", "parallel_tool_calls", "functions", "function_call"),
    "chat_template_kwargs",
)


class Answer:
    """One request from its body to its record."""

    def __init__(
        self,
        s: Services,
        body: Completion,
        *,
        input: dict[str, Any],
        logprobs: int | None,
        max_tokens: int | None,
        kind: str,
        author: str | None,
        episode: str | None = None,
        about: Mapping[str, Any] = _NOTHING,
        traceparent: str | None = None,
    ) -> None:
        """`about` is stored with the parameters of the request; `traceparent` is its header of this name.

        Raises UnknownModel, NotALanguageModel.
        """
        if s.model.classifier:
            raise NotALanguageModel(s.model_name)
        self.model = s.resolve(body.model)
        self._services, self.body, self._input, self._kind = s, body, input, kind
        self._author, self._episode, self._about, self._traceparent = author, episode, about, traceparent
        limit = max_tokens or s.config.serve.max_tokens
        self._logprobs, self._max_tokens = logprobs, limit if limit > 0 else MAX_INTEGER
        self.id = _PREFIXES[kind] + uuid7()
        self.created, self._created_at, self._start = int(time.time()), now(), time.perf_counter()
        self._task = (body.metadata or {}).get("task")
        self.reply, self.last = Reply(), Piece("")
        self.reasoning_tokens = 0
        self.finish: str | None = None
        self._ttft: float | None = None
        self._logprob_list: list[dict[str, Any]] = []
        self._offset, self._decoder = 0, codecs.getincrementaldecoder("utf-8")("replace")
        self._recorded: bool | None = None
        self._told = False
        self._begun = False  # whether the beginning of a stream was to be recorded
        self._unrecorded = False  # it could not be
        self._recollection: Recollection | None = None  # None: nothing was looked up

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """The engine's pieces; the last one is given on only when the inference is recorded."""
        self._observe()
        stream = self._services.supervisor.generate(await self._request())
        try:
            async with aclosing(stream) as pieces:
                async for piece in pieces:
                    if self._ttft is None:
                        self._ttft = 1e3 * (time.perf_counter() - self._start)
                    self.reply.add(piece)
                    self.last = piece
                    if piece.reasoning:
                        self.reasoning_tokens = piece.completion_tokens
                    self._logprob_list += piece.logprobs
                    if piece.finish:
                        self.finish = piece.finish
                        seconds = time.perf_counter() - self._start
                        self._services.traffic.observe(piece, self._ttft / 1e3, seconds)
                        self._tell()
                        await self.record()
                    elif self.body.stream and not self._begun and self.body.store is not False:
                        self._submit(inferences.STREAMING)  # whoever has the id may say something about it
                        self._begun = True
                    yield piece
        except AgentdError as error:
            self._record_part("error")
            self._tell(error.code)
            raise
        finally:
            self._record_part("cancelled")
            self._tell("cancelled")

    def _tell(self, error: str | None = None) -> None:
        """Once, how the answer ended, to whoever collects that."""
        telemetry = self._services.telemetry
        if telemetry is None or self._told:
            return
        self._told = True
        wanted = {name: getattr(self.body, name) for name in ("temperature", "top_p", "top_k", "seed")}
        telemetry.answered(
            Told(
                id=self.id,
                operation="text_completion" if self._kind == "completion" else "chat",
                model=self.model,
                last=self.last,
                finish=self.finish,
                seconds=self.seconds,
                first=self.first_token_seconds,
                error=error,
                task=self._task,
                episode=self._episode,
                parameters={**wanted, "max_tokens": self._max_tokens},
                traceparent=self._traceparent,
            )
        )

    def _observe(self) -> None:
        """What this request says about the answers before it, where that is wanted."""
        settings = self._services.config.feedback
        if settings.implicit and "messages" in self._input:
            with contextlib.suppress(AgentdError):
                self._services.store.submit(implicit.observe, self._input, self._author, settings.weights)

    async def record(self) -> None:
        """Stores the inference. A full disk must not keep the device from answering, so the answer says so instead."""
        if self.body.store is False:
            self._recorded = False
            return
        try:
            self._recorded = True
            inference = self._inference(self.finish or "cancelled")
            begun = self._begun and not self._unrecorded
            self._recorded = await self._services.store.call(scores.record, inference, begun)
        except AgentdError as error:
            logger.error("inference %s was not recorded: %s", self.id, error)
            self._recorded = False

    def _record_part(self, finish: str) -> None:
        """Stores an answer that broke off: what the client saw of it may still get feedback."""
        if self._ttft is None or self._recorded is not None or self.body.store is False:
            return
        self._recorded = True
        self._submit(finish)

    def _submit(self, finish: str) -> None:
        """Stores the inference as it is now, without waiting: what is done in the store later finds it there."""

        def look(future: "Future[bool]") -> None:
            if error := future.exception():
                self._unrecorded = True
                logger.error("inference %s was not recorded: %s", self.id, error)

        with contextlib.suppress(AgentdError):  # the store is closed already
            begun = self._begun and not self._unrecorded
            self._services.store.submit(scores.record, self._inference(finish), begun).add_done_callback(look)

    def whole(self) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": 0,
            "finish_reason": self._finish(self.finish),
            "logprobs": self._logprob_json(self._logprob_list),
        }
        if self._kind == "chat":
            choice["message"] = self._message(self.reply.message())
        else:
            choice["text"] = self.reply.text
        kind = "chat.completion" if self._kind == "chat" else "text_completion"
        return {**self._head(kind), "choices": [choice], "usage": self._usage(), "agentd": self.agentd()}

    def chunk(self, piece: Piece, first: bool) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": 0,
            "finish_reason": self._finish(piece.finish),
            "logprobs": self._logprob_json(piece.logprobs) if piece.logprobs else None,
        }
        if self._kind == "chat":
            choice["delta"] = self._message(delta(piece, first))
        else:
            choice["text"] = piece.text
        kind = "chat.completion.chunk" if self._kind == "chat" else "text_completion"
        chunk = {**self._head(kind), "choices": [choice], "agentd": self.agentd()}
        if self.body.stream_options and self.body.stream_options.include_usage:
            chunk["usage"] = None
        return chunk

    def usage_chunk(self) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._kind == "chat" else "text_completion"
        return {**self._head(kind), "choices": [], "usage": self._usage(), "agentd": self.agentd()}

    def _message(self, message: dict[str, Any]) -> dict[str, Any]:
        return with_function_call(message) if self.body.wants_function_call else message

    def _finish(self, reason: str | None) -> str | None:
        return "function_call" if reason == "tool_calls" and self.body.wants_function_call else reason

    async def _request(self) -> Generate:
        body = self.body
        choices = tuple(body.choices or ())
        form = body.response_format
        constraint = FormatConstraint.of(form.model_dump(by_alias=True) if form else None, body.grammar)
        grammar, schema = constraint.grammar, constraint.json_schema
        may_call = "tools" in self._input and self._input.get("tool_choice") != "none"
        if self._task and not (choices or grammar or schema or may_call):
            task = await self._services.store.call(tasks.find, self._task)
            if task and not task.open:
                choices = tuple(task.choices)
        try:
            bias = tuple((int(token), value) for token, value in (body.logit_bias or {}).items())
        except ValueError:
            raise InvalidRequest("logit_bias maps token numbers to values", param="logit_bias") from None
        info = self._services.supervisor.info
        if info and any(not 0 <= token < info.n_vocab for token, _ in bias):
            raise InvalidRequest(f"logit_bias names a token outside 0..{info.n_vocab - 1}", param="logit_bias")
        options = {
            "temperature": body.temperature,
            "top_k": body.top_k,
            "top_p": body.top_p,
            "min_p": body.min_p,
            "seed": body.seed,
            "repeat_penalty": body.repeat_penalty,
            "frequency_penalty": body.frequency_penalty,
            "presence_penalty": body.presence_penalty,
        }
        if choices and body.temperature is None:
            options["temperature"] = 0.0  # the best one: the same that the gate takes for the answer
        sampling = Sampling(
            **{name: value for name, value in options.items() if value is not None},  # type: ignore[arg-type]  # checked above
            logit_bias=bias,
            grammar=grammar,
            json_schema=schema,
        )
        await self._recall(choices, {"response_format": form and form.model_dump(by_alias=True, exclude_none=True)})
        return Generate(
            key=self.id,
            input=self._input,
            sampling=sampling,
            max_tokens=self._max_tokens,
            stop=body.stops,
            logprobs=self._logprobs,
            choices=choices,
            private=body.store is False,
            recalled=self._recollection.for_prompt(self._services.config.adapt.recall_tokens)
            if self._recollection
            else None,
        )

    async def _recall(self, choices: Sequence[str], form: dict[str, Any]) -> None:
        """Looks up past corrections for the prompt, where that is on. An answer does not wait for a store that is
        busy, nor fail with it."""
        k = self._services.recall.k(self._task, self.body.recall)
        if not k or self._task is None or "messages" not in self._input:
            return
        self._recollection = Recollection()
        tokens = self._services.config.adapt.recall_tokens
        task, input, grammar = self._task, self._input, self.body.grammar
        with contextlib.suppress(AgentdError), anyio.move_on_after(_PATIENCE):
            self._recollection = await self._services.store.call(
                lambda db: recollect(db, task, input, choices, k=k, tokens=tokens, form={**form, "grammar": grammar})
            )

    @property
    def recalled(self) -> list[str]:
        """Ids of the examples that stand in the prompt, the nearest first."""
        return list(self._recollection.ids[: self.last.recalled]) if self._recollection else []

    def _inference(self, finish: str) -> Inference:
        params = self.body.model_dump(
            by_alias=True,
            exclude_none=True,
            exclude_defaults=True,
            exclude={"model", *_INPUT, *(self.body.model_extra or ())},
        )
        return Inference(
            id=self.id,
            created_at=self._created_at,
            revision=self.last.revision,
            kind=self._kind,
            task=self._task,
            input=self._input,
            output=self.reply.text,
            reasoning=self.reply.reasoning,
            tool_calls=self.reply.calls,
            params={**params, **self._about, **self._counts()},
            finish_reason=finish,
            prompt_tokens=self.last.prompt_tokens,
            completion_tokens=self.last.completion_tokens,
            ttft_ms=self._ttft,
            latency_ms=1e3 * (time.perf_counter() - self._start),
            author=self._author,
            episode=self._episode,
            recalled=self.recalled,
        )

    def _counts(self) -> dict[str, int]:
        """What a stored response still says of its tokens."""
        if self._kind != "response":
            return {}
        return {"cached_tokens": self.last.cached_tokens, "reasoning_tokens": self.reasoning_tokens}

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": f"r{self.last.revision}",
        }

    @property
    def seconds(self) -> float:
        """Since the request came."""
        return time.perf_counter() - self._start

    @property
    def first_token_seconds(self) -> float | None:
        """What of these passed before the first token."""
        return None if self._ttft is None else self._ttft / 1e3

    @property
    def logprobs(self) -> list[dict[str, Any]]:
        """Of the tokens of the text, where they were asked for."""
        return self._logprob_list

    def agentd(self) -> dict[str, Any]:
        about: dict[str, Any] = {"revision": self.last.revision}
        if self._recollection is not None:
            about["recalled"] = self.recalled
        return about if self._recorded is not False else {**about, "recorded": False}

    def _usage(self) -> dict[str, Any]:
        prompt, completion = self.last.prompt_tokens, self.last.completion_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": self.last.cached_tokens},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
        }

    def _logprob_json(self, entries: list[dict[str, Any]]) -> dict[str, Any] | None:
        if self._logprobs is None:
            return None
        if self._kind == "chat":
            return {"content": entries, "refusal": None}
        offsets = []
        for entry in entries:
            offsets.append(self._offset)
            self._offset += len(self._decoder.decode(bytes(entry["bytes"])))
        return {
            "tokens": [entry["token"] for entry in entries],
            "token_logprobs": [entry["logprob"] for entry in entries],
            "top_logprobs": [{top["token"]: top["logprob"] for top in entry["top_logprobs"]} for entry in entries],
            "text_offset": offsets,
        }
