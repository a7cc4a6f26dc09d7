"""Checks of everything agentd needs, each with what to do about it."""

import os
import shutil
import stat
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import typer

from agentd import __version__
from agentd.config import paths
from agentd.ctl import output
from agentd.ctl.client import JSON, Daemon
from agentd.ctl.errors import CtlError, ExitCode, NotReachable
from agentd.ctl.options import Json, Socket
from agentd.ctl.output import Column, size

MIB = 2**20
SQLITE_FIXED = (3, 51, 3)  # the WAL-reset corruption bug (sqlite.org/releaselog) is in 3.7.0 to 3.51.2
_MARKS = {"ok": "✓", "warning": "!", "error": "✗"}
_COLUMNS = [Column("", "mark"), Column("check", "check"), Column("finding", "finding", wide=True, fold=True)]
_COLUMNS += [Column("what to do", "advice", wide=True, fold=True)]
# Types of the size of Q4_0 and above for which llama.cpp has no layout of its own on any processor: SmolLM2-135M took
# 2.9 times as long in Q4_1 as in Q4_0.
_NOT_REPACKED = ("Q4_1", "Q5_0", "Q5_1")
_HELD = {
    "temperature": "cool the device; or raise adapt.hold.temperature, or name the right sensor in adapt.hold.sensor",
    "battery": "charge it, or lower adapt.hold.battery",
    "memory": "end other programs",
    "model": "put the file back, or restart agentd",
}


@dataclass(frozen=True)
class Check:
    """One finding. `state` is ok, warning or error; `advice` says what to do unless it is ok."""

    check: str
    state: str
    finding: str
    advice: str | None = None


def doctor(as_json: Json = False, socket: Socket = None) -> None:
    """Check what agentd needs, and say what to do about it.

    Looks at the socket, its permissions, how it is reached, the model and how fast it is, learning, disk space, memory
    and SQLite. Takes a few seconds.
    """
    daemon = Daemon(socket)
    checks = list(_socket(daemon.path))
    status, code = None, ExitCode.OK
    try:
        status = daemon.get("/admin/status")
        checks.append(Check("daemon", "ok", f"agentd {status['version']} answers (pid {status['pid']})"))
    except CtlError as error:
        code = error.exit_code
        reason, advice = (error.reason, error.advice) if isinstance(error, NotReachable) else (str(error), None)
        checks.append(Check("daemon", "error", reason, advice))
    if status is not None:
        checks += [*_version(status), *_reach(status), *_model(status), *_speed(daemon, status), *_learning(status)]
    checks += [*_disk(Path(status["state_dir"]) if status else paths.state_dir()), *_memory(status), *_sqlite()]
    if as_json:
        output.document({"checks": [asdict(check) for check in checks]})
    elif output.on_terminal():
        rows = [asdict(check) | {"mark": _MARKS[check.state], "advice": check.advice or ""} for check in checks]
        output.listing(rows, _COLUMNS)
    else:
        output.listing([asdict(check) for check in checks], [Column("", "state"), *_COLUMNS[1:]])
    if code is ExitCode.OK and any(check.state == "error" for check in checks):
        code = ExitCode.ERROR
    raise typer.Exit(code)


def _socket(path: Path) -> Iterator[Check]:
    try:
        status = path.stat()
    except OSError as error:
        yield Check("socket", "error", f"{path}: {error.strerror}", "start agentd, or name its socket with --socket")
        return
    if not stat.S_ISSOCK(status.st_mode):
        yield Check("socket", "error", f"{path} is not a socket", "name the admin socket with --socket")
        return
    yield Check("socket", "ok", str(path))
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o077:
        yield Check("permissions", "error", f"mode {mode:04o}: others may administer agentd", f"chmod 600 {path}")
    elif not os.access(path, os.R_OK | os.W_OK):
        yield Check(
            "permissions", "error", f"it belongs to uid {status.st_uid}", "run agentctl as that user, or with sudo"
        )
    else:
        yield Check("permissions", "ok", f"mode {mode:04o}, uid {status.st_uid}")


def _version(status: JSON) -> Iterator[Check]:
    if status["version"] != __version__:
        finding = f"the daemon is {status['version']}, agentctl is {__version__}"
        yield Check("version", "warning", finding, "restart the daemon, so that both are of one installation")


def _model(status: JSON) -> Iterator[Check]:
    model = status["model"]
    if status["state"] == "serving" and model:
        yield Check(
            "model", "ok", f"{model['name']}, {size(model['size_bytes'])}, revision {status['revision']} serves"
        )
    elif status["state"] == "loading":
        yield Check("model", "warning", "it is being loaded", "wait, then look again")
    else:
        advice = "look at the daemon's log and at model.path; `agentctl events` says what happened"
        yield Check("model", "error", f"the engine is {status['state']}", advice)


def _speed(daemon: Daemon, status: JSON) -> Iterator[Check]:
    """What the engine that serves reads and writes; nothing of a classifier, which has no tokens."""
    if status["state"] != "serving" or (status["model"] or {}).get("input_shape"):
        return
    try:
        speed = daemon.post("/admin/speed", {})
    except CtlError as error:
        yield Check("speed", "ok", f"not measured: {error}")
        return
    threads, decode = speed["threads"], speed["decode_tokens_per_second"]
    written = "an answer too short to tell" if decode is None else f"{decode:g} tokens/s written"
    finding = f"{speed['prefill_tokens_per_second']:g} tokens/s read ({speed['prompt_tokens']} at once), {written}"
    yield Check("speed", "ok", f"{finding}, with {threads} thread{'s' * (threads != 1)}")
    if (kind := speed.get("quantisation")) in _NOT_REPACKED:
        yield Check(
            "quantisation",
            "ok",
            f"{kind}, which llama.cpp computes as it is in the file; Q4_0 it lays out anew for x86 and ARM processors",
            "`agentd requantise MODEL Q4_0` makes such a file, and says how fast both are here and what it costs",
        )


def _learning(status: JSON) -> Iterator[Check]:
    """Whether passes can start, and how the last one ended: "ok" only where nothing is in the way of learning."""
    obstacles = list(_obstacles(status))
    yield from obstacles
    trigger = status["next_trigger"]
    if trigger["paused"]:
        yield Check("learning", "warning", "passes are paused", "agentctl resume")
    elif obstacles:
        return
    elif not trigger["enabled"]:
        yield Check("learning", "ok", "passes start by `agentctl adapt` only (adapt.enabled is false)")
    elif trigger.get("waits_for"):
        yield Check("learning", "ok", f"a pass is due; it waits for {trigger['waits_for']}")
    else:
        yield Check("learning", "ok", f"{trigger['new_examples']} of {trigger['min_examples']} new examples")


def _reach(status: JSON) -> Iterator[Check]:
    """Where it can be reached, besides the sockets."""
    keys = status.get("keys", 0)
    for door in status.get("tcp", []):
        address, scheme = door["address"], "https" if door["tls"] else "http"
        local = address.startswith(("127.", "localhost:", "[::1]:"))
        finding = f"{scheme}://{address}, " + (
            f"with one of {keys} API keys" if door["needs_key"] else "by every program of this machine"
        )
        if not door["open"]:
            reason = f"no one gets in at {address}: there is no API key"
            yield Check("reach", "warning", reason, "agentctl key add NAME")
        elif not door["tls"] and not local:
            advice = "set serve.tls, or put a proxy with TLS before it"
            yield Check("reach", "warning", f"{finding}; keys and texts can be read on the way", advice)
        else:
            yield Check("reach", "ok", finding)
    if not status.get("tcp"):
        yield Check("reach", "ok", "UNIX sockets only (serve.tcp opens a port)")


def _obstacles(status: JSON) -> Iterator[Check]:
    for name, reason in status.get("held", {}).items():
        yield Check("learning", "warning", f"passes wait: {reason}", _HELD.get(name))
    last, backpropagation = status.get("last_pass"), status.get("backpropagation")
    if last and last["state"] in ("refused", "failed"):
        finding = f"pass {last['id']}, the last one, was {last['state']}: {last['reason']}"
        yield Check("learning", "warning", finding, f"agentctl passes {last['id']}; agentctl adapt --dry-run")
    if backpropagation and not backpropagation["supported"]:
        finding = f"passes cannot use backpropagation: {backpropagation['reason']}"
        yield Check("learning", "warning", finding, "they use forward passes alone; see agentctl budget")
    elif backpropagation and backpropagation["reason"]:
        finding = f"passes train the last {backpropagation['most_blocks']} blocks at most: {backpropagation['reason']}"
        yield Check("learning", "warning", finding, "agentctl budget shows which plans are left")


def _disk(state_dir: Path) -> Iterator[Check]:
    existing = next((path for path in (state_dir, *state_dir.parents) if os.path.isdir(path)), Path("/"))
    free = shutil.disk_usage(existing).free
    finding = f"{size(free)} free under {existing}"
    advice = "free some space, or move state.dir"
    if free < 64 * MIB:
        yield Check("disk", "error", finding, advice)
    elif free < 1024 * MIB:
        yield Check("disk", "warning", finding, advice)
    else:
        yield Check("disk", "ok", finding)


def _memory(status: JSON | None) -> Iterator[Check]:
    if status is not None:
        available, reserve = status["memory"]["available_bytes"], status["memory"]["reserve_bytes"]
        finding = f"{size(available)} available, {size(reserve)} of it kept free (memory.reserve)"
        if available <= reserve:
            yield Check("memory", "error", finding, "no pass can start: end other programs, or lower memory.reserve")
        else:
            yield Check("memory", "ok", finding)
        return
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            yield Check("memory", "ok", f"{size(int(line.split()[1]) * 1024)} available")


def _sqlite() -> Iterator[Check]:
    import sqlite3

    finding = f"SQLite {sqlite3.sqlite_version}"
    if sqlite3.sqlite_version_info < SQLITE_FIXED:
        advice = "open agentd.db with nothing else while agentd runs (two writers may corrupt it before 3.51.3)"
        yield Check("sqlite", "warning", finding, advice)
    else:
        yield Check("sqlite", "ok", finding)
