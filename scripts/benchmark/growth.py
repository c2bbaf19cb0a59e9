"""Ten times the work: does it cost at most ten times as much, and no more memory?"""

import shutil

from .cluster import Cluster
from .contestants import Drctl
from .rows import compare, row
from .run import say

TIMES = 10
# Memory is flat if ten times the work takes at most this much more.
FLAT = 1.3


def rows(bench):
    """A table of wall, CPU, memory and requests. The peer of each row is drctl at a tenth of the work."""
    yield from relations(bench)
    yield from backups(bench)
    yield from changes(bench)


def small_cluster(bench, name):
    return Cluster(bench.scratch, name)


def counted(bench, run):
    """A cost, and the requests that it made."""
    before = bench.bed.requests()
    cost = run()
    return cost, bench.bed.requests() - before


def grown(bench, work, small, large):
    """`small` and `large`: (cost, requests) pairs of the median round."""
    work = bench.work(work)
    peer = ("a tenth of that", [small[0]])
    goals = {"wall_seconds": TIMES, "cpu_seconds": TIMES, "peak_rss_bytes": FLAT}
    yield from compare(work, [large[0]], peer, goals, ("wall_seconds", "cpu_seconds", "peak_rss_bytes"))
    yield row(work, "requests", large[1], ("a tenth of that", small[1]), TIMES)


def median_round(bench, once):
    """The round with the median wall time of at least three."""
    rounds = [counted(bench, once) for _ in range(max(3, bench.options.rounds))]
    return sorted(rounds, key=lambda one: one[0].wall_seconds)[len(rounds) // 2]


def relations(bench):
    """Full backups of a cluster of few and of many small tables."""
    few = 50 if bench.options.quick else 500
    measured = []
    cluster = small_cluster(bench, "relations")
    try:
        made = 0
        for tables in (few, few * TIMES):
            say(f"full backups of {tables} tables")
            cluster.sql("".join(f"CREATE TABLE t{number} AS SELECT {number} AS n;\n" for number in range(made, tables)))
            cluster.sql("CHECKPOINT")
            made = tables
            drctl = Drctl(bench.binary, bench.place("growth"), cluster, {"a": (bench.bed, "a")})
            measured.append(median_round(bench, lambda: drctl.backup("--full")))
    finally:
        cluster.close()
        shutil.rmtree(cluster.data)
    yield from grown(bench, f"full backup of {few * TIMES} small tables", *measured)


def backups(bench):
    """The next incremental with few and with many backups in the catalog."""
    few = 2 if bench.options.quick else 20
    measured, taken = [], 0
    cluster = small_cluster(bench, "backups")
    try:
        drctl = Drctl(bench.binary, bench.place("growth"), cluster, {"a": (bench.bed, "a")})
        for wanted in (few, few * TIMES):
            say(f"the next backup with {wanted} in the catalog")
            for _ in range(taken, wanted):
                drctl.backup()
            measured.append(median_round(bench, drctl.backup))
            taken = wanted + max(3, bench.options.rounds)
    finally:
        cluster.close()
        shutil.rmtree(cluster.data)
    yield from grown(bench, f"incremental with {few * TIMES} backups in the catalog", *measured)


def changes(bench):
    """Incrementals after few and after many transactions: the reading of all pages stays, the storing grows."""
    few = 200 if bench.options.quick else 1000
    drctl = Drctl(bench.binary, bench.place("growth"), bench.cluster, {"a": (bench.bed, "a")})
    drctl.backup()
    measured, seed = [], 1000
    for transactions in (few, few * TIMES):
        say(f"incrementals after {transactions} transactions")
        rounds = []
        for _ in range(max(3, bench.options.rounds)):
            bench.cluster.transactions(transactions, seed)
            seed += 1
            rounds.append(counted(bench, drctl.backup))
        measured.append(sorted(rounds, key=lambda one: one[0].wall_seconds)[len(rounds) // 2])
    yield from grown(bench, f"incremental after {few * TIMES} transactions", *measured)
