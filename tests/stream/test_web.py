"""A web server's answer is a shard only if all of it came; a real server on loopback misbehaves."""

from __future__ import annotations

import base64
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from streaming_balance.errors import ConfigError, ShardError
from streaming_balance.stream.rules import TarRules
from streaming_balance.stream.sources import expand
from streaming_balance.stream.tarstream import SampleReader
from tests.stream.tars import COHORT, contents, read_all, tar_of, zipped

CONTENT = tar_of(COHORT)
Answer = Callable[[BaseHTTPRequestHandler], None]


@contextmanager
def serving(answer: Answer) -> Iterator[str]:
    """A server on loopback that answers every request in one way; gives its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            answer(self)

        def log_message(self, format: str, *values: object) -> None:  # noqa: A002 - its name there
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def reply(
    request: BaseHTTPRequestHandler, body: bytes, status: int = 200, **headers: str | None
) -> None:
    """Answer with a body and headers; a header of None is left out."""
    request.send_response(status)
    for name, value in {"Content_Length": str(len(body)), **headers}.items():
        if value is not None:
            request.send_header(name.replace("_", "-"), value)
    request.end_headers()
    request.wfile.write(body)


def chunked(request: BaseHTTPRequestHandler, body: bytes, *, end: bool, **headers: str) -> None:
    """Answer in chunks, with or without the last one that says it is over."""
    request.protocol_version = "HTTP/1.1"
    request.send_response(200)
    request.send_header("Transfer-Encoding", "chunked")
    for name, value in headers.items():
        request.send_header(name.replace("_", "-"), value)
    request.end_headers()
    for start in range(0, len(body), 1000):
        part = body[start : start + 1000]
        request.wfile.write(b"%x\r\n%s\r\n" % (len(part), part))
    if end:
        request.wfile.write(b"0\r\n\r\n")


SOUND: dict[str, Answer] = {
    "with a length": lambda request: reply(request, CONTENT),
    "without a length": lambda request: reply(request, CONTENT, Content_Length=None),
    "in chunks": lambda request: chunked(request, CONTENT, end=True),
    "in chunks with a length besides": lambda request: chunked(
        request, CONTENT, end=True, Content_Length="5"
    ),
    "gzip": lambda request: reply(request, zipped(CONTENT)),
    "gzip as an encoding": lambda request: reply(
        request, zipped(CONTENT), Content_Encoding="gzip", Content_Type="application/x-tar"
    ),
}


@pytest.mark.parametrize("answer", SOUND.values(), ids=SOUND)
def test_whole_bodies_are_read(answer: Answer) -> None:
    with serving(answer) as url:
        samples, counts = read_all(f"{url}/train.tar")
    assert contents(samples) == COHORT
    assert counts.bytes_read == len(CONTENT)
    assert samples[0].url == f"{url}/train.tar"
    assert samples[0].place is None


def test_braces_in_urls_are_expanded() -> None:
    asked = []

    def answer(request: BaseHTTPRequestHandler) -> None:
        asked.append(request.path)
        reply(request, tar_of({f"{request.path[1:-4]}.cls": b"1"}))

    with serving(answer) as url:
        samples, _ = read_all(url + "/{a,b}-{08..10}.tar")
    assert [sample.key for sample in samples] == ["a-08", "a-09", "a-10", "b-08", "b-09", "b-10"]
    assert asked == [f"/{sample.key}.tar" for sample in samples]


@pytest.mark.parametrize("length", [0, 1, 511, 512, 4096, len(CONTENT) - 1024, len(CONTENT) - 1])
def test_a_body_shorter_than_announced_is_an_error(length: int) -> None:
    announced = str(len(CONTENT))
    with (
        serving(lambda request: reply(request, CONTENT[:length], Content_Length=announced)) as url,
        pytest.raises(ShardError, match=f"ended after {length:,} of {len(CONTENT):,} bytes"),
    ):
        read_all(f"{url}/train.tar")


@pytest.mark.parametrize("length", [0, 511, 512, 2560, 4096, 6144])
def test_a_short_body_without_a_length_is_found_by_the_end_its_tar_lacks(length: int) -> None:
    with (
        serving(lambda request: reply(request, CONTENT[:length], Content_Length=None)) as url,
        pytest.raises(ShardError, match=r"was cut|is empty"),
    ):
        read_all(f"{url}/train.tar")


def test_chunks_that_stop_are_an_error() -> None:
    with (
        serving(lambda request: chunked(request, CONTENT[:3000], end=False)) as url,
        pytest.raises(ShardError, match=r"train\.tar broke off after byte 3,000"),
    ):
        read_all(f"{url}/train.tar")
    with (
        serving(lambda request: chunked(request, CONTENT, end=False)) as url,
        pytest.raises(ShardError, match="broke off"),
    ):
        read_all(f"{url}/train.tar")


def test_a_connection_that_is_reset_is_an_error() -> None:
    def answer(request: BaseHTTPRequestHandler) -> None:
        reply(request, CONTENT[:3000], Content_Length=str(len(CONTENT)))
        request.wfile.flush()
        # Closing with this option set sends a reset instead of an end.
        linger = struct.pack("ii", 1, 0)
        request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        request.connection.close()

    with (
        serving(answer) as url,
        pytest.raises(ShardError, match=r"broke off|cannot be fetched|ended"),
    ):
        read_all(f"{url}/train.tar")


def test_a_silent_server_is_given_up() -> None:
    done = threading.Event()

    def answer(request: BaseHTTPRequestHandler) -> None:
        reply(request, CONTENT[:3000], Content_Length=str(len(CONTENT)))
        request.wfile.flush()
        done.wait(60)

    with serving(answer) as url:
        reader = SampleReader(expand(f"{url}/train.tar"), timeout_seconds=0.2)
        with pytest.raises(ShardError, match=r"sent nothing for 0.2 s after byte 3,000"):
            list(reader)
        done.set()


@pytest.mark.parametrize(
    ("status", "way_out"),
    [(404, "no such shard"), (403, "expired"), (401, "login"), (500, "try later"), (204, "try")],
)
def test_another_status_is_an_error(status: int, way_out: str) -> None:
    with (
        serving(lambda request: reply(request, CONTENT, status)) as url,
        pytest.raises(ShardError, match=rf"train\.tar answers {status} .*not 200.*{way_out}"),
    ):
        read_all(f"{url}/train.tar")


def test_a_part_that_nobody_asked_for_is_an_error() -> None:
    place = f"bytes 0-4095/{len(CONTENT)}"
    with (
        serving(lambda request: reply(request, CONTENT[:4096], 206, Content_Range=place)) as url,
        pytest.raises(ShardError, match=r"answers 206 .*Only a part was sent"),
    ):
        read_all(f"{url}/train.tar")


def test_a_login_page_is_called_what_it_is() -> None:
    page = b"<!DOCTYPE html><title>Sign in</title>".ljust(2048)
    with (
        serving(
            lambda request: reply(request, page, Content_Type="text/html; charset=utf-8")
        ) as url,
        pytest.raises(ShardError, match="answers with a web page"),
    ):
        read_all(f"{url}/train.tar")
    with (
        serving(lambda request: reply(request, page)) as url,
        pytest.raises(ShardError, match="no tar but a web page"),
    ):
        read_all(f"{url}/train.tar")


def test_a_length_that_is_none_is_an_error() -> None:
    with (
        serving(lambda request: reply(request, CONTENT, Content_Length="many")) as url,
        pytest.raises(ShardError, match="Content-Length 'many'"),
    ):
        read_all(f"{url}/train.tar")


def test_redirects_are_followed_up_to_five() -> None:
    def answer(request: BaseHTTPRequestHandler) -> None:
        left = int(request.path.strip("/"))
        if left:
            reply(request, b"", 302, Location=f"/{left - 1}")
        else:
            reply(request, CONTENT)

    with serving(answer) as url:
        assert contents(read_all(f"{url}/4")[0]) == COHORT
        with pytest.raises(ShardError, match="answers 302"):
            read_all(f"{url}/40")


@pytest.mark.parametrize(
    "target", ["file:///etc/passwd", "ftp://host/a.tar", "http://me:hunter2@host/", "gopher://x/"]
)
def test_redirects_that_lead_elsewhere_are_refused(target: str) -> None:
    with (
        serving(lambda request: reply(request, b"", 302, Location=target)) as url,
        pytest.raises(ShardError, match="answers 302") as caught,
    ):
        read_all(f"{url}/train.tar")
    assert "hunter2" not in str(caught.value)


def test_a_login_goes_to_its_own_server_only() -> None:
    heard: list[tuple[str, str | None]] = []

    def other(request: BaseHTTPRequestHandler) -> None:
        heard.append(("other", request.headers["Authorization"]))
        reply(request, CONTENT)

    def own(request: BaseHTTPRequestHandler) -> None:
        heard.append(("own", request.headers["Authorization"]))
        step = {"/a.tar": "/b.tar", "/b.tar": f"{other_url}/c.tar"}[request.path[:6]]
        reply(request, b"", 307, Location=step)

    with serving(other) as other_url, serving(own) as url:
        secret = url.replace("http://", "http://me:hunt%40er2@")
        samples, _ = read_all(f"{secret}/a.tar?token=hunter2")
    login = "Basic " + base64.b64encode(b"me:hunt@er2").decode()
    assert heard == [("own", login), ("own", login), ("other", None)]
    assert samples[0].url == f"{url}/a.tar?..."


def test_no_message_shows_a_secret() -> None:
    def answer(request: BaseHTTPRequestHandler) -> None:
        reply(request, b"", 500)

    with serving(answer) as url:
        secret = url.replace("http://", "http://me:hunter2@") + "/a.tar?token=hunter2"
        with pytest.raises(ShardError) as caught:
            read_all(secret)
        _, counts = read_all(secret, TarRules(on_error="skip"))
    closed = secret  # nobody listens there any more
    with pytest.raises(ShardError, match=r"cannot be fetched: .*refused") as refused:
        read_all(closed)
    texts = [str(caught.value), str(refused.value), counts.skips[0].reason, counts.skips[0].url]
    assert all("hunter2" not in text for text in texts)


@pytest.mark.parametrize(
    "url",
    [
        "http://",
        "http://host:port/a.tar",
        "http://host/a b.tar",
        "http://hôst/a.tar",
        "http://[::1/a.tar",
    ],
)
def test_urls_that_are_none_are_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="urls has"):
        read_all(url)


def test_a_shard_that_breaks_is_left_out_and_the_next_goes_on() -> None:
    def answer(request: BaseHTTPRequestHandler) -> None:
        body = tar_of({f"{request.path[1]}{number}.cls": b"1" for number in range(5)})
        sent = body[:2048] if request.path == "/b.tar" else body
        reply(request, sent, Content_Length=str(len(body)))

    with serving(answer) as url:
        samples, counts = read_all(url + "/{a,b,c}.tar", TarRules(on_error="skip"))
    assert [sample.key for sample in samples if sample.key[0] != "b"] == [
        *(f"a{number}" for number in range(5)),
        *(f"c{number}" for number in range(5)),
    ]
    assert (counts.shards_read, counts.shards_lost) == (2, 1)
    (skip,) = counts.skips
    assert skip.stop == len(tar_of({f"b{number}.cls": b"1" for number in range(5)}))


def test_a_length_of_more_digits_than_any_file_has_is_an_error() -> None:
    with (
        serving(lambda request: reply(request, CONTENT, Content_Length="9" * 5000)) as url,
        pytest.raises(ShardError, match="Content-Length '9999"),
    ):
        read_all(f"{url}/train.tar")


def test_a_chunk_of_less_than_nothing_is_an_error() -> None:
    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("Transfer-Encoding", "chunked")
        request.end_headers()
        request.wfile.write(b"-5\r\n" + CONTENT)

    with serving(answer) as url, pytest.raises(ShardError, match="broke off after byte 0"):
        read_all(f"{url}/train.tar")
