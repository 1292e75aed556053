#!/usr/bin/env python3
"""Writes vectors.json: session keys as ksa.Derive must give them.

HKDF-SHA-512 is written out here from RFC 5869 over hashlib and hmac alone and
shares no code with the Go side. Run: python3 vectors.py > vectors.json
"""

import hashlib
import hmac
import json
import struct

LABEL = b"Q-IPsec v1 KSA"


def hkdf(ikm, salt, info, length):
    prk = hmac.new(salt, ikm, hashlib.sha512).digest()
    okm, block, i = b"", b"", 0
    while len(okm) < length:
        i += 1
        block = hmac.new(prk, block + info + bytes([i]), hashlib.sha512).digest()
        okm += block
    return okm[:length]


def field(x):
    return struct.pack(">H", len(x)) + x


def session_key(master_key, key_id, master, slaves, size):
    info = field(key_id) + field(master.encode())
    for s in sorted(s.encode() for s in slaves):
        info += field(s)
    info += field(struct.pack(">I", size))
    return hkdf(master_key, LABEL, info, size // 8)


def main():
    zero, count = bytes(32), bytes(range(32))
    id1 = bytes.fromhex("0123456789ab8def8123456789abcdef")
    id2 = bytes.fromhex("fedcba987654821098765432100fedcb")
    cases = [
        ("defaults", count, id1, "sae-a", ["sae-b"], 256),
        ("other id", count, id2, "sae-a", ["sae-b"], 256),
        ("roles swapped", count, id1, "sae-b", ["sae-a"], 256),
        ("zero master key", zero, id1, "sae-a", ["sae-b"], 256),
        ("smallest", count, id1, "sae-a", ["sae-b"], 64),
        ("one block of SHA-512 and a byte", count, id1, "sae-a", ["sae-b"], 520),
        ("largest", count, id1, "sae-a", ["sae-b"], 4096),
        ("long ids", count, id1, "m" * 64, ["s" * 64], 256),
        ("slaves not in order", count, id1, "sae-a", ["sae-c", "sae-B", "sae-b"], 256),
        ("boundary between ids moved", count, id1, "sae-as", ["ae-b"], 256),
    ]
    out = []
    for name, mk, kid, master, slaves, size in cases:
        out.append({
            "name": name, "master_key": mk.hex(), "key_id": kid.hex(), "master": master,
            "slaves": slaves, "size": size,
            "session_key": session_key(mk, kid, master, slaves, size).hex(),
        })
    print(json.dumps(out, indent=1))


main()
