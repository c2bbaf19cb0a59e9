"""One connection that is asked many times, by psql: what starts a process per question would measure that."""

import subprocess

from .cluster import PG_BIN
from .run import bare_environment


class Session:
    """Answers are one line."""

    def __init__(self, cluster):
        command = [PG_BIN / "psql", "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-h", cluster.socket, "-U", "postgres"]
        self.psql = subprocess.Popen([str(word) for word in command], cwd="/", env=bare_environment(), text=True,
                                     stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        # Its own commits are on the server's disk and wait for nobody else.
        self.tell("SET synchronous_commit = local;")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.psql.stdin.close()
        self.psql.wait(30)

    def tell(self, text):
        self.psql.stdin.write(text + "\n")
        self.psql.stdin.flush()

    def line(self):
        line = self.psql.stdout.readline()
        if not line:
            raise SystemExit("scripts/bench: the server hangs up")
        return line.strip()

    def ask(self, query):
        """The one value of a query that has one."""
        self.tell(query.rstrip(";") + ";")
        return self.line()


def lsn(text):
    """PostgreSQL's way to write a position, as a number; 0 for none."""
    high, _, low = text.partition("/")
    return (int(high, 16) << 32) + int(low, 16) if low else 0


def text_of(position):
    """The number as PostgreSQL writes it."""
    return f"{position >> 32:X}/{position & 0xFFFFFFFF:X}"
