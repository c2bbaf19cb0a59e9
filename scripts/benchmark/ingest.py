"""Catching up: WAL that was written before waits in a slot, nothing else runs, and a receiver takes it as fast as it can."""

import os
import shutil
import statistics
import time

from . import disk
from .cluster import PG_BIN
from .contestants import Drctl, PgBackRest
from .receiver import NAME, begin, frames, passed, receiving
from .rows import compare, middle, row
from .run import Running, measured, say, size_below
from .session import Session, text_of

RATE = 200e6
SEGMENT = 16 << 20
LEVELS = (1, 3)
EARLY_FRAME = 4 << 20
SETTINGS = {"max_replication_slots": "64", "max_wal_senders": "20"}


class PgReceivewal:
    """Whole segments into one directory, each flushed when it is full; neither compressed nor sealed."""

    def __init__(self, place, cluster, slot):
        self.place, self.cluster, self.slot = place, cluster, slot
        cluster.sql(f"SELECT pg_create_physical_replication_slot('{slot}', true)")

    def catch_up(self, session, end):
        self.place.mkdir()
        os.sync()
        receiver = Running([PG_BIN / "pg_receivewal", "-D", self.place, "-h", self.cluster.socket, "-U", "postgres",
                            f"--slot={self.slot}", "--no-loop", f"--endpos={text_of(end)}"])
        receiver.until("it streams", lambda: streams(session, "pg_receivewal"))
        began = time.monotonic()
        cost = receiver.end(tell=False)
        cost.wall_seconds = time.monotonic() - began
        cost.stored_bytes = size_below(self.place)
        return cost


class Ours:
    """A repository that knows where its WAL goes on."""

    def __init__(self, bench, cluster, name, level):
        regions = {"a": bench.place(f"{name}-a"), "b": bench.place(f"{name}-b")}
        self.drctl = Drctl(bench.binary, bench.place(name), cluster, regions, slot=name.replace("-", "_"), level=level)
        self.region, self.begun_at = regions["a"], begin(self.drctl, cluster)

    def catch_up(self, session, end):
        before, known = self.drctl.stored(), set(frames(self.region))
        os.sync()
        with receiving(self.drctl) as receiver:
            receiver.until("it streams", lambda: streams(session, NAME))
            began = time.monotonic()
            receiver.reach(session, end)
            wall = time.monotonic() - began
            cost = receiver.end()
        cost.wall_seconds, cost.stored_bytes = wall, self.drctl.stored() - before
        cost.objects = len(set(frames(self.region)) - known)
        return cost

    def close(self):
        for place in (self.drctl.place, *self.drctl.regions.values()):
            shutil.rmtree(place)


def streams(session, name):
    senders = f"SELECT count(*) FROM pg_stat_replication WHERE application_name = '{name}' AND state <> 'startup'"
    return session.ask(senders) == "1"


def pgbench(bench, cluster, wanted):
    """Transactions of pgbench until there is that much WAL. With a checkpoint every few seconds most of it is page images,
    as it is for some minutes behind each checkpoint of a large database."""
    while cluster.sql(f"SELECT pg_current_wal_lsn() < '{wanted}'") == "t":
        cluster.pgbench("-c", "4", "-j", "2", "-T", "3")
        cluster.sql("CHECKPOINT")


def bulk(bench, cluster, wanted):
    """Rows with JSON, and blobs that do not compress, a tenth of it."""
    cluster.sql("CREATE EXTENSION IF NOT EXISTS pgcrypto; CREATE TABLE IF NOT EXISTS bulk (id bigint, payload jsonb);"
                "CREATE TABLE IF NOT EXISTS bulk_blobs (body bytea); ALTER TABLE bulk_blobs ALTER body SET STORAGE EXTERNAL")
    while cluster.sql(f"SELECT pg_current_wal_lsn() < '{wanted}'") == "t":
        cluster.sql("""INSERT INTO bulk SELECT i, jsonb_build_object('user', i * 7919 % 50000, 'kind', (ARRAY['view', 'click',
            'cart', 'order', 'refund'])[1 + (i * 31 % 5)::int], 'session', left(md5((i / 12)::text), 16), 'amount',
            i * 104729 % 100000, 'path', '/shop/' || i * 613 % 997 || '/item/' || i * 7 % 10007)
            FROM generate_series(1::bigint, 100000) AS i;
            INSERT INTO bulk_blobs SELECT (SELECT string_agg(gen_random_bytes(1000), '') FROM generate_series(1, 100)
            WHERE i > 0) FROM generate_series(1, 20) AS i;""")


LOADS = {"pgbench": pgbench, "a bulk load": bulk}


def rows(bench):
    """The disk first, then each load."""
    speed = disk.durable_bytes_per_second(bench.place("disk"))
    yield row("the disk", "fsyncs_per_second", None, ("8 KiB each", disk.fsyncs_per_second(bench.place("disk"))), None)
    yield row("the disk", "durable_megabytes_per_second", None, ("4 MiB, two directories", speed / 1e6), None)
    with bench.cluster(**SETTINGS) as cluster:
        for load, make in LOADS.items():
            yield from of_load(bench, cluster, (load, make), speed)


def of_load(bench, cluster, load, speed):
    """Everybody gets a place to go on from, the WAL is written, and each takes it in turn."""
    name, make = load
    rounds = range(bench.options.rounds)
    ours = {level: [Ours(bench, cluster, f"drctl-{level}-{turn}", level) for turn in rounds] for level in LEVELS}
    # A slot keeps WAL from the last checkpoint on.
    cluster.sql("CHECKPOINT")
    peers = [PgReceivewal(bench.place(f"receivewal-{turn}"), cluster, f"receivewal_{turn}") for turn in rounds]
    costs = {}
    with Session(cluster) as session:
        say(f"writing WAL of {name}")
        begun = passed(session)
        cluster.sql("CHECKPOINT")
        wanted = begun + ((192 if bench.quick else 1024) << 20)
        make(bench, cluster, text_of(wanted))
        end = passed(session)
        cluster.sql("CHECKPOINT")
        for turn in rounds:
            say(f"catching up with {name}, round {turn + 1} of {len(rounds)}")
            for level in LEVELS:
                costs.setdefault(level, []).append(ours[level][turn].catch_up(session, end))
                ours[level][turn].close()
                for copies in (1, 2) if bench.has_pgbackrest else ():
                    push = pushed(bench, cluster, (begun, end), (level, copies))
                    costs.setdefault((level, copies), []).append(push)
            costs.setdefault("receivewal", []).append(peers[turn].catch_up(session, end))
            shutil.rmtree(peers[turn].place)
    cluster.sql("SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots")
    yield from told(bench, (name, end - begun, speed), costs)


def segments(cluster, begun, end):
    """The files of pg_wal that hold [begun, end)."""
    numbers = range(begun // SEGMENT, -(-end // SEGMENT))
    return [cluster.data / "pg_wal" / f"{1:08X}{number // 256:08X}{number % 256:08X}" for number in numbers]


def pushed(bench, cluster, span, how):
    """pgBackRest's archive-push of every segment, one after the other, as archive_command runs it."""
    (begun, end), (level, copies) = span, how
    files = segments(cluster, -(-begun // SEGMENT) * SEGMENT, end // SEGMENT * SEGMENT)
    second = {"repo2_path": bench.place("pgbr-repo2"), "repo2_cipher_type": "aes-256-cbc", "repo2_cipher_pass": "bench"}
    peer = PgBackRest(bench.place("pgbr"), cluster, bench.place("pgbr-repo"), compress_level=str(level),
                      **(second if copies > 1 else {}))
    push = " ".join(f"'{word}'" for word in peer.command("archive-push"))
    before = peer.stored()
    cost = measured(["bash", "-c", f'for file; do {push} "$file" || exit 1; done', "push", *files])
    cost.stored_bytes, cost.bytes = peer.stored() - before, len(files) * SEGMENT
    return cost


def told(bench, load, costs):
    """What was measured."""
    name, volume, speed = load
    work = bench.work(f"catch up with {volume / 1e6:.0f} MB of WAL of {name}, two directories")
    ours, theirs = costs[LEVELS[0]], ("pg_receivewal to one", costs["receivewal"])
    yield row(work, "wall_seconds", middle(ours, "wall_seconds"), ("200 MB/s", volume / RATE), 1.0)
    objects = statistics.median(cost.objects for cost in ours)
    yield row(work, "frames", objects, ("frames of 4 MiB", volume / EARLY_FRAME), 1.0)
    stored = 2 * middle(ours, "stored_bytes") / middle(ours, "wall_seconds") / 1e6
    yield row(work, "durable_megabytes_per_second", stored, ("the disk", speed / 1e6), None)
    yield from compare(work, ours, theirs, {})
    for level in LEVELS:
        mine, wall = costs[level], middle(costs[level], "wall_seconds")
        at = f"{work}, zstd {level}"
        for copies, to, goal in ((2, "two", 0.5), (1, "one", None)):
            peers = costs.get((level, copies))
            each = lambda figure: peers and statistics.median(getattr(cost, figure) / cost.bytes for cost in peers)
            cpu, seconds = each("cpu_seconds"), each("wall_seconds")
            peer = f"pgBackRest push to {to}"
            yield row(at, "cpu_milliseconds_per_segment", middle(mine, "cpu_seconds") / volume * SEGMENT * 1e3,
                      (peer, cpu and cpu * SEGMENT * 1e3), goal)
            yield row(at, "wall_seconds", wall, (peer, seconds and seconds * volume), None)
