"""Rollback: an earlier revision serves because the owner wants it, or because a later one turned out unusable."""

import asyncio
from collections.abc import Awaitable, Callable

from agentd.engine.process.supervisor import Supervisor
from agentd.errors import AgentdError, Conflict, CrashLoop, RevisionCorrupt
from agentd.revision.files import RevisionFiles
from agentd.store import revisions
from agentd.store.database import Store

_WARMING = 15.0  # seconds that may be spent on what prompts often begin with; mostly that is there from last time

Tell = Callable[[str, str, int], Awaitable[None]]
"""Takes the kind of an event, its message, and the revision it is about."""


class Rollback:
    def __init__(self, store: Store, engine: Supervisor, files: RevisionFiles, tell: Tell) -> None:
        self._store, self._engine, self._files, self._tell = store, engine, files, tell

    async def target(self, revision: int | None) -> int:
        """What a rollback leads to: the given revision, or what served before the pass that made the one that does.

        Raises Conflict where that cannot serve, RevisionCorrupt where its files are damaged.
        """
        serving = self._engine.revision
        if revision is None:
            revision = await self._store.call(revisions.predecessor, serving)
            if revision is None:
                raise Conflict("the base model serves; there is nothing to go back to")
        row = await self._store.call(revisions.get, revision)
        if revision == serving:
            raise Conflict(f"revision {revision} serves already")
        if row.state not in ("base", "committed"):
            raise Conflict(f"revision {revision} is {row.state}; only committed revisions can serve")
        await asyncio.to_thread(self._files.verified, revision)
        return revision

    async def activate(self, revision: int, reason: str) -> float:
        """Lets `revision` serve, on record before it does; returns the milliseconds of the swap."""
        previous = await self._store.call(revisions.committed)
        await self._store.call(revisions.activate, revision, reason)
        try:
            milliseconds = await self._engine.swap(revision, _WARMING)
        except AgentdError:
            await self._store.call(revisions.activate, previous, f"revision {revision} could not be loaded")
            raise
        await self._tell("rolled back", f"revision {revision} serves: {reason}", revision)
        return milliseconds

    async def fall_back(self, error: RevisionCorrupt, revision: int) -> int:
        """Says what to serve when `revision` turns out unusable: its nearest intact ancestor, finally the base.

        If its files are intact and the engine dies of it all the same, nothing learned is trusted: the base.
        """
        await self._tell("revision corrupt", str(error), revision)
        fallback = 0
        if not isinstance(error, CrashLoop):
            for ancestor in (await self._store.call(revisions.lineage, revision))[1:]:
                if await asyncio.to_thread(self._intact, ancestor):
                    fallback = ancestor
                    break
        await self._store.call(revisions.activate, fallback, str(error))
        return fallback

    def _intact(self, revision: int) -> bool:
        try:
            self._files.verified(revision)
        except RevisionCorrupt:
            return False
        return True
