"""A llama.cpp context: batches, decoding, adapters, KV cache. Owned by one thread."""

import contextlib
import ctypes
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import llama_cpp as lc
import numpy as np
import numpy.typing as npt

from agentd.engine.chunks import ChunkBoundaries
from agentd.engine.llamacpp.adapters import Adapters
from agentd.engine.llamacpp.library import configured, last_words
from agentd.engine.probabilities import Floats
from agentd.engine.protocol import Interrupted
from agentd.errors import EngineUnavailable
from agentd.host.openmp import Spinning


class Context:
    """`width` tokens at most go into one decode; `streams` gives every sequence a KV cache of its own."""

    def __init__(
        self,
        model: Any,
        *,
        n_ctx: int,
        n_seq: int,
        width: int,
        threads: int,
        streams: bool,
        flash: bool = False,
        on_tensor: Any = None,
        spinning: Spinning | None = None,
    ) -> None:
        parameters = configured(
            lc.llama_context_default_params(),
            n_ctx=n_ctx,
            n_seq_max=n_seq,
            n_batch=width,
            n_ubatch=width,
            n_threads=threads,
            n_threads_batch=threads,
            kv_unified=not streams,
            flash_attn_type=lc.LLAMA_FLASH_ATTN_TYPE_AUTO if flash else lc.LLAMA_FLASH_ATTN_TYPE_DISABLED,
            pooling_type=lc.LLAMA_POOLING_TYPE_NONE,  # a state for every token; they are pooled here
            no_perf=True,
        )
        if on_tensor is not None:
            configured(parameters, cb_eval=on_tensor)
        self._context = lc.llama_init_from_model(model, parameters)
        if not self._context:
            raise EngineUnavailable(f"llama.cpp made no context of {n_ctx} tokens: {last_words()}")
        self._memory = lc.llama_get_memory(self._context)
        self._batch = lc.llama_batch_init(width, 0, n_seq)
        self._callbacks: list[Any] = [on_tensor]  # ctypes keeps no reference to what C calls
        self.width, self.n_seq = width, n_seq
        # A state that sums up what was read cannot be cut back to a beginning of it.
        self.recurrent = is_recurrent(model)
        self.reuses = not self.recurrent  # a prefix of a sequence may be kept
        self._interrupted: Callable[[], bool] | None = None
        self.boundaries = ChunkBoundaries()
        self.n_ctx = int(lc.llama_n_ctx(self._context))
        self.n_layer, self.n_embd = int(lc.llama_model_n_layer(model)), int(lc.llama_model_n_embd(model))
        self.n_vocab = int(lc.llama_vocab_n_tokens(lc.llama_model_get_vocab(model)))
        self._adapters = Adapters()
        self.after_decode: Callable[[bool], None] | None = None
        self._spinning, self._serves = spinning, on_tensor is None  # background work is what has a tap

    @property
    def pointer(self) -> Any:
        return self._context

    def abort_when(self, interrupted: Callable[[], bool]) -> None:
        """Gives up a running decode as soon as `interrupted()` is true; asked after every graph node.

        Of a recurrent model, before every decode: what a decode that was given up has done to a state stays done.
        """
        if self.recurrent:
            self._interrupted = interrupted
            return
        callback = lc.ggml_abort_callback(lambda _: interrupted())
        self._callbacks.append(callback)
        lc.llama_set_abort_callback(self._context, callback, None)

    def decode(
        self,
        tokens: Sequence[int],
        positions: Sequence[int],
        sequences: Sequence[Sequence[int]],
        logit_rows: Sequence[int],
    ) -> None:
        """Runs one batch. `logit_rows` are the rows whose logits are needed. Raises Interrupted, with nothing kept."""
        if not self._context:
            raise EngineUnavailable("this context is closed")
        if len(tokens) > self.width:  # C would write past the end of the batch
            raise EngineUnavailable(f"a batch of {len(tokens)} tokens does not fit {self.width}")
        if self._interrupted is not None and self._interrupted():
            raise Interrupted
        batch = self._batch
        for row, (token, position, owners) in enumerate(zip(tokens, positions, sequences, strict=True)):
            batch.token[row], batch.pos[row], batch.n_seq_id[row], batch.logits[row] = (
                token,
                position,
                len(owners),
                False,
            )
            for i, owner in enumerate(owners):
                batch.seq_id[row][i] = owner
        for row in logit_rows:
            batch.logits[row] = True
        batch.n_tokens = len(tokens)
        if self._spinning:
            self._spinning.begin(serving=self._serves)
        began = time.perf_counter()
        result = lc.llama_decode(self._context, batch)
        if self._spinning and self._serves and result == 0:
            self._spinning.decoded(len(tokens), time.perf_counter() - began)
        if self.after_decode:
            self.after_decode(result == 0)
        if result == 0:
            return
        first: dict[int, int] = {}
        for position, owners in zip(positions, sequences, strict=True):
            for owner in owners:
                first[owner] = min(position, first.get(owner, position))
        for owner, position in first.items():  # part of an aborted batch may have reached the cache
            self.forget(owner, position)
        if result == 2:
            raise Interrupted
        raise EngineUnavailable(
            f"llama.cpp could not decode a batch of {len(tokens)} tokens ({result}): {last_words()}"
        )

    def logits(self, row: int) -> Floats:
        """The logits (n_vocab,) of a wanted row of the last batch: a view that the next decode overwrites."""
        return np.ctypeslib.as_array(lc.llama_get_logits_ith(self._context, row), shape=(self.n_vocab,))

    def hidden(self, tokens: Sequence[int], start: int, sequence: int) -> Floats:
        """Runs tokens of one sequence; the hidden states (tokens, n_embd) behind the final norm, as a copy."""
        rows = range(len(tokens))
        lc.llama_set_embeddings(self._context, True)
        try:
            self.decode(tokens, range(start, start + len(tokens)), [(sequence,)] * len(tokens), rows)
            states = np.empty((len(tokens), self.n_embd), np.float32)
            for row in rows:
                states[row] = np.ctypeslib.as_array(
                    lc.llama_get_embeddings_ith(self._context, row), shape=(self.n_embd,)
                )
            return states
        finally:
            lc.llama_set_embeddings(self._context, False)

    def use(self, adapters: Adapters) -> None:
        """Applies adapters from the next decode on. What the KV cache holds was computed with the old ones."""
        if adapters.lora is not self._adapters.lora:
            handles = (lc.llama_adapter_lora_p_ctypes * 1)(adapters.lora) if adapters.lora else None
            scales = (ctypes.c_float * 1)(1.0) if adapters.lora else None
            lc.llama_set_adapters_lora(self._context, handles, 1 if adapters.lora else 0, scales)
        if adapters.control is not self._adapters.control:
            self.steer(adapters.control)
        self._adapters = adapters

    def release(self, adapters: Adapters) -> None:
        """Stops using a LoRA that is going to be freed: llama.cpp would go on with its memory."""
        if adapters.lora and self._adapters.lora is adapters.lora:
            self.use(Adapters())

    def steer(self, control: Floats | None) -> None:
        """Sets the control vector (n_layer - 1, n_embd), added to the outputs of layers 1 .. n_layer - 1."""
        if control is None:
            lc.llama_set_adapter_cvec(self._context, None, 0, self.n_embd, 0, 0)
        else:
            flat = np.ascontiguousarray(control, dtype=np.float32).ravel()
            pointer = flat.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
            lc.llama_set_adapter_cvec(self._context, pointer, flat.size, self.n_embd, 1, self.n_layer - 1)
        # The next use() must not take this for what it set itself.
        self._adapters = Adapters(self._adapters.lora, control, self._adapters.digest)

    def forget(self, sequence: int = -1, start: int = -1) -> None:
        """Drops a sequence from the KV cache, from position `start` on; by default everything. A closed
        context holds none: work that was given up tidies up when it is collected, which may be later."""
        if not self._context:
            return
        if sequence < 0:
            lc.llama_memory_clear(self._memory, False)
        else:
            lc.llama_memory_seq_rm(self._memory, sequence, start, -1)

    def save(self, sequence: int) -> npt.NDArray[np.uint8]:
        """What the cache holds of a sequence, as llama.cpp writes it down."""
        state = np.empty(lc.llama_state_seq_get_size(self._context, sequence), np.uint8)
        pointer = state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        return state[: lc.llama_state_seq_get_data(self._context, pointer, state.size, sequence)]

    def load(self, sequence: int, state: npt.NDArray[np.uint8]) -> bool:
        """Puts it into an empty sequence; false, and it is empty still, where llama.cpp does not take it."""
        pointer = state.ctypes.data_as(ctypes.POINTER(ctypes.c_uint8))
        if lc.llama_state_seq_set_data(self._context, pointer, state.size, sequence):
            return True
        self.forget(sequence, 0)
        return False

    @contextlib.contextmanager
    def interruptible(self, interrupted: Callable[[], bool]) -> Iterator[None]:
        """As `abort_when`, within the block alone."""
        callback = lc.ggml_abort_callback(lambda _: interrupted())
        lc.llama_set_abort_callback(self._context, callback, None)
        try:
            yield
        finally:
            lc.llama_set_abort_callback(self._context, lc.ggml_abort_callback(), None)

    def share(self, source: int, target: int) -> None:
        """Lets `target` begin with everything `source` holds; free in a unified cache."""
        lc.llama_memory_seq_cp(self._memory, source, target, -1, -1)

    def close(self) -> None:
        if self._context:
            lc.llama_batch_free(self._batch)
            lc.llama_free(self._context)
            self._context = None


def is_recurrent(model: Any) -> bool:
    """Whether some or all blocks keep a state that sums up what was read."""
    return bool(lc.llama_model_is_recurrent(model) or lc.llama_model_is_hybrid(model))


def release_zero_pages(before: frozenset[tuple[int, int]]) -> int:
    """Gives pages that llama.cpp zeroed but has not used back to the kernel; returns the bytes.

    A new KV cache is written full of zeros, which makes every page of it resident. A private anonymous page of zeros
    reads the same after MADV_DONTNEED, but costs nothing until it is written. Only mappings that are not in `before`
    are looked at. Python's other threads must not write between the look and the call: the interpreter is held.
    """
    page, released, step = os.sysconf("SC_PAGESIZE"), 0, 1 << 20
    libc = ctypes.PyDLL(None)  # unlike CDLL it does not let go of the interpreter
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.memcmp.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]
    dont_need, interval = 4, sys.getswitchinterval()
    sys.setswitchinterval(60)
    try:
        for start, end in anonymous_mappings() - before:
            if end - start < 16 * step:  # leaves thread stacks alone, which others write
                continue
            for at in range(start, end, step):
                size = min(step, end - at) // page * page
                # All bytes are equal to their successors, and the first one is zero.
                zero = size and not ctypes.c_uint8.from_address(at).value and not libc.memcmp(at, at + 1, size - 1)
                if zero and libc.madvise(at, size, dont_need) == 0:
                    released += size
    finally:
        sys.setswitchinterval(interval)
    return released


def anonymous_mappings() -> frozenset[tuple[int, int]]:
    """(start, end) of every private, writable, anonymous mapping of this process (proc(5))."""
    mappings = set()
    with open("/proc/self/maps") as maps:  # noqa: PTH123  # not a file of ours
        for line in maps:
            fields = line.split()
            if fields[1] == "rw-p" and len(fields) == 5:
                start, end = fields[0].split("-")
                mappings.add((int(start, 16), int(end, 16)))
    return frozenset(mappings)
