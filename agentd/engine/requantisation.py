"""`agentd requantise MODEL TYPE`: the same model in another quantisation, and what that brings and costs here."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from agentd import models
from agentd.durable import publish
from agentd.errors import CannotRequantise
from agentd.formats.gguf_header import Header
from agentd.host import cpu

Say = Callable[[str], None]
Progress = Callable[[int, int], None]

_SPARE = 64 << 20  # bytes that a disk keeps


def requantise(
    spec: str, kind: str, output: Path | None, texts: Sequence[str], say: Say, progress: Progress | None = None
) -> Path:
    """Writes the model that `spec` names, as `model.path` does, with tensors of this type, to `output` or beside it.
    `texts` are those whose likelihood is compared, `say` gets what came of it. Returns the file. Raises ModelUnusable,
    CannotRequantise.
    """
    source = models.resolve(spec)
    model = models.check(source, "llamacpp")
    assert isinstance(model.header, Header)
    kind = kind.upper()
    types = _child("types")
    if kind not in types:
        raise CannotRequantise(source, f"there is no type {kind}; there are {', '.join(types)}")
    if len(model.files) > 1:
        raise CannotRequantise(source, "it is split into several files; join them with llama.cpp's gguf-split")
    before = model.header.quantisation
    target = (output or source.with_name(f"{_stem(source, before)}.{kind}.gguf")).absolute()
    if target.exists() or target.is_symlink():
        raise CannotRequantise(source, f"{target} is there already; name another file with --output")
    if shutil.disk_usage(target.parent).free < model.size + _SPARE:  # it may become as large, hardly larger
        raise CannotRequantise(source, f"there is no room for another {model.size >> 20} MiB in {target.parent}")
    if before not in ("F32", "F16", "BF16"):
        say(f"note: {source.name} is in {before}; from a file in F16 or BF16 the result would be better")
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        for message in _lines("quantise", str(source), str(temporary), kind):
            if progress and "done" in message:
                progress(message["done"], message["of"])
        old, new = (_measured(path, texts) for path in (source, temporary))
        publish(temporary, target)
    except OSError as error:
        raise CannotRequantise(source, error.strerror or str(error)) from None
    finally:
        temporary.unlink(missing_ok=True)
    size = target.stat().st_size
    say(f"{target}")
    say(f"size: {model.size / 1e6:.0f} → {size / 1e6:.0f} MB ({size / model.size:.2f} ×)")
    for name, what in (("prefill", "prompts read"), ("decode", "tokens written")):
        say(f"{what}: {old[name]:.0f} → {new[name]:.0f} tokens/s ({new[name] / old[name]:.2f} ×)")
    say(f"loss on {len(texts)} neutral texts: {old['loss']:.3f} → {new['loss']:.3f} nats a token")
    say(f"model: {{path: {target}}} in the configuration serves it; it begins at revision 0")
    return target


def _stem(source: Path, kind: str) -> str:
    """The file's name without its type, where it has it at its end."""
    stem = source.stem
    for end in (f".{kind}", f"-{kind}", f"_{kind}"):
        if stem.upper().endswith(end):
            return stem[: -len(end)]
    return stem


def _measured(path: Path, texts: Sequence[str]) -> dict[str, Any]:
    (message,) = _lines("measure", str(path), str(cpu.cores()), input=json.dumps(list(texts)))
    return dict(message)


def _child(*arguments: str) -> Any:
    (message,) = _lines(*arguments)
    return message


def _lines(*arguments: str, input: str = "") -> Iterator[Any]:
    """What the child process says. Raises CannotRequantise where it fails, or ends of what it was given."""
    command = [sys.executable, "-m", "agentd.engine.llamacpp.quantiser", *arguments]
    what = arguments[1] if len(arguments) > 1 else "a model"
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            child.stdin.write(input)
            child.stdin.close()
            for line in child.stdout:
                message = json.loads(line)
                if isinstance(message, dict) and "error" in message:
                    raise CannotRequantise(what, message["error"])
                yield message
            if child.wait():
                raise CannotRequantise(what, f"llama.cpp ended with status {child.returncode}")
        finally:
            if child.poll() is None:
                child.kill()
