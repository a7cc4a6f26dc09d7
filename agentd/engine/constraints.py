"""What an answer may be, token by token: JSON, JSON schemas and grammars, by llguidance, for every engine's vocabulary.

Constraints are compiled by a thread of their own, within bounds of size, time and memory; serving goes on meanwhile.
A mask costs microseconds (median 3 to 126 for schemas of up to 100 tools on 49,152 tokens), and at most what `_LIMITS`
allow; a thread of its own computes it while tokens are decoded, and a request whose mask is not there yet holds up
nobody else.
"""

import contextlib
import json
import queue
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from typing import Any

import llguidance
import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from agentd.engine import json_schema
from agentd.engine.calls.answer_plan import AnswerPlan
from agentd.engine.calls.watch import TriggerWatch
from agentd.engine.gbnf import to_lark
from agentd.engine.prompts import Prompts
from agentd.engine.protocol import Sampling
from agentd.errors import AgentdError, ConstraintTooComplex, InvalidRequest

_LIMITS = LLParserLimits(
    initial_lexer_fuel=2_000_000,  # 40 ms
    step_lexer_fuel=200_000,  # 14 ms
    step_max_items=50_000,  # 2.5 ms
    max_items_in_row=2_000,
    max_lexer_states=20_000,  # of up to 2 kB each
    max_grammar_size=200_000,
    precompute_large_lexemes=False,
    verbose_errors=False,
)
_SECONDS = 0.8  # that compiling may take; a client has its 400 within a second
_STUCK = 3  # threads that may still be at work on what took too long, before constraints are refused
_MASKS = 8  # that are computed at once
_MATCHERS = 8  # of the last grammars, which are ready at once when they are asked for again
_STACK = 64 << 20  # bytes of a compiling thread's stack, in which the nesting of a grammar ends up
_TOO_COMPLEX = ("ParserTooComplex", "LexerTooComplex")

_LISTING = re.compile(r"\n\s*\d+ \|")

Tokens = npt.NDArray[np.int64]


class Constraint:
    """The state of one answer, for one thread. `masks` computes them in the background, where there is such."""

    def __init__(self, matcher: LLMatcher, n_vocab: int, masks: ThreadPoolExecutor | None = None) -> None:
        self._matcher, self._n_vocab, self._masks = matcher, n_vocab, masks
        self._mask = np.zeros((n_vocab + 31) // 32, dtype=np.int32)
        self._coming: Future[Tokens] | None = None

    def prepare(self) -> None:
        """Begins to find out what may come next."""
        if self._masks is not None and self._coming is None:
            self._coming = self._masks.submit(self._compute)

    def ready(self, timeout: float) -> bool:
        """Whether `allowed` answers at once, now or within so many seconds."""
        return self._coming is None or not wait_for([self._coming], timeout).not_done

    def allowed(self) -> Tokens | None:
        """The tokens that may come next, never none; None where all may. Raises ConstraintTooComplex."""
        if self._coming is None:
            return self._compute()
        coming, self._coming = self._coming, None
        return coming.result()

    def _compute(self) -> Tokens:
        self._matcher.unsafe_compute_mask_ptr(self._mask.ctypes.data, self._mask.nbytes)
        bits = np.unpackbits(self._mask.view(np.uint8), bitorder="little", count=self._n_vocab)
        tokens = np.flatnonzero(bits)
        if self._matcher.is_error() or not len(tokens):
            raise ConstraintTooComplex(_reason(self._matcher))
        return tokens

    def take(self, token: int) -> int:
        """Goes on with a token that was allowed, or with the one returned in its place. Raises ConstraintTooComplex."""
        if not self._matcher.consume_token(token):
            raise ConstraintTooComplex(_reason(self._matcher))
        self.prepare()
        return token


class CallConstraint(Constraint):
    """Constrains an answer from the moment that it opens a call; `visible` are the bytes of a token."""

    def __init__(
        self,
        matcher: LLMatcher,
        tokenizer: LLTokenizer,
        plan: AnswerPlan,
        visible: Callable[[int], bytes],
        masks: ThreadPoolExecutor | None,
    ) -> None:
        super().__init__(matcher, tokenizer.vocab_size, masks)
        self._tokenizer, self._controls, self._visible = tokenizer, plan.controls, visible
        calls = plan.form.calls
        self._watch: TriggerWatch | None = TriggerWatch(
            plan.triggers, calls.anchored, plan.form.reasoning, plan.thinking
        )
        self._forced: list[int] = []

    def prepare(self) -> None:
        if self._watch is None:
            super().prepare()

    def allowed(self) -> Tokens | None:
        if self._forced:
            return np.array(self._forced[:1])
        return None if self._watch is not None else super().allowed()

    def take(self, token: int) -> int:
        if self._forced:
            return self._forced.pop(0)
        if self._watch is None:
            return super().take(token)
        data = self._visible(token)
        opened = self._watch.feed(data)
        if opened is None:
            return token
        trigger, behind = opened
        self._watch = None
        if not self._matcher.consume_tokens(self._tokens(trigger.decode())):
            raise ConstraintTooComplex(_reason(self._matcher))
        rest = self._tokenizer.tokenize_bytes(behind) if behind else []
        if not rest or self._matcher.validate_tokens(rest) == len(rest):
            self._matcher.consume_tokens(rest)
            self.prepare()
            return token
        # A part of the token cannot follow: it is cut where the trigger ends.
        token, *self._forced = self._tokenizer.tokenize_bytes(data[: len(data) - len(behind)])
        return token

    def _tokens(self, text: str) -> list[int]:
        tokens: list[int] = []
        if not self._controls:
            return self._tokenizer.tokenize_str(text)
        for part in re.split("(" + "|".join(map(re.escape, self._controls)) + ")", text):
            if part in self._controls:
                tokens.append(self._controls[part])
            elif part:
                tokens += self._tokenizer.tokenize_str(part)
        return tokens


class Compilation:
    """A constraint on its way; `done` is set when `result` can be had."""

    def __init__(self, sampling: Sampling, plan: AnswerPlan | None) -> None:
        self.sampling, self.plan, self.done = sampling, plan, threading.Event()
        self._constraint: Constraint | None = None
        self._error: AgentdError | None = None

    def result(self) -> Constraint:
        """Raises InvalidRequest for what cannot be a constraint."""
        if self._error is not None:
            raise self._error
        assert self._constraint is not None
        return self._constraint

    def finish(self, outcome: Constraint | AgentdError) -> None:
        """The first outcome counts."""
        if not self.done.is_set():
            if isinstance(outcome, Constraint):
                self._constraint = outcome
            else:
                self._error = outcome
            self.done.set()


class Compiler:
    """Compiles one constraint after the other, for a vocabulary that it reads when the first one is asked for."""

    def __init__(self, vocabulary: Prompts) -> None:
        self._vocabulary = vocabulary
        self._tokenizer: LLTokenizer | None = None
        self._worker: _Worker | None = None
        self._stuck: list[_Worker] = []
        self._masks = ThreadPoolExecutor(_MASKS, "masks")
        self._reading = threading.RLock()  # by who reads the vocabulary, which `close` ends
        self._closed = False
        self._matchers: dict[str, LLMatcher] = {}  # by grammar, the one used last at the end

    def submit(self, sampling: Sampling, plan: AnswerPlan | None = None) -> Compilation:
        """Begins to compile what `sampling` asks for, and `plan` where there is one. Raises InvalidRequest where
        too much is being compiled."""
        self._stuck = [worker for worker in self._stuck if worker.is_alive()]
        if len(self._stuck) >= _STUCK:
            raise ConstraintTooComplex("others that are too complex are still being compiled; try again later")
        if self._worker is None:
            self._worker = _Worker(self)
        compilation = Compilation(sampling, plan)
        self._worker.jobs.put(compilation)
        return compilation

    def watch(self) -> None:
        """Gives up on what has been compiled for too long, and lets another thread do the rest."""
        worker = self._worker
        if worker is None or (current := worker.current) is None:
            return
        compilation, since = current
        if time.monotonic() - since < _SECONDS:
            return
        compilation.finish(ConstraintTooComplex(f"it takes more than {_SECONDS:g} s to compile"))
        self._worker, rest = _Worker(self), worker.jobs
        self._stuck.append(worker)
        with contextlib.suppress(queue.Empty):
            while True:
                if waiting := rest.get_nowait():
                    self._worker.jobs.put(waiting)
        rest.put(None)

    def prepare(self) -> LLTokenizer:
        """Reads the vocabulary, which takes its time once."""
        with self._reading:
            if self._tokenizer is None:
                if self._closed:
                    raise ConstraintTooComplex("the model is being unloaded")
                self._tokenizer = _tokenizer(self._vocabulary, self._tokenize)
            return self._tokenizer

    def _tokenize(self, text: str) -> list[int] | None:
        """The model's own tokens, for any thread; None after `close`."""
        with self._reading:
            return None if self._closed else self._vocabulary.tokenize(text)

    def compile(self, sampling: Sampling, plan: AnswerPlan | None = None) -> Constraint:
        """In the caller's thread. Raises InvalidRequest."""
        n_vocab, param, what = self._vocabulary.size, "response_format", "JSON schema"
        whole = True
        if plan is not None:
            schema = json_schema.parse(sampling.json_schema) if sampling.json_schema is not None else None
            if sampling.grammar == "json":
                schema = {"type": "object"}
            text, whole = plan.grammar(schema)
            grammar = LLMatcher.grammar_from_lark(text)
            if plan.use.tools:
                param, what = "tools", "tools' schemas"
        elif sampling.json_schema is not None:
            grammar = _of_schema(json_schema.parse(sampling.json_schema))
        elif sampling.grammar == "json":
            grammar = _of_schema({"type": "object"})
        else:
            param = what = "grammar"
            grammar = LLMatcher.grammar_from_lark(to_lark(sampling.grammar or "", n_vocab))
        try:
            matcher = self._matcher(grammar, param, what)
        except InvalidRequest as error:
            raise self._of_one_tool(plan) or error from None
        if plan is not None and not whole:
            return CallConstraint(matcher, self.prepare(), plan, self._vocabulary.visible, self._masks)
        return Constraint(matcher, self.prepare().vocab_size, self._masks)

    def _of_one_tool(self, plan: AnswerPlan | None) -> InvalidRequest | None:
        """What is wrong with the parameters of a tool, where one of them alone cannot be compiled."""
        if plan is None:
            return None
        for name, parameters in plan.use.parameters.items():
            lenient = name not in plan.use.strict
            schema = json.dumps(json_schema.sound(parameters or {}))
            grammar = LLMatcher.grammar_from_json_schema(schema, overrides={"lenient": lenient})
            probe = LLMatcher(self.prepare(), grammar, log_level=0, limits=_LIMITS)
            if probe.is_error():
                return InvalidRequest(f"tools: the parameters of {name!r}: {_reason(probe)}", param="tools")
        return None

    def _matcher(self, grammar: str, param: str, what: str) -> LLMatcher:
        """A matcher at the beginning of its grammar; those of the last few grammars are copied."""
        known = self._matchers.pop(grammar, None)
        if known is None:
            tokenizer = self.prepare()
            known = LLMatcher(tokenizer, grammar, log_level=0, limits=_LIMITS)
            if known.is_error():
                raise InvalidRequest(f"cannot use this {what}: {_reason(known)}", param=param)
            try:
                Constraint(known, tokenizer.vocab_size).allowed()  # what is too complex at once is no answer's fault
            except ConstraintTooComplex:
                if known.stop_reason() in _TOO_COMPLEX:
                    raise
                raise InvalidRequest(f"cannot use this {what}: nothing satisfies it", param=param) from None
        self._matchers[grammar] = known
        if len(self._matchers) > _MATCHERS:
            self._matchers.pop(next(iter(self._matchers)))
        return known.deep_copy()

    def close(self) -> None:
        """After it the vocabulary may be freed: threads may go on for a while, but read it no more."""
        with self._reading:
            self._closed = True
        if self._worker is not None:
            self._worker.jobs.put(None)
        self._masks.shutdown(wait=False, cancel_futures=True)


class _Worker(threading.Thread):
    def __init__(self, compiler: Compiler) -> None:
        super().__init__(name="constraints", daemon=True)
        self.jobs: queue.SimpleQueue[Compilation | None] = queue.SimpleQueue()
        self.current: tuple[Compilation, float] | None = None
        self._compiler = compiler
        before = threading.stack_size(_STACK)
        try:
            self.start()
        finally:
            threading.stack_size(before)

    def run(self) -> None:
        while (compilation := self.jobs.get()) is not None:
            try:
                self._compiler.prepare()
                self.current = compilation, time.monotonic()
                compilation.finish(self._compiler.compile(compilation.sampling, compilation.plan))
            except AgentdError as error:
                compilation.finish(error)
            except BaseException as error:  # llguidance panics with what is no Exception
                sampling, plan = compilation.sampling, compilation.plan
                param = "tools" if plan is not None and plan.use.tools else "response_format"
                param = "grammar" if sampling.grammar not in (None, "json") else param
                reason = error if isinstance(error, Exception) else "it cannot be compiled"
                compilation.finish(InvalidRequest(f"cannot use this constraint: {reason}", param=param))
            self.current = None


def _of_schema(schema: Any) -> str:
    """llguidance's grammar of a JSON schema."""
    return LLMatcher.grammar_from_json_schema(
        json.dumps(schema), overrides={"whitespace_pattern": json_schema.WHITESPACE, "lenient": False}
    )


class _Vocabulary:
    """A vocabulary as llguidance reads it. Control tokens are marked, so that no text is ever made of them."""

    bos_token_id = None

    def __init__(self, vocabulary: Prompts, tokenize: Callable[[str], list[int] | None]) -> None:
        self._tokenize = tokenize
        self.eos_token_id = vocabulary.end
        self.special_token_ids: list[int] = []
        self.ends: list[int] = []
        self.tokens: list[bytes] = []
        for token in range(vocabulary.size):
            data, is_end = vocabulary.piece(token), vocabulary.is_end(token)
            if is_end:
                self.ends.append(token)
            if is_end or not data:
                self.special_token_ids.append(token)
                data = b"\xff" + (vocabulary.piece(token, special=True) or f"<[{token}]>".encode())
            self.tokens.append(data)
        self._numbers = {data: token for token, data in enumerate(self.tokens) if not data.startswith(b"\xff")}
        self._longest = max(map(len, self._numbers), default=0)

    def __call__(self, text: bytes) -> list[int]:
        """Tokens of a text that must come: the model's own, where they are that text and nothing besides."""
        with contextlib.suppress(UnicodeDecodeError):
            tokens = self._tokenize(text.decode())
            if tokens is not None and b"".join(self.tokens[token] for token in tokens) == text:
                return tokens
        return self._longest_first(text)

    def _longest_first(self, text: bytes) -> list[int]:
        tokens, at = [], 0
        while at < len(text):
            for end in range(min(len(text), at + self._longest), at, -1):
                if (token := self._numbers.get(text[at:end])) is not None:
                    tokens.append(token)
                    at = end
                    break
            else:
                break  # no token has this byte
        return tokens


def _tokenizer(vocabulary: Prompts, tokenize: Callable[[str], list[int] | None]) -> LLTokenizer:
    adapted = _Vocabulary(vocabulary, tokenize)
    ends = adapted.ends if vocabulary.end in adapted.ends else [vocabulary.end, *adapted.ends]
    return LLTokenizer(llguidance.TokenizerWrapper(adapted), n_vocab=vocabulary.size, eos_token=ends)


def _reason(matcher: LLMatcher) -> str:
    """llguidance's reason in one line, without the listing and the state that it adds for its authors."""
    text = matcher.get_error() or f"nothing can follow here ({matcher.stop_reason()})"
    text = text.partition("<state>")[0].partition("<backtrace>")[0]
    if text.startswith("panic:"):
        return "it cannot be compiled"
    return " ".join(_LISTING.split(text)[0].split())[:300]
