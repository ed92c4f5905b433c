"""What several modules of these tests go through twice."""

from __future__ import annotations

import pytest

from .fake_guests import FakeMemory


@pytest.fixture(params=[False, True], ids=["hosted", "prompt"])
def either_memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test holds for memories that are given tasks of their own, and for those that need none."""
    monkeypatch.setattr(FakeMemory, "is_prompt", request.param)
