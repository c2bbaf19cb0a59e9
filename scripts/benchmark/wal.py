"""`scripts/bench wal`: how fast WAL becomes durable, what it costs, what is exposed meanwhile, and how fast it replays."""

import contextlib
import shutil

from . import exposure, ingest, replay, sync
from .bed import Bed
from .cluster import Cluster
from .contestants import PgBackRest, missing
from .run import say

# The parts that `--only` chooses from, in their order.
PARTS = {"ingest": ingest.rows, "exposure": exposure.rows, "sync": sync.rows, "replay": replay.rows}
NEED_S3 = {"exposure", "sync", "replay"}


class Bench:
    """What all parts share."""

    def __init__(self, scratch, binary, options):
        self.scratch, self.binary, self.options, self.bed = scratch, binary, options, None
        self.has_pgbackrest = PgBackRest.NAME not in missing()
        if not self.has_pgbackrest:
            say(f"{PgBackRest.NAME} is not measured: {missing()[PgBackRest.NAME]}")

    @property
    def quick(self):
        return self.options.quick

    def work(self, text):
        return f"{text}, quick" if self.quick else text

    def place(self, name):
        """A name for a new directory; what had it is gone."""
        place = self.scratch / name
        shutil.rmtree(place, ignore_errors=True)
        return place

    @contextlib.contextmanager
    def cluster(self, **settings):
        """A new one, with the tables of pgbench."""
        data, _ = self.place("pgdata"), self.place("s-pgdata")
        cluster = Cluster(self.scratch, data.name, **settings)
        try:
            cluster.pgbench("-i", "-I", "dtgp", "-q", "-s", "10" if self.quick else "50")
            yield cluster
        finally:
            cluster.close()
            # The directory of the socket stays: a copy of the cluster that is started listens there.
            shutil.rmtree(data)


def wal(scratch, binary, options):
    """All rows, or those of the parts that were asked for."""
    bench, wanted = Bench(scratch, binary, options), options.only or PARTS
    try:
        if NEED_S3 & set(wanted):
            bench.bed = Bed(scratch)
        for name, rows in PARTS.items():
            if name in wanted:
                yield from rows(bench)
    finally:
        if bench.bed:
            bench.bed.close()
