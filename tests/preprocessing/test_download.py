"""Fetching published files, from a server on this machine: what is resumed, tried again, checked and refused."""

from __future__ import annotations

import hashlib
import socket
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import download
import pytest
from download import DownloadError, RemoteFile, fetch

CONTENT = bytes(range(256)) * 1200  # 300 KB, several blocks
HALF = len(CONTENT) // 2
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Serves CONTENT, from `Range` on. Each request takes one entry of `faults`: a status, or how its body ends."""

    def do_GET(self):
        asked = self.headers.get("Range")
        self.server.ranges.append(asked)
        fault = self.server.faults.pop(0) if self.server.faults else None
        if isinstance(fault, int):
            return self.send_error(fault)
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and fault != "no ranges" else 0
        if start >= len(CONTENT):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(CONTENT) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(CONTENT) - 1}/{len(CONTENT)}")
        self.end_headers()
        self.wfile.write(CONTENT[start:HALF] if fault in ("cut", "stall") else CONTENT[start:])
        if fault == "stall":
            self.server.finished.wait(timeout=30)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "no_proxy", "NO_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(urllib.request, "_opener", None)  # it keeps the proxies of the first use
    monkeypatch.setattr(download, "WAITS", (0.0, 0.0))
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.faults, server.ranges, server.finished = [], [], threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}/some.txt"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.finished.set()
    server.shutdown()
    thread.join()
    server.server_close()


def some_file(server, **changes) -> RemoteFile:
    return RemoteFile(**({"url": server.url, "name": "some.txt", "size": len(CONTENT), "sha256": SHA256} | changes))


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_whole_file(server, tmp_path, capsys):
    assert fetch([some_file(server)], tmp_path / "new") == [tmp_path / "new" / "some.txt"]
    assert (tmp_path / "new" / "some.txt").read_bytes() == CONTENT
    assert names(tmp_path / "new") == ["some.txt"]
    assert server.ranges == [None]
    assert "some.txt: 307,200 bytes, SHA-256 as expected" in capsys.readouterr().out


def test_a_partial_file_is_gone_on_with(server, tmp_path):
    (tmp_path / "some.txt.part").write_bytes(CONTENT[:1000])
    fetch([some_file(server)], tmp_path)
    assert server.ranges == ["bytes=1000-"]
    assert (tmp_path / "some.txt").read_bytes() == CONTENT
    assert names(tmp_path) == ["some.txt"]


def test_a_server_without_ranges_sends_it_anew(server, tmp_path):
    (tmp_path / "some.txt.part").write_bytes(CONTENT[:1000])
    server.faults = ["no ranges"]
    fetch([some_file(server)], tmp_path)
    assert (tmp_path / "some.txt").read_bytes() == CONTENT


def test_a_finished_partial_file_is_only_checked(server, tmp_path):
    (tmp_path / "some.txt.part").write_bytes(CONTENT)
    fetch([some_file(server)], tmp_path)
    assert server.ranges == []
    assert names(tmp_path) == ["some.txt"]


@pytest.mark.parametrize("extra", [b"", b"more"])
def test_a_partial_file_that_nothing_follows_is_fetched_anew(server, tmp_path, extra):
    (tmp_path / "some.txt.part").write_bytes(CONTENT + extra)
    fetch([some_file(server, size=None)], tmp_path)
    assert server.ranges == [f"bytes={len(CONTENT + extra)}-", None]
    assert (tmp_path / "some.txt").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("faults", "ranges"),
    [
        (["cut"], [None, f"bytes={HALF}-"]),
        ([503], [None, None]),
        ([500, "cut"], [None, None, f"bytes={HALF}-"]),
        ([429, 408], [None, None, None]),
    ],
)
def test_what_may_pass_is_tried_again(server, tmp_path, faults, ranges, capsys):
    server.faults = faults
    fetch([some_file(server)], tmp_path)
    assert server.ranges == ranges
    assert (tmp_path / "some.txt").read_bytes() == CONTENT
    assert "try 2 of 3" in capsys.readouterr().err


def test_a_silent_connection_is_given_up_and_gone_on_with(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "_TIMEOUT_S", 0.2)
    server.faults = ["stall"]
    fetch([some_file(server)], tmp_path)
    assert server.ranges[0] is None
    assert 0 < int(server.ranges[1].removeprefix("bytes=").removesuffix("-")) <= HALF
    assert (tmp_path / "some.txt").read_bytes() == CONTENT


def test_cut_every_time_keeps_what_came_for_the_next_run(server, tmp_path):
    server.faults = ["cut", "cut", "cut"]
    with pytest.raises(DownloadError, match=r"the connection was cut after 153,600 of 307,200 bytes; run this again"):
        fetch([some_file(server)], tmp_path)
    assert (tmp_path / "some.txt.part").read_bytes() == CONTENT[:HALF]
    server.ranges.clear()
    fetch([some_file(server)], tmp_path)
    assert server.ranges == [f"bytes={HALF}-"]
    assert (tmp_path / "some.txt").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("published", "message"),
    [
        ({"sha256": "0" * 64}, f"SHA-256 {SHA256}, expected {'0' * 64}"),
        ({"size": 999, "sha256": None}, "307,200 bytes, expected 999"),
    ],
)
def test_another_file_than_published_is_refused_and_removed(server, tmp_path, published, message):
    with pytest.raises(DownloadError) as refusal:
        fetch([some_file(server, **published)], tmp_path)
    assert str(refusal.value).startswith(f"{server.url}: {message}; the download was deleted")
    assert str(tmp_path / "some.txt") in str(refusal.value)
    assert names(tmp_path) == []


@pytest.mark.parametrize(("fault", "n_tries"), [(404, 1), (403, 1), (503, 3)])
def test_a_refusal_names_url_reason_and_place(server, tmp_path, fault, n_tries):
    server.faults = [fault] * n_tries
    with pytest.raises(DownloadError) as refusal:
        fetch([some_file(server)], tmp_path)
    message = str(refusal.value)
    assert message.startswith(f"{server.url}: HTTP {fault} ")
    assert f"put it at {tmp_path / 'some.txt'}" in message
    assert "\n" not in message
    assert len(server.ranges) == n_tries
    assert names(tmp_path) == []


def test_nobody_listens(server, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(DownloadError, match=rf"^http://127\.0\.0\.1:{port}/x: .*[Rr]efused"):
        fetch([some_file(server, url=f"http://127.0.0.1:{port}/x")], tmp_path)


def test_no_name_server(server, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", fail)
    with pytest.raises(DownloadError, match=r"^http://host\.invalid/x: .*Name or service not known; run this again"):
        fetch([some_file(server, url="http://host.invalid/x")], tmp_path)


def test_a_proxy_that_refuses(server, tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", server.url)
    server.faults = [407]
    with pytest.raises(DownloadError, match=r"^http://host\.invalid/x: HTTP 407 "):
        fetch([some_file(server, url="http://host.invalid/x")], tmp_path)


@pytest.mark.parametrize("sha256", [SHA256, None])
def test_a_file_that_is_there_is_not_fetched(server, tmp_path, sha256, capsys):
    (tmp_path / "some.txt").write_bytes(CONTENT)
    fetch([some_file(server, sha256=sha256)], tmp_path)
    assert server.ranges == []
    assert (
        "as expected" if sha256 else f"SHA-256 {SHA256} (not checked: none is published)"
    ) in capsys.readouterr().out


@pytest.mark.parametrize("damaged", [CONTENT[:-1] + b"?", CONTENT[:-1]])
def test_a_damaged_file_that_is_there_is_refused_and_kept(server, tmp_path, damaged):
    (tmp_path / "some.txt").write_bytes(damaged)
    with pytest.raises(DownloadError, match=r"expected .*; delete it and run this again"):
        fetch([some_file(server)], tmp_path)
    assert (tmp_path / "some.txt").read_bytes() == damaged
    assert server.ranges == []


def test_a_file_without_published_size_and_sum_is_taken(server, tmp_path, capsys):
    fetch([some_file(server, size=None, sha256=None)], tmp_path)
    assert (tmp_path / "some.txt").read_bytes() == CONTENT
    assert f"SHA-256 {SHA256} (not checked: none is published)" in capsys.readouterr().out
