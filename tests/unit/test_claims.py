"""Claims on sessions and portions: threads, tasks and processes."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from deferred_sessions.exceptions import LockOrderError, LockTimeoutError
from deferred_sessions.memory.claims import Claim, Claims

KEY = "session00001"
ALL: frozenset[str] = frozenset()
FORK = multiprocessing.get_context("fork")


def names(*portions: str) -> frozenset[str]:
    return frozenset(portions)


@pytest.fixture
def claims(tmp_path: Path) -> Claims:
    return Claims(tmp_path / "store")


@pytest.fixture
def another_process(claims: Claims) -> Iterator[Callable[..., Any]]:
    """Have another process hold a claim; return the process."""
    started: list[Any] = []

    def hold(*portions: str, key: str = KEY) -> Any:
        ready = FORK.Event()

        def work() -> None:
            claims.hold(key, names(*portions), "other", 5)
            ready.set()
            time.sleep(60)

        process = FORK.Process(target=work)
        process.start()
        started.append(process)
        assert ready.wait(30)
        return process

    yield hold
    for process in started:
        process.kill()
        process.join()


def test_portions_that_differ_do_not_exclude_each_other(claims: Claims) -> None:
    """C05: a thread has a portion; others can use other portions meanwhile."""
    cart = claims.hold(KEY, names("cart"), 1, 0)
    coupon = claims.hold(KEY, names("coupon"), 2, 0)
    other = claims.hold("session00002", names("cart"), 2, 0)
    assert None not in (cart, coupon, other)


@pytest.mark.parametrize(
    ("held", "wanted"),
    [
        (names("cart"), names("cart")),
        (names("cart", "coupon"), names("coupon", "address")),
        (names("cart"), ALL),
        (ALL, names("cart")),
        (ALL, ALL),
    ],
)
def test_c05_what_overlaps_excludes(
    claims: Claims, held: frozenset[str], wanted: frozenset[str]
) -> None:
    """C05: and no other thread can use that portion meanwhile."""
    claim = claims.hold(KEY, held, 1, 0)
    with pytest.raises(LockTimeoutError, match=f"held by this process .{os.getpid()}"):
        claims.hold(KEY, wanted, 2, 0.01)

    assert claim is not None
    claims.release(claim)
    claims.release(claim)
    assert claims.hold(KEY, wanted, 2, 0) is not None


@pytest.mark.parametrize(
    ("held", "wanted"),
    [((), ("cart",)), (("cart",), ()), (("cart",), ("cart", "coupon")), ((), ())],
)
def test_processes_exclude_each_other(
    claims: Claims, another_process: Callable[..., Any], held: Any, wanted: Any
) -> None:
    process = another_process(*held)
    with pytest.raises(LockTimeoutError, match=f"held by process {process.pid}"):
        claims.hold(KEY, names(*wanted), 1, 0.02)

    process.kill()
    process.join()
    assert claims.hold(KEY, names(*wanted), 1, 5) is not None


def test_processes_share_a_session_by_portions(
    claims: Claims, another_process: Callable[..., Any]
) -> None:
    another_process("cart")
    mine = claims.hold(KEY, names("coupon"), 1, 0)
    also = claims.hold(KEY, names("address"), 2, 0)
    assert mine is not None
    claims.release(mine)

    assert also is not None
    assert claims.hold(KEY, names("coupon"), 3, 0) is not None


def test_a_dead_holder_lets_waiters_go_on_at_once(
    claims: Claims, another_process: Callable[..., Any]
) -> None:
    """Trap 6: a lock does not survive its owner."""
    process = another_process("cart")
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(claims.hold, KEY, names("cart"), 1, 30)
        os.kill(process.pid, signal.SIGKILL)
        assert waiting.result(30) is not None


def test_a_stopped_holder_is_never_robbed(
    claims: Claims, another_process: Callable[..., Any]
) -> None:
    """Trap 6: no timer breaks a lock while its owner lives; the waiter is told who has it."""
    process = another_process("cart")
    os.kill(process.pid, signal.SIGSTOP)
    with pytest.raises(LockTimeoutError, match=str(process.pid)):
        claims.hold(KEY, names("cart"), 1, 0.05)
    os.kill(process.pid, signal.SIGCONT)


def test_threads_have_their_turn_in_the_order_they_came(claims: Claims) -> None:
    first = claims.hold(KEY, names("cart"), "first", 0)
    order: list[int] = []

    def wait(number: int) -> None:
        claim = claims.hold(KEY, names("cart") if number % 2 else ALL, number, 30)
        order.append(number)
        assert claim is not None
        claims.release(claim)

    threads = [threading.Thread(target=wait, args=(number,)) for number in range(8)]
    for count, thread in enumerate(threads, start=2):
        thread.start()
        while len(claims._lines[KEY]) < count:
            time.sleep(0.001)
    assert first is not None
    claims.release(first)
    for thread in threads:
        thread.join(30)

    assert order == list(range(8))
    assert claims._lines == {}
    assert not claims._users


def test_who_comes_later_does_not_overtake(claims: Claims) -> None:
    """A waiter for the whole session is not starved by those who want portions."""
    held = claims.hold(KEY, names("cart"), 1, 0)
    with ThreadPoolExecutor(2) as pool:
        whole = pool.submit(claims.hold, KEY, ALL, 2, 30)
        while len(claims._lines[KEY]) < 2:
            time.sleep(0.001)
        with pytest.raises(LockTimeoutError):
            claims.hold(KEY, names("coupon"), 3, 0.01)
        assert held is not None
        claims.release(held)
        assert whole.result(30) is not None


def test_it_is_re_entrant(claims: Claims) -> None:
    cart = claims.hold(KEY, names("cart"), 1, 0)
    assert claims.hold(KEY, names("cart"), 1, 0) is None
    coupon = claims.hold(KEY, names("cart", "coupon"), 1, 0)
    assert coupon is not None
    assert coupon.names == {"coupon"}
    with pytest.raises(LockTimeoutError):
        claims.hold(KEY, names("cart"), 2, 0)
    with pytest.raises(LockOrderError, match="lock the whole session first"):
        claims.hold(KEY, ALL, 1, 0)

    for claim in (cart, coupon):
        assert claim is not None
        claims.release(claim)
    assert claims.hold(KEY, ALL, 1, 0) is not None
    assert claims.hold(KEY, ALL, 1, 0) is None
    assert claims.hold(KEY, names("cart"), 1, 0) is None


def test_who_waits_for_me_is_not_waited_for(claims: Claims) -> None:
    """A second portion, while somebody waits for the first and all the others."""
    first = claims.hold(KEY, names("cart"), "me", 1)
    with ThreadPoolExecutor(1) as pool:
        whole = pool.submit(claims.hold, KEY, ALL, "other", 30)
        while len(claims._lines[KEY]) < 2:
            time.sleep(0.001)
        second = claims.hold(KEY, names("coupon"), "me", 0)
        assert not whole.done()
        for claim in (first, second):
            assert claim is not None
            claims.release(claim)
        assert whole.result() is not None


def test_several_portions_at_once_do_not_deadlock(claims: Claims) -> None:
    """Two threads and two processes name the same portions in different orders."""

    def work(first: str, second: str) -> None:
        for _ in range(100):
            claim = claims.hold(KEY, names(first, second), threading.get_ident(), 30)
            assert claim is not None
            claims.release(claim)

    processes = [FORK.Process(target=work, args=("a", "b")) for _ in range(2)]
    for process in processes:
        process.start()
    with ThreadPoolExecutor(2) as pool:
        for done in [pool.submit(work, "a", "b"), pool.submit(work, "b", "a")]:
            done.result(60)
    for process in processes:
        process.join(60)
        assert process.exitcode == 0


def test_tasks_wait_without_holding_up_the_event_loop(claims: Claims) -> None:
    async def work() -> list[str]:
        told: list[str] = []

        async def use(name: str) -> None:
            claim = await claims.ahold(KEY, names("cart"), name, 30)
            told.append(f"{name} in")
            await asyncio.sleep(0)
            told.append(f"{name} out")
            assert claim is not None
            claims.release(claim)

        await asyncio.gather(use("a"), use("b"), use("c"))
        return told

    assert asyncio.run(work()) == ["a in", "a out", "b in", "b out", "c in", "c out"]


def test_a_task_that_is_cancelled_leaves_the_line(
    claims: Claims, another_process: Callable[..., Any]
) -> None:
    """The client goes away: whoever waits behind must not wait for it."""
    another_process("coupon")

    async def work() -> None:
        held = await claims.ahold(KEY, names("cart"), "a", 30)
        in_line = asyncio.create_task(claims.ahold(KEY, names("cart"), "b", 30))
        at_the_lock = asyncio.create_task(claims.ahold(KEY, names("coupon"), "c", 30))
        await asyncio.sleep(0.01)
        for task in (in_line, at_the_lock):
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert held is not None
        claims.release(held)

    asyncio.run(work())
    assert claims._lines == {}
    assert not claims._users


def test_a_task_times_out(claims: Claims) -> None:
    async def work() -> None:
        assert await claims.ahold(KEY, names("cart"), "a", 30) is not None
        assert await claims.ahold(KEY, names("cart"), "a", 30) is None
        with pytest.raises(LockTimeoutError):
            await claims.ahold(KEY, names("cart"), "b", 0.01)

    asyncio.run(work())


def test_a_child_has_no_claims_of_its_parent(claims: Claims) -> None:
    held = claims.hold(KEY, names("cart"), 1, 0)

    def work() -> None:
        with pytest.raises(LockTimeoutError, match=f"process {os.getppid()}"):
            claims.hold(KEY, names("cart"), 1, 0.01)

    child = FORK.Process(target=work)
    child.start()
    child.join(30)
    assert child.exitcode == 0
    assert isinstance(held, Claim)
    claims.release(held)


def test_a_wait_for_another_process_is_told(
    claims: Claims, another_process: Callable[..., Any]
) -> None:
    told: list[tuple[float, bool]] = []
    claims.on_waited = lambda seconds, was_in_vain: told.append((seconds, was_in_vain))
    process = another_process("cart")

    def has_tried() -> bool:
        with claims._mutex:
            return any(claim.locked for claim in claims._lines.get(KEY, []))

    with pytest.raises(LockTimeoutError):
        claims.hold(KEY, names("cart"), 1, 0.01)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(claims.hold, KEY, names("cart"), 1, 30)
        while not has_tried():
            time.sleep(0.001)
        process.kill()
        assert waiting.result(30) is not None
    claims.hold(KEY, names("coupon"), 1, 0)
    assert told[0] == (0.01, True)
    assert [was_in_vain for _, was_in_vain in told] == [True, False]


def test_portions_with_odd_names(claims: Claims) -> None:
    """Whatever can be a key of a session; and none is taken for another."""
    odd = ["", "\0", "é", "x" * 10_000, "\ud800"]
    held = [claims.hold(KEY, names(name), number, 0) for number, name in enumerate(odd)]
    assert None not in held
