import asyncio
import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from agentd.host.systemd import Notifier, keep_starting, listen_fds, work_done

UNITS = Path(__file__).parents[3] / "systemd"


@pytest.fixture(params=["path", "abstract"])
def manager(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    """A datagram socket as the service manager holds it, and what it puts into NOTIFY_SOCKET."""
    name = f"agentd-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.settimeout(5)
        if request.param == "path":
            receiver.bind(str(tmp_path / "notify"))
            yield receiver, str(tmp_path / "notify")
        else:
            receiver.bind(f"\0{name}")
            yield receiver, f"@{name}"


def test_notifications_arrive(manager: tuple[socket.socket, str]) -> None:
    receiver, address = manager
    environment = {"NOTIFY_SOCKET": address, "PATH": "/bin"}
    notifier = Notifier(environment)
    assert environment == {"PATH": "/bin"}, "children must not speak for the daemon"
    assert notifier.ready("serving r12")
    assert receiver.recv(4096) == b"READY=1\nSTATUS=serving r12"
    assert notifier.status("pass 13: step 40/200\nREADY=0")
    assert receiver.recv(4096) == b"STATUS=pass 13: step 40/200 READY=0"
    assert notifier.watchdog()
    assert receiver.recv(4096) == b"WATCHDOG=1"
    assert notifier.extend_timeout(1.5)
    assert receiver.recv(4096) == b"EXTEND_TIMEOUT_USEC=1500000"
    assert notifier.stopping()
    assert receiver.recv(4096) == b"STOPPING=1"


def test_reloading_is_told_with_its_moment(manager: tuple[socket.socket, str]) -> None:
    receiver, address = manager
    before = time.monotonic_ns() // 1000
    assert Notifier({"NOTIFY_SOCKET": address}).reloading()
    first, second = receiver.recv(4096).decode().splitlines()
    assert first == "RELOADING=1"
    assert before <= int(second.removeprefix("MONOTONIC_USEC=")) <= time.monotonic_ns() // 1000


def test_a_socket_is_kept_by_a_manager_that_keeps_some(manager: tuple[socket.socket, str], tmp_path: Path) -> None:
    receiver, address = manager
    environment = {"NOTIFY_SOCKET": address, "FDSTORE": "8"}
    notifier = Notifier(environment)
    assert environment == {}
    with listener(tmp_path / "api") as ours:
        assert notifier.keep("api", ours)
        message, descriptors, _, _ = socket.recv_fds(receiver, 4096, 4)
        assert message == b"FDSTORE=1\nFDNAME=api"
        with socket.socket(fileno=descriptors[0]) as returned:
            assert returned.getsockname() == str(tmp_path / "api")
        assert not Notifier({"NOTIFY_SOCKET": address}).keep("api", ours), "this one keeps none"
        assert not Notifier({"FDSTORE": "8"}).keep("api", ours)


@pytest.mark.parametrize(("work", "extensions"), [([1.0, 2.0, 3.0, 4.0], 4), ([1.0, 1.0, 1.0, 1.5], 2)])
def test_more_time_is_asked_for_only_while_the_start_gets_on(
    manager: tuple[socket.socket, str], work: list[float], extensions: int
) -> None:
    receiver, address = manager
    receiver.setblocking(False)
    readings = list(work)
    with pytest.raises(IndexError):  # the readings have ended
        asyncio.run(keep_starting(Notifier({"NOTIFY_SOCKET": address}), every=0.01, work=lambda: readings.pop(0)))
    messages = []
    with contextlib.suppress(BlockingIOError):
        while True:
            messages.append(receiver.recv(4096))
    assert messages == [b"EXTEND_TIMEOUT_USEC=60000"] * extensions


def test_computing_is_work_and_waiting_is_none() -> None:
    before, began = work_done(), time.process_time()
    while time.process_time() - began < 0.3:
        pass
    after = work_done()
    assert after > before
    time.sleep(0.3)
    assert work_done() < after + 0.3


def test_no_listener(tmp_path: Path) -> None:
    assert not Notifier({}).ready()
    assert not Notifier({"NOTIFY_SOCKET": str(tmp_path / "absent")}).ready()
    assert not Notifier({"NOTIFY_SOCKET": "x" * 4096}).ready()


def test_watchdog_interval_is_half_of_what_is_allowed() -> None:
    own, other = str(os.getpid()), str(os.getppid())
    environment = {"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": own}
    assert Notifier(environment).watchdog_interval == 30.0
    assert environment == {}
    assert Notifier({"WATCHDOG_USEC": "60000000"}).watchdog_interval == 30.0
    assert Notifier({"WATCHDOG_USEC": "60000000", "WATCHDOG_PID": other}).watchdog_interval is None
    assert Notifier({"WATCHDOG_USEC": "0"}).watchdog_interval is None
    assert Notifier({"WATCHDOG_USEC": "soon"}).watchdog_interval is None
    assert Notifier({}).watchdog_interval is None


# What systemd does between fork and exec: the descriptors from 3 on, and variables that name this process.
ACTIVATE = """
import json, os, sys
descriptors = json.loads(sys.argv[1])
for i, descriptor in enumerate(descriptors):
    os.dup2(descriptor, 100 + i)
for i in range(len(descriptors)):
    os.dup2(100 + i, 3 + i, inheritable=True)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(descriptors)), LISTEN_FDNAMES=sys.argv[2])
os.execv(sys.executable, [sys.executable, "-c", sys.argv[3]])
"""

SERVE = """
import os
from agentd.host.systemd import listen_fds
sockets = listen_fds()
assert not [name for name in os.environ if name.startswith("LISTEN_")]
for name in sorted(sockets):
    assert not sockets[name].get_inheritable() and sockets[name].gettimeout() == 0
    sockets[name].setblocking(True)
    with sockets[name].accept()[0] as client:
        client.sendall(f"{name} {sockets[name].fileno()}".encode())
"""


def activated(sockets: list[socket.socket], names: str, code: str) -> "subprocess.Popen[str]":
    # Away from the low numbers, as descriptors 3, 4, ... are the child's to fill.
    copies = [os.dup(s.fileno()) for s in sockets]
    try:
        return subprocess.Popen(
            [sys.executable, "-c", ACTIVATE, json.dumps(copies), names, code],
            pass_fds=copies,
            stderr=subprocess.PIPE,
            text=True,
        )
    finally:
        for copy in copies:
            os.close(copy)


def listener(path: Path) -> socket.socket:
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    server.listen()
    return server


def test_sockets_are_taken_over_by_name(tmp_path: Path) -> None:
    with listener(tmp_path / "admin") as admin, listener(tmp_path / "api") as api:
        process = activated([admin, api], "admin:api", SERVE)
    for name, descriptor in (("admin", 3), ("api", 4)):
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(20)
            client.connect(str(tmp_path / name))
            assert client.recv(100).decode() == f"{name} {descriptor}"
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 0, errors


@pytest.mark.parametrize(
    ("make", "names", "message"),
    [
        (lambda path: [socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)], "api", "(api) from systemd does not listen"),
        (lambda path: [socket.socket(socket.AF_UNIX)], "api", "(api) from systemd does not listen"),
        (lambda path: [listener(path / "a"), listener(path / "b")], "api:api", "two sockets named api"),
    ],
    ids=["datagram", "not listening", "same name"],
)
def test_wrong_sockets_are_named(make: object, names: str, message: str, tmp_path: Path) -> None:
    assert callable(make)
    sockets = make(tmp_path)
    process = activated(sockets, names, "from agentd.host.systemd import listen_fds; listen_fds()")
    for each in sockets:
        each.close()
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "ValueError" in errors
    assert message in errors


def test_descriptors_of_another_process_are_left_alone() -> None:
    environment = {"LISTEN_PID": str(os.getppid()), "LISTEN_FDS": "1", "LISTEN_FDNAMES": "api"}
    assert listen_fds(environment) == {}
    assert environment == {}
    assert listen_fds({}) == {}
    assert listen_fds({"LISTEN_PID": str(os.getpid()), "LISTEN_FDS": "many"}) == {}


# systemd.directives(7) with the version that brought each: JetPack 6 and Ubuntu 22.04 have 249.
NEWER_THAN_249 = {
    "notify-reload", "MemoryPressureWatch", "MemoryPressureThresholdSec", "FileDescriptorStorePreserve", "OpenFile",
    "RestartSteps", "RestartMaxDelaySec", "RestartMode", "ExitType", "ExecSearchPath", "MemoryZSwapMax",
    "SetLoginEnvironment",
    "RootEphemeral", "PrivatePIDs", "ProtectHostname=private", "MemoryKSM", "StartupAllowedCPUs", "LogFilterPatterns",
    "ImportCredential", "ReloadSignal", "SurviveFinalKillSignal", "PassFileDescriptorsToExec", "PollLimitBurst",
    "RestrictFileSystems", "RestrictNetworkInterfaces", "PrivateTmp=disconnected",
}  # fmt: skip


def directives(name: str) -> dict[str, list[str]]:
    values: dict[str, list[str]] = {}
    for line in (UNITS / name).read_text().splitlines():
        if line and line[0] not in "#[":
            key, _, value = line.partition("=")
            values.setdefault(key, []).append(value)
    return values


@pytest.mark.parametrize("name", ["agentd.service", "agentd.socket", "agentd-admin.socket", "agentd-tcp.socket"])
def test_units_need_nothing_newer_than_systemd_249(name: str) -> None:
    for key, values in directives(name).items():
        assert key not in NEWER_THAN_249
        assert not {f"{key}={value}" for value in values} & NEWER_THAN_249
        assert key != "Type" or values == ["notify"]


@pytest.mark.parametrize(
    ("name", "path", "mode", "descriptor"),
    [
        ("agentd.socket", "/run/agentd/api.sock", "0660", "api"),
        ("agentd-admin.socket", "/run/agentd/admin.sock", "0600", "admin"),
    ],
)
def test_socket_units_fit_the_daemon(name: str, path: str, mode: str, descriptor: str) -> None:
    unit = directives(name)
    assert unit["ListenStream"] == [path]
    assert unit["SocketMode"] == [mode]
    assert unit["FileDescriptorName"] == [descriptor]
    assert unit["Service"] == ["agentd.service"]


def test_the_service_leaves_the_sockets_directory_alone() -> None:
    service = directives("agentd.service")
    assert "RuntimeDirectory" not in service, "it would take the live sockets away at each stop"
    assert service["StateDirectory"] == ["agentd"]
    groups = [line.split()[1] for line in (UNITS / "agentd.sysusers").read_text().splitlines() if line.startswith("g ")]
    assert directives("agentd.socket")["SocketGroup"] == groups == service["SupplementaryGroups"]


def systemd_analyze(*arguments: str) -> "subprocess.CompletedProcess[str]":
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not installed")
    return subprocess.run(
        ["systemd-analyze", *arguments], capture_output=True, text=True, timeout=60, check=False
    )  # fmt: skip


def test_units_are_valid(tmp_path: Path) -> None:
    names = ["agentd.service", "agentd.socket", "agentd-admin.socket", "agentd-tcp.socket"]
    for name in names:
        shutil.copy(UNITS / name, tmp_path)
    result = systemd_analyze("verify", "--man=no", *(str(tmp_path / name) for name in names))
    # Other units of the machine may be at fault too; only what is said of ours counts.
    ours = [line for line in result.stderr.splitlines() if "agentd" in line]
    assert ours == []


def test_exposure_is_safe(tmp_path: Path) -> None:
    # systemd 249 and older cannot judge a file; 252 can.
    shutil.copy(UNITS / "agentd.service", tmp_path)
    result = systemd_analyze(
        "security", "--offline=yes", "--threshold=10", "--no-pager", str(tmp_path / "agentd.service")
    )
    if "unrecognized option" in result.stderr:
        pytest.skip("this systemd-analyze has no --offline")
    assert result.returncode == 0, result.stdout[-200:] + result.stderr
    (level,) = re.findall(r"exposure level for agentd\.service: ([0-9.]+)", result.stdout)
    assert float(level) <= 1.0


def test_exposure_stays_low_with_the_way_to_a_collector_that_the_document_shows(tmp_path: Path) -> None:
    document = (UNITS.parent / "docs" / "metrics.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^    \[Service\]\n(?:    .+\n)+", document, re.MULTILINE)
    place = tmp_path / "etc/systemd/system"
    (place / "agentd.service.d").mkdir(parents=True)
    shutil.copy(UNITS / "agentd.service", place)
    (place / "agentd.service.d" / "override.conf").write_text(block)
    options = (f"--root={tmp_path}", "security", "--offline=yes", "--threshold=15", "--no-pager")
    result = systemd_analyze(*options, "agentd.service")
    if "unrecognized option" in result.stderr:
        pytest.skip("this systemd-analyze has no --offline")
    assert result.returncode == 0, result.stdout[-200:] + result.stderr
    assert "Service has access to the host's network" in result.stdout


def test_tcp_takes_nothing_away_from_the_service() -> None:
    """The port is systemd's; the service is handed it, and still can open none."""
    port, service = directives("agentd-tcp.socket"), directives("agentd.service")
    assert port["Service"] == ["agentd.service"]
    assert port["FileDescriptorName"] == ["tcp"]  # neither api nor admin
    assert "agentd.service" in port["WantedBy"][0].split()
    assert service["PrivateNetwork"] == ["yes"]
    assert service["RestrictAddressFamilies"] == ["AF_UNIX"]
    assert "agentd-tcp.socket" not in " ".join(service["Requires"] + service["Also"])  # only where it is enabled
