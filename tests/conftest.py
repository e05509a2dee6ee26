"""What tests at several levels share."""

from pathlib import Path

import pytest

from realtime_serve import hub
from realtime_serve.config import DEFAULT_MODEL


@pytest.fixture(scope="session")
def default_model_path() -> Path:
    """The default model's GGUF file; the first run downloads it into the user's cache."""
    return hub.resolve(DEFAULT_MODEL)
