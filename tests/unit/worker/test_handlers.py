"""The shipped handlers: real SMTP and HTTP on the loopback."""

from __future__ import annotations

import asyncio
import email
import email.header
import email.policy
import json
import re
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from email.message import EmailMessage
from http.client import HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from aiosmtpd.smtp import SMTP, AuthResult, Envelope, LoginPassword, Session
from pydantic import ValidationError

from jobsvc.core.attempts import Progress
from worker import Abort, JobCancelled, JobContext, Retry
from worker.handlers import demo
from worker.handlers.standard import EmailPayload, HttpPayload, http_request, send_email

MAIL = EmailPayload(recipient_email="test@example.com", subject="Hello", body="It works.\n")


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SMTP_URL", "MAIL_DIR", "HTTP_ALLOWED_HOSTS"):
        monkeypatch.delenv(f"JOBSVC_{name}", raising=False)
        monkeypatch.delenv(f"JOBSVC_{name}_FILE", raising=False)


@dataclass
class Mailbox:
    """An SMTP server's half of the tests: what it got, and what it answers."""

    url: str = ""
    mails: list[EmailMessage] = field(default_factory=list)
    contents: list[bytes] = field(default_factory=list)
    senders: list[str] = field(default_factory=list)
    recipients: list[str] = field(default_factory=list)
    logins: list[tuple[bytes, bytes]] = field(default_factory=list)
    to_rcpt: str = ""
    to_data: str = "250 OK"
    to_quit: str = ""

    async def handle_RCPT(  # noqa: N802 - aiosmtpd finds it by this name
        self, server: SMTP, session: Session, envelope: Envelope, address: str, options: list[str]
    ) -> str:
        if self.to_rcpt:
            return self.to_rcpt
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(  # noqa: N802
        self, server: SMTP, session: Session, envelope: Envelope
    ) -> str:
        if self.to_data.startswith("250"):
            content = envelope.content
            assert isinstance(content, bytes)
            self.mails.append(email.message_from_bytes(content, policy=email.policy.default))
            self.contents.append(content)
            self.senders.append(envelope.mail_from or "")
            self.recipients += envelope.rcpt_tos
        return self.to_data

    async def handle_QUIT(  # noqa: N802
        self, server: SMTP, session: Session, envelope: Envelope
    ) -> str:
        return self.to_quit or "221 Bye"

    def log_in(
        self, server: SMTP, session: Session, envelope: Envelope, mechanism: str, data: Any
    ) -> AuthResult:
        assert isinstance(data, LoginPassword)
        self.logins.append((data.login, data.password))
        return AuthResult(success=data.password == b"p@ss:word/", handled=False)


async def end_connections() -> None:
    connections = asyncio.all_tasks() - {asyncio.current_task()}
    for connection in connections:
        connection.cancel()
    await asyncio.gather(*connections, return_exceptions=True)
    await asyncio.sleep(0)  # for transports that are closing


@pytest.fixture
def mailbox(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mailbox]:
    box = Mailbox()
    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(
        loop.create_server(
            lambda: SMTP(
                box,
                authenticator=box.log_in,
                auth_require_tls=False,
                enable_SMTPUTF8=True,
                loop=loop,
            ),
            host="127.0.0.1",
            port=0,
        )
    )
    box.url = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    monkeypatch.setenv("JOBSVC_SMTP_URL", f"smtp://{box.url}")
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield box
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    server.close()
    loop.run_until_complete(end_connections())
    loop.close()


def test_a_mail_is_sent(mailbox: Mailbox) -> None:
    result = send_email(MAIL, JobContext.for_testing())
    (mail,) = mailbox.mails
    assert mailbox.recipients == ["test@example.com"]
    assert (mail["To"], mail["Subject"]) == ("test@example.com", "Hello")
    assert mail.get_content().replace("\r\n", "\n") == "It works.\n"
    assert result == {"message_id": mail["Message-ID"]}
    assert re.fullmatch(r"<[0-9a-f]{32}@localhost>", result["message_id"])


def test_the_message_id_is_the_same_in_every_attempt(mailbox: Mailbox) -> None:
    first, second, other = (
        send_email(MAIL, JobContext.for_testing(attempt=attempt, idempotency_token=token))
        for attempt, token in ((1, "a"), (2, "a"), (1, "b"))
    )
    assert first == second != other


def test_text_beyond_ascii(mailbox: Mailbox) -> None:
    mail = MAIL.model_copy(update={"subject": "Grüße 😀", "body": "Zeile ä\n" * 100})
    send_email(mail, JobContext.for_testing())
    (received,) = mailbox.mails
    assert received["Subject"] == "Grüße 😀"
    assert received.get_content().replace("\r\n", "\n") == "Zeile ä\n" * 100


@pytest.mark.parametrize(
    "subject",
    [
        "=?utf-8?q?a=0aBcc:_x=40example.org?=",
        "a =?utf-8?b?Cg==?= b",
        "=?utf-8?q?",
        " surrounded ",
        "two  spaces",
        "",
        "x" * 998,
        "word " * 199,
        "Grüße 😀 " * 100,
    ],
)
def test_a_subject_arrives_as_it_is(mailbox: Mailbox, subject: str) -> None:
    mail = EmailPayload.model_validate({**MAIL.model_dump(), "subject": subject})
    send_email(mail, JobContext.for_testing())
    ((content,), (received,)) = mailbox.contents, mailbox.mails
    head, _, _ = content.partition(b"\r\n\r\n")
    names = re.findall(rb"^([^ :][^:\r\n]*): ", head + b" ", re.MULTILINE)
    assert sorted(set(names)) == sorted(names)
    assert {*names} == {
        *(b"Message-ID", b"Date", b"From", b"To", b"Subject"),
        *(b"Content-Type", b"Content-Transfer-Encoding", b"MIME-Version"),
    }
    # Decoded once, as a reader does; EmailMessage would read what that gives once more.
    raw = email.message_from_bytes(content)["Subject"]
    assert str(email.header.make_header(email.header.decode_header(raw))) == subject
    assert received["Bcc"] is None
    assert all(len(line) <= 78 for line in head.split(b"\r\n"))


@pytest.mark.parametrize(
    "address", ["a..b@example.com", ".a.@b", "a=b'c%d{e}@x", "ü@müller.example"]
)
def test_the_envelope_has_the_addresses_of_the_payload(mailbox: Mailbox, address: str) -> None:
    change = {"recipient_email": address, "sender": address}
    send_email(EmailPayload(**{**MAIL.model_dump(), **change}), JobContext.for_testing())
    assert (mailbox.senders, mailbox.recipients) == ([address], [address])
    ((content,), (mail,)) = mailbox.contents, mailbox.mails
    assert f"\r\nFrom: {address}\r\nTo: {address}\r\n".encode() in content
    assert mail["To"] == address


def test_logging_in(mailbox: Mailbox, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"smtp://me%40example.org:p%40ss%3Aword%2F@{mailbox.url}"
    monkeypatch.setenv("JOBSVC_SMTP_URL", url)
    send_email(MAIL, JobContext.for_testing())
    assert mailbox.logins == [(b"me@example.org", b"p@ss:word/")]
    assert mailbox.mails[0]["From"] == "me@example.org"
    monkeypatch.setenv("JOBSVC_SMTP_URL", f"smtp://me:wrong@{mailbox.url}")
    with pytest.raises(Abort, match="535") as caught:
        send_email(MAIL, JobContext.for_testing())
    assert "wrong" not in str(caught.value)


def test_a_sender_of_its_own(mailbox: Mailbox) -> None:
    mail = MAIL.model_copy(update={"sender": "shop@example.net"})
    result = send_email(mail, JobContext.for_testing())
    assert mailbox.mails[0]["From"] == "shop@example.net"
    assert result["message_id"].endswith("@example.net>")


@pytest.mark.parametrize("where", ["to_rcpt", "to_data"])
def test_refusals(mailbox: Mailbox, where: str) -> None:
    setattr(mailbox, where, "550 No such user")
    with pytest.raises(Abort, match="550 No such user"):
        send_email(MAIL, JobContext.for_testing())
    setattr(mailbox, where, "451 Try again later")
    with pytest.raises(Exception, match="451") as caught:
        send_email(MAIL, JobContext.for_testing())
    assert not isinstance(caught.value, Abort)
    assert mailbox.mails == []


def test_a_bad_goodbye_does_not_send_it_again(mailbox: Mailbox) -> None:
    mailbox.to_quit = "421 Something broke"
    send_email(MAIL, JobContext.for_testing())
    assert len(mailbox.mails) == 1


def test_no_encryption_where_it_is_demanded(
    mailbox: Mailbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JOBSVC_SMTP_URL", f"smtp://{mailbox.url}?starttls=1")
    with pytest.raises(Abort, match="STARTTLS"):
        send_email(MAIL, JobContext.for_testing())
    assert mailbox.mails == []


def test_a_server_out_of_reach_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOBSVC_SMTP_URL", "smtp://127.0.0.1:1")
    with pytest.raises(ConnectionRefusedError):
        send_email(MAIL, JobContext.for_testing())


@pytest.mark.parametrize(
    "url", ["http://host", "smtp://", "smtp://u:secret@host:99999", "smtp://h?tls=1", "smtp://[::1"]
)
def test_a_bad_url_is_not_shown(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOBSVC_SMTP_URL", url)
    with pytest.raises(Abort, match="JOBSVC_SMTP_URL is not") as caught:
        send_email(MAIL, JobContext.for_testing())
    assert "secret" not in str(caught.value)


def test_the_url_can_be_in_a_file(
    mailbox: Mailbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "url"
    file.write_text(f"smtp://{mailbox.url}\n")
    monkeypatch.delenv("JOBSVC_SMTP_URL")
    monkeypatch.setenv("JOBSVC_SMTP_URL_FILE", str(file))
    send_email(MAIL, JobContext.for_testing())
    assert len(mailbox.mails) == 1


def test_mails_as_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "mails"
    monkeypatch.setenv("JOBSVC_MAIL_DIR", str(directory))
    result = send_email(MAIL, JobContext.for_testing(job_id="abc"))
    assert [path.name for path in directory.iterdir()] == ["abc.eml"]
    mail = email.message_from_bytes((directory / "abc.eml").read_bytes())
    assert (mail["To"], mail["Message-ID"]) == ("test@example.com", result["message_id"])


def test_no_mail_server_at_all() -> None:
    with pytest.raises(Abort, match="set JOBSVC_SMTP_URL"):
        send_email(MAIL, JobContext.for_testing())


@pytest.mark.parametrize(
    "change",
    [
        {"recipient_email": "a@b\nBcc: c@d"},
        {"recipient_email": "a@b, c@d"},
        {"recipient_email": "nobody"},
        {"recipient_email": "A <a@b>"},
        {"recipient_email": "=?utf-8?q?x?=@example.com"},
        {"recipient_email": "a@b\u2028c"},
        {"recipient_email": "a@b\u202e"},
        {"sender": "=?utf-8?q?a=0aBcc:_x?=@b"},
        {"subject": "Hello\u2028Bcc: c@d"},
        {"subject": "Hello\u2029Bcc: c@d"},
        {"subject": "Hello\u0085Bcc: c@d"},
        {"sender": "a@b\r\nX: y"},
        {"subject": "Hello\r\nBcc: c@d"},
        {"subject": "Hello\n"},
        {"cc": "c@d"},
    ],
)
def test_nothing_gets_into_the_headers(change: dict[str, str]) -> None:
    with pytest.raises(ValidationError):
        EmailPayload.model_validate({**MAIL.model_dump(), **change})


@dataclass
class Site:
    """An HTTP server that answers as the path says, and remembers the requests."""

    port: int = 0
    requests: list[tuple[str, str, dict[str, str], bytes]] = field(default_factory=list)

    def url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    site = Site()

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            headers = {name.lower(): value for name, value in self.headers.items()}
            site.requests.append((self.command, self.path, headers, body))
            status, answer_headers, answer_body = RESPONSES[self.path.partition("?")[0]](site)
            self.send_response(status)
            for name, value in answer_headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(answer_body)))
            self.end_headers()
            self.wfile.write(answer_body)

        do_GET = do_POST = do_PUT = do_DELETE = answer  # noqa: N815 - found by these names

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - its name there
            """Keep quiet."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    site.port = server.server_address[1]
    monkeypatch.setenv("JOBSVC_HTTP_ALLOWED_HOSTS", f"other.example, 127.0.0.1:{site.port}")
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield site
    server.shutdown()
    server.server_close()
    thread.join()


RESPONSES: dict[str, Callable[[Site], tuple[int, dict[str, str], bytes]]] = {
    "/": lambda site: (200, {"X-Kind": "root"}, "Grüße\0".encode()),
    "/created": lambda site: (201, {}, b""),
    "/large": lambda site: (200, {}, b"x" * 300_000),
    "/missing": lambda site: (404, {}, b"no"),
    "/busy": lambda site: (503, {"Retry-After": "7"}, b""),
    "/broken": lambda site: (500, {"Retry-After": "Wed, 21 Oct 2026 07:28:00 GMT"}, b""),
    "/moved": lambda site: (302, {"Location": "/created"}, b""),
    "/kept": lambda site: (307, {"Location": site.url("/created")}, b""),
    "/around": lambda site: (302, {"Location": "/around"}, b""),
    "/away": lambda site: (302, {"Location": "http://other.example/"}, b""),
    "/port": lambda site: (302, {"Location": "http://127.0.0.1:1/"}, b""),
    "/file": lambda site: (302, {"Location": "file:///etc/passwd"}, b""),
}


def request(url: str, **fields: object) -> dict[str, Any]:
    return http_request(HttpPayload.model_validate({"url": url, **fields}))


def test_a_request(site: Site) -> None:
    result = request(site.url("/?a=b%20c"), headers={"X-Mine": "yes"})
    assert result["status"] == 200
    assert result["headers"]["x-kind"] == "root"
    assert result["body"] == "Grüße\ufffd"
    assert not result["truncated"]
    ((method, path, headers, body),) = site.requests
    assert (method, path, headers["x-mine"], body) == ("GET", "/?a=b%20c", "yes", b"")


def test_bodies(site: Site) -> None:
    request(site.url("/created"), method="POST", json={"a": [1, "ü"]})
    request(site.url("/created"), method="PUT", body="plain ü", headers={"content-type": "a/b"})
    request(site.url("/created"), method="POST", json=None)
    assert json.loads(site.requests[0][3]) == {"a": [1, "ü"]}
    assert site.requests[0][2]["content-type"] == "application/json"
    assert site.requests[1][3] == "plain ü".encode()
    assert site.requests[1][2]["content-type"] == "a/b"
    assert site.requests[2][3] == b"null"


def test_a_large_answer_is_cut(site: Site) -> None:
    result = request(site.url("/large"))
    assert (len(result["body"]), result["truncated"]) == (256 * 1024, True)


@pytest.fixture
def raw_site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[bytes], str]]:
    """Answers the next connection with these bytes, and hangs up."""
    threads = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(30)
        port = server.getsockname()[1]
        monkeypatch.setenv("JOBSVC_HTTP_ALLOWED_HOSTS", f"127.0.0.1:{port}")

        def answer(data: bytes) -> None:
            connection, _ = server.accept()
            with connection:
                while not connection.recv(65536).endswith(b"\r\n\r\n"):
                    pass
                connection.sendall(data)

        def start(data: bytes) -> str:
            threads.append(threading.Thread(target=answer, args=(data,)))
            threads[-1].start()
            return f"http://127.0.0.1:{port}/"

        yield start
        for thread in threads:
            thread.join()


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nnine byte",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n64\r\nnine byte",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n4\r\nnine\r\n",
        b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n",
        b"HTTP/1.1 103 Early Hints\r\n\r\n" * 1000,
        b"",
    ],
)
def test_an_answer_that_breaks_off_is_none(raw_site: Callable[[bytes], str], data: bytes) -> None:
    with pytest.raises((Retry, HTTPException, OSError)):
        request(raw_site(data))


def test_interim_answers_are_passed_over(raw_site: Callable[[bytes], str]) -> None:
    interim = b"".join(
        b"HTTP/1.1 %d Wait\r\nLink: </style.css>\r\nX-Not: mine\r\n\r\n" % status
        for status in (100, 102, 103, 103)
    )
    answer = b"HTTP/1.1 201 Created\r\nContent-Length: 2\r\nX-Nul: a\0b\r\n\r\nok"
    assert request(raw_site(interim + answer)) == {
        "status": 201,
        "headers": {"content-length": "2", "x-nul": "a\ufffdb"},
        "body": "ok",
        "truncated": False,
    }
    assert request(raw_site(interim + b"HTTP/1.0 200 OK\r\n\r\nuntil the end"))["body"] == (
        "until the end"
    )


def test_other_protocols_are_not_spoken(raw_site: Callable[[bytes], str]) -> None:
    with pytest.raises(Abort, match="101"):
        request(raw_site(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n"))


def test_statuses_that_are_failures(site: Site) -> None:
    with pytest.raises(Abort, match="404"):
        request(site.url("/missing"))
    with pytest.raises(Retry, match="503") as caught:
        request(site.url("/busy"))
    assert caught.value.after_seconds == 7
    with pytest.raises(Retry, match="500") as caught:
        request(site.url("/broken"))
    assert caught.value.after_seconds is None


def test_redirects_on_the_same_host(site: Site) -> None:
    assert request(site.url("/moved"), method="POST", json=1)["status"] == 201
    assert request(site.url("/kept"), method="POST", json=1)["status"] == 201
    assert [(method, path, body) for method, path, _, body in site.requests] == [
        ("POST", "/moved", b"1"),
        ("GET", "/created", b""),
        ("POST", "/kept", b"1"),
        ("POST", "/created", b"1"),
    ]
    assert "content-type" not in site.requests[1][2]


@pytest.mark.parametrize("path", ["/around", "/away", "/port", "/file"])
def test_redirects_that_are_not_followed(site: Site, path: str) -> None:
    with pytest.raises(Abort):
        request(site.url(path))
    assert {seen for _, seen, _, _ in site.requests} == {path}


@pytest.mark.parametrize(
    ("allowed", "url"),
    [
        ("", "http://127.0.0.1/"),
        ("localhost", "http://127.0.0.1/"),
        ("127.0.0.1:81", "http://127.0.0.1/"),
        ("127.0.0.1:80", "https://127.0.0.1/"),
        ("127.0.0.1", "http://127.0.0.1.evil.example/"),
        ("127.0.0.1", "http://127.0.0.1:99999/"),
    ],
)
def test_hosts_that_are_not_allowed(
    allowed: str, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JOBSVC_HTTP_ALLOWED_HOSTS", allowed)
    with pytest.raises(Abort):
        request(url)


def test_a_host_without_a_port_allows_all_of_its_ports(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JOBSVC_HTTP_ALLOWED_HOSTS", "127.0.0.1")
    assert request(site.url("/created"))["status"] == 201


@pytest.mark.parametrize(
    "fields",
    [
        {"url": "file:///etc/passwd"},
        {"url": "http://allowed@evil.example/"},
        {"url": "http://evil.example\\@allowed/"},
        {"url": "http://allowed/ HTTP/1.1\r\nX: y"},
        {"url": "http://allowed/\u00e4"},
        {"method": "TRACE"},
        {"headers": {"X": "a\r\nY: b"}},
        {"headers": {"X Y": "a"}},
        {"headers": {"Host": "evil.example"}},
        {"headers": {"Content-length": "1"}},
        {"body": "a", "json": 1},
        {"timeout": 0},
        {"other": 1},
    ],
)
def test_requests_that_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        HttpPayload.model_validate({"url": "http://allowed/", **fields})


def test_a_server_that_does_not_answer_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOBSVC_HTTP_ALLOWED_HOSTS", "127.0.0.1")
    with pytest.raises(ConnectionRefusedError):
        request("http://127.0.0.1:1/")


def test_sleeping_tells_each_step() -> None:
    ctx = JobContext.for_testing()
    payload = demo.SleepPayload(seconds=0.01, steps=4)
    assert demo.sleep(payload, ctx) == {"seconds": 0.01, "steps": 4}
    assert [report for report in ctx.reports if isinstance(report, Progress)] == [
        Progress(step, 4, f"step {step} of 4") for step in (1, 2, 3, 4)
    ]


def test_sleeping_can_be_cancelled() -> None:
    ctx = JobContext.for_testing()
    threading.Timer(0.01, ctx.cancel).start()
    with pytest.raises(JobCancelled):
        demo.sleep(demo.SleepPayload(seconds=60), ctx)


def test_failing_so_many_times() -> None:
    payload = demo.FailPayload(times=2)
    for attempt in (1, 2):
        with pytest.raises(demo.DemoError, match=f"attempt {attempt}"):
            demo.fail(payload, JobContext.for_testing(attempt=attempt))
    assert demo.fail(payload, JobContext.for_testing(attempt=3)) == {"attempt": 3}


def test_failing_for_good() -> None:
    with pytest.raises(Abort):
        demo.fail(demo.FailPayload(times=1, retryable=False), JobContext.for_testing())
