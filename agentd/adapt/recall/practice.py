"""Examples of a pass with past corrections in their prompts: where recall is on for a task, the weights meet prompts
with it and without it, so that they neither unlearn to read it nor come to need it. The gate asks without."""

import random
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sqlite_utils import Database

from agentd.adapt.planning.dataset import Dataset, Member
from agentd.adapt.recall.turns import recollect
from agentd.store.database import Store

SHARE = 0.25  # of a task's training examples: each of these has the prompts of several


async def with_recall(store: Store, data: Dataset, counts: Mapping[str, int], tokens: int, seed: int) -> Dataset:
    """The dataset with `SHARE` of the training examples as they would be asked with recall: with as many corrections as
    `counts` says of their task, none of which is the example itself or nearly the same. Held-out examples are neither
    recalled nor asked so. The same dataset where recall is on for no task of it.

    tokens  that recall may make a prompt longer
    """
    prompted: dict[int, Member] = {}
    for member in data.of("train"):
        k = counts.get(member.task.name, 0) if "messages" in member.example.input else 0
        if not k or random.Random(f"{seed}/{member.example.id}").random() >= SHARE:
            continue
        turns = await store.call(_turns, member, k, tokens)  # one by one: others ask the store meanwhile
        if turns:
            prompted[member.number] = replace(member, recalled={"turns": turns, "tokens": tokens})
    if not prompted:
        return data
    return replace(data, members=[prompted.get(member.number, member) for member in data.members])


def _turns(db: Database, member: Member, k: int, tokens: int) -> list[list[dict[str, Any]]]:
    example, task = member.example, member.task
    choices = [] if task.open or "tools" in example.input else member.choices
    form = {name: example.input.get(name) for name in ("response_format", "grammar")}
    recollection = recollect(
        db, task.name, example.input, choices, k=k, tokens=tokens, form=form, without=(example.text_key,), apart=True
    )
    return [list(turn) for turn in recollection.turns]
