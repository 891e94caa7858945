"""Fetching: resumed, checked, refused, offline; against a server of our own."""
import hashlib
import http.server
import re
import threading

import prepare
import pytest
import sources
import tyro

from distjudge import InputError

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


def source(url, content=CONTENT):
    return sources.Source("x.bin", url, hashlib.sha256(content).hexdigest())


def test_a_cut_download_goes_on_where_it_stopped(server, tmp_path):
    path = sources.fetch(source(f"{server}/cut"), tmp_path)  # 512,000 bytes: three pieces
    assert path.read_bytes() == CONTENT and Server.asked == ["", "bytes=200000-", "bytes=400000-"]
    assert sources.fetch(source(f"{server}/gone"), tmp_path) == path and len(Server.asked) == 3  # from the cache
    assert [p.name for p in tmp_path.iterdir()] == ["x.bin"]


def test_the_next_run_goes_on_too(server, tmp_path):
    with pytest.raises(InputError, match=r"x.bin: could not be downloaded .the connection ended after 200000 of 512000 bytes"):
        sources.fetch(source(f"{server}/cut"), tmp_path, tries=1)
    assert (tmp_path / "x.bin.part").stat().st_size == 200_000
    sources.fetch(source(f"{server}/whole"), tmp_path)
    assert Server.asked == ["", "bytes=200000-"]


def test_a_whole_part_is_taken_and_a_server_without_ranges_starts_again(server, tmp_path):
    (tmp_path / "x.bin.part").write_bytes(CONTENT)
    assert sources.fetch(source(f"{server}/whole"), tmp_path).read_bytes() == CONTENT
    (tmp_path / "x.bin").rename(tmp_path / "x.bin.part")
    (tmp_path / "x.bin.part").write_bytes(b"something else")
    assert sources.fetch(source(f"{server}/plain"), tmp_path).read_bytes() == CONTENT
    (tmp_path / "x.bin").rename(tmp_path / "x.bin.part")
    (tmp_path / "x.bin.part").write_bytes(CONTENT + b"more")  # longer than the file: thrown away, then fetched
    assert sources.fetch(source(f"{server}/whole"), tmp_path).read_bytes() == CONTENT


def test_a_wrong_checksum_is_refused(server, tmp_path):
    with pytest.raises(InputError, match=r"x.bin: the download from .*/whole has the checksum .*; it was thrown away"):
        sources.fetch(source(f"{server}/whole", b"other"), tmp_path)
    assert not list(tmp_path.iterdir())
    (tmp_path / "x.bin").write_bytes(b"put here by hand")
    with pytest.raises(InputError, match=r"x.bin: has the checksum .* delete it to fetch it again"):
        sources.fetch(source(f"{server}/whole"), tmp_path)


def test_offline_it_says_which_file_to_put_where(tmp_path, monkeypatch, server):
    monkeypatch.setenv("DISTJUDGE_CACHE", str(tmp_path))
    for address in (f"{server}/gone", "http://127.0.0.1:9/x"):
        monkeypatch.setitem(sources.SOURCES, "chaosnli", (sources.Source("c.zip", address),))
        with pytest.raises(InputError) as error:
            prepare.main(tyro.cli(prepare.PrepareConfig, args=["chaosnli", "--out", str(tmp_path / "o")]))
        message = str(error.value)
        assert message.startswith("c.zip: could not be downloaded (") and f"Fetch {address} by other means, put it at" in message
        assert str(tmp_path / "chaosnli" / "c.zip") in message and "--raw" in message and "\n" not in message
    assert "404" not in message and not (tmp_path / "o").exists()


def test_a_fetched_file_is_converted(server, tmp_path, monkeypatch):
    import test_prepare

    rows = [test_prepare.nli_row(i, ["neutral"] * 5, premise=f"P{i}") for i in range(5)]
    text = test_prepare.write(tmp_path / "x.jsonl", rows).read_bytes()
    monkeypatch.setitem(globals(), "CONTENT", text)
    monkeypatch.setenv("DISTJUDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(sources.SOURCES, "snli", (sources.Source("s.jsonl", f"{server}/whole", hashlib.sha256(text).hexdigest()),))
    prepare.main(tyro.cli(prepare.PrepareConfig, args=["snli", "--out", str(tmp_path / "o")]))
    assert test_prepare.card_of(tmp_path / "o")["items"] == {"train": 4, "test": 1} and (tmp_path / "cache" / "snli" / "s.jsonl").exists()


def test_every_task_has_a_published_file():
    assert set(sources.SOURCES) | {"own"} == set(prepare.CONVERTERS)
    for task in sources.SOURCES.values():
        for file in task:
            assert file.url.startswith("https://") and re.fullmatch(r"([0-9a-f]{64})?", file.sha256) and "/" not in file.name


@pytest.mark.parametrize(("name", "content", "words"), [
    ("x.zip", b"<html>", "x.zip: cannot be read: File is not a zip file"), ("x.jsonl.gz", b"<html>", "x.jsonl.gz: cannot be read: Not a gzipped file"),
    ("x.jsonl", b'{"a": 1}\n{"a', "x.jsonl:2: broken JSON"), ("x.jsonl", b"[1]\n", "x.jsonl:1: not a JSON object but list"),
    ("x.parquet", b"<html>", "x.parquet: cannot be read as Parquet"), ("x.jsonl", b'{"a": "\xe9"}\n', "x.jsonl:1: broken JSON"),
])
def test_files_that_are_not_what_they_say(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=re.escape(words)):
        list(sources.read_rows(tmp_path / name))
