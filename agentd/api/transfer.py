"""Revisions out of and into the daemon: prove one by replaying it, export it, take one in from another device."""

import asyncio
import contextlib
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from agentd.api.requests import identifier, read
from agentd.api.services import Services, services
from agentd.engine.operations import Collect, Replay, Unstage
from agentd.engine.process.supervisor import EXPORTED
from agentd.errors import Conflict
from agentd.formats import safetensors_file
from agentd.learn import ledger
from agentd.revision import archive as archives
from agentd.revision.files import ADAPTER, CONTROL, LEDGER, LORA, NETWORK, TENSORS
from agentd.store import events, revisions

FORMATS = ("bundle", "safetensors", "gguf-lora", "gguf-control")
_CHUNK = 1 << 20


async def replay(request: Request) -> Response:
    """Query `verify`: `true` replays every step from the base on and compares the sha256 of the weights."""
    s = services(request)
    number = identifier(request, "revision")
    files, manifest = await _ledger_of(s, number)
    line = await s.store.call(revisions.lineage, number)
    steps = 0
    for each in line[:-1]:
        paths = await asyncio.to_thread(s.adaptation.files.verified, each)
        steps += len((await asyncio.to_thread(ledger.read, paths[LEDGER])).steps) if LEDGER in paths else 0
    answer: dict[str, Any] = {
        "revision": number,
        "lineage": line,
        "steps": steps,
        "ledger_bytes": files[LEDGER].stat().st_size,
        "tensors_bytes": sum(files[name].stat().st_size for name in (TENSORS, LORA) if name in files),
        "weights_sha256": manifest["weights_sha256"],
    }
    if request.query_params.get("verify") == "true":
        begin = time.monotonic()
        replayed = await s.supervisor.call(Replay(files[LEDGER]))
        same = replayed == manifest["weights_sha256"]
        answer |= {"replayed_sha256": replayed, "verified": same, "seconds": round(time.monotonic() - begin, 2)}
        await s.store.call(events.add, "replayed", f"{'the same' if same else 'OTHER'} weights", revision=number)
    return JSONResponse(answer)


async def export(request: Request) -> Response:
    """Query `format`: one of FORMATS."""
    s = services(request)
    number = identifier(request, "revision")
    kind = request.query_params.get("format", "bundle")
    await s.store.call(revisions.get, number)
    if number == 0:
        raise Conflict("revision 0 is the base model; its file is model.path")
    files = await asyncio.to_thread(s.adaptation.files.verified, number)
    if kind == "gguf-lora":
        if LORA in files:
            async with _collected(s, number, files[LEDGER], "gguf") as path:
                return _file(path)
        if ADAPTER not in files:
            raise Conflict(f"revision {number} has no LoRA: {_instead(files)}")
        return _file(files[ADAPTER])
    if kind == "gguf-control":
        if CONTROL not in files:
            raise Conflict(f"revision {number} has no control vector: {_instead(files)}")
        return _file(files[CONTROL])
    if kind == "safetensors":
        if NETWORK in files:
            return _file(files[NETWORK])
        if not _in_place(files):
            raise Conflict(f"revision {number} has no weights of its own: {_instead(files)}")
        async with _whole(s, number, files[LEDGER]) as path:
            return _file(path)  # open already: it may be deleted from now on
    if NETWORK in files:
        raise Conflict(f"revision {number} is a network as a whole: {_instead(files)}")
    with tempfile.TemporaryDirectory(dir=s.config.state.dir, prefix=".export-") as folder:
        bundle = Path(folder) / "bundle"
        if _in_place(files):
            archive, members = await _gathered(s, number, files[LEDGER], Path(folder))
        else:
            manifest = await asyncio.to_thread(s.adaptation.files.manifest, number) or {}
            described = str(manifest["method"]), int(manifest["blocks"]), number
            archive = archives.AdapterArchive(s.model.sha256, *described)
            members = {name: path for name, path in files.items() if name in (ADAPTER, CONTROL)}
        with bundle.open("xb") as out:
            await asyncio.to_thread(archive.write, out, members)
        return _file(bundle, "application/x-tar")


async def _gathered(s: Services, number: int, path: Path, folder: Path) -> tuple[archives.Archive, dict[str, Path]]:
    """What a line of steps and adapters leads to, and its files, which are made in `folder`."""
    line = await s.store.call(revisions.lineage, number)
    archive = await asyncio.to_thread(archives.gather, s.adaptation.files, line, s.model.sha256)
    members = {LEDGER: folder / LEDGER}
    await asyncio.to_thread(ledger.write, members[LEDGER], ledger.Ledger(0, archive.steps))
    if archive.moved:
        members[TENSORS] = folder / TENSORS
        async with _whole(s, number, path) as whole:
            await asyncio.to_thread(safetensors_file.extract, whole, archive.moved, members[TENSORS])
    if archive.ranks:
        members[LORA] = folder / LORA
        await s.supervisor.call(Collect(path, members[LORA], "safetensors"))
    return archive, members


async def import_revision(request: Request) -> Response:
    """The body is what `export` gave in the format `bundle`. Answers with the pass that takes it in."""
    s = services(request)
    body = await read(request, s.config.serve.max_import, "serve.max_import")
    archive = await asyncio.to_thread(archives.read, body)
    return JSONResponse({"pass": await s.adaptation.import_revision(archive)}, 202)


async def _ledger_of(s: Services, number: int) -> tuple[dict[str, Path], dict[str, Any]]:
    await s.store.call(revisions.get, number)
    if number == 0:
        raise Conflict("revision 0 is the base model: there is nothing to replay")
    files = await asyncio.to_thread(s.adaptation.files.verified, number)
    manifest = await asyncio.to_thread(s.adaptation.files.manifest, number) or {}
    if not _in_place(files) or "weights_sha256" not in manifest:
        raise Conflict(
            f"revision {number} is not base and ledger alone (it holds {', '.join(sorted(files))}); its files are "
            f"checked by their own sha256"
        )
    return files, manifest


@contextlib.asynccontextmanager
async def _whole(s: Services, number: int, path: Path) -> AsyncIterator[Path]:
    """A file with the whole weights, which the engine makes if it has not kept them."""
    await s.supervisor.stage(EXPORTED, path, None)
    try:
        manifest = await asyncio.to_thread(s.adaptation.files.manifest, number) or {}
        yield s.config.state.dir / "weights" / f"weights-{manifest['weights_sha256']}.safetensors"
    finally:
        await s.supervisor.call(Unstage(EXPORTED))


@contextlib.asynccontextmanager
async def _collected(s: Services, number: int, path: Path, kind: str) -> AsyncIterator[Path]:
    """A file with what all low-rank changes of a revision's line add to the base."""
    with tempfile.TemporaryDirectory(dir=s.config.state.dir, prefix=".export-") as folder:
        target = Path(folder) / f"{number}.{kind}"
        try:
            await s.supervisor.call(Collect(path, target, kind))
        except Conflict as error:
            raise Conflict(f"revision {number}: {error}") from None
        yield target


def _instead(files: dict[str, Path]) -> str:
    if NETWORK in files:
        return "export it as safetensors"
    if _in_place(files):
        return "export it as bundle or safetensors"
    kinds = [kind for kind, name in (("gguf-lora", ADAPTER), ("gguf-control", CONTROL)) if name in files]
    return f"export it as {' or '.join(['bundle', *kinds])}"


def _in_place(files: dict[str, Path]) -> bool:
    """Whether a revision is what engine transformers makes: steps, and perhaps what no ledger can make again."""
    return LEDGER in files and not set(files) - {LEDGER, TENSORS, LORA}


def _file(path: Path, kind: str = "application/octet-stream") -> Response:
    file = path.open("rb")
    size = path.stat().st_size

    async def parts() -> AsyncIterator[bytes]:
        with file:
            while part := await asyncio.to_thread(file.read, _CHUNK):
                yield part

    headers = {"Content-Length": str(size)}
    return StreamingResponse(parts(), media_type=kind, headers=headers)
