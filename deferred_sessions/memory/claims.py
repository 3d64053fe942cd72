"""Claims on sessions and on portions of them, among the threads and processes of a host.

Called by `session_lock` and `busy`. A claim is held in two places: in a line per session
in this process, where threads and tasks wait in the order in which they came, and as
kernel record locks on one file, which exclude other processes. Invariant: no timer and
no other process ever breaks a claim; the kernel frees those of a process that dies.

Portions are bytes of the file: whoever claims portions of a session also has a shared
lock on the session's own byte, and whoever claims all of it an exclusive one. The bytes
of one claim are always locked in the same order, so claims on several portions cannot
wait for each other in a circle.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from contextlib import suppress
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Final

from deferred_sessions.exceptions import LockOrderError, LockTimeoutError
from deferred_sessions.memory import forks
from deferred_sessions.memory.directory import make_private

FILE: Final = "claims.lock"
PAUSES: Final = (0.0005, 0.001, 0.002, 0.004, 0.008)  # seconds between looks at a lock
_FLOCK: Final = struct.Struct("hhqqi4x")  # type, whence, start, length, process


class Claim:
    """One holder's right to a session, or to portions of it."""

    __slots__ = (
        "began",
        "had_to_wait",
        "has_turn",
        "key",
        "locked",
        "names",
        "owner",
        "since",
        "wake",
    )

    def __init__(
        self, key: str, names: frozenset[str], owner: Hashable, wake: Callable[[], object]
    ) -> None:
        self.key = key
        self.names = names
        """The portions; none means the whole session."""
        self.owner = owner
        self.wake = wake
        """Called when it has its turn."""
        self.has_turn = False
        """Nobody in this process excludes it."""
        self.locked: list[int] = []
        """The bytes that are locked for it, in order."""
        self.since = 0.0
        """When it was complete, monotonic; 0.0 before."""
        self.began = time.monotonic()
        """When it was made, monotonic."""
        self.had_to_wait = False
        """Somebody else had what it wants."""

    def excludes(self, other: Claim) -> bool:
        """Tell whether the two must not be held at once."""
        return not (self.names and other.names) or not self.names.isdisjoint(other.names)

    def wanted(self) -> list[tuple[int, int]]:
        """Return the bytes to lock, and how, in the order in which everybody locks them."""
        if not self.names:
            return [(_byte(self.key), fcntl.LOCK_EX)]
        portions = sorted(_byte(f"{self.key}\0{name}") for name in self.names)
        return [(_byte(self.key), fcntl.LOCK_SH), *((byte, fcntl.LOCK_EX) for byte in portions)]


class Claims:
    """All claims of this process."""

    def __init__(self, directory: Path, *, file: str = FILE) -> None:
        self.is_wanted: Callable[[str], bool] = lambda _: False
        """Tells whether another node waits for a session: who holds nothing of it yet waits
        until that node has got it."""
        self.on_waited: Callable[[float, bool], object] = lambda *_: None
        """Called after a wait with its seconds, and whether it was in vain."""
        self._path = directory / file
        self._mutex = threading.Lock()
        self._lines: dict[str, list[Claim]] = {}  # by session: held, then waiting, in order
        self._users: Counter[int] = Counter()  # claims of this process on each locked byte
        self._descriptor = -1

    def hold(
        self, key: str, names: frozenset[str], owner: Hashable, timeout: float
    ) -> Claim | None:
        """Wait for the session of `key`, or those portions of it, and hold them.

        What `owner` holds already is not waited for: the claim is for the rest, and there
        is none, None, if nothing is left.

        Raises:
            LockTimeoutError: Somebody else held on to it for `timeout` seconds.
            LockOrderError: `owner` has portions and now wants the whole session.
        """
        deadline = time.monotonic() + timeout
        for pause in self._until_unwanted(key, owner, deadline):
            time.sleep(pause)
        turn = threading.Event()
        claim = self._line_up(key, names, owner, turn.set)
        if claim is None:
            return None
        try:
            turn.wait(max(0.0, deadline - time.monotonic()))
            for pause in self._until_locked(claim, deadline, timeout):
                time.sleep(pause)
        except BaseException:
            self.release(claim)
            raise
        return claim

    async def ahold(
        self, key: str, names: frozenset[str], owner: Hashable, timeout: float
    ) -> Claim | None:
        """Do what `hold` does, without holding up the event loop."""
        deadline = time.monotonic() + timeout
        for pause in self._until_unwanted(key, owner, deadline):
            await asyncio.sleep(pause)
        loop, turn = asyncio.get_running_loop(), asyncio.Event()
        claim = self._line_up(key, names, owner, partial(loop.call_soon_threadsafe, turn.set))
        if claim is None:
            return None
        try:
            with suppress(TimeoutError):
                await asyncio.wait_for(turn.wait(), deadline - time.monotonic())
            for pause in self._until_locked(claim, deadline, timeout):
                await asyncio.sleep(pause)
        except BaseException:
            self.release(claim)
            raise
        return claim

    def release(self, claim: Claim) -> None:
        """Let go; the next in line goes on. Safe to call twice."""
        with self._mutex:
            line = self._lines.get(claim.key, [])
            if claim not in line:
                return
            line.remove(claim)
            for byte in reversed(claim.locked):
                self._users[byte] -= 1
                if not self._users[byte]:
                    del self._users[byte]
                    fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, byte)
            claim.locked.clear()
            if line:
                _give_turns(line)
            else:
                del self._lines[claim.key]

    def before_fork(self) -> None:
        """Keep other threads from changing anything while the process forks."""
        self._mutex.acquire()

    def after_fork(self, *, in_child: bool) -> None:
        """Forget in a child what its parent holds; the kernel does so, too."""
        if in_child:
            self._lines, self._users = {}, Counter()
            if self._descriptor >= 0:
                os.close(self._descriptor)
                self._descriptor = -1
        self._mutex.release()

    def _line_up(
        self, key: str, names: frozenset[str], owner: Hashable, wake: Callable[[], object]
    ) -> Claim | None:
        """Return a new claim in the line; None if `owner` has it all already.

        At its end, unless `owner` holds something: who waits for that must not be waited for.
        """
        forks.watch(self)
        with self._mutex:
            line = self._lines.setdefault(key, [])
            mine = [claim for claim in line if claim.owner == owner and claim.since]
            if mine and not names and all(claim.names for claim in mine):
                raise LockOrderError(
                    "Portions of the session are locked here, and now all of it: lock the "
                    "whole session first."
                )
            missing = names.difference(*(claim.names for claim in mine))
            if mine and (not missing or not all(claim.names for claim in mine)):
                return None
            claim = Claim(key, missing, owner, wake)
            line.insert(_first_waiting(line) if mine else len(line), claim)
            _give_turns(line)
            claim.had_to_wait = not claim.has_turn
        return claim

    def _until_unwanted(self, key: str, owner: Hashable, deadline: float) -> Iterator[float]:
        """Yield the pauses to make until no other node waits for the session, or until then."""
        while self.is_wanted(key) and time.monotonic() < deadline:
            with self._mutex:
                if any(claim.owner == owner for claim in self._lines.get(key, ())):
                    return  # the other node waits for this very owner
            yield PAUSES[0]

    def _until_locked(self, claim: Claim, deadline: float, timeout: float) -> Iterator[float]:
        """Yield the pauses to make until `claim`, which should have its turn, is complete."""
        pauses = iter(PAUSES)
        pause = next(pauses)
        while not (claim.has_turn and self._lock(claim)):
            if not claim.has_turn or time.monotonic() + pause > deadline:
                raise self._timed_out(claim, timeout)
            claim.had_to_wait = True
            yield pause
            pause = next(pauses, pause)

    def _lock(self, claim: Claim) -> bool:
        """Lock the bytes that are still missing; return whether the claim is complete."""
        with self._mutex:
            if self._descriptor < 0:
                self._descriptor = self._open()
            for byte, kind in claim.wanted()[len(claim.locked) :]:
                try:
                    fcntl.lockf(self._descriptor, kind | fcntl.LOCK_NB, 1, byte)
                except (BlockingIOError, PermissionError):  # POSIX allows EAGAIN and EACCES
                    return False
                claim.locked.append(byte)
                self._users[byte] += 1
            claim.since = time.monotonic()
        if claim.had_to_wait:
            self.on_waited(claim.since - claim.began, False)
        return True

    def _open(self) -> int:
        make_private(self._path.parent)
        flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
        return os.open(self._path, flags, 0o600)

    def _timed_out(self, claim: Claim, timeout: float) -> LockTimeoutError:
        """Say what was waited for, and who has it."""
        self.on_waited(timeout, True)
        what = f"Portions {sorted(claim.names)} of a session" if claim.names else "A session"
        with self._mutex:
            line = self._lines.get(claim.key, [])
            held = [other for other in line if other.since and other.excludes(claim)]
            if held:
                age = time.monotonic() - min(other.since for other in held)
                who = f"this process ({os.getpid()}), for {age:.1f} s"
            else:
                who = f"process {self._holder(claim)}"
        return LockTimeoutError(f"{what}: waited {timeout:g} s; held by {who}.")

    def _holder(self, claim: Claim) -> str:
        """Return which process keeps us from locking the next byte of `claim`."""
        for byte, kind in claim.wanted()[len(claim.locked) :]:
            wanted = fcntl.F_WRLCK if kind == fcntl.LOCK_EX else fcntl.F_RDLCK
            question = _FLOCK.pack(wanted, os.SEEK_SET, byte, 1, 0)
            answer = fcntl.fcntl(self._descriptor, fcntl.F_GETLK, question)
            found, _, _, _, process = _FLOCK.unpack(answer)
            if found != fcntl.F_UNLCK:
                return str(process)
        return "that has just let go"


def _give_turns(line: list[Claim]) -> None:
    """Give their turn to all in `line` whom nobody before them excludes."""
    for place, claim in enumerate(line):
        if not claim.has_turn and not any(map(claim.excludes, line[:place])):
            claim.has_turn = True
            claim.wake()


def _first_waiting(line: list[Claim]) -> int:
    return next((place for place, claim in enumerate(line) if not claim.has_turn), len(line))


def _byte(name: str) -> int:
    """Return the byte of the file that stands for `name`: 62 bits of its digest."""
    digest = blake2b(name.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2
