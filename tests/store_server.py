"""An S3 server on a free port of the loopback address, in the test's process; it can be told to fail now and then."""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import pytest

from vistoken import object_store

VARIABLES = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
}


class Sick:
    """Answers every `every`-th request with 500, in front of a WSGI application; 0: none."""

    def __init__(self, application, every: int = 0):
        self._application, self.every, self.requests, self.failed = application, every, 0, 0
        self.status = "500 Internal Server Error"

    def __call__(self, environ, start_response):
        self.requests += 1
        if self.every and self.requests % self.every == 0:
            self.failed += 1
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            body = b"<Error><Code>InternalError</Code><Message>now and then</Message></Error>"
            start_response(self.status, [("Content-Length", str(len(body)))])
            return [b"" if environ["REQUEST_METHOD"] == "HEAD" else body]
        return self._application(environ, start_response)


@contextmanager
def s3_server(*buckets: str) -> Iterator[Sick]:
    """A server with these buckets; the environment names it, for this process and those that it starts."""
    pytest.importorskip("moto.server")
    from moto.server import DomainDispatcherApplication, create_backend_app
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Quiet(WSGIRequestHandler):
        def log_request(self, *args) -> None:
            pass

    application = Sick(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with mock.patch.dict(os.environ, {**VARIABLES, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}"}):
        object_store.file_system.cache_clear()
        _make(server.server_port, buckets)
        try:
            yield application
        finally:
            server.shutdown()
            server.server_close()
            object_store.file_system.cache_clear()


def _make(port: int, buckets: tuple[str, ...]) -> None:
    from pyarrow import fs

    system = fs.S3FileSystem(
        region="us-east-1", endpoint_override=f"http://127.0.0.1:{port}", allow_bucket_creation=True
    )
    for bucket in buckets:
        system.create_dir(bucket)
