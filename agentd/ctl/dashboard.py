"""The dashboard: an address that lets a browser in, and the way from it to the admin socket."""

import sys
from contextlib import suppress
from socket import gethostname
from typing import Annotated, Any

import typer

from agentd.ctl import output
from agentd.ctl.client import Daemon
from agentd.ctl.errors import CtlError, UsageError
from agentd.ctl.options import Socket

_GOOD_ONCE = "It is good once, for 5 minutes."


def dashboard(
    port: Annotated[int, typer.Option(min=0, max=65535, metavar="N", help="The loopback port; 0: any free one.")] = 0,
    open_: Annotated[bool, typer.Option("--open", help="Open the address in this machine's browser.")] = False,
    tcp: Annotated[
        bool, typer.Option("--tcp", help="An address at the daemon's own serve.tcp, for browsers of other machines.")
    ] = False,
    socket: Socket = None,
) -> None:
    """Show the dashboard: prints an address that lets one browser in, and serves it until Ctrl-C. With --tcp the daemon
    itself serves it, and the command ends."""
    daemon = Daemon(socket)
    if tcp:
        if port:
            raise UsageError("--port is of the address that this command serves; with --tcp the daemon does")
        doors = _doors(daemon.get("/admin/status"))
        print("\n".join(_address(daemon, door) for door in doors), flush=True)
        output.say("Each is good once, for 5 minutes.")
        if open_:
            _open(_address(daemon, doors[0]))
        return
    from agentd.ctl.proxy import proxy

    with proxy(daemon, port) as own:
        here = f"http://127.0.0.1:{own}"
        print(_address(daemon, here), flush=True)
        output.say(f"{_GOOD_ONCE} The page works as long as this runs; Ctrl-C ends it.")
        output.say(f"From another machine: `ssh -L {own}:127.0.0.1:{own} …`, and open the same address there.")
        if open_:
            _open(_address(daemon, here))
        with suppress(KeyboardInterrupt):
            _wait(daemon, here)


def _doors(status: dict[str, Any]) -> list[str]:
    """Where the daemon listens for other machines' browsers. Raises CtlError where nobody gets in."""
    doors: list[dict[str, Any]] = status["tcp"]
    if not doors:
        raise CtlError("the daemon listens at no TCP address; set serve.tcp, or leave --tcp out")
    if not (doors := [door for door in doors if door["open"]]):
        raise CtlError("nobody gets in at serve.tcp before there is an API key: agentctl key add NAME")
    return [f"{'https' if door['tls'] else 'http'}://{_named(door['address'])}" for door in doors]


def _named(address: str) -> str:
    """HOST:PORT that a browser can open: of all addresses of this machine its name."""
    host, _, port = address.rpartition(":")
    return f"{gethostname()}:{port}" if host in ("0.0.0.0", "[::]") else address


def _open(address: str) -> None:
    import webbrowser

    webbrowser.open(address)


def _address(daemon: Daemon, door: str) -> str:
    return f"{door}/ui/#key={daemon.post('/admin/dashboard')['token']}"


def _wait(daemon: Daemon, door: str) -> None:
    """Until Ctrl-C; Enter on a terminal asks for another address."""
    if not sys.stdin.isatty():
        import threading

        threading.Event().wait()
    output.say("Enter prints another address.")
    while sys.stdin.readline():
        print(_address(daemon, door), flush=True)
