"""Health and reflection: nobody needs a token for them."""

from __future__ import annotations

from tests.conformance.scenarios import scenario
from tests.conformance.scene import SERVICES, Scene

HEALTH = "grpc.health.v1.Health"


@scenario()
def every_service_is_healthy(scene: Scene) -> None:
    for service in ("", *SERVICES):
        reply = scene.caller.call(f"{HEALTH}/Check", {"service": service})
        assert (reply.code, reply.body) == ("OK", {"status": "SERVING"}), service
    reply = scene.caller.call(f"{HEALTH}/Check", {"service": "jobsvc.v1.Nothing"})
    assert reply.code == "NOT_FOUND"


@scenario()
def health_can_be_watched(scene: Scene) -> None:
    with scene.caller.stream(f"{HEALTH}/Watch", {"service": SERVICES[0]}) as stream:
        assert stream.take() == {"status": "SERVING"}


@scenario()
def reflection_lists_every_service(scene: Scene) -> None:
    reflection = {"grpc.reflection.v1.ServerReflection", "grpc.reflection.v1alpha.ServerReflection"}
    assert {*SERVICES, HEALTH, *reflection} <= set(scene.caller.services())
