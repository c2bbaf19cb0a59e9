"""A throw-away PostgreSQL 15, filled the same way each time."""

import os
import pathlib
import pwd
import re
import shutil
import signal
import subprocess
import sys
import time

from .run import as_postgres, run

PG_BIN = pathlib.Path(os.environ.get("DRCTL_TEST_PG_15", "/usr/lib/postgresql/15/bin"))
# What drctl leaves out of a data directory; for tar as patterns anchored at its top.
LEFT_OUT = [
    *(f"./{name}/*" for name in (
        "log", "pg_dynshmem", "pg_notify", "pg_replslot", "pg_serial", "pg_snapshots", "pg_stat_tmp", "pg_subtrans",
        "pg_wal")),
    "./postmaster.pid", "./postmaster.opts", "./global/pg_internal.init", "./base/*/pg_internal.init",
]

SCHEMA = """
CREATE EXTENSION IF NOT EXISTS pgcrypto;
CREATE TABLE events (id bigint, at timestamptz NOT NULL, payload jsonb NOT NULL);
INSERT INTO events SELECT i, timestamptz '2024-01-01 UTC' + i * interval '7 seconds', jsonb_build_object(
    'user', i * 7919 % 50000, 'kind', (ARRAY['view', 'click', 'cart', 'order', 'refund'])[1 + (i * 31 % 5)::int],
    'session', left(md5((i / 12)::text), 16), 'amount', i * 104729 % 100000,
    'path', '/shop/' || i * 613 % 997 || '/item/' || i * 7 % 10007)
  FROM generate_series(1::bigint, {events}) AS i;
ALTER TABLE events ADD PRIMARY KEY (id);
CREATE INDEX events_by_user ON events (((payload ->> 'user')::int), at);
CREATE TABLE blobs (id int PRIMARY KEY, body bytea NOT NULL);
ALTER TABLE blobs ALTER COLUMN body SET STORAGE EXTERNAL;
INSERT INTO blobs SELECT i, (SELECT string_agg(digest(i || ':' || j, 'sha512'), '' ORDER BY j)
    FROM generate_series(1, 256) AS j) FROM generate_series(1, {blobs}) AS i;
VACUUM (FREEZE, ANALYZE);
CHECKPOINT;
"""


class Cluster:
    """It listens on a socket only."""

    SETTINGS = {
        "listen_addresses": "", "fsync": "off", "autovacuum": "off", "max_wal_size": "8GB", "min_wal_size": "80MB",
        "shared_buffers": "128MB", "maintenance_work_mem": "128MB", "checkpoint_timeout": "1h", "wal_level": "replica",
        "max_wal_senders": "10", "log_min_messages": "fatal", "synchronous_commit": "off",
        "max_locks_per_transaction": "1024",
    }

    def __init__(self, scratch, name="pgdata", **settings):
        self.data, self.socket = scratch / name, scratch / f"s-{name}"
        for directory in (self.data, self.socket):
            directory.mkdir(mode=0o700)
            if os.geteuid() == 0:
                shutil.chown(directory, "postgres", pwd.getpwnam("postgres").pw_gid)
        run(as_postgres([PG_BIN / "initdb", "-D", self.data, "-U", "postgres", "-A", "trust", "--locale=C",
                         "-E", "UTF8", "--data-checksums", "--no-sync"]), cwd="/")
        lines = [f"{name} = '{value}'" for name, value in (self.SETTINGS | settings).items()]
        with open(self.data / "postgresql.conf", "a", encoding="utf-8") as conf:
            conf.write("\n".join([*lines, f"unix_socket_directories = '{self.socket}'", ""]))
        server = as_postgres([PG_BIN / "postgres", "-D", self.data])
        self.server = subprocess.Popen(server, cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                       start_new_session=True)
        deadline = time.monotonic() + 60
        while subprocess.run([PG_BIN / "pg_isready", "-q", "-h", self.socket, "-U", "postgres"], check=False).returncode:
            if self.server.poll() is not None or time.monotonic() > deadline:
                sys.exit("scripts/bench: PostgreSQL does not start")
            time.sleep(0.1)

    @property
    def conninfo(self):
        return f"host={self.socket} user=postgres dbname=postgres"

    def sql(self, text):
        command = [PG_BIN / "psql", "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-h", self.socket, "-U", "postgres"]
        return run(command, input=text, cwd="/").strip()

    def pgbench(self, *options):
        return run([PG_BIN / "pgbench", "-n", "-h", self.socket, "-U", "postgres", *options, "postgres"], cwd="/")

    def fill(self, quick):
        scale, events, blobs = (6, 220_000, 500) if quick else (60, 2_200_000, 5_000)
        run([PG_BIN / "pgbench", "-i", "-I", "dtgp", "-q", "-s", scale, "-h", self.socket, "-U", "postgres", "postgres"])
        self.sql(SCHEMA.format(events=events, blobs=blobs))

    def transactions(self, count, seed):
        """Uniform pgbench transactions, the same ones for the same seed."""
        self.pgbench("-c", "1", "-t", str(count), f"--random-seed={seed}")
        self.sql("CHECKPOINT")

    def always_whole(self):
        """Pages of the files that every backup reads from end to end: all but the main forks of relations."""
        main = re.compile(r"(base/\d+|global|pg_tblspc/.*)/\d+(\.\d+)?")
        left_out = re.compile(r"(log|pg_dynshmem|pg_notify|pg_replslot|pg_serial|pg_snapshots|pg_stat_tmp|pg_subtrans|pg_wal)/"
                              r"|postmaster\.(pid|opts)$|.*pg_internal\.init$")
        names = ((path.relative_to(self.data).as_posix(), path) for path in self.data.rglob("*") if path.is_file())
        sizes = (path.stat().st_size for name, path in names if not main.fullmatch(name) and not left_out.match(name))
        return sum(-(-size // 8192) for size in sizes)

    def close(self):
        # The server is the leader of its session; runuser between us and it passes no signal on.
        pidfile = self.data / "postmaster.pid"
        if pidfile.exists():
            os.kill(int(pidfile.read_text().split()[0]), signal.SIGQUIT)
        self.server.wait(30)
