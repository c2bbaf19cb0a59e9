#!/usr/bin/env python3
"""Opens one FLOE message: what drctl calls a sealed unit.

    floe.py KEY AAD_FILE < sealed > plain

KEY is 64 hex digits, or @FILE for a file that holds them. AAD_FILE holds the associated data, byte for byte and without
a line feed at its end; for drctl it is the five lines "drctl 1", repository, keyset, kind, logical id.

Written from the FLOE specification (c2sp.org/FLOE) and independent of drctl's own code. It needs Python 3.8 and the
package "cryptography", nothing else. Plain bytes are written only after the whole message has authenticated.
"""

import hmac
import struct
import sys

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

KEY_LEN = 32
IV_LEN = 32
TAG_LEN = 32
PARAMETERS = struct.Struct(">BBII")  # AEAD, KDF, segment length, IV length
HEADER_LEN = PARAMETERS.size + IV_LEN + TAG_LEN

PREFIX_LEN = 4
NONCE_LEN = 12
SEGMENT_OVERHEAD = PREFIX_LEN + NONCE_LEN + 16
NOT_FINAL = 0xFFFFFFFF

ROTATION_BITS = 20
MAX_SEGMENTS = 1 << 40


class DoesNotAuthenticate(Exception):
    """The message is not what was sealed under this key and this associated data."""


def open_message(key: bytes, aad: bytes, message: bytes) -> bytes:
    """The plain bytes of exactly one message, or DoesNotAuthenticate."""
    if len(key) != KEY_LEN:
        raise ValueError("a FLOE key has 32 bytes")
    if len(message) < HEADER_LEN:
        raise DoesNotAuthenticate("shorter than a header")
    parameters = message[: PARAMETERS.size]
    aead, kdf, segment_len, iv_len = PARAMETERS.unpack(parameters)
    # AES-256-GCM and HKDF-Expand-SHA-384 are the only algorithms that FLOE has.
    if (aead, kdf, iv_len) != (0, 0, IV_LEN) or segment_len <= SEGMENT_OVERHEAD or segment_len == NOT_FINAL:
        raise DoesNotAuthenticate("unknown parameters")
    iv = message[PARAMETERS.size : PARAMETERS.size + IV_LEN]
    tag = message[PARAMETERS.size + IV_LEN : HEADER_LEN]

    def derive(secret: bytes, purpose: bytes, length: int) -> bytes:
        info = parameters + iv + purpose + aad
        return HKDFExpand(algorithm=SHA384(), length=length, info=info).derive(secret)

    if not hmac.compare_digest(derive(key, b"HEADER_TAG:", TAG_LEN), tag):
        raise DoesNotAuthenticate("wrong key, wrong associated data or a damaged header")
    message_key = derive(key, b"MESSAGE_KEY:", 48)

    plain = []
    for position, final, segment in segments(memoryview(message)[HEADER_LEN:], segment_len):
        if position % (1 << ROTATION_BITS) == 0:
            aes = AESGCM(derive(message_key, b"DEK:" + struct.pack(">Q", position), 32))
        nonce = bytes(segment[PREFIX_LEN : PREFIX_LEN + NONCE_LEN])
        sealed = bytes(segment[PREFIX_LEN + NONCE_LEN :])
        try:
            plain.append(aes.decrypt(nonce, sealed, struct.pack(">QB", position, final)))
        except InvalidTag:
            raise DoesNotAuthenticate("segment %d" % position) from None
    return b"".join(plain)


def segments(body, segment_len):
    """Yields (position, is final, bytes); the final segment must end the body."""
    position = 0
    while True:
        if len(body) < SEGMENT_OVERHEAD or position >= MAX_SEGMENTS:
            raise DoesNotAuthenticate("cut short")
        (named,) = struct.unpack(">I", body[:PREFIX_LEN])
        if named != NOT_FINAL:
            if named != len(body) or named > segment_len:
                raise DoesNotAuthenticate("the last segment has a wrong length")
            yield position, 1, body
            return
        if len(body) < segment_len:
            raise DoesNotAuthenticate("cut short")
        yield position, 0, body[:segment_len]
        body = body[segment_len:]
        position += 1


def main(arguments) -> int:
    if len(arguments) != 2:
        sys.stderr.write(__doc__)
        return 2
    key, aad_file = arguments
    try:
        if key.startswith("@"):
            with open(key[1:], encoding="ascii") as file:
                key = file.read().strip()
        with open(aad_file, "rb") as file:
            aad = file.read()
        plain = open_message(bytes.fromhex(key), aad, sys.stdin.buffer.read())
    except (DoesNotAuthenticate, ValueError, OSError) as error:
        sys.stderr.write("floe.py: %s: %s\n" % (type(error).__name__, error))
        return 1
    sys.stdout.buffer.write(plain)
    sys.stdout.buffer.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
