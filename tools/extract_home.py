"""Makes tools/data/home_commands.jsonl: commands for a small home, each with the call that is right.

Sentences and intents are the English ones of home-assistant-intents 2026.10.27, expanded with hassil 3.12.1 (see
tools/data/NOTICE). A sentence template is in one split only, and a command that templates of both could make is in
none. Chance is drawn from hashes of the templates, so that every run gives the same file.

    python -m venv /tmp/home && /tmp/home/bin/pip install home-assistant-intents==2026.10.27 hassil==3.12.1
    /tmp/home/bin/python -m tools.extract_home
"""

import argparse
import hashlib
import json
import random
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import home_assistant_intents
from hassil import expression as expr
from hassil.intents import Intents, RangeSlotList, TextSlotList, WildcardSlotList
from hassil.numbers import get_rbnf_engine
from hassil.recognize import recognize_all
from hassil.util import normalize_whitespace

from tools import home

VERSIONS = {"home-assistant-intents": "2026.10.27", "hassil": "3.12.1"}

# What this home understands: an intent, the combinations of slots taken from it, and its commands (train, held out).
INTENTS: dict[str, tuple[set[str], int, int]] = {
    "HassTurnOn": ({"area_domain", "name_only"}, 260, 44),
    "HassTurnOff": ({"area_domain", "name_only", "domain_all"}, 260, 44),
    "HassLightSet": ({"area_brightness", "area_color"}, 180, 30),
    "HassClimateSetTemperature": ({"area_temperature"}, 80, 14),
    "HassStartTimer": (
        {"hours_only", "hours_minutes", "minutes_only", "minutes_seconds", "name_minutes", "name_hours"},
        220,
        36,
    ),
    "HassShoppingListAddItem": ({"item_only"}, 80, 12),
}
HELD_OUT = 5  # one template in five of each block, and at least one where there are two
WORDS = 0.2  # of the numbers are spelled out

# What is cooked and what is bought: written for this project.
TIMERS = ("pizza", "pasta", "tea", "laundry", "eggs", "rice", "bread", "nap", "homework", "cake", "soup", "workout")
ITEMS = (
    "milk", "eggs", "bread", "butter", "apples", "bananas", "coffee", "tea bags", "rice", "olive oil", "salt",
    "tomatoes", "onions", "garlic", "carrots", "cheese", "yoghurt", "orange juice", "toilet paper", "dish soap",
    "toothpaste", "pasta", "flour", "sugar", "chicken", "salmon", "spinach", "potatoes", "lemons", "honey", "oats",
    "peanut butter", "batteries", "light bulbs", "cat food", "paper towels", "shampoo", "ice cream", "mushrooms",
    "red wine", "sparkling water", "beans",
)  # fmt: skip
RANGES = {  # of the source's ranges, what people say
    "brightness": range(5, 101, 5),
    "temperature": range(15, 27),
    "timer_hours": range(1, 13),
    "timer_minutes": range(1, 60),
    "timer_seconds": range(5, 60, 5),
}
# Templates leave open what no one says: "1 hours", "an 5 minute timer", "for 5 minute", "half hour".
_GRAMMAR = re.compile(
    r"\b(1|one)[ -](hour|minute|second)s\b"
    r"|\ban (?!8|11\b|18|eight|eleven|hour\b)|\ba (8|11\b|18|eight|eleven)"
    r"|(?<!\b1)(?<!\bone)(?<! an)(?<! a) (hour|minute|second)\b(?! timer| \w+ \w+ timer)"
    r"|\b(hour|minute|second)s timer\b"
)


@dataclass(frozen=True)
class Template:
    """A sentence of an intent. `block` is the part of the source's data that it stands in: sentences of one meaning."""

    id: str
    intent: str
    block: dict[str, Any]
    sentence: str


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, metavar="FILE", default=home.COMMANDS)
    options = parser.parse_args()
    for name, version in VERSIONS.items():
        if metadata.version(name) != version:
            print(f"{name} is {metadata.version(name)}; the extract is made from {version}", file=sys.stderr)
            return 1
    rows = extract()
    options.output.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{options.output}: {len(rows)} rows")
    return 0


def extract() -> list[dict[str, Any]]:
    source = home_assistant_intents.get_intents("en")
    assert source is not None
    source = {**source, "lists": {**source["lists"], **_lists()}}
    templates = list(_templates(source))
    held_out = _held_out(templates)
    expander = Expander(source, templates)
    rows: list[dict[str, Any]] = []
    for intent, (_, train, judged) in INTENTS.items():
        for split, n in (("train", train), ("heldout", judged)):
            of = [t for t in templates if t.intent == intent and (t.id in held_out) == (split == "heldout")]
            rows += [{**row, "split": split} for row in _take(expander, of, held_out, n)]
    return sorted(rows, key=lambda row: (row["split"] == "heldout", _hash(row["text"])))


def _lists() -> dict[str, Any]:
    return {
        "area": {"values": list(home.AREAS)},
        "name": {
            "values": [{"in": name, "out": name, "context": {"domain": kind}} for name, kind in home.DEVICES.items()]
        },
        "color": {"values": list(home.COLORS)},
    }


def _templates(source: dict[str, Any]) -> Iterator[Template]:
    for intent, (combinations, _, _) in INTENTS.items():
        numbers: dict[str, int] = defaultdict(int)
        for block in source["intents"][intent]["data"]:
            combination = block["metadata"]["slot_combination"]
            if combination not in combinations or "slot" in str(block.get("requires_context")):
                continue  # the latter take the speaker's room
            kinds = block.get("requires_context", {}).get("domain")
            if kinds and not set(kinds) & set(home.DEVICES.values()):
                continue
            for sentence in block["sentences"]:
                # a device said with its kind ("desk lamp light"), or by its name alone
                if "{name} <light>" in sentence or sentence == "[<the>] {name}":
                    continue
                numbers[combination] += 1
                yield Template(f"{intent}/{combination}/{numbers[combination]}", intent, block, sentence)


def _held_out(templates: list[Template]) -> set[str]:
    groups: dict[int, list[Template]] = defaultdict(list)
    for template in templates:
        groups[id(template.block)].append(template)
    chosen: set[str] = set()
    for group in groups.values():
        group.sort(key=lambda template: _hash(template.id))
        chosen |= {template.id for template in group[: max(len(group) // HELD_OUT, int(len(group) > 1))]}
    return chosen


def _take(expander: "Expander", templates: list[Template], held_out: set[str], n: int) -> list[dict[str, Any]]:
    """`n` commands, the templates taking turns as long as they have any left."""
    streams = [expander.commands(template, held_out) for template in sorted(templates, key=lambda t: _hash(t.id))]
    rows: list[dict[str, Any]] = []
    while streams and len(rows) < n:
        for stream in list(streams):
            row = next(stream, None)
            if row is None:
                streams.remove(stream)
            elif len(rows) < n:
                rows.append(row)
    return rows


class Expander:
    """Random commands of a template, and what they mean to all templates together."""

    def __init__(self, source: dict[str, Any], templates: list[Template]) -> None:
        data: dict[str, Any] = {intent: {"data": []} for intent in INTENTS}
        for t in templates:
            data[t.intent]["data"].append({**t.block, "sentences": [t.sentence], "metadata": {"template": t.id}})
        self._intents = Intents.from_dict({**source, "intents": data, "skip_words": []})
        self._seen: set[str] = set()

    def commands(self, template: Template, held_out: set[str]) -> Iterator[dict[str, Any]]:
        """Commands that have not been made yet, mean one call, and belong to templates of one split."""
        chance = random.Random(int(_hash(template.id)[:16], 16))
        for _ in range(600):
            domains = template.block.get("requires_context", {}).get("domain", ())
            text = normalize_whitespace(self._say(self._sentence(template), chance, domains)).strip()
            if text in self._seen or len(text.split()) < 3 or _GRAMMAR.search(text):
                continue
            self._seen.add(text)
            results = list(recognize_all(text, self._intents, language="en"))
            calls = {json.dumps(self._call(result), sort_keys=True) for result in results}
            sides = {result.intent_data.metadata["template"] in held_out for result in results}
            if len(calls) == 1 and len(sides) == 1:
                yield {"text": text, **self._call(results[0]), "template": template.id}

    def _sentence(self, template: Template) -> expr.Expression:
        for data in self._intents.intents[template.intent].data:
            if data.metadata["template"] == template.id:
                return data.sentences[0].expression
        raise KeyError(template.id)

    def _call(self, result: Any) -> dict[str, Any]:
        arguments = {name: entity.value for name, entity in result.entities.items()}
        texts = {name: value.strip() if isinstance(value, str) else int(value) for name, value in arguments.items()}
        return {"name": result.intent.name, "arguments": home.order(result.intent.name, texts)}

    def _say(self, part: expr.Expression, chance: random.Random, domains: Any) -> str:
        """One of an expression's texts."""
        if isinstance(part, expr.TextChunk):
            return str(part.original_text)
        if isinstance(part, expr.Alternative):
            return self._say(_one(part.items, chance), chance, domains)
        if isinstance(part, expr.Permutation):
            items = sorted(part.items, key=lambda _: chance.random())
            return " ".join(self._say(item, chance, domains) for item in items)
        if isinstance(part, expr.Group):
            return "".join(self._say(item, chance, domains) for item in part.items)
        if isinstance(part, expr.RuleReference):
            return self._say(self._intents.expansion_rules[part.rule_name].expression, chance, domains)
        assert isinstance(part, expr.ListReference), part
        values = self._intents.slot_lists[part.list_name]
        if isinstance(values, RangeSlotList):
            number = _one(RANGES[part.list_name], chance)
            return _spelled(number) if chance.random() < WORDS else str(number)
        if isinstance(values, WildcardSlotList):
            return str(_one({"timer_name": TIMERS, "shopping_list_item": ITEMS}[part.list_name], chance))
        assert isinstance(values, TextSlotList), values
        fitting = [v for v in values.values if not domains or (v.context or {}).get("domain") in domains]
        return self._say(_one(fitting, chance).text_in, chance, domains)


def _one(items: Any, chance: random.Random) -> Any:
    return items[int(chance.random() * len(items))]


def _spelled(number: int) -> str:
    return str(get_rbnf_engine("en").format_number(number).text)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
