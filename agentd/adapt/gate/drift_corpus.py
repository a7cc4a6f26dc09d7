"""The drift corpus: text that has nothing to do with any task, on which drift from the base is measured."""

from importlib import resources


def drift_corpus() -> list[str]:
    """Some sentences each."""
    return (resources.files("agentd.adapt.gate") / "drift_corpus.txt").read_text().strip().split("\n\n")
