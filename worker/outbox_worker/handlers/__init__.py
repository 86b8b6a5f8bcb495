"""The handlers of a worker: the one for verification mails, and those of `OUTBOX_HANDLERS`."""

from outbox.runtime.settings import WorkerSettings
from outbox_worker.handlers.send_verify_email import verification_mail
from outbox_worker.registry import Registry, load_registry


def registry(settings: WorkerSettings) -> Registry:
    """Returns all handlers by task name.

    Raises:
        TaskError: a module cannot be imported, or two handlers claim one task.
    """
    return load_registry(settings.handlers, own=[verification_mail(settings)])
