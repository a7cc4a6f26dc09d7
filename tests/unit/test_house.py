"""The house is in order: every name stands once, and the entrance hall stays empty. Import layers: `make check`."""

import ast
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "agentd"
FACES = ("api", "store", "ctl")  # a noun's three faces share its name
ENGINES = {"llamacpp", "transformers", "int8"}  # and so do the same parts of parallel engines


def modules() -> Iterator[tuple[Path, str]]:
    """Every module with the house it belongs to: its own path, or that of all the engines."""
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        if parts[0] not in FACES and path.stem not in ("__init__", "__main__"):
            yield path, "the engines" if ENGINES & set(parts) else "/".join(parts)


def test_no_file_name_stands_twice() -> None:
    places: dict[str, set[str]] = defaultdict(set)
    for path, house in modules():
        places[path.stem].add(house)
    twice = {name: sorted(houses) for name, houses in places.items() if len(houses) > 1}
    assert not twice


def test_no_class_name_stands_twice() -> None:
    places: dict[str, set[str]] = defaultdict(set)
    for path, house in modules():
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef):
                places[node.name].add(house)
    twice = {name: sorted(houses) for name, houses in places.items() if len(houses) > 1}
    assert not twice


def test_the_entrance_hall_is_small() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= 12


@pytest.mark.parametrize("module", ["agentd.daemon", "agentd.ctl.app"])
def test_small_processes_import_nothing_large(module: str) -> None:
    """In fact, not only by their own words: what a library imports counts, too."""
    script = f"import sys, {module}; print({{'torch', 'transformers', 'llama_cpp'}} & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    assert done.stdout.strip() == "set()"
