"""Published weights from a server of these tests: whole, cut short, refused, slow, resumed, and by several at once."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from detrlib.checkpoints import weights
from detrlib.checkpoints.weights import Published, fetch
from detrlib.errors import WeightsError

CONTENT = bytes(range(256)) * 1000
FILE = f"model-{hashlib.sha256(CONTENT).hexdigest()[:8]}.pth"


class Server(ThreadingHTTPServer):
    """Sends CONTENT, or does what `manner` says; remembers what was asked for."""

    daemon_threads = True
    manner, asked = "whole", ()


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        manner, had = self.server.manner, self.headers["Range"]
        self.server.asked = (*self.server.asked, (self.path, had))
        if manner == "absent":
            return self.send_error(404)
        if manner == "silent":
            return self.server.released.wait(10)
        start = int(had.removeprefix("bytes=").rstrip("-")) if had and manner != "no ranges" else 0
        if start and start >= len(CONTENT):
            return self.send_error(416)
        body = CONTENT[start:] if manner != "another" else b"<html>" + CONTENT[6:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:1000] if manner in ("cut", "stalling") else body)
        self.wfile.flush()
        if manner == "stalling":
            self.server.released.wait(10)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    """A server on the loopback address, whose file is what the name "model" stands for."""
    server = Server(("127.0.0.1", 0), Handler)
    server.released = threading.Event()
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("DETRLIB_WEIGHTS_URL", f"http://127.0.0.1:{server.server_port}/detr/")
    monkeypatch.setitem(weights.PUBLISHED, "model", Published(FILE, {}))
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def cache(server, tmp_path):
    return tmp_path / "torch" / "hub" / "checkpoints"


def test_a_file_is_fetched_once(server, cache):
    assert fetch("model") == fetch("model") == cache / FILE
    assert (cache / FILE).read_bytes() == CONTENT
    assert server.asked == ((f"/detr/{FILE}", None),)
    assert [path.name for path in cache.iterdir()] == [FILE]


@pytest.mark.parametrize(
    ("manner", "reason"),
    [
        ("absent", "404 Not Found"),
        ("another", "another SHA-256"),
        ("cut", f"ended after 1000 of {len(CONTENT)} bytes"),
        ("silent", r"nothing came for 0\.2 s|no answer within 0\.2 s"),
        ("stalling", r"nothing came for 0\.2 s"),
    ],
)
def test_what_goes_wrong_is_one_sentence_with_address_and_folder_and_the_next_attempt_succeeds(
    server, cache, manner, reason
):
    server.manner = manner
    with pytest.raises(WeightsError, match=reason) as refusal:
        fetch("model", patience=0.2 if manner in ("silent", "stalling") else weights.PATIENCE)
    message = str(refusal.value)
    assert f"http://127.0.0.1:{server.server_port}/detr/{FILE}" in message and str(cache) in message
    assert "\n" not in message and not (cache / FILE).exists()
    server.manner = "whole"
    assert fetch("model").read_bytes() == CONTENT


def test_the_next_attempt_asks_for_the_rest_only(server, cache):
    server.manner = "cut"
    for _ in range(2):
        with pytest.raises(WeightsError, match="ended after"):
            fetch("model")
    server.manner = "whole"
    assert fetch("model").read_bytes() == CONTENT
    assert [had for _, had in server.asked] == [None, "bytes=1000-", "bytes=2000-"]


def test_a_server_without_ranges_sends_it_again(server, cache):
    cache.mkdir(parents=True)
    (cache / f"{FILE}.part").write_bytes(CONTENT[:5000])
    server.manner = "no ranges"
    assert fetch("model").read_bytes() == CONTENT
    assert server.asked[0][1] == "bytes=5000-"


def test_a_part_that_is_complete_but_never_got_its_name(server, cache):
    cache.mkdir(parents=True)
    (cache / f"{FILE}.part").write_bytes(CONTENT)
    assert fetch("model").read_bytes() == CONTENT


def test_a_wrong_part_is_dropped(server, cache):
    cache.mkdir(parents=True)
    (cache / f"{FILE}.part").write_bytes(b"another file")
    with pytest.raises(WeightsError, match="another SHA-256"):
        fetch("model")
    assert fetch("model").read_bytes() == CONTENT


def test_nobody_listens(server, cache, monkeypatch):
    monkeypatch.setenv("DETRLIB_WEIGHTS_URL", "http://127.0.0.1:1")
    with pytest.raises(WeightsError, match=rf"no connection .*refused.*{cache}"):
        fetch("model")


def test_a_file_put_there_by_hand_is_taken_if_it_is_the_right_one(server, cache):
    cache.mkdir(parents=True)
    (cache / FILE).write_bytes(CONTENT)
    assert fetch("model") == cache / FILE and server.asked == ()
    (cache / FILE).write_bytes(CONTENT[:-1])
    with pytest.raises(WeightsError, match=f"{FILE} is not model"):
        fetch("model")


def test_a_cache_that_cannot_be_written(server, cache, tmp_path):
    (tmp_path / "torch").write_text("a file where the folder should be")
    with pytest.raises(WeightsError, match=rf"{cache}.*TORCH_HOME"):
        fetch("model")


def test_several_at_once_share_one_download(server, cache):
    found = []
    threads = [threading.Thread(target=lambda: found.append(fetch("model").read_bytes())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [CONTENT] * 4 and len(server.asked) == 1


def test_names_say_what_they_stand_for():
    assert all(name in published.file for name, published in weights.PUBLISHED.items())
    assert [name for name, published in weights.PUBLISHED.items() if published.settings] == [
        "detr-r50-dc5",
        "detr-r101-dc5",
    ]
    for name in weights.ELSEWHERE:
        with pytest.raises(WeightsError, match=r"github\.com.*detrlib import FILE"):
            fetch(name)


def test_the_cache_is_that_of_torch_hub(server, cache):
    assert fetch("model").parent == cache
    assert str(cache.parent) == torch.hub.get_dir()
