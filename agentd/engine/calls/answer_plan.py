"""How one answer is read and constrained, by its format and by what its request says about tools."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from agentd.engine.calls.format import AnswerFormat
from agentd.engine.calls.grammar import CallGrammar
from agentd.engine.calls.reader import AnswerReader
from agentd.formats.tool_use import ToolUse


@dataclass(frozen=True)
class AnswerPlan:
    """`controls` are the control tokens of the format by their texts. `thinking`: the prompt ended within the
    reasoning; `may_think`: an answer may begin with some."""

    form: AnswerFormat
    use: ToolUse
    controls: Mapping[str, int]
    thinking: bool
    may_think: bool

    def reader(self) -> AnswerReader:
        return AnswerReader(self.form, self.use.parameters, thinking=self.thinking)

    @property
    def triggers(self) -> list[str]:
        """The texts from which on an answer is constrained."""
        return self.form.calls.triggers(list(self.use.parameters))

    def grammar(self, schema: Any = None) -> tuple[str, bool]:
        """(the grammar in Lark, whether it holds from the first token on and not only from a trigger). `schema` is what
        an answer without calls must satisfy. Raises InvalidRequest."""
        grammar = CallGrammar(self.form, self.use, self.controls)
        if not self.use.required and schema is None:
            return grammar.call(), False
        other = None if self.use.required else schema
        return grammar.whole(thinking=self.thinking, may_think=self.may_think, schema=other), True
