"""What was recorded, and how what is found now differs from it."""

import json
import math
from pathlib import Path
from typing import Any

RECORDED = Path(__file__).with_name("recorded.json")
NEARLY, ROUGHLY = "nearly", "roughly"
"""Keys of what differs in more than its last digits from one processor to the next."""

_RELATIVE = 1e-4
_LESS = {f"/{NEARLY}/": 1e-3, f"/{ROUGHLY}/": 0.1}
_ABSOLUTE = 1e-6  # below this, floating-point noise is all there is
_DIGITS = 9  # enough for a float32


def recorded() -> dict[str, Any]:
    tree: dict[str, Any] = json.loads(RECORDED.read_text(encoding="utf-8"))
    return tree


def plain(tree: Any) -> Any:
    """The same as JSON gives it back: lists for tuples, texts for keys."""
    return json.loads(json.dumps(tree))


def rounded(tree: Any) -> Any:
    """The same without digits that say nothing."""
    if isinstance(tree, dict):
        return {key: rounded(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [rounded(value) for value in tree]
    return float(f"{tree:.{_DIGITS}g}") if isinstance(tree, float) else tree


def differences(measured: Any, expected: Any, where: str = "") -> list[str]:
    """A line for each difference: floats to a relative tolerance, all else exactly."""
    relative = next((tolerance for key, tolerance in _LESS.items() if key in where), _RELATIVE)
    if isinstance(measured, dict) and isinstance(expected, dict):
        lines = [f"{where}/{key}: only in the record" for key in expected if key not in measured]
        lines += [f"{where}/{key}: not in the record" for key in measured if key not in expected]
        for key in measured:
            if key in expected:
                lines += differences(measured[key], expected[key], f"{where}/{key}")
        return lines
    if isinstance(measured, list) and isinstance(expected, list) and len(measured) == len(expected):
        pairs = enumerate(zip(measured, expected, strict=True))
        return [line for i, pair in pairs for line in differences(*pair, f"{where}/{i}")]
    if type(measured) is type(expected) is float:
        same = math.isclose(measured, expected, rel_tol=relative, abs_tol=_ABSOLUTE)
    else:
        same = type(measured) is type(expected) and measured == expected
    return [] if same else [f"{where}: {measured!r}, and {expected!r} was recorded"]
