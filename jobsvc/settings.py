"""Every setting, and the only reader of the environment.

Each setting X of `Settings` and `ClientSettings` is the variable JOBSVC_X, or the file that
JOBSVC_X_FILE names (not for settings that are themselves paths; JOBSVC_TOKENS_FILE is a path of
its own, as that file is read anew when it changes). A variable that is set but empty counts as not
set, except JOBSVC_METRICS_LISTEN, where empty means off.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import parse_qsl, urlsplit

from pydantic import (
    BaseModel,
    BeforeValidator,
    ByteSize,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from jobsvc.tls import read_ca, read_pair
from jobsvc.tokens import parse_tokens, read_tokens

PREFIX = "JOBSVC_"
METRICS_LISTEN = "127.0.0.1:9464"
RESUME_SECONDS_MIN, RESUME_SECONDS_MAX = 3600.0, 30 * 24 * 3600.0
CHILD_AGE_SECONDS_MIN = 10.0
CHILD_MEMORY_LIMIT_MIN = 64 * 1024 * 1024
PATHS = frozenset(
    {
        *("tls_cert", "tls_key", "tls_client_ca", "broker_ca", "tokens_file"),
        *("tls_ca", "client_cert", "client_key"),
    }
)
SECRETS = frozenset({"token", "tokens"})
URLS = frozenset({"database_url", "broker_url", "smtp_url"})

_SPAN = re.compile(r"([0-9]+(?:\.[0-9]+)?)(ms|s|m|h)")
_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
# As it is read there: a password ends at the first @, whatever else it has.
_DATABASE = re.compile(r"([^@]*@)?(\[[^\]/@]*\]|[^/:?@\[\]]*)(:[0-9]{1,5})?([/?].*)?", re.DOTALL)
_LOGIN = (
    "user:password@host:port/name; in a user or password write % as %25, and : / ? # [ ] @ as %3A "
    "%2F %3F %23 %5B %5D %40"
)
_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_QUEUE = re.compile(r"[a-z][a-z0-9_.-]{0,49}")


class SettingsError(Exception):
    """One message that lists every bad setting; safe to print, it holds no value of a secret."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n  ".join(["bad settings:", *problems]))
        self.problems = problems


def parse_span(text: str) -> float:
    """Seconds of a span such as `500ms`, `30s`, `2m` or `1h`; ValueError for anything else."""
    match = _SPAN.fullmatch(text.strip())
    if match is None:
        raise ValueError("not a span such as 500ms, 30s, 2m or 1h")
    return float(match[1]) * _SECONDS[match[2]]


def usable_cores(quota: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """The cores that this process may use: by its affinity, and by the limit of its container
    (`quota` is a file of cgroup v2: microseconds, or `max`, of each period)."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    try:
        share, period = quota.read_text(encoding="ascii").split()
    except OSError:  # no such limit on this system
        return cores
    return cores if share == "max" else max(1, min(cores, math.ceil(int(share) / int(period))))


def split_address(text: str) -> tuple[str, int]:
    """Host and port of `HOST:PORT` or `[IPV6]:PORT`; ValueError for anything else."""
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError("an IPv6 address needs brackets: [::1]:50051")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError("not an address such as 127.0.0.1:50051")
    return host, int(port)


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def mask_url(url: str) -> str:
    """The URL with its password, in the authority or in the query, replaced by `***`."""
    url = re.sub(r"(?<=://)([^:/?#]*):.*(?=@)", r"\1:***", url)
    return re.sub(r"(?i)([?&][^=&]*(?:password|secret|token)[^=&]*=)[^&]*", r"\1***", url)


def _span(value: object) -> object:
    return parse_span(value) if isinstance(value, str) else value


def _names(value: object) -> object:
    if not isinstance(value, str):
        return value
    return tuple(name for name in re.split(r"[,\s]+", value) if name)


def _lower(value: object) -> object:
    return value.lower() if isinstance(value, str) else value


Interval = Annotated[float, BeforeValidator(_span), Field(ge=0.01, le=3600)]
Names = Annotated[tuple[str, ...], BeforeValidator(_names)]
LogFormat = Literal["console", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


class Settings(_Model):
    """What a server, a worker or `jobsvc dev` runs by. Spans are in seconds; "" = not set."""

    database_url: str = ""
    broker_url: str = ""
    broker_ca: str = ""
    queue_type: Literal["classic", "quorum"] = "classic"
    insecure: bool = False
    tls_cert: str = ""
    tls_key: str = ""
    tls_client_ca: str = ""
    tokens: str = Field(default="", repr=False)
    tokens_file: str = ""
    listen: str = "127.0.0.1:50051"
    processes: int = Field(default=1, ge=1, le=64)
    metrics_listen: str = METRICS_LISTEN
    handlers: Names = ("worker.handlers",)
    queues: Names = ("default",)
    concurrency: int = Field(default_factory=usable_cores, ge=1, le=1000)
    isolation: Literal["process", "thread"] = "process"
    child_jobs: int = Field(default=10_000, ge=1, le=1_000_000_000)
    child_age: Annotated[float, BeforeValidator(_span), Field(ge=0)] = 0.0
    child_memory: Annotated[ByteSize, Field(ge=0)] = ByteSize(0)
    child_memory_limit: Annotated[ByteSize, Field(ge=0)] = ByteSize(0)
    relay_interval: Interval = 1.0
    promote_interval: Interval = 0.5
    reap_interval: Interval = 5.0
    redispatch_interval: Interval = 15.0
    sweep_interval: Interval = 5.0
    resume: Annotated[float, BeforeValidator(_span)] = 24 * 3600.0
    prepare: bool = True
    lease: Interval = 30.0
    heartbeat: Interval = 10.0
    shutdown_grace: Annotated[float, BeforeValidator(_span), Field(ge=0, le=3600)] = 25.0
    smtp_url: str = ""
    http_allowed_hosts: Names = ()
    log_format: Annotated[LogFormat, BeforeValidator(_lower)] = Field(
        default_factory=lambda: "console" if sys.stderr.isatty() else "json"
    )
    log_level: Annotated[LogLevel, BeforeValidator(_lower)] = "info"

    @field_validator("database_url")
    @classmethod
    def _check_database_url(cls, url: str) -> str:
        _check_scheme(url, "postgresql+psycopg2", "postgresql", "sqlite", "sqlite+pysqlite")
        if url.startswith("postgresql") and not _DATABASE.fullmatch(url.partition("://")[2]):
            raise ValueError(f"not of the form {url.partition(':')[0]}://{_LOGIN}")
        return url

    @field_validator("broker_url")
    @classmethod
    def _check_broker_url(cls, url: str) -> str:
        if url.startswith("amqps:") and ";" in url:
            # Kombu would hold every broker's certificate against the name of the first.
            raise ValueError("one address only with amqps://; give a name that leads to all")
        for each in url.split(";") if url.startswith("amqp") else (url,):
            _check_scheme(each, "amqp", "amqps", "memory")
            if not _has_whole_authority(each):
                raise ValueError(f"not of the form amqp://{_LOGIN}")
        return url

    @field_validator("broker_ca")
    @classmethod
    def _check_broker_ca(cls, path: str, info: ValidationInfo) -> str:
        if path:
            if not info.data.get("broker_url", "amqps:").startswith("amqps:"):
                raise ValueError("is of use with an amqps:// JOBSVC_BROKER_URL only")
            read_ca(path)
        return path

    @field_validator("smtp_url")
    @classmethod
    def _check_smtp_url(cls, url: str) -> str:
        if not _check_scheme(url, "smtp"):
            return url
        parts = urlsplit(url)
        query = parse_qsl(parts.query, keep_blank_values=True)
        fine = bool(parts.hostname) and all(
            name == "starttls" and value in {"0", "1"} for name, value in query
        )
        try:
            fine = fine and parts.port != 0
        except ValueError:
            fine = False
        if not fine:
            raise ValueError("not of the form smtp://user:password@host:587?starttls=1")
        return url

    @field_validator("tls_key")
    @classmethod
    def _check_tls_key(cls, path: str, info: ValidationInfo) -> str:
        certificate = info.data["tls_cert"]
        if bool(path) != bool(certificate):
            raise ValueError("goes with JOBSVC_TLS_CERT: neither is of use alone")
        if path:
            read_pair(certificate, path)
        return path

    @field_validator("tls_client_ca")
    @classmethod
    def _check_tls_client_ca(cls, path: str, info: ValidationInfo) -> str:
        if path:
            if not info.data["tls_cert"]:
                raise ValueError("is of use with JOBSVC_TLS_CERT and JOBSVC_TLS_KEY only")
            read_ca(path)
        return path

    @field_validator("tokens")
    @classmethod
    def _check_tokens(cls, text: str) -> str:
        parse_tokens(text)
        return text

    @field_validator("tokens_file")
    @classmethod
    def _check_tokens_file(cls, path: str, info: ValidationInfo) -> str:
        if path:
            if info.data.get("tokens"):
                raise ValueError("JOBSVC_TOKENS is set too; only one of them may be")
            read_tokens(path)
        return path

    @field_validator("listen")
    @classmethod
    def _check_listen(cls, address: str, info: ValidationInfo) -> str:
        host, _ = split_address(address)
        # `insecure` is missing from the data if it was bad itself, and is reported then.
        plaintext = not info.data["tls_cert"] and info.data.get("insecure") is False
        if plaintext and not is_loopback(host):
            raise ValueError(
                f"{host} is more than loopback, and traffic is plaintext; set JOBSVC_TLS_CERT and "
                "JOBSVC_TLS_KEY, or JOBSVC_INSECURE=1 if the network is private"
            )
        return address

    @field_validator("processes")
    @classmethod
    def _check_processes(cls, processes: int, info: ValidationInfo) -> int:
        for name in ("database_url", "broker_url"):
            if processes > 1 and info.data.get(name, "").startswith(("sqlite", "memory")):
                raise ValueError(
                    f"more than one need PostgreSQL and RabbitMQ, and {PREFIX}{name.upper()} names "
                    "what serves one process only"
                )
        return processes

    @field_validator("metrics_listen")
    @classmethod
    def _check_metrics_listen(cls, address: str) -> str:
        if address:
            split_address(address)
        return address

    @field_validator("handlers")
    @classmethod
    def _check_handlers(cls, modules: tuple[str, ...]) -> tuple[str, ...]:
        return _check_names(modules, _MODULE, "module")

    @field_validator("queues")
    @classmethod
    def _check_queues(cls, queues: tuple[str, ...]) -> tuple[str, ...]:
        return _check_names(queues, _QUEUE, "queue")

    @field_validator("resume")
    @classmethod
    def _check_resume(cls, seconds: float) -> float:
        if not RESUME_SECONDS_MIN <= seconds <= RESUME_SECONDS_MAX:
            raise ValueError("not from 1h to 720h (30 days)")
        return seconds

    @field_validator("child_age")
    @classmethod
    def _check_child_age(cls, seconds: float) -> float:
        if 0 < seconds < CHILD_AGE_SECONDS_MIN:
            raise ValueError(
                f"less than {CHILD_AGE_SECONDS_MIN:g}s: they would do nothing but start"
            )
        return seconds

    @field_validator("child_memory")
    @classmethod
    def _check_child_memory(cls, size: ByteSize, info: ValidationInfo) -> ByteSize:
        """Where it is not set, so much that all children have half of the memory that there is."""
        return size or ByteSize(_memory_bytes() // 2 // info.data.get("concurrency", 1))

    @field_validator("child_memory_limit")
    @classmethod
    def _check_child_memory_limit(cls, size: ByteSize) -> ByteSize:
        if 0 < size < CHILD_MEMORY_LIMIT_MIN:
            raise ValueError(
                f"less than {CHILD_MEMORY_LIMIT_MIN >> 20}MiB, which a child needs for itself"
            )
        return size

    @field_validator("heartbeat")
    @classmethod
    def _check_heartbeat(cls, heartbeat: float, info: ValidationInfo) -> float:
        lease = info.data.get("lease")
        if lease is not None and lease <= 2 * heartbeat:
            raise ValueError(
                "JOBSVC_LEASE must be more than twice as long, so that one lost heartbeat loses "
                "no lease"
            )
        return heartbeat


class ClientSettings(_Model):
    """What the client commands run by; "" = not set. `tls_ca` turns TLS on."""

    address: str = "127.0.0.1:50051"
    token: str = Field(default="", repr=False)
    insecure: bool = False
    tls_ca: str = ""
    client_cert: str = ""
    client_key: str = ""
    tls_server_name: str = ""


@dataclass(frozen=True, slots=True)
class SettingRow:
    """One line of `jobsvc settings`: the value masked; the source one of default, environment and
    file."""

    variable: str
    value: str
    source: str


_M = TypeVar("_M", bound=_Model)


def load(
    environ: Mapping[str, str] = os.environ, *, needs: Iterable[str] = (), **overrides: object
) -> Settings:
    """The settings of a server or worker. `overrides` (flags) come before the environment, None
    among them counts as not given; `needs` names the settings that may not be left out. Raises
    SettingsError."""
    settings, _ = _load(Settings, environ, overrides, needs)
    return settings


def load_client(environ: Mapping[str, str] = os.environ, **overrides: object) -> ClientSettings:
    """As `load`, for the client commands; looks at no other settings. Raises SettingsError."""
    settings, _ = _load(ClientSettings, environ, overrides, ())
    return settings


def describe(environ: Mapping[str, str] = os.environ) -> list[SettingRow]:
    """Every setting of both kinds, with secrets masked. Raises SettingsError."""
    rows = {}
    models: tuple[type[_Model], ...] = (Settings, ClientSettings)
    for model in models:
        settings, sources = _load(model, environ, {}, ())
        for name, value in settings:
            variable = PREFIX + name.upper()
            source = sources.get(name, "default")
            rows[variable] = SettingRow(variable, _shown(name, value), source)
    return list(rows.values())


def _load(
    model: type[_M],
    environ: Mapping[str, str],
    overrides: Mapping[str, object],
    needs: Iterable[str],
) -> tuple[_M, dict[str, str]]:
    problems = []
    values: dict[str, object] = {}
    sources: dict[str, str] = {}
    for name in model.model_fields:
        if overrides.get(name) is not None:
            values[name], sources[name] = overrides[name], "flag"
            continue
        try:
            found = _read(name, environ)
        except ValueError as error:
            problems.append(f"{PREFIX}{name.upper()}: {error}")
            sources[name] = "unreadable"
            continue
        if found is not None:
            values[name], sources[name] = found
    problems += [
        f"{PREFIX}{name.upper()}: must be set"
        for name in needs
        if not values.get(name) and sources.get(name) != "unreadable"
    ]
    settings = None
    try:
        settings = model.model_validate(values)
    except ValidationError as error:
        problems += [_problem(dict(e)) for e in error.errors(include_url=False)]
    if problems or settings is None:
        raise SettingsError(problems)
    return settings, sources


def _read(name: str, environ: Mapping[str, str]) -> tuple[str, str] | None:
    """The text of a setting and its source; ValueError where it cannot be read."""
    variable = PREFIX + name.upper()
    value = environ.get(variable, "")
    no_file = name in PATHS or f"{name}_file" in PATHS
    path = "" if no_file else environ.get(variable + "_FILE", "")
    if value and path:
        raise ValueError(f"{variable}_FILE is set too; only one of them may be")
    if path:
        try:
            return Path(path).read_text(encoding="utf-8").strip(), "file"
        except UnicodeDecodeError:
            raise ValueError(f"{path} is not UTF-8 text") from None
        except OSError as error:
            raise ValueError(f"cannot read {path}: {error.strerror}") from None
    if value or (name == "metrics_listen" and variable in environ):
        return value, "environment"
    return None


def _problem(error: Mapping[str, Any]) -> str:
    cause = error.get("ctx", {}).get("error")
    text = str(cause) if isinstance(cause, ValueError) else error["msg"]
    return f"{PREFIX}{str(error['loc'][0]).upper()}: {text}"


def _check_scheme(url: str, *schemes: str) -> str:
    if not url:
        return url
    try:
        fine = urlsplit(url).scheme in schemes and "://" in url
    except ValueError:
        fine = False
    if not fine:
        raise ValueError(f"not a URL of the form {schemes[0]}://…")
    return url


def _has_whole_authority(url: str) -> bool:
    """Whether nothing of a password stands where a port, a path or a query is looked for: what does
    is shown, or looked up as a name. Whoever parses such a URL raises errors that quote it."""
    try:
        parts = urlsplit(url)
        fine = parts.port != 0
        parse_qsl(parts.query, strict_parsing=bool(parts.query))
    except ValueError:
        return False
    return fine and "#" not in url and ("@" in parts.netloc or "@" not in parts.path)


def _check_names(names: tuple[str, ...], pattern: re.Pattern[str], what: str) -> tuple[str, ...]:
    if not names:
        raise ValueError(f"names no {what}")
    for name in names:
        if not pattern.fullmatch(name):
            raise ValueError(f"{name!r} is not the name of a {what}")
    if len(set(names)) < len(names):
        raise ValueError(f"names a {what} twice")
    return names


def _memory_bytes() -> int:
    """The memory that this machine has, or that its container may use."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # no such file here; "max" where nothing is set
            sizes.append(int(Path("/sys/fs/cgroup", name).read_text()))
    return min(sizes)


def _shown(name: str, value: object) -> str:
    if name in SECRETS:
        return "***" if value else ""
    if name in URLS:
        return mask_url(str(value))
    if isinstance(value, tuple):
        return ",".join(value)
    if isinstance(value, ByteSize):
        return f"{value / (1 << 20):g}MiB"
    if isinstance(value, float):
        return f"{value:g}s"
    if isinstance(value, bool):
        return "1" if value else "0"
    return str(value)
