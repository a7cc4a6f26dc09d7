"""Bodies: what every one has in common, and the leniency that clients of the OpenAI API are used to."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ModelWrapValidatorHandler, PrivateAttr, model_validator
from pydantic_core import PydanticCustomError
from typing_extensions import Self

# Fields of completions that change the answer and are not supported, with the values that ask for nothing.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("tools", "functions"), ([],)),
    **dict.fromkeys(("tool_choice", "function_call"), ("none", "auto")),  # of completions, and what came before tools
    **dict.fromkeys(("audio", "web_search_options", "moderation"), ()),
    **dict.fromkeys(("echo", "ignore_eos", "use_beam_search"), (False,)),
    "best_of": (1,),
    "modalities": (["text"],),
    "suffix": ("",),
    "chat_template_kwargs": ({},),
    **dict.fromkeys(("mirostat", "min_tokens", "xtc_probability", "dry_multiplier", "dynatemp_range", "top_a"), (0,)),
    **dict.fromkeys(("typical_p", "tfs_z", "length_penalty"), (1,)),
    # of vLLM, SGLang and llama.cpp
    **dict.fromkeys(("stop_token_ids", "bad_words", "allowed_token_ids", "logits_processors", "documents"), ([],)),
    **dict.fromkeys(("include_stop_str_in_output", "prompt_logprobs", "return_tokens_as_token_ids"), (False, 0)),
    **dict.fromkeys(("skip_special_tokens", "add_generation_prompt"), (True,)),
    "repetition_penalty": (1,),  # repeat_penalty here
    **dict.fromkeys(("n_predict", "num_predict", "truncate_prompt_tokens"), (-1,)),  # max_tokens here
    **dict.fromkeys(("structured_outputs", "structural_tag", "regex", "ebnf", "chat_template"), ({}, "")),
    **dict.fromkeys(("json_schema", "guided_json", "guided_regex", "guided_choice", "guided_grammar", "format"), ("",)),
    **dict.fromkeys(("samplers", "lora", "images", "n_probs", "template", "context"), ([], "", 0)),
}
# Fields that other servers and clients have and that leave the answer as it is.
_HARMLESS = frozenset(
    (
        *("cache_prompt", "id_slot", "keep_alive", "parallel_tool_calls", "prediction"),
        *("prompt_cache_key", "prompt_cache_retention", "reasoning_effort", "return_progress", "safety_identifier"),
        *("service_tier", "timings_per_token", "verbosity", *_UNSUPPORTED),
        *("annotations", "reasoning_content", "refusal", "index", "agentd", "strict", "id"),
    )
)

Text = Annotated[str, Field(max_length=1 << 24)]
MAX_NAME = 200  # characters
Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME)]
MAX_INTEGER = (1 << 63) - 1  # what SQLite holds


def without_nulls(tree: Any) -> Any:
    """Named values without those that are null."""
    return {name: value for name, value in tree.items() if value is not None} if isinstance(tree, dict) else tree


def several(tree: Any) -> str:
    """Which form a field has that may be a text or a list."""
    return "[list]" if isinstance(tree, list) else "[text]"


def part(tree: Any) -> str:
    """Which kind of part of a message it is. Tags in brackets do not stand in what is said of a field
    (schemas.explain)."""
    return "[refusal]" if isinstance(tree, dict) and tree.get("type") == "refusal" else "[part]"


class Body(BaseModel):
    """A request body. Types are not guessed: "1" is no number."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def _nullable(schema: dict[str, Any]) -> None:
    """Says of every field that may be left out that it may be null."""
    for name, field in schema["properties"].items():
        if name not in schema.get("required", ()) and {"type": "null"} not in field.get("anyOf", ()):
            default = {"default": field.pop("default")} if "default" in field else {}
            schema["properties"][name] = {"anyOf": [field, {"type": "null"}], **default}


class Lenient(Body):
    """A body, or a part of one, of the OpenAI API: a null is no field at all, and others' fields are passed over where
    the answer is the same without them. `ignored` names them."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False, json_schema_extra=_nullable)
    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = _UNSUPPORTED
    harmless: ClassVar[frozenset[str]] = _HARMLESS
    _nulls: list[str] = PrivateAttr(default_factory=list)

    @model_validator(mode="wrap")
    @classmethod
    def _without_nulls(cls, tree: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if not isinstance(tree, dict):
            return handler(tree)
        body = handler({name: value for name, value in tree.items() if value is not None})
        body._nulls = [name for name, value in tree.items() if value is None]
        for name, value in (body.model_extra or {}).items():
            if name in cls.unsupported and not any(value == neutral for neutral in cls.unsupported[name]):
                raise PydanticCustomError("unsupported", "{name} is not supported by this server", {"name": name})
        return body

    def ignored(self) -> list[str]:
        """Every field that has no effect, with those of its parts behind their names."""
        names = [*self._nulls, *(self.model_extra or {})]
        for field in type(self).model_fields:
            value = getattr(self, field)
            for part in value if isinstance(value, list) else [value]:
                if isinstance(part, Lenient):
                    names += [f"{field}.{name}" for name in part.ignored()]
        return list(dict.fromkeys(names))

    def unknown(self) -> list[str]:
        """Those of `ignored` that are neither null nor known to be harmless."""
        nulls = {*self._nulls}
        names = [name for name in self.model_extra or {} if name not in self.harmless and name not in nulls]
        for field in type(self).model_fields:
            value = getattr(self, field)
            for part in value if isinstance(value, list) else [value]:
                if isinstance(part, Lenient):
                    names += [f"{field}.{name}" for name in part.unknown()]
        return list(dict.fromkeys(names))


class RefusalPart(Lenient):
    """What an assistant said in place of an answer."""

    type: Literal["refusal"]
    refusal: Text
