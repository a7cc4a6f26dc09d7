"""startup → run → shutdown; the only place where the parts are wired together."""

import asyncio
import contextlib
import fcntl
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import AsyncExitStack
from datetime import datetime, timedelta, timezone
from pathlib import Path

from agentd import models, systemd
from agentd.adapt.controller import Adaptation, known_directories, recover
from agentd.adapt.revision_files import RevisionFiles
from agentd.api.app import application
from agentd.api.classify import CLASSIFY_TASK
from agentd.api.server import Server, tcp_socket, unix_socket
from agentd.api.services import Services
from agentd.config import Config, Task
from agentd.engine.activity import Activity
from agentd.engine.supervisor import Supervisor
from agentd.errors import AgentdError, CannotListen, InvalidConfig, RevisionCorrupt, StateDirLocked, StorageFailed
from agentd.ids import now
from agentd.safetensors_header import ClassifierHeader
from agentd.store import inferences, revisions, tasks
from agentd.store.database import Store

logger = logging.getLogger(__name__)

_PRUNE_EVERY = 3600.0  # seconds between looks at what retention lets go


def main(config: Config) -> int:
    """Runs the daemon until SIGTERM or SIGINT. Returns the process's exit status."""
    level = logging.getLevelName(os.environ.get("AGENTD_LOG", "INFO").upper())
    logging.basicConfig(
        level=level if isinstance(level, int) else logging.INFO,
        format="%(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    logging.getLogger("apscheduler").setLevel(logging.WARNING)
    try:
        with locked(config.state.dir):
            return asyncio.run(run(config))
    except AgentdError as error:
        logger.error("%s", error)
        return 1


async def run(config: Config) -> int:
    notifier = systemd.Notifier()
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    async with AsyncExitStack() as stack:
        notifier.status("checking the model and the state")
        services, servers = await build(config, stack)
        # Until here there is nothing to take down, and fetching a model can take long: a signal just ends the process.
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stopping.set)
        serving = asyncio.gather(*(server.run_until_stopped() for server in servers))
        ready = asyncio.create_task(bring_up(services, stack))
        try:
            notifier.status("loading the model")
            await _first(ready, stopping)
            if ready.done():
                ready.result()
                background = asyncio.create_task(feed_watchdog(services.supervisor, notifier))
                stack.callback(background.cancel)
                notifier.ready(f"serving revision {services.supervisor.revision}")
                logger.info("serving %s on %s", services.model_name, config.api_socket)
                await stopping.wait()
        finally:
            notifier.stopping()
            for server in servers:
                server.stop()
            ready.cancel()  # if it still loads the model, it takes the engine down again
            await asyncio.wait({ready})
            await serving
    return 0


async def build(config: Config, stack: AsyncExitStack) -> tuple[Services, list[Server]]:
    """Opens the state and makes every part, in order; what is up is taken down again if a later part fails."""
    model = await asyncio.to_thread(lambda: models.check(models.resolve(config.model.path), config.engine))
    store = await asyncio.to_thread(Store, config.state.dir / "agentd.db")
    stack.callback(store.close)
    files = RevisionFiles(config.state.dir / "revisions", model.sha256)
    for note in await store.call(recover):
        logger.warning("%s", note)
    for name, task in tasks_of(config, model.classifier).items():
        await store.call(tasks.declare, declared(name, task))
    files.reconcile(await store.call(known_directories))
    activity = Activity()

    async def fall_back(error: RevisionCorrupt, revision: int) -> int:
        return await adaptation.fall_back(error, revision)

    supervisor = Supervisor(
        engine_settings(config, model.path),
        files.weights,
        activity,
        revision=await store.call(revisions.committed),
        queue_limit=config.serve.queue,
        fallback=fall_back,
    )
    adaptation = Adaptation(config, store, supervisor, activity, files, model.path, model.classifier)
    services = Services(config, store, supervisor, activity, adaptation, model)
    api, admin = listening(config, stack)
    servers = [
        Server(application(services, with_admin=False), api),
        Server(application(services, with_admin=True), admin),
    ]
    return services, servers


async def bring_up(services: Services, stack: AsyncExitStack) -> None:
    """Loads the model, puts the committed revision in place and starts looking for things to learn."""
    stack.push_async_callback(services.supervisor.stop)
    await services.supervisor.start()
    stack.push_async_callback(services.adaptation.shut_down)
    await services.adaptation.start_up()
    pruning = asyncio.create_task(retention(services.config, services.store))
    stack.callback(pruning.cancel)


async def _first(task: asyncio.Task[None], event: asyncio.Event) -> None:
    waiting = asyncio.create_task(event.wait())
    await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()


def listening(config: Config, stack: AsyncExitStack) -> tuple[list[socket.socket], list[socket.socket]]:
    """The sockets of the API and of the admin API: inherited from systemd, or our own, removed at the end.

    Raises CannotListen.
    """
    try:
        inherited = systemd.listen_fds()
    except ValueError as error:
        raise CannotListen("what systemd passed", str(error)) from None

    def own(path: Path, mode: int) -> list[socket.socket]:
        made = unix_socket(path, mode)
        stack.callback(path.unlink, missing_ok=True)
        return [made]

    given = inherited.pop("admin", None)
    api = list(inherited.values()) or own(config.api_socket, 0o660)
    admin = [given] if given else own(config.admin_socket, 0o600)
    return [*api, *([tcp_socket(config.serve.tcp)] if config.serve.tcp else [])], admin


def engine_settings(config: Config, model: Path) -> dict[str, object]:
    return {
        "engine": config.engine,
        "path": str(model),
        "context": config.model.context,
        "slots": config.serve.slots,
        "threads": config.model_threads,
        "gpu_layers": config.model.gpu_layers,
    }


def tasks_of(config: Config, classifier: ClassifierHeader | None) -> dict[str, Task]:
    """The configured tasks; a classifier has one more, of all its classes. Raises InvalidConfig."""
    if classifier is None:
        return config.tasks
    classes = list(classifier.classes)
    problems = [
        f"tasks.{name}: a task of the classifier {classifier.architecture!r} has choices among its classes: "
        + ", ".join(classes)
        for name, task in config.tasks.items()
        if not task.choices or not set(task.choices) <= set(classes)
    ]
    if problems:
        raise InvalidConfig("the configuration", problems)
    return {CLASSIFY_TASK: Task(classifier.classes), **config.tasks}


def declared(name: str, task: Task) -> tasks.Task:
    """A task of the configuration as a row."""
    return tasks.Task(
        name=name,
        choices=list(task.choices),
        open=False,
        metric=task.metric,
        prompt=task.prompt,
        source="config",
        created_at=now(),
    )


@contextlib.contextmanager
def locked(state: Path) -> Iterator[None]:
    """Holds the state directory for this process alone. Raises StateDirLocked, StorageFailed."""
    try:
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = (state / "lock").open("a+")
    except OSError as error:
        raise StorageFailed(f"{state}: {error.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise StateDirLocked(state, file.read().strip() or "unknown") from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


async def feed_watchdog(supervisor: Supervisor, notifier: systemd.Notifier) -> None:
    """Tells the service manager that we live, but only while the engine answers."""
    interval = notifier.watchdog_interval
    while interval is not None:
        if await supervisor.alive(timeout=interval):
            notifier.watchdog()
        await asyncio.sleep(interval / 2)


async def retention(config: Config, store: Store) -> None:
    """Lets go of served requests that are old and that nobody gave feedback on."""
    while True:
        before = datetime.now(timezone.utc) - timedelta(seconds=config.retention.inferences)
        limit = before.isoformat(timespec="milliseconds").replace("+00:00", "Z")
        with contextlib.suppress(AgentdError):
            await store.call(inferences.prune, limit)
        await asyncio.sleep(_PRUNE_EVERY)
