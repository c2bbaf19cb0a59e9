"""A TCP proxy that holds back what clients send: every request takes longer by one fixed time, and bytes flow as fast as
without it.  usage: delay.py LISTEN-PORT TARGET-PORT MILLISECONDS"""

import collections
import socket
import sys
import threading
import time

PIECE = 1 << 18


def forward(source, sink):
    """Server to client: at once."""
    piece = memoryview(bytearray(PIECE))
    try:
        while got := source.recv_into(piece):
            sink.sendall(piece[:got])
    except OSError:
        pass
    finally:
        end(sink)


def forward_late(source, sink, delay):
    """Client to server: each piece that much later, however many are on their way."""
    late, arrived = collections.deque(), threading.Condition()

    def send():
        try:
            while True:
                with arrived:
                    arrived.wait_for(lambda: late)
                    due, piece = late.popleft()
                time.sleep(max(0.0, due - time.monotonic()))
                if not piece:
                    return
                sink.sendall(piece)
        except OSError:
            pass
        finally:
            end(sink)

    sender = threading.Thread(target=send, daemon=True)
    sender.start()
    piece = b"?"
    while piece:
        try:
            piece = source.recv(PIECE)
        except OSError:
            piece = b""
        with arrived:
            late.append((time.monotonic() + delay, piece))
            arrived.notify()


def end(sink):
    try:
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        pass


def serve(listen, target, delay):
    with socket.create_server(("127.0.0.1", listen), backlog=256) as server:
        while True:
            client, _ = server.accept()
            upstream = socket.create_connection(("127.0.0.1", target))
            for connection in (client, upstream):
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            late = (client, upstream, delay) if delay else (client, upstream)
            threading.Thread(target=forward_late if delay else forward, args=late, daemon=True).start()
            threading.Thread(target=forward, args=(upstream, client), daemon=True).start()


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]) / 1000)
