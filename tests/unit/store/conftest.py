"""An empty store for each test."""

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from agentd.store.database import Store


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with closing(Store(tmp_path / "agentd.db")) as opened:
        yield opened
