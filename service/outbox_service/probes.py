"""Liveness and readiness probes, for a supervisor or load balancer."""

from litestar import MediaType, get
from litestar.di import NamedDependency
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import Example

from outbox_service import problems
from outbox_service.schemas import Health
from outbox_service.store import Store


@get(
    "/healthz",
    summary="Liveness probe",
    responses={
        200: ResponseSpec(
            Health,
            description="The process is alive.",
            generate_examples=False,
            examples=[Example(value={"status": "ok"})],
        )
    },
)
async def healthz() -> Health:
    """Answers 200 while the process runs, whatever the state of the database."""
    return Health(status="ok")


@get(
    "/readyz",
    summary="Readiness probe",
    description="Checks that Postgres answers, accepts writes and is migrated. Redis is not needed.",
    media_type=MediaType.JSON,
    responses={
        200: ResponseSpec(
            Health,
            description="The service can create users.",
            generate_examples=False,
            examples=[Example(value={"status": "ready"})],
        ),
        503: problems.DESCRIBED_AWAY,
    },
)
async def readyz(store: NamedDependency[Store]) -> Health:
    """Answers 200 if users can be created, else 503."""
    await store.check_ready()
    return Health(status="ready")
