"""The command line itself: which commands there are, and how errors leave it."""

import contextlib
import os
import sys
from typing import Annotated

import typer

from agentd import __version__
from agentd.ctl import (
    adapt,
    api_keys,
    backup,
    budget,
    completion,
    dashboard,
    doctor,
    events,
    examples,
    feedback,
    fleet,
    forgetting,
    inferences,
    init,
    mcp_command,
    passes,
    review,
    revisions,
    status,
    top,
    transfer,
)
from agentd.ctl.errors import MEANINGS, CtlError, ExitCode
from agentd.ctl.options import SOCKET_VARIABLE, Socket

_CODES = "\n".join(f"{code:>3}  {meaning}" for code, meaning in MEANINGS.items())
EPILOG = f"""\b
Exit codes:
{_CODES}

Lists are tables on a terminal and tab-separated values in a pipe; --json prints the daemon's answer as it came.
NO_COLOR turns colours off. {SOCKET_VARIABLE} names the socket, as --socket does. Times are UTC."""

# no rich markup and no pretty tracebacks: both would import rich for every command
app = typer.Typer(
    name="agentctl",
    epilog=EPILOG,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
tasks = typer.Typer()
tasks.callback(invoke_without_command=True)(examples.tasks)
tasks.command()(examples.edit)
tasks.command()(examples.recall)
tasks.command()(examples.meaning)
key = typer.Typer(help="Make, list and revoke API keys.")
key.command()(api_keys.add)
key.command("list")(api_keys.list_)
key.command()(api_keys.revoke)
app.command()(status.status)
app.command()(top.top)
app.command()(revisions.history)
app.command()(revisions.revisions)
app.command()(revisions.show)
app.command()(revisions.diff)
app.command()(revisions.rollback)
app.command()(transfer.replay)
app.command()(transfer.export)
app.command("import")(transfer.import_)
app.command()(passes.passes)
app.command("pass")(passes.pass_)
app.command()(adapt.adapt)
app.command()(adapt.consolidate)
app.command()(adapt.cancel)
app.command()(adapt.pause)
app.command()(adapt.resume)
app.command()(budget.budget)
app.command()(forgetting.rebuild)
feedback.app.command()(forgetting.forget)
feedback.app.command()(forgetting.release)
app.add_typer(feedback.app, name="feedback")
app.command()(examples.examples)
app.add_typer(tasks, name="tasks")
app.command()(inferences.ask)
app.command()(review.review)
app.command("inferences")(inferences.inferences)
app.command("log", hidden=True)(inferences.inferences)
app.command()(events.events)
app.command()(dashboard.dashboard)
app.command()(fleet.fleet)
app.add_typer(key, name="key")
app.command()(backup.backup)
app.command()(doctor.doctor)
app.command()(mcp_command.mcp)
app.command()(init.init)
app.command()(completion.completion)
app.command()(status.version)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    socket: Socket = None,
    version: Annotated[bool, typer.Option("--version", help="Print agentctl's version.")] = False,
) -> None:
    """Look after agentd: what it serves, what it learns, and going back."""
    if socket is not None:
        os.environ[SOCKET_VARIABLE] = str(socket)  # where the command's own --socket finds it
    if version:
        print(f"agentctl {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(ExitCode.USAGE)


@feedback.app.callback(invoke_without_command=True)
@key.callback(invoke_without_command=True)
def _group(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(ExitCode.USAGE)


def run(arguments: list[str]) -> int:
    """Runs one command and returns its exit code. Every error is one line on stderr."""
    try:
        code = int(app(arguments, prog_name="agentctl", standalone_mode=False) or 0)
        sys.stdout.flush()
        return code
    except CtlError as error:
        return _fail(str(error), error.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        return _fail("nothing was done", ExitCode.ERROR)
    except BrokenPipeError:
        # whoever read our output has left; without this the interpreter complains once more while it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.ERROR
    except Exception as error:
        # click's usage errors; their class is click's or typer's own, depending on typer's version
        if not (hasattr(error, "format_message") and hasattr(error, "ctx")):
            raise
        command = error.ctx.command_path if error.ctx is not None else "agentctl"
        return _fail(f"{error.format_message().rstrip('.')}; see `{command} --help`", ExitCode.USAGE)


def _fail(message: str, code: ExitCode) -> ExitCode:
    from agentd.ctl.output import say

    say(f"agentctl: {message}")
    return code


def main() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # not a real file, e.g. closed by the caller
            stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # a terminal without UTF-8
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
