"""Installs agentd, pinned by constraints.txt, into the environment this runs in; called by the Makefile.

Standard library only: nothing is installed yet. pip shows how far it is; its log tells why it failed.
"""

import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

CONSTRAINTS = Path(__file__).resolve().parent.parent / "constraints.txt"
LOG = Path(sys.prefix) / "setup.log"
STEPS = {
    "pip": ("pip", "setuptools"),
    # By its pinned version: for a mere "torch" pip may choose a build of gigabytes.
    "torch: a download of 200 MB for the CPU build, 3 GB where pip finds the CUDA build": ("torch",),
    "llama.cpp: compiled here, for some 5 minutes on 2 cores": ("llama-cpp-python",),
    "agentd and the rest": ("--no-build-isolation", "--editable", ".[dev,clients,digits,mcp,otel,peft,plot]"),
}
COMPILERS = {"CC": ("cc", "gcc", "clang"), "CXX": ("c++", "g++", "clang++")}
HINTS = {
    r"CMAKE_C(XX)?_COMPILER|not able to compile a simple test": "llama.cpp is compiled on this machine, for which it "
    "needs a C and a C++ compiler: on Debian or Ubuntu `apt install build-essential`, on Fedora `dnf install gcc-c++`.",
    r"Python\.h": "The headers of Python are needed: on Debian or Ubuntu `apt install python3-dev`.",
    r"(?i)no space left": "The disk is full. TMPDIR=/some/where moves the compilation elsewhere.",
    r"(?i)killed|signal 9|cannot allocate memory": "Memory ran out while compiling. CMAKE_BUILD_PARALLEL_LEVEL=1 "
    "compiles one file at a time.",
    r"(?i)name resolution|NewConnectionError|connection broken|no matching distribution|timed out": "pip could not "
    "fetch a package. Check the network, and what `pip config list` says about indexes and proxies.",
}


def main() -> int:
    if sys.prefix == sys.base_prefix:
        sys.exit("setup: run this with a virtual environment's Python (`make setup` makes one)")
    if not importlib.util.find_spec("llama_cpp") and (missing := missing_compilers()):
        sys.exit(f"setup failed: no {' and no '.join(missing)}\n{hints('CMAKE_C_COMPILER')}")
    LOG.unlink(missing_ok=True)
    pins = {line.split("==")[0]: line for line in CONSTRAINTS.read_text().splitlines() if line[:1].isalpha()}
    # pip's cache does not tell builds with different options apart
    options = ["--no-input", "--log", str(LOG), *(["--no-cache-dir"] if os.environ.get("CMAKE_ARGS") else [])]
    environment = {**os.environ, **without_amx()}
    for number, (title, arguments) in enumerate(STEPS.items(), 1):
        print(f"{number}/{len(STEPS)} {title} (log: {LOG})", flush=True)
        what = [pins.get(argument, argument) for argument in arguments]
        command = [sys.executable, "-m", "pip", "install", *options, "--constraint", str(CONSTRAINTS), *what]
        if subprocess.run(command, cwd=CONSTRAINTS.parent, env=environment, check=False).returncode:
            sys.exit(f"\nsetup failed; {LOG} says why. {hints(LOG.read_text(errors='replace'))}")
    return 0


def without_amx(cpu: Path = Path("/proc/cpuinfo")) -> dict[str, str]:
    """Compilers' flags for a processor with AMX. GCC 12 drops half of the configuration that llama.cpp gives its tiles,
    and the process dies at the first product. Older compilers know neither AMX nor the flags."""
    flags = ["-mno-amx-tile", "-mno-amx-int8", "-mno-amx-bf16"]
    if not cpu.exists() or "amx_tile" not in cpu.read_text():
        return {}
    compiler = (os.environ.get("CC") or "cc").split()
    with contextlib.suppress(OSError):
        if subprocess.run([*compiler, *flags, "-E", "-x", "c", os.devnull], capture_output=True).returncode == 0:
            return {name: " ".join([os.environ.get(name, ""), *flags]).strip() for name in ("CFLAGS", "CXXFLAGS")}
    return {}


def hints(text: str) -> str:
    return "\n".join(hint for pattern, hint in HINTS.items() if re.search(pattern, text))


def missing_compilers() -> list[str]:
    """What cannot be found of a C and a C++ compiler; CC and CXX name others than the usual ones."""
    chosen = {name: os.environ.get(name, "").split()[:1] or usual for name, usual in COMPILERS.items()}
    return [f"{name} ({' or '.join(usual)})" for name, usual in chosen.items() if not any(map(shutil.which, usual))]


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit("\nsetup interrupted; run it again to go on")
