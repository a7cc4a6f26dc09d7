"""How long a pass trains, by what it is to learn."""

import pytest

from agentd.budget.recipe import recipe
from agentd.budget.workload import Workload


@pytest.mark.parametrize(
    ("method", "blocks"), [("suffix-bp", 1), ("elasticzo", 8), ("suffix-bp", 30), ("blockwise-bp", 30)]
)
def test_texts_get_epochs_to_choose_among_under_any_plan(method: str, blocks: int) -> None:
    how, choices = recipe(method, blocks, texts=True), recipe(method, blocks)
    assert how.epochs > 1, "there would be no state of the adapter to choose by dev"
    assert how.usual <= how.epochs
    assert how.lr == choices.lr


def test_what_has_one_answer_is_a_text_and_most_examples_decide() -> None:
    texts = ["Lights off!", "Lights on!", "Good film?"]
    assert Workload.estimated(texts, [{"call"}, {"another"}, {"yes", "no"}]).texts
    assert not Workload.estimated(texts, [{"call"}, {"no", "yes"}, {"yes", "no"}]).texts
    assert not Workload.estimated(texts).texts
