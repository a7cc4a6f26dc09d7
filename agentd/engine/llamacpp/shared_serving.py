"""Many requests that begin alike in one unified KV cache: the beginning is computed once, and all share batches."""

from collections.abc import Callable, Iterator, Sequence

from agentd.engine.chunks import common_length
from agentd.engine.constraints import Compiler, Constraint
from agentd.engine.decoder import Sampler
from agentd.engine.jobs import Job, Slot
from agentd.engine.llamacpp.adapters import Adapters
from agentd.engine.llamacpp.context import Context
from agentd.engine.prompts import Prompts
from agentd.engine.protocol import Generate, Interrupted
from agentd.engine.serving import Serving
from agentd.engine.weight_registry import Single


class SharedServing(Serving[Adapters]):
    """Serving whose slots hold `prefix` for good, and nothing else when no one is answered in them. It decodes several
    in a batch whatever they ask for, so an answer may differ from a served one where two tokens are as good as equal.
    """

    def __init__(
        self,
        context: Context,
        vocabulary: Prompts,
        adapters: Adapters,
        samplers: Callable[[Generate, Constraint | None], Sampler],
        compiler: Compiler,
        prefix: Sequence[int],
        slots: int,
    ) -> None:
        super().__init__(context, vocabulary, context.n_ctx, Single(adapters), samplers, compiler, slots)
        self._unified, self._adapters, self._prefix = context, adapters, list(prefix)
        self._holder = slots  # the sequence behind those of the slots

    def hold(self) -> Iterator[None]:
        """Computes the prefix, in a sequence of its own. Yields where it may be interrupted."""
        done = 0
        while done < len(self._prefix):
            chunk = self._prefix[done : self._context.boundaries.after(done)]
            try:
                self._context.use(self._adapters)
                self._context.decode(chunk, range(done, done + len(chunk)), [(self._holder,)] * len(chunk), [])
                done += len(chunk)
            except Interrupted:
                pass
            yield
        for slot in self._slots:
            self._empty(slot)

    def _empty(self, slot: Slot[Adapters]) -> None:
        """Leaves the prefix. A state that is carried from token to token cannot be cut back, but it can be copied."""
        self._context.forget(slot.sequence, 0)
        if self._prefix:
            self._unified.share(self._holder, slot.sequence)
        slot.tokens, slot.adapters = list(self._prefix), self._adapters

    def _exact(self, job: Job[Adapters]) -> bool:
        return False

    def _overlap(self, slot: Slot[Adapters], job: Job[Adapters]) -> int:
        return common_length(slot.tokens, job.prompt[:-1])

    def _release(self, slot: Slot[Adapters]) -> None:
        super()._release(slot)
        self._empty(slot)
