"""The least that a server in asyncio can do: take as many bytes as it is told, or send as many. Run as a program."""

import asyncio
import socket
import struct
import sys

ANSWER = bytes(36)


class Echo(asyncio.BufferedProtocol):
    """Eight bytes say how many come, or, where negative, how many are wanted."""

    memory = memoryview(bytearray(64 * 1024 * 1024))

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.head = memoryview(bytearray(8))
        self.target, self.in_body = self.head, False

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002
        return self.target

    def buffer_updated(self, nbytes: int) -> None:
        self.target = self.target[nbytes:]
        if self.target:
            return
        count = struct.unpack("<q", self.head)[0]
        if not self.in_body and count > 0:
            self.target, self.in_body = self.memory[:count], True
            return
        self.transport.write(ANSWER if count >= 0 else self.memory[:-count])
        self.target, self.in_body = self.head, False


async def main() -> None:
    server = await asyncio.get_running_loop().create_server(Echo, "127.0.0.1", int(sys.argv[1]))
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(main())
