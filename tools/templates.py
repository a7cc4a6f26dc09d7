"""The chat templates of some seventy models, which llama.cpp has in its sources, and what agentd reads off them.
`python -m tools.templates` prints the table of docs/tool-calls.md.

They come with the source distribution of llama-cpp-python that set-up compiles, by its pinned version.
"""

import importlib.metadata
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from agentd.config import paths
from agentd.engine.calls.derive import derive
from agentd.engine.calls.format import AnswerFormat, JsonArguments, Parameters
from agentd.engine.calls.probes import NotDerivable
from agentd.engine.chat_template import ChatTemplate

_FOLDER = "vendor/llama.cpp/models/templates/"


def fetch() -> Path:
    """The folder with the templates, one .jinja file each; downloaded once. Raises CalledProcessError."""
    version = importlib.metadata.version("llama-cpp-python")
    target = paths.cache_dir() / f"templates-{version}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as scratch:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-binary",
            "llama-cpp-python",
            "--no-deps",
            "--no-input",
        ]
        subprocess.run(
            [*command, "--no-input", "--quiet", "--dest", scratch, f"llama-cpp-python=={version}"],
            check=True,
            env={**os.environ, "TMPDIR": scratch},
        )
        (archive,) = Path(scratch).glob("*.tar.gz")
        folder = Path(scratch) / "templates"
        folder.mkdir()
        with tarfile.open(archive) as files:
            for member in files:
                if _FOLDER in member.name and member.name.endswith(".jinja") and (source := files.extractfile(member)):
                    (folder / Path(member.name).name).write_bytes(source.read())
        if not target.is_dir():  # another process may have been faster
            folder.rename(target)
    return target


def load(path: Path) -> ChatTemplate:
    return ChatTemplate(path.read_text(encoding="utf-8"), "<BOS>", "<EOS>")


def row(path: Path) -> str:
    """The template's row in the table."""
    try:
        form = derive(load(path))
    except NotDerivable as error:
        return f"| {path.stem} | generic: {error} | | | |"
    calls = form.calls
    several = "one" if calls.gap is None else "several"
    text = "yes" if calls.later is not None else "no"
    return f"| {path.stem} | {_kind(form)} | `{_shown(calls.trigger or 'NAME')}` | {several} | {text} |"


def _kind(form: AnswerFormat) -> str:
    arguments = form.calls.arguments
    if isinstance(arguments, JsonArguments):
        return "derived: JSON"
    assert isinstance(arguments, Parameters)
    return {"raw": "derived: by parameter", "python": "reader: Python", "marked": "reader: marked texts"}[
        arguments.values
    ]


def _shown(text: str) -> str:
    return text.replace("\n", "\\n").replace("|", "\\|").replace("`", "'")


if __name__ == "__main__":
    print("| template | calls | opened by | calls an answer | text before |\n|---|---|---|---|---|")
    for each in sorted(fetch().glob("*.jinja")):
        print(row(each))
