"""What prompts begin with, computed once and kept beyond the slots: system prompts, tools, conversations.

A prefix is the state of a sequence, as the context that computed it writes it down, with the tokens that it holds and
the weights that made it. The longest that a prompt begins with is taken over, as far as they agree. Those in memory are
bounded in bytes, those in files too (prefix_files.py); the ones used longest ago go first.
"""

import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from agentd.engine.prefix_files import PrefixFiles, StoredPrefix, Unusable

logger = logging.getLogger(__name__)

Tokens = npt.NDArray[np.int32]
State = npt.NDArray[np.uint8]

LEAST = 128  # tokens that are worth keeping, or taking over, beyond what is there anyway
_DAY = 86400.0


@dataclass(eq=False)
class Prefix:
    """`weights` names those that computed it, `exact` is as in jobs.Slot; `hits` counts requests that began with it."""

    weights: str
    tokens: Tokens
    exact: int
    size: int
    created: float  # seconds since the epoch
    state: State | None = None
    file: StoredPrefix | None = None
    hits: int = 0
    used: float = field(default_factory=time.monotonic)


class PrefixStore:
    """`memory` and the files' own limit are bytes. `frozen`: memory that it does not take yet is wanted elsewhere.
    Used from one thread."""

    def __init__(self, memory: int, files: PrefixFiles | None = None, clock: Callable[[], float] = time.time) -> None:
        self._memory, self._files, self._clock = memory, files, clock
        self._prefixes: list[Prefix] = []
        self._fetching: dict[int, Future[State]] = {}
        self._once: list[tuple[float, int]] = []  # when and how many bytes were written of what was used once
        self.frozen = False
        for stored in files.scan() if files else ():
            prefix = Prefix(stored.weights, stored.tokens, stored.exact, stored.size, stored.created, file=stored)
            prefix.used -= max(0.0, self._clock() - stored.created)
            self._prefixes.append(prefix)

    def __len__(self) -> int:
        return len(self._prefixes)

    @property
    def bytes_in_memory(self) -> int:
        return sum(prefix.size for prefix in self._prefixes if prefix.state is not None)

    def worth(self, weights: str, tokens: Sequence[int]) -> bool:
        """Whether a state with these tokens saves more than what is kept already."""
        if len(tokens) < LEAST:
            return False
        sought = np.asarray(tokens, np.int32)
        return all(len(tokens) - _common(each.tokens, sought) >= LEAST for each in self._of(weights))

    def put(self, weights: str, tokens: Sequence[int], exact: int, state: State) -> bool:
        """Keeps a state, in place of those with the beginning of its tokens that no one else began with."""
        if state.size > self._memory or (self.frozen and self.bytes_in_memory + state.size > self._memory_now()):
            return False
        new = Prefix(weights, np.asarray(tokens, np.int32), exact, state.size, self._clock(), state)
        for old in list(self._of(weights)):
            if not old.hits and _common(old.tokens, new.tokens) == len(old.tokens):
                self._drop(old)
        self._prefixes.append(new)
        self._shrink(new)
        self._write(new)
        return True

    def best(
        self, weights: str, prompt: Sequence[int], usable: Callable[[Prefix, int], int]
    ) -> tuple[Prefix, int] | None:
        """The prefix that saves most of a prompt, one in memory where several save as much, and how many of its tokens
        are `usable`: it gets a prefix and the number of tokens in which they agree."""
        sought = np.asarray(prompt, np.int32)
        options = [(each, usable(each, _common(each.tokens, sought))) for each in self._of(weights)]
        return max(options, key=lambda option: (option[1], option[0].state is not None), default=None)

    def count(self, weights: str, prompt: Sequence[int]) -> None:
        """Notes that a request began with the prefix that agrees with it most; one that is used again is worth a
        file."""
        if (found := self.best(weights, prompt, lambda _, n: n)) is not None and found[1] >= LEAST:
            prefix, _ = found
            prefix.hits, prefix.used = prefix.hits + 1, time.monotonic()
            self._write(prefix)

    def fetch(self, prefix: Prefix) -> Future[State] | None:
        """Has the state of a prefix read from its file; None where it is there, or cannot be. See `arrived`."""
        if prefix.state is not None or prefix.file is None or self._files is None or prefix.size > self._memory:
            return None
        if self.frozen and self.bytes_in_memory + prefix.size > self._memory_now():
            return None
        if id(prefix) not in self._fetching:
            self._fetching[id(prefix)] = self._files.read(prefix.file)
        return self._fetching[id(prefix)]

    def arrived(self) -> None:
        """Takes in what was read. A file that is damaged is gone, and so is its prefix."""
        for prefix in list(self._prefixes):
            future = self._fetching.get(id(prefix))
            if future is None or not future.done():
                continue
            del self._fetching[id(prefix)]
            try:
                prefix.state = future.result()
            except (Unusable, OSError) as error:
                logger.warning("a stored prefix is dropped: %s", error)
                self._drop(prefix)
            else:
                prefix.used = time.monotonic()
                self._shrink(prefix)

    def hottest(self, weights: str, n: int) -> list[list[int]]:
        """The tokens of the `n` prefixes that are used most, of those that are used at all."""
        again = [each for each in self._of(weights) if each.hits]
        order = sorted(again, key=lambda each: (-each.hits, -each.used))
        return [each.tokens.tolist() for each in order[:n]]

    def forget(self, before: float | None = None) -> int:
        """Drops those made before this time (seconds since the epoch), or all, files too; returns how many."""
        gone = [each for each in self._prefixes if before is None or each.created < before]
        for prefix in gone:
            self._drop(prefix)
        if before is None and self._files:
            self._files.clear()
        return len(gone)

    def close(self) -> None:
        if self._files:
            self._files.close()

    def _of(self, weights: str) -> list[Prefix]:
        return [each for each in self._prefixes if each.weights == weights]

    def _memory_now(self) -> int:
        """Bytes that it may take: what it takes already, where no more is to be had."""
        return min(self._memory, self.bytes_in_memory) if self.frozen else self._memory

    def _shrink(self, newest: Prefix) -> None:
        """Keeps to the limit. What has a file stays there."""
        in_memory = sorted((each for each in self._prefixes if each.state is not None), key=lambda each: each.used)
        excess = sum(each.size for each in in_memory) - self._memory
        for each in in_memory:
            if excess <= 0:
                break
            if each is newest:
                continue
            excess -= each.size
            if each.file is not None:
                each.state = None
            else:
                self._drop(each)

    def _write(self, prefix: Prefix) -> None:
        """Into a file: what was used again, and of the rest, which may never be, a disk's limit a day at the most,
        because memory cards wear."""
        if self._files is None or prefix.file is not None or prefix.state is None:
            return
        if not prefix.hits:
            now = self._clock()
            self._once = [(at, size) for at, size in self._once if 0 <= now - at < _DAY]
            if sum(size for _, size in self._once) + prefix.size > self._files.limit:
                return
            self._once.append((now, prefix.size))
        stored = StoredPrefix(prefix.weights, prefix.tokens, prefix.exact, prefix.size, prefix.created)
        kept = sorted((each for each in self._prefixes if each.file is not None), key=lambda each: each.used)
        excess = sum(each.size for each in kept) + prefix.size - self._files.limit
        if prefix.size > self._files.limit:
            return
        for each in kept:
            if excess <= 0:
                break
            excess -= each.size
            self._unlink(each)
        self._files.write(stored, prefix.state)
        prefix.file = stored

    def _unlink(self, prefix: Prefix) -> None:
        if prefix.file is not None and self._files is not None:
            self._files.remove(prefix.file)
            prefix.file = None
        if prefix.state is None and prefix in self._prefixes:
            self._prefixes.remove(prefix)

    def _drop(self, prefix: Prefix) -> None:
        prefix.state = None
        self._fetching.pop(id(prefix), None)
        self._unlink(prefix)
        if prefix in self._prefixes:
            self._prefixes.remove(prefix)


def _common(a: Tokens, b: Tokens) -> int:
    """How many tokens they begin with alike."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if different.size else n
