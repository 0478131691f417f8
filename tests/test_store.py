"""vistoken.store against moto's S3 server: the same calls as on a disk, requests that fail, errors that last."""

import errno
import io
import os
import socket
from pathlib import Path

import pytest
from store_server import s3_server

from vistoken import object_store, store
from vistoken.errors import UserError
from vistoken.store import Url, local_copy, location, read_range, remove_tree, stream


@pytest.fixture(scope="module")
def server():
    with s3_server("lab") as server:
        yield server


@pytest.fixture
def folder(server, request) -> Url:
    return Url(f"s3://lab/{request.node.name}")


def test_a_flag_takes_a_path_or_a_url():
    assert location("data/x.json") == Path("data/x.json")
    assert location("file:///data/a%20b") == Path("/data/a b")
    url = location("s3://bucket/folder//x.tar/")
    assert str(url) == "s3://bucket/folder/x.tar"
    assert (url.name, url.stem, url.suffix, url.parent.name) == ("x.tar", "x", ".tar", "folder")
    assert url.with_suffix(".rejected.jsonl") == Url("s3://bucket/folder/x.rejected.jsonl")
    assert url.parent / "a/b" == Url("s3://bucket/folder/a/b")
    assert url / "/local/x" == Path("/local/x")
    assert url.is_relative_to(Url("s3://bucket")) and not url.is_relative_to(Url("s3://bu"))
    assert url.relative_to(Url("s3://bucket")) == Path("folder/x.tar")


def test_objects_are_read_listed_and_deleted_as_files_are(folder, tmp_path):
    contents = {"a.json": b"{}", "deep/b.bin": bytes(range(256)) * 64, "deep/c.json": b"[]"}
    for where in (folder, tmp_path):
        assert not where.exists() or not list(where.iterdir())
        for name, content in contents.items():
            (where / name).parent.mkdir(exist_ok=True)
            (where / name).write_bytes(content)
        assert sorted(path.name for path in where.iterdir()) == ["a.json", "deep"]
        assert where.is_dir() and (where / "deep").is_dir() and (where / "a.json").is_file()
        assert [path.name for path in where.glob("*/*.json")] == ["c.json"]
        assert list((where / "nothing").glob("*")) == []
        assert (where / "deep/b.bin").stat().st_size == 64 * 256
        assert read_range(where / "deep/b.bin", 250, 10) == contents["deep/b.bin"][250:260]
        with (where / "deep/b.bin").open("rb") as file:
            file.seek(-3, os.SEEK_END)
            assert (file.read(), file.seek(1), file.read(2)) == (bytes([253, 254, 255]), 1, bytes([1, 2]))
        with stream(where / "deep/b.bin") as file:
            assert file.read() == contents["deep/b.bin"]
        with local_copy(where) as copy:
            assert (copy / "deep/b.bin").read_bytes() == contents["deep/b.bin"]
        (where / "a.json").unlink()
        (where / "a.json").unlink(missing_ok=True)
        with pytest.raises(FileNotFoundError):
            (where / "a.json").read_bytes()
        remove_tree(where / "deep")
        assert not (where / "deep/b.bin").exists()


def test_a_large_object_is_put_and_streamed_in_blocks(folder, monkeypatch):
    monkeypatch.setattr(object_store, "BLOCK", 1 << 20)
    content = os.urandom((12 << 20) + 17)  # beyond what one request may hold: several parts
    (folder / "large").put(io.BytesIO(content))
    with stream(folder / "large") as file:
        assert b"".join(iter(lambda: file.read(300_000), b"")) == content


def test_lines_are_read_from_a_store(folder):
    (folder / "lines").put(b"one\ntwo\nthree")
    with (folder / "lines").open("rb") as file:
        assert list(file) == [b"one\n", b"two\n", b"three"]


def test_every_third_request_fails_and_is_made_again(server, folder, monkeypatch):
    monkeypatch.setattr(object_store, "PAUSE", 0.001)
    store.retries.take()
    server.every, failed = 3, server.failed
    try:
        for number in range(20):
            (folder / f"{number:02d}").put(bytes([number]))
        assert [path.read_bytes() for path in folder.iterdir()] == [bytes([number]) for number in range(20)]
    finally:
        server.every = 0
    assert store.retries.take() == server.failed - failed > 10


def test_a_store_that_fails_for_good_is_told_with_the_url(server, folder, monkeypatch):
    monkeypatch.setattr(object_store, "PAUSE", 0.001)
    monkeypatch.setattr(object_store, "ATTEMPTS", 3)
    server.every = 1
    try:
        with pytest.raises(OSError, match="given up after 3 attempts") as caught:
            (folder / "x").put(b"")
    finally:
        server.every = 0
    assert caught.value.filename == str(folder / "x")
    with pytest.raises(OSError, match="bucket does not exist") as caught:
        Url("s3://no-such-bucket/x").put(b"")
    assert caught.value.errno == errno.ENOENT


def test_without_credentials_nothing_is_tried_twice(server, folder):
    (folder / "x").put(b"")
    store.retries.take()
    server.every, server.status = 1, "403 Forbidden"
    try:
        with pytest.raises(PermissionError, match="Are the credentials right") as caught:
            (folder / "x").read_bytes()
    finally:
        server.every, server.status = 0, "500 Internal Server Error"
    assert caught.value.filename == str(folder / "x") and store.retries.take() == 0


def test_a_scheme_that_nobody_knows_is_a_message():
    with pytest.raises(UserError, match="nosuch://a/b: neither pyarrow nor fsspec"):
        Url("nosuch://a/b").exists()


@pytest.mark.slow
def test_a_store_that_never_answers_is_told_with_the_url(monkeypatch):
    monkeypatch.setattr(object_store, "TIMEOUT", 1.0)
    monkeypatch.setattr(object_store, "ATTEMPTS", 1)
    with s3_server("lab"), socket.create_server(("127.0.0.1", 0)) as silent:  # connections wait to be accepted
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        with pytest.raises(OSError, match=r"given up after 1 attempts: .*Timeout was reached") as caught:
            Url("s3://lab/x").read_bytes()
    assert caught.value.filename == "s3://lab/x"


def test_what_a_library_behind_fsspec_raises_is_tried_again_and_told(monkeypatch):
    """They raise errors of their own: aiohttp's, botocore's, gcsfs's."""
    fsspec = pytest.importorskip("fsspec")
    from fsspec.implementations.memory import MemoryFileSystem

    class ClientError(Exception):
        pass

    class Flaky(MemoryFileSystem):
        protocol, calls, message = "flaky", 0, "the server disconnected"

        def info(self, path, **more):
            Flaky.calls += 1
            if Flaky.calls % 3:
                raise ClientError(self.message)
            return super().info(path, **more)

    fsspec.register_implementation("flaky", Flaky, clobber=True)
    monkeypatch.setattr(object_store, "PAUSE", 0.001)
    Url("flaky://bucket/x").write_bytes(b"content")
    Flaky.calls, _ = 0, store.retries.take()
    assert Url("flaky://bucket/x").stat().st_size == 7 and store.retries.take() == 2
    monkeypatch.setattr(object_store, "ATTEMPTS", 2)
    Flaky.calls = 0
    with pytest.raises(OSError, match="given up after 2 attempts: the server disconnected") as caught:
        Url("flaky://bucket/x").stat()
    assert caught.value.filename == "flaky://bucket/x"
    Flaky.calls, Flaky.message = 0, "403 Forbidden"
    store.retries.take()
    with pytest.raises(PermissionError, match="403 Forbidden"):
        Url("flaky://bucket/x").stat()
    assert store.retries.take() == 0
