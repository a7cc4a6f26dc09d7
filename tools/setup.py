"""Installs agentd and everything it needs into the environment this runs in. Called by the Makefile.

Three steps, because they differ so much in what they take: small packages (seconds), torch (a large download), and
llama.cpp (compiled here, minutes). Versions come from constraints.txt. Standard library only: nothing is installed yet.
"""

import os
import queue
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from collections import deque
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
LOG = Path(sys.prefix) / "setup.log"

_NINJA = re.compile(r"^\s*\[(\d+)/(\d+)\]")
_DOWNLOAD = re.compile(r"^Progress (\d+) of (\d+)$")
_PACKAGE = re.compile(r"^(?:Collecting|Processing|Requirement already satisfied:) ")
_FETCHING = re.compile(r"^\s*(?:Downloading|Using cached) (\S+)")
_ERROR = re.compile(r"(?i)\berror\b[: ]|\bfailed:|\bfatal\b")
_NOTES = (
    (re.compile(r"^\s*Installing build dependencies"), "fetching cmake and ninja"),
    (re.compile(r"^\s*Preparing metadata"), "reading the sources"),
    (re.compile(r"^\s*\*\*\* Configuring CMake"), "configuring"),
    (re.compile(r"^\s*\*\*\* Building project"), "compiling"),
    (re.compile(r"^Installing collected packages"), "installing"),
)
_HINTS = (
    (
        re.compile(r"CMAKE_C(XX)?_COMPILER|not able to compile a simple test program"),
        "A working C and C++ compiler is needed: on Debian or Ubuntu `apt install build-essential`.",
    ),
    (re.compile(r"Python\.h"), "The headers of Python are needed: on Debian or Ubuntu `apt install python3-dev`."),
    (re.compile(r"(?i)no space left"), "The disk is full. TMPDIR=/some/where moves the compilation elsewhere."),
    (
        re.compile(r"(?i)killed|signal 9|cannot allocate memory"),
        "Memory ran out while compiling. CMAKE_BUILD_PARALLEL_LEVEL=1 compiles one file at a time.",
    ),
    (
        re.compile(r"(?i)name resolution|NewConnectionError|connection broken|no matching distribution|timed out"),
        "pip could not fetch a package. Check the network, and what `pip config list` says about indexes and proxies.",
    ),
)


class SetupFailed(Exception):
    pass


class Progress:
    """One line that fills up on a terminal; a line for every tenth elsewhere (a CI log, a file)."""

    def __init__(self, title: str) -> None:
        self.title = title
        self.note = ""
        self.fraction = 0.0
        self.began = time.monotonic()
        self.terminal = sys.stdout.isatty()
        self._tenth = 0
        self._base = (self.began, 0.0)  # when the current note began: the time left is estimated from there

    def update(self, note: str | None = None, fraction: float | None = None) -> None:
        if note is not None and note != self.note:
            self.note, self.fraction, self._tenth = note, 0.0, 0
            self._base = (time.monotonic(), 0.0)
            if not self.terminal:
                print(f"  {self.title}: {note}", flush=True)
        if fraction is not None:
            self.fraction = min(max(fraction, 0.0), 1.0)
        self.draw()

    def draw(self) -> None:
        if not self.terminal:
            if int(self.fraction * 10) > self._tenth:
                self._tenth = int(self.fraction * 10)
                print(f"  {self.title}: {self.note} {self._tenth * 10} % ({self._clock()})", flush=True)
            return
        filled = round(self.fraction * 24)
        bar = "━" * filled + "╌" * (24 - filled)
        text = f"  {self.title}  {bar} {self.fraction:4.0%}  {self._clock()}  {self.note}{self._left()}"
        sys.stdout.write("\r\033[K" + text[: shutil.get_terminal_size().columns - 1])
        sys.stdout.flush()

    def close(self, outcome: str) -> None:
        if self.terminal:
            sys.stdout.write("\r\033[K")
        print(f"  {self.title}: {outcome} ({self._clock()})", flush=True)

    def _clock(self) -> str:
        seconds = int(time.monotonic() - self.began)
        return f"{seconds // 60}:{seconds % 60:02}"

    def _left(self) -> str:
        if self.fraction < 0.05:
            return ""
        left = int((time.monotonic() - self._base[0]) * (1 - self.fraction) / self.fraction)
        return f", about {left // 60}:{left % 60:02} left"


def pip(progress: Progress, *arguments: str, packages: int = 0) -> None:
    """Runs `pip install` with `arguments`, shows its progress, and logs every line. Raises SetupFailed.

    `packages` is how many pip will name; 0 where the progress is that of downloads or of a compilation.
    """
    command = [sys.executable, "-m", "pip", "install", "--no-input", "--disable-pip-version-check", *arguments]
    tail: deque[str] = deque(maxlen=400)
    with LOG.open("a") as log:
        log.write(f"\n$ {shlex.join(command)}\n")
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=_pump, args=(process, lines), daemon=True).start()
        seen = 0
        try:
            while True:
                try:
                    line = lines.get(timeout=1)
                except queue.Empty:
                    progress.draw()  # the clock goes on while the compiler is busy
                    continue
                if line is None:
                    break
                if _DOWNLOAD.match(line) is None:
                    log.write(line + "\n")
                    log.flush()
                    tail.append(line)
                seen += _PACKAGE.match(line) is not None
                _show(progress, line, seen / packages if packages else None)
            status = process.wait()
        except BaseException:
            process.terminate()
            raise
    if status:
        raise SetupFailed(_explain(list(tail)))


def _pump(process: "subprocess.Popen[str]", lines: "queue.SimpleQueue[str | None]") -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line.rstrip("\n"))
    lines.put(None)


def _show(progress: Progress, line: str, share: float | None) -> None:
    for pattern, note in _NOTES:
        if pattern.match(line):
            progress.update(note)
            return
    if share is not None:
        if _PACKAGE.match(line):
            progress.update("fetching", share)
    elif match := _NINJA.match(line):
        progress.update("compiling", int(match[1]) / int(match[2]))
    elif match := _FETCHING.match(line):
        progress.update(f"fetching {match[1].rsplit('/', 1)[-1].split('-')[0]}")
    elif (match := _DOWNLOAD.match(line)) and int(match[2]):
        progress.update(fraction=int(match[1]) / int(match[2]))


def _explain(lines: list[str]) -> str:
    """The lines from the first error on, else the last ones, and what can be done about it."""
    hints = [hint for pattern, hint in _HINTS if any(pattern.search(line) for line in lines)]
    lines = [line for line in lines if line.strip()]
    # what pip says about a failed build comes after the build's own words, and says less
    ends = [number for number, line in enumerate(lines) if line.strip() == "error: subprocess-exited-with-error"]
    lines = lines[: ends[0]] if ends else lines
    first = next((number for number, line in enumerate(lines) if _ERROR.search(line)), len(lines))
    shown = "\n".join(f"    {line}" for line in lines[max(0, min(first, len(lines) - 15)) :][:15])
    return "\n".join([f"from {LOG}:", shown, *hints])


def requirements() -> list[str]:
    """The lines of constraints.txt that name packages."""
    lines = (line.split("#")[0].strip() for line in CONSTRAINTS.read_text().splitlines())
    return [line for line in lines if line]


def small_requirements() -> list[str]:
    """The pinned packages before the first `# ---` line of constraints.txt that this Python takes, markers removed."""
    text = CONSTRAINTS.read_text().split("\n# ---")[0]
    chosen = []
    for line in text.splitlines():
        requirement, _, marker = (part.strip() for part in line.split("#")[0].partition(";"))
        if requirement and applies(marker, sys.version_info[:2]):
            chosen.append(requirement)
    return chosen


def applies(marker: str, version: tuple[int, int]) -> bool:
    """Whether an environment marker of constraints.txt holds for a Python version; only `<` and `>=` occur there."""
    if not marker:
        return True
    match = re.fullmatch(r'python_version (<|>=) "(\d+)\.(\d+)"', marker)
    if match is None:
        raise SetupFailed(f"constraints.txt: the marker {marker!r} is not understood")
    other = (int(match[2]), int(match[3]))
    return version < other if match[1] == "<" else version >= other


def pinned(package: str) -> str:
    """The line of constraints.txt for `package`, such as torch==2.13.0."""
    return next(line for line in requirements() if line.startswith(f"{package}=="))


def installed(requirement: str) -> bool:
    """Whether the package is here in that version (a local build tag such as +cpu does not matter)."""
    name, _, version = requirement.partition("==")
    try:
        return metadata.version(name).split("+")[0] == version
    except metadata.PackageNotFoundError:
        return False


def missing_compilers() -> list[str]:
    """What cannot be found of a C and a C++ compiler; CC and CXX name others than the usual ones."""
    wanted = (("C compiler", "CC", ("cc", "gcc", "clang")), ("C++ compiler", "CXX", ("c++", "g++", "clang++")))
    missing = []
    for what, variable, usual in wanted:
        named = shlex.split(os.environ.get(variable, ""))[:1]
        if not any(shutil.which(name) for name in named or usual):
            missing.append(f"{what} ({variable}={named[0]})" if named else what)
    return missing


def install_small() -> None:
    progress = Progress("1/3 small packages")
    # pip itself first: its output is read below, and releases differ in it
    if not installed(pinned("pip")):
        progress.update("pip")
        pip(progress, "--quiet", pinned("pip"))
    wanted = small_requirements()
    if all(installed(requirement) for requirement in wanted):
        progress.close(f"{len(wanted)} packages are there already")
        return
    pip(progress, "--no-deps", *wanted, packages=len(wanted))
    progress.close(f"{len(wanted)} packages")


def install_torch() -> None:
    progress = Progress("2/3 torch")
    if installed(pinned("torch")):
        progress.close(f"{metadata.version('torch')} is there already")
        return
    print("  2/3 torch: downloads about 200 MB for the CPU build, 3 GB where pip finds the CUDA build", flush=True)
    pip(progress, "--progress-bar", "raw", "--constraint", str(CONSTRAINTS), pinned("torch"))
    progress.close(metadata.version("torch"))


def install_llama() -> None:
    progress = Progress("3/3 llama.cpp")
    if installed(pinned("llama-cpp-python")):
        progress.close("is there already")
        return
    print("  3/3 llama.cpp: compiles for about 5 minutes on 2 cores, unless pip's cache holds an earlier build")
    # pip's cache does not tell builds with different options apart
    options = ["--no-cache-dir"] if os.environ.get("CMAKE_ARGS") else []
    pip(progress, "-v", "--progress-bar", "raw", "--no-deps", *options, pinned("llama-cpp-python"))
    progress.close(pinned("llama-cpp-python"))


def install_agentd() -> None:
    """Puts the sources and the commands agentd and agentctl into the environment, always: pyproject.toml may be new."""
    progress = Progress("agentd")
    pip(progress, "--no-deps", "--no-build-isolation", "--editable", ".")
    progress.close("agentd and agentctl are in " + str(Path(sys.executable).parent))


def verify() -> None:
    """Asks pip whether every package finds what it needs, so that a gap in constraints.txt shows here."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "check"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SetupFailed("the packages do not fit together:\n" + result.stdout + result.stderr)


def main() -> int:
    if sys.prefix == sys.base_prefix:
        print("setup: run this with a virtual environment's Python (`make setup` makes one)", file=sys.stderr)
        return 1
    print(f"Installing into {sys.prefix} (log: {LOG})", flush=True)
    try:
        if not installed(pinned("llama-cpp-python")) and (missing := missing_compilers()):
            raise SetupFailed(
                f"found no {' and no '.join(missing)}; llama.cpp is compiled on this machine.\n"
                f"On Debian or Ubuntu: apt install build-essential. On Fedora: dnf install gcc gcc-c++."
            )
        install_small()
        install_torch()
        install_llama()
        install_agentd()
        verify()
    except SetupFailed as failure:
        print(f"\nsetup failed: {failure}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nsetup interrupted; run it again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
