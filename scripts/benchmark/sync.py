"""How long a commit takes that waits for two S3 regions, each so many milliseconds away: one client, one row at a time."""

import concurrent.futures
import http.client
import os
import ssl
import statistics
import time
import urllib.parse

from .contestants import Drctl
from .exposure import SETTINGS
from .receiver import NAME, begin, receiving
from .rows import row
from .run import say
from .session import Session

DELAYS = (5, 40)
MARGIN = 0.010
PUTS = 50


def rows(bench):
    """Both delays, beside what one plain put takes through the same way."""
    with bench.cluster(**SETTINGS) as cluster:
        cluster.sql("CREATE TABLE ledger (number bigserial, at timestamptz)")
        alone = statistics.median(commits(bench, cluster))
        for delay in DELAYS:
            ends = {side: bench.bed.delayed(side, delay) for side in "ab"}
            found = [measure(bench, cluster, ends, delay) for _ in range(bench.options.rounds)]
            yield from told(bench, delay, found, alone)


def told(bench, delay, found, alone):
    """Medians of the rounds."""
    middle = lambda of: statistics.median(of(*one) for one in found)
    median, bound = middle(lambda waited, _: statistics.median(waited)), (f"{delay} + 10 ms", delay / 1000 + MARGIN)
    work = bench.work(f"commit that waits for two S3 regions {delay} ms away")
    yield row(work, "median_seconds", median, bound, 1.0)
    yield row(work, "p99_seconds", middle(lambda waited, _: sorted(waited)[len(waited) * 99 // 100]), bound, None)
    yield row(work, "median_seconds", median, ("4 KiB put by hand to both", middle(lambda _, put: put)), None)
    yield row(work, "median_seconds", median, ("a commit that does not wait", alone), None)


def measure(bench, cluster, ends, delay):
    """Latencies of commits, and the median time of a put."""
    say(f"synchronous commits, regions {delay} ms away")
    drctl = Drctl(bench.binary, bench.place("drctl-s"), cluster, {side: (bench.bed, side) for side in ends}, sync=True)
    begin(drctl, cluster)
    drctl.through(ends)
    put = statistics.median(puts(bench.bed, ends))
    with receiving(drctl) as receiver, Session(cluster) as session:
        receiver.begun(session)
        wait_for(session, f'FIRST 1 ("{NAME}")')
        waits = "SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'"
        receiver.until("the server waits for it", lambda: session.ask(waits) == "1")
        found = commits(bench, cluster)
        wait_for(session, "")
        receiver.end()
    cluster.sql("SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots")
    return found, put


def wait_for(session, names):
    session.tell(f"ALTER SYSTEM SET synchronous_standby_names = '{names}';")
    session.ask("SELECT pg_reload_conf()")


def commits(bench, cluster):
    """Seconds that each of one client's commits took, one after the other."""
    place = bench.place("commits")
    place.mkdir()
    (place / "script").write_text("INSERT INTO ledger (at) VALUES (now());\n", encoding="ascii")
    cluster.pgbench("-c", "1", "-T", "3" if bench.quick else "10", "-f", place / "script", "-l", f"--log-prefix={place}/log")
    lines = [line for log in place.glob("log.*") for line in log.read_text().splitlines()]
    return [int(line.split()[2]) / 1e6 for line in lines]


def puts(bed, ends):
    """Seconds of small puts to both regions at once, one pair after the other, each on one connection."""
    ways = [Way(bed, side, end) for side, end in ends.items()]
    took = []
    with concurrent.futures.ThreadPoolExecutor(len(ways)) as pool:
        for number in range(PUTS):
            began = time.monotonic()
            list(pool.map(lambda way: way.put(number), ways))
            took.append(time.monotonic() - began)
    # The first pair connects.
    return took[1:]


class Way:
    """One connection to a new bucket of one region."""

    def __init__(self, bed, side, end):
        self.bed, self.side, self.bucket = bed, side, bed.bucket(side)
        at, context = urllib.parse.urlsplit(end), ssl.create_default_context(cafile=bed.ca)
        self.connection = http.client.HTTPSConnection(at.hostname, at.port, context=context)

    def put(self, number):
        # Signed for the server's own port, which is the only thing that a way through another one changes.
        signed = urllib.parse.urlsplit(self.bed.url(self.side, "PUT", f"{self.bucket}/{number}"))
        head = {"Host": signed.netloc, "If-None-Match": "*"}
        self.connection.request("PUT", f"{signed.path}?{signed.query}", os.urandom(4096), head)
        answer = self.connection.getresponse()
        answer.read()
        if answer.status != 200:
            raise SystemExit(f"scripts/bench: a put is answered with {answer.status}")
