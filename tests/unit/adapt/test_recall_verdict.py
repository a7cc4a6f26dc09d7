"""When past corrections in the prompt are taken to help."""

import pytest

from agentd.adapt.recall.verdict import Answers, Judgement, judge


def hits(*right: int, n: int = 40) -> Answers:
    return Answers([i in right for i in range(n)])


def verdict(without: Answers, with_: dict[int, Answers], *, held_out: bool = True, on: bool = False) -> Judgement:
    return judge(without, with_, held_out=held_out, alpha=0.05, on=on, seed=0)


def test_held_out_examples_must_show_it_at_the_level_of_all_that_was_tried() -> None:
    ten = range(10)
    some = {k: hits(*ten, *range(20, 20 + won)) for k, won in ((1, 2), (2, 5), (4, 4), (8, 3))}
    weak = verdict(hits(*ten), some)
    assert (weak.active, weak.k) == (False, 2)  # five of five: p 0.016, four times that is more than 0.05
    strong = verdict(hits(*ten), {**some, 4: hits(*ten, *range(20, 28))})
    assert (strong.active, strong.k) == (True, 4)
    assert "accuracy 0.250 → 0.450 with 4 corrections, on 40 held-out examples" in strong.reason
    assert strong.figures["with"]["4"] == 0.45


def test_the_fewest_of_equally_good_numbers_are_taken() -> None:
    better = hits(*range(12))
    assert verdict(hits(), {1: hits(1), 2: better, 4: better, 8: better}).k == 2


@pytest.mark.parametrize(
    ("won", "lost", "active"), [(1, 0, False), (2, 0, True), (3, 0, True), (3, 1, False), (0, 0, False)]
)
def test_a_handful_of_corrections_may_show_it_by_each_other(won: int, lost: int, active: bool) -> None:
    base, better = hits(*range(3, 3 + lost), n=6), hits(*range(won), n=6)
    assert verdict(base, {1: better}, held_out=False).active is active


def test_what_is_on_stays_so_while_it_seems_to_help_and_no_longer() -> None:
    base, better = hits(*range(10)), hits(*range(13))
    assert not verdict(base, {1: better, 2: better, 4: better}).active
    assert verdict(base, {4: better}, on=True).active
    assert not verdict(better, {4: better}, on=True).active  # the weights alone do as well
    assert not verdict(better, {4: base}, on=True).active


def test_only_what_was_answered_by_all_counts() -> None:
    late = Answers([True] * 10 + [None] * 30)
    result = verdict(Answers([False] * 40), {1: late})
    assert result.figures["n"] == 10
    assert result.active
    assert not verdict(Answers([None] * 40), {1: late}).active


def test_where_nothing_is_right_or_wrong_ranks_of_losses_decide() -> None:
    before, after = Answers(losses=[2.0 + i / 50 for i in range(40)]), Answers(losses=[1.5 + i / 50 for i in range(40)])
    result = verdict(before, {1: after})
    assert result.active
    assert result.figures["measure"] == "loss"
    assert not verdict(after, {1: before}).active
    assert not verdict(before, {1: Answers(losses=[float("inf")] * 40)}).active
