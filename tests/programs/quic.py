"""A server and a client of QUIC (aioquic).

    quic.py serve ADDRESS PORT CERTIFICATE KEY
    quic.py ask ADDRESS PORT TEXT

The server answers what a stream says in capitals. The client's socket is aioquic's: one that is not connected.
"""

from __future__ import annotations

import asyncio
import ssl
import sys

from aioquic.asyncio.client import connect
from aioquic.asyncio.server import serve
from aioquic.quic.configuration import QuicConfiguration

PROTOCOLS = ["graft-test"]


def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer one stream, in a task of its own."""

    async def work() -> None:
        writer.write((await reader.read()).upper())
        writer.write_eof()

    tasks.append(asyncio.get_running_loop().create_task(work()))


tasks: list[asyncio.Task[None]] = []


async def run_server(address: str, port: int, certificate: str, key: str) -> None:
    """Serve until the process is killed."""
    configuration = QuicConfiguration(is_client=False, alpn_protocols=PROTOCOLS)
    configuration.load_cert_chain(certificate, key)
    await serve(address, port, configuration=configuration, stream_handler=answer)
    print("serves", flush=True)
    await asyncio.Event().wait()


async def ask(address: str, port: int, text: str) -> None:
    """Send ``text`` a thousand times over, and print the first words of the answer and its length."""
    configuration = QuicConfiguration(is_client=True, alpn_protocols=PROTOCOLS, verify_mode=ssl.CERT_NONE)
    async with connect(address, port, configuration=configuration) as connection:
        reader, writer = await connection.create_stream()
        writer.write(text.encode() * 1000)
        writer.write_eof()
        answered = (await reader.read()).decode()
        print(answered[: len(text)], len(answered), flush=True)


if __name__ == "__main__":
    verb, where, port_text, *rest = sys.argv[1:]
    asyncio.run(run_server(where, int(port_text), *rest) if verb == "serve" else ask(where, int(port_text), *rest))
