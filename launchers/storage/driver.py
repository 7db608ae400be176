"""A run in an object store, in the hands of one driver."""

import dataclasses
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from launchers.storage.journals import JournalMirror
from launchers.storage.lock import StoreLock
from launchers.storage.working_copy import LOCK, WorkingCopy
from sbf_dist.errors import UserError
from sbf_dist.object_storage import StoreUnreachableError
from sbf_dist.patience import patiently

_log = logging.getLogger(__name__)


@contextmanager
def taken_over(copy: WorkingCopy) -> Iterator[tuple[WorkingCopy, JournalMirror]]:
    """Hold a run's lock and mirror its journals; gives the copy, which is equal to the store then.

    The caller must have the copy for itself on this machine. At the end all is published that the
    store takes. UserError if another driver has the run, or takes it over.
    """
    lock = StoreLock(copy.store.child(LOCK), copy.store.address, copy.id)
    patiently(lock.take)
    with lock:
        own = dataclasses.replace(copy, guard=lock.check)
        own.take_over()
        try:
            with JournalMirror(own, fetches=True) as mirror:
                yield own, mirror
        except KeyboardInterrupt:
            with suppress(StoreUnreachableError):
                lock.check()  # which may be the reason
            raise
        finally:
            try:
                own.publish_once()
            except (StoreUnreachableError, UserError) as error:
                _log.warning("unpublished files remain in %s: %s", own.root, error)
