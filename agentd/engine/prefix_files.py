"""Prefixes in files: for their owner alone, whole or not there, written and read in a thread of their own.

A file is a line that says what it is, a line of JSON with its lengths and sha256, the tokens (int32, little-endian) and
the state.
"""

import contextlib
import hashlib
import json
import logging
import os
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from agentd.durable import new_file, sync_directory
from agentd.ids import uuid7

logger = logging.getLogger(__name__)

_MAGIC = b"agentd prefix 1\n"
_SUFFIX = ".prefix"
_LONGEST = 1 << 16  # bytes of the line of JSON
_PART = 1 << 20  # bytes that are hashed and written at a time


class Unusable(Exception):
    """A file is not what it should be."""


@dataclass(eq=False)
class StoredPrefix:
    """As prefixes.Prefix; `size` is that of the state in bytes."""

    weights: str
    tokens: npt.NDArray[np.int32]
    exact: int
    size: int
    created: float
    name: str = field(default_factory=lambda: uuid7() + _SUFFIX)


class PrefixFiles:
    """`key` names what all of them depend on: model, cache and software. Files of another are removed."""

    def __init__(self, folder: Path, key: str, limit: int) -> None:
        self._folder, self._key, self.limit = folder, key, limit
        self._work = ThreadPoolExecutor(1, "prefix files", initializer=_after_all_others)
        self._removed: set[str] = set()  # of what may still wait to be written
        self._lock = threading.Lock()

    def scan(self) -> Iterator[StoredPrefix]:
        """Those that are there. What cannot be used, or was cut off, is removed."""
        for path in sorted(self._folder.glob("*")) if self._folder.is_dir() else ():
            try:
                with path.open("rb") as file:
                    stored, _ = self._head(file, path)
                    if file.seek(0, os.SEEK_END) != file_size(stored, file):
                        raise Unusable(f"{path.name} is cut off")
                yield stored
            except (Unusable, OSError, ValueError, KeyError, TypeError) as error:
                logger.warning("a stored prefix is dropped: %s", error)
                path.unlink(missing_ok=True)

    def write(self, stored: StoredPrefix, state: npt.NDArray[np.uint8]) -> None:
        """Later, in this object's thread. A disk that is full, or fails, keeps no prefixes, that is all."""

        def work() -> None:
            try:
                self._write(stored, state)
            except OSError as error:
                logger.warning("a prefix was not stored: %s", error.strerror or error)

        self._submit(work)

    def read(self, stored: StoredPrefix) -> "Future[npt.NDArray[np.uint8]]":
        """The state. It raises Unusable and OSError."""
        return self._work.submit(self._read, stored)

    def remove(self, stored: StoredPrefix) -> None:
        """At once, even if it is only about to be written."""
        with self._lock:
            self._removed.add(stored.name)
            (self._folder / stored.name).unlink(missing_ok=True)
        self._submit(lambda: self._removed.discard(stored.name))

    def clear(self) -> None:
        """Removes whatever lies in the folder."""
        with self._lock:
            for path in self._folder.glob("*") if self._folder.is_dir() else ():
                with contextlib.suppress(OSError):
                    path.unlink()

    def close(self) -> None:
        """Waits for what is being written, and leaves the rest."""
        self._work.shutdown(wait=True, cancel_futures=True)

    def _submit(self, work: Any) -> None:
        with contextlib.suppress(RuntimeError):  # it is closed
            self._work.submit(work)

    def _write(self, stored: StoredPrefix, state: npt.NDArray[np.uint8]) -> None:
        if stored.name in self._removed:
            return
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        tokens = stored.tokens.astype("<i4").tobytes()
        digest = hashlib.sha256(tokens)
        digest.update(state.data)
        about = {
            "key": self._key,
            "weights": stored.weights,
            "tokens": len(stored.tokens),
            "exact": stored.exact,
            "size": stored.size,
            "created": stored.created,
            "sha256": digest.hexdigest(),
        }
        temporary = self._folder / f".{stored.name}"
        try:
            with new_file(temporary, "wb") as file:
                file.write(_MAGIC + json.dumps(about).encode() + b"\n" + tokens)
                for at in range(0, len(state), _PART):
                    file.write(state[at : at + _PART].data)
            with self._lock:  # whoever has it removed meanwhile finds it, or it finds that it is not wanted
                if stored.name in self._removed or not temporary.exists():
                    return
                temporary.replace(self._folder / stored.name)
            sync_directory(self._folder)
        finally:
            temporary.unlink(missing_ok=True)

    def _read(self, stored: StoredPrefix) -> npt.NDArray[np.uint8]:
        path = self._folder / stored.name
        with path.open("rb") as file:
            there, sha256 = self._head(file, path)
            state = np.empty(there.size, np.uint8)
            if file.readinto(state.data) != there.size:
                raise Unusable(f"{path.name} is cut off")
        digest = hashlib.sha256(there.tokens.astype("<i4").tobytes())
        digest.update(state.data)
        if digest.hexdigest() != sha256:
            raise Unusable(f"{path.name} is damaged")
        return state

    def _head(self, file: IO[bytes], path: Path) -> tuple[StoredPrefix, str]:
        """What a file holds, up to its state, and its sha256. Raises Unusable."""
        if not path.name.endswith(_SUFFIX) or path.name.startswith(".") or file.read(len(_MAGIC)) != _MAGIC:
            raise Unusable(f"{path.name} is no stored prefix, or was not finished")
        about = json.loads(file.readline(_LONGEST))
        if about["key"] != self._key:
            raise Unusable(f"{path.name} is of another model, or of other software")
        tokens = np.frombuffer(file.read(4 * int(about["tokens"])), "<i4").astype(np.int32)
        if len(tokens) != about["tokens"]:
            raise Unusable(f"{path.name} is cut off")
        numbers = int(about["exact"]), int(about["size"]), float(about["created"])
        return StoredPrefix(str(about["weights"]), tokens, *numbers, path.name), str(about["sha256"])


def file_size(stored: StoredPrefix, file: IO[bytes]) -> int:
    """Bytes that the file of this prefix must have."""
    file.seek(len(_MAGIC))
    return len(_MAGIC) + len(file.readline(_LONGEST)) + 4 * len(stored.tokens) + stored.size


def _after_all_others() -> None:
    with contextlib.suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)
