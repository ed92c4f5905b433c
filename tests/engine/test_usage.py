"""Estimated token counts: rough, but never nothing for something."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine import Message, ModelRequest, Usage, UsagePiece
from engine.usage import estimate_tokens, estimated_usage, reported_usage


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("", 0),
        ("a", 1),
        ("four", 1),
        ("fives", 2),
        ("日", 1),
        ("日本語", 3),
        ("日本 and", 3),
        ("Grüezi", 2),
        ("👋", 1),
        ("é" * 8, 2),
        ("👋日é" * 4, 9),
        ("\u2dff" * 4 + "\u2e00\U0010ffff", 3),
        ("\ud800", 1),
    ],
    ids=ascii,
)
def test_one_token_for_four_characters_and_one_for_each_wide_one(text: str, tokens: int) -> None:
    assert estimate_tokens(text) == tokens


@given(st.text())
def test_an_estimate_counts_code_points(text: str) -> None:
    wide = sum(char >= "\u2e00" for char in text)
    assert estimate_tokens(text) == wide + -(-(len(text) - wide) // 4)


@pytest.mark.parametrize(
    "text", ["日" * 2_600_000, "a日" * 1_300_000, "é" * 2_600_000], ids=["wide", "mixed", "narrow"]
)
def test_an_estimate_of_a_whole_book_holds_nobody_up(text: str) -> None:
    def cpu_seconds() -> float:
        start = time.process_time()
        estimate_tokens(text)
        return time.process_time() - start

    assert min(cpu_seconds() for _ in range(3)) < 0.05  # about 5 ms; a loop over the characters takes 150


@given(st.text())
def test_an_estimate_is_never_nothing_for_something_nor_more_than_the_characters(text: str) -> None:
    assert min(1, len(text)) <= estimate_tokens(text) <= len(text)


def test_an_estimate_counts_all_messages_sent() -> None:
    request = ModelRequest((Message("system", "four"), Message("user", "日本")), "model")
    assert estimated_usage(request, "fives") == Usage(3, 2, estimated=True)
    assert estimated_usage(request, "fives", "four") == Usage(3, 3, reasoning_tokens=1, estimated=True)


def test_a_report_is_taken_as_it_is() -> None:
    assert reported_usage(UsagePiece(1, 2, 3, 4)) == Usage(1, 2, reasoning_tokens=3, cached_tokens=4)
    assert reported_usage(UsagePiece(0, 0)) == Usage(0, 0)
