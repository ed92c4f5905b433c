from __future__ import annotations

import pytest

from benchmarks.bench.response import Response

CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\na0\r\n\r\n2\r\n\r\n\r\n0\r\n\r\n"
MEASURED = b"HTTP/1.1 404 Not Found\r\ncontent-LENGTH: 5\r\n\r\nabc\r\n"
EMPTY = b"HTTP/1.1 204 No Content\r\ncontent-length: 0\r\n\r\n"


@pytest.mark.parametrize(("data", "status"), [(CHUNKED, 200), (MEASURED, 404), (EMPTY, 204)])
def test_the_end_is_the_last_byte_however_it_is_cut(data: bytes, status: int) -> None:
    for cut in range(1, len(data)):
        response = Response()
        assert not response.feed(data[:cut])
        assert response.feed(data[cut:])
        assert response.status == status
        assert not response.ends_with_connection
    one_by_one = Response()
    ended = [one_by_one.feed(data[at : at + 1]) for at in range(len(data))]
    assert ended == [False] * (len(data) - 1) + [True]


def test_a_response_that_ends_with_its_connection() -> None:
    response = Response()
    assert not response.ends_with_connection
    assert not response.feed(b"HTTP/1.1 200 OK\r\n\r\nabc\r\n0\r\n\r\n")
    assert response.ends_with_connection
