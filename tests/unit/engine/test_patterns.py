"""JSON schema's patterns, found anywhere in a text, as expressions for whole texts."""

import re

import pytest

from agentd.engine.calls.patterns import text_patterns
from agentd.errors import InvalidRequest


@pytest.mark.parametrize(
    "pattern", [r"^[a-c]{2}$", "b", "^a|c$", r"^\d+/\w*$", "^(?:x|yz)$", r"[\d\]]", "[]a]", r"\$", r"^\s", "^$", "a.c"]
)
def test_whole_texts_match_where_the_pattern_is_found(pattern: str) -> None:
    (whole,) = text_patterns({"pattern": pattern})
    texts = ["", "a", "ab", "abc", "xbx", "c", "12/x_", "x", "yz", "xyz", "]", "5", "$", " a", "a\nc", "\nb\n"]
    for text in texts:
        assert bool(re.fullmatch(whole, text)) == bool(re.search(pattern, text)), text


@pytest.mark.parametrize("pattern", ["(?=a)b", r"\bword", r"(a)\1", "a^b", "(^a)", "a$b", "(?<year>[0-9])"])
def test_what_has_no_such_expression_is_refused(pattern: str) -> None:
    with pytest.raises(InvalidRequest, match="not supported"):
        text_patterns({"pattern": pattern})
