"""Records the goldens anew: `python -m tests.golden.record`, or with the names of some sections."""

import json
import re
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from . import files, learning, loops, replay, serving, training
from .comparison import RECORDED, differences, plain, recorded, rounded

SECTIONS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "files": files.measure,
    "replay": replay.measure,
    "loops": loops.measure,
    "trainer": training.measure,
    "learning": learning.measure,
    "llamacpp": serving.llamacpp,
    "transformers": serving.transformers,
    "int8": serving.int8,
}
_LIST = re.compile(r"\[([^][{}]*)\]")  # of numbers and texts alone: it is to be one line
_LIBRARIES = ("torch", "numpy", "transformers", "gguf", "llama-cpp-python")


def measure(section: str, folder: Path) -> Any:
    return plain(SECTIONS[section](folder))


def main(sections: list[str]) -> int:
    if unknown := sorted(set(sections) - set(SECTIONS)):
        print(f"there is no section {unknown[0]}; there are {', '.join(SECTIONS)}", file=sys.stderr)
        return 1
    before = recorded() if RECORDED.exists() else {}
    tree = {section: before[section] for section in SECTIONS if section in before}
    for section in sections or SECTIONS:
        with tempfile.TemporaryDirectory(prefix="agentd-golden-") as folder:
            tree[section] = rounded(measure(section, Path(folder)))
        for line in differences(tree[section], before.get(section, {}), section):
            print(line)
    # Who finds a difference wants to know what else was different.
    made_with = {library: version(library) for library in _LIBRARIES}
    ordered = {section: tree[section] for section in SECTIONS if section in tree}
    text = json.dumps({"made_with": made_with, **ordered}, indent=1, ensure_ascii=False)
    text = _LIST.sub(lambda match: "[" + " ".join(match[1].split()) + "]", text)
    RECORDED.write_text(text + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
