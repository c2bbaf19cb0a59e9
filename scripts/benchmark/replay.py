"""Replay of WAL that is far away, beside replay of the same WAL from a pg_wal that holds it already.

All begin with the same restored data directory. Measured from the server's own first line to the one that says that it
accepts connections, as its log dates them."""

import datetime
import os
import re
import shutil
import statistics
import time

from .cluster import PG_BIN
from .contestants import Drctl, PgBackRest
from .ingest import pgbench, segments
from .receiver import passed, receiving
from .rows import row
from .run import as_postgres, run, say
from .session import Session, lsn, text_of

DELAY_MILLISECONDS = 100
# The lines of the log are what is measured.
SETTINGS = {"log_min_messages": "warning", "log_line_prefix": "%m ", "log_timezone": "UTC"}
STARTED, READY = "starting PostgreSQL", "database system is ready to accept connections"
LIMIT = 600


def rows(bench):
    """Everybody in turns, in every round."""
    with bench.cluster(**SETTINGS) as cluster:
        drctl, peer, volume = prepare(bench, cluster)
    runs, found = contestants(bench, drctl, peer), {}
    for turn in range(bench.options.rounds):
        say(f"replay, round {turn + 1} of {bench.options.rounds}")
        for name, replay in runs.items():
            place = bench.place("replayed")
            found.setdefault(name, []).append(replay(place))
            shutil.rmtree(place)
    middle = {name: statistics.median(times) for name, times in found.items()}
    work = bench.work(f"replay of {volume / 1e6:.0f} MB of WAL from S3, {DELAY_MILLISECONDS} ms more per request")
    filled = ("a pre-filled pg_wal", middle["filled"])
    yield row(work, "wall_seconds", middle["staged"], filled, 1.15)
    yield row(f"{work}, --feed stream", "wall_seconds", middle["streamed"], filled, None)
    yield row(work, "wall_seconds", middle["staged"], ("pgBackRest archive-get", middle.get("got")), None)


def prepare(bench, cluster):
    """A backup and the WAL behind it, in the repositories of both."""
    near = (bench.bed, "a")
    drctl = Drctl(bench.binary, bench.place("drctl-r"), cluster, {"a": near})
    with receiving(drctl) as receiver, Session(cluster) as session:
        receiver.begun(session)
        session.ask("SELECT pg_create_physical_replication_slot('kept', true)")
        before = passed(session)
        drctl.backup()
        begun = passed(session)
        say("writing WAL")
        pgbench(bench, cluster, text_of(begun + ((320 if bench.quick else 1024) << 20)))
        end = passed(session)
        receiver.reach(session, end)
        receiver.end()
        peer = None
        if bench.has_pgbackrest:
            say("handing the same WAL to pgBackRest")
            last = lsn(session.ask("SELECT pg_switch_wal()"))
            peer = PgBackRest(bench.place("pgbr-r"), cluster, near, archive_async="y")
            # Not asynchronously: it would look for files that wait for archive_command.
            push = peer.command("--no-archive-async", "archive-push")
            for file in segments(cluster, before, last):
                run([*push, file], cwd="/")
    return drctl, peer, end - begun


def contestants(bench, drctl, peer):
    """How each of them replays into an empty place, in seconds."""
    near, far = bench.bed.delayed("a", 0), bench.bed.delayed("a", DELAY_MILLISECONDS)

    def started(place, *options):
        drctl.through({"a": far})
        drctl.restore(place, "--start", "--run-as", "postgres", *options)
        return finished(place, place / "drctl-recovery.log")

    def by_hand(place, command, fill):
        drctl.through({"a": near})
        drctl.restore(place, "--run-as", "postgres")
        staged = place / "pg_wal/drctl-wal"
        for file in staged.iterdir():
            if fill and re.fullmatch("[0-9A-F]{24}", file.name):
                file.rename(place / "pg_wal" / file.name)
        shutil.rmtree(staged)
        conf = place / "postgresql.auto.conf"
        text, count = re.subn("(?m)^restore_command = .*$", lambda _: f"restore_command = '{command}'", conf.read_text())
        if count != 1:
            raise SystemExit(f"scripts/bench: no restore_command in {conf}")
        conf.write_text(text)
        log = place / "recovery.log"
        os.sync()
        run(as_postgres([PG_BIN / "pg_ctl", "-D", place, "-l", log, "-w", "-t", LIMIT, "start"]), cwd="/")
        return finished(place, log)

    def got(place):
        peer.through(far)
        shutil.rmtree(peer.place / "spool", ignore_errors=True)
        run(["chown", "-R", "postgres", peer.place])
        get = " ".join(str(word) for word in peer.command(f"--pg1-path={place}", "archive-get"))
        return by_hand(place, f'{get} %f "%p"', False)

    runs = {"staged": started, "streamed": lambda place: started(place, "--feed", "stream"),
            "filled": lambda place: by_hand(place, "false", True)}
    return runs | ({"got": got} if peer else {})


def finished(place, log):
    """Seconds from the first line of a server's log to the one that says that it is open; then the server is stopped."""
    deadline = time.monotonic() + LIMIT
    while READY not in (text := log.read_text()):
        if time.monotonic() > deadline:
            raise SystemExit(f"scripts/bench: recovery does not end\n{text}")
        time.sleep(0.05)
    run(as_postgres([PG_BIN / "pg_ctl", "-D", place, "-m", "immediate", "-w", "stop"]), cwd="/")
    at = lambda line: datetime.datetime.strptime(line[:23], "%Y-%m-%d %H:%M:%S.%f")
    first, last = (next(line for line in text.splitlines() if words in line) for words in (STARTED, READY))
    return (at(last) - at(first)).total_seconds()
