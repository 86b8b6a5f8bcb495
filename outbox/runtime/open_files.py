"""The limit of open files, which connections count towards."""

import resource
from contextlib import suppress

from outbox.runtime import logs


def raise_limit(connections: int, reserve: int, settings: str) -> int:
    """Raises this process' limit of open files as far as needed and allowed; warns if that is not enough.

    Only the soft limit can be raised. It is low by default for programs that call `select`.

    Args:
        connections: upper bound of connections, from the settings.
        reserve: descriptors that the process needs for everything else.
        settings: the variables that set `connections`, for the warning.

    Returns:
        The number of those connections that the limit allows, at least 1.
    """
    needed = connections + reserve
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        with suppress(OSError, ValueError):  # macOS has another limit
            resource.setrlimit(
                resource.RLIMIT_NOFILE, (needed if hard == resource.RLIM_INFINITY else min(needed, hard), hard)
            )
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return connections
    room = max(1, soft - reserve)
    logs.get().warning(
        "too few open files",
        limit=soft,
        needed=needed,
        room=room,
        remedy=f"raise the limit of open files (ulimit -n, LimitNOFILE) to {needed}, or lower {settings}",
    )
    return room
