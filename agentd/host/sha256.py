"""SHA-256 whose state can be put aside and taken up again, by another process too.

hashlib keeps its state to itself. That of libcrypto is a plain structure (SHA256_CTX of openssl/sha.h, the same since
0.9.8), which is at hand where Python was linked with the shared library, as distributions do. Elsewhere there is no
state, and what was interrupted begins anew.
"""

import ctypes
import hashlib
import sys
from functools import cache

_SIZE = 112  # bytes of SHA256_CTX
_ROOM = 512  # for a library whose structure were larger


def resumable() -> bool:
    """Whether there is a state to put aside."""
    return _library() is not None


class Sha256:
    """`state`: what `state` of another one returned, whose bytes count as read. Only where it is `resumable`."""

    def __init__(self, state: bytes = b"") -> None:
        self._library = _library()
        if self._library is None:
            self._digest = hashlib.sha256()
            return
        self._context = ctypes.create_string_buffer(state, _ROOM)
        if not state:
            self._library.SHA256_Init(self._context)

    def update(self, data: bytes) -> None:
        if self._library is None:
            self._digest.update(data)
        else:
            self._library.SHA256_Update(self._context, data, ctypes.c_size_t(len(data)))

    def state(self) -> bytes:
        """What another one goes on from, on this machine; nothing where there is none to be had."""
        return b"" if self._library is None else self._context.raw[:_SIZE]

    def hexdigest(self) -> str:
        """The digest of what was read; the end."""
        if self._library is None:
            return self._digest.hexdigest()
        result = ctypes.create_string_buffer(32)
        self._library.SHA256_Final(result, self._context)
        return result.raw.hex()


@cache
def _library() -> ctypes.CDLL | None:
    """libcrypto, if it is a library of its own and its state is what is expected here."""
    try:
        library = ctypes.CDLL(sys.modules["_hashlib"].__file__)  # a handle finds what the module was linked with, too
        for name in ("SHA256_Init", "SHA256_Update", "SHA256_Final"):
            getattr(library, name)
    except (KeyError, OSError, AttributeError):
        return None
    text, half = bytes(range(256)), 100
    first = ctypes.create_string_buffer(_ROOM)
    library.SHA256_Init(first)
    library.SHA256_Update(first, text[:half], ctypes.c_size_t(half))
    second = ctypes.create_string_buffer(first.raw[:_SIZE], _ROOM)
    library.SHA256_Update(second, text[half:], ctypes.c_size_t(len(text) - half))
    result = ctypes.create_string_buffer(32)
    library.SHA256_Final(result, second)
    return library if result.raw == hashlib.sha256(text).digest() else None
