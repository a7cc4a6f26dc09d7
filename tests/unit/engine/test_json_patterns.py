"""Patterns of JSON schemas mean what every dialect of regular expressions takes them for."""

import json
import re

import llguidance
import pytest
from llguidance import LLMatcher, LLTokenizer

from agentd.engine.json_patterns import NotPortable, portable

_ENTRIES = [*map(chr, range(0x80)), *"\u0085\u00a0\u2028\u3000\ufeffé٣Ԏ😀"]


class _Bytes:
    """A vocabulary of bytes."""

    bos_token_id, eos_token_id = None, 256
    special_token_ids = (256,)
    tokens = (*(bytes([i]) for i in range(256)), b"\xff<end>")

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


@pytest.fixture(scope="module")
def tokenizer() -> LLTokenizer:
    return LLTokenizer(llguidance.TokenizerWrapper(_Bytes()), n_vocab=257, eos_token=[256])


def _accepts(start: LLMatcher, text: str) -> bool:
    """Whether some way to write the text in JSON can be an answer."""
    for written in {json.dumps(text), json.dumps(text, ensure_ascii=False)}:
        matcher, data = start.deep_copy(), list(written.encode())
        if matcher.validate_tokens(data) == len(data) and matcher.consume_tokens(data) and matcher.is_accepting():
            return True
    return False


@pytest.mark.filterwarnings("ignore:Possible")  # Python's own doubts about what dialects differ in
@pytest.mark.parametrize(
    "inside",
    [
        *(r'[^"]', r"[^\\]", r'[^"\\]', r'[^"\n]', r"[\x00-\x1f]", r"(?:[\x00-\x0f]|[\x10-\x1f])", r"[^/\\:*?\"<>|]"),
        *(
            r"\d",
            r"\w",
            r"\s",
            r"\D",
            r"\W",
            r"\S",
            r"[\W]",
            r"[^\W]",
            r"[^\d\W]",
            r"[\w\S]",
            r"[^\S ]",
            r'[^\s"]',
            ".",
        ),
        *(
            r"[a&&b]",
            r"[+--]",
            r"[a~~b]",
            r"\<",
            r"[[a]",
            r"[\]^-]",
            r"[-a]",
            r"\/",
            r"[\\]",
            r"\0",
            r"[*+?(){}|$]",
            r"\$",
        ),
    ],
)
def test_a_character_is_allowed_where_all_dialects_allow_it(tokenizer: LLTokenizer, inside: str) -> None:
    schema = json.dumps({"type": "string", "pattern": portable(f"^{inside}$")})
    start = LLMatcher(tokenizer, LLMatcher.grammar_from_json_schema(schema, overrides={"lenient": False}))
    allowed = {each for each in _ENTRIES if _accepts(start, each)}
    unicode, ascii = (
        {each for each in _ENTRIES if re.search(f"^{inside}\\Z", each, flags)} for flags in (re.UNICODE, re.ASCII)
    )
    assert allowed <= unicode | ({"\u00a0", "\u2028", "\u3000"} if "s" in inside else set())
    everyone = {each for each in unicode & ascii if each.isprintable() and each.isascii()}
    assert everyone <= allowed


@pytest.mark.parametrize(
    ("pattern", "same"),
    [
        ("^\\ud83d\\ude00$", "^\\x{1F600}$"),
        ("[\\u{1F600}-\\u{1F64F}]", "[\\x{1F600}-\\x{1F64F}]"),
        ("\\cA", "\\x{1}"),
        ("[\\w-.]", "[\\x{2D}-\\x{2E}0-9A-Z\\x{5F}a-z]"),
        ("\\p{L}\\P{Lu}", "\\p{L}[^\\p{Lu}\\x{0}]"),
        ("(?<year>a{2})|(?:b+?)", "(?<year>a{2})|(?:b+?)"),
    ],
)
def test_escapes(pattern: str, same: str) -> None:
    assert portable(pattern) == same


@pytest.mark.parametrize(
    "pattern",
    [
        *(
            "\\Aa",
            "a\\Z",
            "\\h",
            "[]a]",
            "[^]",
            "[[:alpha:]]",
            "(?x)a b",
            "\\ud83d",
            "\\u{110000}",
            "\\p{C}",
            "\\pL",
            "[a-\\d]",
        ),
        *("[b-a]", "[a", "a\\", "[^\\P{L}]", "[^\\Wa-z0-9A-Z_]"),
    ],
)
def test_what_dialects_differ_about_is_refused(pattern: str) -> None:
    with pytest.raises(NotPortable):
        portable(pattern)
