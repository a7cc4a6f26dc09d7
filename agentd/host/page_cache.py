"""Code that only the start of a process ran, handed back to the page cache.

Importing torch runs some code of every corner of it: 100 MB of libraries, of which training needs 40. Their pages are
clean and on disk, but they count as this process's memory, and the kernel takes them last, as long as they are mapped.
What is run again comes back from the page cache, in a minor fault for every 16 pages.
"""

import contextlib
import ctypes
import mmap
import re
from pathlib import Path

_SMAPS = Path("/proc/self/smaps")
_MAPPING = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) (r-.)p \S+ \S+ \d+ +.+\.so[.\d]*$")


def forget() -> int:
    """Unmaps the pages of shared libraries that no one has written to; returns how many bytes these were.

    Elsewhere than on Linux it does nothing.
    """
    forgotten = 0
    with contextlib.suppress(OSError, AttributeError):
        advise = ctypes.CDLL(None, use_errno=True).madvise
        advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        for begin, end, resident in _clean_mappings(_SMAPS.read_text()):
            if advise(begin, end - begin, mmap.MADV_DONTNEED) == 0:
                forgotten += resident
    return forgotten


def _clean_mappings(smaps: str) -> list[tuple[int, int, int]]:
    """(begin, end, resident bytes) of libraries' mappings for reading and running without a page of their own.

    A page that was written to (relocations, a debugger's breakpoints) would be lost: it counts as anonymous.
    """
    mappings = []
    at: tuple[int, int] | None = None
    resident = 0
    for line in smaps.splitlines():
        if match := _MAPPING.match(line):
            at = int(match[1], 16), int(match[2], 16)
        elif line[0] in "0123456789abcdef":
            at = None
        elif at and line.startswith("Rss:"):
            resident = int(line.split()[1]) << 10
        elif at and line.startswith("Anonymous:") and resident and line.split()[1] == "0":
            mappings.append((*at, resident))
    return mappings
