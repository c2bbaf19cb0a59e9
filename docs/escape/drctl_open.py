#!/usr/bin/env python3
"""Restores a PostgreSQL backup from one region of a drctl repository, without drctl.

    drctl_open.py REGION                                  lists the backups
    drctl_open.py REGION BACKUP|TARGET DIR [options]      restores one (of a target: the newest) into DIR

REGION is a local copy of the region (aws s3 cp --recursive s3://bucket/prefix REGION). DIR must not exist or be empty.

    --age-identity FILE    opens the keysets with `age -d -i FILE`; repeats
    --secrets PATH         a directory of opened keysets, one file <keyset>.json each, as printed by `aws kms decrypt`;
                           for each keyset that nothing opens, the command that fills the directory is shown
    --tablespace OLD=NEW   puts a tablespace elsewhere; repeats
    --trust-signer ID      accepts only this signer; repeats. Without it the signers are shown

Written from format.md, which lies beside it, and independent of drctl's own code. It needs Python 3.8 with the package
"cryptography", floe.py beside it, `age` for age identities, and libzstd or the command `zstd`.
"""

import argparse
import base64
import ctypes
import ctypes.util
import functools
import hashlib
import json
import os
import re
import struct
import subprocess
import sys

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

import floe

PAGE = 8192
ZERO_PAGE = 0xFFFF
CONTROL = "global/pg_control"


class Damaged(Exception):
    """A stored object is not what was written."""


def say(text):
    print(text, file=sys.stderr, flush=True)


def sha256(data):
    return hashlib.sha256(data).hexdigest()


def lsn(text):
    high, low = text.split("/")
    return (int(high, 16) << 32) | int(low, 16)


def show_lsn(position):
    return "%X/%X" % (position >> 32, position & 0xFFFFFFFF)


# ---- Compression: a payload is a tag (0 raw, 1 zstd), the plain length, the data -------------------------------------


@functools.lru_cache(None)
def libzstd():
    name = ctypes.util.find_library("zstd") or "libzstd.so.1"
    try:
        library = ctypes.CDLL(name)
    except OSError:
        return None
    library.ZSTD_decompress.restype = ctypes.c_size_t
    library.ZSTD_decompress.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_char_p, ctypes.c_size_t]
    return library


def unpack(payload):
    tag, length = struct.unpack("<BI", payload[:5])
    data = payload[5:]
    if tag == 1 and libzstd():
        buffer = ctypes.create_string_buffer(max(length, 1))
        written = libzstd().ZSTD_decompress(buffer, length, data, len(data))
        data = buffer.raw[:written] if written <= length else b""
    elif tag == 1:
        data = subprocess.run(["zstd", "-dcq"], input=data, stdout=subprocess.PIPE, check=True).stdout
    elif tag != 0:
        raise Damaged("a payload has tag %d" % tag)
    if len(data) != length:
        raise Damaged("a payload has %d bytes and promises %d" % (len(data), length))
    return data


# ---- The region: objects, signatures, seals --------------------------------------------------------------------------


class Region:
    def __init__(self, root, arguments):
        self.root = root
        record = json.loads(self.read("drctl.json"))
        created_at = record["created_at"].replace("Z", "+00:00")
        if sha256(("%(format)d %(repository)s " % record + created_at).encode()) != record["sha256"]:
            raise Damaged("drctl.json is damaged; its digest does not fit")
        self.repository = record["repository"]
        self.trusted = set(arguments.trust_signer)
        self.identities = arguments.age_identity
        self.secrets_dir = arguments.secrets
        self.seen_signers = set()
        self.keysets = {}

    def path(self, key):
        return os.path.join(self.root, *key.split("/"))

    def read(self, key):
        with open(self.path(key), "rb") as file:
            return file.read()

    def names(self, prefix):
        path = self.path(prefix)
        return sorted(os.listdir(path)) if os.path.isdir(path) else []

    def check(self, signer, domain, context, message, signature):
        """Accepts a signature of a signer that counts."""
        if self.trusted and signer not in self.trusted:
            raise Damaged("%s is signed by %s, which is not trusted" % (context, signer))
        # The name is the hash of the key, so its own signature, which follows, adds nothing here.
        public = bytes.fromhex(json.loads(self.read("signers/" + signer).splitlines()[0])["public_key"])
        if sha256(public)[:32] != signer:
            raise Damaged("the record of signer %s is not its public key" % signer)
        signed = ("%s\n%s\n" % (domain, context)).encode() + message
        try:
            Ed25519PublicKey.from_public_bytes(public).verify(signature, signed)
        except InvalidSignature:
            raise Damaged("the signature of %s does not verify" % context) from None
        self.seen_signers.add(signer)

    def signed_text(self, data, context):
        """The lines of a signed text, without the signature at its end."""
        body_end = data.rstrip(b"\n").rfind(b"\n") + 1
        last = json.loads(data[body_end:])
        self.check(last["signer"], "drctl signed 1", context, data[:body_end], bytes.fromhex(last["signature"]))
        return [json.loads(line) for line in data[:body_end].splitlines()]

    def parts(self, kind, commit):
        """The numbered parts of a stream that COMMIT names, proven by its digest."""
        names = ["%s/%s/%s/%06d" % (kind, commit["target"], commit["id"], n) for n in range(commit["parts"]["count"])]
        parts = [self.read(name) for name in names]
        digests = b"".join(hashlib.sha256(part).digest() for part in parts)
        if sha256(digests) != commit["parts"]["sha256"]:
            raise Damaged("%s of %s is not the one that its COMMIT signed" % (kind, commit["id"]))
        return parts

    def open(self, keyset, secret, kind, logical_id, sealed):
        aad = "\n".join(["drctl 1", self.repository, keyset, kind, logical_id]).encode()
        try:
            return unpack(floe.open_message(self.keysets[keyset][secret], aad, sealed))
        except floe.DoesNotAuthenticate as error:
            raise Damaged("%s %s does not authenticate: %s" % (kind, logical_id, error)) from None

    def open_keysets(self, wanted):
        """Opens every keyset before a byte is written, or says what would open it and ends."""
        advice = []
        for target, keyset in sorted(wanted):
            prefix = "keysets/%s/%s" % (target, keyset)
            wraps = [json.loads(self.read(prefix + "/" + holder)) for holder in self.names(prefix)]
            context = {"repository": self.repository, "target": target, "keyset": keyset}
            text = self.opened_already(keyset) or self.open_with_age(wraps)
            if text is None:
                advice.append("keyset %s:" % keyset)
                advice.extend("  " + self.how_to_open(wrap, context) for wrap in wraps)
                continue
            secret = json.loads(text)
            if {name: secret.get(name) for name in context} != context:
                raise Damaged("the secret of keyset %s belongs to another" % keyset)
            self.keysets[keyset] = {name: bytes.fromhex(secret[name]) for name in ("data", "meta") if name in secret}
        if advice:
            sys.exit("\n".join(["Nothing given opens these keysets. Any one of the lines below each of them does:"] + advice))

    def opened_already(self, keyset):
        path = os.path.join(self.secrets_dir or "", keyset + ".json")
        if not self.secrets_dir or not os.path.exists(path):
            return None
        with open(path, "rb") as file:
            text = file.read().strip()
        return text if text.startswith(b"{") else base64.b64decode(text)

    def open_with_age(self, wraps):
        for wrap in wraps:
            for identity in self.identities if wrap["kind"] == "age" else []:
                sealed = base64.b64decode(wrap["ciphertext"])
                run = subprocess.run(["age", "-d", "-i", identity], input=sealed, capture_output=True, check=False)
                if run.returncode == 0:
                    return run.stdout
        return None

    def how_to_open(self, wrap, context):
        if wrap["kind"] == "age":
            return "--age-identity FILE with the identity of %s" % wrap["key"]
        if not self.secrets_dir:
            return "--secrets PATH: then the command for KMS key %s is shown here" % wrap["key"]
        os.makedirs(self.secrets_dir, mode=0o700, exist_ok=True)
        blob = os.path.join(self.secrets_dir, "%s.%s.blob" % (wrap["context"]["keyset"], wrap["holder"]))
        with open(blob, "wb") as file:
            file.write(base64.b64decode(wrap["ciphertext"]))
        pairs = ",".join("%s=%s" % pair for pair in context.items())
        command = "aws kms decrypt --region %s --key-id %s --ciphertext-blob fileb://%s --encryption-context %s"
        command += " --query Plaintext --output text > %s"
        target = os.path.join(self.secrets_dir, wrap["context"]["keyset"] + ".json")
        return command % (wrap.get("aws_region"), wrap["key"], blob, pairs, target)


def commits(region):
    """Every backup whose COMMIT verifies, oldest first."""
    found = []
    for target in region.names("commits"):
        for name in region.names("commits/" + target):
            try:
                context = "commit %s %s" % (region.repository, name)
                (commit,) = region.signed_text(region.read("commits/%s/%s" % (target, name)), context)
                found.append(commit)
            except (Damaged, OSError, ValueError) as error:
                say("left out: backup %s: %s" % (name, error))
    return sorted(found, key=lambda commit: commit["finished_at"])


def inventory(region, commit):
    lines = []
    for number, part in enumerate(region.parts("inventories", dict(commit, parts=commit["inventory"]))):
        lines += region.signed_text(part, "inventory %s %s/%d" % (region.repository, commit["id"], number))
    return lines


def manifest(region, commit):
    lines = []
    for number, part in enumerate(region.parts("manifests", dict(commit, parts=commit["manifest"]))):
        plain = region.open(commit["keyset"], "meta", "manifest", "%s/%d" % (commit["id"], number), part)
        lines += [json.loads(line) for line in plain.splitlines()]
    files = [line for line in lines if line["line"] == "file"]
    end = {"line": "end", "files": len(files), "bytes": sum(file["size"] for file in files)}
    if lines[0]["line"] != "begin" or lines[0]["backup"] != commit["id"] or lines[-1] != end:
        raise Damaged("the manifest of %s is not complete" % commit["id"])
    return lines


# ---- Base backup -----------------------------------------------------------------------------------------------------


class Pages:
    """Reads frames and map chunks out of packs; the latest stay in memory, because neighbours share them."""

    def __init__(self, region, sources):
        self.region, self.sources = region, sources
        self.frame = functools.lru_cache(256)(self.read_frame)
        self.chunk = functools.lru_cache(64)(self.read_chunk)

    def read_frame(self, kind, keyset, birth, pack, offset, length):
        """`birth` is (backup, pack, number), `pack` is (backup, pack): where the frame is now."""
        backup, number = pack
        target = re.fullmatch(r"(.+)-\d{6}-\d{6}-[^-]+", backup).group(1)
        with open(self.region.path("packs/%s/%s/%06d" % (target, backup, number)), "rb") as file:
            file.seek(offset)
            sealed = file.read(length)
        secret = "meta" if kind == "map" else "data"
        return self.region.open(keyset, secret, kind, "%s/%06d#%d" % birth, sealed)

    def read_chunk(self, use):
        """(frames, entries) of the map chunk that a chunk use of the manifest names."""
        (born, keyset), (now, _) = self.sources[use[0]], self.sources[use[3]]
        data = self.frame("map", keyset, (born, use[1], use[2]), (now, use[4]), use[5], use[6])
        if data[:4] != b"DM1\n":
            raise Damaged("a page map is not readable")
        at = 4

        def take(count, kind):
            nonlocal at
            size = struct.calcsize("<%d%s" % (count, kind))
            values = struct.unpack("<%d%s" % (count, kind), data[at : at + size])
            at += size
            return values

        def text():
            nonlocal at
            (length,) = take(1, "H")
            at += length
            return data[at - length : at].decode()

        sources = [(text(), text()) for _ in range(take(1, "H")[0])]
        (count,) = take(1, "H")
        births, places = take(count, "H"), take(count, "H")
        columns = [take(count, "I") for _ in range(5)]
        frames = []
        for birth, place, (pack, number, now_pack, offset, length) in zip(births, places, zip(*columns)):
            backup, frame_keyset = sources[birth]
            frames.append((frame_keyset, (backup, pack, number), (sources[place][0], now_pack), offset, length))
        (count,) = take(1, "H")
        return frames, list(zip(take(count, "H"), take(count, "B")))

    def write(self, line, path):
        """Writes one file; pages of zeros stay holes."""
        with open(path, "wb", opener=lambda name, flags: os.open(name, flags | os.O_EXCL, 0o600)) as file:
            self.append(line, file)
        os.chmod(path, line["mode"] & 0o7777)

    def append(self, line, file):
        """Writes the pages of one file behind what is there."""
        block, start = 0, file.tell()
        file.truncate(start + line["size"])
        for use in line["chunks"]:
            frames, entries = self.chunk(tuple(use))
            for frame, slot in entries[use[7] : use[7] + use[8]]:
                if frame != ZERO_PAGE:
                    page = self.frame("frame", *frames[frame])[slot * PAGE : (slot + 1) * PAGE]
                    if len(page) != PAGE:
                        raise Damaged("a frame of %s is too short" % line["path"])
                    file.seek(start + block * PAGE)
                    file.write(page[: line["size"] - block * PAGE])
                block += 1
        if block != (line["size"] + PAGE - 1) // PAGE:
            raise Damaged("the manifest maps %d pages of %s" % (block, line["path"]))
        file.seek(start + line["size"])


def place(directory, path):
    if path.startswith("/") or any(part in ("", ".", "..") for part in path.split("/")):
        raise Damaged("the manifest names a path outside of the data directory: %s" % path)
    return os.path.join(directory, path)


def write_backup(region, lines, directory, tablespaces):
    by_kind = {kind: [line for line in lines if line["line"] == kind] for kind in {line["line"] for line in lines}}
    os.makedirs(os.path.join(directory, "pg_tblspc"), mode=0o700)
    os.chmod(directory, 0o700)
    for line in by_kind.get("tablespace", []):
        location = tablespaces.get(line["location"], line["location"])
        os.makedirs(location, mode=0o700, exist_ok=True)
        if os.listdir(location):
            sys.exit("tablespace directory %s is not empty; --tablespace %s=NEW" % (location, line["location"]))
        os.symlink(os.path.abspath(location), os.path.join(directory, "pg_tblspc", str(line["oid"])))
    for line in sorted(by_kind.get("directory", []), key=lambda line: line["path"]):
        os.makedirs(place(directory, line["path"]), mode=line["mode"] & 0o7777, exist_ok=True)
    pages = Pages(region, lines[0]["sources"])
    # A server cannot start without pg_control: written last, half a restore never starts.
    files = sorted(by_kind.get("file", []), key=lambda line: (line["path"] == CONTROL, line["chunks"][:1]))
    for number, line in enumerate(files):
        if line["path"] == CONTROL:
            small_files(by_kind.get("small", []), directory)
        if number % 500 == 0:
            say("file %d of %d" % (number, len(files)))
        pages.write(line, place(directory, line["path"]))
    for line in by_kind.get("document", []):
        with open(os.path.join(directory, "drctl-%s.json" % re.sub(r"\W", "-", line["name"])), "w") as file:
            json.dump(line["content"], file, indent=1)


def write_streams(region, lines, directory):
    """The streams of a dump or of files, each as one file; returns what stock tools do with them."""
    documents = {line["name"]: line["content"] for line in lines if line["line"] == "document"}
    files = {line["path"]: line for line in lines if line["line"] == "file"}
    pages, commands = Pages(region, lines[0]["sources"]), []
    os.makedirs(directory, mode=0o700, exist_ok=True)
    for stream in documents["streams"]:
        name = stream["name"]
        path = place(directory, name)
        parts = [files["%s/%06d" % (name, part)] for part in range(stream["parts"])]
        if "/" in name or sum(part["size"] for part in parts) != stream["bytes"]:
            raise Damaged("the manifest does not hold the stream %s" % name)
        say("%s, %d bytes" % (name, stream["bytes"]))
        with open(path + ".unfinished", "xb") as file:
            for part in parts:
                pages.append(part, file)
        os.rename(path + ".unfinished", path)
        if name == "files.tar":
            commands.append("tar --xattrs '--xattrs-include=*' -xpf %s -C DIRECTORY" % path)
        elif name == "globals.sql":
            commands.insert(0, "psql -X -d postgres -f %s" % path)
        else:
            commands.append("pg_restore --exit-on-error --dbname=DATABASE '%s'" % path)
    return commands


def small_files(lines, directory):
    for line in lines:
        # The links above are right for this machine; tablespace_map would have the server put the old ones back.
        if line["path"] != "tablespace_map":
            with open(place(directory, line["path"]), "wb") as file:
                file.write(base64.b64decode(line["base64"]))
                os.fchmod(file.fileno(), line["mode"] & 0o7777)


# ---- WAL -------------------------------------------------------------------------------------------------------------


class Wal:
    """The frames of one branch: headers first, bodies when they are needed."""

    def __init__(self, region, system, branch):
        self.region, self.prefix = region, "wal/%s/%s" % (system, branch)
        self.logical = "%s/%s" % (system, branch)
        self.timeline = int(branch[:8], 16)
        self.runs, self.bundles, self.bundle = [], {}, (None, b"")
        for epoch in region.names(self.prefix):
            self.read_epoch(epoch)

    def read_epoch(self, epoch):
        run, numbers = [], set()
        for name in self.region.names("%s/%s" % (self.prefix, epoch)):
            first, _, last = name.partition("-")
            if not (first + last).isdigit():
                continue
            if last:
                self.bundles.setdefault(epoch, []).append((int(first), int(last)))
            numbers.update(range(int(first), int(last or first) + 1))
        for number in sorted(numbers):
            try:
                header = self.frame(epoch, number)[0]
            except (Damaged, OSError, ValueError, struct.error) as error:
                say("left out: WAL frame %s/%010d: %s" % (epoch, number, error))
                continue
            if header["kind"] != "data":
                continue
            if run and number != run[-1]["place"]["seq"] + 1:
                self.runs.append(run)
                run = []
            run.append(header)
        if run:
            self.runs.append(run)

    def frame(self, epoch, seq):
        """The header and the sealed body; the body's digest stands in the signed header. A frame in a bundle is rather
        taken than a SEAL that has its name."""
        seal = None
        try:
            own = self.check(self.region.read("%s/%s/%010d" % (self.prefix, epoch, seq)), epoch, seq)
            if own[0]["kind"] != "seal":
                return own
            seal = own
        except (Damaged, OSError, ValueError, struct.error):
            if not any(first <= seq <= last for first, last in self.bundles.get(epoch, [])):
                raise
        for first, last in self.bundles.get(epoch, []):
            if first <= seq <= last:
                return self.check(self.bundled(epoch, first, last, seq), epoch, seq)
        return seal

    def bundled(self, epoch, first, last, seq):
        """A frame out of a bundle, which is frames back to back behind the list of their lengths."""
        name = "%s/%s/%010d-%010d" % (self.prefix, epoch, first, last)
        if self.bundle[0] != name:
            self.bundle = (name, self.region.read(name))
        data, count = self.bundle[1], last - first + 1
        lengths = struct.unpack_from("<%dI" % count, data, 12)
        start = 12 + 4 * count + sum(lengths[: seq - first])
        return data[start : start + lengths[seq - first]]

    def check(self, data, epoch, seq):
        (length,) = struct.unpack("<I", data[8:12])
        head, signature, body = data[12 : 12 + length], data[12 + length : 76 + length], data[76 + length :]
        header = json.loads(head)
        logical_id = "%s/%s/%d" % (self.logical, epoch, seq)
        context = "wal %s %s" % (self.region.repository, logical_id)
        self.region.check(header["signer"], "drctl signed bytes 1", context, head, signature)
        if data[:8] != b"DRCTLW1\n" or sha256(body) != header["body_sha256"]:
            raise Damaged("its body is not the one that was signed")
        return header, body, logical_id

    def keysets(self):
        return {(header["target"], header["keyset"]) for run in self.runs for header in run}

    def cover(self, start, end):
        """Frames from `start` to the first hole, or to `end`: (header, from, to). At the end of an epoch the next one
        takes over at the last complete record; behind it stands the torso of a record."""
        ends = {id(run): lsn(run[-1]["span"]["end"]) for run in self.runs}
        starts = {id(run): lsn(run[0]["span"]["start"]) for run in self.runs}
        chosen = []
        while True:
            runs = [run for run in self.runs if starts[id(run)] <= start < ends[id(run)]]
            if not runs:
                return chosen
            run = max(runs, key=lambda run: ends[id(run)])
            until, last = ends[id(run)], run[-1]["span"]["last_record_end"]
            further = [other for other in self.runs if ends[id(other)] > until]
            safe = lsn(last) if last and lsn(last) > start else until
            seams = [seam for seam in (safe, until) if any(starts[id(other)] <= seam for other in further)]
            stop = min([seams[0] if seams else until] + ([end] if end else []))
            chosen += [(header, max(start, lsn(header["span"]["start"])), min(stop, lsn(header["span"]["end"])))
                       for header in run if lsn(header["span"]["start"]) < stop and lsn(header["span"]["end"]) > start]
            if not seams or stop == end:
                return chosen
            start = stop

    def segment(self, directory, number, size):
        per_id = (1 << 32) // size
        return os.path.join(directory, "%08X%08X%08X" % (self.timeline, number // per_id, number % per_id))

    def write(self, directory, start, end):
        """Writes segments as PostgreSQL names them; what is not known of the last one stays zero."""
        position = start
        for header, first, stop in self.cover(start, end):
            sealed = self.frame(header["place"]["epoch"], header["place"]["seq"])
            begin = lsn(header["span"]["start"])
            data = self.region.open(header["keyset"], "data", "wal", sealed[2], sealed[1])[first - begin : stop - begin]
            size = header["wal_segment_size"]
            while data:
                number, offset = divmod(first, size)
                piece, data = data[: size - offset], data[size - offset :]
                path = self.segment(directory, number, size)
                with open(path, "r+b" if os.path.exists(path) else "wb") as file:
                    file.truncate(size)
                    file.seek(offset)
                    file.write(piece)
                first += len(piece)
            position = stop
        beyond = [lsn(run[0]["span"]["start"]) for run in self.runs if lsn(run[0]["span"]["start"]) > position]
        if beyond and position != end:
            say("GAP: WAL of timeline %d from %s to %s is not here" % (self.timeline, show_lsn(position), show_lsn(min(beyond))))
        return position


def timelines(region, wal):
    """The backup's branch and the ones after it, as (branch, its switch to the next): along the newest timeline."""
    own = "%08x-%s" % (wal["timeline"], wal["branch"])
    for name in reversed(region.names("history/%s" % wal["system_id"])):
        text = region.read("history/%s/%s" % (wal["system_id"], name))
        if sha256(text)[:8] != name[9:] and "-" in name:
            say("left out: timeline history %s" % name)
            continue
        rows = [line.split() for line in text.decode().splitlines() if line.strip() and not line.startswith("#")]
        switches = [(int(row[0]), lsn(row[1])) for row in rows]
        after = [switch for switch in switches if switch[0] >= wal["timeline"]]
        if after and after[0][0] == wal["timeline"] and after[0][1] >= lsn(wal["stop_lsn"]):
            known = region.names("wal/%s" % wal["system_id"]) + region.names("history/%s" % wal["system_id"])
            between = [(next(b for b in known if b.startswith("%08x-" % number)), at) for number, at in after[1:]]
            return [(own, after[0][1])] + between + [(name, None)]
    return [(own, None)]


def write_wal(region, branches, wal, directory):
    os.mkdir(directory, mode=0o700)
    size = wal["wal_segment_size"]
    start, position = lsn(wal["start_lsn"]) // size * size, 0
    for (branch, switch), following in zip(branches, branches[1:] + [None]):
        position = branch.write(directory, start, switch)
        if following is None or position < switch:
            break
        number, offset = divmod(switch, size)
        if offset:
            # The segment in which a timeline begins holds its parent's bytes up to there.
            with open(branch.segment(directory, number, size), "rb") as parent:
                with open(following[0].segment(directory, number, size), "wb") as child:
                    child.write(parent.read(offset))
        start = switch
    if position < lsn(wal["stop_lsn"]):
        sys.exit("the WAL ends at %s, before the backup is consistent at %s" % (show_lsn(position), wal["stop_lsn"]))
    for name in region.names("history/%s" % wal["system_id"]):
        with open(os.path.join(directory, "%08X.history" % int(name[:8], 16)), "wb") as file:
            file.write(region.read("history/%s/%s" % (wal["system_id"], name)))
    return position


NEXT = """
Restored {id} into {dir}. WAL up to {end} is in {dir}/drctl-wal.
If {dir}/postgresql.conf is missing, the server kept it elsewhere: {dir}/drctl-*.json has its text.

To start PostgreSQL {major} on it, as the user that owns {dir}:
  cat >> {dir}/postgresql.auto.conf <<END
  restore_command = 'cp "{dir}/drctl-wal/%f" "%p"'
  recovery_target_timeline = 'latest'
  archive_mode = off
  END
  touch {dir}/recovery.signal
  pg_ctl -D {dir} start"""


def main():
    parser = argparse.ArgumentParser(usage=__doc__, add_help=True)
    parser.add_argument("region")
    parser.add_argument("backup", nargs="?")
    parser.add_argument("directory", nargs="?")
    for name in ("--age-identity", "--tablespace", "--trust-signer"):
        parser.add_argument(name, action="append", default=[])
    parser.add_argument("--secrets")
    arguments = parser.parse_args()
    region = Region(arguments.region, arguments)
    backups = commits(region)
    if not arguments.directory:
        for commit in backups:
            print("%(id)s  %(kind)s  finished %(finished_at)s  %(size_bytes)d bytes" % commit)
        return
    wanted = [c for c in backups if c["id"].startswith(arguments.backup) or c["target"] == arguments.backup]
    if not wanted:
        sys.exit("there is no backup %s" % arguments.backup)
    commit, directory = wanted[-1], os.path.abspath(arguments.directory)
    if os.path.isdir(directory) and os.listdir(directory):
        sys.exit("%s is not empty" % directory)
    wal = commit["wal"]
    if wal is None:
        keys = [line["key"].split("/") for line in inventory(region, commit) if line["key"].startswith("keysets/")]
        region.open_keysets({(key[1], key[2]) for key in keys} | {(commit["target"], commit["keyset"])})
        commands = write_streams(region, manifest(region, commit), directory)
        if not region.trusted:
            say("signed by %s: compare with what `drctl init` printed" % ", ".join(sorted(region.seen_signers)))
        print("Wrote %s into %s. To go on:" % (commit["id"], directory))
        print("\n".join("  " + command for command in commands))
        return
    branches = [(Wal(region, wal["system_id"], name), switch) for name, switch in timelines(region, wal)]
    keys = [line["key"].split("/") for line in inventory(region, commit) if line["key"].startswith("keysets/")]
    keysets = {(key[1], key[2]) for key in keys} | {(commit["target"], commit["keyset"])}
    region.open_keysets(keysets.union(*(branch.keysets() for branch, _ in branches)))
    write_backup(region, manifest(region, commit), directory, dict(pair.split("=", 1) for pair in arguments.tablespace))
    end = write_wal(region, branches, wal, os.path.join(directory, "drctl-wal"))
    if not region.trusted:
        say("signed by %s: compare with what `drctl init` printed" % ", ".join(sorted(region.seen_signers)))
    print(NEXT.format(id=commit["id"], dir=directory, end=show_lsn(end), major=wal["server_version"] // 10000))


if __name__ == "__main__":
    try:
        main()
    except (Damaged, OSError) as problem:
        sys.exit("drctl_open.py: %s" % problem)
