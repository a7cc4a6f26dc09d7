"""What every test may use. The model is the real one; AGENTD_TEST_MODEL names another GGUF file instead."""

import os
from pathlib import Path

import pytest

from agentd import models


@pytest.fixture(scope="session")
def model_path() -> Path:
    if given := os.environ.get("AGENTD_TEST_MODEL"):
        return models.resolve(given)
    return models.fetch_default()
