"""Eight threads that calculate, one connection to it and one from it: every state it holds can be checked from outside.

    python3 threads.py PORT PEER_HOST PEER_PORT

Thread i starts at i and takes one step of a fixed generator after the other; (steps, value) of each is shown, and
whoever knows the generator can calculate what the value must be. To PEER a numbered line goes every 5 ms, which must
come back. One line ``report`` on TCP PORT answers a line of JSON:
{"threads": [[steps, value], ...], "sent", "echoed", "peer_error", "connections"}.
"""

import json
import socket
import sys
import threading
import time

THREADS = 8
FACTOR = 6364136223846793005
SUMMAND = 1442695040888963407
MASK = (1 << 64) - 1
STEPS_AT_ONCE = 200


class Worker(threading.Thread):
    def __init__(self, number: int) -> None:
        super().__init__(name=f"worker-{number}", daemon=True)
        self.shown = (0, number)

    def run(self) -> None:
        while True:
            steps, value = self.shown
            for _ in range(STEPS_AT_ONCE):
                value = (value * FACTOR + SUMMAND) & MASK
            self.shown = (steps + STEPS_AT_ONCE, value)
            time.sleep(0.002)


class Talker(threading.Thread):
    """The connection outwards; the first thing that goes wrong on it ends it and is kept."""

    def __init__(self, peer: tuple[str, int]) -> None:
        super().__init__(name="talker", daemon=True)
        self.peer = peer
        self.sent = self.echoed = 0
        self.error = ""

    def run(self) -> None:
        try:
            with socket.create_connection(self.peer) as connection, connection.makefile("rb") as lines:
                while True:
                    self.sent += 1
                    connection.sendall(b"%d\n" % self.sent)
                    line = lines.readline()
                    if line != b"%d\n" % self.sent:
                        raise ValueError(f"sent {self.sent}, got {line!r}")
                    self.echoed += 1
                    time.sleep(0.005)
        except (OSError, ValueError) as error:
            self.error = repr(error)


def answer(connection: socket.socket, workers: list[Worker], talker: Talker, connections: int) -> None:
    with connection, connection.makefile("rb") as lines:
        for line in lines:
            if line.strip() != b"report":
                connection.sendall(line)
                continue
            result = {
                "threads": [worker.shown for worker in workers],
                "sent": talker.sent,
                "echoed": talker.echoed,
                "peer_error": talker.error,
                "connections": connections,
            }
            connection.sendall(json.dumps(result).encode() + b"\n")


def main() -> None:
    port, peer_host, peer_port = int(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    workers = [Worker(number) for number in range(THREADS)]
    talker = Talker((peer_host, peer_port))
    for thread in (*workers, talker):
        thread.start()
    listener = socket.create_server(("0.0.0.0", port))
    print("ready", flush=True)
    connections = 0
    while True:
        connection, _address = listener.accept()
        connections += 1
        threading.Thread(target=answer, args=(connection, workers, talker, connections), daemon=True).start()


if __name__ == "__main__":
    main()
