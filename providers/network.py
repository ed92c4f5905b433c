"""How the HTTP transport reaches a server: the ``Connect`` protocol, and TCP with TLS as its default."""

from __future__ import annotations

import os
import ssl
from collections.abc import Awaitable, Callable
from typing import Protocol

import httpx
import trio

from .tcp import READ_BYTES, Take, open_tcp, read_alone

_CERTIFICATES = {"SSL_CERT_FILE", "SSL_CERT_DIR"}


class NetworkConfigError(ValueError):
    """What the environment says of certificates or proxies cannot be used.

    Raised while a client is made. The text names the variable, never its value: a proxy's URL may hold a password.
    """


class Connect(Protocol):
    """Opens a byte stream to a server. A test's in-memory network is one, and needs no file descriptor.

    A stream that is no real socket may offer ``is_readable()``, see ``Readable``.
    """

    async def __call__(self, host: str, port: int, tls: bool) -> trio.abc.Stream:
        """Connect to ``host``, handshake included; the caller closes the stream.

        Raises:
            OSError: nobody there, no such name, certificate refused.
            UnicodeError: DNS cannot hold such a name.
            trio.BrokenResourceError: the server went away during the handshake.
        """
        ...


class Readable(Protocol):
    """What can tell without blocking whether a read would return at once, as ``TcpStream`` can."""

    def is_readable(self) -> bool:
        """Whether bytes or the end are waiting. On an idle connection neither leaves it fit for another request."""
        ...


def is_readable(stream: trio.abc.Stream) -> bool:
    """Whether a read of ``stream`` would return at once; False where there is no way to tell."""
    probe: Callable[[], bool] | None = getattr(stream, "is_readable", None)  # ``isinstance`` takes 15 µs here
    return probe is not None and probe()


async def read_into(stream: trio.abc.Stream, take: Take) -> None:
    """Hand ``take`` what each read of ``stream`` brings, until it says False or that was the end, b"".

    A stream may have a ``read_into(take)`` of its own, as ``TcpStream`` has, which wakes no task.

    Raises:
        trio.BrokenResourceError, trio.ClosedResourceError: as ``receive_some``.
        BaseException: what ``take`` raises.
    """
    own: Callable[[Take], Awaitable[None]] | None = getattr(stream, "read_into", None)
    await (read_alone(stream, take) if own is None else own(take))


class TcpConnect:
    """The default ``Connect``: TCP by happy eyeballs without Nagle's delay, TLS verified against ``host`` for https.

    Without an ``ssl_context`` it trusts as ``Trust()`` does. Resolving a name takes a thread of trio's default limiter.
    """

    def __init__(self, ssl_context: ssl.SSLContext | Trust | None = None) -> None:
        self._trust = Trust.of(ssl_context)

    async def __call__(self, host: str, port: int, tls: bool) -> trio.abc.Stream:
        """Connect as ``Connect`` says; a failure or a cancellation leaves nothing open."""
        context = await self._trust.context() if tls else None
        stream = await open_tcp(host, port)
        return await open_tls(stream, context, host) if context else stream


class Trust:
    """Whom to trust: an SSL context, or the default one, which is made for the first https server, in a thread.

    That takes 25 ms, which neither start-up nor other streams are to wait for. ``at_once`` reads now what the
    environment names, so that a wrong name is told at start.

    Raises:
        NetworkConfigError: ``SSL_CERT_FILE`` is no file of certificates.
    """

    def __init__(self, context: ssl.SSLContext | None = None, *, at_once: bool = True) -> None:
        if context is None and at_once and _CERTIFICATES & os.environ.keys():
            context = default_ssl_context()
        self._context = context
        self._making = trio.Lock()

    @classmethod
    def of(cls, context: ssl.SSLContext | Trust | None) -> Trust:
        """What is shared already, or a new one."""
        return context if isinstance(context, Trust) else cls(context)

    async def context(self) -> ssl.SSLContext:
        """It, once it is there."""
        if self._context is None:
            async with self._making:
                if self._context is None:
                    self._context = await trio.to_thread.run_sync(default_ssl_context, abandon_on_cancel=True)
        return self._context


def default_ssl_context() -> ssl.SSLContext:
    """Trusts ``SSL_CERT_FILE`` or ``SSL_CERT_DIR`` where set, else certifi's bundle; offers HTTP/1.1 only.

    Raises:
        NetworkConfigError: ``SSL_CERT_FILE`` is no file of certificates.
    """
    try:
        context = httpx.create_ssl_context()
    except OSError as exc:  # ssl.SSLError is one
        raise NetworkConfigError(f"SSL_CERT_FILE does not name a file of certificates: {exc.strerror or exc}") from exc
    context.set_alpn_protocols(["http/1.1"])
    return context


async def open_tls(
    transport: trio.abc.Stream, context: ssl.SSLContext, server_hostname: str, received: bytes = b""
) -> TlsStream:
    """Handshake over ``transport``, which a failure or a cancellation closes; see ``TlsStream``."""
    try:
        stream = TlsStream(transport, context, server_hostname, received)
        await stream.do_handshake()
    except BaseException:
        await trio.aclose_forcefully(transport)
        raise
    return stream


class TlsStream(trio.abc.Stream):
    """The client's side of TLS on ``transport``, which it closes; one reader and one writer that take turns.

    Where ``trio.SSLStream`` returns one TLS record a call, this returns all that one read of ``transport`` brought.
    Model servers write a record a token, so a burst of three costs one wake-up instead of three. What was decrypted
    to its end is not tried again before the next read, where OpenSSL raises (a lone record: 3 instead of 9 µs). An
    end without TLS's own end mark counts as an end: HTTP's framing tells a cut body from a whole one. ``received`` is
    what was read of ``transport`` already.
    """

    __slots__ = ("_ended", "_fault", "_incoming", "_outgoing", "_tls", "_transport", "_undecrypted")

    def __init__(
        self, transport: trio.abc.Stream, context: ssl.SSLContext, server_hostname: str, received: bytes = b""
    ) -> None:
        self._transport = transport
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._incoming.write(received)
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=server_hostname)
        self._undecrypted = True  # perhaps; else a read is known to be in vain, and costs an exception
        self._ended = False
        self._fault: ssl.SSLError | None = None

    async def do_handshake(self) -> None:
        """Handshake and verify the server's certificate; call it first.

        Raises:
            ssl.SSLError: the certificate is not trusted, or the peer speaks no TLS that we accept.
            trio.BrokenResourceError: the peer is gone.
        """
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                await self._flush()
                self._take(await self._transport.receive_some(READ_BYTES))
            else:
                return await self._flush()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        """Encrypt and send ``data``.

        Raises:
            trio.BrokenResourceError: the peer is gone.
        """
        try:
            self._tls.write(data)
        except ssl.SSLError as exc:
            raise trio.BrokenResourceError(f"TLS failed: {exc}") from exc
        await self._flush()

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until the transport may take more."""
        await self._transport.wait_send_all_might_not_block()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Decrypt all that one read of up to ``max_bytes`` brought, which may complete a little more; b"" at the end.

        Raises:
            trio.BrokenResourceError: the peer is gone or broke TLS; what came before that is returned first.
        """
        while self._fault is None:
            if self._undecrypted and (data := self._decrypt()):
                return data
            if self._ended:
                return b""
            if self._fault is None:
                if self._outgoing.pending:
                    await self._flush()
                self._take(await self._transport.receive_some(max_bytes or READ_BYTES))
        raise trio.BrokenResourceError(f"TLS failed: {self._fault}") from self._fault

    async def read_into(self, take: Take) -> None:
        """See the function ``read_into``: what needs no answer of TLS's own is decrypted where the transport reads."""
        enough = False

        def take_records(received: bytes) -> bool:
            nonlocal enough
            self._take(received)
            if data := self._decrypt():
                enough = not take(data)
            return not (enough or self._is_special)

        while not enough:
            if self._undecrypted or self._is_special:
                data = await self.receive_some()
                enough = not (take(data) and data)
            else:
                await read_into(self._transport, take_records)

    def is_readable(self) -> bool:
        """Whether the peer has ended TLS or broken it, or the transport has something to read."""
        return self._ended or self._fault is not None or is_readable(self._transport)

    async def aclose(self) -> None:
        """Close the transport without TLS's end mark, as HTTP clients do."""
        await self._transport.aclose()

    @property
    def _is_special(self) -> bool:
        """Whether reading on is more than to decrypt: there is an end or a fault, or TLS has something to say."""
        return self._ended or self._fault is not None or bool(self._outgoing.pending)

    def _decrypt(self) -> bytes:
        """All records that are whole, joined; notes the end or the fault behind them, which OpenSSL tells once."""
        records: list[bytes] = []
        self._undecrypted = False
        try:
            while record := self._tls.read(READ_BYTES):
                records.append(record)
                if not self._incoming.pending:
                    break
            else:
                self._ended = True
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLEOFError:
            self._ended = True
        except ssl.SSLError as exc:
            self._fault = exc
        return records[0] if len(records) == 1 else b"".join(records)

    def _take(self, data: bytes | bytearray) -> None:
        """What a read of the transport brought."""
        if data:
            self._incoming.write(data)
        else:
            self._incoming.write_eof()
        self._undecrypted = True

    async def _flush(self) -> None:
        if self._outgoing.pending:
            await self._transport.send_all(self._outgoing.read())
