"""What becomes of speed and memory when the host holds a million sessions."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import lmdb
from django.contrib.sessions.backends.base import VALID_KEY_CHARS
from django.test import override_settings

from benchmarks.engines import NOTHING, OURS
from benchmarks.measure import Goal, Plot, Scale, Table, median, medians, seconds
from benchmarks.sessions import content
from deferred_sessions import lifecycle
from deferred_sessions.backend import SessionStore
from deferred_sessions.memory.store import BATCH
from deferred_sessions.record import SessionRecord
from deferred_sessions.runtime import Runtime, get_runtime

FEW, DUE, CYCLES = 1_000, 1_000, 2_000
SIZE = 300
STORE_SIZE = 1 << 30
FRESH = """
import json, os, sys, time
import django; django.setup()
from pathlib import Path
from django.test import Client
from benchmarks.settings import SESSION_ENGINE
from importlib import import_module
store = import_module(SESSION_ENGINE).SessionStore
keys = json.load(sys.stdin)
client = Client()
client.get("/probe/nothing/")
client.cookies["sessionid"] = keys.pop()
started = time.perf_counter()
assert client.get("/probe/count/").status_code == 200
first = time.perf_counter() - started
for key in keys:
    session = store(key)
    session["count"] = session["count"] + 1
    session.save()
lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
own = next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))
print(json.dumps([first, own * 1024]))
"""


class Store(NamedTuple):
    """A host store with sessions that PostgreSQL has."""

    runtime: Runtime
    keys: list[str]
    payload: int
    """Bytes of all payloads."""


class Held(NamedTuple):
    """What a store takes that holds so many sessions."""

    same: float
    """µs of load + change + save, of visitors who come again and again."""
    any: float
    """The same, of all, each as likely as any other."""
    tick: float
    """ms to find and mark what is due."""
    share: float
    """Bytes for a byte of payload."""


class Bare(NamedTuple):
    """What an LMDB takes in which there is nothing but keys and payloads."""

    cycle: float
    """µs to read a payload and to put it, in a transaction each."""
    tick: float
    """ms to read and put `DUE` of them, as many in a transaction as a flush does."""
    share: float
    """Bytes for a byte of payload."""


def measure(scale: Scale) -> Iterator[Table | Goal | Plot]:
    """Yield tables of few and many sessions."""
    many = scale.of(1_000_000, 50_000)
    rows, figures = [], {}
    for number in (FEW, many):
        place = f"{os.environ['SESSION_DIRECTORY']}-{number}"
        with override_settings(DEFERRED_SESSIONS={"DIRECTORY": place, "STORE_SIZE": STORE_SIZE}):
            scale.progress(f"filling a store with {number:,} sessions")
            store = filled(number)
            figures[number] = of(store, scale)
            if number == many:
                yield from workers(store, place, scale)
        rows.append((f"{number:,} sessions", *(f"{f:,.1f}" for f in figures[number])))
    unused = of_unused(scale)
    limits = {number: bare(number, SIZE, scale) for number in (FEW, many)}
    rows.append((f"{FEW:,}, clean, none decoded", "", f"{unused:,.1f}", "", ""))
    rows += [
        (f"{number:,}, bare LMDB", "", *(f"{f:,.1f}" for f in limits[number])) for number in limits
    ]
    held = ("held", f"the same {FEW:,}, µs", "any, µs", f"{DUE:,} due, ms", "store / payload")
    yield Table("load + change + save, tick and room, by sessions in the host store", held, rows)
    yield from slower(figures[FEW], figures[many], unused, many)
    share = figures[many].share
    yield Goal(f"host store, to the bytes of the payloads, {SIZE} bytes each", share, 2.0)
    yield Goal("the same of bare LMDB, without any bookkeeping: a limit", limits[many].share, 2.0)
    yield from larger(scale)
    tick = figures[many].tick / figures[FEW].tick
    yield Goal(f"tick with {DUE:,} due, {many:,} sessions to {FEW:,}", tick, 1.2)
    limit = limits[many].tick / limits[FEW].tick
    yield Goal("reading and putting as many in bare LMDB, the same: a limit", limit, 1.2)
    bars = {f"{number:,}": figures[number].any for number in figures}
    yield Plot("growth", "load + change + save, by sessions held", bars, "µs")


def slower(few: Held, held: Held, unused: float, many: int) -> Iterator[Goal]:
    """Yield how much longer a cycle takes among many sessions.

    With any of a million, as likely as any other, nearly each request comes for a session that
    no process has decoded, and that is clean: more is to be done, whatever the number.
    """
    what = f"load + change + save, {many:,} sessions to {FEW:,}"
    yield Goal(f"{what}; the same {FEW:,} visitors", held.same / few.same, 1.6)
    yield Goal(f"{what}; any visitor, who was not there for long", held.any / unused, 1.6)
    yield Goal(f"{what}; any visitor", held.any / few.any, 1.6)
    limit = unused / few.any
    yield Goal(f"{FEW:,} who were not there for long, to {FEW:,}: a limit of that", limit, 1.6)


def of_unused(scale: Scale) -> float:
    """Return µs of a cycle with few sessions, none of which is decoded or dirty before.

    Among a million sessions that is what nearly every request finds: a process has 10,000.
    """
    own = {"DIRECTORY": f"{os.environ['SESSION_DIRECTORY']}-none", "CACHE_SIZE": 0}
    with override_settings(DEFERRED_SESSIONS=own):
        store, taken = filled(FEW), []
        for _ in range(scale.of(9, 3)):
            clean_all(store)
            keys = random.sample(store.keys, FEW)
            taken.append(seconds(partial(change, keys)) / FEW)
    return median(taken) * 1e6


def bare(number: int, size: int, scale: Scale) -> Bare:
    """Return the figures of a bare LMDB with so many payloads, opened and written as ours is."""
    scale.progress(f"bare LMDB, {number:,} payloads of {size:,} bytes")
    place = Path(f"{os.environ['SESSION_DIRECTORY']}-bare-{number}-{size}")
    payload = get_runtime().codec.encode(content(size)).payload
    keys = [key.encode() for key in random_keys(number)]
    options = {"sync": False, "writemap": True, "map_async": True, "meminit": False}
    with lmdb.open(str(place), STORE_SIZE, **options) as env:
        for start in range(0, number, BATCH):
            put_some(env, sorted(keys[start : start + BATCH]), payload)
        stat = env.stat()
        pages = stat["branch_pages"] + stat["leaf_pages"] + stat["overflow_pages"]
        rounds = scale.of(9, 3)
        ticks = [
            seconds(partial(put_some, env, sorted(random.sample(keys, DUE)), payload))
            for _ in range(rounds)
        ]
        cycles = [
            seconds(partial(put_each, env, random.choices(keys, k=CYCLES), payload)) / CYCLES
            for _ in range(rounds)
        ]
    share = pages * stat["psize"] / (number * len(payload))
    return Bare(median(cycles) * 1e6, median(ticks) * 1e3, share)


def put_each(env: lmdb.Environment, keys: list[bytes], payload: bytes) -> None:
    """Read and put these one by one, as requests do."""
    for key in keys:
        with env.begin() as txn:
            txn.get(key)
        with env.begin(write=True) as txn:
            txn.get(key)
            txn.put(key, payload)


def put_some(env: lmdb.Environment, keys: list[bytes], payload: bytes) -> None:
    """Read and put these, as many in a transaction as a flush does."""
    for start in range(0, len(keys), BATCH):
        with env.begin(write=True) as txn:
            for key in keys[start : start + BATCH]:
                txn.get(key)
                txn.put(key, payload)


def larger(scale: Scale) -> Iterator[Goal]:
    """Yield the room that larger sessions take."""
    number = scale.of(100_000, 20_000)
    for size in (1_000, 3_000):
        place = f"{os.environ['SESSION_DIRECTORY']}-{size}-bytes"
        with override_settings(DEFERRED_SESSIONS={"DIRECTORY": place, "STORE_SIZE": STORE_SIZE}):
            scale.progress(f"filling a store with {number:,} sessions of {size:,} bytes")
            store = filled(number, size)
            share = store.runtime.store.status().used / store.payload
        yield Goal(f"host store, to the bytes of the payloads, {size:,} bytes each", share, 2.0)
        limit = bare(number, size, scale).share
        yield Goal("the same of bare LMDB: a limit", limit, 2.0)


def random_keys(number: int) -> list[str]:
    """Return keys like Django's, which takes ten times as long to make one."""
    return ["".join(random.choices(VALID_KEY_CHARS, k=32)) for _ in range(number)]


def filled(number: int, size: int = SIZE) -> Store:
    """Fill an empty store; as if each had been loaded from PostgreSQL."""
    runtime, now = get_runtime(), time.time()
    payload = runtime.codec.encode(content(size)).payload
    keys = random_keys(number)
    for start in range(0, number, 1000):
        runtime.store.update_many(
            {key: partial(_loaded, key, payload, now) for key in keys[start : start + 1000]}
        )
    return Store(runtime, keys, number * len(payload))


def _loaded(key: str, payload: bytes, now: float, _: SessionRecord | None) -> SessionRecord:
    return lifecycle.loaded(
        key,
        payload,
        "42",
        version=1,
        fence=0,
        created_at=now,
        expires_at=now + 1_209_600,
        written_at=now,
        now=now,
    )


def of(store: Store, scale: Scale) -> Held:
    """Return what there is to know of a store."""
    share = store.runtime.store.status().used / store.payload
    rounds, same = scale.of(9, 3), random.sample(store.keys, FEW)
    scale.progress(f"cycles among {len(store.keys):,} sessions")
    change(same)
    cycles = {
        name: [
            seconds(partial(change, random.choices(keys, k=CYCLES))) / CYCLES for _ in range(rounds)
        ]
        for name, keys in (("same", same), ("any", store.keys))
    }
    ticks = [tick(store) for _ in range(rounds)]
    middle = medians(cycles)
    return Held(middle["same"] * 1e6, middle["any"] * 1e6, median(ticks) * 1e3, share)


def change(keys: list[str]) -> None:
    """Change sessions, one after the other."""
    for key in keys:
        session = SessionStore(key)
        session["count"] = session["count"] + 1
        session.save()


def clean_all(store: Store) -> None:
    """Mark everything as written."""
    host, later = store.runtime.store, time.time() + 61
    for batch in iter(lambda: host.due(later, limit=DUE), []):
        host.clean_many(batch, later)


def tick(store: Store) -> float:
    """Return how long it takes to find and mark what is due; without PostgreSQL."""
    clean_all(store)
    change(random.sample(store.keys, DUE))
    host, later = store.runtime.store, time.time() + 61
    return seconds(lambda: host.clean_many(host.due(later, limit=DUE), later))


def workers(store: Store, place: str, scale: Scale) -> Iterator[Table | Goal]:
    """Yield what a new worker takes: time for its first request, and memory."""
    scale.progress("starting workers")
    keys = random.sample(store.keys, min(20_000, len(store.keys)))
    figures = {
        name: [fresh(name, keys, place) for _ in range(scale.of(3, 1))] for name in (NOTHING, OURS)
    }
    middle = {
        name: (median([first for first, _ in each]) * 1e3, median([size for _, size in each]) / 1e6)
        for name, each in figures.items()
    }
    rows = [(name, f"{first:.1f}", f"{size:.1f}") for name, (first, size) in middle.items()]
    title = f"a new worker with {len(store.keys):,} sessions on the host; it serves {len(keys):,}"
    yield Table(title, ("engine", "first request, ms", "memory of its own, MB"), rows)
    first, size = (
        ours - theirs for ours, theirs in zip(middle[OURS], middle[NOTHING], strict=True)
    )
    yield Goal("first request, beyond the engine that does nothing", first, 20, unit=" ms")
    yield Goal("memory of a worker, beyond it", size, 30, unit=" MB")


def fresh(name: str, keys: list[str], place: str) -> tuple[float, float]:
    """Return the seconds of a new process's first request, and its bytes in the end."""
    done = subprocess.run(
        [sys.executable, "-c", FRESH],
        input=json.dumps(keys),
        env={
            **os.environ,
            "ENGINE": name,
            "SESSION_DIRECTORY": place,
            "DEFERRED_SESSIONS": json.dumps({"STORE_SIZE": STORE_SIZE}),
            "PYTHONPATH": str(Path(__file__).parents[1]),
        },
        check=True,
        capture_output=True,
        text=True,
    )
    first, size = json.loads(done.stdout)
    return first, size
