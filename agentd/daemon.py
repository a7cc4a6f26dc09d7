"""startup → run → shutdown; the only place where the parts are wired together."""

import asyncio
import contextlib
import fcntl
import logging
import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

from agentd import ids, logs, maintenance, models
from agentd.adapt import kinds
from agentd.adapt.controller import Adaptation
from agentd.adapt.holds import Holds
from agentd.adapt.passes import parked
from agentd.api import access, ui
from agentd.api.app import application
from agentd.api.classify import CLASSIFY_TASK
from agentd.api.server import GRACE, Server, address_of, tcp_socket, unix_socket
from agentd.api.services import Services
from agentd.api.telemetry import Telemetry
from agentd.api.tls import Tls
from agentd.config.reload import compare
from agentd.config.schema import Config, HoldSettings, TaskSettings
from agentd.config.values import is_loopback
from agentd.durable import make_directory
from agentd.engine.process.activity import Activity
from agentd.engine.process.supervisor import Supervisor
from agentd.errors import (
    AgentdError,
    CannotListen,
    InvalidConfig,
    RevisionCorrupt,
    StateDirLocked,
    StorageFailed,
)
from agentd.host import allocator, page_cache, systemd
from agentd.host.clock import WallClock
from agentd.host.crash_loop import LIMIT, StartCounter
from agentd.host.pressure import MemoryPressure
from agentd.host.sensors import SensorReader, Sensors
from agentd.ids import now
from agentd.int8.header import ClassifierHeader
from agentd.revision.files import RevisionFiles
from agentd.store import events, examples, revisions, tasks
from agentd.store.database import Store
from agentd.store.model_files import ModelFiles
from agentd.store.recovery import known_directories, recover

logger = logging.getLogger(__name__)

_LOOK_AT_DISK = 5.0  # seconds between looks at how much room there is
TCP_CONNECTIONS = 256  # at a time, of those who have not yet said who they are, too; UNIX sockets keep answering
_STARTED_AFTER = 30  # seconds without a request after which a start counts as a success


def main(config: Config, reload: Callable[[], Config]) -> int:
    """Runs the daemon until SIGTERM or SIGINT; on SIGHUP it asks `reload` for the settings again.

    Returns the process's exit status.
    """
    os.umask(0o077)  # all that is written here is for no one else
    logs.configure()
    allocator.few_arenas()
    try:
        with locked(config.state.dir):
            return asyncio.run(run(config, reload))
    except AgentdError as error:
        logger.error("%s", error)
        return error.exit_status


async def run(config: Config, reload: Callable[[], Config]) -> int:
    notifier, pressure = systemd.Notifier(), MemoryPressure()
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    async with AsyncExitStack() as stack:
        starting = asyncio.create_task(systemd.keep_starting(notifier))
        stack.callback(starting.cancel)
        notifier.status("checking the model and the state")
        services = await build(config, stack, notifier)
        # Until here there is nothing to take down, and fetching a model can take long: a signal just ends the process.
        # From here on sockets are bound, and whoever sees one may send a signal.
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stopping.set)
        reload_early = asyncio.Event()  # a signal that comes before there is something to reload
        loop.add_signal_handler(signal.SIGHUP, reload_early.set)
        servers = serving(services, stack, notifier)
        running = asyncio.gather(*(server.run_until_stopped() for server in servers))
        ready = asyncio.create_task(bring_up(services, stack))
        try:
            notifier.status("loading the model")
            await _first(ready, stopping)
            if ready.done():
                ready.result()
                certificates = [server.tls for server in servers if server.tls is not None]
                read_again = reloader(services, notifier, reload, certificates)
                loop.add_signal_handler(signal.SIGHUP, read_again)
                for work in (feed_watchdog(services.supervisor, notifier), pressure.watch(services.holds.pressure)):
                    stack.callback(asyncio.create_task(work).cancel)
                starting.cancel()
                notifier.ready(f"serving revision {services.supervisor.revision}")
                logger.info("serving %s on %s", services.model_name, config.api_socket)
                if reload_early.is_set():
                    read_again()
                await asyncio.to_thread(page_cache.forget)
                allocator.settle()
                await stopping.wait()
        finally:
            notifier.stopping()
            services.stopping = True
            for server in servers:
                server.stop()
            giving_up = loop.call_later(GRACE, services.supervisor.give_up)
            ready.cancel()  # if it still loads the model, it takes the engine down again
            await asyncio.wait({ready})
            await running
            giving_up.cancel()
    StartCounter(config.state.dir / "starts").succeeded()
    return 0


async def build(config: Config, stack: AsyncExitStack, notifier: systemd.Notifier) -> Services:
    """Opens the state and makes every part, in order; what is up is taken down again if a later part fails."""

    def reading(done: int, total: int) -> None:
        if done == total or done % (256 << 20) == 0:  # some hundred times for the largest models
            notifier.status(f"reading the model, {done / max(1, total):.0%}")

    store = await asyncio.to_thread(Store, config.state.dir / "agentd.db")
    stack.callback(store.close)
    await asyncio.to_thread(store.keep_room)
    memory = ModelFiles(store, models.cache())
    path = await asyncio.to_thread(models.resolve, config.model.path, engine=config.engine, memory=memory)
    model = await asyncio.to_thread(models.check, path, config.engine, reading, memory)
    digests = await store.call(revisions.digests)
    kind = kinds.choose(config, model)
    config = await asyncio.to_thread(kind.fitted, config)
    files = RevisionFiles(config.state.dir / "revisions", model.sha256, digests)
    folders = config.state.dir / "passes"
    for note in await store.call(recover, lambda number: parked.read(folders / str(number)) is not None):
        logger.warning("%s", note)
    for name, task in tasks_of(config, model.classifier).items():
        await store.call(tasks.declare, declared(name, task))
    await store.call(examples.readmit, config.context)
    files.reconcile(await store.call(known_directories))
    for left_over in (*config.state.dir.glob(".backup-*"), config.state.dir / ".restored"):
        await asyncio.to_thread(shutil.rmtree, left_over, ignore_errors=True)
    activity = Activity()

    async def fall_back(error: RevisionCorrupt, revision: int) -> int:
        return await adaptation.fall_back(error, revision)

    supervisor = Supervisor(
        kind.settings(config),
        files.weights,
        activity,
        revision=await store.call(revisions.committed),
        queue_limit=config.serve.queue,
        fallback=fall_back,
        model=model,
    )
    adaptation = Adaptation(config, store, supervisor, activity, files, kind)

    async def tell(kind: str, message: str) -> None:
        logger.warning("%s: %s", kind, message)
        with contextlib.suppress(AgentdError):
            await store.call(events.add, kind, message)

    reader = SensorReader()

    def hold_settings() -> HoldSettings:
        return services.config.adapt.hold

    def sensors() -> Sensors:
        return reader.read(hold_settings().sensor)

    holds = Holds(hold_settings, activity, sensors, tell, model.verify)
    services = Services(config, store, supervisor, activity, adaptation, model, holds)
    services.authorities.append(ui.by_session)
    if config.serve.telemetry.endpoint:
        services.telemetry = await asyncio.to_thread(Telemetry, config.serve.telemetry.endpoint, services.model_name)
        stack.push_async_callback(asyncio.to_thread, services.telemetry.close)
    await services.recall.load()
    await services.keys.load()
    return services


async def bring_up(services: Services, stack: AsyncExitStack) -> None:
    """Loads the model, puts the committed revision in place and starts looking for things to learn."""
    supervisor = services.supervisor
    starts = StartCounter(services.config.state.dir / "starts")
    count = starts.begin()
    if count > LIMIT:
        supervisor.suspect(count - 1, "daemon")
    stack.push_async_callback(supervisor.stop)
    await supervisor.start()
    stack.push_async_callback(services.adaptation.shut_down)
    services.adaptation.paused = await services.store.call(events.paused)
    await services.adaptation.start_up()
    newest = await services.store.call(events.newest)
    clock = WallClock(known=None if newest is None else ids.epoch(newest))
    for work in (
        maintenance.run(services, clock),
        clock.watch(lambda seconds: clock_jumped(services, seconds)),
        services.holds.watch(),
        watch_disk(services.store),
        succeeded(starts, services.activity),
    ):
        stack.callback(asyncio.create_task(work).cancel)


async def _first(task: asyncio.Task[None], event: asyncio.Event) -> None:
    waiting = asyncio.create_task(event.wait())
    await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()


def serving(services: Services, stack: AsyncExitStack, notifier: systemd.Notifier) -> list[Server]:
    """A server for each kind of door: the API's UNIX socket, the admin API's, and TCP where there is any.

    Raises CannotListen, InvalidConfig.
    """
    config = services.config
    tls = tls_of(config)
    try:
        inherited = systemd.listen_fds()
    except ValueError as error:
        raise CannotListen("what systemd passed", str(error)) from None

    def own(path: Path, mode: int, name: str) -> socket.socket:
        listener = unix_socket(path, mode)
        if not notifier.keep(name, listener):
            stack.callback(path.unlink, missing_ok=True)
        return listener

    admin = inherited.pop("admin", None) or own(config.admin_socket, 0o600, "admin")
    local = [each for each in inherited.values() if each.family == socket.AF_UNIX]
    remote = [each for each in inherited.values() if each.family != socket.AF_UNIX]
    api = local or [own(config.api_socket, 0o660, "api")]
    servers = [Server(application(services, access.API), api), Server(application(services, access.ADMIN), [admin])]
    if remote:
        servers.append(tcp_server(services, remote, tls))
    if config.serve.tcp:
        servers.append(tcp_server(services, [tcp_socket(config.serve.tcp)], tls, own=True))
    return servers


def tls_of(config: Config) -> Tls | None:
    """Raises InvalidConfig."""
    files = config.serve.tls
    return Tls(files.certificate, files.key) if files.certificate and files.key else None


def tcp_server(services: Services, listeners: list[socket.socket], tls: Tls | None, *, own: bool = False) -> Server:
    """Where only programs of this machine come in they need no key, unless the configuration says so; anywhere else
    all do. Our `own` socket does not even listen before there is one; systemd's does already."""
    addresses = [address_of(listener) for listener in listeners]
    local = all(is_loopback(address) for address in addresses)
    is_open = local and not services.config.serve.require_key
    door = access.LOOPBACK if is_open else access.TCP
    services.tcp += [{"address": address, "tls": tls is not None, "needs_key": not is_open} for address in addresses]
    listed = ", ".join(addresses)
    if not is_open and not services.keys:
        logger.warning("no one gets in at %s before there is an API key: agentctl key add NAME", listed)
    if not local and tls is None:
        logger.warning("%s is served without TLS: keys and texts can be read on the way", listed)
    wanted = services.keys.exist if own and not is_open else None
    return Server(application(services, door), listeners, tls=tls, wanted=wanted, connections=TCP_CONNECTIONS)


def tasks_of(config: Config, classifier: ClassifierHeader | None) -> dict[str, TaskSettings]:
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
    return {CLASSIFY_TASK: TaskSettings(choices=classifier.classes), **config.tasks}


def declared(name: str, task: TaskSettings) -> tasks.Task:
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
        make_directory(state)
        file = (state / "lock").open("a+")
    except OSError as error:
        raise StorageFailed(f"{state}: {error.strerror}") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.seek(0)
            raise StateDirLocked(state, file.read().strip() or "unknown") from None
        if os.geteuid() == 0:  # root restores what a service's user has to open afterwards
            owner = state.stat()
            os.fchown(file.fileno(), owner.st_uid, owner.st_gid)
        # Whose lock it is helps a reader only: a full disk is no reason not to start.
        with contextlib.suppress(OSError):
            os.truncate(file.fileno(), 0)
            os.write(file.fileno(), str(os.getpid()).encode())
        yield


async def feed_watchdog(supervisor: Supervisor, notifier: systemd.Notifier) -> None:
    """Tells the service manager that we live, but only while the engine answers."""
    interval = notifier.watchdog_interval
    while interval is not None:
        if await supervisor.alive(timeout=interval):
            notifier.watchdog()
        await asyncio.sleep(interval / 2)


def clock_jumped(services: Services, seconds: float) -> None:
    logger.warning("the wall clock jumped by %+.0f s", seconds)
    services.adaptation.triggers.clock_jumped()
    with contextlib.suppress(AgentdError):
        services.store.submit(events.add, "clock jumped", f"by {seconds:+.0f} s")


async def watch_disk(store: Store) -> None:
    """Notices a disk that others fill before it is in the way, and one that has room again."""
    while True:
        with contextlib.suppress(AgentdError):
            await store.look()
        await asyncio.sleep(_LOOK_AT_DISK)


async def succeeded(starts: StartCounter, activity: Activity) -> None:
    """A start counts as a success once a request was answered, or after a while without trouble."""
    for _ in range(_STARTED_AFTER):
        await asyncio.sleep(1)
        if activity.served:
            break
    starts.succeeded()


def reloader(
    services: Services, notifier: systemd.Notifier, read: Callable[[], Config], certificates: Sequence[Tls] = ()
) -> Callable[[], None]:
    """What SIGHUP does. A configuration with a mistake, or a bad certificate, changes nothing."""
    running: set[asyncio.Task[None]] = set()

    async def reload() -> None:
        try:
            change = compare(services.config, await asyncio.to_thread(read))
            for certificate in certificates:
                certificate.reload()
        except AgentdError as error:
            logger.error("the configuration stays as it was: %s", error)
            await services.store.call(events.add, "reload failed", str(error))
        else:
            await apply(services, change.config)
            logger.info("configuration read again; %s", change.summary)
            await services.store.call(
                events.add, "reloaded", change.summary, data={"changed": change.changed, "fixed": change.fixed}
            )
        notifier.ready(f"serving revision {services.supervisor.revision}")

    def begin() -> None:
        notifier.reloading()
        task = asyncio.create_task(reload())
        running.add(task)
        task.add_done_callback(running.discard)

    return begin


async def apply(services: Services, config: Config) -> None:
    """Lets a configuration count from now on, as far as nothing has to be started anew for it."""
    services.config = config
    services.supervisor.set_queue(config.serve.queue)
    services.adaptation.reconfigure(config)
    for name, task in config.tasks.items():
        await services.store.call(tasks.declare, declared(name, task))
