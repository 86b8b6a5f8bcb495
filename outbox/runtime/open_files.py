"""The limit of open files, which include connections."""

import resource
from contextlib import suppress

from outbox.runtime import logs


def provide(wanted: int, reserve: int, settings: str) -> int:
    """Raises this process' limit of open files as far as needed and allowed, and warns if that is not enough.

    Only the soft limit can be raised. It is low by default for programs that call `select`.

    Args:
        wanted: connections that the settings allow for.
        reserve: descriptors that the process needs for everything else.
        settings: the variables that set `wanted`, for the warning.

    Returns:
        How many of the wanted connections there are descriptors for, 1 at least.
    """
    needed = wanted + reserve
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        with suppress(OSError, ValueError):  # macOS has a limit of its own besides
            resource.setrlimit(
                resource.RLIMIT_NOFILE, (needed if hard == resource.RLIM_INFINITY else min(needed, hard), hard)
            )
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wanted
    room = max(1, soft - reserve)
    logs.get().warning(
        "too few open files",
        limit=soft,
        needed=needed,
        room=room,
        remedy=f"raise the limit of open files (ulimit -n, LimitNOFILE) to {needed}, or lower {settings}",
    )
    return room
