"""The trainer's process: arguments, priorities, signals, and events as JSON lines on stdout (the log is on stderr).

Exit status: 0 after "done" and "parked", 143 after SIGTERM, 3 for a model whose blocks cannot be built here, 1 for
anything else.
"""

import argparse
import contextlib
import ctypes
import gc
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from agentd.host import allocator, page_cache
from agentd.nn.import_stubs import import_lean
from agentd.trainer import UNSUPPORTED

_TERMINATED = 128 + signal.SIGTERM


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="agentd.trainer", description="Trains a range of blocks on tapped inputs.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("spec", nargs="?", type=Path, help="the pass to train, a JSON file")
    what.add_argument("--probe", type=Path, metavar="MODEL", help="print whether blocks of this GGUF can be trained")
    parser.add_argument("--sample", type=Path, help="with --probe: what the engine computes, to compare blocks with")
    options = parser.parse_args(arguments)
    terminated = _Termination()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the daemon, too, which says how this is to end
    _join_group()
    _yield_to_others()
    _die_with_parent()
    parked = _park_on_request()
    if options.spec:
        emit({"event": "started"})  # from now on it may be stopped

    from agentd.errors import AgentdError
    from agentd.trainer.spec import read_spec

    try:
        if options.probe:
            _import_lean()
            from agentd.trainer.probe import probe

            emit(probe(options.probe, options.sample))
            return 0
        spec = read_spec(options.spec)
        _import_lean()
        import torch

        from agentd.trainer.loop import train

        torch.set_num_threads(spec.options.threads)
        torch.set_num_interop_threads(1)
        if not train(spec, emit, ask, parked, terminated):
            return _TERMINATED
    except BrokenPipeError:
        # No one reads the events any more, so no one waits for the result.
        os._exit(1)
    except AgentdError as error:
        emit({"event": "error", "message": str(error)})
        return UNSUPPORTED if type(error).__name__ == "Unsupported" else 1
    except Exception as error:
        emit({"event": "error", "message": f"{type(error).__name__}: {error}"})
        raise
    return 0


class _Termination:
    """Whether SIGTERM came. Until someone asks there is nothing worth writing, and the process just ends."""

    def __init__(self) -> None:
        self._asked = self._came = False
        signal.signal(signal.SIGTERM, self._come)

    def __call__(self) -> bool:
        self._asked = True
        return self._came

    def _come(self, *_: object) -> None:
        self._came = True
        if not self._asked:
            os._exit(_TERMINATED)


def ask(request: dict[str, Any]) -> dict[str, Any]:
    """Sends a request among the events, and waits for its answer: one JSON line on stdin."""
    emit({"event": "ask", **request})
    line = sys.stdin.readline()
    if not line:
        os._exit(1)  # no one is there to answer any more
    answer: dict[str, Any] = json.loads(line)
    return answer


def _park_on_request() -> Callable[[], bool]:
    """After SIGUSR1 training is to stop behind its current step and to write what it has."""
    signals: list[int] = []
    signal.signal(signal.SIGUSR1, lambda number, _: signals.append(number))
    return lambda: bool(signals)


def emit(event: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(event) + "\n")
    sys.stdout.flush()


def _join_group() -> None:
    """What this process allocates from now on counts in a control group of its own, if it was given one."""
    if group := os.environ.get("AGENTD_CGROUP"):
        with contextlib.suppress(OSError):
            Path(group, "cgroup.procs").write_text("0")


def _yield_to_others() -> None:
    """Last in line for the processor, first in line for the out-of-memory killer."""
    with contextlib.suppress(OSError):
        os.nice(19)
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")


def _die_with_parent() -> None:
    """A daemon that is killed may have stopped this process (SIGSTOP); no one would ever let it go on or end it."""
    pr_set_pdeathsig = 1
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)
    parent = os.environ.get("AGENTD_DAEMON_PID")
    if parent is not None and os.getppid() != int(parent):
        os._exit(1)  # it died before the line above


def _import_lean() -> None:
    with allocator.importing():
        import_lean("agentd.trainer", meta_device=False)
    gc.freeze()  # it stays to the end: whoever collects later need not go through it
    page_cache.forget()


if __name__ == "__main__":
    status = main()
    sys.stderr.flush()
    os._exit(status)  # the kernel frees at once what the interpreter would take apart for a second
