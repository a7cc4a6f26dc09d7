"""Slots and the prefixes beyond them: what a slot holds is kept before it is lost, for who begins alike."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from agentd.engine.decoder import Decoder
from agentd.engine.jobs import Job, Slot
from agentd.engine.prefix_files import PrefixFiles
from agentd.engine.prefixes import LEAST, Prefix, PrefixStore, State
from agentd.engine.protocol import Interrupted
from agentd.engine.weight_registry import W

W_contra = TypeVar("W_contra", contravariant=True)


class StatefulDecoder(Decoder[W_contra], Protocol[W_contra]):
    """One whose sequences can be taken out and put back."""

    def save(self, sequence: int) -> State:
        """What the cache holds of a sequence."""

    def load(self, sequence: int, state: State) -> bool:
        """Puts it into a sequence that is empty; false, and it stays empty, where it does not fit."""

    def interruptible(self, interrupted: Callable[[], bool]) -> AbstractContextManager[None]:
        """Within it a decode is given up, with Interrupted, as soon as `interrupted()` is true."""


class SlotPrefixes(Generic[W]):
    """`name` says which weights these are, on this device and after a restart."""

    def __init__(self, store: PrefixStore, context: StatefulDecoder[W], name: Callable[[W], str]) -> None:
        self.store, self._context, self._name = store, context, name

    def keep(self, slot: Slot[W]) -> bool:
        """Keeps what a slot holds, where that is worth it and may be."""
        if slot.adapters is None or slot.private:
            return False
        weights = self._name(slot.adapters)
        if not self.store.worth(weights, slot.tokens):
            return False
        return self.store.put(weights, slot.tokens, slot.exact, self._context.save(slot.sequence))

    def fetch(self, job: Job[W], exact: bool, there: int) -> None:
        """Has what a request begins with read from a file, if that saves it more than what is in a slot."""
        found = self.store.best(self._name(job.adapters), job.prompt[:-1], self._usable(exact))
        if found is not None and found[1] >= there + LEAST:
            job.fetch = self.store.fetch(found[0])

    def restore(self, free: Sequence[Slot[W]], job: Job[W], exact: bool, there: int) -> Slot[W] | None:
        """A slot that now holds more of a request's prompt than the best one does by itself, which is `there` tokens;
        None where there is none."""
        self.store.arrived()
        weights, usable = self._name(job.adapters), self._usable(exact)
        self.store.count(weights, job.prompt[:-1])
        found = self.store.best(weights, job.prompt[:-1], lambda each, n: 0 if each.state is None else usable(each, n))
        if found is None or found[0].state is None or found[1] < there + LEAST:
            return None
        prefix = found[0]
        slot = min(free, key=lambda each: len(each.tokens))
        self.empty(slot)
        assert prefix.state is not None
        if not self._context.load(slot.sequence, prefix.state):
            return None
        slot.tokens, slot.exact, slot.adapters = prefix.tokens.tolist(), prefix.exact, job.adapters
        return slot

    def empty(self, slot: Slot[W]) -> None:
        """Makes room in a slot; what it holds is kept where that is worth it."""
        self.keep(slot)
        self._context.forget(slot.sequence)
        slot.cut(0)
        slot.private = False

    def _usable(self, exact: bool) -> Callable[[Prefix, int], int]:
        boundaries = self._context.boundaries
        return lambda each, n: boundaries.reusable(min(n, each.exact)) if exact else n

    # --- before weights are swapped in

    def warming(self, slots: Sequence[Slot[W]], old: W, new: W, interrupted: Callable[[], bool]) -> Iterator[int]:
        """Computes what is used most with weights that no one gets yet. Yields the tokens that were computed, where
        requests may come in between: one may take the slot."""
        for slot in slots:
            if slot.job is None:
                self.keep(slot)
                yield 0
        for tokens in self.store.hottest(self._name(old), len(slots)):
            while self.store.worth(self._name(new), tokens):
                begun = [each for each in slots if self._continues(each, new, tokens)]
                free = sorted((each for each in slots if each.job is None), key=lambda each: len(each.tokens))
                if not begun and not free:
                    yield 0
                    continue
                slot = (begun or free)[0]
                if not begun:
                    self.empty(slot)
                    slot.adapters = new
                yield self._advance(slot, new, tokens, interrupted)
                if not self._continues(slot, new, tokens):
                    continue  # someone has its slot
                if slot.private or (len(slot.tokens) == len(tokens) and not self.keep(slot)):
                    break  # it is to be forgotten, or there is no room for it: then it stays in its slot

    def _continues(self, slot: Slot[W], new: W, tokens: list[int]) -> bool:
        n = len(slot.tokens)
        return slot.job is None and slot.adapters is new and n <= len(tokens) and slot.tokens == tokens[:n]

    def _advance(self, slot: Slot[W], weights: W, tokens: list[int], interrupted: Callable[[], bool]) -> int:
        """Computes the next piece in the way that exact answers need; the tokens that were."""
        start = len(slot.tokens)
        boundary = self._context.boundaries.after(start)
        piece = tokens[start:boundary]
        try:
            self._context.use(weights)
            with self._context.interruptible(interrupted):
                self._context.decode(piece, range(start, start + len(piece)), [(slot.sequence,)] * len(piece), [])
        except Interrupted:
            return 0
        if len(slot.tokens) != start:  # who only looks may come in the middle, and had it forgotten
            self._context.forget(slot.sequence)
            return 0
        slot.tokens = slot.tokens + piece
        if start == slot.exact and len(slot.tokens) == boundary:
            slot.exact = boundary
        return len(piece)


def slot_prefixes(
    settings: dict[str, Any], versions: str, context: StatefulDecoder[W], name: Callable[[W], str]
) -> SlotPrefixes[W] | None:
    """As the settings say ({"folder", "memory", "disk", "key"}: the limits in bytes, and what names the model's
    content); None where nothing is kept. `versions`: no other software is known to read what this one wrote."""
    files = PrefixFiles(Path(settings["folder"]), f"{settings['key']} {versions}", settings["disk"])
    if not (settings["memory"] and settings["disk"]):
        files.clear()  # of a time when it was wanted
    if not settings["memory"] or not context.reuses:
        return None
    return SlotPrefixes(PrefixStore(settings["memory"], files if settings["disk"] else None), context, name)
