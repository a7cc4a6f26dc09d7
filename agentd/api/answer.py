"""One answer of a language model, from the request's body to its record and its forms in the OpenAI API."""

import contextlib
import json
import logging
import time
from collections.abc import AsyncGenerator
from concurrent.futures import Future
from contextlib import aclosing
from typing import Any

from agentd.api.schemas import Completion
from agentd.api.services import Services
from agentd.engine.protocol import Generate, Piece, Sampling
from agentd.errors import AgentdError, InvalidRequest, NotALanguageModel, UnknownModel
from agentd.ids import now, uuid7
from agentd.store import inferences, tasks
from agentd.store.inferences import Inference

logger = logging.getLogger(__name__)


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
    ) -> None:
        if s.model.classifier:
            raise NotALanguageModel(s.model_name)
        if body.model not in (None, "default", s.model_name):
            raise UnknownModel(body.model, s.model_name)
        self._services, self.body, self._input, self._kind = s, body, input, kind
        self._author = author
        self._logprobs, self._max_tokens = logprobs, max_tokens or s.config.serve.max_tokens
        self.id = ("chatcmpl-" if kind == "chat" else "cmpl-") + uuid7()
        self._created, self._created_at, self._start = int(time.time()), now(), time.perf_counter()
        self._task = (body.metadata or {}).get("task")
        self.text, self.last = "", Piece("")
        self.finish: str | None = None
        self._ttft: float | None = None
        self._logprob_list: list[dict[str, Any]] = []
        self._offset = 0
        self._recorded: bool | None = None

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """The engine's pieces; the last one is given on only when the inference is recorded."""
        stream = self._services.supervisor.generate(await self._request())
        try:
            async with aclosing(stream) as pieces:
                async for piece in pieces:
                    if self._ttft is None:
                        self._ttft = 1e3 * (time.perf_counter() - self._start)
                    self.text, self.last = self.text + piece.text, piece
                    self._logprob_list += piece.logprobs
                    if piece.finish:
                        self.finish = piece.finish
                        await self.record()
                    yield piece
        except AgentdError:
            self._record_part("error")
            raise
        finally:
            self._record_part("cancelled")

    async def record(self) -> None:
        """Stores the inference. A full disk must not keep the device from answering, so the answer says so instead."""
        try:
            self._recorded = True
            await self._services.store.call(inferences.record, self._inference(self.finish or "cancelled"))
        except AgentdError as error:
            logger.error("inference %s was not recorded: %s", self.id, error)
            self._recorded = False

    def _record_part(self, finish: str) -> None:
        """Stores an answer that broke off: what the client saw of it may still get feedback."""
        if self._ttft is None or self._recorded is not None:
            return
        self._recorded = True

        def look(future: "Future[None]") -> None:
            if error := future.exception():
                logger.error("inference %s was not recorded: %s", self.id, error)

        with contextlib.suppress(AgentdError):  # the store is closed already
            self._services.store.submit(inferences.record, self._inference(finish)).add_done_callback(look)

    def whole(self) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": 0,
            "finish_reason": self.finish,
            "logprobs": self._logprob_json(self._logprob_list),
        }
        if self._kind == "chat":
            choice["message"] = {"role": "assistant", "content": self.text, "refusal": None}
        else:
            choice["text"] = self.text
        kind = "chat.completion" if self._kind == "chat" else "text_completion"
        return {**self._head(kind), "choices": [choice], "usage": self._usage(), "agentd": self._agentd()}

    def chunk(self, piece: Piece, first: bool) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": 0,
            "finish_reason": piece.finish,
            "logprobs": self._logprob_json(piece.logprobs) if piece.logprobs else None,
        }
        if self._kind == "chat":
            delta = {"role": "assistant", "content": piece.text} if first else {"content": piece.text}
            choice["delta"] = delta if piece.text or first else {}
        else:
            choice["text"] = piece.text
        kind = "chat.completion.chunk" if self._kind == "chat" else "text_completion"
        chunk = {**self._head(kind), "choices": [choice], "agentd": self._agentd()}
        if self.body.stream_options and self.body.stream_options.include_usage:
            chunk["usage"] = None
        return chunk

    def usage_chunk(self) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._kind == "chat" else "text_completion"
        return {**self._head(kind), "choices": [], "usage": self._usage(), "agentd": self._agentd()}

    async def _request(self) -> Generate:
        body = self.body
        choices = tuple(body.choices or ())
        form = body.response_format
        grammar = "json" if form and form.type == "json_object" else body.grammar
        schema = json.dumps(form.json_schema.schema_) if form and form.json_schema else None
        if self._task and not (choices or grammar or schema):
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
        given = {
            "temperature": body.temperature,
            "top_k": body.top_k,
            "top_p": body.top_p,
            "min_p": body.min_p,
            "seed": body.seed,
            "repeat_penalty": body.repeat_penalty,
            "frequency_penalty": body.frequency_penalty,
            "presence_penalty": body.presence_penalty,
        }
        sampling = Sampling(
            **{name: value for name, value in given.items() if value is not None},  # type: ignore[arg-type]  # checked above
            logit_bias=bias,
            grammar=grammar,
            json_schema=schema,
        )
        return Generate(
            key=self.id,
            input=self._input,
            sampling=sampling,
            max_tokens=self._max_tokens,
            stop=body.stops,
            logprobs=self._logprobs,
            choices=choices,
        )

    def _inference(self, finish: str) -> Inference:
        params = self.body.model_dump(exclude_none=True, exclude_defaults=True, exclude={"messages", "prompt", "model"})
        return Inference(
            id=self.id,
            created_at=self._created_at,
            revision=self.last.revision,
            kind=self._kind,
            task=self._task,
            input=self._input,
            output=self.text,
            params=params,
            finish_reason=finish,
            prompt_tokens=self.last.prompt_tokens,
            completion_tokens=self.last.completion_tokens,
            ttft_ms=self._ttft,
            latency_ms=1e3 * (time.perf_counter() - self._start),
            author=self._author,
        )

    def _head(self, kind: str) -> dict[str, Any]:
        name = self._services.model_name
        return {
            "id": self.id,
            "object": kind,
            "created": self._created,
            "model": name,
            "system_fingerprint": f"r{self.last.revision}",
        }

    def _agentd(self) -> dict[str, Any]:
        about: dict[str, Any] = {"revision": self.last.revision}
        return about if self._recorded is not False else {**about, "recorded": False}

    def _usage(self) -> dict[str, Any]:
        prompt, completion = self.last.prompt_tokens, self.last.completion_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": self.last.cached_tokens},
        }

    def _logprob_json(self, entries: list[dict[str, Any]]) -> dict[str, Any] | None:
        if self._logprobs is None:
            return None
        if self._kind == "chat":
            return {"content": entries, "refusal": None}
        offsets = []
        for entry in entries:
            offsets.append(self._offset)
            self._offset += len(entry["token"])
        return {
            "tokens": [entry["token"] for entry in entries],
            "token_logprobs": [entry["logprob"] for entry in entries],
            "top_logprobs": [{top["token"]: top["logprob"] for top in entry["top_logprobs"]} for entry in entries],
            "text_offset": offsets,
        }
