"""Background work on the model that serves: encode, score, perturb, and learn in place.

Serving must see the committed weights at every moment, and a candidate that learns differs from them in every weight.
So there are two sets of weights and one module, whose parameters point at the one that computes (model.py):

- what serves is mapped from a file for reading. Whenever background work computes with other weights, the committed
  ones' pages are given back to the kernel; a request that comes takes them from the page cache again. Nothing has to be
  restored, undone or recomputed for a request, and nothing of it can reach the candidate.
- the candidate is a private copy-on-write mapping of the file that the parent is served from. Its pages become memory
  of this process when an update first writes them: all of them with full-parameter MeZO, those of the last blocks where
  only these learn. Perturbed weights never exist as a whole (nn/perturbation.py).

So a pass needs the weights once in memory that cannot be had again (the candidate) and no second time; while a request
is answered in the middle of it, the committed pages are there as well, clean, and reclaimable at any time.
"""

import contextlib
import math
from collections.abc import Callable, Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from agentd.engine.answering import answered
from agentd.engine.constraints import Compiler
from agentd.engine.encode import encode_example
from agentd.engine.protocol import BASE, Generate, Interrupted, LearningRule, Piece, Scores, TapIndex, Target
from agentd.engine.protocol import Weights as Name
from agentd.engine.serving import Serving
from agentd.engine.transformers.context import Context
from agentd.engine.transformers.forward import Forward, Pack, likeliest, losses, scores, terms
from agentd.engine.transformers.frozen_trunk import TrunkStates
from agentd.engine.transformers.image import digest, write
from agentd.engine.transformers.learning import Trainable, learner
from agentd.engine.transformers.model import Model, Weights
from agentd.engine.transformers.sampling import TokenSampler
from agentd.engine.weight_registry import Single, WeightRegistry
from agentd.errors import InvalidRequest, NotSupported
from agentd.host import allocator
from agentd.learn.encoded import Encoded
from agentd.limits import DRIFT_ROWS, GRADIENT_ROWS, LOSS_TOKENS, PRODUCT_ROWS
from agentd.nn.backprop import checkpointed
from agentd.nn.mezo import InPlace
from agentd.nn.trunk_cache import CachedTrunk
from agentd.nn.vjp import vjp

WIDTH = 512  # tokens of a forward that scores


class TransformersBackground:
    def __init__(
        self,
        model: Model,
        registry: WeightRegistry[Weights],
        compiler: Compiler,
        *,
        folder: Path,
        limit: int,
        interrupted: Callable[[], bool],
        serve: Callable[[], bool],
        closed: Callable[["TransformersBackground"], None],
    ) -> None:
        self._model, self._registry, self._compiler, self._closed = model, registry, compiler, closed
        self._interrupted, self._serve = interrupted, serve
        self.vocabulary = model.vocabulary
        self._forward = Forward(model)
        self._weights = registry[BASE]
        self._rule = LearningRule()
        self._learner: Trainable | None = None  # made when something is to be perturbed or moved
        self._folder = folder
        self._trunk: CachedTrunk | None = None  # while backpropagation alone moves the blocks above it
        self._states: TrunkStates | None = None
        self.limit = limit

    def encode(self, input: dict[str, Any], choices: Sequence[str], target: Target, **more: Any) -> Encoded:
        return encode_example(self.vocabulary, input, choices, target, limit=self.limit, **more)

    def use(self, weights: Name) -> None:
        self._weights = self._registry[weights]
        self._give_up()
        self._registry.collect()

    def uses(self, weights: Weights) -> bool:
        return weights is self._weights

    def rule(self, rule: LearningRule) -> None:
        """See the protocol. Raises InvalidRequest for what this model cannot follow."""
        self._give_up()
        self._enter()
        learner(self._model, self._weights, rule)
        self._rule = rule
        self._forward.multiple = GRADIENT_ROWS if rule.differentiates else PRODUCT_ROWS

    def score(self, examples: Sequence[Encoded]) -> Iterator[list[Scores]]:
        for pack in self._forward.packs(examples, WIDTH):
            for batch in self._run(lambda pack=pack: scores(pack, self._forward.run(pack))):  # type: ignore[misc]
                yield [] if batch is None else batch

    def answer(
        self, requests: Sequence[Generate], enough: Callable[[Piece], bool]
    ) -> Generator[list[Piece], None, None]:
        """See the protocol. One after the other: no plan counts the caches of more."""
        context = Context(self._model, 1)
        serving = Serving(
            context,
            self.vocabulary,
            self.limit,
            Single(self._current),
            lambda request, constraint: TokenSampler(request.sampling, constraint),
            self._compiler,
        )

        def give_way() -> None:
            try:
                self._give_way()
            except Interrupted:
                if context.reuses:
                    raise
                self._enter()  # a state that cannot be cut back has to come to the end of this forward

        def step() -> list[Piece]:
            self._enter()
            with self._model.giving_way(give_way), self._beside():
                return serving.step()

        yield from answered(serving, requests, step, enough)

    def loss(self, examples: Sequence[Encoded], nll_weight: float, seed: int, scale: float) -> Iterator[float | None]:
        """At the weights moved by scale · z(seed)."""
        theta = self._theta() if scale else None

        def measure(loss: Callable[[], float]) -> tuple[float, ...]:
            return (theta.loss(seed, scale, loss) if theta else loss(),)

        for both in self._mean_loss(examples, nll_weight, measure):
            yield None if both is None else both[0]

    def pair(
        self, examples: Sequence[Encoded], nll_weight: float, seed: int, epsilon: float
    ) -> Iterator[tuple[float, ...] | None]:
        """The losses at theta + epsilon z(seed) and theta - epsilon z(seed)."""
        theta = self._theta()
        yield from self._mean_loss(examples, nll_weight, lambda loss: theta.pair(seed, epsilon, loss))

    def update(self, seed: int, coefficient: float) -> None:
        """What learns += coefficient · z(seed); it is no one else's."""
        theta = self._theta()  # thresholds come from the weights that it starts from
        self._learning().own()
        self._enter()
        theta.update(seed, coefficient)

    def descend(
        self, examples: Sequence[Encoded], nll_weight: float, seed: int, epsilon: float, lr: float
    ) -> Iterator[tuple[float, ...] | None]:
        """The losses at trunk + epsilon z and trunk - epsilon z. What has gradients has then gone down that of the
        latter by `lr`, unless a loss is not finite. At epsilon 0 there is one forward, at the weights as they are."""
        optimiser = self._learning().optimiser()
        if not epsilon:
            self._cache_trunk()
        plus = math.nan
        if epsilon:
            theta = self._theta()
            for both in self._mean_loss(examples, nll_weight, lambda loss: (theta.loss(seed, epsilon, loss),)):
                if both is None:
                    yield None
                else:
                    (plus,) = both
        minus = 0.0
        for value in self._gradient(examples, nll_weight, seed, -epsilon):
            if value is None:
                yield None
            else:
                minus = value
        plus = plus if epsilon else minus
        if math.isfinite(plus) and math.isfinite(minus):
            self._learning().own()
            self._enter()
            optimiser.apply(lr, seed)
        optimiser.drop()
        yield plus, minus

    def write_moved(self, path: Path) -> None:
        """Writes what no ledger can make again, as it is now, as a safetensors file."""
        write(path, self._learning().moved())

    def digest(self) -> str:
        """sha256 of the weights as they are now, in the model's order."""
        return digest(self._current.mapped)

    def drift(self, texts: Sequence[str], reference: Name, candidate: Name) -> Iterator[float | None]:
        total, n = 0.0, 0
        self._give_up()
        before = self._weights
        for text in texts:
            tokens = self.vocabulary.tokenize(text, begin=True)[: DRIFT_ROWS + 1]
            if len(tokens) < 2:
                continue
            example = Encoded.of([tokens[:-1]], [], 0, [(0, p, tokens[p + 1]) for p in range(len(tokens) - 1)])
            (pack,) = self._forward.packs([example], WIDTH)
            log_ps: list[torch.Tensor] = []
            for name in (reference, candidate):
                self._weights = self._registry[name]
                for log_p in self._run(lambda pack=pack: self._forward.run(pack).log_probabilities()):  # type: ignore[misc]
                    if log_p is not None:
                        log_ps.append(log_p.double())
                    yield None
            total += float((log_ps[0].exp() * (log_ps[0] - log_ps[1])).sum())
            n += len(log_ps[0])
        self._weights = before
        if not n:
            raise InvalidRequest("drift needs texts of at least two tokens")
        yield total / n if math.isfinite(total) else math.inf

    def tap(self, examples: Sequence[Encoded], blocks: range, path: Path) -> Iterator[int | TapIndex]:
        raise NotSupported("the engine transformers taps nothing: its weights learn where they are")

    def write_control(self, path: Path) -> None:
        raise NotSupported("the engine transformers has no control vectors: a revision of it is a ledger")

    def close(self) -> None:
        self._give_up()
        self._closed(self)

    # --- how

    def _mean_loss(
        self,
        examples: Sequence[Encoded],
        nll_weight: float,
        measure: Callable[[Callable[[], float]], tuple[float, ...]],
    ) -> Iterator[tuple[float, ...] | None]:
        if not examples:
            raise InvalidRequest("a loss needs examples")
        totals: list[float] = []
        for pack in self._forward.packs(examples, LOSS_TOKENS):
            for values in self._run(lambda pack=pack: measure(lambda: self._summed(pack, nll_weight))):  # type: ignore[misc]
                if values is None:
                    yield None
                else:
                    totals = [a + b for a, b in zip(totals or [0.0] * len(values), values, strict=True)]
            yield None
        yield tuple(total / len(examples) for total in totals)

    def _summed(self, pack: Pack, nll_weight: float) -> float:
        with self._above(pack):
            result = self._forward.run(pack)
        return losses(pack, terms(pack, result).tolist(), nll_weight, likeliest(pack, result))[0]

    def _gradient(
        self, examples: Sequence[Encoded], nll_weight: float, seed: int, scale: float
    ) -> Iterator[float | None]:
        """Leaves the mean loss's gradient in the parameters that have one, and yields the loss, at trunk + scale z."""
        if not examples:
            raise InvalidRequest("a loss needs examples")
        n, total = len(examples), 0.0
        self._learning().optimiser().drop()
        for pack in self._forward.packs(examples, LOSS_TOKENS):
            for part in self._run(lambda pack=pack: self._differentiate(pack, nll_weight, n, seed, scale)):  # type: ignore[misc]
                total += 0.0 if part is None else part
                yield None
        yield total / n

    def _differentiate(self, pack: Pack, nll_weight: float, n: int, seed: int, scale: float) -> float:
        learning = self._learning()
        with contextlib.ExitStack() as stack:
            theta = self._theta() if scale else None
            _ = self._forward.masks  # tried out before anything is perturbed
            stack.enter_context(learning.optimiser().trained())
            stack.enter_context(self._model.differentiable())
            stack.enter_context(checkpointed(learning.checkpointed))
            with theta.perturbed(seed, scale) if theta else self._above(pack):
                result = self._forward.run(pack)
                values = terms(pack, result)
            loss, by_terms = losses(pack, values.tolist(), nll_weight, likeliest(pack, result))
            if math.isfinite(loss):
                # Added up when all of a pack's are there: a backward that is given up leaves nothing behind.
                by_term, trained = torch.tensor(by_terms, device=values.device) / n, learning.optimiser().parameters
                for parameter, gradient in zip(
                    trained, torch.autograd.grad(vjp([(values, by_term)]), trained, allow_unused=True), strict=True
                ):
                    if gradient is not None:
                        parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        return loss

    def _run(self, compute: Callable[[], Any]) -> Iterator[Any]:
        """Yields the result of `compute`, and None whenever it had to be given up and begins anew."""
        while True:
            self._enter()
            try:
                with self._model.giving_way(self._give_way), self._beside():
                    value = compute()
            except Interrupted:
                yield None
                continue
            yield value
            return

    def _give_way(self) -> None:
        """Has requests answered in the middle of a forward or a backward, which goes on afterwards as if nothing had
        been. Raises Interrupted where something else waits, which may change what it computes with."""
        if not self._interrupted():
            return
        with self._model.set_aside():
            if not self._serve():
                raise Interrupted
        self._enter()

    @property
    def _current(self) -> Weights:
        """The weights that this session computes with."""
        return (self._learner.copy if self._learner is not None else None) or self._weights

    def _enter(self) -> None:
        """Computes with this session's weights; what serves takes no memory meanwhile that it can have again."""
        current = self._current
        self._model.install(current)
        for other in self._registry.values():
            if other is not current:
                other.release()

    def _beside(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext() if self._learner is None else self._learner.attached()

    def _learning(self) -> Trainable:
        if self._learner is None:
            self._enter()
            self._learner = learner(self._model, self._weights, self._rule)
        return self._learner

    def _theta(self) -> InPlace:
        """What zeroth-order steps move, which the trunk is part of."""
        self._forget_trunk()
        learning = self._learning()
        self._enter()
        try:
            return learning.theta()
        except ValueError as error:
            raise InvalidRequest(str(error)) from None

    def _cache_trunk(self) -> None:
        """The trunk stays as it is from now on: what it makes of an example is computed once."""
        k = self._learning().above_trunk
        if k and self._trunk is None:
            self._states = TrunkStates(self._folder)
            self._trunk = CachedTrunk(self._model.module, k, self._states)

    def _above(self, pack: Pack) -> contextlib.AbstractContextManager[None]:
        """Within it, a pack's forward begins above the trunk, if that is frozen and was run for it before."""
        if self._trunk is None or not self._forward.together(pack):
            return contextlib.nullcontext()
        return self._trunk.batch(pack)

    def _forget_trunk(self) -> None:
        if self._states is not None:
            self._states.close()
        self._states = self._trunk = None

    def _give_up(self) -> None:
        """Forgets updates."""
        self._forget_trunk()
        if self._learner is not None:
            self._learner.give_up()
            self._learner = None
            allocator.give_back()  # what follows, judging, takes other memory than learning did
