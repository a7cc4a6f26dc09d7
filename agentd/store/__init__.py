"""What agentd remembers, in one SQLite file: `Store` owns it, one module per noun reads and writes it."""

import sys

# sqlite_utils imports numpy and pandas where they are installed, only to know their number types. Nothing here
# stores those, and numpy alone would cost the daemon 12 MB of memory for life.
_hidden = [name for name in ("numpy", "pandas") if name not in sys.modules]
sys.modules.update(dict.fromkeys(_hidden))  # type: ignore[arg-type]  # None makes an import fail; typeshed omits it
try:
    import sqlite_utils  # noqa: F401
finally:
    for _name in _hidden:
        del sys.modules[_name]
