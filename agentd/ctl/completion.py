"""Completion of commands and options by the shell."""

from typing import Annotated

import typer

from agentd.ctl.errors import UsageError

SHELLS = {
    "bash": '~/.bashrc: eval "$(agentctl completion bash)"',
    "zsh": '~/.zshrc, after compinit: eval "$(agentctl completion zsh)"',
    "fish": "agentctl completion fish > ~/.config/fish/completions/agentctl.fish",
}


def completion(shell: Annotated[str, typer.Argument(metavar="SHELL", help="bash, zsh or fish.")]) -> None:
    """Print the script that lets a shell complete agentctl's commands and options."""
    from typer.completion import get_completion_script  # type: ignore[attr-defined]  # not in its __all__

    if shell not in SHELLS:
        raise UsageError(f"there is completion for {', '.join(SHELLS)}, not for {shell!r}")
    print(f"# {SHELLS[shell]}")
    print(get_completion_script(prog_name="agentctl", complete_var="_AGENTCTL_COMPLETE", shell=shell))
