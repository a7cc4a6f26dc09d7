"""The command line of the daemon: `agentd [--config FILE] [run | config | fetch-model | version]`."""

import argparse
import os
import sys
from pathlib import Path

import yaml

from agentd import __version__, config, models
from agentd.errors import AgentdError, InvalidConfig

EX_CONFIG = 78  # sysexits.h; service managers do not restart on it (RestartPreventExitStatus=78)


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        status: int = options.command(options)
    except InvalidConfig as error:
        print(f"agentd: {error}", file=sys.stderr)
        return EX_CONFIG
    except AgentdError as error:
        print(f"agentd: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # `agentd config | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


def _parser() -> argparse.ArgumentParser:
    # the option may stand before or after the command
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--config",
        metavar="FILE",
        type=Path,
        default=argparse.SUPPRESS,
        help="settings in YAML (default: AGENTD_CONFIG, or the built-in defaults)",
    )
    parser = argparse.ArgumentParser(prog="agentd", description=__doc__.partition(":")[0] + ".", parents=[common])
    parser.add_argument("--version", action="version", version=f"agentd {__version__}")
    parser.set_defaults(command=_run)
    commands = parser.add_subparsers(title="commands", metavar="{run,config,fetch-model,version}")
    run = commands.add_parser("run", parents=[common], help="serve and learn, in the foreground (the default)")
    run.set_defaults(command=_run)
    show = commands.add_parser("config", parents=[common], help="print the effective settings as YAML")
    show.add_argument("--reference", action="store_true", help="print every key, its default and its meaning instead")
    show.set_defaults(command=_config)
    fetch = commands.add_parser("fetch-model", parents=[common], help="fetch and check the configured model")
    fetch.set_defaults(command=_fetch_model)
    version = commands.add_parser("version", help="print the version")
    version.set_defaults(command=_version)
    return parser


def _load(options: argparse.Namespace) -> config.Config:
    path: Path | None = getattr(options, "config", None)
    if path is None and os.environ.get("AGENTD_CONFIG"):
        path = Path(os.environ["AGENTD_CONFIG"])
    return config.load(path)


def _run(options: argparse.Namespace) -> int:
    settings = _load(options)
    # imported here, so that a mistake in the settings is reported at once
    from agentd import daemon

    return daemon.main(settings)


def _config(options: argparse.Namespace) -> int:
    if options.reference:
        for name, default, meaning in config.reference():
            print(f"{name:28} {'null' if default is None else default!s:20} {meaning}")
        return 0
    yaml.safe_dump(config.as_tree(_load(options)), sys.stdout, sort_keys=False, allow_unicode=True)
    return 0


def _fetch_model(options: argparse.Namespace) -> int:
    settings = _load(options)
    model = models.check(models.resolve(settings.model.path, _download_bar()), settings.engine)
    print(f"{model.path}\n{model.name}, {model.header.architecture}, {model.size} bytes, sha256 {model.sha256}")
    return 0


def _download_bar() -> models.Progress | None:
    if not sys.stderr.isatty():
        return None

    def show(done: int, total: int) -> None:
        share = f"{done / total:4.0%} of {total / 1e6:.0f} MB" if total else f"{done / 1e6:.0f} MB"
        print(
            f"\r\033[Kfetching the model: {share}", end="\r\033[K" if done == total else "", file=sys.stderr, flush=True
        )

    return show


def _version(_: argparse.Namespace) -> int:
    print(f"agentd {__version__}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
