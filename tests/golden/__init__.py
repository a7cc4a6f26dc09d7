"""Goldens: what agentd computes, writes and answers, recorded, so that moving its code about changes none of it.

They say nothing about whether a value is right (the other tests do), only that it is the one that was recorded. What is
promised to be the same on every machine is compared by sha256: replayed weights, integer networks, files. What floating
point computes differs in its last digits from one processor to the next, and is compared with a relative tolerance.

    python -m pytest tests/golden            compares
    python -m tests.golden.record [SECTION]  records anew, and prints what has changed

Record anew only for a change that is meant to change a value, in a commit of its own that says why.
"""
