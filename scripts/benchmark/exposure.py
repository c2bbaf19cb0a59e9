"""Exposure under load: from the moment at which a client knew its commit until a region had it.

A client commits every few milliseconds beside pgbench and notes when, and how far the server's WAL was flushed then. In a
directory a frame is there when its object got its name, which the file system dates (the frames before it must be there,
too); of all regions together the server knows, from what the receiver reports."""

import bisect
import statistics
import threading
import time

from .cluster import PG_BIN
from .contestants import Drctl
from .receiver import begin, frames, receiving
from .rows import row
from .run import Running, say
from .session import Session, lsn

GOALS = {"1s": 2.0, "100ms": 0.5}
# The server waits for its own disk, as real ones do.
SETTINGS = {"fsync": "on", "synchronous_commit": "on"}
# A position behind a page's header is the one before it: no record lies between.
PAGE_HEADER = 40


class Ledger:
    """Commits, and when each was known to be one; beside it, how far all regions were at which time."""

    def __init__(self, cluster, receiver):
        self.cluster, self.receiver = cluster, receiver
        self.commits, self.flushes, self.stopping = [], [], threading.Event()
        self.threads = [threading.Thread(target=work, daemon=True) for work in (self.commit, self.look)]

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.stopping.set()
        for thread in self.threads:
            thread.join()

    def commit(self):
        with Session(self.cluster) as session:
            number = 0
            while not self.stopping.is_set():
                number += 1
                session.tell(f"INSERT INTO ledger VALUES ({number});\n\\echo committed\nSELECT pg_current_wal_flush_lsn();")
                session.line()
                known = time.time()
                self.commits.append((known, lsn(session.line())))
                time.sleep(0.005)

    def look(self):
        with Session(self.cluster) as session:
            while not self.stopping.is_set():
                flushed = self.receiver.flushed(session)
                self.flushes.append((flushed, time.time()))
                time.sleep(0.002)


def rows(bench):
    """Two directories at both intervals, two S3 regions at the shorter one."""
    with bench.cluster(**SETTINGS) as cluster:
        cluster.sql("CREATE TABLE ledger (number bigint)")
        directories = lambda: {side: bench.place(f"exposed-{side}") for side in "ab"}
        buckets = lambda: {side: (bench.bed, side) for side in "ab"}
        for interval, goal in GOALS.items():
            for kind, regions in {"two directories": directories, "two S3 regions": buckets}.items():
                work = bench.work(f"exposure under pgbench, ship_interval {interval}, {kind}")
                found = [measure(bench, cluster, (regions(), interval), work) for _ in range(bench.options.rounds)]
                yield from told(work, found, goal)


def measure(bench, cluster, place, work):
    """What each region's commits waited for, in seconds, ascending; `all` is when every region had them."""
    regions, interval = place
    say(work)
    drctl = Drctl(bench.binary, bench.place("drctl-e"), cluster, regions, ship_interval=interval)
    begin(drctl, cluster)
    cluster.sql("TRUNCATE ledger")
    seconds = 5 if bench.quick else 20
    load = Running([PG_BIN / "pgbench", "-n", "-h", cluster.socket, "-U", "postgres", "-c", "4", "-T", seconds + 3, "postgres"])
    try:
        with receiving(drctl) as receiver, Session(cluster) as session:
            receiver.begun(session)
            with Ledger(cluster, receiver) as ledger:
                time.sleep(seconds)
                commits = ledger.commits[:]
                # The load goes on meanwhile: the last commits are shipped as all others.
                receiver.reach(session, commits[-1][1], 60)
            receiver.end()
        load.end(tell=False)
    finally:
        load.kill()
        cluster.sql("SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE NOT active")
    arrivals = {"all": ledger.flushes}
    arrivals |= {name: landed(frames(at)) for name, at in regions.items() if not isinstance(at, tuple)}
    return {name: waits(commits, known) for name, known in arrivals.items()}


def landed(found):
    """(end of the last complete record, when it and all before it were there), ascending."""
    ends, latest = [], 0.0
    for span, at in (found[key] for key in sorted(found, key=lambda key: (lsn(found[key][0]["start"]), key))):
        latest = max(latest, at)
        if span["last_record_end"]:
            ends.append((lsn(span["last_record_end"]), latest))
    return ends


def waits(commits, arrivals):
    """How long each commit was known before it arrived."""
    ends = [end for end, _ in arrivals]
    return sorted(max(0.0, arrivals[bisect.bisect_left(ends, end - PAGE_HEADER)][1] - known) for known, end in commits)


def told(work, found, goal):
    """Medians of the rounds' percentiles."""
    for name in sorted(found[0]):
        where = f"{work}, all regions" if name == "all" else f"{work}, region {name}"
        for percent, goes in ((50, None), (99, 1.0)):
            at = lambda waited: waited[min(len(waited) - 1, len(waited) * percent // 100)]
            value = statistics.median(at(one[name]) for one in found)
            yield row(where, f"exposure_p{percent}_seconds", value, (f"{goal:g} s", goal), goes)
