"""Whether the time in which an API key is looked up tells how near it is to a valid one.

    python -m tools.bench keys [--keys N] [--looks N]

Looks keys up in a ring of N, as every request over TCP has it done: the first and the last of the list, the last one
with its first or last character changed, and random ones. They take turns in an order drawn anew each time. Beside the
median there is how often a look takes longer than one for a random key: 50 % where nothing shows.
"""

import argparse
import asyncio
import random
import secrets
import statistics
import tempfile
import time
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from agentd.api.access import Scope
from agentd.api.key_ring import KeyRing
from agentd.store.database import Store

RANDOM = "random"


def kinds(keys: list[str]) -> dict[str, Callable[[], str]]:
    """What makes the next text of each kind."""
    last = keys[-1]
    prefix, secret = last[:-43], last[-43:]
    other = {False: "A", True: "B"}
    return {
        "the first": lambda: keys[0],
        "the last": lambda: last,
        "first character wrong": lambda: prefix + other[secret[0] == "A"] + secret[1:],
        "last character wrong": lambda: last[:-1] + other[last[-1] == "A"],
        RANDOM: lambda: prefix + secrets.token_urlsafe(32),
    }


def measure(keys: int, looks: int, number: int = 0) -> dict[str, list[int]]:
    """Nanoseconds of each look, by kind."""
    draw = random.Random(number)
    with tempfile.TemporaryDirectory(prefix="agentd-") as folder, closing(Store(Path(folder) / "agentd.db")) as store:
        ring = KeyRing(store)
        texts = [asyncio.run(ring.add(f"key{i}", Scope.ASK, None))[0] for i in range(keys)]
        made = kinds(texts)
        times: dict[str, list[int]] = {name: [] for name in made}
        order = list(made)
        for _ in range(looks):
            draw.shuffle(order)
            for name, text in [(name, "".join(list(made[name]()))) for name in order]:  # none is known to a cache
                begin = time.perf_counter_ns()
                ring.find(text)
                times[name].append(time.perf_counter_ns() - begin)
    return times


def slower(times: list[int], than: list[int]) -> float:
    """The share of pairs in which the one of `times` is the longer; equal ones count half."""
    ordered = sorted(than)
    ranks = (bisect_left(ordered, each) + bisect_right(ordered, each) for each in times)
    return sum(ranks) / (2 * len(times) * len(than))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=int, default=16, help="in the ring (%(default)s)")
    parser.add_argument("--looks", type=int, default=20_000, help="of each kind (%(default)s)")
    options = parser.parse_args()
    times = measure(options.keys, options.looks)
    print(f"{'key':24} {'median':>9} {'longer than a random one':>26}")
    for name, each in times.items():
        median = statistics.median(each) / 1e3
        share = "" if name == RANDOM else f"{slower(each, times[RANDOM]):.1%}"
        print(f"{name:24} {median:6.2f} µs {share:>26}")


if __name__ == "__main__":
    main()
