"""Every error this package raises, in one place that imports nothing.

All of them share one root, so that `except DeferredSessionsError` catches whatever
this package can say; each leaf also inherits the built-in that means the same, so
that code which knows nothing of this package still understands it.

    DeferredSessionsError
     ├── StoreError                    the host store cannot be used as asked
     │    ├── UnsafeDirectoryError       (PermissionError)  not private, or not ours
     │    ├── StoreUnavailableError      (OSError)          cannot be opened or made
     │    ├── StoreMismatchError         (ValueError)       belongs to another project
     │    ├── StoreFullError             (OSError)          no room, even after eviction
     │    └── JournalError               (OSError)          a log cannot be used
     ├── RecordCorruptError            (ValueError)       bytes that are not a record
     ├── ServerUnavailableError        (ConnectionError)  PostgreSQL cannot be asked
     │    └── SessionAwayError           (ConnectionError)  the one server that may know is out
     ├── RowRefusedError               (ValueError)       PostgreSQL refused this data
     │    └── RowLockedError             (TimeoutError)     somebody holds the row
     ├── NotListableError              (TypeError)        sessions known by their keys only
     ├── SessionDeletedError           (LookupError)      deleted while it was in use
     ├── ReadOnlySessionError          (TypeError)        changed where that was ruled out
     ├── LockOrderError                (RuntimeError)     a lock that could never be had
     └── LockTimeoutError              (TimeoutError)     somebody else has it
          └── SessionBusy               (TimeoutError)     another request has the session

The session engine itself raises Django's `CreateError` and `UpdateError`, because
those are part of Django's contract.
"""

from __future__ import annotations


class DeferredSessionsError(Exception):
    """Root of all errors of this package."""


class StoreError(DeferredSessionsError):
    """The host store cannot be used as asked."""


class UnsafeDirectoryError(StoreError, PermissionError):
    """The directory is a link, belongs to somebody else, or is open to others."""


class StoreUnavailableError(StoreError, OSError):
    """The host store cannot be created or opened."""


class StoreMismatchError(StoreError, ValueError):
    """The host store in this directory belongs to another project or database."""


class StoreFullError(StoreError, OSError):
    """The host store has no room, even after eviction; nothing was changed."""


class JournalError(StoreError, OSError):
    """A log of the journal cannot be read or written."""


class RecordCorruptError(DeferredSessionsError, ValueError):
    """These bytes are not a record this version can read."""


class ServerUnavailableError(DeferredSessionsError, ConnectionError):
    """The session server cannot be asked now; it says nothing about any session."""


class SessionAwayError(ServerUnavailableError):
    """The session servers that answer do not have the session; one that does not might."""


class RowRefusedError(DeferredSessionsError, ValueError):
    """The session server works, but refused the rows of this statement."""


class RowLockedError(RowRefusedError, TimeoutError):
    """A transaction of the application holds a row; nothing is wrong with the data."""


class NotListableError(DeferredSessionsError, TypeError):
    """The engine of before cannot tell which sessions it has."""


class SessionDeletedError(DeferredSessionsError, LookupError):
    """The session was deleted since it was loaded; it must not come back."""


class ReadOnlySessionError(DeferredSessionsError, TypeError):
    """A session was changed in a view that had promised only to read it."""


class LockOrderError(DeferredSessionsError, RuntimeError):
    """The whole session cannot be locked by who has locked portions of it."""


class LockTimeoutError(DeferredSessionsError, TimeoutError):
    """Somebody else held a session, or a portion of it, for too long."""


class SessionBusy(LockTimeoutError):  # noqa: N818 - the name of the state, as in the design
    """Another request held the session for too long; HTTP 503."""
