"""What is computed in a slot by itself: the likelihoods of choices, and embeddings."""

from collections.abc import Sequence

from agentd.engine.choosing import Choosing
from agentd.engine.chunks import common_length
from agentd.engine.decoder import Decoder
from agentd.engine.jobs import Job, Slot
from agentd.engine.pooling import ROWS, MeanPooling
from agentd.engine.protocol import Piece
from agentd.engine.weight_registry import W

_ROWS = 16  # of logits that a choice's tokens take at once: a row is 600 kB where a vocabulary has 150,000 tokens


def pool(context: Decoder[W], slot: Slot[W], job: Job[W], pooling: MeanPooling) -> Piece | None:
    """Takes the next tokens of what is to be embedded in; after the last, its piece. Raises AgentdError."""
    start = len(slot.tokens)
    chunk = job.prompt[start : start + ROWS]
    context.use(job.adapters)
    pooling.add(context.hidden(chunk, start, slot.sequence))
    slot.tokens = slot.tokens + chunk
    if len(slot.tokens) < len(job.prompt):
        return None
    vector = pooling.vector()
    context.forget(slot.sequence)  # no conversation begins with it: its slot is the next one to be taken
    slot.cut(0)
    n, revision = len(job.prompt), job.revision
    return Piece(job.request.key, finish="stop", embedding=vector, prompt_tokens=n, revision=revision)


def advance(context: Decoder[W], slot: Slot[W], job: Job[W], choosing: Choosing, answer: Sequence[int]) -> None:
    """Computes an answer whose likelihood is wanted."""
    context.use(job.adapters)
    fed = list(answer[:-1])  # the last token is predicted, never fed
    n = common_length(slot.tokens[len(job.prompt) :], fed)
    rewind(context, slot, len(job.prompt) + n)
    for start in range(n, len(fed), _ROWS):
        chunk = fed[start : start + _ROWS]
        at = len(slot.tokens)
        rows = range(len(chunk))
        context.decode(chunk, range(at, at + len(chunk)), [(slot.sequence,)] * len(chunk), rows)
        slot.tokens = slot.tokens + chunk
        for row in rows:
            choosing.observe(tuple(fed[: start + row + 1]), context.logits(row))


def rewind(context: Decoder[W], slot: Slot[W], n: int) -> None:
    """Cuts a sequence back to its first `n` tokens, or computes those again where its cache cannot be cut."""
    if n == len(slot.tokens):
        return
    tokens = slot.tokens[:n]
    if context.reuses:
        context.forget(slot.sequence, n)
        slot.cut(n)
        return
    context.forget(slot.sequence)
    slot.cut(0)
    while len(slot.tokens) < n:
        start = len(slot.tokens)
        chunk = tokens[start : context.boundaries.after(start)]
        context.decode(chunk, range(start, start + len(chunk)), [(slot.sequence,)] * len(chunk), [])
        slot.tokens = slot.tokens + chunk
