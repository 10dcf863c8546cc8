"""A small HTTP/1.1 server with state: a counter and random bytes in memory, and files on disk.

    python3 http_server.py PORT

GET /count: a number, one more each time. GET /blob: 2 MiB made at the start, with their SHA-256 in X-Digest.
PUT /files/NAME stores a body, GET /files/NAME gives it back.
"""

import hashlib
import itertools
import os
import re
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FILES = "/srv/files"
BLOB = os.urandom(2 << 20)
DIGEST = hashlib.sha256(BLOB).hexdigest()
# next() of it is one step of the interpreter: no two requests get the same number.
COUNTER = itertools.count(1)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _answer(self, status: int, body: bytes, digest: str = "") -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        if digest:
            self.send_header("X-Digest", digest)
        self.end_headers()
        self.wfile.write(body)

    def _file(self) -> str:
        name = re.fullmatch(r"/files/([\w.-]+)", self.path)
        return os.path.join(FILES, name[1]) if name else ""

    def do_GET(self) -> None:
        if self.path == "/count":
            self._answer(200, b"%d" % next(COUNTER))
        elif self.path == "/blob":
            self._answer(200, BLOB, DIGEST)
        elif os.path.isfile(path := self._file()):
            with open(path, "rb") as file:
                self._answer(200, file.read())
        else:
            self._answer(404, b"")

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if path := self._file():
            with open(path, "wb") as file:
                file.write(body)
        self._answer(201 if path else 404, b"")

    def log_message(self, format: str, *args: object) -> None:
        """Quiet: the log is not what this one is for."""


def main() -> None:
    os.makedirs(FILES, exist_ok=True)
    server = ThreadingHTTPServer(("0.0.0.0", int(sys.argv[1])), Handler)
    server.daemon_threads = True
    print("ready", flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
