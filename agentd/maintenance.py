"""What a daemon that is left alone does for its state: it lets go of what is old, or means nothing any more, and reads
everything once a week.

A page or a file that has gone bad on a worn card is found while there is still a backup to put in its place, and not
when it is needed.
"""

import asyncio
import contextlib
import logging
import sqlite3
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone

import anyio

from agentd import ids
from agentd.api.services import Services
from agentd.errors import AgentdError, ModelUnusable, RevisionCorrupt
from agentd.host.clock import WallClock
from agentd.revision.files import RevisionFiles
from agentd.store import events, inferences, meanings, recovery

logger = logging.getLogger(__name__)

CHECKED, DAMAGED = "state checked", "state damaged"
_EVERY = 3600.0  # seconds between looks at whether something is due
_CHECK_AFTER = timedelta(days=7)
_CHECK_ANYWAY = timedelta(days=8)  # on a device that is never idle
_MOST = 5  # problems reported of a database
_PAUSE = 0.05  # seconds between two steps of reading the model
_PATIENCE = 10.0  # seconds that a step of reading the model waits for those who are served


async def run(services: Services, clock: WallClock) -> None:
    """Does what is due, every hour. While the clock has just jumped, nothing is let go of: it may only look old.
    Reading everything does no harm on any day. A model whose sha256 was known at the start is read first."""
    if services.model.on_trust:
        await read_model(services)
    while True:
        if clock.trusted:
            with contextlib.suppress(AgentdError):
                await forget_old(services)
            with contextlib.suppress(AgentdError):
                await services.store.call(meanings.review)
        with contextlib.suppress(AgentdError):
            await check_if_due(services)
        await asyncio.sleep(_EVERY)


async def forget_old(services: Services) -> None:
    """Lets go of served requests that are old and that no one gave feedback on."""
    store, since = services.store, _ago(timedelta(seconds=services.config.retention.inferences))
    if await store.call(inferences.prune, since):
        await store.checkpoint()
    await services.supervisor.forget_prefixes(ids.epoch(since))


async def check_if_due(services: Services) -> None:
    """The check, if the last one is a week ago and no one waits for an answer; after a day of waiting, even so."""
    last = await services.store.call(events.last, (CHECKED, DAMAGED))
    if last is None:  # a new state was read at the start; its week begins now
        await services.store.call(events.add, CHECKED, "the database, when it was opened")
        return
    is_due = last.at < _ago(_CHECK_AFTER) or last.kind == DAMAGED  # damage may have been repaired meanwhile
    if is_due and (not services.activity.active or last.at < _ago(_CHECK_ANYWAY)):
        await check(services, last.message)


async def check(services: Services, last_message: str) -> None:
    """Reads the whole database and the files of all revisions. What is wrong is the daemon's problem from now on, and
    an event unless the last one, `last_message`, said the same."""
    directories = sorted(await services.store.call(recovery.known_directories))
    files = services.adaptation.files
    problems = await asyncio.to_thread(services.store.raw, _database_problems)
    problems += await asyncio.to_thread(lambda: list(_file_problems(files, directories)))
    await read_model(services)
    try:
        await asyncio.to_thread(services.model.verify)
    except ModelUnusable as error:
        problems.append(str(error))
    services.damage = "; ".join(problems)
    if not problems:
        await services.store.call(
            events.add, CHECKED, f"the database, the model, and the files of {len(directories)} revisions"
        )
        return
    logger.error("the state is damaged: %s", services.damage)
    message = f"{services.damage}. Put a backup in its place: agentd restore"
    if message != last_message:
        await services.store.call(events.add, DAMAGED, message)


async def read_model(services: Services) -> None:
    """Reads the model's files whole in small steps, each while no one is served, or after `_PATIENCE`. A restart goes
    on where this one was. `verify` says from then on what they turned out to be."""
    steps = services.model.read()
    while await asyncio.to_thread(next, steps, None) is not None:
        await asyncio.sleep(_PAUSE)
        with anyio.move_on_after(_PATIENCE):
            while services.activity.active:
                await asyncio.sleep(_PAUSE)


def _database_problems(connection: sqlite3.Connection) -> list[str]:
    try:
        rows = [row[0] for row in connection.execute(f"PRAGMA integrity_check({_MOST})")]
    except sqlite3.DatabaseError as error:  # damage that keeps it from being read at all
        rows = [str(error)]
    return [f"database: {row}" for row in rows if row != "ok"]


def _file_problems(files: RevisionFiles, numbers: list[int]) -> Iterator[str]:
    for number in numbers:
        try:
            files.verified(number)
        except RevisionCorrupt as error:
            yield str(error)


def _ago(span: timedelta) -> str:
    return (datetime.now(timezone.utc) - span).isoformat(timespec="milliseconds").replace("+00:00", "Z")
