"""Running programs, and what a run cost."""

import dataclasses
import os
import pathlib
import shlex
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent


@dataclasses.dataclass
class Cost:
    """What one run of a program took. CPU and memory include the processes that it started and waited for."""

    wall_seconds: float
    cpu_seconds: float
    peak_rss_bytes: int
    stored_bytes: float | None = None
    # The wall time of a restore, and of flushing what it left in the page cache.
    durable_seconds: float | None = None
    output: str = ""


def say(text):
    print(f"scripts/bench: {text}", file=sys.stderr, flush=True)


def as_postgres(arguments):
    """PostgreSQL refuses to run as root."""
    command = [str(argument) for argument in arguments]
    return ["runuser", "-u", "postgres", "--", *command] if os.geteuid() == 0 else command


def run(arguments, **options):
    """Runs a command to its end; what it says is shown only when it does not succeed."""
    command = [str(argument) for argument in arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, **options)
    if done.returncode != 0:
        sys.exit(f"scripts/bench: {shlex.join(command)}: exit status {done.returncode}\n{done.stdout}")
    return done.stdout


def bare_environment(**more):
    """Nothing of what the caller configured for PostgreSQL or any contestant may leak into a measurement."""
    foreign = ("DRCTL_", "PG", "AWS_", "WALG_", "SSL_CERT")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
    return kept | {name: str(value) for name, value in more.items()}


def measured(command, environment=None, cwd="/"):
    """The cost of a command that must succeed; its standard output is kept."""
    command = [str(word) for word in command]
    os.sync()
    began = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd,
                          env=environment or bare_environment()) as process:
        output, errors = drained(process)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.monotonic() - began
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        sys.exit(f"scripts/bench: {shlex.join(command)}: exit status {process.returncode}\n{output}{errors}")
    return Cost(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, output=output)


def restored(command, directory, environment=None):
    """The cost of a restore into a directory, and how long it took until all of it was on the disk."""
    cost = measured(command, environment)
    began = time.monotonic()
    run(["sync", "-f", directory])
    cost.durable_seconds = cost.wall_seconds + time.monotonic() - began
    return cost


class Running:
    """A program beside what is measured, until it ends or is told to; then it is known what it cost."""

    def __init__(self, command, environment=None):
        self.words, self.began = [str(word) for word in command], time.monotonic()
        self.errors = tempfile.TemporaryFile()
        self.process = subprocess.Popen(self.words, cwd="/", env=environment or bare_environment(),
                                        stdout=subprocess.DEVNULL, stderr=self.errors)

    def until(self, what, reached, limit=60, pause=0.01):
        """Waits until `reached()`, for as long as the program lives."""
        deadline = time.monotonic() + limit
        while not (answer := reached()):
            if self.status(os.WNOHANG):
                self.fail(f"has ended before {what}")
            if time.monotonic() > deadline:
                self.fail(f"{what} did not come about in {limit} s")
            time.sleep(pause)
        return answer

    def status(self, options):
        """What wait4 says once it has ended."""
        if self.process.returncode is None:
            pid, status, usage = os.wait4(self.process.pid, options)
            if not pid:
                return None
            self.process.returncode, self.usage = os.waitstatus_to_exitcode(status), usage
        return self.usage

    def end(self, tell=True):
        """Its cost. A program that does not come to its end in a minute, or not to a good one, ends the run."""
        if tell and self.process.returncode is None:
            self.process.terminate()
        deadline = time.monotonic() + 60
        while not (usage := self.status(os.WNOHANG)):
            if time.monotonic() > deadline:
                self.fail("does not end")
            time.sleep(0.002)
        if self.process.returncode:
            self.fail(f"exit status {self.process.returncode}")
        return Cost(time.monotonic() - self.began, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)

    def fail(self, why):
        self.kill()
        self.errors.seek(0)
        sys.exit(f"scripts/bench: {shlex.join(self.words)}: {why}\n{self.errors.read().decode(errors='replace')}")

    def kill(self):
        if self.process.returncode is None:
            self.process.kill()
            self.status(0)


def drained(process):
    """Everything that a process says, without waiting for it: wait4 is to be the one who learns what it cost."""
    import threading
    errors = []
    reader = threading.Thread(target=lambda: errors.append(process.stderr.read()))
    reader.start()
    output = process.stdout.read()
    reader.join()
    return output, "".join(errors)


def size_below(directory):
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
