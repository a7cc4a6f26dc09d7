"""From a request's input to tokens: the model's own chat template, and answers as they follow a prompt."""

import json
import logging
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import Any

from agentd.engine.calls.answer_plan import AnswerPlan
from agentd.engine.calls.rendering import Conversation
from agentd.engine.chat_template import ChatTemplate, TemplateRefusal
from agentd.engine.protocol import Sampling
from agentd.errors import InvalidRequest
from agentd.formats.tool_use import tool_use

logger = logging.getLogger(__name__)

_NO_TEMPLATE = "this model has no chat template; use /v1/completions"
_TAIL = 32  # tokens of a prompt that tell whether it ends within the reasoning
_MARKS = tuple(map(chr, range(0xE000, 0xF8FF)))  # private use: no tokenizer or template gives them a meaning


class Prompts(ABC):
    """A vocabulary; what it needs of a tokenizer differs by engine.

    end   the end-of-turn token
    size  number of tokens
    """

    end: int
    size: int

    def __init__(self, template: str | None, bos: str, eos: str) -> None:
        """`template` is the chat template's source; `bos` and `eos` are the texts of the tokens it may ask for."""
        self._source, self._eos = template, eos
        self.conversation: Conversation | None = None
        self._problem: str | None = None
        if template:
            try:
                self.conversation = Conversation(ChatTemplate(template, bos, eos), self._end_texts)
            except Exception as error:  # a model file is input; the rest of it can be served
                self._problem = f"the model's chat template cannot be used: {error}; use /v1/completions"
                logger.warning("%s", self._problem)

    @property
    def has_chat_template(self) -> bool:
        return self.conversation is not None

    @abstractmethod
    def tokenize(self, text: str, *, begin: bool = False, special: bool = False) -> list[int]:
        """Tokens of `text`; `begin` adds the beginning-of-sequence token, `special` recognises control tokens."""

    @abstractmethod
    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The bytes of a token; a part of a character where the vocabulary splits characters."""

    @abstractmethod
    def is_end(self, token: int) -> bool: ...

    def _end_texts(self) -> list[str]:
        """The texts of the tokens at which answers end, as far as the template writes them."""
        ends = [self.piece(self.end, special=True).decode("utf-8", "replace"), self._eos]
        for text, _ in self.controls():
            if text and text in (self._source or "") and len(tokens := self.tokenize(text, special=True)) == 1:
                ends += [text] if self.is_end(tokens[0]) else []
        return list(dict.fromkeys(text for text in ends if text))

    @abstractmethod
    def controls(self) -> Iterable[tuple[str, bool]]:
        """The texts of tokens that control something, and whether they do in any text that is tokenised with `special`
        alone; of the others (a vocabulary's own additions, such as `<tool_call>`) every text may be made."""

    def prepare(self) -> None:
        """Reads off the template now what the first conversation would wait for. Raises what that would get."""
        _ = self._control_texts, self._added_texts, self._visible

    def prompt(self, input: dict[str, Any]) -> list[int]:
        """Tokens of {"messages": [...]} in the chat template, ready to be answered, or of {"prompt": text or tokens};
        with {"special": True} such a text may hold control tokens. What messages say never becomes one."""
        if "prompt" in input and not isinstance(input["prompt"], str):
            return self._checked(input["prompt"])
        head, last, special = self._pieces(input)
        return [*head, *self.tokenize(last, begin=not head, special=special)]

    def answer(self, input: dict[str, Any], prompt: list[int], text: str) -> list[int]:
        """Tokens of `text` as the answer to `input`, whose tokens are `prompt`.

        Tokenised together where that keeps the prompt's tokens, because some tokenizers treat the beginning of a text
        differently from its middle. After a raw prompt that ends in a word, an answer begins with a space.
        """
        if "prompt" in input and not isinstance(input["prompt"], str):
            return self._plain(text)
        head, last, special = self._pieces(input)
        if "prompt" in input and last and not last[-1].isspace() and not text[:1].isspace():
            text = " " + text
        if not self._control_texts.search(text):
            together = [*head, *self.tokenize(last + text, begin=not head, special=special)]
            if together[: len(prompt)] == prompt and len(together) > len(prompt):
                return together[len(prompt) :]
        return self._plain(text)

    def target(self, input: dict[str, Any], prompt: list[int], message: dict[str, Any]) -> list[int]:
        """Tokens of an assistant's message, text or calls, as the answer to `input`, whose tokens are `prompt`: the
        template's own words for it. What the message says never becomes a control token. Raises InvalidRequest."""
        if self.conversation is None or "messages" not in input:
            return self.answer(input, prompt, str(message.get("content") or ""))
        whole = {"input": input, "message": message}
        written = json.dumps(whole, ensure_ascii=False)
        mark = next(mark for mark in _MARKS if mark not in written)
        marked = self._marked(whole, mark)
        try:
            text = self.conversation.answer(marked["input"], marked["message"])
        except TemplateRefusal as error:
            raise InvalidRequest(f"the model's chat template refuses this message: {error}", param="messages") from None
        head, last, _ = self._marked_tokens(text, mark)
        return [*head, *self.tokenize(last, special=True)]

    def _pieces(self, input: dict[str, Any]) -> tuple[list[int], str, bool]:
        """A prompt as tokens, and as the text of which its end is made, with or without control tokens.

        What messages say is marked where it looks like a control token: the mark stands after its first character, so
        that templates treat the text as before and none of its tokens is made. Then the text between the template's
        own control tokens that holds a mark is tokenised without them.
        """
        if "prompt" in input:
            return [], input["prompt"], bool(input.get("special"))
        written = json.dumps(input, ensure_ascii=False)
        if not self._control_texts.search(written):
            return [], self.render(input), True
        mark = next(mark for mark in _MARKS if mark not in written)
        rendered = self.render(self._marked(input, mark))
        return self._marked_tokens(rendered, mark)

    def _marked_tokens(self, text: str, mark: str) -> tuple[list[int], str, bool]:
        """A text with marks as `_pieces` has it."""
        tokens: list[int] = []
        pending = ""  # with control tokens and without marks
        for part, is_control in self._split(text):
            if is_control or mark not in part:
                pending += part
                continue
            if pending:
                tokens += self.tokenize(pending, begin=not tokens, special=True)
            tokens += self._plain(part.replace(mark, ""), begin=not tokens)
            pending = ""
        return tokens, pending, True

    def _split(self, text: str) -> Iterator[tuple[str, bool]]:
        """A text in parts: control tokens, and what stands between them."""
        at = 0
        for match in self._control_texts.finditer(text):
            if match.start() > at:
                yield text[at : match.start()], False
            yield match.group(), True
            at = match.end()
        if at < len(text):
            yield text[at:], False

    def _marked(self, value: Any, mark: str) -> Any:
        if isinstance(value, str):
            return self._control_texts.sub(lambda match: match.group()[0] + mark + match.group()[1:], value)
        if isinstance(value, list):
            return [self._marked(each, mark) for each in value]
        if isinstance(value, dict):
            return {self._marked(key, mark): self._marked(each, mark) for key, each in value.items()}
        return value

    def _plain(self, text: str, *, begin: bool = False) -> list[int]:
        """Tokens of a text of which no control token is made. A vocabulary's own additions are kept from it by cutting
        them after their first character."""
        tokens: list[int] = []
        at = 0
        for match in self._added_texts.finditer(text) if self._added_texts else ():
            tokens += self.tokenize(text[at : match.start() + 1], begin=begin and not tokens)
            at = match.start() + 1
        return [*tokens, *self.tokenize(text[at:], begin=begin and not tokens)]

    def _checked(self, tokens: list[int]) -> list[int]:
        for token in tokens:
            if not 0 <= token < self.size:
                raise InvalidRequest(f"there is no token {token}; the vocabulary has {self.size}", param="prompt")
        return tokens

    # --- what an answer is made of

    def answer_plan(self, input: dict[str, Any], prompt: list[int], sampling: Sampling) -> AnswerPlan | None:
        """How an answer to `input`, whose tokens are `prompt`, is taken apart; None where all of it is text, or where
        `sampling` says what it must be from the first token on. A JSON value is not the reasoning: it comes behind."""
        if self.conversation is None or "messages" not in input:
            return None
        form, use = self.conversation.form, tool_use(input)
        if not use.tools and form.reasoning is None and (form.said is None or sampling.constrained):
            return None
        tail = b"".join(self.piece(token, special=True) for token in prompt[-_TAIL:]).decode("utf-8", "replace")
        thinking = form.thinks(tail)
        if not use.tools and sampling.constrained and not (sampling.is_json and thinking):
            return None
        thinking_on = (input.get("chat_template_kwargs") or {}).get("enable_thinking") is not False
        may_think = thinking_on and not thinking and not form.has_thought(tail)
        return AnswerPlan(form, use, self.marks, thinking, may_think)

    @cached_property
    def marks(self) -> dict[str, int]:
        """The control tokens that tell parts of answers apart, by their texts."""
        if self.conversation is None:
            return {}
        markers = self.conversation.form.markers()
        texts = [text for text, always in self.controls() if always and any(text in marker for marker in markers)]
        tokenized = {text: self.tokenize(text, special=True) for text in texts if text}
        return {text: tokens[0] for text, tokens in tokenized.items() if len(tokens) == 1}

    @cached_property
    def _visible(self) -> dict[int, bytes]:
        return {token: text.encode() for text, token in self.marks.items()}

    def visible(self, token: int) -> bytes:
        """The bytes of a token of an answer, with the control tokens that tell its parts apart."""
        return self._visible.get(token) or self.piece(token)

    @cached_property
    def _control_texts(self) -> re.Pattern[str]:
        """What looks like a control token; the longest one where several do."""
        return _any_of(text for text, always in self.controls() if always or self._in_template(text))

    @cached_property
    def _added_texts(self) -> re.Pattern[str] | None:
        added = [text for text, always in self.controls() if not always and self._in_template(text)]
        return _any_of(added) if added else None

    def _in_template(self, text: str) -> bool:
        return len(text) > 2 and text in (self._source or "") and not text[0].isalnum() and not text.isspace()

    def render(self, input: dict[str, Any]) -> str:
        """An input's messages and tools in the model's own chat template, ready to be answered; the last one is gone on
        with where it is the assistant's. Raises InvalidRequest where there is no template or it refuses them."""
        if self.conversation is None:
            raise InvalidRequest(self._problem or _NO_TEMPLATE, param="messages")
        messages, begun = input["messages"], ""
        if messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls"):
            messages, begun = messages[:-1], str(messages[-1]["content"])
        try:
            return self.conversation.render({**input, "messages": messages}) + begun
        except TemplateRefusal as error:
            raise InvalidRequest(
                f"the model's chat template refuses these messages: {error}", param="messages"
            ) from None


def encodable(text: str) -> bytes:
    """The text in UTF-8. Raises InvalidRequest."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        raise InvalidRequest("the text holds half of a surrogate pair, which is no character") from None


def _any_of(texts: Iterable[str]) -> re.Pattern[str]:
    longest_first = sorted({text for text in texts if text}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
