"""`graft metrics --listen`: serves the metrics over HTTP, at a unix socket or a loopback port, until SIGTERM or SIGINT.

A process of its own, so that no scraper can make graftd wait. It has one thread, because a sample asks child processes
(graft/state/helper_process.py): asyncio waits for clients, and one that is slow delays nobody. A sample is used for all
requests of a second, so that many requests cost no more than one a second.

Every user of the host can connect to a loopback port: how many connections there are at once, how long each may take
and how much it may send is bounded.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler

from graft import __version__
from graft.commands import metrics, sample
from graft.errors import ConflictError, GraftError, KernelError
from graft.kernel import unix_files
from graft.model.printable import printable
from graft.model.scrape_address import LoopbackPort
from graft.model.settings import Settings
from graft.model.unix_socket import UnixSocket
from graft.state.unix_sockets import owner_of

_BACKLOG = 64
_MAX_CLIENTS = 64
_MAX_HEAD = 16384  # bytes of a request
_PATIENCE = 5.0  # seconds for a client to send its request, and to read the answer
_FRESH = 1.0  # seconds for which a sample is used again
_PATH = "/metrics"


class Answer(BaseHTTPRequestHandler):
    """The answer to one request, whose bytes are there already: ``answer``. ``render`` gives the metrics."""

    server_version = f"graft/{__version__}"
    sys_version = ""

    def __init__(self, head: bytes, render: Callable[[], bytes]) -> None:
        self.rfile, self.wfile = io.BytesIO(head), io.BytesIO()
        self._render = render
        self.client_address = ("", 0)
        self.close_connection = True
        self.handle_one_request()

    @property
    def answer(self) -> bytes:
        """All of it."""
        assert isinstance(self.wfile, io.BytesIO)
        return self.wfile.getvalue()

    def do_GET(self) -> None:
        """The metrics; any other path is not found."""
        if self.path.partition("?")[0] != _PATH:
            self.send_error(HTTPStatus.NOT_FOUND, explain=f"The metrics are at {_PATH}.")
            return
        try:
            body = self._render()
        except (GraftError, OSError) as error:
            self.send_error(HTTPStatus.SERVICE_UNAVAILABLE, explain=printable(str(error)))
            return
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", metrics.CONTENT_TYPE)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: who asks for metrics asks every few seconds."""


class Renderer:
    """The metrics as text: of now, or of less than a second ago."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._text, self._until = b"", 0.0

    def __call__(self) -> bytes:
        """Raises GraftError, OSError."""
        if time.monotonic() >= self._until:
            self._text = metrics.text(sample.take(self._settings))
            self._until = time.monotonic() + _FRESH
        return self._text


def serve(settings: Settings, place: UnixSocket | LoopbackPort, ready: Callable[[], None] = lambda: None) -> None:
    """Serve until a signal ends it; ``ready`` is called when clients can connect.

    Raises ConflictError where the address is in use, NotFoundError where the owner is not known, KernelError.
    """
    with _listening(place) as listener:
        asyncio.run(_serve(listener, Renderer(settings), ready))


@contextlib.contextmanager
def _listening(place: UnixSocket | LoopbackPort) -> Iterator[socket.socket]:
    if isinstance(place, UnixSocket):
        with _at_path(place) as sock:
            yield sock
        return
    family = socket.AF_INET6 if place.address.version == 6 else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((str(place.address), place.port))
            sock.listen(_BACKLOG)
        except OSError as error:
            where = f"{place.address} port {place.port}"
            raise ConflictError(f"--listen: cannot listen at {where}: {error.strerror}", "ss -tlnp") from error
        yield sock


@contextlib.contextmanager
def _at_path(place: UnixSocket) -> Iterator[socket.socket]:
    uid, gid = owner_of(place) or (os.geteuid(), os.getegid())
    target = unix_files.Target(place.path, uid, gid, place.mode)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            file = unix_files.bind(sock, target, os.fsencode(place.path), _BACKLOG)
        except OSError as error:
            raise KernelError(f"--listen: cannot listen at {place.path}: {error.strerror}") from error
        try:
            yield sock
        finally:
            unix_files.remove(place.path, file)


async def _serve(listener: socket.socket, render: Callable[[], bytes], ready: Callable[[], None]) -> None:
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stopped.set)
    clients: dict[asyncio.StreamWriter, None] = {}  # the oldest first

    async def on_client(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(clients) >= _MAX_CLIENTS:
            # Not the new one: any user can keep as many open as there may be, and a scraper sends its request at once.
            oldest = next(iter(clients))
            del clients[oldest]
            oldest.transport.abort()
        clients[writer] = None
        try:
            await _answer(reader, writer, render)
        except (OSError, TimeoutError, ValueError, EOFError):
            writer.transport.abort()
        else:
            writer.close()
        finally:
            clients.pop(writer, None)

    start = asyncio.start_unix_server if listener.family == socket.AF_UNIX else asyncio.start_server
    server = await start(on_client, sock=listener, limit=_MAX_HEAD, backlog=_BACKLOG)
    ready()
    async with server:
        await stopped.wait()
        for writer in clients:
            writer.transport.abort()


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, render: Callable[[], bytes]) -> None:
    """Read a request and send the answer, all of it. Raises EOFError and ValueError where there is no whole request,
    TimeoutError, OSError.
    """
    try:
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), _PATIENCE)
    except asyncio.LimitOverrunError as error:
        raise ValueError("the request is too long") from error
    writer.transport.set_write_buffer_limits(high=0)  # "drained" is then when nothing is left
    writer.write(Answer(head, render).answer)
    await asyncio.wait_for(writer.drain(), _PATIENCE)
