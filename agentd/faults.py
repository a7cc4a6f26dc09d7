"""Names for the moments at which a crash must do no harm.

Every state change of a pass, a revision, a swap or a migration passes its point. That does nothing; tests set `hook`
and end the process at each of them in turn (tests/crash).
"""

from collections.abc import Callable

hook: Callable[[str], None] | None = None
_uncommitted: list[str] = []  # of the store's thread, which is the only one that changes rows


def point(name: str) -> None:
    """Something outside the database is about to be one step further."""
    if hook is not None:
        hook(name)


def change(name: str) -> None:
    """A row was changed, in a transaction that is still open; `committed` follows, or the change is undone."""
    if hook is not None:
        _uncommitted.append(name)
        hook(name)


def begin() -> None:
    """A transaction begins."""
    _uncommitted.clear()


def committed() -> None:
    """The transaction is on disk."""
    if hook is not None:
        for name in _uncommitted:
            hook(f"{name}, committed")
    _uncommitted.clear()
