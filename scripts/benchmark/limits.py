"""What the tools of the trade can do at most with the same bytes, without any of the bookkeeping."""

import shlex

from .cluster import LEFT_OUT
from .run import measured, restored, run, size_below

# Pieces of the tar archive, each compressed alone, so that both cores unpack.
PIECE = "32M"


def archive(cluster):
    left_out = " ".join(f"--exclude={shlex.quote(pattern)}" for pattern in LEFT_OUT)
    return f"tar -c --anchored --wildcards {left_out} -C {shlex.quote(str(cluster.data))} ."


def backup(cluster, place):
    """Into two files, both fsynced."""
    place.mkdir()
    first, second = place / "a", place / "b"
    script = (f"set -o pipefail; {archive(cluster)} | zstd -q -3 -T2 | openssl enc -aes-256-ctr -K {'5a' * 32} -iv {'a5' * 16}"
              f" | tee {shlex.quote(str(first))} > {shlex.quote(str(second))}"
              f" && sync {shlex.quote(str(first))} {shlex.quote(str(second))}")
    cost = measured(["bash", "-c", script])
    cost.stored_bytes = first.stat().st_size
    return cost


class Pieces:
    """The archive in compressed pieces, in a bucket: what `fetch all | unzstd | write, fsync` restores from."""

    def __init__(self, cluster, place, region):
        place.mkdir()
        self.bed, self.side = region
        self.bucket = self.bed.bucket(self.side)
        split = f"split -a 4 -b {PIECE} --filter='zstd -q -3 > $FILE.zst' - {shlex.quote(str(place / 'piece-'))}"
        run(["bash", "-c", f"set -o pipefail; {archive(cluster)} | {split}"])
        self.names = sorted(path.name for path in place.iterdir())
        self.size = size_below(place)
        for name in self.names:
            self.bed.curl(self.side, "-T", place / name, method="PUT", path=f"{self.bucket}/{name}")

    def restore(self, directory):
        """Four requests in flight; every piece is fsynced. Nothing is opened, compared or put where it belongs."""
        directory.mkdir()
        into = shlex.quote(str(directory))
        one = (f"set -o pipefail; curl -sS --fail --cacert {shlex.quote(str(self.bed.ca))} \"$1\" | zstd -dq"
               f" | dd of={into}/$0 bs=1M conv=fsync status=none")
        pairs = [word for name in self.names for word in (name, self.bed.url(self.side, "GET", f"{self.bucket}/{name}"))]
        words = " ".join(shlex.quote(word) for word in pairs)
        return restored(["bash", "-c", f"printf '%s\\n' {words} | xargs -P 4 -n 2 bash -c {shlex.quote(one)}"], directory)
