"""GET /admin/backup: the state as one archive, while everything goes on."""

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse

from agentd.api.services import services
from agentd.store import backup, events

_CHUNK = 1 << 16


async def download(request: Request) -> Response:
    """The archive is made on the state's own disk: it needs room once more for the database and the revisions."""
    s = services(request)
    folder = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix=".backup-", dir=s.config.state.dir))
    try:
        database, archive = folder / "agentd.db", folder / "backup.tar"
        await asyncio.to_thread(backup.snapshot, s.store, database)
        await asyncio.to_thread(backup.write, database, s.config.state.dir / "revisions", archive)
        size = archive.stat().st_size
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    await s.store.call(events.add, "backup", f"{size} bytes")

    async def parts() -> AsyncIterator[bytes]:
        try:
            with archive.open("rb") as file:
                while part := await asyncio.to_thread(file.read, _CHUNK):
                    yield part
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    return StreamingResponse(parts(), media_type="application/x-tar", headers={"Content-Length": str(size)})
