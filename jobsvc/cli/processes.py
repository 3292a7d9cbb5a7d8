"""The commands that start processes, and that look after them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from jobsvc import settings as configuration
from jobsvc.cli import health, output
from jobsvc.cli.options import (
    Address,
    ClientCert,
    ClientKey,
    Connection,
    TlsCa,
    TlsServerName,
    checked,
)
from jobsvc.client import CallFailed
from jobsvc.tokens import make_token

FAILED = 1

app = typer.Typer()


@app.command()
def server(
    processes: Annotated[
        int | None, typer.Option(help="How many processes serve the one address.")
    ] = None,
) -> None:
    """Start a gRPC server; any number may run side by side."""
    settings = configuration.load(needs=("database_url", "broker_url"), processes=processes)
    if settings.processes > 1:
        from jobsvc.bootstrap import supervisor

        raise typer.Exit(supervisor.run(settings))
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
    from jobsvc.store import migrating
    from jobsvc.store.database import Database

    telemetry.configure(settings)
    database = Database(settings.database_url)
    try:
        if not check:
            migrating.migrate(database)
        missing = migrating.missing(database)
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
    text, line = checked(lambda: make_token(name, scopes))
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
    raise typer.Exit(0 if found == health.SERVING else FAILED)


def _ask_grpc(server: Connection) -> str:
    with server.open_for_health() as client:
        try:
            return client.health()
        except CallFailed as failed:
            return str(failed)


def _ask_http(url: str) -> str:
    try:
        return health.ask(url)
    except health.BadURL as error:
        raise typer.BadParameter(str(error), param_hint="--url") from None
