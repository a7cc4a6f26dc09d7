"""What is forgotten of a process's libraries is clean, comes back when it is run, and is no longer counted before."""

import subprocess
import sys

import pytest

from agentd.host.page_cache import _clean_mappings

SMAPS = """\
7f0000000000-7f0000004000 r-xp 00000000 08:01 11 /usr/lib/libone.so.6
Size:                 16 kB
Rss:                  12 kB
Anonymous:             0 kB
7f0000004000-7f0000005000 r--p 00004000 08:01 11 /usr/lib/libone.so.6
Rss:                   4 kB
Anonymous:             4 kB
7f0000005000-7f0000006000 rw-p 00005000 08:01 11 /usr/lib/libone.so.6
Rss:                   4 kB
Anonymous:             0 kB
7f0000006000-7f0000007000 r--p 00000000 08:01 12 /srv/with a space/two.cpython-311.so
Rss:                   4 kB
Anonymous:             0 kB
7f0000007000-7f0000008000 r-xp 00000000 08:01 13 /usr/lib/untouched.so
Rss:                   0 kB
Anonymous:             0 kB
7f0000008000-7f0000009000 r--s 00000000 08:01 14 /srv/model.gguf
Rss:                   4 kB
Anonymous:             0 kB
7f0000009000-7f000000a000 r-xp 00000000 00:00 0 [vdso]
Rss:                   4 kB
Anonymous:             0 kB
7f000000a000-7f000000b000 r--p 00000000 08:01 15 /srv/weights.so.image
Rss:                   4 kB
Anonymous:             0 kB
"""


def test_only_clean_pages_of_libraries_are_found() -> None:
    assert _clean_mappings(SMAPS) == [
        (0x7F0000000000, 0x7F0000004000, 12 << 10),
        (0x7F0000006000, 0x7F0000007000, 4 << 10),
    ]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="pages are told to Linux's kernel")
def test_a_process_goes_on_with_less() -> None:
    program = (
        "import pathlib, re, torch; from agentd.host import page_cache;"
        "rss = lambda: int(re.search(r'VmRSS:\\s+(\\d+)', pathlib.Path('/proc/self/status').read_text())[1]) << 10;"
        "x = torch.arange(6.0).view(2, 3); before = rss(); forgotten = page_cache.forget(); after = rss();"
        "assert forgotten > 20 << 20, forgotten;"
        "assert before - after > 0.9 * forgotten - (8 << 20), (before, after, forgotten);"
        "assert (x @ x.T).tolist() == [[5.0, 14.0], [14.0, 50.0]]; assert rss() < before"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
