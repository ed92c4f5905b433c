"""For suites that use anyio's pytest plugin: ``from server.testing.for_anyio import anyio_backend`` in conftest.py.

It takes the place of anyio's own fixture: the tests there run on trio, each on a virtual clock of its own.
"""

from __future__ import annotations

from typing import Any

import pytest
from trio.testing import MockClock


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    """Trio with a clock that jumps."""
    return "trio", {"clock": MockClock(autojump_threshold=0)}
