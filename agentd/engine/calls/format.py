"""What a model's answers are made of: reasoning, text and calls, each between texts of its own. Pure data."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from agentd.engine.calls.segments import Hole, Segment, cut, text_of


@dataclass(frozen=True)
class Around:
    """What stands before and after something, without blanks around them. An empty `opening` is one that prompts end
    with already."""

    opening: str
    closing: str


@dataclass(frozen=True)
class JsonArguments:
    """Arguments as one JSON object; `before` stands between the name and it."""

    before: Segment


@dataclass(frozen=True)
class Parameters:
    """Arguments one by one: `before` KEY `middle` VALUE `end`, then `next` KEY and so on. `middle` and `end` differ by
    the JSON type of the value.

    none    stands between the name and the end of a call without arguments
    last    stands behind the last argument, before the next call or the end of all
    values  how values are written: see literals.py
    words   how true, false and null are written where they stand alone
    mark    what stands around texts, where these are `marked`
    sorted  arguments stand in the order of their names
    """

    before: Segment
    next: str
    middle: dict[str, str]
    end: dict[str, str]
    none: Segment
    last: str
    values: str
    words: dict[str, str]
    mark: str = ""
    sorted: bool = False


@dataclass(frozen=True)
class CallFormat:
    """Of calls: `opening` NAME arguments (`gap` NAME arguments)* `closing`.

    later     the opening behind text; None where the template has no place for text in front of a call
    gap       None where an answer may hold one call only
    trigger   what tells a call from text; "" where only a function's name does
    anchored  only the beginning of an answer can be a call
    as_text   the template takes arguments as JSON text, not as an object
    ids       how ids look that the template takes: "" for any nine letters, or a text with {name} and {index}
    alone     with text beside them, the template drops calls
    silence   the content that the template takes where calls stand alone
    lead      what stands in front of text only where calls follow it, without blanks around it
    origin    how it came about: "derived", "parameters" or "generic"
    """

    opening: Segment
    later: Segment | None
    arguments: JsonArguments | Parameters
    gap: Segment | None
    closing: Segment
    trigger: str
    anchored: bool = False
    as_text: bool = False
    ids: str = ""
    alone: bool = False
    silence: str | None = ""
    lead: str = ""
    origin: str = "derived"

    @property
    def shared(self) -> Segment:
        """What every opening ends with, from the trigger on."""
        head = text_of(self.opening)
        at = head.rfind(self.trigger) if self.trigger else len(head) - len(head.lstrip())
        rest = head[at:]
        return (rest, *self.opening[1:]) if rest else self.opening[1:]

    @property
    def carries_ids(self) -> bool:
        """Whether the model writes ids itself, in front of the arguments."""
        return Hole.ID in self.opening or Hole.ID in self.arguments.before

    def triggers(self, names: Sequence[str]) -> list[str]:
        """The texts that open a call of one of these functions."""
        if self.trigger:
            return [self.trigger]
        head = text_of(self.shared)
        return [head + name + text_of(self.arguments.before) for name in names]

    def until(self, ends: Sequence[str]) -> "CallFormat":
        """The format without what stands behind one of these texts, at which answers end."""
        return replace(self, closing=cut(self.closing, ends))


@dataclass(frozen=True)
class AnswerFormat:
    """Of answers: `said` is what stands around their text, `reasoning` around what they think first."""

    calls: CallFormat
    reasoning: Around | None = None
    said: Around | None = None

    def until(self, ends: Sequence[str]) -> "AnswerFormat":
        """The format without what stands behind one of these texts, at which answers end."""
        said = self.said
        if said and any(end and end in said.closing for end in ends):
            said = Around(said.opening, "")
        return replace(self, calls=self.calls.until(ends), said=said)

    def thinks(self, prompt: str) -> bool:
        """Whether a prompt's text ends within the reasoning."""
        return self.reasoning is not None and prompt.rstrip().endswith(self.reasoning.opening)

    def has_thought(self, prompt: str) -> bool:
        """Whether a prompt's text ends with reasoning that is over."""
        return self.reasoning is not None and prompt.rstrip().endswith(self.reasoning.closing)

    def markers(self) -> list[str]:
        """Every fixed text that tells parts apart."""
        calls, arguments = self.calls, self.calls.arguments
        segments = [calls.opening, calls.later or (), calls.gap or (), calls.closing, arguments.before]
        texts = [part for each in segments for part in each if isinstance(part, str)]
        if isinstance(arguments, Parameters):
            texts += [arguments.next, arguments.last, *arguments.middle.values(), *arguments.end.values()]
            texts += [part for part in arguments.none if isinstance(part, str)]
        for span in (self.reasoning, self.said):
            texts += [span.opening, span.closing] if span else []
        texts.append(calls.lead)
        return [text for text in dict.fromkeys(texts) if text]
