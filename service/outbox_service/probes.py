"""What a supervisor or load balancer asks."""

from litestar import MediaType, get
from litestar.di import NamedDependency
from litestar.openapi.datastructures import ResponseSpec
from litestar.openapi.spec import Example

from outbox_service import problems
from outbox_service.schemas import Health
from outbox_service.store import Store


@get(
    "/healthz",
    summary="Is the process alive?",
    responses={
        200: ResponseSpec(
            Health, description="It is.", generate_examples=False, examples=[Example(value={"status": "ok"})]
        )
    },
)
async def healthz() -> Health:
    """Answers while the process lives, whatever the database does."""
    return Health(status="ok")


@get(
    "/readyz",
    summary="Can it serve?",
    description="Whether Postgres answers, may be written to and is migrated. Redis does not matter here.",
    media_type=MediaType.JSON,
    responses={
        200: ResponseSpec(
            Health, description="It can.", generate_examples=False, examples=[Example(value={"status": "ready"})]
        ),
        503: problems.DESCRIBED_AWAY,
    },
)
async def readyz(store: NamedDependency[Store]) -> Health:
    """Answers 200 when users can be created, and 503 until then."""
    await store.check_ready()
    return Health(status="ready")
