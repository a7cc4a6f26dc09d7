"""systemd's side of the daemon: readiness, watchdog, and sockets handed over. Nothing to link against.

sd_notify(3), sd_listen_fds(3) and sd_watchdog_enabled(3) describe the protocols; away from systemd every function
here does nothing.
"""

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Callable, MutableMapping

import psutil

_FIRST_FD = 3  # SD_LISTEN_FDS_START


class Notifier:
    """Sends state to the service manager. Takes the address out of `environment`: children must not inherit it."""

    def __init__(self, environment: MutableMapping[str, str] = os.environ) -> None:
        address = environment.pop("NOTIFY_SOCKET", "")
        # A leading @ stands for the zero byte of an abstract address.
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._watchdog = _watchdog_seconds(environment)
        self._stores = environment.pop("FDSTORE", "0") not in ("", "0")

    @property
    def watchdog_interval(self) -> float | None:
        """Seconds between two calls of `watchdog`, half of what systemd allows; None when it does not watch."""
        return None if self._watchdog is None else self._watchdog / 2

    def ready(self, status: str = "") -> bool:
        """The daemon serves: the model is loaded and the sockets listen."""
        return self.notify(READY="1", STATUS=status or "ready")

    def status(self, text: str) -> bool:
        """One line for `systemctl status`."""
        return self.notify(STATUS=text)

    def stopping(self) -> bool:
        return self.notify(STOPPING="1")

    def watchdog(self) -> bool:
        """The daemon is alive. Send it only after the engine has answered."""
        return self.notify(WATCHDOG="1")

    def extend_timeout(self, seconds: float) -> bool:
        """Start-up or shutdown goes on and is not stuck: allow `seconds` from now on."""
        return self.notify(EXTEND_TIMEOUT_USEC=str(int(seconds * 1e6)))

    def reloading(self) -> bool:
        """The configuration is being read again; `ready` ends it."""
        return self.notify(RELOADING="1", MONOTONIC_USEC=str(time.monotonic_ns() // 1000))

    def keep(self, name: str, listener: socket.socket) -> bool:
        """Lets the service manager keep a socket over our restart, if it would (FileDescriptorStoreMax=, 254)."""
        if not self._address or not self._stores:
            return False
        message = f"FDSTORE=1\nFDNAME={name}".encode()
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
                sender.connect(self._address)
                socket.send_fds(sender, [message], [listener.fileno()])
        except OSError:
            return False
        return True

    def notify(self, **fields: str) -> bool:
        """Sends the fields in one datagram; False when no one listens. Never raises OSError."""
        if not self._address:
            return False
        # A newline would begin another field.
        lines = [f"{name}={' '.join(value.split())}" for name, value in fields.items()]
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sender:
                sender.settimeout(1.0)
                sender.sendto("\n".join(lines).encode(), self._address)
        except OSError:
            return False  # telling systemd how it goes is no reason to fail
        return True


def work_done() -> float:
    """What this process and those it started have done so far: seconds of computing plus MB read."""
    done = 0.0
    this = psutil.Process()
    for process in (this, *this.children(recursive=True)):
        with contextlib.suppress(psutil.Error):
            done += sum(process.cpu_times()[:2])
            done += process.io_counters().read_bytes / 1e6
    return round(done, 1)


async def keep_starting(notifier: Notifier, every: float = 10.0, work: Callable[[], float] = work_done) -> None:
    """Asks for more time as long as the start gets on, be it slow: a card that takes minutes to read the model is not
    stuck, and a start that is killed half-way would begin anew. One that neither computes nor reads is."""
    before = -1.0
    while True:
        if (done := await asyncio.to_thread(work)) > before:
            notifier.extend_timeout(6 * every)
        before = done
        await asyncio.sleep(every)


def _watchdog_seconds(environment: MutableMapping[str, str]) -> float | None:
    microseconds = environment.pop("WATCHDOG_USEC", "")
    meant_for = environment.pop("WATCHDOG_PID", str(os.getpid()))
    if not microseconds.isdigit() or int(microseconds) == 0 or meant_for != str(os.getpid()):
        return None
    return int(microseconds) / 1e6


def listen_fds(environment: MutableMapping[str, str] = os.environ) -> dict[str, socket.socket]:
    """The listening sockets that systemd opened for us, by name (FileDescriptorName=), ready for accept.

    Empty when there are none or they are meant for another process. The variables are taken out of `environment` and
    the descriptors closed on exec. Raises ValueError when a descriptor is no listening stream socket or two have the
    same name.
    """
    meant_for, count = environment.pop("LISTEN_PID", ""), environment.pop("LISTEN_FDS", "")
    names = environment.pop("LISTEN_FDNAMES", "").split(":")
    if meant_for != str(os.getpid()) or not count.isdigit():
        return {}
    sockets: dict[str, socket.socket] = {}
    for i in range(int(count)):
        descriptor = _FIRST_FD + i
        name = names[i] if i < len(names) and names[i] else f"fd{descriptor}"
        try:
            os.set_inheritable(descriptor, False)
            received = socket.socket(fileno=descriptor)
            listening = received.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        except OSError as error:
            raise ValueError(f"the descriptor {descriptor} ({name}) from systemd is no socket: {error}") from None
        if received.type != socket.SOCK_STREAM or not listening:
            received.detach()
            raise ValueError(f"the socket {descriptor} ({name}) from systemd does not listen; use ListenStream=")
        if name in sockets:
            received.detach()
            raise ValueError(f"systemd passed two sockets named {name}; give them different FileDescriptorName=")
        received.setblocking(False)
        sockets[name] = received
    return sockets
