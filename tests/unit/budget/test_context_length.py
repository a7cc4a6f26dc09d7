"""Tokens of one request, where the configuration leaves them to the machine."""

from agentd.budget.context_length import LEAST, MOST, fitted
from agentd.budget.model_shapes import ModelShapes

GIB = 1 << 30
SMALL = ModelShapes.dense("llama", n_layer=30, n_embd=576, n_head=9, n_head_kv=3, n_ff=1536, n_vocab=49152)
LARGE = ModelShapes.dense("llama", n_layer=32, n_embd=4096, n_head=32, n_head_kv=32, n_ff=11008, n_vocab=32000)


def test_what_the_model_was_trained_for_where_there_is_memory() -> None:
    assert fitted(SMALL, 8192, 4, 16 * GIB) == 8192
    assert fitted(SMALL, 1024, 4, 16 * GIB) == 1024
    assert fitted(SMALL, 1 << 20, 1, 64 * GIB) == MOST
    assert fitted(SMALL, None, 1, 64 * GIB) == MOST


def test_full_caches_take_no_more_than_half_of_what_is_free() -> None:
    for free in (2 * GIB, 3 * GIB, 5 * GIB + 12345):
        tokens = fitted(SMALL, 1 << 20, 4, free)
        assert LEAST < tokens < MOST
        assert 4 * tokens * SMALL.kv_bytes_per_token <= free // 2
        assert tokens % 256 == 0
        assert fitted(SMALL, 1 << 20, 8, free) < tokens
        assert fitted(SMALL, 1 << 20, 4, free, value_bytes=4) < tokens


def test_there_is_a_least_however_little_is_free() -> None:
    assert fitted(LARGE, 4096, 4, GIB) == LEAST
    assert fitted(LARGE, 4096, 4, -GIB) == LEAST
    assert fitted(LARGE, 512, 4, -GIB) == 512
