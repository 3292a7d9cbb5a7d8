"""What many commands take: how to get to the server, which jobs are meant, how to print."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from jobsvc import settings as configuration
from jobsvc.cli import inputs
from jobsvc.cli.health import HEALTH_SECONDS_MAX
from jobsvc.cli.output import Format, end_on_interrupt
from jobsvc.client import Client, FilterOptions
from jobsvc.core.states import JobState
from jobsvc.settings import ClientSettings

CALL_SECONDS_MAX = 10.0  # with all its tries

T = TypeVar("T")

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
SomeJobId = Annotated[str | None, typer.Argument(metavar="JOB_ID", show_default=False)]
JobType = Annotated[str, typer.Argument(metavar="TYPE", show_default=False)]
Json = Annotated[
    str | None,
    typer.Argument(metavar="JSON", help="The payload, @FILE or - for stdin; {} if left out."),
]
Queue = Annotated[str, typer.Option(help="Default: the job type's.")]
Priority = Annotated[int, typer.Option(help="0 to 9; greater goes first.")]
Delay = Annotated[str | None, typer.Option(metavar="SPAN", help="Run it that much later: 5m.")]
Key = Annotated[str, typer.Option(help="Idempotency key: one job however often it is sent.")]
Label = Annotated[list[str] | None, typer.Option(metavar="K=V", help="May be repeated.")]
After = Annotated[int, typer.Option(metavar="N", help="The last event that was seen.")]
Moment = Annotated[
    str | None,
    typer.Option(metavar="TIME", help="2026-01-31T12:00:00Z, or a span such as 2h: so long ago."),
]
Reason = Annotated[str, typer.Option(help="Becomes the message of the job's error.")]
Watch = Annotated[bool, typer.Option("--watch", help="Print it again every two seconds.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Connection:
    """How to get to the server: options, and the environment for those that are not given."""

    address: Address = None
    token_file: TokenFile = None
    tls_ca: TlsCa = None
    client_cert: ClientCert = None
    client_key: ClientKey = None
    tls_server_name: TlsServerName = None

    @contextmanager
    def open(self) -> Iterator[Client]:
        """A client; what makes no request that could be sent is a usage error."""
        file = self.token_file
        token = None if file is None else inputs.file_text(file, "--token-file")
        settings = self._settings(token)
        with self._client(settings, settings.token, CALL_SECONDS_MAX) as client:
            try:
                yield client
            except ValueError as error:
                raise typer.BadParameter(str(error)) from error

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
        end_on_interrupt()
        return checked(
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """Which jobs: all that is given must match, of those that may be repeated any."""

    state: Annotated[
        list[JobState] | None,
        typer.Option(case_sensitive=False, metavar="STATE", help="May be repeated."),
    ] = None
    job_type: Annotated[
        list[str] | None, typer.Option("--type", metavar="TYPE", help="May be repeated.")
    ] = None
    queue: Annotated[str, typer.Option(help="Jobs of this queue.")] = ""
    label: Annotated[
        list[str] | None, typer.Option(metavar="K=V", help="May be repeated: jobs with all.")
    ] = None
    error_type: Annotated[
        list[str] | None, typer.Option(metavar="TYPE", help="May be repeated.")
    ] = None
    key: Annotated[str, typer.Option(help="The job with this idempotency key.")] = ""
    created_after: Moment = None
    created_before: Moment = None
    finished_after: Moment = None
    finished_before: Moment = None

    @property
    def options(self) -> FilterOptions:
        wanted = FilterOptions()
        if self.state:
            wanted["states"] = self.state
        if self.job_type:
            wanted["job_types"] = self.job_type
        if self.queue:
            wanted["queue"] = self.queue
        if self.label:
            wanted["labels"] = inputs.labels(self.label)
        if self.error_type:
            wanted["error_types"] = self.error_type
        if self.key:
            wanted["idempotency_key"] = self.key
        if moment := _ago(self.created_after, "--created-after"):
            wanted["create_time_after"] = moment
        if moment := _ago(self.created_before, "--created-before"):
            wanted["create_time_before"] = moment
        if moment := _ago(self.finished_after, "--finished-after"):
            wanted["finish_time_after"] = moment
        if moment := _ago(self.finished_before, "--finished-before"):
            wanted["finish_time_before"] = moment
        return wanted


def _ago(text: str | None, option: str) -> datetime | None:
    return inputs.moment(text, option, ahead=False)


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """The command, with the fields of each parameter that is a dataclass as options of its own."""
    signature = inspect.signature(command, eval_str=True)
    groups: dict[str, type[Any]] = {
        name: parameter.annotation
        for name, parameter in signature.parameters.items()
        if isinstance(parameter.annotation, type) and is_dataclass(parameter.annotation)
    }

    @functools.wraps(command)
    def with_groups(**options: Any) -> None:
        for name, group in groups.items():
            made = group(**{each.name: options.pop(each.name) for each in fields(group)})
            options[name] = made
        command(**options)

    parameters = [p for name, p in signature.parameters.items() if name not in groups]
    for group in reversed(groups.values()):
        parameters += inspect.signature(group, eval_str=True).parameters.values()
    with_groups.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    with_groups.__annotations__ = {each.name: each.annotation for each in parameters}
    return with_groups


def checked(call: Callable[[], T]) -> T:
    """What makes no request that could be sent is a usage error."""
    try:
        return call()
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)
