"""The command line of the daemon: `agentd [--config FILE] [COMMAND]`."""

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from agentd import __version__, models
from agentd.errors import AgentdError, BackupUnusable
from agentd.host import allocator

if TYPE_CHECKING:
    from agentd.config import schema  # whose import takes a fifth of a second, which --help need not


_TEXTS = 12  # of the drift corpus, by which two quantisations are compared
_SERVICE_STATE = Path("/var/lib/agentd")  # of the units that install-service writes


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        status: int = options.command(options)
    except AgentdError as error:
        print(f"agentd: {error}", file=sys.stderr)
        return error.exit_status
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
    commands = parser.add_subparsers(
        title="commands", metavar="{run,config,fetch-model,fit,restore,requantise,install-service,version}"
    )
    run = commands.add_parser("run", parents=[common], help="serve and learn, in the foreground (the default)")
    run.set_defaults(command=_run)
    show = commands.add_parser("config", parents=[common], help="print the effective settings as YAML")
    show.add_argument("--reference", action="store_true", help="print every key, its default and its meaning instead")
    show.set_defaults(command=_config)
    fetch = commands.add_parser("fetch-model", parents=[common], help="fetch and check the configured model")
    fetch.set_defaults(command=_fetch_model)
    fit = commands.add_parser("fit", parents=[common], help="whether a model serves and learns on this machine")
    fit.add_argument("model", nargs="?", help="a GGUF file (default: the configured model)")
    fit.add_argument("--json", action="store_true", help="print JSON")
    fit.set_defaults(command=_fit)
    restore = commands.add_parser("restore", parents=[common], help="put a backup into the state directory")
    restore.add_argument("archive", type=Path, help="what `agentctl backup` wrote")
    restore.add_argument("--replace", action="store_true", help="move the state that is there aside")
    restore.set_defaults(command=_restore)
    requantise = commands.add_parser("requantise", help="write a model in another quantisation, and measure both")
    requantise.add_argument("model", help="as model.path names it")
    requantise.add_argument("type", help="such as Q4_0 or Q8_0")
    requantise.add_argument("--output", metavar="FILE", type=Path, help="by default beside the model")
    requantise.set_defaults(command=_requantise)
    install = commands.add_parser("install-service", help="put the systemd units in place, or take them away")
    install.add_argument("--uninstall", action="store_true", help="take them away; configuration and state stay")
    install.add_argument("--gpu", action="store_true", help="let the service use a GPU (Jetson, NVIDIA)")
    install.add_argument("--root", type=Path, default=Path("/"), help="another root directory; nothing is started then")
    install.set_defaults(command=_install)
    version = commands.add_parser("version", help="print the version")
    version.set_defaults(command=_version)
    return parser


def _load(options: argparse.Namespace) -> "schema.Config":
    from agentd.config import schema

    path: Path | None = getattr(options, "config", None)
    if path is None and os.environ.get("AGENTD_CONFIG"):
        path = Path(os.environ["AGENTD_CONFIG"])
    return schema.load(path)


def _run(options: argparse.Namespace) -> int:
    settings = _load(options)
    # imported here, so that a mistake in the settings is reported at once
    with allocator.importing():
        from agentd import daemon

    return daemon.main(settings, lambda: _load(options))


def _config(options: argparse.Namespace) -> int:
    import yaml

    from agentd.config import schema

    if options.reference:
        for name, default, meaning in schema.reference():
            print(f"{name:28} {'null' if default is None else default!s:20} {meaning}")
        return 0
    yaml.safe_dump(_load(options).model_dump(mode="json"), sys.stdout, sort_keys=False, allow_unicode=True)
    return 0


def _fetch_model(options: argparse.Namespace) -> int:
    settings = _load(options)
    model = models.check(models.resolve(settings.model.path, _download_bar(), settings.engine), settings.engine)
    print(f"{model.path}\n{model.name}, {model.header.architecture}, {model.size} bytes, sha256 {model.sha256}")
    return 0


def _fit(options: argparse.Namespace) -> int:
    import asyncio
    import json

    from agentd.adapt.fit import fit

    settings = _load(options)
    path = models.resolve(options.model or settings.model.path, _download_bar(), settings.engine)
    model = models.check(path, settings.engine)
    report = asyncio.run(fit(settings, model))
    print(json.dumps(report.as_json(), indent=2) if options.json else report.as_text())
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


def _restore(options: argparse.Namespace) -> int:
    settings = _load(options)
    from agentd.config import paths
    from agentd.daemon import locked
    from agentd.store import backup

    os.umask(0o077)
    own, service = paths.state_dir(), _SERVICE_STATE
    if os.geteuid() == 0 and settings.state.dir == own != service and service.is_dir():
        reason = f"{own} is root's own state directory, the service's is {service}"
        raise BackupUnusable(options.archive, f"{reason}: name the one you mean in STATE_DIRECTORY or in --config")
    with locked(settings.state.dir):
        index = backup.restore(options.archive, settings.state.dir, replace=options.replace)
    print(f"{settings.state.dir}: the state of {index['created_at']}, {len(index['revisions'])} revisions")
    return 0


def _requantise(options: argparse.Namespace) -> int:
    from agentd.adapt.gate.drift_corpus import drift_corpus
    from agentd.engine.requantisation import requantise

    def show(done: int, total: int) -> None:
        end = "\r\033[K" if done == total else ""
        print(f"\r\033[Ktensor {done} of {total}", end=end, file=sys.stderr, flush=True)

    texts = drift_corpus()[:_TEXTS]
    requantise(options.model, options.type, options.output, texts, print, show if sys.stderr.isatty() else None)
    return 0


def _install(options: argparse.Namespace) -> int:
    from agentd.host import service

    if options.uninstall:
        service.uninstall(options.root)
    else:
        service.install(options.root, gpu=options.gpu)
        if advice := models.unreadable_by_others(options.root / service.CONFIG):
            print(f"note: {advice}")
    return 0


def _version(_: argparse.Namespace) -> int:
    print(f"agentd {__version__}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
