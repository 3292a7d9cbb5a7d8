"""`jobsvc server --processes N`: several processes that look like one server."""

from __future__ import annotations

import os
import signal
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
import psutil
import pytest

from jobsvc.client import Client, event_name
from tests.e2e.test_metrics import ANY_PORT, Scrape, status
from tests.harness import Process, Service, until
from tests.harness.service import SETTINGS
from tests.services.node import is_gone

COUNT = 2
# By chance they all lead to the same few processes; so many never do.
CONNECTIONS_MAX = 200
REPLACED_SECONDS_MAX = 30.0


def serving(server: Process) -> list[psutil.Process]:
    """The children that take connections, the oldest first."""
    children = [child for child in server.children() if listens(child)]
    return sorted(children, key=lambda child: child.pid)


def listens(process: psutil.Process) -> bool:
    try:
        return any(c.status == psutil.CONN_LISTEN for c in process.net_connections("tcp"))
    except psutil.NoSuchProcess:
        return False


def callers(process: psutil.Process, port: int) -> int:
    """How many connections a child has from its clients."""
    return sum(
        c.status == psutil.CONN_ESTABLISHED and c.laddr.port == port
        for c in process.net_connections("tcp")
    )


def port_of(server: Process) -> int:
    return int(str(server.wait_ready()["address"]).rpartition(":")[2])


@contextmanager
def one_channel(server: Process) -> Iterator[grpc.Channel]:
    """With a connection of its own."""
    options = [("grpc.enable_http_proxy", 0), ("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(str(server.wait_ready()["address"]), options=options) as channel:
        grpc.channel_ready_future(channel).result(timeout=10)
        yield channel


def channels_to_all(server: Process, stack: ExitStack) -> list[grpc.Channel]:
    """So many that each child has one."""
    port, children = port_of(server), serving(server)
    channels: list[grpc.Channel] = []
    while not all(callers(child, port) for child in children):
        assert len(channels) < CONNECTIONS_MAX
        channels.append(stack.enter_context(one_channel(server)))
    return channels


def wait_replaced(server: Process, dead: int) -> None:
    def whole() -> bool:
        pids = {child.pid for child in serving(server)}
        return len(pids) == COUNT and dead not in pids

    until(whole, REPLACED_SECONDS_MAX, "another process has taken its place")


def submits(server: Process) -> float:
    return Scrape(server).sum("jobsvc_job_events_total", event="SUBMITTED")


def test_all_processes_take_calls_and_are_counted_together(service: Service) -> None:
    server = service.server(processes=str(COUNT), metrics_listen=ANY_PORT)
    service.worker()
    assert len(serving(server)) == COUNT
    with ExitStack() as stack:
        channels = channels_to_all(server, stack)
        for channel in channels:
            Client(channel=channel).submit("demo.echo", {"a": 1})
        told = Scrape(server)
        assert submits(server) == len(channels)
        calls = {"method": "JobService/SubmitJob", "code": "OK"}
        assert told.sum("jobsvc_call_seconds_count", **calls) == len(channels)
        assert told.sum("jobsvc_call_seconds_bucket", le="+Inf", **calls) == len(channels)
        for name in ("jobsvc_ready", "jobsvc_broker_up"):
            assert told.sum(name) == 1
        rss = sum(child.memory_info().rss for child in serving(server))
        assert told.sum("process_resident_memory_bytes") > rss / 2
        assert [status(server, path) for path in ("/livez", "/readyz")] == [200, 200]
    service.wait_ended(len(channels), 30)
    service.wait_idle()
    records = [record["event"] for record in server.records()]
    assert records.count("ready") == records.count("serving metrics") == 1
    service.check((), jobs_min=len(channels))


def test_a_killed_process_is_replaced_and_the_others_go_on(service: Service) -> None:
    server = service.server(processes=str(COUNT), metrics_listen=ANY_PORT)
    with ExitStack() as stack:
        channels = channels_to_all(server, stack)
        for channel in channels:
            Client(channel=channel).submit("demo.echo")
        assert submits(server) == len(channels)
        victim = serving(server)[0]
        victim.kill()
        # The client takes it as any lost connection: it comes back, to another process.
        for channel in channels:
            Client(channel=channel).submit("demo.echo")
    wait_replaced(server, victim.pid)
    ended = server.wait_record("process ended", 5, pid=victim.pid)
    assert ended["reason"] == "signal 9 (SIGKILL)"
    assert submits(server) == 2 * len(channels)
    assert Scrape(server).sum("jobsvc_processes_lost_total") == 1
    with ExitStack() as stack:
        channels_to_all(server, stack)


def test_a_watch_goes_on_at_another_process(service: Service) -> None:
    server = service.server(processes=str(COUNT))
    with one_channel(server) as channel:
        client = Client(channel=channel)
        job_id = client.submit("demo.sleep", {"seconds": 1, "steps": 5}).job.job_id
        stream = client.watch(job_id)
        assert event_name(next(stream).type) == "SUBMITTED"
        (its,) = (child for child in serving(server) if callers(child, port_of(server)))
        its.kill()
        service.worker()
        events = [event.sequence for event in stream]
    assert events == list(range(2, 2 + len(events)))
    assert service.history(job_id)[-1] == "SUCCEEDED"
    assert len(service.history(job_id)) == 1 + len(events)


@pytest.mark.parametrize("by", ["service manager", "terminal"])
def test_one_signal_drains_all(service: Service, by: str) -> None:
    server = service.server(processes=str(COUNT))
    children = server.children()
    with ExitStack() as stack:
        for channel in channels_to_all(server, stack):
            job_id = Client(channel=channel).submit("demo.echo").job.job_id
            next(Client(channel=channel).watch(job_id))
        if by == "terminal":
            os.killpg(server.pid, signal.SIGINT)
        else:
            server.terminate()
        assert server.wait() == 0
    assert len(children) == COUNT
    assert all(map(is_gone, children))
    assert "ERROR" not in server.log_path.read_text().upper()


def test_a_second_signal_ends_all_at_once(service: Service) -> None:
    server = service.server(processes=str(COUNT))
    children = serving(server)
    children[0].suspend()  # it will not drain
    server.terminate()
    server.wait_record("stopping", 10)
    until(lambda: sum(map(is_gone, children)) == COUNT - 1, 20, "the others have drained")
    assert server.running
    server.terminate()
    assert server.wait() == 128 + signal.SIGTERM
    until(lambda: all(map(is_gone, children)), 10, "none is left")


def test_no_process_outlives_its_parent(service: Service) -> None:
    server = service.server(processes=str(COUNT))
    server.children()[0].suspend()  # nor one that cannot notice
    server.kill()  # and waits until nothing of it is left


def refused(service: Service, address: str, **settings: str) -> str:
    """What a server says that cannot have the address."""
    other = service.spawn_server(listen=address, **settings)
    assert other.wait() == 1
    return other.tail().splitlines()[-1]


@pytest.mark.parametrize("there", ["1", "2"])
def test_a_port_that_a_server_has_is_refused(service: Service, there: str) -> None:
    address = str(service.server(processes=there).wait_ready()["address"])
    for processes in ("1", "2"):
        said = refused(service, address, processes=processes)
        assert said == f"cannot listen on {address}: is it taken?"


def test_a_port_that_another_service_shares_is_refused(service: Service) -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        other.bind(("127.0.0.1", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        for processes in ("1", "2"):
            assert "is it taken?" in refused(service, address, processes=processes)


def test_what_one_process_cannot_start_with_several_cannot(
    database_url: str, broker_url: str, tmp_path: Path
) -> None:
    """An empty database: there is no schema."""
    settings = {
        **SETTINGS,
        "JOBSVC_DATABASE_URL": database_url,
        "JOBSVC_BROKER_URL": broker_url,
    }
    said = Counter[str]()
    for processes in ("1", "2"):
        words = ["server", "--processes", processes]
        server = Process(f"server{processes}", words, settings, tmp_path)
        assert server.wait() == 1
        (line,) = server.log_path.read_text().splitlines()
        said[line] += 1
    ((line, times),) = said.items()
    assert times == 2
    assert "run: jobsvc migrate" in line
