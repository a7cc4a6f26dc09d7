from agentd.store import measurements
from agentd.store.database import Store


def test_the_last_facts_of_a_key_are_recalled(store: Store) -> None:
    assert store.do(measurements.recall, "a") is None
    store.do(measurements.remember, "a", {"blocks": 2})
    store.do(measurements.remember, "a", {"blocks": 3, "cosines": [0.99]})
    assert store.do(measurements.recall, "a") == {"blocks": 3, "cosines": [0.99]}
    assert store.do(measurements.recall, "b") is None


def test_of_many_keys_the_last_stay(store: Store) -> None:
    for i in range(20):
        store.do(measurements.remember, str(i), {"i": i})
    assert store.do(measurements.recall, "19") == {"i": 19}
    assert store.do(measurements.recall, "0") is None
    assert store.do(lambda db: db["measurements"].count) <= 8
