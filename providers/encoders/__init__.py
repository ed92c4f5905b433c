"""The vendors' side of the wire formats: recordings become the bytes that a vendor would have sent."""

from __future__ import annotations

from .base import AnswerFacts, Encoder, answer_facts, encoded_reads, raw_reads
from .formats import MOCKED_VENDORS, Format, KeyPlace, MockedVendor, speaks
from .whole import whole_answer

__all__ = [
    "MOCKED_VENDORS",
    "AnswerFacts",
    "Encoder",
    "Format",
    "KeyPlace",
    "MockedVendor",
    "answer_facts",
    "encoded_reads",
    "raw_reads",
    "speaks",
    "whole_answer",
]
