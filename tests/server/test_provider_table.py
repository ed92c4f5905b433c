"""``lumos providers`` and ``lumos providers check``."""

from __future__ import annotations

from functools import partial

import pytest
import trio
from click.testing import CliRunner

from providers.registry import ModelConfig, ProviderConfigError
from providers.vendors import VENDORS
from server.cli import main
from server.provider_table import check_provider, provider_rows
from server.serving import serve
from server.sockets import listen_tcp
from tests.harness.recordings import steady_recording
from tests.harness.vendor import VendorServer

KEY = "sk-secret-0123456789"


def test_every_vendor_has_a_row_and_no_row_a_key() -> None:
    environment = {vendor.key_variables[0]: KEY for vendor in VENDORS.values() if vendor.key_variables}
    rows = list(provider_rows(environment))
    assert [row.provider.split()[0] for row in rows] == [*VENDORS, "replay"]
    assert KEY not in repr(rows)
    keys = {row.provider: row.key for row in rows}
    assert keys["openai"] == "OPENAI_API_KEY is set"
    assert keys["openai_compatible"] == "optional"


def test_what_is_missing_and_what_is_overridden_is_shown() -> None:
    rows = {
        row.provider: row for row in provider_rows({"LUMOS_OLLAMA_BASE_URL": "http://gpu:1", "CLAUDE_API_KEY": KEY})
    }
    assert rows["openai"].key == "OPENAI_API_KEY is missing"
    assert rows["anthropic (claude)"].key == "CLAUDE_API_KEY is set"
    assert rows["ollama"].base_url == "http://gpu:1"
    assert rows["azure"].base_url == "(give one)"


@pytest.mark.parametrize("url", [f"http://me:{KEY}@gpu:1", f"http://gpu:1?key={KEY}", KEY, "http://gpu:99999"])
def test_a_base_url_that_no_provider_would_take_is_not_shown(url: str) -> None:
    (row,) = (row for row in provider_rows({"LUMOS_OLLAMA_BASE_URL": url}) if row.provider == "ollama")
    assert row.base_url == "(not usable)"


def test_the_command_prints_the_table() -> None:
    result = CliRunner().invoke(main, ["providers"], env={"OPENAI_API_KEY": KEY})
    assert result.exit_code == 0
    assert result.output.split()[:4] == ["provider", "key", "default", "model"]
    assert len(result.output.splitlines()) == len(VENDORS) + 2
    assert KEY not in result.output


async def test_a_check_makes_one_real_call(capsys: pytest.CaptureFixture[str]) -> None:
    vendor = VendorServer(steady_recording(first=0.01, gap=0.01, last=0.03))
    (listener,) = listen_tcp("127.0.0.1", 0)
    stopping = trio.Event()
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(serve, vendor.app(), [listener], stopping))
        url = f"http://127.0.0.1:{listener.address[1]}/v1"
        config = ModelConfig(provider="openai", base_url=url)
        assert await check_provider(config, {"OPENAI_API_KEY": KEY})
        bad = ModelConfig(provider="openai", base_url=f"{url}/nowhere")
        assert not await check_provider(bad, {"OPENAI_API_KEY": KEY})
        stopping.set()
    assert [call.body["model"] for call in vendor.calls] == ["gpt-4o-mini"]
    out, err = capsys.readouterr()
    assert "openai gpt-4o-mini: 'word0 word1 end.'" in out
    assert "TTFB" in out
    assert "openai: upstream.invalid_request" in err
    assert KEY not in out + err


async def test_a_check_without_a_key_names_the_variable() -> None:
    with pytest.raises(ProviderConfigError, match="ANTHROPIC_API_KEY or CLAUDE_API_KEY"):
        await check_provider(ModelConfig(provider="claude"), {})


def test_the_check_command_says_in_one_line_what_is_wrong() -> None:
    result = CliRunner().invoke(main, ["providers", "check", "openia"])
    assert result.exit_code == 1
    assert result.output.startswith("lumos: unknown provider 'openia'; known are openai, ")
    assert result.output.count("\n") == 1
