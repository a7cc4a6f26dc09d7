"""The terms by which inputs are compared: words, and pairs of characters where a script has no blanks between words.

SQLite's own tokenizer takes a sentence of Chinese, Japanese or Thai for one word, and cuts Hindi at its vowel signs;
its trigrams know no words, and make an index some times as large. Overlapping pairs for the scripts that need them are
what search engines use (Lucene's CJKAnalyzer). What is made here is indexed and asked for as it is: both agree.
"""

import re
import sys
import unicodedata
from functools import cache

from agentd.store.normalise import normal_text

_MOST = 256  # terms of each end of a text: the rest of a long one tells little more
_SPAN = 1 << 14  # characters of each end, in which they are looked for: a search holds up all else in the process
_NO_BLANKS = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\uff66-\uff9f\U00020000-\U0003ffff"
)
"""Thai, Lao, Burmese, Khmer, kana and Han characters."""


def terms_of(text: str) -> list[str]:
    """The terms of a text in their order, repeated as they are there; they hold letters, marks and digits alone."""
    if len(text) > 2 * _SPAN:
        text = f"{text[:_SPAN]} {text[-_SPAN:]}"
    terms = [term for word in _words().findall(normal_text(text)) for term in _parts(word)]
    return terms if len(terms) <= 2 * _MOST else [*terms[:_MOST], *terms[-_MOST:]]


def _parts(word: str) -> list[str]:
    if word.isascii():
        return [word]
    parts: list[str] = []
    for run in _runs().findall(word):
        without_blanks = bool(_runs_without_blanks().match(run)) and len(run) > 2
        parts += [run[i : i + 2] for i in range(len(run) - 1)] if without_blanks else [run]
    return parts


@cache
def _words() -> re.Pattern[str]:
    # Python's own \w leaves the marks out that are vowels in the scripts of India.
    marks = "".join(chr(code) for code in range(sys.maxunicode + 1) if unicodedata.category(chr(code))[0] == "M")
    return re.compile(rf"(?:[^\W_]|[{marks}])+")


@cache
def _runs() -> re.Pattern[str]:
    return re.compile(f"[{_NO_BLANKS}]+|[^{_NO_BLANKS}]+")


@cache
def _runs_without_blanks() -> re.Pattern[str]:
    return re.compile(f"[{_NO_BLANKS}]")
