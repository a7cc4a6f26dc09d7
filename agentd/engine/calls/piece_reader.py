"""Answers read token by token, as an engine makes them."""

import codecs
from collections.abc import Callable

from agentd.engine.calls.reader import AnswerReader, Delta


class PieceReader:
    """An AnswerReader of tokens; `visible` are the bytes of one, which may be a part of a character."""

    def __init__(self, reader: AnswerReader, visible: Callable[[int], bytes]) -> None:
        self._reader, self._visible = reader, visible
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    @property
    def called(self) -> bool:
        """Whether a call has come to its end."""
        return self._reader.called > 0

    @property
    def speaking(self) -> bool:
        return self._reader.speaking

    def feed(self, token: int) -> Delta:
        return self._reader.feed(self._decoder.decode(self._visible(token)))

    def flush(self, cut: bool = False) -> Delta:
        """What was held back. `cut`: the answer would have gone on, so that a piece of a character or of a mark is
        nothing that it says."""
        before = Delta() if cut else self._reader.feed(self._decoder.decode(b"", final=True))
        last = self._reader.flush(cut)
        return Delta(before.text + last.text, before.reasoning + last.reasoning, before.calls + last.calls)
