"""A first configuration: asked for on a terminal, or from options; checked as the daemon does before it counts."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from agentd.ctl import output
from agentd.ctl.errors import CtlError, ExitCode, UsageError

_CHECK_SECONDS = 60.0


def init(
    path: Annotated[
        Path | None,
        typer.Argument(metavar="FILE", help="Where to; the user's configuration if left out.", show_default=False),
    ] = None,
    model: Annotated[
        str | None, typer.Option(metavar="MODEL", help="A GGUF file, hf:OWNER/REPO/FILE.gguf, or `default`.")
    ] = None,
    task: Annotated[
        list[str] | None, typer.Option(metavar="NAME[=A,B]", help="A task, with its choices if it has any; repeatable.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option(metavar="SIZE", help="What learning may take at most, such as 600MiB.")
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing: what no option says is the default.")] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Move a file that is there to FILE.bak.")] = False,
) -> None:
    """Write a configuration: model, tasks, memory. Asks for what no option says; in a pipe the answers are lines."""
    target = (path or _default_path()).expanduser()
    if target.exists() and not replace:
        asks = not yes and _at_terminal()
        if not (asks and typer.confirm(f"{target} is there already. Move it to {target.name}.bak?", err=True)):
            raise _Refused(f"{target} is there already and stays as it is; --replace moves it to {target.name}.bak")
        replace = True
    if not yes:
        model = model or _ask("Model: a GGUF file, hf:OWNER/REPO/FILE.gguf, or", "default")
        task = _ask_tasks() if task is None else task
        memory = memory or _ask_memory()
    text = _document(_model(model or "default"), dict(map(_task, task or [])), memory)
    _write(target, text, replace=replace)
    print(target)
    output.say(f"written and checked; start it: `agentd --config {target}`")


class _Refused(CtlError):
    exit_code = ExitCode.REFUSED


def _default_path() -> Path:
    base = os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config"
    return Path(base, "agentd", "agentd.yaml")


def _at_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()


def _ask(question: str, default: str = "") -> str:
    """The answer, asked for on a terminal; elsewhere the next line of stdin. No answer is the default."""
    if _at_terminal():
        said: str = typer.prompt(question, default=default, show_default=bool(default), err=True)
    else:
        said = sys.stdin.readline() if sys.stdin is not None else ""
    return said.strip() or default


def _ask_tasks() -> list[str]:
    tasks: list[str] = []
    while name := _ask("A task's name (Enter: no more)"):
        choices = _ask("Its answers, with commas (Enter: free text or calls)")
        tasks.append(f"{name}={choices}" if choices else name)
    return tasks


def _ask_memory() -> str | None:
    free = _available()
    hint = f"; {output.size(free)} are free now" if free else ""
    return _ask(f"Memory that learning may take at most, such as 600MiB (Enter: what is free{hint})") or None


def _available() -> int:
    """Bytes that the kernel calls available; 0 where it does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")), 0)


def _task(text: str) -> tuple[str, list[str]]:
    """NAME or NAME=A,B as a name and choices."""
    name, _, listed = text.partition("=")
    choices = [choice.strip() for choice in listed.split(",") if choice.strip()]
    if not name.strip() or ("=" in text and len(choices) < 2):
        raise UsageError(f"a task is NAME, or NAME=A,B with two answers or more, not {text!r}")
    return name.strip(), choices


def _model(name: str) -> str:
    """The model as it stands in the file: paths are made absolute, for the daemon may start elsewhere."""
    if name == "default" or name.startswith("hf:"):
        return name
    path = Path(name).expanduser().absolute()
    if not path.exists():
        raise UsageError(f"there is no model at {path}; name a file, hf:OWNER/REPO/FILE.gguf, or default")
    return str(path)


def _document(model: str, tasks: dict[str, list[str]], memory: str | None) -> str:
    """The configuration as YAML. A JSON text is one of YAML's, too, whatever it holds."""
    lines = ["# Written by `agentctl init`. `agentd config --reference` lists every key.", "model:"]
    lines.append(f"  path: {_quoted(model)}")
    if Path(model).is_dir():
        lines += ["engine: transformers"]
    if memory is not None:
        lines += ["memory:", f"  limit: {_quoted(memory)}"]
    if tasks:
        lines.append("tasks:")
    for name, choices in tasks.items():
        lines.append(f"  {_quoted(name)}:")
        lines.append(f"    choices: [{', '.join(map(_quoted, choices))}]")
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _write(target: Path, text: str, *, replace: bool) -> None:
    """Checks the text as `agentd` does and puts it in place. Raises UsageError with every problem in it, CtlError."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    except OSError as error:
        raise CtlError(f"{target}: {error.strerror}") from None
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        temporary.chmod(0o644)  # the service's user reads it
        command = [sys.executable, "-m", "agentd", "--config", name, "config"]
        checked = subprocess.run(command, capture_output=True, text=True, timeout=_CHECK_SECONDS, check=False)
        if checked.returncode:
            problem = checked.stderr.strip().replace(name, str(target)).removeprefix("agentd: ")
            raise UsageError(f"nothing was written: {problem}")
        if replace and target.exists():
            backup = target.with_name(f"{target.name}.bak")
            target.replace(backup)
            output.say(f"what was there is now {backup}")
        temporary.replace(target)
    except OSError as error:
        raise CtlError(f"{target}: {error.strerror}") from None
    finally:
        temporary.unlink(missing_ok=True)
