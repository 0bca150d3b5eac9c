"""A server of buckets on this machine: `python tests/bucket_server.py PORT [flaky]`.

The storage and its JSON API are those of gcp-storage-emulator. Added here is what it lacks: bytes
of all values in an upload, writes on condition of a generation, and what a bad network does: every
tenth request is refused and one in fifty comes late.
"""

import contextlib
import functools
import itertools
import json
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from http import HTTPStatus, server
from urllib.parse import unquote

from gcp_storage_emulator import server as emulator
from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import buckets
from gcp_storage_emulator.storage import Storage

BUCKET = "bucket"  # there is another one, private, which nobody may use
LATE_SECONDS = 5
ATOMIC = threading.Lock()
REQUESTS = itertools.count(1)


class Handler(emulator.RequestHandler):
    """Answers 503 and late where it is flaky, and 412 where a condition does not hold."""

    def __init__(self, flaky: bool, *args):
        self.flaky, self.generation = flaky, None
        super().__init__(*args)

    def do(self, method: str) -> None:
        if self.flaky and self.path != "/":
            number = next(REQUESTS)
            if number % 50 == 0:
                time.sleep(LATE_SECONDS)
            if number % 10 == 0:
                return self.refuse(HTTPStatus.SERVICE_UNAVAILABLE)
        if "/b/private" in self.path:
            return self.refuse(HTTPStatus.FORBIDDEN)
        with ATOMIC:
            name, query = self.object_and_query()
            try:
                found = self.storage.get_file_obj(BUCKET, name)
                self.generation = found.get("generation")
                if (self.headers.get("range") or "").startswith("bytes=-"):
                    first = max(int(found["size"]) - int(self.headers["range"][7:]), 0)
                    self.headers.replace_header("range", f"bytes={first}-")
            except NotFound:
                self.generation = None
            wanted = query.get("ifGenerationMatch", [self.generation or "0"])[0]
            if wanted != (self.generation or "0"):
                return self.refuse(HTTPStatus.PRECONDITION_FAILED)
            emulator.Router(self).handle(method)

    def object_and_query(self) -> tuple[str, dict[str, list[str]]]:
        request = emulator.Request(self, "")
        query = request.query
        name = query["name"][0] if "name" in query else request.path.rpartition("/o/")[2]
        return unquote(name), query

    def refuse(self, status: HTTPStatus) -> None:
        emulator._read_raw_data(self)
        self.generation = None
        self.send_response(status.value, status.phrase)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def end_headers(self) -> None:
        if self.generation and self.command == "GET":
            self.send_header("x-goog-generation", self.generation)
        super().end_headers()

    do_GET = functools.partialmethod(do, "GET")
    do_POST = functools.partialmethod(do, "POST")
    do_PUT = functools.partialmethod(do, "PUT")
    do_DELETE = functools.partialmethod(do, "DELETE")
    do_PATCH = functools.partialmethod(do, "PATCH")


def read_data(handler, query, read=emulator._read_data):
    """The body of a request; the emulator's parser of mails would change line ends in it."""
    kind = handler.headers.get("Content-Type") or ""
    if not kind.startswith("multipart/related"):
        return read(handler, query)
    boundary = b"--" + kind.partition("boundary=")[2].strip("'\"").encode()
    _, meta, content, _ = emulator._read_raw_data(handler).split(boundary)
    end = b"\r\n" if meta.startswith(b"\r\n") else b"\n"
    meta = meta.removesuffix(end).split(2 * end, 1)[1]
    head, content = content.removesuffix(end).split(2 * end, 1)
    kind = head.decode().partition(":")[2].strip()
    return {"meta": json.loads(meta), "content": content, "content-type": kind}


emulator._read_data = read_data


def environment(port: int) -> dict[str, str]:
    """What lets the libraries find this server, and ask for no credentials."""
    url = f"http://localhost:{port}"
    return {
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "CLOUD_STORAGE_EMULATOR_ENDPOINT": url,  # of ArrayRecord
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks Google for the kind of the bucket
        "NO_GCE_CHECK": "true",
    }


@contextlib.contextmanager
def running(*arguments: str):
    """A server in a process of its own; gives the environment of its users."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, __file__, str(port), *arguments])
    try:
        for _ in range(600):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://localhost:{port}/"):
                break
            assert process.poll() is None
            time.sleep(0.1)
        yield environment(port)
    finally:
        process.kill()
        process.wait()


def main(port: int, flaky: bool) -> None:
    storage = Storage(use_memory_fs=True)
    buckets.create_bucket(BUCKET, storage)

    def handler(*arguments):
        with contextlib.suppress(ConnectionError):  # a client that went away
            Handler(flaky, storage, *arguments)

    server.ThreadingHTTPServer(("localhost", port), handler).serve_forever()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:] == ["flaky"])
