"""Bytes of tokens become text that may be sent."""

import random

import pytest

from agentd.engine.text import Detokenizer

TEXT = "naïve 😀🎉 café\n\nUser: 漢字 END of text, the END. STOPSTOP"


def cut(data: bytes, rng: random.Random) -> list[bytes]:
    """The bytes in pieces of 1 to 5."""
    parts = []
    while data:
        n = rng.randint(1, 5)
        parts.append(data[:n])
        data = data[n:]
    return parts


@pytest.mark.parametrize("seed", range(20))
def test_text_is_whole_however_the_bytes_are_cut(seed: int) -> None:
    detokenizer = Detokenizer(["never said", "END of time", ""])
    said = [detokenizer.feed(part) for part in cut(TEXT.encode(), random.Random(seed))]
    assert not any("\ufffd" in text for text in said)
    assert "".join(said) + detokenizer.flush() == TEXT
    assert not detokenizer.stopped


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("stop", [("\n\nUser:",), ("END.",), ("😀🎉",), ("STOPSTOP", "of"), ("é", "never"), ("n",)])
def test_nothing_of_a_stop_string_gets_out(stop: tuple[str, ...], seed: int) -> None:
    expected = TEXT[: min(TEXT.index(text) for text in stop if text in TEXT)]
    detokenizer = Detokenizer(stop)
    said = ""
    for part in cut(TEXT.encode(), random.Random(seed)):
        said += detokenizer.feed(part)
        assert expected.startswith(said)
        if detokenizer.stopped:
            break
    assert detokenizer.stopped
    assert said == expected
    assert detokenizer.flush() == ""


def test_the_end_lets_go_of_what_was_held_back() -> None:
    detokenizer = Detokenizer(["STOP"])
    assert detokenizer.feed(b"a ST") == "a "
    assert detokenizer.feed(b"O") == ""
    assert detokenizer.flush() == "STO"


def test_half_a_character_at_the_end_shows_as_one_replacement() -> None:
    detokenizer = Detokenizer([])
    assert detokenizer.feed("é😀".encode()[:4]) == "é"
    assert detokenizer.flush() == "\ufffd"


def test_a_held_beginning_that_turns_into_another_is_kept() -> None:
    detokenizer = Detokenizer(["aab"])
    assert [detokenizer.feed(b"a") for _ in range(3)] == ["", "", "a"]
    assert detokenizer.feed(b"b") == ""
    assert detokenizer.stopped
