"""Fetching: resumed, checked, refused, offline; against a server of our own."""

import gzip
import hashlib
import http.server
import io
import re
import threading
import types
import zipfile

import distjudge
from distjudge import InputError

import prepare
import pytest
import sources
import test_prepare

CONTENT = bytes(range(256)) * 2000


class Server(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT; /cut ends each answer after 200,000 bytes, /plain knows no ranges."""

    asked: list[str] = []  # noqa: RUF012

    def do_GET(self):
        start = 0
        wanted = self.headers.get("Range", "")
        Server.asked.append(wanted)
        if self.path == "/gone":
            return self.send_error(404)
        if wanted and self.path != "/plain":
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
        if start >= len(CONTENT):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(CONTENT)}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        body = CONTENT[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:200_000] if self.path == "/cut" else body)
        self.close_connection = True

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    Server.asked = []
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def fetch(url, folder, content=CONTENT, tries=3):
    return sources.fetch("x.bin", url, folder, hashlib.sha256(content).hexdigest(), tries)


def test_a_cut_download_goes_on_where_it_stopped(server, tmp_path):
    path = fetch(f"{server}/cut", tmp_path)  # 512,000 bytes: three pieces
    assert path.read_bytes() == CONTENT and Server.asked == ["", "bytes=200000-", "bytes=400000-"]
    assert fetch(f"{server}/gone", tmp_path) == path and len(Server.asked) == 3  # from the cache
    assert [p.name for p in tmp_path.iterdir()] == ["x.bin"]
    path.unlink()
    with pytest.raises(InputError, match=r"downloaded .the connection ended after 200000 of 512000 bytes"):
        fetch(f"{server}/cut", tmp_path, tries=1)
    assert fetch(f"{server}/whole", tmp_path).read_bytes() == CONTENT  # the next run goes on too
    assert Server.asked[3:] == ["", "bytes=200000-"]


@pytest.mark.parametrize(
    ("part", "address"),  # whole; of another file, from a server that knows no ranges; too long
    [(CONTENT, "whole"), (b"something else", "plain"), (CONTENT + b"more", "whole")],
)
def test_what_a_part_that_is_there_becomes(server, tmp_path, part, address):
    (tmp_path / "x.bin.part").write_bytes(part)
    assert fetch(f"{server}/{address}", tmp_path).read_bytes() == CONTENT


def test_a_wrong_checksum_is_refused(server, tmp_path):
    with pytest.raises(InputError, match=r"has the checksum .*, that of .*/whole; it was thrown away"):
        fetch(f"{server}/whole", tmp_path, b"other")
    assert not list(tmp_path.iterdir())
    (tmp_path / "x.bin").write_bytes(b"put here by hand")
    with pytest.raises(InputError, match=r"x.bin: has the checksum .* delete it to fetch it again"):
        fetch(f"{server}/whole", tmp_path)


def test_offline_it_says_which_file_to_put_where(tmp_path, monkeypatch, server):
    monkeypatch.setenv("DISTJUDGE_CACHE", str(tmp_path))
    for address in (f"{server}/gone", "http://127.0.0.1:9/x"):
        monkeypatch.setitem(sources.SOURCES, "chaosnli", {"c.zip": address})
        with pytest.raises(InputError) as error:
            test_prepare.run("chaosnli", "--out", tmp_path / "o")
        message = str(error.value)
        assert message.startswith("c.zip: could not be downloaded (") and "\n" not in message
        assert f"Fetch {address} by other means, put it at {tmp_path / 'chaosnli' / 'c.zip'}" in message
        assert "--raw" in message and ("404" in message) == address.endswith("gone")
    assert not (tmp_path / "o").exists()


def test_a_fetched_file_is_converted(server, tmp_path, monkeypatch):
    rows = [test_prepare.nli_row(i, ["neutral"] * 5, premise=f"P{i}") for i in range(5)]
    text = test_prepare.write(tmp_path / "x.jsonl", rows).read_bytes()
    monkeypatch.setitem(globals(), "CONTENT", text)
    monkeypatch.setenv("DISTJUDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(sources.SOURCES, "snli", {"s.jsonl": f"{server}/whole"})
    monkeypatch.setitem(sources.SHA256, "s.jsonl", hashlib.sha256(text).hexdigest())
    test_prepare.run("snli", "--out", tmp_path / "o")
    assert test_prepare.card_of(tmp_path / "o")["items"] == {"train": 4, "test": 1}
    path = tmp_path / "cache" / "snli" / "s.jsonl"
    path.write_bytes(b"another")
    with pytest.raises(InputError, match=f"{path}: has the checksum"):
        test_prepare.run("snli", "--out", tmp_path / "o")


def test_every_task_has_a_published_file():
    assert set(sources.SOURCES) == set(prepare.TASKS) - {"own"}
    published = [pair for files in sources.SOURCES.values() for pair in files.items()]
    assert all(url.startswith("https://") and "/" not in name for name, url in published)
    assert set(sources.SHA256) < {name for name, _ in published}
    assert all(re.fullmatch(r"[0-9a-f]{64}", sha256) for sha256 in sources.SHA256.values())


def encrypted():
    """A zip file that says that it is encrypted."""
    with zipfile.ZipFile(out := io.BytesIO(), "w") as archive:
        archive.writestr("a.jsonl", b"{}\n")
    raw = bytearray(out.getvalue())
    raw[6] |= 1
    raw[raw.index(b"PK\x01\x02") + 8] |= 1
    return bytes(raw)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.zip", b"<html>", "x.zip: cannot be read as JSON: File is not a zip file"),
        ("x.zip", encrypted(), "x.zip: cannot be read as JSON: File 'a.jsonl' is encrypted"),
        ("x.jsonl.gz", b"<html>", "x.jsonl.gz: cannot be read as JSON: Not a gzipped file"),
        ("x.jsonl", b'{"a": 1}\n{"a', "x.jsonl:2: broken JSON"),
    ],
)
def test_files_that_are_not_what_they_say(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=re.escape(words)):
        list(sources.read_rows([str(tmp_path / name)]))


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.csv.gz", "x.json"])
def test_a_line_has_a_limit(tmp_path, monkeypatch, name):
    """A small file can unpack to a line larger than memory; what is read of it is the limit and no more."""
    monkeypatch.setattr(distjudge, "LONGEST", 1000)
    text = b"text,v\n" + b"x" * 1001 if "csv" in name else b'[{"text": "' + b"x" * 1001 + b'"}]'
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith("gz") else text)
    with pytest.raises(InputError, match=rf"{name}:\d: is longer than 0 MiB, too long for a line"):
        list(sources.read_table(str(tmp_path / name))[1])
    asked = []
    endless = types.SimpleNamespace(readline=lambda size=-1: asked.append(size) or b"x" * size)
    with pytest.raises(InputError, match="x:1: is longer"):
        list(distjudge.read_lines(endless, "x"))
    assert asked == [1001]
    if "csv" not in name:
        with pytest.raises(InputError, match="too long for a line"):
            distjudge.load_items(tmp_path / name)
