"""glibc's allocator and Python's collector, told what comes next. Without glibc its part does nothing."""

import contextlib
import ctypes
import gc
from collections.abc import Iterator

_TRIM, _MMAP, _ARENAS = -1, -3, -8  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX of mallopt(3)
_BUILDING, _TRAINING = 128 << 10, 32 << 20
_KEPT = 256 << 20


def few_arenas() -> None:
    """Threads share one heap. Otherwise each gets its own, which keeps what it once needed; call this before there
    are any."""
    _set(_ARENAS, 1)


def while_building() -> None:
    """Large pieces come and go: each gets a mapping of its own.

    A model's frame allocates every matrix once and drops it at once. Without this the heap grows by all of them, stays
    that large because of the small pieces between, and training spreads over it: 190 MB more for 135M parameters.
    """
    _set(_MMAP, _BUILDING)


def while_training() -> None:
    """The same sizes come again in every step: they stay in the heap, where they cost no page faults."""
    give_back()
    _set(_MMAP, _TRAINING)
    _set(_TRIM, _KEPT)


def large_apart() -> None:
    """What is a MiB or more gets a mapping of its own, and gives it back as soon as it is freed.

    By default glibc raises that threshold whenever such a piece is freed. llama.cpp makes its compute buffers anew for
    every change of the adapters: in a heap with smaller pieces between they grew the engine by 40 MiB in each pass.
    """
    _set(_MMAP, 1 << 20)


def give_back() -> None:
    """Returns what is free in the heap to the system, what only cycles hold included."""
    gc.collect()
    trim()


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Imports leave little for the collector to find, and it would look again and again: a tenth of their time."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def settle() -> None:
    """What there is now stays to the end, and the collector leaves it alone: with torch and transformers imported it
    would take 130 ms to go through, in which no one gets a token."""
    gc.collect()
    gc.freeze()


def trim() -> None:
    """Returns what is free in the heap to the system. Between steps, because every batch has shapes of its own and the
    gaps that one leaves do not fit the next."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def _set(parameter: int, value: int) -> None:
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(parameter, value)
