"""Shards over http and https: one request each, and nothing taken for whole that is not.

A body that ends before its `Content-Length`, an answer other than 200, a login page: each is an
error. A body without a length is whole if the tar in it is: a tar says where it ends. Users and
passwords in a URL are sent to its own server only, and never shown.
"""

from __future__ import annotations

import base64
import http.client
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import IO, cast
from urllib.parse import SplitResult, unquote, urlsplit, urlunsplit

from streaming_balance.errors import ConfigError, ShardError
from streaming_balance.stream.shown import without_secrets

MAX_REDIRECTS = 5

_OK = 200
_MAX_LENGTH_DIGITS = 20  # 2^64 has as many
_WAYS_OUT = {
    401: "A login is needed: write it into the URL, or fetch the shard by a program with pipe:.",
    403: "Access is refused: has a signed URL expired?",
    404: "There is no such shard: check the URL and the range of numbers in it.",
    206: "Only a part was sent, though the whole was asked for: is a proxy in between?",
}


class WebStream:
    """The body of one answer.

    Args:
        url: http or https; `user:password@` before the host is sent as basic authentication.
        timeout_seconds: longest silence of the server.

    Raises:
        ConfigError: the URL is none.
        ShardError: the server cannot be reached, or answers with anything but the bytes.
    """

    def __init__(self, url: str, *, timeout_seconds: float) -> None:
        self._name = without_secrets(url)
        self._timeout_seconds = timeout_seconds
        self._response = self._open(_request(url))
        try:
            self.size = self._checked_length()
        except ShardError:
            self._response.close()
            raise
        self._received = 0

    def read(self, count: int) -> bytes:
        """Give exactly `count` bytes; fewer only where the whole body was received.

        Raises:
            ShardError: the body is shorter than announced, or the connection broke.
        """
        found = self._receive(self._response.read, count)
        if len(found) < count:
            parts = [found]
            missing = count - len(found)
            while missing and (found := self._receive(self._response.read, missing)):
                parts.append(found)
                missing -= len(found)
            return b"".join(parts)
        return found

    def read_some(self, count: int) -> bytes:
        """Give 1 to `count` bytes; none only where the whole body was received.

        Raises:
            ShardError: the body is shorter than announced, or the connection broke.
        """
        return self._receive(self._response.read1, count)

    def close(self) -> None:
        """Close the connection. May be called twice."""
        self._response.close()

    def _open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        """Send the request and give the answer, whatever its status."""
        opener = urllib.request.OpenerDirector()
        for handler in (
            urllib.request.ProxyHandler(),
            urllib.request.HTTPHandler(),
            urllib.request.HTTPSHandler(),
            urllib.request.HTTPErrorProcessor(),
            urllib.request.HTTPDefaultErrorHandler(),
            _Redirects(),
        ):
            opener.add_handler(handler)
        try:
            response = opener.open(request, timeout=self._timeout_seconds)
        except urllib.error.HTTPError as error:
            with error:
                raise self._refused(error.code, error.reason) from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise ShardError(
                f"{self._name} cannot be fetched: {without_secrets(str(reason))}."
            ) from None

        return cast(http.client.HTTPResponse, response)

    def _checked_length(self) -> int | None:
        """Judge status and headers; give how many bytes are announced."""
        if self._response.status != _OK:
            raise self._refused(self._response.status, self._response.reason)
        headers = self._response.headers
        if headers.get_content_type() == "text/html":
            raise ShardError(
                f"{self._name} answers with a web page (text/html), not with a tar: is a login "
                "needed, or is this the address of a page about the file?"
            )
        length = headers.get("Content-Length")
        if length is None or self._response.chunked:
            return None
        if not length.strip().isdecimal() or len(length) > _MAX_LENGTH_DIGITS:
            raise ShardError(f"{self._name} answers with Content-Length {length[:40]!r}.")
        return int(length)

    def _receive(self, receive: Callable[[int], bytes], count: int) -> bytes:
        """Receive once; at the end, check that all that was announced has come."""
        try:
            found = receive(count)
        except TimeoutError as error:
            raise ShardError(
                f"{self._name} sent nothing for {self._timeout_seconds:g} s after byte "
                f"{self._received:,}: the connection was given up."
            ) from error
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise ShardError(
                f"{self._name} broke off after byte {self._received:,}: {error}. Read it again."
            ) from error
        self._received += len(found)
        if not found and self.size is not None and self._received != self.size:
            raise ShardError(
                f"{self._name} ended after {self._received:,} of {self.size:,} bytes: the body is "
                "short. Read it again."
            )
        return found

    def _refused(self, status: int, reason: str) -> ShardError:
        """Say which answer came, and what to do."""
        way_out = _WAYS_OUT.get(status, "Ask whoever runs the server, or try later.")
        reason = without_secrets(reason)
        return ShardError(f"{self._name} answers {status} ({reason}), not 200. {way_out}")


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows few redirects, only over http or https, and never from https to http."""

    max_redirections = MAX_REDIRECTS

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        """Make the next request; a login goes along only to the server it was meant for."""
        old, new = urlsplit(req.full_url), urlsplit(newurl)
        if new.scheme not in ("http", "https") or (old.scheme, new.scheme) == ("https", "http"):
            raise urllib.error.HTTPError(
                req.full_url, code, f"redirect from {old.scheme} to {new.scheme}", headers, fp
            )
        if "@" in new.netloc:
            raise urllib.error.HTTPError(req.full_url, code, "redirect to a login", headers, fp)
        request = super().redirect_request(req, fp, code, msg, headers, newurl)
        login = req.unredirected_hdrs.get("Authorization")
        if request is not None and login and (old.scheme, old.netloc) == (new.scheme, new.netloc):
            request.add_unredirected_header("Authorization", login)
        return request


def _request(url: str) -> urllib.request.Request:
    """Make the request, with the login out of the URL and in its header."""
    shown = without_secrets(url)
    if not url.isascii() or not url.isprintable() or " " in url:
        raise ConfigError(f"urls has {shown!r}: write spaces and foreign letters in it as %XX.")
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise ConfigError(f"urls has {shown!r}, which is no URL: {error}.") from None
    try:
        port = parts.port
    except ValueError:
        raise ConfigError(f"urls has {shown!r}, whose port is no number up to 65535.") from None
    if not parts.hostname:
        raise ConfigError(f"urls has {shown!r}, which names no host.")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    place = host if port is None else f"{host}:{port}"
    bare = urlunsplit(SplitResult(parts.scheme, place, parts.path, parts.query, ""))
    request = urllib.request.Request(bare, headers={"Accept-Encoding": "identity"})
    if parts.username is not None:
        login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
        encoded = base64.b64encode(login.encode()).decode("ascii")
        request.add_unredirected_header("Authorization", f"Basic {encoded}")
    return request
