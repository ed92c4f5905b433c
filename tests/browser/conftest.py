"""One Chromium for all tests here: to start one takes seconds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.browser.chromium import Chromium, run_chromium


@pytest.fixture(scope="package")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with run_chromium(tmp_path_factory.mktemp("chromium")) as running:
        yield running
