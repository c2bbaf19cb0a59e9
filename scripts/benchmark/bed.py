"""The S3 servers: one RGW per region on loopback, all behind one TLS proxy that counts requests."""

import csv
import datetime
import hashlib
import hmac
import random
import shutil
import socket
import subprocess
import sys
import time
import urllib.parse
import xml.etree.ElementTree as xml

from .run import ROOT, run, say

ACCESS, SECRET, REGION = "AKTEST", "SKTESTSECRET", "us-east-1"
PROXY = """
global
  stats socket {directory}/stats
  nbthread 1
  maxconn 512
  tune.bufsize 65536
defaults
  mode http
  timeout connect 5s
  timeout client 120s
  timeout server 120s
"""
SIDE = """
frontend {name}
  bind 127.0.0.1:{port} ssl crt {directory}/server.pem
  default_backend rgw-{name}
backend rgw-{name}
  server rgw 127.0.0.1:{rgw}
"""


def free_port():
    """The first of three in a row that nobody listens on, below the range of outgoing connections."""
    while True:
        port = 20000 + random.randrange(1200) * 10
        try:
            for offset in range(3):
                with socket.create_server(("127.0.0.1", port + offset)):
                    pass
            return port
        except OSError:
            continue


class Bed:
    """Two regions, `a` and `b`, both up from the beginning to the end."""

    def __init__(self, scratch):
        self.directory, self.processes, self.count = scratch / "bed", [], 0
        self.directory.mkdir()
        self.rgw = {name: free_port() for name in "ab"}
        self.port = {name: free_port() for name in "ab"}
        try:
            self.start()
        except BaseException:
            self.close()
            raise

    def start(self):
        say("starting two S3 servers behind TLS")
        starting = [subprocess.Popen([ROOT / "scripts/rgw", "up", self.directory / name, str(port)],
                                     stdout=subprocess.DEVNULL) for name, port in self.rgw.items()]
        self.certificates()
        text = PROXY.format(directory=self.directory)
        for name in "ab":
            text += SIDE.format(name=name, directory=self.directory, port=self.port[name], rgw=self.rgw[name])
        (self.directory / "haproxy.cfg").write_text(text, encoding="utf-8")
        if any([process.wait() for process in starting]):
            sys.exit("scripts/bench: an S3 server does not start")
        self.spawn(["haproxy", "-f", self.directory / "haproxy.cfg"])
        await_port(self.port["b"])

    def spawn(self, command):
        process = subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self.processes.append(process)
        return process

    def certificates(self):
        at = self.directory
        run(["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=bench CA",
             "-keyout", at / "ca.key", "-out", at / "ca.pem"])
        run(["openssl", "req", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost",
             "-keyout", at / "server.key", "-out", at / "server.csr"])
        (at / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\n", encoding="ascii")
        run(["openssl", "x509", "-req", "-days", "2", "-in", at / "server.csr", "-CA", at / "ca.pem", "-CAkey",
             at / "ca.key", "-CAcreateserial", "-extfile", at / "names", "-out", at / "server.crt"])
        both = (at / "server.crt").read_text() + (at / "server.key").read_text()
        (at / "server.pem").write_text(both, encoding="ascii")

    @property
    def ca(self):
        return self.directory / "ca.pem"

    def credentials(self):
        return {"AWS_ACCESS_KEY_ID": ACCESS, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_REGION": REGION,
                "AWS_EC2_METADATA_DISABLED": "true", "SSL_CERT_FILE": self.ca}

    def endpoint(self, side):
        return f"https://localhost:{self.port[side]}"

    def delayed(self, side, milliseconds):
        """Another port of the same server; every request through it takes that much longer."""
        port = free_port()
        script = ROOT / "scripts/benchmark/delay.py"
        self.spawn([sys.executable, script, port, self.port[side], milliseconds])
        await_port(port)
        return f"https://localhost:{port}"

    def bucket(self, side):
        """A new, empty bucket."""
        self.count += 1
        name = f"bench-{self.count}"
        self.curl(side, "-X", "PUT", method="PUT", path=name)
        return name

    def curl(self, side, *options, method="GET", path, query=None):
        return run(["curl", "-sS", "--fail", "--cacert", self.ca, *options, self.url(side, method, path, query)])

    def url(self, side, method, path, query=None):
        """An address that carries its own signature (AWS signature version 4, in the query)."""
        now = datetime.datetime.now(datetime.timezone.utc)
        scope = [now.strftime("%Y%m%d"), REGION, "s3", "aws4_request"]
        host = f"localhost:{self.port[side]}"
        fields = (query or {}) | {
            "X-Amz-Algorithm": "AWS4-HMAC-SHA256", "X-Amz-Credential": "/".join([ACCESS, *scope]),
            "X-Amz-Date": now.strftime("%Y%m%dT%H%M%SZ"), "X-Amz-Expires": "86400", "X-Amz-SignedHeaders": "host"}
        text = "&".join(f"{quote(name)}={quote(value)}" for name, value in sorted(fields.items()))
        canonical = f"{method}\n/{path}\n{text}\nhost:{host}\n\nhost\nUNSIGNED-PAYLOAD"
        digest = hashlib.sha256(canonical.encode()).hexdigest()
        words = "\n".join(["AWS4-HMAC-SHA256", fields["X-Amz-Date"], "/".join(scope), digest])
        key = f"AWS4{SECRET}".encode()
        for part in [*scope, words]:
            key = hmac.new(key, part.encode(), hashlib.sha256).digest()
        return f"https://{host}/{path}?{text}&X-Amz-Signature={key.hex()}"

    def stored(self, side, bucket):
        """Bytes of all objects in a bucket."""
        total, after = 0, {}
        while True:
            page = xml.fromstring(self.curl(side, path=bucket, query={"list-type": "2", **after}))
            space = page.tag.removesuffix("ListBucketResult")
            total += sum(int(size.text) for size in page.iter(f"{space}Size"))
            keys = [key.text for key in page.iter(f"{space}Key")]
            if page.findtext(f"{space}IsTruncated") != "true" or not keys:
                return total
            after = {"start-after": keys[-1]}

    def requests(self):
        """Requests that the proxy has taken so far, all regions together."""
        with socket.socket(socket.AF_UNIX) as stats:
            stats.connect(str(self.directory / "stats"))
            stats.sendall(b"show stat\n")
            text = b"".join(iter(lambda: stats.recv(65536), b"")).decode()
        rows = csv.DictReader(text.removeprefix("# ").splitlines())
        return sum(int(row["req_tot"]) for row in rows if row["svname"] == "FRONTEND")

    def close(self):
        for process in self.processes:
            process.kill()
            process.wait()
        for name in "ab":
            subprocess.run([ROOT / "scripts/rgw", "down", self.directory / name], check=False)
        shutil.rmtree(self.directory, ignore_errors=True)


def quote(text):
    return urllib.parse.quote(text, safe="-_.~")


def await_port(port):
    deadline = time.monotonic() + 20
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                sys.exit(f"scripts/bench: nothing listens on port {port}")
            time.sleep(0.05)
