"""The settings of each process, read from the environment once, into one frozen object."""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from outbox.errors import SettingsError
from outbox.runtime import endpoints
from outbox.runtime.endpoints import Address, SmtpServer
from outbox.task import QUEUE_NAME


def _queue_weights(value: object) -> object:
    if not isinstance(value, str):
        return value
    weights: dict[str, int] = {}
    for part in value.split(","):
        name, _, weight = (piece.strip() for piece in part.partition("="))
        if not QUEUE_NAME.fullmatch(name) or not weight.isdecimal() or int(weight) < 1:
            raise ValueError("must be names with weights of at least 1, as in critical=10,default=5")
        if name in weights:
            raise ValueError(f"names queue {name} twice")
        weights[name] = int(weight)
    return weights


def _modules(value: object) -> object:
    if not isinstance(value, str):
        return value
    return tuple(name for part in value.split(",") if (name := part.strip()))


def _secret_key(value: str) -> str:
    if len(value) < 32:
        raise ValueError("must have at least 32 characters; 'openssl rand -hex 32' prints one")
    return value


LONGEST_LEASE = 300.0
"""Upper bound of a lease in seconds. A lease that ends later was written before Postgres' clock was set back."""

Seconds = Annotated[float, Field(gt=0, le=86_400 * 365)]


class _Environment(EnvSettingsSource):
    """Reads only the documented variables, and not `BATCH` or `LEASE` after the names of fields."""

    def __init__(self, settings: type[BaseSettings]) -> None:
        super().__init__(settings)
        self.config = SettingsConfigDict(**{**self.config, "populate_by_name": False})


class _Settings(BaseSettings):
    model_config = SettingsConfigDict(
        frozen=True, extra="ignore", hide_input_in_errors=True, env_ignore_empty=True, populate_by_name=True
    )

    log_level: Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(str.lower)] = Field(
        default="info", validation_alias="LOG_LEVEL"
    )
    log_format: Literal["console", "json"] | None = Field(default=None, validation_alias="LOG_FORMAT")

    @field_validator("*", mode="before")
    @classmethod
    def _check_encoding(cls, value: object) -> object:
        # Python decodes other bytes as surrogates, which cannot be encoded when they are sent.
        if isinstance(value, str) and re.search("[\ud800-\udfff]", value):
            raise ValueError("is not in UTF-8")
        return value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003 - the signature is pydantic-settings'
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Returns the sources of settings: arguments, then the environment."""
        return init_settings, _Environment(settings_cls)

    @classmethod
    def from_environment(cls) -> Self:
        """Reads and checks the environment.

        Raises:
            SettingsError: names every variable that is missing or wrong, one per line, without its value.
        """
        try:
            return cls()
        except ValidationError as error:
            raise SettingsError("\n".join(_sentence(violation) for violation in error.errors())) from None


def _sentence(violation: Any) -> str:
    name = violation["loc"][0]
    if violation["type"] == "missing":
        return f"{name} is not set: {_MISSING[name]}"
    reason = violation["ctx"]["error"] if violation["type"] == "value_error" else _lower_first(violation["msg"])
    return f"{name} is wrong: it {reason}" if violation["type"] == "value_error" else f"{name} is wrong: {reason}"


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]


_MISSING = {
    "DATABASE_URL": "set it to the Postgres database, as in postgresql://user:password@host:5432/database",
    "REDIS_URL": "set it to the Redis server, as in redis://localhost:6379/0",
    "SMTP_URL": "set it to the mail server, as in smtp+starttls://user:password@host:587",
    "MAIL_FROM": "set it to the sender of mails, as in 'Sign-up <no-reply@example.com>'",
    "PUBLIC_URL": "set it to where users reach the service, as in https://example.com; links in mails start with it",
    "SECRET_KEY": "set it to a secret of at least 32 characters; 'openssl rand -hex 32' prints one",
}


class DatabaseSettings(_Settings):
    """Settings of everything that opens the database."""

    database_url: Annotated[str, AfterValidator(endpoints.postgres_url)] = Field(
        validation_alias="DATABASE_URL", repr=False
    )
    transaction_pooling: bool = Field(default=False, validation_alias="OUTBOX_TRANSACTION_POOLING")


class _RedisSettings(DatabaseSettings):
    redis_url: Annotated[str, AfterValidator(endpoints.redis_url)] = Field(validation_alias="REDIS_URL", repr=False)
    queues: Annotated[dict[str, int], NoDecode, BeforeValidator(_queue_weights)] = Field(
        default={"critical": 10, "default": 5}, validation_alias="OUTBOX_QUEUES"
    )
    lease: Annotated[float, Field(gt=0, le=LONGEST_LEASE)] = Field(default=15, validation_alias="OUTBOX_LEASE")


class ServiceSettings(DatabaseSettings):
    """Settings of `outbox service`."""

    secret_key: Annotated[str, AfterValidator(_secret_key)] = Field(validation_alias="SECRET_KEY", repr=False)
    http_server_address: Annotated[Address, NoDecode, BeforeValidator(endpoints.http_address)] = Field(
        default=Address("127.0.0.1", 8080), validation_alias="HTTP_SERVER_ADDRESS"
    )
    verify_email_delay: float = Field(default=10, ge=0, le=86_400 * 365, validation_alias="VERIFY_EMAIL_DELAY")
    http_connections: int = Field(default=1000, ge=1, validation_alias="OUTBOX_HTTP_CONNECTIONS")
    hash_queue: int = Field(default=128, ge=1, validation_alias="OUTBOX_HASH_QUEUE")
    pool_size: int = Field(default=10, ge=1, le=1000, validation_alias="OUTBOX_POOL_SIZE")
    grace: Seconds = Field(default=25, validation_alias="OUTBOX_GRACE")


class RelaySettings(_RedisSettings):
    """Settings of `outbox relay`."""

    poll_interval: Seconds = Field(default=1, validation_alias="OUTBOX_POLL_INTERVAL")
    batch: int = Field(default=2000, ge=1, le=100_000, validation_alias="OUTBOX_BATCH")
    window: int = Field(default=10_000, ge=1, le=1_000_000_000, validation_alias="OUTBOX_WINDOW")
    horizon: Seconds = Field(default=60, validation_alias="OUTBOX_HORIZON")
    sweep_interval: Seconds = Field(default=2, validation_alias="OUTBOX_SWEEP_INTERVAL")
    sweep_grace: Seconds = Field(default=1, validation_alias="OUTBOX_SWEEP_GRACE")
    retention: Seconds = Field(default=86_400, validation_alias="OUTBOX_RETENTION")
    idempotency_retention: Seconds = Field(default=86_400, validation_alias="OUTBOX_IDEMPOTENCY_RETENTION")
    unverified_retention: Seconds | None = Field(default=None, validation_alias="OUTBOX_UNVERIFIED_RETENTION")


class WorkerSettings(_RedisSettings):
    """Settings of `outbox worker`."""

    smtp_server: Annotated[SmtpServer, NoDecode, BeforeValidator(endpoints.smtp_server)] = Field(
        validation_alias="SMTP_URL"
    )
    mail_from: Annotated[str, AfterValidator(endpoints.mail_from)] = Field(validation_alias="MAIL_FROM")
    public_url: Annotated[str, AfterValidator(endpoints.http_url)] = Field(validation_alias="PUBLIC_URL")
    secret_key: Annotated[str, AfterValidator(_secret_key)] = Field(validation_alias="SECRET_KEY", repr=False)
    concurrency: int = Field(default=32, ge=1, le=1000, validation_alias="OUTBOX_CONCURRENCY")
    handler_connections: int = Field(default=4, ge=1, le=1000, validation_alias="OUTBOX_HANDLER_CONNECTIONS")
    grace: Seconds = Field(default=25, validation_alias="OUTBOX_GRACE")
    smtp_timeout: Seconds = Field(default=10, validation_alias="OUTBOX_SMTP_TIMEOUT")
    mail_connections: int = Field(default=8, ge=1, le=1000, validation_alias="OUTBOX_MAIL_CONNECTIONS")
    smtp_helo: Annotated[str, AfterValidator(endpoints.helo_name)] | None = Field(
        default=None, validation_alias="OUTBOX_SMTP_HELO"
    )
    link_lifetime: Seconds = Field(default=900, validation_alias="OUTBOX_LINK_LIFETIME")
    unhandled_grace: float = Field(default=3600, ge=0, le=86_400 * 365, validation_alias="OUTBOX_UNHANDLED_GRACE")
    handlers: Annotated[tuple[str, ...], NoDecode, BeforeValidator(_modules)] = Field(
        default=(), validation_alias="OUTBOX_HANDLERS"
    )
