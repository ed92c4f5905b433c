"""``lumos serve --otel`` sends a run's trace by OTLP, to where OpenTelemetry's own variables say."""

from __future__ import annotations

import signal
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import msgspec
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

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
