"""`scripts/bench drill`: drills under load, each against what a client remembers."""

import datetime
import json
import pathlib
import shutil
import statistics
import subprocess
import sys
import threading
import time

from .cluster import PG_BIN, Cluster
from .run import as_postgres, bare_environment, run, say


class Ledger:
    """A client that remembers what was acknowledged, and when: one psql, fed line by line."""

    def __init__(self, cluster):
        cluster.sql("CREATE TABLE ledger (number bigint PRIMARY KEY)")
        command = [PG_BIN / "psql", "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-h", cluster.socket, "-U", "postgres"]
        self.psql = subprocess.Popen(as_postgres(command), cwd="/", stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.acknowledged, self.stopping = {}, threading.Event()
        self.thread = threading.Thread(target=self.write, daemon=True)
        self.thread.start()

    def write(self):
        number = 0
        while not self.stopping.is_set():
            number += 1
            self.psql.stdin.write(f"INSERT INTO ledger VALUES ({number});\n\\echo {number}\n")
            self.psql.stdin.flush()
            if self.psql.stdout.readline().strip() != str(number):
                return
            self.acknowledged[number] = time.time()
            time.sleep(0.005)

    def close(self):
        self.stopping.set()
        self.thread.join()
        self.psql.stdin.close()
        self.psql.wait(30)


def true_loss(report, acknowledged):
    """Seconds before the fault at which the oldest commit was acknowledged that did not come back: the kept copy is asked."""
    root = pathlib.Path(report["environment"]["directory"])
    fault = datetime.datetime.fromisoformat(report["fault_at"].replace("Z", "+00:00")).timestamp()
    ctl = [PG_BIN / "pg_ctl", "-D", root / "data", "-w"]
    run(as_postgres([*ctl, "-l", root / "data" / "bench.log", "start"]), cwd="/")
    try:
        query = [PG_BIN / "psql", "-X", "-A", "-t", "-h", root / "s", "-p", "5432", "-U", "postgres", "-c", "SELECT number FROM ledger"]
        back = {int(line) for line in run(as_postgres(query), cwd="/").split()}
    finally:
        run(as_postgres([*ctl, "-m", "fast", "stop"]), cwd="/")
        shutil.rmtree(root)
    lost = [at for number, at in acknowledged.items() if at < fault and number not in back]
    return fault - min(lost) if lost else 0.0


def drills(scratch, binary, options):
    """Drills under load, each against what the client remembers."""
    cluster = Cluster(scratch)
    place, stream, ledger = scratch / "drctl", None, None
    environment = bare_environment(**{f"DRCTL_PG_BIN_{PG_BIN.parent.name}": PG_BIN})
    command = [binary, "--config", place / "drctl.toml"]
    try:
        run([binary, "init", place])
        with open(place / "drctl.toml", "a", encoding="utf-8") as conf:
            conf.write(f'\n[targets.bench]\nsource = "postgres"\nconninfo = "{cluster.conninfo}"\n'
                       f'[drill]\ndir = "{scratch / "d"}"\nrun_as = "postgres"\n')
        cluster.fill(True)
        stream = subprocess.Popen([*command, "wal", "stream", "bench"], env=environment, stderr=subprocess.DEVNULL)
        ledger = Ledger(cluster)
        run([*command, "backup", "bench", "--fast"], env=environment)
        for turn in range(1, options.rounds + 1):
            say(f"drill {turn} of {options.rounds}")
            done = subprocess.run([*command, "drill", "bench", "--keep", "--json"], env=environment, text=True,
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE, check=False)
            report = json.loads(done.stdout) if done.stdout else {}
            if report.get("outcome") != "pass":
                sys.exit(f"scripts/bench: drill {turn}: {report.get('reasons')}\n{done.stderr}")
            true = true_loss(report, dict(ledger.acknowledged))
            reported = report["rpo"]["measured_seconds"]
            yield {"work": "drill", "round": turn, "rpo_reported_seconds": round(reported, 3),
                   "rpo_true_seconds": round(true, 3), "honest": reported >= true,
                   "technical_recovery_seconds": round(report["rto"]["measured_seconds"], 3),
                   "phases": {phase["name"]: round(phase["seconds"], 3) for phase in report["phases"]},
                   "network": report["environment"]["network"]}
    finally:
        if ledger:
            ledger.close()
        if stream:
            stream.terminate()
            stream.wait(60)
        cluster.close()


def drill_table(rows):
    names = list(rows[0]["phases"])
    print(f"{'drill':>5}{'RPO told':>10}{'RPO true':>10}{'RTO':>8}  " + "".join(f"{name:>11}" for name in names))
    for line in rows:
        phases = "".join(f"{line['phases'][name]:>9.2f} s" for name in names)
        print(f"{line['round']:>5}{line['rpo_reported_seconds']:>8.2f} s{line['rpo_true_seconds']:>8.2f} s"
              f"{line['technical_recovery_seconds']:>6.2f} s  {phases}{'' if line['honest'] else '  BETTER THAN THE TRUTH'}")
    worst = max(rows, key=lambda line: line["rpo_reported_seconds"])
    recovery = [line["technical_recovery_seconds"] for line in rows]
    honest = sum(line["honest"] for line in rows)
    print(f"{honest} of {len(rows)} reported no better than the truth; worst RPO {worst['rpo_reported_seconds']:.2f} s; "
          f"recovery median {statistics.median(recovery):.2f} s, worst {max(recovery):.2f} s")
