"""Proving a revision, and moving what was learned to another device."""

from pathlib import Path
from typing import Annotated

import typer

from agentd.ctl import output
from agentd.ctl.client import Daemon, segment
from agentd.ctl.errors import ExitCode, UsageError
from agentd.ctl.options import Json, Socket
from agentd.ctl.passes import watch
from agentd.ctl.revisions import Revision
from agentd.ctl.saving import refuse_existing, show, write

_ENDINGS = {"bundle": "agentd", "safetensors": "safetensors", "gguf-lora": "gguf", "gguf-control": "control.gguf"}
_CONTROL = "control.gguf"
_PATIENCE = 3600.0  # seconds that replaying may take


def replay(
    revision: Revision,
    verify: Annotated[
        bool, typer.Option("--verify", help="Replay every step on the base and compare the weights' sha256.")
    ] = False,
    as_json: Json = False,
    socket: Socket = None,
) -> None:
    """What a revision is made of, or the proof that it is base and ledger."""
    daemon = Daemon(socket, timeout=_PATIENCE)
    answer = daemon.get(f"/admin/revisions/{segment(revision)}/replay", verify="true" if verify else None)
    if as_json:
        output.document(answer)
    else:
        output.facts({**answer, "lineage": " ← ".join(map(str, answer["lineage"]))})
    if verify and not answer["verified"]:
        output.say(f"agentctl: revision {revision} is NOT what its ledger leads to")
        raise typer.Exit(ExitCode.ERROR)


def export(
    revision: Revision,
    kind: Annotated[
        str, typer.Option("--format", metavar="FORMAT", help="bundle, safetensors, gguf-lora or gguf-control.")
    ] = "bundle",
    to: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="Where to write it; revision-R.ENDING if left out."),
    ] = None,
    as_json: Json = False,
    socket: Socket = None,
) -> None:
    """Write a revision into a file: all that another device needs, its weights, or what llama.cpp loads."""
    if kind not in _ENDINGS:
        raise UsageError(f"--format is one of {', '.join(_ENDINGS)}, not {kind!r}")
    path = to or Path(f"revision-{revision}.{_ENDINGS[kind]}")
    refuse_existing(path)
    daemon = Daemon(socket, timeout=_PATIENCE)
    place = f"/admin/revisions/{segment(revision)}"
    written = {}
    if kind == "gguf-lora" and _CONTROL in ((daemon.get(place)["manifest"] or {}).get("files") or {}):
        # Half of such a revision is in its control vector: an adapter alone would answer differently.
        beside = path.with_name(f"{path.name.removesuffix('.gguf')}.{_CONTROL}")
        refuse_existing(beside)
        written["control"] = write(beside, daemon.download(f"{place}/export?format=gguf-control"))
    show({**write(path, daemon.download(f"{place}/export?format={kind}")), **written}, as_json)


def import_(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="What `agentctl export` wrote.")],
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Do not follow the pass that takes it in.")] = False,
    as_json: Json = False,
    socket: Socket = None,
) -> None:
    """Take in what another device learned on the same base: gate and trial judge it as if it were learned here."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from None
    daemon = Daemon(socket)
    answer = daemon.send("/admin/import", data)
    if not no_wait:
        if not as_json:
            output.say(f"pass {answer['pass']} takes it in")
        watch(daemon, answer["pass"], as_json)
    else:
        output.show(answer, as_json)
