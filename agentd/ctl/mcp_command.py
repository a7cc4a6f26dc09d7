"""`agentctl mcp`: agentd as tools of an agent."""

from typing import Annotated

import typer

from agentd.ctl.client import Daemon
from agentd.ctl.errors import UsageError
from agentd.ctl.options import Socket


def mcp(
    may_roll_back: Annotated[
        bool, typer.Option("--may-roll-back", help="Let the agent roll back without asking its owner.")
    ] = False,
    socket: Socket = None,
) -> None:
    """Offer agentd to an agent as tools, over the Model Context Protocol on stdin and stdout."""
    try:
        from agentd.ctl.mcp_server import server
    except ImportError as error:
        if not (error.name or "").startswith("mcp"):
            raise
        raise UsageError("it needs the library mcp: pip install 'agentd[mcp]'") from None
    server(Daemon(socket), may_roll_back=may_roll_back).run("stdio")
