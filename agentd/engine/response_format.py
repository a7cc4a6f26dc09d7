"""What a request says its answer must be: `response_format` of the OpenAI API, or a grammar."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class FormatConstraint:
    """As `protocol.Sampling` takes it."""

    grammar: str | None = None
    json_schema: str | None = None

    @classmethod
    def of(cls, form: Mapping[str, Any] | None, grammar: str | None = None) -> "FormatConstraint":
        """`form` is {"type": "text" | "json_object" | "json_schema", "json_schema": {"schema": ...}}."""
        kind = (form or {}).get("type")
        if kind == "json_object":
            return cls("json")
        if form is not None and kind == "json_schema":
            return cls(grammar, json.dumps(form["json_schema"]["schema"]))
        return cls(grammar)
