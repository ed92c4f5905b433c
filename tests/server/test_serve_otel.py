"""``lumos serve --otel`` sends a run's trace by OTLP, to where OpenTelemetry's own variables say."""

from __future__ import annotations

import logging
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import cast

import httpx
import msgspec
import pytest
import structlog.testing
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

from server.otel_export import TellingExporter, heard_alone
from tests.server.commands import LUMOS, SURROUNDINGS


class Sink(BaseHTTPRequestHandler):
    """Keeps what is posted to it."""

    bodies: list[bytes]

    def do_POST(self) -> None:
        assert self.path == "/v1/traces"
        self.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def sink() -> Iterator[HTTPServer]:
    Sink.bodies = []
    with HTTPServer(("127.0.0.1", 0), Sink) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_collector_that_is_not_there_is_one_line_and_holds_nobody_up(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        endpoint = f"http://user:secret@127.0.0.1:{taken.getsockname()[1]}"
    environment = SURROUNDINGS | {"OTEL_EXPORTER_OTLP_ENDPOINT": endpoint, "OTEL_BSP_SCHEDULE_DELAY": "10"}
    command = [str(LUMOS), "serve", "--port", "0", "--otel"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path) as process:
        try:
            assert process.stderr is not None
            url = msgspec.json.decode(process.stderr.readline())["url"]
            chat = f"{url}/api/v1/agents/demo-tools/chat/lumosai"
            assert httpx.post(chat, json={"message": "hi"}, trust_env=False).status_code == 200
            began = time.monotonic()
            process.send_signal(signal.SIGTERM)
            _, said = process.communicate(timeout=20)
            assert time.monotonic() - began < 4.5
        finally:
            process.kill()
    lines = [msgspec.json.decode(line) for line in said.splitlines()]
    (told,) = [line for line in lines if "OpenTelemetry" in line["event"]]
    assert told["endpoint"] == endpoint.replace("user:secret@", "")
    assert told["variable"] == "OTEL_EXPORTER_OTLP_ENDPOINT"
    assert "urllib3" not in said
    assert "secret" not in said
    assert {line["event"].partition(".")[0] for line in lines if line is not told} == {"run", "server"}


class FakeExporter:
    """Succeeds or not, as told."""

    def __init__(self, *results: SpanExportResult) -> None:
        self._results = iter(results)

    def export(self, _: object) -> SpanExportResult:
        return next(self._results)


def test_an_outage_is_told_once_and_so_is_its_end() -> None:
    good, bad = SpanExportResult.SUCCESS, SpanExportResult.FAILURE
    with structlog.testing.capture_logs() as lines, heard_alone() as last_error:
        exporter = TellingExporter(cast("SpanExporter", FakeExporter(good, bad, bad, good, good, bad)), last_error)
        logging.getLogger("opentelemetry.exporter.otlp.proto.http.trace_exporter").error("code: %d", 401)
        for _ in range(6):
            exporter.export([])
    assert [line["log_level"] for line in lines] == ["warning", "info", "warning"]
    assert lines[0]["reason"] == "code: 401"


def test_a_run_s_spans_are_sent(tmp_path: Path, sink: HTTPServer) -> None:
    environment = SURROUNDINGS | {"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{sink.server_port}"}
    command = [str(LUMOS), "serve", "--port", "0", "--otel"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, cwd=tmp_path) as process:
        try:
            assert process.stderr is not None
            url = msgspec.json.decode(process.stderr.readline())["url"]
            chat = f"{url}/api/v1/agents/demo-tools/chat/lumosai"
            assert httpx.post(chat, json={"message": "hi"}, trust_env=False).status_code == 200
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        finally:
            process.kill()
    requests = [ExportTraceServiceRequest.FromString(body) for body in Sink.bodies]
    resources = [spans for request in requests for spans in request.resource_spans]
    names = [span.name for resource in resources for scope in resource.scope_spans for span in scope.spans]
    assert {"invoke_agent demo-tools", "chat demo-tools", "execute_tool calculator", "memory history"} <= set(names)
    services = {a.value.string_value for r in resources for a in r.resource.attributes if a.key == "service.name"}
    assert services == {"lumos"}
