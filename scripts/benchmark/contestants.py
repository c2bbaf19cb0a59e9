"""drctl and its peers: how each of them backs up and restores the same cluster."""

import contextlib
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import time

from . import bed as servers
from .cluster import PG_BIN
from .run import bare_environment, measured, restored, run, size_below


class Drctl:
    """One repository in the given regions, each a directory or a side of the bed."""

    def __init__(self, binary, place, cluster, regions, detection="read", **settings):
        """`regions`: name → a directory, or (bed, side). `detection`: how changed pages are found. `settings`: of the
        target, and `level`: zstd's for WAL."""
        self.binary, self.place, self.cluster, self.regions, self.buckets = binary, place, cluster, regions, {}
        place.mkdir()
        keys = run([binary, "init", "--recovery-key", place / "recovery.age"])
        text = '[repository]\nstate_dir = "state"\nmin_wraps = 1\n'
        if level := settings.pop("level", None):
            text += f"compression_level = {{ wal = {level} }}\n"
        text += "".join(self.region(name, at) for name, at in regions.items())
        text += f'[keys.recovery]\nage = "{re.search("age1[0-9a-z]+", keys)[0]}"\nidentity = "file:recovery.age"\n'
        text += f'[targets.bench]\nsource = "postgres"\nmethod = "local"\nconninfo = "{cluster.conninfo}"\n'
        text += "".join(f"{name} = {json.dumps(value)}\n" for name, value in {"detection": detection, **settings}.items())
        (place / "drctl.toml").write_text(text, encoding="utf-8")
        beds = [at[0] for at in regions.values() if isinstance(at, tuple)]
        self.environment = bare_environment(**(beds[0].credentials() if beds else {}),
                                            **{f"DRCTL_PG_BIN_{PG_BIN.parent.name}": PG_BIN})
        run(self.command("init"), env=self.environment)
        self.before = self.stored()

    def region(self, name, at):
        if isinstance(at, pathlib.Path):
            return f'[regions.{name}]\nurl = "{at}"\n'
        bed, side = at
        self.buckets[name] = bed.bucket(side)
        return (f'[regions.{name}]\nurl = "s3://{self.buckets[name]}/p"\nendpoint = "{bed.endpoint(side)}"\n'
                f'aws_region = "{servers.REGION}"\npath_style = true\n')

    def command(self, *words):
        return [self.binary, "--config", self.place / "drctl.toml", *words]

    def stored(self):
        """Bytes in one region: the average over all."""
        sizes = [size_below(at) if isinstance(at, pathlib.Path) else at[0].stored(at[1], self.buckets[name])
                 for name, at in self.regions.items()]
        return sum(sizes) / len(sizes)

    def backup(self, *options):
        before = self.stored()
        cost = measured(self.command("backup", "bench", "--fast", "--json", *options), self.environment)
        cost.stored_bytes = self.stored() - before
        return cost

    @contextlib.contextmanager
    def streaming(self):
        """A receiver of the cluster's WAL runs beside what is done in the block."""
        receiver = subprocess.Popen([str(word) for word in self.command("wal", "stream", "bench")], cwd="/",
                                    env=self.environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + 30
            while not self.cluster.sql("SELECT 1 FROM pg_stat_replication WHERE state = 'streaming'"):
                if receiver.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit("scripts/bench: drctl wal stream does not stream")
                time.sleep(0.1)
            yield
        finally:
            receiver.terminate()
            receiver.wait(30)
            # The slot that it leaves would keep all WAL from here on.
            self.cluster.sql("SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE NOT active")

    def restore(self, directory, *options):
        """Exactly the command that the plan prints, as a person would run it; it plans once more."""
        plan = run(self.command("restore", "latest", "--target-dir", directory, "--json", *options), env=self.environment)
        plan = json.loads(plan[plan.index("{"):])
        if plan["refused"]:
            raise SystemExit(f"scripts/bench: drctl refuses to restore: {plan['refused']}")
        return restored(shlex.split(plan["command"]), directory, self.environment)

    def through(self, endpoints):
        """The same repository through other addresses."""
        text = (self.place / "drctl.toml").read_text(encoding="utf-8")
        for name, endpoint in endpoints.items():
            text = re.sub(rf'(\[regions.{name}\]\nurl = "[^"]*"\nendpoint = )"[^"]*"', rf'\1"{endpoint}"', text)
        (self.place / "drctl.toml").write_text(text, encoding="utf-8")


class PgBackRest:
    """A stanza in a directory or in one bucket. Page checksums and AES are on, as with drctl; it has no second region."""

    NAME = "pgBackRest"

    @staticmethod
    def binary():
        return shutil.which(os.environ.get("DRCTL_BENCH_PGBACKREST", "pgbackrest"))

    @classmethod
    def version(cls):
        return tuple(int(part) for part in re.findall(r"\d+", run([cls.binary(), "version"]))[:2])

    def __init__(self, place, cluster, region, **settings):
        self.place, self.cluster, self.region = place, cluster, region
        place.mkdir()
        lines = {
            "repo1-cipher-type": "aes-256-cbc", "repo1-cipher-pass": "bench", "repo1-bundle": "y",
            "compress-type": "zst", "compress-level": "3", "process-max": str(os.cpu_count()), "start-fast": "y",
            "archive-check": "n", "archive-copy": "n", "log-level-console": "warn", "log-level-file": "off",
            "lock-path": place / "lock", "spool-path": place / "spool", "repo1-retention-full": "9",
        }
        if self.version() >= (2, 46):
            lines["repo1-block"] = "y"
        lines |= self.repository() | {name.replace("_", "-"): value for name, value in settings.items()}
        text = "[global]\n" + "".join(f"{name}={value}\n" for name, value in lines.items())
        text += f"[bench]\npg1-path={cluster.data}\npg1-socket-path={cluster.socket}\npg1-user=postgres\n"
        (place / "pgbackrest.conf").write_text(text, encoding="utf-8")
        run(self.command("stanza-create"), env=bare_environment(), cwd="/")

    def repository(self):
        if isinstance(self.region, pathlib.Path):
            return {"repo1-path": self.region}
        bed, side = self.region
        self.bucket = bed.bucket(side)
        return {
            "repo1-type": "s3", "repo1-path": "/p", "repo1-s3-bucket": self.bucket, "repo1-s3-endpoint": "localhost",
            "repo1-s3-region": servers.REGION, "repo1-s3-uri-style": "path", "repo1-s3-key": servers.ACCESS,
            "repo1-s3-key-secret": servers.SECRET, "repo1-storage-port": bed.port[side],
            "repo1-storage-ca-file": bed.ca,
        }

    def command(self, *words):
        return [self.binary(), f"--config={self.place / 'pgbackrest.conf'}", "--stanza=bench", *words]

    def through(self, endpoint):
        """The same bucket through another address."""
        conf = self.place / "pgbackrest.conf"
        text = re.sub(r"(?m)^repo1-storage-port=.*$", f"repo1-storage-port={endpoint.rpartition(':')[2]}", conf.read_text())
        conf.write_text(text, encoding="utf-8")

    def stored(self):
        if isinstance(self.region, pathlib.Path):
            return size_below(self.region)
        bed, side = self.region
        return bed.stored(side, self.bucket)

    def backup(self, kind="full"):
        before = self.stored()
        cost = measured(self.command(f"--type={kind}", "backup"))
        cost.stored_bytes = self.stored() - before
        return cost

    def restore(self, directory):
        directory.mkdir(mode=0o700)
        return restored(self.command(f"--pg1-path={directory}", "restore"), directory)


class WalRus:
    """Full backups into one bucket; sealed with a libsodium key, zstd 3 as for the others."""

    NAME = "WAL-RUS"

    @staticmethod
    def binary():
        return shutil.which(os.environ.get("DRCTL_BENCH_WALRUS", "walrus"))

    def __init__(self, place, cluster, region):
        self.place, self.cluster, (self.bed, self.side) = place, cluster, region
        self.bucket = self.bed.bucket(self.side)
        self.environment = bare_environment(
            **self.bed.credentials(), AWS_ENDPOINT=self.bed.endpoint(self.side), AWS_S3_FORCE_PATH_STYLE="true",
            WALG_S3_PREFIX=f"s3://{self.bucket}/p", WALG_COMPRESSION_METHOD="zstd", WALG_COMPRESSION_LEVEL="3",
            WALG_LIBSODIUM_KEY="5a" * 32, WALG_LIBSODIUM_KEY_TRANSFORM="hex", PGHOST=cluster.socket, PGUSER="postgres",
            PGDATABASE="postgres")

    def stored(self):
        return self.bed.stored(self.side, self.bucket)

    def backup(self):
        before = self.stored()
        cost = measured([self.binary(), "backup-push", "--fast", "--verify", self.cluster.data], self.environment)
        cost.stored_bytes = self.stored() - before
        return cost

    def restore(self, directory):
        directory.mkdir(mode=0o700)
        return restored([self.binary(), "backup-fetch", directory, "LATEST"], directory, self.environment)


def missing():
    """Peers that cannot be measured here, and how they could be."""
    absent = {}
    if not PgBackRest.binary():
        absent[PgBackRest.NAME] = "apt-get install pgbackrest, or name a binary in DRCTL_BENCH_PGBACKREST"
    if not WalRus.binary():
        absent[WalRus.NAME] = "cargo install wal-rus, or name a binary in DRCTL_BENCH_WALRUS"
    return absent


def versions(binary):
    """What was measured."""
    def said(command):
        done = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
        return (done.stdout or done.stderr).strip().splitlines()[0] if done.stdout or done.stderr else "unknown"
    found = {"drctl": said([binary, "--version"])}
    if PgBackRest.binary():
        found[PgBackRest.NAME] = said([PgBackRest.binary(), "version"])
    if WalRus.binary():
        found[WalRus.NAME] = said([WalRus.binary(), "--version"])
    return found
