"""`scripts/bench base`: backups and restores of one deterministic cluster, each contestant in turn in every round."""

import json
import shutil

from . import growth, limits
from .bed import Bed
from .cluster import Cluster
from .contestants import Drctl, PgBackRest, WalRus, missing
from .rows import compare, row
from .run import say

RSS_BOUND = 256 * 1024 * 1024
TRANSACTIONS = 10_000
DELAY_MILLISECONDS = 30
# A restore from S3 is short, and noise weighs more.
RESTORE_ROUNDS = 5


class Bench:
    """What all works share."""

    def __init__(self, scratch, binary, options):
        self.scratch, self.binary, self.options = scratch, binary, options
        self.absent = missing()
        for name, how in self.absent.items():
            say(f"{name} is not measured: {how}")
        self.bed = self.cluster = None

    def __enter__(self):
        self.bed = Bed(self.scratch)
        try:
            say("making the cluster")
            self.cluster = Cluster(self.scratch)
            self.cluster.fill(self.options.quick)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        if self.cluster:
            self.cluster.close()
        self.bed.close()

    def work(self, text):
        return f"{text}, quick" if self.options.quick else text

    def place(self, name):
        place = self.scratch / name
        shutil.rmtree(place, ignore_errors=True)
        return place

    def settle(self):
        self.cluster.sql("CHECKPOINT")

    def contestants(self):
        """New and empty repositories of everybody: a backup into each costs what a first one costs."""
        on = lambda side: (self.bed, side)
        ours = lambda name, regions: Drctl(self.binary, self.place(name), self.cluster, regions)
        all_of_them = {
            "drctl directories": ours("drctl-d", {"a": self.scratch / "region-a", "b": self.scratch / "region-b"}),
            "drctl one": ours("drctl-1", {"a": on("a")}),
            "drctl two": ours("drctl-2", {"a": on("a"), "b": on("b")}),
        }
        if PgBackRest.NAME not in self.absent:
            all_of_them["pgBackRest directory"] = PgBackRest(self.place("pgbr-d"), self.cluster, self.place("pgbr-repo"))
            all_of_them["pgBackRest one"] = PgBackRest(self.place("pgbr-1"), self.cluster, on("a"))
        if WalRus.NAME not in self.absent:
            all_of_them["WAL-RUS one"] = WalRus(self.place("walrus"), self.cluster, on("a"))
        return all_of_them

    def fulls(self, counts):
        """Costs of full backups by contestant, and the contestants of the last round with their backups. Where they do not
        count, one round makes what is restored."""
        costs, who = {}, {}
        for turn in range(self.options.rounds + 1 if counts else 1):
            say(f"full backups, round {turn} of {self.options.rounds}" if turn else "full backups, warming the cache")
            for side in "ab":
                shutil.rmtree(self.scratch / f"region-{side}", ignore_errors=True)
            who = self.contestants()
            runs = {name: one.backup for name, one in who.items()}
            runs["limit pipeline"] = lambda: limits.backup(self.cluster, self.place("pipeline"))
            for name, run in runs.items():
                self.settle()
                cost = run()
                if turn:
                    costs.setdefault(name, []).append(cost)
            shutil.rmtree(self.place("pipeline"), ignore_errors=True)
        return costs, who

    def restores(self, who, rounds):
        """Costs of restores of those backups by contestant."""
        costs = {}
        pieces = limits.Pieces(self.cluster, self.place("pieces"), (self.bed, "a"))
        for turn in range(rounds + 1):
            say(f"restores, round {turn} of {rounds}" if turn else "restores, warming the cache")
            for name, one in {**who, "limit pipeline": pieces}.items():
                directory = self.place("restored")
                cost = one.restore(directory)
                shutil.rmtree(directory)
                if turn:
                    costs.setdefault(name, []).append(cost)
        shutil.rmtree(self.place("pieces"), ignore_errors=True)
        return costs


# The parts that `--only` chooses from, in their order.
PARTS = ("full", "restore", "far", "incremental", "wal", "growth")


def base(scratch, binary, options):
    """All rows, or those of the parts that were asked for."""
    wanted = options.only or PARTS
    with Bench(scratch, binary, options) as bench:
        if {"full", "restore", "far"} & set(wanted):
            backups, who = bench.fulls("full" in wanted)
            if "full" in wanted:
                yield from full_rows(bench, backups)
            # Restores of the peers to a bucket and of drctl to two are the same work as to one.
            who.pop("drctl two", None)
            if "restore" in wanted:
                least = 0 if options.quick else RESTORE_ROUNDS
                yield from restore_rows(bench, bench.restores(who, max(options.rounds, least)))
            if "far" in wanted:
                yield from far_away(bench, who["drctl one"])
        if "incremental" in wanted:
            yield from incrementals(bench)
        if "wal" in wanted:
            yield from by_wal(bench)
        if "growth" in wanted:
            yield from growth.rows(bench)


def full_rows(bench, costs):
    """Goals hold at no more stored bytes."""
    small = {"stored_bytes": 1.0}
    work = bench.work("full backup, two directories")
    ours = costs["drctl directories"]
    yield from compare(work, ours, ("limit pipeline", costs["limit pipeline"]), {"wall_seconds": 1.2, "stored_bytes": 1.05})
    yield from compare(work, ours, ("pgBackRest to one", costs.get("pgBackRest directory")), {})
    peak = max(cost.peak_rss_bytes for cost in ours)
    yield row(work, "peak_rss_bytes", peak, ("256 MiB", RSS_BOUND), 1.0)
    work, ours = bench.work("full backup, one S3 region"), costs["drctl one"]
    yield from compare(work, ours, ("WAL-RUS to one", costs.get("WAL-RUS one")), small | {"wall_seconds": 0.9})
    yield from compare(work, ours, ("pgBackRest to one", costs.get("pgBackRest one")), {})
    work, ours = bench.work("full backup, two S3 regions"), costs["drctl two"]
    yield from compare(work, ours, ("WAL-RUS to one", costs.get("WAL-RUS one")), small | {"wall_seconds": 1.2})
    yield from compare(work, ours, ("pgBackRest to one", costs.get("pgBackRest one")), small | {"wall_seconds": 0.5})


def restore_rows(bench, costs):
    """A goal holds for what a restore takes by itself, and for what it takes until the disk has it: not everybody flushes."""
    figures = ("wall_seconds", "durable_seconds", "cpu_seconds", "peak_rss_bytes")
    both = lambda goal: dict.fromkeys(("wall_seconds", "durable_seconds"), goal)
    work = bench.work("restore, directory")
    theirs = ("pgBackRest", costs.get("pgBackRest directory"))
    yield from compare(work, costs["drctl directories"], theirs, both(0.6), figures)
    work, ours = bench.work("restore, S3"), costs["drctl one"]
    yield from compare(work, ours, ("WAL-RUS", costs.get("WAL-RUS one")), both(0.7), figures)
    yield from compare(work, ours, ("pgBackRest", costs.get("pgBackRest one")), both(0.25), figures)
    theirs = ("fetch, unzstd, write", costs["limit pipeline"])
    yield from compare(work, ours, theirs, both(1.5), figures)


def far_away(bench, drctl):
    """The same restore, through the same proxy, with and without delay."""
    near = {0: bench.bed.delayed("a", 0), DELAY_MILLISECONDS: bench.bed.delayed("a", DELAY_MILLISECONDS)}
    costs = {delay: [] for delay in near}
    for turn in range(bench.options.rounds):
        say(f"restores from far away, round {turn + 1} of {bench.options.rounds}")
        for delay, endpoint in near.items():
            drctl.through({"a": endpoint})
            directory = bench.place("restored")
            costs[delay].append(drctl.restore(directory))
            shutil.rmtree(directory)
    work = bench.work(f"restore, S3, {DELAY_MILLISECONDS} ms more per request")
    theirs = ("without the delay", costs[0])
    yield from compare(work, costs[DELAY_MILLISECONDS], theirs, {"wall_seconds": 1.3}, ("wall_seconds", "cpu_seconds"))


def incrementals(bench):
    """10,000 uniform transactions before each; both contestants back up to one directory."""
    count = 4 if bench.options.quick else 30
    regions = {"a": bench.place("incremental-region")}
    ours = Drctl(bench.binary, bench.place("drctl-i"), bench.cluster, regions)
    peer = None
    if PgBackRest.NAME not in bench.absent:
        peer = PgBackRest(bench.place("pgbr-i"), bench.cluster, bench.place("pgbr-i-repo"))
    bench.settle()
    ours.backup()
    if peer:
        peer.backup()
    mine, theirs, pages = [], [], []
    for turn in range(count):
        say(f"incremental {turn + 1} of {count}")
        bench.cluster.transactions(TRANSACTIONS, seed=turn)
        mine.append(ours.backup())
        pages.append(json.loads(mine[-1].output)["pages"])
        if peer:
            theirs.append(peer.backup("incr"))
    work = bench.work(f"incremental after {TRANSACTIONS} transactions, all pages read")
    yield from compare(work, mine, ("pgBackRest", theirs), {"stored_bytes": 0.5, "wall_seconds": 0.7, "cpu_seconds": 1.0})
    yield row(work, "pages_changed", middle_of(pages, "changed"), ("pages read", middle_of(pages, "read")), None)
    total = lambda costs: sum(cost.stored_bytes for cost in costs) if costs else None
    work = bench.work(f"{count} incrementals, each after {TRANSACTIONS} transactions")
    yield row(work, "stored_bytes", total(mine), ("pgBackRest", total(theirs)), 0.5)


def by_wal(bench):
    """The same with the changed pages known from the WAL that a running receiver saw."""
    ours = Drctl(bench.binary, bench.place("drctl-w"), bench.cluster, {"a": bench.place("wal-region")}, "wal")
    peer = None
    if PgBackRest.NAME not in bench.absent:
        peer = PgBackRest(bench.place("pgbr-w"), bench.cluster, bench.place("pgbr-w-repo"))
        bench.settle()
        peer.backup()
    mine, theirs, reads = [], [], []
    with ours.streaming():
        ours.backup()
        for turn in range(max(3, bench.options.rounds)):
            say(f"incremental by WAL {turn + 1}")
            bench.cluster.transactions(TRANSACTIONS, seed=2000 + turn)
            mine.append(ours.backup())
            report = json.loads(mine[-1].output)
            if report["detection"]["by"] != "wal":
                raise SystemExit(f"scripts/bench: changes were not found by WAL: {report['detection']['because']}")
            reads.append((report["pages"]["read"], report["pages"]["changed"] + bench.cluster.always_whole()))
            if peer:
                theirs.append(peer.backup("incr"))
    work = bench.work(f"incremental after {TRANSACTIONS} transactions, changes known from WAL")
    yield from compare(work, mine, ("pgBackRest", theirs), {"wall_seconds": 0.5, "cpu_seconds": 0.5})
    read, least = sorted(reads, key=lambda one: one[0] / one[1])[len(reads) // 2]
    yield row(work, "pages_read", read, ("changed, always whole", least), 1.2)


def middle_of(reports, figure):
    return sorted(report[figure] for report in reports)[len(reports) // 2]
