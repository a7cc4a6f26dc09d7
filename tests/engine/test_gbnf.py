"""GBNF as llguidance takes it means what it means in llama.cpp, whose own parser and sampler are asked here."""

import ctypes
from collections.abc import Iterator
from contextlib import closing

import llama_cpp as lc
import numpy as np
import pytest
from llama_cpp.llama_grammar import JSON_GBNF

from agentd.engine.constraints import Compiler, Constraint
from agentd.engine.gbnf import DEPTH, to_lark
from agentd.engine.llamacpp.library import load_model
from agentd.engine.llamacpp.vocabulary import Vocabulary
from agentd.engine.protocol import Sampling
from agentd.errors import InvalidRequest
from tools import tiny_model

_TOKEN_DATA = np.dtype([("id", np.int32), ("logit", np.float32), ("p", np.float32)])


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vocabulary]:
    model = load_model(tiny_model.write(tmp_path_factory.mktemp("tiny") / "tiny.gguf"), 0)
    yield Vocabulary(model)
    lc.llama_model_free(model)


@pytest.fixture(scope="module")
def compiler(vocabulary: Vocabulary) -> Iterator[Compiler]:
    with closing(Compiler(vocabulary)) as compiler:
        yield compiler


def accepts(constraint: Constraint, vocabulary: Vocabulary, text: str) -> bool:
    """Whether the constraint takes a text, and an end after it."""
    for byte in text.encode():
        (token,) = (token for token in range(vocabulary.size) if vocabulary.piece(token) == bytes([byte]))
        if token not in allowed(constraint):
            return False
        assert constraint.take(token) == token
    return vocabulary.end in allowed(constraint)


def allowed(constraint: Constraint) -> list[int]:
    tokens = constraint.allowed()
    assert tokens is not None
    ids: list[int] = tokens.tolist()
    return ids


def taken_by_llamacpp(grammar: str, vocabulary: Vocabulary, text: str) -> bool:
    sampler = lc.llama_sampler_init_grammar(vocabulary.pointer, grammar.encode(), b"root")
    assert sampler, grammar
    try:
        tokens = [t for b in text.encode() for t in range(vocabulary.size) if vocabulary.piece(t) == bytes([b])]
        for token in [*tokens, vocabulary.end]:
            candidates = np.array([(token, 1.0, 0.0)], dtype=_TOKEN_DATA)
            data = candidates.ctypes.data_as(lc.llama_token_data_p)
            view = lc.llama_token_data_array(data=data, size=1, selected=-1, sorted=False)
            lc.llama_sampler_apply(sampler, ctypes.byref(view))
            if not np.isfinite(candidates["logit"][0]):
                return False
            if token != vocabulary.end:
                lc.llama_sampler_accept(sampler, token)
        return True
    finally:
        lc.llama_sampler_free(sampler)


@pytest.mark.parametrize(
    ("grammar", "texts"),
    [
        ('root ::= word "x"\nword ::= [a-z]+', ["ax", "aax", "x", "xx", "a", "xxa"]),
        ('root ::= ("a" | "aab") "ac"', ["aac", "aabac", "aab", "ac"]),
        ('root ::= "a"* "b"? "c"+', ["c", "aabcc", "abb", "", "bc"]),
        ('root ::= "a"{0} [xy]{0,0} "b"', ["b", "ab", "xb", ""]),
        ('root ::= [^a-c\\n] . "\\x41\\u00e9\\U0001F600"', ["x\nAé😀", "axAé😀", "zzAé", "\nyAé😀"]),
        ('root ::= ("ab"){2,3} "c"{2} "d"{1,}', ["ababccd", "abccd", "abababccddd", "ababababccd"]),
        ('root ::= s\ns ::= "(" s ")" s |', ["", "()", "(())()", "(()", ")"]),
        ("root ::= # a comment\n  [-+]? [0-9]+ # another\n  \nunused ::= root", ["-12", "7", "+", "1-"]),
        ('root ::= ( "a" |\n  "b" )+ \nunused ::= "c"', ["ab", "", "c", "bba"]),
        ('root ::= "say \\"hi\\" \\\\ \\[\\]" [\\]\\-\\[]', ['say "hi" \\ []-', 'say "hi" \\ []]', 'say "hi" \\ [].']),
        (JSON_GBNF, ['{"a": [1, -2.5e3, null]}', '{"a": }', '{"b": "x\\u00e9"}', "[]", '{"a": true'] ),
        ('root ::= "é" [à-ü]{2}', ["éàü", "éa", "éé", "ééé"]),
    ],
)  # fmt: skip
def test_a_grammar_takes_what_llamacpp_takes(
    compiler: Compiler, vocabulary: Vocabulary, grammar: str, texts: list[str]
) -> None:
    answers = {text: accepts(compiler.compile(Sampling(grammar=grammar)), vocabulary, text) for text in texts}
    assert answers == {text: taken_by_llamacpp(grammar, vocabulary, text) for text in texts}
    assert set(answers.values()) == {True, False}


@pytest.mark.parametrize(
    ("grammar", "what"),
    [
        ("", "no rule `root`"),
        ('start ::= "a"', "no rule `root`"),
        ("root ::= missing", "line 1, column 10: there is no rule `missing`"),
        ('root ::= "a', "not closed"),
        ("root ::= [a", "not closed"),
        ("root ::= [z-a]", "empty"),
        ("root ::= []", "never be met"),
        ('root ::= "a"{2,1}', "at least 2 and at most 1"),
        ('root ::= "a"{20000}', "more than 10000 repetitions"),
        ('root ::= "a"{,3}', "repetition is"),
        ('root ::= "\\q"', "no escape"),
        ('root ::= "\\uD800"', "no character"),
        ("root ::= <[999999]>", "there is no token 999999"),
        ("root ::= <think>", "only `<\\[number\\]>`"),
        ('root ::= ("a"', "`\\)` is expected"),
        ('root ::= "a" )', "not expected"),
        ('root ::= "a"\nroot ::= "b"', "twice"),
        ("root", "`::=` is expected"),
        ("root ::= " + "(" * 60_000 + '"a"' + ")" * 60_000, "may have 65536 characters"),
        ("root ::= " + "(" * (DEPTH + 1) + '"a"' + ")" * (DEPTH + 1), "nested more than"),
        ("root ::= root [0-9]", "nothing satisfies it"),
    ],
)
def test_what_is_wrong_with_a_grammar_is_said(compiler: Compiler, grammar: str, what: str) -> None:
    with pytest.raises(InvalidRequest, match=what) as error:
        compiler.compile(Sampling(grammar=grammar))
    assert error.value.param == "grammar"
    assert error.value.status == 400


def test_a_token_may_be_named_by_its_number(compiler: Compiler, vocabulary: Vocabulary) -> None:
    (token,) = vocabulary.tokenize("yes")
    constraint = compiler.compile(Sampling(grammar=f'root ::= <[{token}]> "!"'))
    assert allowed(constraint) == [token]


def test_a_grammar_as_large_as_may_be_is_read_in_time() -> None:
    rule = 'r{} ::= "a" | [b-z]{{1,9}} r{}\n'
    text = "root ::= r0\n" + "".join(rule.format(i, (i + 1) % 1500) for i in range(1500))
    assert len(text) < 1 << 16
    assert to_lark(text, 100).count("\n") == 1501
