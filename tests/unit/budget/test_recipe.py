"""How long a pass trains, by what it is to learn."""

import pytest

from agentd.budget.recipe import recipe
from agentd.budget.workload import Workload


@pytest.mark.parametrize(
    ("method", "blocks"), [("suffix-bp", 1), ("elasticzo", 8), ("suffix-bp", 30), ("blockwise-bp", 30)]
)
def test_there_are_epochs_to_choose_among_under_any_plan(method: str, blocks: int) -> None:
    how, choices = recipe(method, blocks, texts=True), recipe(method, blocks)
    for each in (how, choices):
        assert each.epochs > 1, "there would be no state of the adapter to choose by dev"
        assert each.usual <= each.epochs
    assert how.lr == choices.lr


@pytest.mark.parametrize("texts", [True, False])
def test_the_fewer_examples_there_are_the_oftener_they_are_seen(texts: bool) -> None:
    epochs = [recipe("suffix-bp", 16, texts, n).epochs for n in (0, 30, 170, 220, 300, 1000)]
    assert epochs == sorted(epochs, reverse=True)
    assert epochs[0] == epochs[2] > epochs[3] > epochs[4] == epochs[5]
    for n, each in ((220, epochs[3]), (1000, epochs[5])):
        assert each * n / recipe("suffix-bp", 16, texts, n).batch >= 95


def test_what_has_one_answer_is_a_text_and_most_examples_decide() -> None:
    texts = ["Lights off!", "Lights on!", "Good film?"]
    assert Workload.estimated(texts, [{"call"}, {"another"}, {"yes", "no"}]).texts
    assert not Workload.estimated(texts, [{"call"}, {"no", "yes"}, {"yes", "no"}]).texts
    assert not Workload.estimated(texts).texts
