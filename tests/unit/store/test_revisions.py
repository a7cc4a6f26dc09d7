from contextlib import closing
from pathlib import Path

import pytest

from agentd.errors import NotFound
from agentd.store import passes, revisions, trials
from agentd.store.database import Store
from tests.support.store_samples import revision


def test_the_base_is_always_there_and_serves_at_first(store: Store) -> None:
    base = store.do(revisions.get, 0)
    assert (base.state, base.parent, base.summary) == ("base", None, {})
    assert store.do(revisions.committed) == 0
    assert store.do(revisions.next_id) == 1


def test_a_revision_comes_back_as_it_was(store: Store) -> None:
    sample = revision(1, summary={"sentiment": {"before": 0.54, "after": 0.86, "n": 300}})
    store.do(revisions.add, sample)
    assert store.do(revisions.get, 1) == sample
    assert store.do(revisions.all)[1:] == [sample]
    store.do(revisions.set_state, 1, "discarded", "the file is gone")
    assert store.do(revisions.get, 1).as_json() == {
        **sample.as_json(),
        "state": "discarded",
        "reason": "the file is gone",
    }


def test_numbers_are_never_used_again(store: Store) -> None:
    store.do(revisions.add, revision(1))
    failed = store.do(passes.create, "manual", 0, 0, {}).id
    store.do(passes.update, failed, revision=store.do(revisions.next_id))
    assert store.do(revisions.next_id) == 3  # 2 was claimed by a pass that died; its files may lie about
    store.do(revisions.set_state, 1, "rolled_back", "slow")
    assert store.do(revisions.next_id) == 3


def test_what_serves_is_what_was_activated_last(tmp_path: Path) -> None:
    with closing(Store(tmp_path / "agentd.db")) as store:
        store.do(revisions.add, revision(1))
        store.do(revisions.add, revision(2, 1))
        assert store.do(revisions.activate, 1, "committed").previous == 0
        assert store.do(revisions.activate, 2, "committed").previous == 1
        back = store.do(revisions.activate, 0, "rollback")
        assert (back.revision, back.previous, back.reason) == (0, 2, "rollback")
        with pytest.raises(NotFound, match="no revision '9'"):
            store.do(revisions.activate, 9, "typo")
    with closing(Store(tmp_path / "agentd.db")) as store:
        assert store.do(revisions.committed) == 0
        assert [one.revision for one in store.do(revisions.history, 2)] == [0, 2]


def test_lineage_goes_up_and_children_down(store: Store) -> None:
    for id, parent in ((1, 0), (2, 1), (3, 1), (4, 3)):
        store.do(revisions.add, revision(id, parent))
    assert store.do(revisions.lineage, 4) == [4, 3, 1, 0]
    assert store.do(revisions.lineage, 0) == [0]
    assert store.do(revisions.children, 1) == [2, 3]
    for unknown in (revisions.get, revisions.lineage):
        with pytest.raises(NotFound, match="no revision '9'"):
            store.do(unknown, 9)
    with pytest.raises(NotFound):
        store.do(revisions.set_state, 9, "committed")


def test_a_trial_is_remembered_and_runs_out_of_attempts(tmp_path: Path) -> None:
    with closing(Store(tmp_path / "agentd.db")) as store:
        assert store.do(trials.running) is None
        pass_id = store.do(passes.create, "manual", 0, 0, {}).id
        store.do(revisions.add, revision(1, pass_id=pass_id))
        trial = store.do(trials.start, 1, pass_id, 2)
        assert (trial.attempts_left, trial.state) == (2, "running")
    for left in (1, 0, 0):
        with closing(Store(tmp_path / "agentd.db")) as store:
            assert store.do(trials.running) is not None
            assert store.do(trials.spend_attempt, 1) == left
    with closing(Store(tmp_path / "agentd.db")) as store:
        store.do(trials.finish, 1, "failed", "no attempts left")
        assert store.do(trials.running) is None
        assert store.do(trials.start, 1, pass_id, 3).reason is None
        store.do(trials.finish, 1, "passed")
        for act in (lambda db: trials.spend_attempt(db, 9), lambda db: trials.finish(db, 9, "passed")):
            with pytest.raises(NotFound, match="no trial of revision '9'"):
                store.do(act)
