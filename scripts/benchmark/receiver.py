"""`drctl wal stream` under a load, seen from outside."""

import contextlib
import json

from .run import Running
from .session import Session, lsn

NAME = "drctl wal bench"
MAGIC = b"DRCTLW1\n"


class Receiver(Running):
    """A receiver of one repository; the server says how far it is."""

    def __init__(self, drctl):
        super().__init__(drctl.command("wal", "stream", "bench"), drctl.environment)

    def begun(self, session):
        """Waits until the server streams to it."""
        self.until("it streams", lambda: session.ask(
            f"SELECT count(*) FROM pg_stat_replication WHERE application_name = '{NAME}' AND state <> 'startup'") == "1")

    def flushed(self, session):
        """Where all ends that the write quorum holds, as the server was told."""
        flushed = f"SELECT coalesce(max(flush_lsn), '0/0') FROM pg_stat_replication WHERE application_name = '{NAME}'"
        return lsn(session.ask(flushed))

    def reach(self, session, end, limit=300):
        """Waits until everything before `end` is durable."""
        self.until(f"{end:X} is durable", lambda: self.flushed(session) >= end, limit)


@contextlib.contextmanager
def receiving(drctl):
    """A receiver beside what is done in the block."""
    receiver = Receiver(drctl)
    try:
        yield receiver
    finally:
        receiver.kill()


def begin(drctl, cluster):
    """Streams for a moment: from here on the repository knows where its WAL goes on, and the slot keeps it."""
    with receiving(drctl) as receiver, Session(cluster) as session:
        receiver.begun(session)
        here = passed(session)
        receiver.reach(session, here)
        receiver.end()
    return here


def passed(session):
    """The end of the server's WAL; behind it a commit is on the disk, so that the records before it are known to be whole."""
    here = lsn(session.ask("SELECT pg_current_wal_insert_lsn()"))
    session.ask("SELECT pg_logical_emit_message(true, 'bench', '')")
    return here


def frames(region):
    """The WAL frames in a region that is a directory, by epoch and number: (epoch, seq) → what the header says, and when
    the object got its name."""
    found = {}
    for path in region.glob("wal/*/*/*/*"):
        with open(path, "rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                continue
            head = json.loads(file.read(int.from_bytes(file.read(4), "little")))
        if head["kind"] == "data":
            found[head["place"]["epoch"], head["place"]["seq"]] = (head["span"], path.stat().st_ctime)
    return found
