"""From the tokens of an answer to the pieces in which it is given out."""

from collections.abc import Callable
from typing import Any

from agentd.engine.calls.piece_reader import PieceReader
from agentd.engine.calls.reader import Delta
from agentd.engine.jobs import Job
from agentd.engine.logprobs import logprob
from agentd.engine.probabilities import Floats, log_probabilities
from agentd.engine.prompts import Prompts
from agentd.engine.protocol import Piece

NOTHING = Delta()


class Wording:
    def __init__(self, vocabulary: Prompts) -> None:
        self._vocabulary = vocabulary

    def of_token(
        self, job: Job[Any], token: int, logits: Callable[[], Floats], *, full: bool
    ) -> tuple[str, str | None, Delta]:
        """(text, finish, reasoning and calls) of the token that was just generated; `full` after it the context is."""
        if job.reader is not None:
            return self._read(job, job.reader, token, logits, full)
        finish, text = None, ""
        if self._vocabulary.is_end(token):
            finish, text = "stop", job.text.flush()
        else:
            self._note(job, token, logits)
            text = job.text.feed(self._vocabulary.piece(token))
            if job.text.stopped:
                finish = "stop"
            elif full or len(job.generated) >= job.request.max_tokens:
                finish, text = "length", text + job.text.flush()
        return text, finish, NOTHING

    def _read(
        self, job: Job[Any], reader: PieceReader, token: int, logits: Callable[[], Floats], full: bool
    ) -> tuple[str, str | None, Delta]:
        """The same where there is more than text in answers."""
        if self._vocabulary.is_end(token):
            delta = reader.flush()
            text = job.text.feed(delta.text.encode())
            return text + job.text.flush(), "tool_calls" if reader.called else "stop", delta
        if reader.speaking:
            self._note(job, token, logits)
        delta = reader.feed(token)
        text, finish = job.text.feed(delta.text.encode()), None
        if job.text.stopped:
            finish = "stop"
        elif full or len(job.generated) >= job.request.max_tokens:
            last = reader.flush(cut=True)
            text += job.text.feed(last.text.encode()) + job.text.flush()
            delta = Delta("", delta.reasoning + last.reasoning, delta.calls + last.calls)
            finish = "length"
        return text, finish, delta

    def _note(self, job: Job[Any], token: int, logits: Callable[[], Floats]) -> None:
        """Its log-probability, where that was asked for."""
        if job.request.logprobs is not None:
            entry = logprob(self._vocabulary, log_probabilities(logits()), token, job.request.logprobs)
            job.logprobs.append((job.text.decoded, entry))


def piece_of(job: Job[Any], text: str, finish: str | None, delta: Delta = NOTHING) -> Piece:
    """What came out, with the log-probabilities of the tokens whose text did: never of a stop string's."""
    whole = finish is not None and not job.text.stopped and job.reader is None
    sent = [entry for at, entry in job.logprobs if whole or at < job.text.released]
    job.logprobs = job.logprobs[len(sent) :]
    return Piece(
        key=job.request.key,
        text=text,
        reasoning=delta.reasoning,
        calls=delta.calls,
        finish=finish,
        revision=job.revision,
        prompt_tokens=len(job.prompt),
        cached_tokens=job.reused,
        completion_tokens=len(job.generated),
        recalled=job.n_recalled,
        logprobs=sent,
    )
