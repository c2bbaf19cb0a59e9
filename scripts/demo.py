"""The parts of scripts/demo that are no shell: clients that remember what they were promised, damage, and the figures."""

import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request

WRITERS = 4


def write(demo, psql):
    """Writes until the server dies. Notes each acknowledged commit, and what drctl reports as durable meanwhile."""
    book = open(demo + "/safe/book", "w", buffering=1)
    threads = [threading.Thread(target=client, args=(demo, psql, book, number)) for number in range(WRITERS)]
    for thread in threads:
        thread.start()
    durable = open(demo + "/safe/durable", "w", buffering=1)
    while any(thread.is_alive() for thread in threads):
        position = ask_position(demo + "/dr/state/ledger.sock")
        if position:
            durable.write("%s %f\n" % (position, time.time()))
        time.sleep(0.1)


def client(demo, psql, book, writer):
    user = ["runuser", "-u", "postgres", "--"] if os.getuid() == 0 else []
    command = user + [psql, "-XqAt", "-h", demo + "/run", "-U", "postgres", "postgres"]
    run = subprocess.Popen(command, cwd=demo + "/run", stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                           stderr=subprocess.DEVNULL, text=True)
    number = writer
    try:
        while not os.path.exists(demo + "/safe/disaster"):
            number += WRITERS
            run.stdin.write(
                "BEGIN; INSERT INTO ledger VALUES (%d, %d);"
                " UPDATE pgbench_accounts SET abalance = abalance + %d WHERE aid = %d; COMMIT;"
                " SELECT pg_current_wal_insert_lsn();\n" % (number, number % 97, number % 97, number * 7919 % 1000000 + 1))
            run.stdin.flush()
            lsn = run.stdout.readline().strip()
            if not lsn:
                break
            book.write("%d %s %f\n" % (number, lsn, time.time()))
    except OSError:
        pass
    run.kill()
    run.wait()


def ask_position(path):
    """The durable position, from the control socket of `drctl wal stream`."""
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as control:
            control.settimeout(2)
            control.connect(path)
            control.sendall(b"GET /v1/wal/ledger HTTP/1.1\r\nHost: drctl\r\nConnection: close\r\n\r\n")
            answer = b""
            while chunk := control.recv(65536):
                answer += chunk
        return json.loads(answer.partition(b"\r\n\r\n")[2])["durable_lsn"]
    except (OSError, ValueError, KeyError):
        return None


def damage(region):
    """One bit of the largest pack, and the loss of a WAL frame in the middle."""
    def below(name):
        return sorted(os.path.join(path, file) for path, _, files in os.walk(region + "/" + name) for file in files)
    pack = max(below("packs"), key=os.path.getsize)
    with open(pack, "r+b") as file:
        file.seek(os.path.getsize(pack) // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    frames = below("wal")
    frame = frames[len(frames) // 2]
    os.remove(frame)
    print("   AND REGION-A IS DAMAGED: A BIT FLIPPED IN %s," % os.path.relpath(pack, region))
    print("   AND %s IS GONE." % os.path.relpath(frame, region))


def position(text):
    high, low = text.split("/")
    return int(high, 16) << 32 | int(low, 16)


def report(safe, *options):
    rows = [line.split() for line in open(safe + "/book")]
    book = {int(row[0]): (position(row[1]), float(row[2])) for row in rows if len(row) == 3}
    durable = [position(line.split()[0]) for line in open(safe + "/durable") if len(line.split()) == 2][-1]
    restored = {int(line) for line in open(safe + "/restored")}
    result = json.load(open(safe + "/report.json"))

    promised = {number for number, (lsn, _) in book.items() if lsn <= durable}
    lost = promised - restored
    came_back = [at for number, (_, at) in book.items() if number in restored]
    rpo = max(0.0, max(at for _, at in book.values()) - max(came_back, default=0))
    phases = {phase["name"]: round(phase["seconds"], 3) for phase in result["phases"]}

    for incident in result["incidents"]:
        print("   taken from another region: %s (%s)" % (incident["key"], incident["region"]))
    print("   " + ", ".join("%s %.1f s" % phase for phase in phases.items()))
    print()
    print("   transactions acknowledged as durable   %8d   of %d that the clients were promised" % (len(promised), len(book)))
    print("   transactions back                      %8d   lost: %d" % (len(restored), len(lost)))
    print("   newest commits not back (RPO)        %8.1f s" % rpo)
    print("   from plan to open database (RTO)     %8.1f s" % result["seconds"])
    if "--json" in options:
        print(json.dumps({
            "acknowledged": len(promised), "restored": len(restored), "lost": len(lost), "promised": len(book),
            "rpo_seconds": round(rpo, 3), "rto_seconds": round(result["seconds"], 3), "phases": phases}))
    if lost:
        sys.exit("LOST: " + " ".join(map(str, sorted(lost)[:20])))


def port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        print(probe.getsockname()[1])


def newest():
    """The id of the newest report of a list."""
    print(json.load(sys.stdin)["reports"][0]["id"])


SHOWN = ("drctl_rpo_exposure_seconds", "drctl_rpo_achieved_seconds", "drctl_rto_achieved_seconds",
         "drctl_backup_last_success_timestamp_seconds", "drctl_verify_last_success_timestamp_seconds",
         "drctl_schedule_runs_total")


def metrics(port):
    """A few of the daemon's metrics that are not zero; it looks at the repository after each run, and once a minute."""
    deadline = time.time() + 90
    while True:
        with urllib.request.urlopen("http://127.0.0.1:%s/metrics" % port, timeout=10) as answer:
            lines = answer.read().decode().splitlines()
        found = [line for line in lines if line.startswith(SHOWN) and not line.endswith(" 0")]
        if any(line.startswith("drctl_rto_achieved_seconds") for line in found) or time.time() > deadline:
            print("\n".join(found))
            return
        time.sleep(1)


if __name__ == "__main__":
    commands = {"write": write, "damage": damage, "report": report, "port": port, "newest": newest, "metrics": metrics}
    commands[sys.argv[1]](*sys.argv[2:])
