"""What an engine's own code must do for serving: compute tokens, and choose the next ones."""

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from agentd.engine.chunks import ChunkBoundaries
from agentd.engine.probabilities import Floats

W_contra = TypeVar("W_contra", contravariant=True)


class Decoder(Protocol[W_contra]):
    """What computes: `n_seq` sequences, each with a KV cache of its own."""

    @property
    def n_seq(self) -> int: ...

    @property
    def reuses(self) -> bool:
        """Whether a cache can be cut back to a prefix."""

    @property
    def boundaries(self) -> ChunkBoundaries:
        """Where it wants prompts to be cut."""

    def decode(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        sequences: Sequence[Sequence[int]],
        logit_rows: Sequence[int],
    ) -> None:
        """Computes a token in every row, for the sequences named there; `logit_rows` are the rows whose logits are
        needed."""

    def logits(self, row: int) -> Floats:
        """The logits (n_vocab,) of such a row of the last batch."""

    def hidden(self, tokens: Sequence[int], start: int, sequence: int) -> Floats:
        """Computes tokens of a sequence from position `start` on; their final hidden states (tokens, n_embd)."""

    def use(self, staged: W_contra) -> None:
        """Computes with these weights from the next decode on."""

    def forget(self, sequence: int, start: int = 0) -> None:
        """Drops what the cache holds of a sequence, from position `start` on."""


class Sampler(Protocol):
    """Chooses the tokens of one request; `close` frees what it holds."""

    def sample(self, row: int, logits: Callable[[], Floats]) -> int:
        """The next token after `row` of the last batch; `logits` has those of the row (n_vocab,)."""

    def close(self) -> None: ...
