"""What the trainer is told of its examples."""

from agentd.adapt.passes.trainer_job import groups_of
from agentd.adapt.planning.dataset import Member
from agentd.store.examples import Example
from agentd.store.tasks import THUMB, Task


def member(number: int, task: str, state: str = "new", kind: str = "label", role: str = "train") -> Member:
    example = Example(str(number), task, kind, {}, "yes", "train", state, None, "", "", str(number))
    return Member(number, example, role, Task(task, ["yes", "no"], False, "auto", None, "feedback", ""))


def test_new_and_old_examples_of_a_task_are_wrong_apart_and_what_nobody_answered_is_never_wrong() -> None:
    members = [
        member(0, "a"),
        member(1, "a", role="dev"),
        member(2, "a", "used"),
        member(3, "b"),
        member(4, "a", kind=THUMB),
        member(5, "a", role="replay"),
    ]
    groups = groups_of(members)
    assert groups[0] == groups[1]
    assert len({groups[0], groups[2], groups[3]}) == 3
    assert groups[4] == groups[5] == 0
    assert min(groups[number] for number in range(4)) > 0
