"""The commands. Exit codes: 0 fine, and for what follows a job to its end 0 SUCCEEDED, 1 FAILED,
3 CANCELLED; 2 usage; 4 the server said no, or could not be reached.

Servers and workers are imported by the commands that start them: a client command is not to wait
for what it does not use.
"""

from __future__ import annotations

import functools
import inspect
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Concatenate, ParamSpec, TypeVar
from urllib.parse import urlsplit

import typer

from jobsvc import settings as configuration
from jobsvc.cli import inputs, output
from jobsvc.cli.output import Format
from jobsvc.client import CallFailed, Client, GetResultResponse, JobOptions, is_terminal
from jobsvc.errors import JobsvcError
from jobsvc.settings import ClientSettings, SettingsError
from jobsvc.tokens import make_token

FAILED = 1
USAGE = 2
REFUSED = 4
CALL_SECONDS_MAX = 10.0  # with all its tries
HEALTH_SECONDS_MAX = 3.0

T = TypeVar("T")
P = ParamSpec("P")

app = typer.Typer(
    help="A durable job service.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

Address = Annotated[
    str | None, typer.Option(help="HOST:PORT of the server, in place of JOBSVC_ADDRESS.")
]
TokenFile = Annotated[
    Path | None, typer.Option(help="File that holds the token, in place of JOBSVC_TOKEN.")
]
TlsCa = Annotated[
    Path | None, typer.Option(help="PEM file; turns TLS on. In place of JOBSVC_TLS_CA.")
]
ClientCert = Annotated[
    Path | None, typer.Option(help="PEM file, with --client-key. In place of JOBSVC_CLIENT_CERT.")
]
ClientKey = Annotated[Path | None, typer.Option(help="In place of JOBSVC_CLIENT_KEY.")]
TlsServerName = Annotated[
    str | None,
    typer.Option(
        help="What the server's certificate is for, if not for its address. In place of "
        "JOBSVC_TLS_SERVER_NAME."
    ),
]
Output = Annotated[
    Format | None,
    typer.Option("--output", help="Default: table on a terminal, json elsewhere."),
]
JobId = Annotated[str, typer.Argument(metavar="JOB_ID", show_default=False)]
JobType = Annotated[str, typer.Argument(metavar="TYPE", show_default=False)]
Json = Annotated[
    str | None,
    typer.Argument(metavar="[JSON]", help="The payload, @FILE or - for stdin; {} if left out."),
]
Queue = Annotated[str, typer.Option(help="Default: the job type's.")]
Priority = Annotated[int, typer.Option(help="0 to 9; greater goes first.")]
Delay = Annotated[str | None, typer.Option(metavar="SPAN", help="Run it that much later: 5m.")]
Key = Annotated[str, typer.Option(help="Idempotency key: one job however often it is sent.")]
Label = Annotated[list[str] | None, typer.Option(metavar="K=V", help="May be repeated.")]
After = Annotated[int, typer.Option(metavar="N", help="The last event that was seen.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """How to get to the server: options, and the environment for those that are not given."""

    address: Address = None
    token_file: TokenFile = None
    tls_ca: TlsCa = None
    client_cert: ClientCert = None
    client_key: ClientKey = None
    tls_server_name: TlsServerName = None

    def open(self) -> Client:
        file = self.token_file
        token = None if file is None else inputs.file_text(file, "--token-file")
        settings = self._settings(token)
        return self._client(settings, settings.token, CALL_SECONDS_MAX)

    def open_for_health(self) -> Client:
        """Needs no token, and shows none."""
        return self._client(self._settings(""), "", HEALTH_SECONDS_MAX)

    def _settings(self, token: str | None) -> ClientSettings:
        return configuration.load_client(
            address=self.address,
            token=token,
            tls_ca=_text(self.tls_ca),
            client_cert=_text(self.client_cert),
            client_key=_text(self.client_key),
            tls_server_name=self.tls_server_name,
        )

    def _client(self, settings: ClientSettings, token: str, timeout: float) -> Client:
        return _checked(
            lambda: Client(
                settings.address,
                token=token,
                tls_ca=settings.tls_ca,
                client_cert=settings.client_cert,
                client_key=settings.client_key,
                tls_server_name=settings.tls_server_name,
                insecure=settings.insecure,
                timeout=timeout,
            )
        )


def connecting(command: Callable[Concatenate[Connection, P], None]) -> Callable[..., None]:
    """The command with the options of a Connection in place of its first parameter."""
    names = inspect.signature(Connection, eval_str=True).parameters
    own = list(inspect.signature(command, eval_str=True).parameters.values())[1:]

    @functools.wraps(command)
    def with_options(**options: Any) -> None:
        connection = Connection(**{name: options.pop(name) for name in names})
        command(connection, **options)  # type: ignore[call-arg]  # Typer gives them by name

    parameters = [*own, *names.values()]
    with_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    with_options.__annotations__ = {each.name: each.annotation for each in parameters}
    return with_options


def main() -> None:
    try:
        "".join(sys.argv).encode()
        app()
    except CallFailed as failed:
        output.note(str(failed))
        sys.exit(REFUSED)
    except SettingsError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(USAGE)
    except JobsvcError as error:
        output.note(str(error))
        sys.exit(FAILED)
    except UnicodeEncodeError:
        output.note("the command line is not UTF-8 text")
        sys.exit(USAGE)


@app.command()
def server() -> None:
    """Start a gRPC server; any number may run side by side."""
    settings = configuration.load(needs=("database_url", "broker_url"))
    from jobsvc.bootstrap import server as home

    raise typer.Exit(home.run(settings))


@app.command()
def worker() -> None:
    """Start a worker; any number may run side by side."""
    settings = configuration.load(needs=("database_url", "broker_url"))
    from jobsvc.bootstrap import worker as home

    raise typer.Exit(home.run(settings))


@app.command()
def dev(
    listen: Annotated[str | None, typer.Option(help="HOST:PORT to serve on.")] = None,
    data_dir: Annotated[Path, typer.Option(help="Where the data is kept.")] = Path(".jobsvc"),
    handlers: Annotated[
        str | None, typer.Option(metavar="MODULE,…", help="Modules that register job types.")
    ] = None,
) -> None:
    """Start everything in one: server and worker, with no other service."""
    settings = configuration.load(listen=listen, handlers=handlers)
    from jobsvc.bootstrap import dev as home

    raise typer.Exit(home.run(settings, data_dir))


@app.command()
def migrate(
    check: Annotated[
        bool, typer.Option("--check", help="Say what is missing, and exit 1 if anything is.")
    ] = False,
) -> None:
    """Bring the database's schema to this release."""
    settings = configuration.load(needs=("database_url",))
    from jobsvc import telemetry
    from jobsvc.store import schema
    from jobsvc.store.database import Database

    telemetry.configure(settings)
    database = Database(settings.database_url)
    try:
        if not check:
            schema.migrate(database)
        missing = schema.missing(database)
    finally:
        database.close()
    for migration in missing:
        output.line(migration)
    raise typer.Exit(FAILED if missing else 0)


@app.command()
def settings() -> None:
    """Print every setting and where it comes from, secrets masked."""
    rows = configuration.describe()
    name_width = max(len(row.variable) for row in rows)
    value_width = max(len(row.value) for row in rows)
    for row in rows:
        text = f"{row.variable:<{name_width}}  {row.value:<{value_width}}  {row.source}"
        output.line(output.clean(text))


@app.command()
def token(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Of whoever uses it; the actor in events.")
    ],
    scopes: Annotated[
        list[str], typer.Argument(metavar="SCOPE…", help="Some of submit, read, cancel, admin.")
    ],
) -> None:
    """Make a token: print it, and the line that stores it."""
    text, line = _checked(lambda: make_token(name, scopes))
    output.note("the token, which is not shown again, and the line for JOBSVC_TOKENS_FILE:")
    output.line(text)
    output.line(line)


@app.command()
def healthcheck(
    address: Address = None,
    url: Annotated[
        str | None,
        typer.Option(
            help="Ask /livez at this URL instead, or what it names: a worker has no gRPC, and at "
            "/readyz says whether it consumes."
        ),
    ] = None,
    tls_ca: TlsCa = None,
    client_cert: ClientCert = None,
    client_key: ClientKey = None,
    tls_server_name: TlsServerName = None,
) -> None:
    """Ask a server or worker whether it serves: exit code 0 or 1."""
    if url is not None and address is not None:
        raise typer.BadParameter("give --address or --url, not both")
    server = Connection(
        address=address,
        tls_ca=tls_ca,
        client_cert=client_cert,
        client_key=client_key,
        tls_server_name=tls_server_name,
    )
    found = _ask_grpc(server) if url is None else _ask_http(url)
    output.note(found)
    raise typer.Exit(0 if found == "SERVING" else FAILED)


@app.command()
@connecting
def submit(
    server: Connection,
    job_type: JobType,
    json: Json = None,
    queue: Queue = "",
    priority: Priority = 0,
    delay: Delay = None,
    key: Key = "",
    label: Label = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Print the result once it is there.")
    ] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Follow the job to its end.")] = False,
    output_format: Output = None,
) -> None:
    """Submit a job and print its id."""
    if wait and watch:
        raise typer.BadParameter("give --wait or --watch, not both")
    payload = inputs.payload(json)
    options = _job_options(queue, priority, delay, key, label)
    with server.open() as client:
        job = _checked(lambda: client.submit(job_type, payload, **options)).job
        as_json = output_format is Format.JSON
        if wait:
            output.note(job.job_id)
            raise typer.Exit(_print_result(client.wait(job.job_id), as_json))
        if watch and as_json:
            output.note(job.job_id)
        elif as_json:
            output.resource(job, Format.JSON)
        else:
            output.line(job.job_id)
        if watch:
            raise typer.Exit(_follow(client, job.job_id, 0, output_format or Format.TABLE))


@app.command()
@connecting
def run(
    server: Connection,
    job_type: JobType,
    json: Json = None,
    queue: Queue = "",
    priority: Priority = 0,
    delay: Delay = None,
    key: Key = "",
    label: Label = None,
    output_format: Output = None,
) -> None:
    """Submit a job, follow it to its end and print its result."""
    payload = inputs.payload(json)
    options = _job_options(queue, priority, delay, key, label)
    chosen = output.format_or_default(output_format)
    result = GetResultResponse()
    with server.open() as client, output.following(chosen) as view:
        messages = client.run(job_type, payload, **options)
        # The first step makes the request, and says so where it cannot be made.
        message = _checked(lambda: next(messages, None))
        while message is not None:
            if isinstance(message, GetResultResponse):
                result = message
            else:
                view.show(message)
            message = next(messages, None)
    raise typer.Exit(_print_result(result, chosen is Format.JSON))


@app.command()
@connecting
def get(
    server: Connection,
    job_id: JobId,
    output_format: Output = None,
) -> None:
    """Print a job as it stands."""
    with server.open() as client:
        output.resource(client.get(job_id), output.format_or_default(output_format))


@app.command()
@connecting
def watch(
    server: Connection,
    job_id: JobId,
    after_sequence: After = 0,
    output_format: Output = None,
) -> None:
    """Follow a job to its end."""
    chosen = output.format_or_default(output_format)
    with server.open() as client:
        raise typer.Exit(_follow(client, job_id, after_sequence, chosen))


@app.command()
@connecting
def events(
    server: Connection,
    job_id: JobId,
    after_sequence: After = 0,
    output_format: Output = None,
) -> None:
    """Print a job's history so far."""
    with server.open() as client:
        output.events(
            client.events(job_id, after_sequence), output.format_or_default(output_format)
        )


@app.command()
@connecting
def result(
    server: Connection,
    job_id: JobId,
    wait: Annotated[
        str | None, typer.Option(metavar="SPAN", help="Wait that long for the job to end.")
    ] = None,
    output_format: Output = None,
) -> None:
    """Print how a job ended."""
    seconds = inputs.span(wait, "--wait") or 0.0
    with server.open() as client:
        found = client.result(job_id, seconds)
    as_json = output.format_or_default(output_format) is Format.JSON
    raise typer.Exit(_print_result(found, as_json))


@app.command()
@connecting
def cancel(
    server: Connection,
    job_id: JobId,
    reason: Annotated[str, typer.Option(help="Becomes the message of the job's error.")] = "",
    output_format: Output = None,
) -> None:
    """Cancel a waiting job, or ask a running one to stop."""
    with server.open() as client:
        output.resource(client.cancel(job_id, reason), output.format_or_default(output_format))


def _checked(call: Callable[[], T]) -> T:
    """What makes no request that could be sent is a usage error."""
    try:
        return call()
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _job_options(
    queue: str, priority: int, delay: str | None, key: str, label: list[str] | None
) -> JobOptions:
    options = JobOptions(
        queue=queue, priority=priority, idempotency_key=key, labels=inputs.labels(label or [])
    )
    seconds = inputs.span(delay, "--delay")
    if seconds is not None:
        options["delay"] = seconds
    return options


def _print_result(result: GetResultResponse, as_json: bool) -> int:
    """The exit code."""
    if as_json:
        output.resource(result, Format.JSON)
    else:
        output.outcome(result)
    return output.exit_code(result.state)


def _follow(client: Client, job_id: str, after_sequence: int, chosen: Format) -> int:
    """The exit code, once the job has ended."""
    state = 0
    with output.following(chosen) as view:
        for event in client.watch(job_id, after_sequence):
            view.show(event)
            state = event.state
    if not is_terminal(state):  # the last event was seen already
        state = client.result(job_id).state
    return output.exit_code(state)


def _ask_grpc(server: Connection) -> str:
    with server.open_for_health() as client:
        try:
            return client.health()
        except CallFailed as failed:
            return str(failed)


def _ask_http(url: str) -> str:
    if not url.startswith(("http://", "https://")):
        raise typer.BadParameter("not an http:// or https:// URL", param_hint="--url")
    try:
        probe = url if urlsplit(url).path.strip("/") else url.rstrip("/") + "/livez"
        with urllib.request.urlopen(probe, timeout=HEALTH_SECONDS_MAX):  # noqa: S310 - seen to be http
            return "SERVING"
    except urllib.error.HTTPError as error:
        return f"{error.code} {error.reason}"
    except OSError as error:
        return str(error)
