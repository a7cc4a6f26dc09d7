"""systemd's notification of memory pressure (systemd.exec(5)): from 254 on, with the drop-in newer.conf."""

import asyncio
import base64
import logging
import os
import select
import stat
from collections.abc import Awaitable, Callable, MutableMapping

logger = logging.getLogger(__name__)


class MemoryPressure:
    """The file that MEMORY_PRESSURE_WATCH names. The variables are taken out of `environment`: children must not
    watch."""

    def __init__(self, environment: MutableMapping[str, str] = os.environ) -> None:
        self._path = environment.pop("MEMORY_PRESSURE_WATCH", "")
        self._write = environment.pop("MEMORY_PRESSURE_WRITE", "")

    async def watch(self, react: Callable[[], Awaitable[None]]) -> None:
        """Awaits `react` whenever pressure is reported; returns at once where no one would report any."""
        if not self._path or self._path == "/dev/null":
            return
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            logger.warning("memory pressure is not watched: %s: %s", self._path, error.strerror)
            return
        try:
            # A pressure file is never read: what it wants written sets the threshold, and POLLPRI reports. Pipes are
            # drained.
            regular = stat.S_ISREG(os.fstat(descriptor).st_mode)
            if self._write:
                os.write(descriptor, base64.b64decode(self._write))
            with select.epoll() as poll:
                poll.register(descriptor, select.EPOLLPRI if regular else select.EPOLLIN)
                await self._report(poll, None if regular else descriptor, react)
        except (OSError, ValueError) as error:
            logger.warning("memory pressure is not watched: %s: %s", self._path, error)
        finally:
            os.close(descriptor)

    async def _report(self, poll: select.epoll, pipe: int | None, react: Callable[[], Awaitable[None]]) -> None:
        loop, reported = asyncio.get_running_loop(), asyncio.Event()
        loop.add_reader(poll.fileno(), reported.set)
        try:
            while True:
                await reported.wait()
                poll.poll(0)
                if pipe is not None:
                    os.read(pipe, 4096)
                reported.clear()
                await react()
                await asyncio.sleep(1)
        finally:
            loop.remove_reader(poll.fileno())
