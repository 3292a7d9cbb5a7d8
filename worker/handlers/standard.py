"""`send_email` and `http_request`.

What they need of the standard library is imported when they run: each child process that never
sends a mail spares its memory.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal
from urllib.parse import parse_qs, unquote, urljoin, urlsplit

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from worker.api import Abort, JobContext, Retry, job

if TYPE_CHECKING:
    import http.client
    import smtplib

_SMTP_TIMEOUT_SECONDS: Final = 30.0
_SMTP_PORTS: Final = {"smtp": 25, "smtp+starttls": 587, "smtps": 465}
_DEFAULT_SENDER: Final = "jobsvc@localhost"
_BODY_BYTES_MAX: Final = 256 * 1024
_REDIRECTS_MAX: Final = 5
_RETRY_AFTER_SECONDS_MAX: Final = 3600
_INTERIM_MAX: Final = 100

# One mailbox without display name, quoting or comments, and nothing unseen: nothing that could end
# a header. No question mark either: no reader can take it for an encoded word (RFC 2047).
_MAILBOX_PART: Final = (
    r"[^\x00-\x20\x7f-\xa0\u1680\u2000-\u200f\u2028-\u202f\u205f-\u206f\u3000\ufeff"
    r'<>(),:;?@"\\\[\]]+'
)
_MAILBOX: Final = f"^{_MAILBOX_PART}@{_MAILBOX_PART}$"
# Without controls and without what some reader takes for the end of a line.
_ONE_LINE: Final = r"^[^\x00-\x1f\x7f-\x9f\u2028\u2029]*$"
# A subject that can be written as it is; any other is written as encoded words.
_PLAIN_SUBJECT_CHARACTERS_MAX: Final = 69  # with its name a line of 78
# No user name, no backslash, no space: nothing that two parsers could read as different hosts.
_URL: Final = r"^https?://([A-Za-z0-9._-]+|\[[0-9A-Fa-f:.]+\])(:[0-9]{1,5})?([/?#][!-~]*)?$"
_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_HEADER_VALUE = re.compile(r"[\t\x20-\x7e\xa0-\xff]*")
# Set by the client itself, or they would say another host or length than the request has.
_HEADERS_REFUSED: Final = frozenset({"host", "content-length", "transfer-encoding", "connection"})


def _setting(name: str) -> str | None:
    """A setting from the environment, or from the file that `NAME_FILE` names."""
    file = os.environ.get(f"{name}_FILE")
    if file:
        return Path(file).read_text(encoding="utf-8").strip() or None
    return os.environ.get(name) or None


class EmailPayload(BaseModel):
    """A plain-text mail to one recipient."""

    model_config = ConfigDict(extra="forbid")

    recipient_email: str = Field(pattern=_MAILBOX, max_length=254)
    subject: str = Field(pattern=_ONE_LINE, max_length=998)
    body: str
    sender: str | None = Field(default=None, pattern=_MAILBOX, max_length=254)


@job("send_email")
def send_email(payload: EmailPayload, ctx: JobContext) -> dict[str, str]:
    """Sends a mail over SMTP and answers with its message id."""
    smtp_url = _setting("JOBSVC_SMTP_URL")
    server = None if smtp_url is None else _SmtpServer.parse(smtp_url)
    sender = payload.sender or (server and server.mailbox) or _DEFAULT_SENDER
    # The same in every attempt, so that a mail server or reader can drop a repetition.
    unique = hashlib.sha256(ctx.idempotency_token.encode()).hexdigest()[:32]
    message_id = f"<{unique}@{sender.rpartition('@')[2]}>"
    message = _message(payload, sender, message_id)
    directory = _setting("JOBSVC_MAIL_DIR")
    if server is not None:
        _send(message, sender, payload.recipient_email, server)
    elif directory is not None:
        _write(message, Path(directory) / f"{ctx.job_id}.eml")
    else:
        raise Abort("no mail server is configured: set JOBSVC_SMTP_URL")
    return {"message_id": message_id}


@dataclass(frozen=True, slots=True)
class _SmtpServer:
    host: str
    port: int
    tls: bool
    starttls: bool
    user: str | None
    password: str = field(repr=False)

    @classmethod
    def parse(cls, url: str) -> _SmtpServer:
        """Raises Abort, without the URL, which may hold a password."""
        try:
            parts = urlsplit(url)
            options = {name: values[-1] for name, values in parse_qs(parts.query).items()}
            starttls = options.pop("starttls", "0")
            valid = (
                parts.scheme in ("smtp", "smtps")
                and parts.hostname
                and starttls in ("0", "1")
                and not options
            )
            port = parts.port
        except ValueError:
            valid = False
        if not valid:
            raise Abort("JOBSVC_SMTP_URL is not smtp[s]://[user:password@]host[:port][?starttls=1]")
        scheme = "smtp+starttls" if parts.scheme == "smtp" and starttls == "1" else parts.scheme
        return cls(
            host=parts.hostname or "",
            port=port or _SMTP_PORTS[scheme],
            tls=scheme == "smtps",
            starttls=scheme == "smtp+starttls",
            user=None if parts.username is None else unquote(parts.username),
            password=unquote(parts.password or ""),
        )

    @property
    def mailbox(self) -> str | None:
        """The user name where it is a mailbox, and so a sender that the server will take."""
        return self.user if self.user and re.fullmatch(_MAILBOX, self.user) else None


def _message(payload: EmailPayload, sender: str, message_id: str) -> bytes:
    """The mail, its lines ended by LF.

    The headers are written here: EmailMessage reads a value before it sets it, and what it finds
    encoded in there, a line's end too, gets on the wire.
    """
    from email.message import EmailMessage
    from email.utils import formatdate

    body = EmailMessage()
    body.set_content(payload.body)
    headers = {
        "Message-ID": message_id,
        "Date": formatdate(),
        "From": sender,
        "To": payload.recipient_email,
        "Subject": _subject(payload.subject),
    }
    head = "".join(f"{name}: {value}\n" for name, value in headers.items())
    return head.encode() + body.as_bytes()


def _subject(text: str) -> str:
    from email.header import Header

    plain = text.isascii() and "=?" not in text and text == text.strip()
    if plain and len(text) <= _PLAIN_SUBJECT_CHARACTERS_MAX:
        return text
    return Header(text, "utf-8", header_name="Subject").encode()


def _send(message: bytes, sender: str, recipient: str, server: _SmtpServer) -> None:
    """Raises Abort where repeating cannot help, else what smtplib raises."""
    import smtplib

    ascii_only = sender.isascii() and recipient.isascii()
    options = () if ascii_only else ("SMTPUTF8", "BODY=8BITMIME")
    try:
        with _connection(server) as smtp:
            smtp.sendmail(sender, [recipient], message.replace(b"\n", b"\r\n"), options)
    except smtplib.SMTPRecipientsRefused as error:
        code, text = next(iter(error.recipients.values()))
        _raise_smtp(code, text, error)
    except smtplib.SMTPResponseException as error:
        _raise_smtp(error.smtp_code, error.smtp_error, error)
    except smtplib.SMTPNotSupportedError as error:
        raise Abort(f"the mail server cannot do this: {error}") from error


def _raise_smtp(code: int, text: bytes | str, error: Exception) -> None:
    if isinstance(text, bytes):
        text = text.decode(errors="replace")
    if 500 <= code < 600:
        raise Abort(f"the mail server refused for good: {code} {text}") from error
    raise error


@contextmanager
def _connection(server: _SmtpServer) -> Iterator[smtplib.SMTP]:
    import smtplib
    import ssl

    smtp: smtplib.SMTP
    if server.tls:
        smtp = smtplib.SMTP_SSL(
            server.host,
            server.port,
            timeout=_SMTP_TIMEOUT_SECONDS,
            context=ssl.create_default_context(),
        )
    else:
        smtp = smtplib.SMTP(server.host, server.port, timeout=_SMTP_TIMEOUT_SECONDS)
    try:
        if server.starttls:
            smtp.starttls(context=ssl.create_default_context())
        if server.user is not None:
            smtp.login(server.user, server.password)
        yield smtp
        # The mail is accepted: a failure to say goodbye must not have it sent again.
        with suppress(smtplib.SMTPException, OSError):
            smtp.quit()
    finally:
        smtp.close()


def _write(message: bytes, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
        file.write(message)
    Path(file.name).replace(path)


class HttpPayload(BaseModel):
    """A request to one of the allowed hosts."""

    model_config = ConfigDict(extra="forbid")

    url: str = Field(pattern=_URL, max_length=8000)
    method: Literal["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"] = "GET"
    headers: dict[str, str] = Field(default_factory=dict, max_length=100)
    body: str | None = None
    json_body: Any = Field(default=None, alias="json")
    timeout: float = Field(default=30.0, gt=0, le=300)

    @field_validator("headers")
    @classmethod
    def _check_headers(cls, headers: dict[str, str]) -> dict[str, str]:
        for name, value in headers.items():
            if not _HEADER_NAME.fullmatch(name) or not _HEADER_VALUE.fullmatch(value):
                raise ValueError(f"not an HTTP header: {name!r}")
            if name.lower() in _HEADERS_REFUSED:
                raise ValueError(f"the header {name} cannot be set")
        return headers

    @model_validator(mode="after")
    def _check_body(self) -> HttpPayload:
        if self.body is not None and "json_body" in self.model_fields_set:
            raise ValueError("body and json exclude each other")
        return self


@job("http_request")
def http_request(payload: HttpPayload) -> dict[str, Any]:
    """Makes an HTTP request to an allowed host; a status of 400 and above is a failure."""
    url, method, data, headers = payload.url, payload.method, *_content(payload)
    for _ in range(_REDIRECTS_MAX + 1):
        with _exchange(url, method, data, headers, payload.timeout) as response:
            location = response.getheader("Location")
            if response.status not in (301, 302, 303, 307, 308) or location is None:
                return _answer(response)
        url = _redirected(url, location)
        if response.status in (301, 302, 303) and method not in ("GET", "HEAD"):
            method, data = "GET", None
            headers = {k: v for k, v in headers.items() if k.lower() != "content-type"}
    raise Abort(f"more than {_REDIRECTS_MAX} redirects")


@contextmanager
def _exchange(
    url: str, method: str, data: bytes | None, headers: dict[str, str], timeout_seconds: float
) -> Iterator[http.client.HTTPResponse]:
    import http.client
    import ssl

    parts = urlsplit(url)
    host, port = _allowed(url)
    connection: http.client.HTTPConnection
    if parts.scheme == "https":
        connection = http.client.HTTPSConnection(
            host, port, timeout=timeout_seconds, context=ssl.create_default_context()
        )
    else:
        connection = http.client.HTTPConnection(host, port, timeout=timeout_seconds)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    with closing(connection):
        connection.request(method, target, body=data, headers=headers)
        with connection.getresponse() as response:
            _pass_over_interim(response)
            yield response


def _pass_over_interim(response: http.client.HTTPResponse) -> None:
    """http.client passes over 100 alone, and takes 103 for the answer."""
    for _ in range(_INTERIM_MAX):
        if not 100 <= response.status < 200 or response.status == HTTPStatus.SWITCHING_PROTOCOLS:
            return
        response.headers = None  # type: ignore[assignment]  # as begin() has it
        response.begin()
    raise Retry(f"the server sent more than {_INTERIM_MAX} interim answers")


def _content(payload: HttpPayload) -> tuple[bytes | None, dict[str, str]]:
    import json

    headers = dict(payload.headers)
    if "json_body" in payload.model_fields_set:
        if not any(name.lower() == "content-type" for name in headers):
            headers["Content-Type"] = "application/json"
        return json.dumps(payload.json_body).encode(), headers
    return None if payload.body is None else payload.body.encode(), headers


def _allowed(url: str) -> tuple[str, int]:
    """Host and port of `url`. Raises Abort unless JOBSVC_HTTP_ALLOWED_HOSTS has them."""
    if not re.fullmatch(_URL, url):
        raise Abort("not a plain http or https URL")
    parts = urlsplit(url)
    host = (parts.hostname or "").lower()
    try:
        port = parts.port or (443 if parts.scheme == "https" else 80)
    except ValueError as error:
        raise Abort("the URL's port is out of range") from error
    shown = f"[{host}]" if ":" in host else host
    entries = (_setting("JOBSVC_HTTP_ALLOWED_HOSTS") or "").lower().split(",")
    if {shown, f"{shown}:{port}"}.isdisjoint(entry.strip() for entry in entries):
        raise Abort(f"{shown}:{port} is not in JOBSVC_HTTP_ALLOWED_HOSTS")
    return host, port


def _redirected(url: str, location: str) -> str:
    target = urljoin(url, location)
    here, there = urlsplit(url), urlsplit(target)
    if here.hostname != there.hostname or (here.scheme, there.scheme) == ("https", "http"):
        raise Abort("the server redirects to another host, which is not followed")
    return target


def _answer(response: http.client.HTTPResponse) -> dict[str, Any]:
    status = response.status
    if status >= 400:
        reason = f"the server answered {status} {response.reason}"
        if status in (408, 425, 429) or status >= 500:
            after = response.getheader("Retry-After", "")
            seconds = int(after) if after.isascii() and after.isdigit() else None
            if seconds is not None:
                raise Retry(reason, after=min(seconds, _RETRY_AFTER_SECONDS_MAX))
            raise Retry(reason)
        raise Abort(reason)
    if status < 200:
        raise Abort(f"the server answered {status} {response.reason}, which was not asked for")
    body = response.read(_BODY_BYTES_MAX + 1)
    truncated = len(body) > _BODY_BYTES_MAX
    if response.length and not truncated:  # of what was announced that is still to come
        raise Retry(f"the answer ended {response.length} bytes too early")
    return {
        "status": status,
        "headers": {name.lower(): _clean(value) for name, value in response.getheaders()},
        "body": _clean(body[:_BODY_BYTES_MAX].decode(errors="replace")),
        "truncated": truncated,
    }


def _clean(text: str) -> str:
    """A result has no NUL, whatever a server sends."""
    return text.replace("\0", "\ufffd")
