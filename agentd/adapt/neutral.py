"""Text that has nothing to do with any task: what drift from the base is measured on."""

from importlib import resources


def neutral_texts() -> list[str]:
    """Some sentences each."""
    return (resources.files("agentd.adapt") / "neutral.txt").read_text().strip().split("\n\n")
