"""Many sequences in one forward without a cache: a tree of tokens in one row, each of which sees its own ancestors.

What examples share (chat template, question) is there once, as is what the choices of an example share. The mask says
who sees whom. Whether a model obeys such a mask is tried out on the model itself; where it does not, every sequence is
computed by itself, which gives the same numbers and takes longer.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from agentd.engine.protocol import Scores
from agentd.engine.transformers.model import Model
from agentd.learn.encoded import METRIC, Encoded, shared_prefix
from agentd.learn.objectives import example_objective
from agentd.limits import PRODUCT_ROWS

Place = tuple[int, int, int]
"""(example, sequence, position)"""

_TOLERANCE = 0.05  # relative difference of logits that are the same but for bfloat16's rounding


@dataclass(frozen=True)
class Pack:
    """Some examples laid out as one row of tokens. `rows[e][s]` are the rows of a sequence's tokens."""

    examples: list[Encoded]
    tokens: list[int]
    positions: list[int]
    rows: list[list[list[int]]]


@dataclass(frozen=True)
class Result:
    """Logits (places, n_vocab) at every scored position, and which row is which."""

    logits: torch.Tensor
    index: dict[Place, int]

    def log_probabilities(self) -> torch.Tensor:
        return torch.log_softmax(self.logits, dim=-1)


class Forward:
    def __init__(self, model: Model) -> None:
        self._model = model
        self._eager = getattr(model.config, "_attn_implementation", "sdpa") == "eager"
        self._window = min(_windows(model.config), default=None)
        self._masks: bool | None = None
        self.multiple = PRODUCT_ROWS
        """Tokens that a forward has a multiple of, where the model pads."""

    def packs(self, examples: Sequence[Encoded], width: int) -> Iterator[Pack]:
        """The examples in order, in packs of at most `width` tokens where one example is not longer.

        Every pack computes what they all begin with (an agent's tools, say) again: where that is long, it does so for
        as much as it is itself.
        """
        if not examples:
            return
        prefix = shared_prefix(examples)
        width = max(width, 2 * prefix)
        some: list[Encoded] = []
        size = prefix
        for example in examples:
            n = example.n_distinct - prefix
            if some and size + n > width:
                yield pack(some, prefix)
                some, size = [], prefix
            some.append(example)
            size += n
        yield pack(some, prefix)

    def run(self, pack: Pack) -> Result:
        """Raises Interrupted where the model is asked to."""
        places = _places(pack)
        if self.together(pack):
            rows = [pack.rows[e][s][p] for e, s, p in places]
            return Result(self._whole(pack, rows), {place: i for i, place in enumerate(places)})
        return self._one_by_one(pack, places)

    def together(self, pack: Pack) -> bool:
        """Whether a pack is one forward."""
        longest = max(example.longest for example in pack.examples)
        return self.masks and (self._window is None or longest < self._window)

    @property
    def masks(self) -> bool:
        """Whether the model obeys a mask of ours."""
        if self._masks is None:
            self._masks = self._try_masks()
        return self._masks

    def _whole(self, pack: Pack, rows: list[int]) -> torch.Tensor:
        n = len(pack.tokens)
        size = n + -n % self.multiple if self._model.pads else n
        sees = torch.zeros(size, size, dtype=torch.bool)
        sees.fill_diagonal_(True)
        for own in (own for sequences in pack.rows for own in sequences):
            index = torch.tensor(own)
            sees[index[:, None], index[None, :]] = torch.ones(len(own), len(own), dtype=torch.bool).tril()
        mask = sees.to(self._model.device)[None, None]
        if self._eager:
            lowest = torch.finfo(self._model.dtype).min
            mask = torch.where(mask, 0.0, lowest).to(self._model.dtype)
        padding = size - n
        positions = torch.tensor([[*pack.positions, *([0] * padding)]], device=self._model.device)
        return self._model.forward(
            [*pack.tokens, *([pack.tokens[0]] * padding)],
            rows,
            attention_mask=mask,
            position_ids=positions,
            use_cache=False,
        )

    def _one_by_one(self, pack: Pack, places: list[Place]) -> Result:
        parts: list[torch.Tensor] = []
        index: dict[Place, int] = {}
        done = 0
        for e, example in enumerate(pack.examples):
            for s, sequence in enumerate(example.sequences):
                positions = [p for e2, s2, p in places if (e2, s2) == (e, s)]
                if not positions:
                    continue
                padding = [sequence[-1]] * (-len(sequence) % self.multiple) if self._model.pads else []
                parts.append(self._model.forward([*sequence, *padding], positions, use_cache=False))
                index |= {(e, s, p): done + i for i, p in enumerate(positions)}
                done += len(positions)
        return Result(torch.cat(parts), index)

    def _try_masks(self) -> bool:
        """Compares two short sequences that share a beginning, together and each by itself."""
        n = self._model.vocabulary.size
        first, second = [1, 2, 3, 4, 5, 6], [1, 2, 3, 7, 8]
        sequences = [[token % n for token in sequence] for sequence in (first, second)]
        terms = [(s, p, 0) for s, sequence in enumerate(sequences) for p in range(3, len(sequence))]
        example = Encoded.of(sequences, [], 0, terms)
        tried = pack([example], 0)
        places = _places(tried)
        try:
            together = self._whole(tried, [tried.rows[e][s][p] for e, s, p in places])
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError):
            return False
        alone = self._one_by_one(tried, places)
        ordered = alone.logits[[alone.index[place] for place in places]]
        difference = torch.linalg.vector_norm(together - ordered) / torch.linalg.vector_norm(ordered)
        return bool(difference < _TOLERANCE)


def pack(examples: list[Encoded], prefix: int) -> Pack:
    """Lays examples out whose sequences all begin with the same `prefix` tokens."""
    tokens = list(examples[0].sequences[0][:prefix])
    positions = list(range(prefix))
    beginning = list(range(prefix))
    rows = []
    for example in examples:
        shared = max(prefix, len(example.shared))
        trunk = beginning + list(range(len(tokens), len(tokens) + shared - prefix))
        tokens += example.sequences[0][prefix:shared]
        positions += range(prefix, shared)
        own = []
        for sequence in example.sequences:
            own.append(trunk + list(range(len(tokens), len(tokens) + len(sequence) - shared)))
            tokens += sequence[shared:]
            positions += range(shared, len(sequence))
        rows.append(own)
    return Pack(examples, tokens, positions, rows)


def terms(pack: Pack, result: Result) -> torch.Tensor:
    """The log-likelihoods of all of a pack's terms: an example's choices one after the other, then its target."""
    values = result.log_probabilities()
    by_terms = [
        [(e, s, p, token) for s, p, token in terms]
        for e, example in enumerate(pack.examples)
        for terms in (*example.choices, example.target)
    ]
    rows = torch.tensor([result.index[e, s, p] for terms in by_terms for e, s, p, _ in terms], device=values.device)
    tokens = torch.tensor([token for terms in by_terms for *_, token in terms], device=values.device)
    return values[rows, tokens]


def scores(pack: Pack, result: Result) -> list[Scores]:
    """Log-likelihoods of a pack's examples."""
    return _summed(pack, terms(pack, result).tolist())


def likeliest(pack: Pack, result: Result) -> list[list[bool]]:
    """Of every example that learns its metric, whether each of its target's tokens is the likeliest one."""
    if not any(example.objective == METRIC for example in pack.examples):
        return [[] for _ in pack.examples]
    most = result.logits.argmax(dim=-1).tolist()
    return [
        [most[result.index[e, s, p]] == token for s, p, token in example.target] if example.objective == METRIC else []
        for e, example in enumerate(pack.examples)
    ]


def losses(
    pack: Pack, values: Sequence[float], nll_weight: float, likeliest: Sequence[Sequence[bool]]
) -> tuple[float, list[float]]:
    """The sum of the examples' losses and its derivative by every one of `terms`, which have these values."""
    loss, by_terms = [], []
    for example, scores, most in zip(pack.examples, _summed(pack, values), likeliest, strict=True):
        each = example_objective(example, scores.choices, scores.target, nll_weight, most)
        loss.append(each.loss)
        by_terms += [by_term for part in (*each.choices, each.target) for by_term in part]
    return math.fsum(loss), by_terms


def _summed(pack: Pack, values: Sequence[float]) -> list[Scores]:
    numbers = iter(values)
    scores = []
    for example in pack.examples:
        choices = [sum(next(numbers) for _ in terms) for terms in example.choices]
        scores.append(Scores(choices, [next(numbers) for _ in example.target]))
    return scores


def _places(pack: Pack) -> list[Place]:
    return sorted(
        {
            (e, s, p)
            for e, example in enumerate(pack.examples)
            for terms in (*example.choices, example.target)
            for s, p, _ in terms
        }
    )


def _windows(config: Any) -> list[int]:
    """The sizes of sliding windows, and of chunks that see nothing before them, in tokens."""
    sizes = [getattr(config.get_text_config(), name, None) for name in ("sliding_window", "attention_chunk_size")]
    return [size for size in sizes if isinstance(size, int) and size > 0]
