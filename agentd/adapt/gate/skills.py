"""Skills: what a model knows and can do besides its tasks, told by probes in nine groups: a prompt, its right
continuation and one or two wrong ones of about its length.

A probe's score is the probability of the right continuation among its own, from their log-likelihoods: softmax over the
continuations. A log-likelihood by itself would not do: learning to answer a task moves those of all texts alike, of
right and wrong continuations, and a few confident tokens rule the mean of a group. Between 0 and 1 no probe outweighs
the others, and what is common to the continuations falls out.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

from agentd.learn.significance import paired_permutation


@dataclass(frozen=True)
class Probe:
    """`answers` begin with the right one. `chat`: the prompt is a user's message; else its text goes on."""

    group: str
    prompt: str
    answers: list[str]
    chat: bool = False


@dataclass(frozen=True)
class Skill:
    """How base and candidate do on the `n` probes of a group: means of scores, and the p-value of "the candidate is no
    worse"."""

    n: int
    before: float
    after: float
    p: float

    @property
    def loss(self) -> float:
        """The share of the base's score that the candidate lost."""
        return 1.0 - self.after / self.before if self.before else 0.0

    @property
    def figures(self) -> dict[str, Any]:
        return {"n": self.n, "before": self.before, "after": self.after, "p": self.p}


@dataclass
class Baseline:
    """What the base scored: it is the same for every pass, and asked once."""

    log_likelihoods: list[list[float]] | None = None


@cache
def probes() -> tuple[Probe, ...]:
    """Those of skills.txt: `# group`, and lines of a prompt and its continuations between bars; a message of a chat
    begins with @."""
    listed: list[Probe] = []
    group = ""
    for line in (resources.files("agentd.adapt.gate") / "skills.txt").read_text("utf-8").split("\n"):
        if line.startswith("# "):
            group = line[2:]
        elif line:
            prompt, *answers = (part.strip() for part in line.replace("\\n", "\n").split("|"))
            listed.append(Probe(group, prompt.removeprefix("@"), answers, prompt.startswith("@")))
    return tuple(listed)


def score(log_likelihoods: Sequence[float]) -> float:
    """The probability of the first continuation among all; 0 where anything is not finite."""
    if not all(map(math.isfinite, log_likelihoods)):
        return 0.0
    largest = max(log_likelihoods)
    weights = [math.exp(each - largest) for each in log_likelihoods]
    return weights[0] / math.fsum(weights)


def compare(before: Sequence[Sequence[float]], after: Sequence[Sequence[float]], seed: int) -> dict[str, Skill]:
    """By group, from the log-likelihoods of every probe's continuations in the order of `probes`."""
    by_group: dict[str, list[tuple[float, float]]] = {}
    for probe, old, new in zip(probes(), before, after, strict=True):
        by_group.setdefault(probe.group, []).append((score(old), score(new)))
    skills = {}
    for group, pairs in by_group.items():
        olds, news = [old for old, _ in pairs], [new for _, new in pairs]
        p = paired_permutation(olds, news, seed)  # as if they were losses: small where they went down
        skills[group] = Skill(len(pairs), statistics.fmean(olds), statistics.fmean(news), p)
    return skills


def lost(skills: Mapping[str, Skill], max_loss: float, alpha: float) -> list[str]:
    """The groups that got worse by more than `max_loss`, and not by chance: among twenty probes one that turns can be
    as much. With a test on each group, the level of each is alpha / groups (Bonferroni), so that of candidates that
    lost nothing at most a share of alpha is turned down."""
    return [
        group for group, skill in skills.items() if skill.loss > max_loss and skill.p <= alpha / max(1, len(skills))
    ]
