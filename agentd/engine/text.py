"""Tokens to text as it may be sent: whole characters, and never the beginning of a stop string."""

import codecs
from collections.abc import Sequence


class Detokenizer:
    """Turns the bytes of successive tokens into text. `stopped` is set once a stop string was met; `released` is the
    number of characters that were given out, `decoded` that of all there are."""

    def __init__(self, stop: Sequence[str]) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stop = [text for text in stop if text]
        self._held = ""
        self.stopped = False
        self.released = 0

    @property
    def decoded(self) -> int:
        return self.released + len(self._held)

    def feed(self, data: bytes) -> str:
        """Text that is certain now."""
        return self._release(self._held + self._decoder.decode(data))

    def flush(self) -> str:
        """What was held back, when nothing more will come."""
        if self.stopped:
            return ""
        text = self._release(self._held + self._decoder.decode(b"", final=True))
        self.released += len(self._held)
        text, self._held = text + self._held, ""
        return text

    def _release(self, text: str) -> str:
        places = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if places:
            self.stopped, self._held = True, ""
            end = min(places)
        else:
            end = len(text) - max((_overlap(text, stop) for stop in self._stop), default=0)
            self._held = text[end:]
        self.released += end
        return text[:end]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
