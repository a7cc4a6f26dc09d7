"""The dashboard: an address that lets a browser in, and the way from it to the admin socket."""

import sys
from contextlib import suppress
from typing import Annotated

import typer

from agentd.ctl import output
from agentd.ctl.client import Daemon
from agentd.ctl.options import Socket

_GOOD_ONCE = "It is good once, for 5 minutes."


def dashboard(
    port: Annotated[int, typer.Option(min=0, max=65535, metavar="N", help="The loopback port; 0: any free one.")] = 0,
    open_: Annotated[bool, typer.Option("--open", help="Open the address in this machine's browser.")] = False,
    socket: Socket = None,
) -> None:
    """Show the dashboard: prints an address that lets one browser in, and serves it until Ctrl-C."""
    from agentd.ctl.proxy import proxy

    daemon = Daemon(socket)
    with proxy(daemon, port) as own:
        print(_address(daemon, own), flush=True)
        output.say(f"{_GOOD_ONCE} The page works as long as this runs; Ctrl-C ends it.")
        output.say(f"From another machine: `ssh -L {own}:127.0.0.1:{own} …`, and open the same address there.")
        if open_:
            import webbrowser

            webbrowser.open(_address(daemon, own))
        with suppress(KeyboardInterrupt):
            _wait(daemon, own)


def _address(daemon: Daemon, port: int) -> str:
    return f"http://127.0.0.1:{port}/ui/#key={daemon.post('/admin/dashboard')['token']}"


def _wait(daemon: Daemon, port: int) -> None:
    """Until Ctrl-C; Enter on a terminal asks for another address."""
    if not sys.stdin.isatty():
        import threading

        threading.Event().wait()
    output.say("Enter prints another address.")
    while sys.stdin.readline():
        print(_address(daemon, port), flush=True)
