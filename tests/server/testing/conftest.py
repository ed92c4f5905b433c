"""The plugin, whether or not it is installed: its fixtures and its hook, which may be there twice."""

from __future__ import annotations

from server.testing.plugin import faults, pytest_runtest_call, replay, virtual_lumos

__all__ = ["faults", "pytest_runtest_call", "replay", "virtual_lumos"]
