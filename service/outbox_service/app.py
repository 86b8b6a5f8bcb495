"""The ASGI application: its routes, limits and resources."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from importlib.metadata import version

from litestar import Litestar
from litestar.di import Provide
from litestar.openapi import OpenAPIConfig
from litestar.openapi.plugins import RedocRenderPlugin

from outbox.runtime.outage import Outage
from outbox.runtime.settings import ServiceSettings
from outbox_service import links, probes, problems, users
from outbox_service.notifier import RelayNotifier
from outbox_service.passwords import PasswordHasher
from outbox_service.pool import create_pool
from outbox_service.schemas import MAX_BODY
from outbox_service.store import Store
from outbox_service.users import SignUp


def create_app(settings: ServiceSettings, outage: Outage | None = None) -> Litestar:
    """Returns the ASGI application; it connects to Postgres when it starts.

    Args:
        settings: the service's settings.
        outage: the state of Postgres as the start found it.
    """
    outage = outage or Outage("Postgres")
    pool = create_pool(settings, outage)
    notifier = RelayNotifier(pool, settings.verify_email_delay)
    store = Store(pool, notifier, settings, outage)
    hasher = PasswordHasher(settings.hash_queue)
    sign_up = SignUp(hasher, store, settings.secret_key)

    @asynccontextmanager
    async def open_resources(_: Litestar) -> AsyncGenerator[None]:
        await pool.open(wait=False)
        notifying = asyncio.create_task(notifier.run())
        try:
            yield
        finally:
            notifying.cancel()
            with suppress(asyncio.CancelledError):
                await notifying
            hasher.close()
            await pool.close()

    return Litestar(
        route_handlers=[
            users.create_user,
            links.open_verification_link,
            links.verify_email,
            probes.healthz,
            probes.readyz,
        ],
        dependencies={
            "store": Provide(lambda: store, sync_to_thread=False),
            "sign_up": Provide(lambda: sign_up, sync_to_thread=False),
        },
        exception_handlers=problems.EXCEPTION_HANDLERS,
        lifespan=[open_resources],
        logging_config=None,
        request_max_body_size=MAX_BODY,
        openapi_config=OpenAPIConfig(
            title="Outbox service",
            version=version("outbox-service"),
            path="/schema",
            use_handler_docstrings=False,
            # In addition to JSON. Litestar's defaults include YAML, which blocks the loop for 35 ms per request.
            render_plugins=[RedocRenderPlugin(path="/")],
        ),
    )
