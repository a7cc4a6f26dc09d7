"""What a process has at its start is not gone through again and again."""

import subprocess
import sys

CODE = """
import gc
from agentd.host import allocator

kept = [[] for _ in range(100_000)]
class Node: pass
gone = Node()
gone.self = gone
allocator.settle()
assert not gc.get_objects(), len(gc.get_objects())
assert gc.get_freeze_count() > 100_000
import weakref
later = Node()
later.self = later
there = weakref.ref(later)
del later
allocator.give_back()
assert there() is None
"""


def test_what_is_there_is_left_alone_and_what_comes_is_collected() -> None:
    subprocess.run([sys.executable, "-c", CODE], check=True)
