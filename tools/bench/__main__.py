"""The benchmarks by name: `python -m tools.bench NAME [arguments]`; `NAME --help` says what one takes."""

import ast
import runpy
import sys
from pathlib import Path

from tools.daemon import end_daemons_on_sigterm

HERE = Path(__file__).parent
HELPERS = frozenset({"__init__", "__main__"})


def benchmarks() -> dict[str, tuple[str, str]]:
    """Name -> (module, what it measures): every module beside this one, and under paper/, that can be run."""
    modules = {}
    for path in sorted([*HERE.glob("*.py"), *HERE.glob("paper/*.py")]):
        source = path.read_text(encoding="utf-8")
        if path.stem in HELPERS or 'if __name__ == "__main__":' not in source:
            continue
        parts = path.relative_to(HERE).with_suffix("").parts
        doc = ast.get_docstring(ast.parse(source)) or ""
        modules[path.stem.replace("_", "-")] = (
            ".".join(("tools.bench", *parts)),
            doc.split("\n\n")[0].replace("\n", " "),
        )
    return modules


def main() -> int:
    modules = benchmarks()
    if len(sys.argv) < 2 or sys.argv[1] not in modules:
        asked_for_help = len(sys.argv) > 1 and sys.argv[1] in {"-h", "--help"}
        stream = sys.stdout if asked_for_help else sys.stderr
        print(__doc__, file=stream)
        for name, (_, about) in modules.items():
            print(f"  {name:17} {about}", file=stream)
        return 0 if asked_for_help else 2
    end_daemons_on_sigterm()
    name = sys.argv.pop(1)
    sys.argv[0] = f"python -m tools.bench {name}"
    runpy.run_module(modules[name][0], run_name="__main__", alter_sys=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
