"""What every engine promises about the answers it gives."""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from agentd.engine.protocol import Engine, Sampling
from agentd.errors import ContextLengthExceeded, InvalidRequest
from tests.support.engine_samples import CONTEXT, ENGINES, GREEDY, SLOTS, ask, chat, finish, raw, refusal

QUESTIONS = [
    "Name three colours.",
    "What is the capital of France? Answer in one sentence.",
    "Write a short line about the sea, the wind and a lighthouse that has not been lit for many years.",
    "Count from one to five.",
]


@pytest.fixture(scope="module", params=sorted(ENGINES))
def engine(request: pytest.FixtureRequest, model_path: Path) -> Iterator[Engine]:
    local = ENGINES[request.param](model_path)
    yield local
    local.close()


@pytest.fixture
def end(engine: Engine) -> int:
    """The end-of-turn token."""
    background = engine.background(lambda: False)
    token = background.encode({"prompt": "a"}, [], "b").target[-1][2]
    background.close()
    return token


def tokens(engine: Engine, text: str) -> list[int]:
    background = engine.background(lambda: False)
    encoded = background.encode({"prompt": "a\n"}, [], text)
    background.close()
    return [token for _, _, token in encoded.target[:-1]]


def test_an_answer_does_not_depend_on_who_else_is_served(engine: Engine) -> None:
    alone = [ask(engine, chat(f"alone {i}", question))[0].text for i, question in enumerate(QUESTIONS)]
    assert len(set(alone)) == len(QUESTIONS)
    together = ask(engine, *(chat(f"together {i}", question) for i, question in enumerate(QUESTIONS)))
    assert [answer.text for answer in together] == alone
    noise = [chat(f"noise {i}", QUESTIONS[i], Sampling(temperature=1.5), max_tokens=24) for i in range(SLOTS - 1)]
    neighbour = ask(engine, *noise, chat("last", QUESTIONS[3]))[-1]
    assert neighbour.text == alone[3]
    assert neighbour.last.finish == "length"


def test_without_a_seed_all_share_a_batch_with_one_by_itself(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    context = engine._context  # type: ignore[attr-defined]
    decode = context.decode

    def counted(tokens: list[int], positions: object, sequences: list[tuple[int]], rows: object) -> None:
        sizes.append(len({sequence for (sequence,) in sequences}))
        decode(tokens, positions, sequences, rows)

    monkeypatch.setattr(context, "decode", counted)
    free = Sampling(temperature=0)
    ask(engine, *(chat(f"free {i}", QUESTIONS[i], free, max_tokens=6) for i in range(SLOTS)))
    assert max(sizes) == SLOTS
    assert sum(sizes) / len(sizes) > 1.5
    sizes.clear()
    ask(engine, *(chat(f"exact {i}", QUESTIONS[i], max_tokens=6) for i in range(SLOTS)))
    assert max(sizes) == 1


def test_all_of_a_conversation_is_taken_over_but_for_a_seed_what_was_computed_alike(engine: Engine) -> None:
    free = Sampling(temperature=0)
    question = "Is that all? " * 12
    first = ask(engine, chat("turn", question, free))[0]
    assert first.last.finish
    again = ask(engine, chat("turn again", question, free))[0]
    assert again.last.cached_tokens == first.last.prompt_tokens - 1
    exact = ask(engine, chat("turn exact", question))[0]
    assert exact.last.cached_tokens < again.last.cached_tokens
    repeated = ask(engine, chat("turn exact again", question))[0]
    assert repeated.text == exact.text
    assert repeated.last.cached_tokens > 0


@pytest.mark.parametrize(("rate", "longest"), [(1.0, 32), (100.0, 64), (250.0, 160), (1e6, 256)])
def test_a_long_prompt_leaves_the_others_their_turn(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, rate: float, longest: int
) -> None:
    serving = engine._serving  # type: ignore[attr-defined]
    monkeypatch.setattr(serving, "_noted", lambda tokens, seconds: None)
    monkeypatch.setattr(serving, "_prompt_rate", rate)  # tokens a second; a piece takes three quarters of one
    free = Sampling(temperature=0)
    engine.submit(chat("talker", QUESTIONS[2], free, max_tokens=24))
    while not engine.step():
        pass
    pieces: list[int] = []
    context = engine._context  # type: ignore[attr-defined]
    decode = context.decode

    def counted(tokens: list[int], *rest: object) -> None:
        pieces.append(len(tokens))
        decode(tokens, *rest)

    monkeypatch.setattr(context, "decode", counted)
    answer = ask(engine, chat("long", f"{rate} " + "one two three four " * 70, free, max_tokens=2))[0]
    assert answer.last.prompt_tokens > 256
    first = pieces[: next(i for i, n in enumerate(pieces) if i and n > 1) + 1]
    assert max(pieces) == longest
    assert 1 in first  # a token of the talker between two pieces


def test_how_long_prompts_take_is_known_from_those_that_came(engine: Engine) -> None:
    serving = engine._serving  # type: ignore[attr-defined]
    serving._prompt_rate = 1.0
    ask(engine, chat("long", "five six seven eight " * 40, Sampling(temperature=0), max_tokens=1))
    assert serving._prompt_rate > 20


def test_short_prompts_that_come_together_are_read_together(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    free = Sampling(temperature=0)
    sizes: list[int] = []
    context = engine._context  # type: ignore[attr-defined]
    decode = context.decode

    def counted(tokens: list[int], positions: list[int], sequences: list[tuple[int]], rows: object) -> None:
        sizes.append(len({sequence for (sequence,) in sequences}))
        decode(tokens, positions, sequences, rows)

    alone = [ask(engine, raw(f"short {i}", f"{i} {QUESTIONS[i]}", free))[0].text for i in range(SLOTS)]
    monkeypatch.setattr(context, "decode", counted)
    for i in range(SLOTS):
        engine.submit(raw(f"other {i}", f"other {i} {QUESTIONS[i]}", free))
    pieces = engine.step()
    assert sizes[0] == SLOTS
    assert len({piece.key for piece in pieces}) == SLOTS
    finish(engine)
    together = ask(engine, *(raw(f"again {i}", f"{i} {QUESTIONS[i]}", free) for i in range(SLOTS)))
    assert (
        sum(a.text == text for a, text in zip(together, alone, strict=True)) >= SLOTS - 1
    )  # but for two as good as equal


def test_more_requests_than_slots_wait_and_are_all_answered(engine: Engine) -> None:
    requests = [chat(f"many {i}", QUESTIONS[i % 2], max_tokens=4) for i in range(2 * SLOTS + 1)]
    for request in requests:
        engine.submit(request)
    engine.step()
    assert engine.stats()["active"] == SLOTS
    assert engine.stats()["waiting"] == SLOTS + 1
    answers = finish(engine)
    assert all(answers[request.key].last.finish for request in requests)


def test_a_cached_prompt_gives_the_same_answer(engine: Engine) -> None:
    request = chat("first", " ".join(QUESTIONS))  # longer than the first piece of either engine: whole pieces are kept
    first = ask(engine, request)[0]
    again = ask(engine, replace(request, key="again"))[0]
    assert again.text == first.text
    assert again.last.cached_tokens > 0
    assert again.last.prompt_tokens == first.last.prompt_tokens


def test_a_seed_makes_sampling_reproducible(engine: Engine) -> None:
    hot = Sampling(temperature=1.2, seed=7)
    first = ask(engine, chat("seed 7", QUESTIONS[2], hot))[0].text
    neighbours = [chat(f"other {i}", QUESTIONS[i], Sampling(temperature=1.2)) for i in range(2)]
    assert ask(engine, *neighbours, chat("seed 7 again", QUESTIONS[2], hot))[-1].text == first
    assert ask(engine, chat("seed 8", QUESTIONS[2], replace(hot, seed=8)))[0].text != first


def test_the_largest_seed_is_a_seed_too(engine: Engine) -> None:
    hot = Sampling(temperature=1.5, top_k=0, top_p=1.0, min_p=0.0, seed=(1 << 32) - 1)
    first, second = (ask(engine, chat(key, QUESTIONS[0], hot))[0].text for key in "ab")
    assert first == second


def test_a_stop_string_ends_the_answer_wherever_tokens_are_cut(engine: Engine) -> None:
    whole = ask(engine, chat("whole", QUESTIONS[2], max_tokens=24))[0]
    texts = [piece.text for piece in whole.pieces]
    for i in range(2, 8):
        stop = texts[i][-2:] + texts[i + 1][:3]
        before = whole.text[: whole.text.index(stop)]
        answer = ask(engine, chat(f"stop {i}", QUESTIONS[2], max_tokens=24, stop=("never said", stop)))[0]
        assert answer.text == before
        assert answer.last.finish == "stop"


def test_what_only_looked_like_a_stop_string_is_said_after_all(engine: Engine) -> None:
    whole = ask(engine, chat("whole", QUESTIONS[1]))[0]
    begun = tuple(piece.text + "#" for piece in whole.pieces if piece.text)
    assert ask(engine, chat("nearly", QUESTIONS[1], stop=begun))[0].text == whole.text


def test_max_tokens_ends_with_length_and_usage_counts_tokens(engine: Engine) -> None:
    answer = ask(engine, chat("five", QUESTIONS[0], max_tokens=5))[0]
    assert answer.last.finish == "length"
    assert answer.last.completion_tokens == 5
    assert [piece.finish for piece in answer.pieces[:-1]] == [None] * 4
    prompt = ask(engine, raw("raw", "one two", max_tokens=1))[0]
    assert prompt.last.prompt_tokens == len(tokens(engine, "one two"))


def test_the_end_of_turn_ends_with_stop(engine: Engine, end: int) -> None:
    sure = replace(GREEDY, logit_bias=((end, 1000.0),))
    answer = ask(engine, chat("end", QUESTIONS[0], sure))[0]
    assert (answer.text, answer.last.finish) == ("", "stop")


def test_logprobs_are_the_log_softmax_of_the_whole_vocabulary(engine: Engine) -> None:
    answer = ask(engine, chat("all", QUESTIONS[1], max_tokens=2, logprobs=engine.info.n_vocab))[0]
    assert len(answer.logprobs) == 2
    for entry in answer.logprobs:
        ranked = entry["top_logprobs"]
        assert math.fsum(math.exp(top["logprob"]) for top in ranked) == pytest.approx(1, abs=1e-4)
        assert entry["logprob"] == ranked[0]["logprob"] == max(top["logprob"] for top in ranked)
        assert bytes(entry["bytes"]).decode() == entry["token"]
    few = ask(engine, chat("few", QUESTIONS[1], max_tokens=2, logprobs=3))[0]
    assert [entry["top_logprobs"] for entry in few.logprobs] == [e["top_logprobs"][:3] for e in answer.logprobs]
    none = ask(engine, chat("none", QUESTIONS[1], max_tokens=2, logprobs=0))[0]
    assert [entry["top_logprobs"] for entry in none.logprobs] == [[], []]


def test_logit_bias_forbids_and_forces_tokens(engine: Engine) -> None:
    plain = ask(engine, raw("plain", "The capital of France is", max_tokens=1))[0].text
    (token,) = tokens(engine, plain)
    forbidden = replace(GREEDY, logit_bias=((token, -1000.0),))
    assert ask(engine, raw("not", "The capital of France is", forbidden, max_tokens=1))[0].text != plain
    (other,) = tokens(engine, " cat")
    forced = replace(GREEDY, logit_bias=((other, 1000.0),))
    assert ask(engine, raw("cats", "The capital of France is", forced, max_tokens=3))[0].text == " cat" * 3


@pytest.mark.parametrize("penalty", ["repeat_penalty", "frequency_penalty", "presence_penalty"])
def test_penalties_discourage_repetition(engine: Engine, penalty: str) -> None:
    (token,) = tokens(engine, " cat")
    fond = replace(GREEDY, logit_bias=((token, 40.0),))
    assert ask(engine, raw("fond", "I like the", fond, max_tokens=4))[0].text == " cat" * 4
    tired = ask(engine, raw("tired", "I like the", Sampling(**{**asdict(fond), penalty: 40.0}), max_tokens=4))[0].text
    assert tired.startswith(" cat")
    assert tired.count("cat") == 1


def test_a_penalty_counts_what_was_said_under_a_grammar_and_not_what_the_grammar_forbade(engine: Engine) -> None:
    forbidden = tokens(engine, "Paris")[0]
    bias = (*((tokens(engine, letter)[0], 100.0) for letter in "ab"), (forbidden, 200.0))
    sampling = replace(GREEDY, grammar='root ::= ("a" | "b"){6}', logit_bias=bias)
    same = ask(engine, raw("same", "x", sampling))[0].text
    assert len(set(same)) == 1
    mixed = ask(engine, raw("mixed", "x", replace(sampling, frequency_penalty=20.0)))[0].text
    assert mixed.count("a") == mixed.count("b") == 3


def test_json_mode_and_a_json_schema(engine: Engine) -> None:
    schema = {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "London"]}, "sure": {"type": "boolean"}},
        "required": ["city", "sure"],
        "additionalProperties": False,
    }
    sampling = replace(GREEDY, json_schema=json.dumps(schema))
    answer = ask(engine, chat("schema", "What is the capital of France?", sampling, max_tokens=64))[0]
    assert answer.last.finish == "stop"
    tree = json.loads(answer.text)
    assert tree["city"] in ("Paris", "London")
    assert isinstance(tree["sure"], bool)
    free = ask(engine, chat("json", 'Answer {"ok": true}', replace(GREEDY, grammar="json"), max_tokens=48))[0]
    assert free.text.lstrip().startswith("{")
    if free.last.finish == "stop":
        assert isinstance(json.loads(free.text), dict)


def test_a_grammar_is_obeyed(engine: Engine) -> None:
    sampling = Sampling(temperature=1.0, seed=3, grammar='root ::= [0-9]{2} "-" [a-c]+ "."')
    answer = ask(engine, chat("grammar", "Hello", sampling, max_tokens=32))[0]
    if answer.last.finish == "stop":
        assert answer.text.endswith(".")
    digits, _, rest = answer.text.partition("-")
    assert digits.isdigit()
    assert len(digits) == 2
    assert set(rest) <= set("abc.")


@pytest.mark.parametrize("grammar", ["root ::= (", "start ::= [0-9]", "root ::= root [0-9]", "root ::= missing", ""])
def test_a_bad_grammar_is_refused(engine: Engine, grammar: str) -> None:
    assert "grammar" in refusal(engine, chat("bad", "Hello", replace(GREEDY, grammar=grammar)))
    assert "schema" in refusal(engine, chat("bad", "Hello", replace(GREEDY, json_schema="{")))
    assert not engine.busy


@pytest.mark.parametrize(
    "choices",
    [
        ("positive", "negative"),
        ("no", "no way"),
        ("It is a wonderful film", "It is a terrible film"),
        ('a "b" \\', "ü"),
    ],
)
def test_an_answer_is_one_of_the_choices(engine: Engine, choices: tuple[str, ...]) -> None:
    question = "Is this review good? A warm and funny film."
    for sampling in (GREEDY, Sampling(temperature=2.0, seed=1), Sampling(temperature=2.0, seed=2)):
        answer = ask(engine, chat("choice", question, sampling, choices=choices))[0]
        assert answer.text in choices
        assert answer.last.finish == "stop"
    assert ask(engine, raw("raw", question + " It was", choices=choices))[0].text.strip() in choices


def test_a_choice_may_hold_any_character(engine: Engine) -> None:
    odd = ('say "no"', "back\\slash", "tab\there", "bell\b\f", "ünïcode \u2028 line", "[a-z]* | root")
    for choice in odd:
        assert ask(engine, chat("odd", "Hello", choices=(choice, choice + "!"), max_tokens=64))[0].text.startswith(
            choice
        )


def test_a_prompt_beyond_the_context_is_refused(engine: Engine) -> None:
    with pytest.raises(ContextLengthExceeded, match=str(CONTEXT)):
        engine.submit(raw("long", "word " * CONTEXT))
    with pytest.raises(InvalidRequest, match="empty"):
        engine.submit(raw("empty", ""))
    with pytest.raises(InvalidRequest, match="surrogate"):
        engine.submit(raw("surrogate", "half \ud83d"))
    assert not engine.busy


def test_an_answer_that_fills_the_context_ends_with_length(engine: Engine, end: int) -> None:
    sampling = replace(GREEDY, logit_bias=((end, -1000.0),))
    word = tokens(engine, " word")
    for spare in (1, 6):
        text = "word" + " word" * ((CONTEXT - spare) // len(word) - 1)
        answer = ask(engine, raw(f"full {spare}", text, sampling, max_tokens=100))[0]
        assert answer.last.finish == "length"
        assert answer.last.prompt_tokens + answer.last.completion_tokens == CONTEXT


def test_cancelled_requests_say_nothing_more_and_disturb_no_others(engine: Engine) -> None:
    alone = ask(engine, chat("alone", QUESTIONS[1]))[0].text
    keys = [f"running {i}" for i in range(SLOTS)]
    for key in keys:
        engine.submit(chat(key, QUESTIONS[1]))
    engine.submit(chat("waiting", QUESTIONS[0]))
    early = [piece for _ in range(6) for piece in engine.step()]
    assert {piece.key for piece in early} >= {keys[0]}
    engine.cancel("waiting")
    engine.cancel(keys[0])
    engine.cancel("unknown")
    answers = finish(engine)
    assert set(answers) == set(keys[1:])
    begun = "".join(piece.text for piece in early if piece.key == keys[1])
    assert begun + answers[keys[1]].text == alone
    assert ask(engine, chat("after", QUESTIONS[1]))[0].text == alone


def test_characters_made_of_several_tokens_come_whole(engine: Engine) -> None:
    said = "😀🎉 naïve 漢字"
    answer = ask(engine, chat("emoji", "Hello", choices=(said,), max_tokens=64))[0]
    assert answer.text == said
    assert answer.last.completion_tokens > len(said)  # or the test would not test anything
    assert not any("\ufffd" in piece.text for piece in answer.pieces)
    cut = ask(engine, chat("cut", "Hello", choices=("😀😀😀😀",), max_tokens=2))[0]
    assert cut.last.finish == "length"
    assert len(cut.text.encode()) > 0
