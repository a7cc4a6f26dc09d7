"""What every test may use. AGENTD_TEST_MODEL names another GGUF file than the default model."""

import fcntl
import gc
import os
import sys
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

from agentd import models
from tools import short_model

# Workers of pytest-xdist share the cores: each computes on one. Read by torch, which is imported later.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("AGENTD_MODEL_THREADS", "1")  # of daemons that read a configuration of their own

# Where Python is told to write no bytecode, every daemon that a test starts would compile all of agentd again, which is
# half of its start, and every worker all tests. It is written where it belongs: a folder of its own would not have that
# of torch and all others either, which came compiled.
if sys.dont_write_bytecode:
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False

# Where the time goes: workers take files in this order, and the small ones at the end even out who is done first.
_FOLDERS = ("crash", "system/passes", "unit/tools", "system", "engine", "")
_HERE = Path(__file__).parent
_QUEUE, _FLOOR = _HERE / "conftest.py", _HERE / "__init__.py"  # any two files that all workers can lock


@pytest.fixture(scope="session")
def real_model() -> Path:
    """For what is about the model's own abilities, size or speed."""
    if name := os.environ.get("AGENTD_TEST_MODEL"):
        return models.resolve(name)
    return models.fetch_default()


@pytest.fixture(scope="session")
def model_path(real_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model made short: its shapes, quantisation and tokenizer, at a seventh of the work."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder  # workers share one
    path, mine = folder / "short.gguf", folder / f"short-{os.getpid()}.gguf"
    if not path.exists():
        short_model.write(mine, real_model).replace(path)
    return path


@pytest.fixture
def note(record_property: Callable[[str, object], None]) -> Callable[[str], None]:
    """Shows a line before pytest's closing line: what a worker prints is seen by no one."""
    return lambda line: record_property("note", line)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport) and report.when == "call":
                for name, line in report.user_properties:
                    if name == "note":
                        terminalreporter.write_line(str(line))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what needs the real model, so that `make quick` runs without it, and puts what takes longest first."""
    for item in items:
        if isinstance(item, pytest.Function) and "real_model" in item.fixturenames:
            item.add_marker("model")
    alone = {item.path for item in items if item.get_closest_marker("exclusive")}
    # who wants to be alone waits for what the others run: behind all files whose tests take long
    items.sort(key=lambda item: len(_FOLDERS) - 1.5 if item.path in alone else _folder(item))


def pytest_collection_finish() -> None:
    """Modules and tests stay to the end: engines that tidy up (gc.collect) need not go through all of them."""
    gc.collect()
    gc.freeze()


def _folder(item: pytest.Item) -> int:
    return next(i for i, folder in enumerate(_FOLDERS) if item.path.is_relative_to(_HERE / folder))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Runs a test marked `exclusive` while no other test runs in any worker."""
    exclusive = item.get_closest_marker("exclusive") is not None
    with _QUEUE.open() as queue, _FLOOR.open() as floor:
        fcntl.flock(queue, fcntl.LOCK_EX)  # while one waits to be alone, no other begins
        fcntl.flock(floor, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)
        fcntl.flock(queue, fcntl.LOCK_UN)
        return (yield)
