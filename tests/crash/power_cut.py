"""What is left of a directory when the power goes: what had been synced, and nothing else.

preload.c keeps, by inode, what every file held when it was last synced and which names a directory had. Two outcomes
are tried, between which a real file system may end up: no name that was not synced; or all names, with files that are
empty or as they were when synced (what ext4 and others do to a file that is renamed before it is synced).
"""

import os
import shutil
from pathlib import Path


def begin(directory: Path, synced: Path) -> None:
    """Takes everything that is there for synced."""
    synced.mkdir()
    directory.mkdir(mode=0o700, exist_ok=True)
    for path in (directory, *directory.rglob("*")):
        target = synced / str(path.stat().st_ino)
        if path.is_dir():
            lines = [f"{child.stat().st_ino} {int(child.is_dir())} {child.name}\n" for child in path.iterdir()]
            target.write_text("".join(lines))
        else:
            shutil.copyfile(path, target)


def happen(directory: Path, synced: Path, *, names_kept: bool) -> None:
    """Puts in the place of `directory` what a power cut would have left of it."""
    left = directory.with_name("left")
    root = directory.stat().st_ino
    left.mkdir(mode=0o700)
    if names_kept:
        _by_names(directory, left, synced)
    else:
        _by_synced_names(root, left, synced)
    shutil.rmtree(directory)
    left.rename(directory)


def _by_names(source: Path, target: Path, synced: Path) -> None:
    for path in source.iterdir():
        if path.is_dir():
            (target / path.name).mkdir(mode=0o700)
            _by_names(path, target / path.name, synced)
        elif path.is_file():
            _file(path.stat().st_ino, target / path.name, synced)


def _by_synced_names(inode: int, target: Path, synced: Path) -> None:
    names = synced / str(inode)
    for line in names.read_text().splitlines() if names.exists() else ():
        number, is_directory, name = line.split(" ", 2)
        if is_directory == "1":
            (target / name).mkdir(mode=0o700)
            _by_synced_names(int(number), target / name, synced)
        else:
            _file(int(number), target / name, synced)


def _file(inode: int, target: Path, synced: Path) -> None:
    data = synced / str(inode)
    target.write_bytes(data.read_bytes() if data.exists() else b"")
    os.chmod(target, 0o600)
