"""How long a commit takes that waits for two S3 regions, each so many milliseconds away."""

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
    yield row(work, "median_seconds", median, ("one put of 4 KiB by hand", middle(lambda _, put: put)), None)
    yield row(work, "median_seconds", median, ("a commit that does not wait", alone), None)


def measure(bench, cluster, ends, delay):
    """Latencies of commits, and the median time of a put."""
    say(f"synchronous commits, regions {delay} ms away")
    drctl = Drctl(bench.binary, bench.place("drctl-s"), cluster, {side: (bench.bed, side) for side in ends}, sync=True)
    begin(drctl, cluster)
    drctl.through(ends)
    put = statistics.median(puts(bench.bed, ends["a"]))
    with receiving(drctl) as receiver, Session(cluster) as session:
        receiver.begun(session)
        wait_for(session, f'FIRST 1 ("{NAME}")')
        receiver.until("the server waits for it", lambda: session.ask("SELECT count(*) FROM pg_stat_replication WHERE sync_state = 'sync'") == "1")
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
    cluster.pgbench("-c", "1", "-T", "4" if bench.quick else "10", "-f", place / "script", "-l", f"--log-prefix={place}/log")
    lines = [line for log in place.glob("log.*") for line in log.read_text().splitlines()]
    return [int(line.split()[2]) / 1e6 for line in lines]


def puts(bed, endpoint):
    """Seconds of small puts, one after the other on one connection."""
    bucket, took = bed.bucket("a"), []
    address = urllib.parse.urlsplit(endpoint)
    connection = http.client.HTTPSConnection(address.hostname, address.port, context=ssl.create_default_context(cafile=bed.ca))
    for number in range(PUTS):
        # Signed for the server's own port, which is the only thing that a way through another one changes.
        signed = urllib.parse.urlsplit(bed.url("a", "PUT", f"{bucket}/{number}"))
        began = time.monotonic()
        connection.request("PUT", f"{signed.path}?{signed.query}", os.urandom(4096), {"Host": signed.netloc, "If-None-Match": "*"})
        answer = connection.getresponse()
        answer.read()
        took.append(time.monotonic() - began)
        if answer.status != 200:
            raise SystemExit(f"scripts/bench: a put is answered with {answer.status}")
    connection.close()
    # The first one connects.
    return took[1:]
