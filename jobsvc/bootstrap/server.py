"""The server process: gRPC in front, upkeep behind, one event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Iterable
from datetime import timedelta

import uvloop

from jobsvc import metrics, telemetry, tracing
from jobsvc.bootstrap.probes import serve_probes
from jobsvc.bootstrap.ready import announce
from jobsvc.bootstrap.signals import on_stop
from jobsvc.broker.listener import HintListener
from jobsvc.broker.topology import Broker
from jobsvc.core.model import Change
from jobsvc.errors import CannotStart, DatabaseUnavailable
from jobsvc.outbox import Outbox
from jobsvc.rpc.access import Access, follow_tokens
from jobsvc.rpc.certificates import server_credentials
from jobsvc.rpc.interceptors import CallBoundary
from jobsvc.rpc.schedule_service import ticked_job
from jobsvc.rpc.server import Server
from jobsvc.services import upkeep
from jobsvc.services.assembly import Services, assemble
from jobsvc.services.fleet import Fleet
from jobsvc.services.schedules import ticking
from jobsvc.services.threads import AsyncDatabase
from jobsvc.services.watch import WatchHub
from jobsvc.settings import Settings
from jobsvc.store import schema
from jobsvc.store.database import Database
from jobsvc.telemetry import Probes

DATABASE_THREADS = 8
# For the threads beside the event loop's: upkeep loops, outbox, and a worker in `jobsvc dev`.
OTHER_CONNECTIONS = 10
PROBE_SECONDS = 2.0


def run(settings: Settings, announce: Callable[[Settings, str], None] = announce) -> int:
    """Serves until SIGTERM or SIGINT; answers the exit code. The port is shared with others of its
    kind where the settings say that there are several processes. Raises CannotStart and
    DatabaseUnavailable."""
    telemetry.configure(settings)
    tracing.configure("server")
    database = Database(
        settings.database_url,
        pool_size=DATABASE_THREADS + OTHER_CONNECTIONS,
        prepare=settings.prepare,
    )
    try:
        schema.require(database)
        broker = Broker(
            settings.broker_url,
            settings.queue_type,
            settings.broker_ca,
            database.read(schema.service_id),
        )
        uvloop.run(serve(settings, database, broker, announce=announce))
    finally:
        database.close()
    return 0


async def serve(
    settings: Settings,
    database: Database,
    broker: Broker,
    *,
    on_start: Callable[[Outbox, str], None] = lambda outbox, address: None,
    on_stopping: Callable[[], None] = lambda: None,
    announce: Callable[[Settings, str], None] = announce,
) -> None:
    """Serves until a signal. `on_start` is called with the outbox and the address when all is up,
    before it is announced; `on_stopping` when it stops taking calls. Both run in a thread."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    on_stop(lambda: loop.call_soon_threadsafe(stop.set))
    service = Service(settings, database, broker)
    try:
        await service.start()
        await asyncio.to_thread(on_start, service.outbox, service.address)
        if not stop.is_set():
            announce(settings, service.address)
        await stop.wait()
        telemetry.get_logger("jobsvc").info("stopping")
    finally:
        await asyncio.gather(asyncio.to_thread(on_stopping), service.stop(settings.shutdown_grace))


class Service:
    """Everything of a server; made, started and stopped in one running event loop."""

    def __init__(self, settings: Settings, database: Database, broker: Broker) -> None:
        self._database = database
        self._threads = AsyncDatabase(database, DATABASE_THREADS)
        self._hub = WatchHub(self._threads, settings.sweep_interval)
        resume = timedelta(seconds=settings.resume)
        self._fleet = Fleet(database, self._threads, settings.sweep_interval, resume)
        self.outbox = Outbox(
            database,
            broker,
            on_changes=self._notify,
            relay_interval=settings.relay_interval,
            redispatch_interval=settings.redispatch_interval,
        )
        self._hints = None if broker.memory else HintListener(broker, self._notify)
        self._loops = [
            upkeep.Loop(task, database, self.outbox)
            for task in (
                *upkeep.tasks(settings.promote_interval, settings.reap_interval, resume),
                upkeep.Task("tick", settings.promote_interval, ticking(ticked_job)),
            )
        ]
        services = assemble(database, self._threads, self.outbox, self._hub, self._fleet)
        self._server = _server(settings, services)
        self._settings = settings
        self._probes: Probes | None = None
        self._serving = False
        self._probe: asyncio.Task[None] | None = None

    @property
    def address(self) -> str:
        return self._server.address

    async def start(self) -> None:
        self._hub.start()
        self._fleet.start()
        self.outbox.start()
        if self._hints is not None:
            self._hints.start()
        for loop in self._loops:
            loop.start()
        await self._server.start()
        self._serving = True
        self._probes = serve_probes(self._settings, self._database, lambda: self._serving)
        self._probe = asyncio.create_task(self._probe_database(), name="probe")

    async def stop(self, grace_seconds: float) -> None:
        self._serving = False
        if self._probe is not None:
            self._probe.cancel()
        await self._server.stop(grace_seconds)
        await self._hub.stop()
        await self._fleet.stop()
        stops = [loop.stop for loop in self._loops]
        if self._hints is not None:
            stops.append(self._hints.stop)
        await asyncio.to_thread(_all, stops)
        await asyncio.to_thread(self.outbox.stop)
        self._threads.close()
        if self._probes is not None:
            await asyncio.to_thread(self._probes.close)

    def _notify(self, changes: Iterable[Change]) -> None:
        self._hub.notify(changes)
        self._fleet.notify()

    async def _probe_database(self) -> None:
        """Health says NOT_SERVING while the database is away."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + PROBE_SECONDS
            await asyncio.sleep(PROBE_SECONDS)
            metrics.LOOP_LAG.set(loop.time() - due)
            try:
                await self._threads.read(schema.ping)
                reached = True
            except DatabaseUnavailable:
                reached = False
            if reached is not self._serving:
                self._serving = reached
                self._server.set_serving(reached)


def _server(settings: Settings, services: Services) -> Server:
    try:
        tokens = follow_tokens(settings.tokens, settings.tokens_file)
        credentials = (
            server_credentials(settings.tls_cert, settings.tls_key, settings.tls_client_ca)
            if settings.tls_cert
            else None
        )
    except ValueError as error:
        raise CannotStart(str(error)) from error
    if tokens is not None and not tokens.current:
        telemetry.get_logger("jobsvc").warning("no line of the tokens names one: nobody may call")
    try:
        return Server(
            settings.listen,
            services,
            CallBoundary(Access(tokens)),
            credentials,
            share_port=settings.processes > 1,
        )
    except RuntimeError as error:
        raise CannotStart(f"cannot listen on {settings.listen}: is it taken?") from error


def _all(stops: list[Callable[[], None]]) -> None:
    """Side by side: each may wait for a step that is under way."""
    threads = [threading.Thread(target=stop) for stop in stops]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
