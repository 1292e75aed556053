#!/usr/bin/env python3
"""XFRM requests as a little-endian kernel takes them, packed by hand from the
structures of <linux/xfrm.h>, to compare the Go encoder with byte for byte.

usage: python3 messages.py > messages.json
"""
import ipaddress
import json
import struct

NEWSA, DELSA, GETSA, NEWPOLICY, UPDSA, GETAE = 0x10, 0x11, 0x12, 0x13, 0x1A, 0x1F
REQUEST, ACK = 1, 4
INF = (1 << 64) - 1
ALG_CRYPT, ENCAP, ALG_AEAD, ALG_AUTH_TRUNC, MARK, TFCPAD, ESN_VAL, EXTRA_FLAGS = 2, 4, 18, 20, 21, 22, 23, 24
SET_MARK, SET_MARK_MASK, IF_ID = 29, 30, 31
SEQ, PID = 0x01020304, 0x0A0B0C0D


def pad(b, n=4):
    return b + bytes(-len(b) % n)


def attr(kind, payload):
    return pad(struct.pack("<HH", 4 + len(payload), kind) + payload)


def message(kind, body):
    return struct.pack("<IHHII", 16 + len(body), kind, REQUEST | ACK, SEQ, PID) + body


def addr(a):
    return ipaddress.ip_address(a).packed.ljust(16, b"\0")


def fam(a):
    return 2 if ipaddress.ip_address(a).version == 4 else 10


def selector(src=None, dst=None, proto=0, sport=0, dport=0):
    if src is None:
        return bytes(56)
    s, d = ipaddress.ip_network(src), ipaddress.ip_network(dst)
    return (addr(d.network_address) + addr(s.network_address)
            + struct.pack(">HHHH", dport, 0xFFFF if dport else 0, sport, 0xFFFF if sport else 0)
            + struct.pack("<HBBB3xiI", 2 if d.version == 4 else 10, d.prefixlen, s.prefixlen, proto, 0, 0))


def limits(l):
    inf = lambda v: v or INF
    return struct.pack("<8Q", inf(l.get("BytesRekey", 0)), inf(l.get("BytesLife", 0)), inf(l.get("PacketsRekey", 0)),
                       inf(l.get("PacketsLife", 0)), l.get("TimeRekey", 0), l.get("TimeLife", 0), 0, 0)


def usersa_info(sa, flags, window):
    mode = 1 if sa["Mode"] == 2 else 0
    sel = selector() if mode else selector(sa["SrcTS"], sa["DstTS"])
    out = (sel + addr(sa["Dst"]) + struct.pack(">IB3x", sa["SPI"], 50) + addr(sa["Src"]) + limits(sa.get("Lifetime", {}))
           + bytes(32) + bytes(12) + struct.pack("<IIHBBB7x", 0, sa["ReqID"], fam(sa["Dst"]), mode, window, flags))
    assert len(out) == 224
    return out


AEAD = {20: b"rfc4106(gcm(aes))", 28: b"rfc7539esp(chacha20,poly1305)"}
AUTH = {12: (b"hmac(sha256)", 128), 13: (b"hmac(sha384)", 192), 14: (b"hmac(sha512)", 256)}


def add(kind, sa, enc, integ):
    inbound, esn = sa.get("Inbound", False), sa.get("ESN", False)
    window = sa.get("Window", 0) if inbound else (1 if esn else 0)
    flags = extra = 0
    flags |= 0 if sa.get("CopyDF") else 4
    flags |= 0 if sa.get("CopyECN") else 1
    flags |= 2 if inbound and sa.get("CopyDSCP", 0) in (1, 2) else 0
    extra |= 1 if not inbound and sa.get("CopyDSCP", 0) in (1, 3) else 0
    flags |= 32 if sa["Mode"] == 2 else 0
    flags |= 128 if esn else 0
    long = esn or window > 32
    out = usersa_info(sa, flags, 0 if long else window)
    if extra:
        out += attr(EXTRA_FLAGS, struct.pack("<I", extra))
    encr = sa["Suite"]["Encr"]
    if encr in AEAD:
        out += attr(ALG_AEAD, AEAD[encr].ljust(64, b"\0") + struct.pack("<II", len(enc) * 8, 128) + enc)
    else:
        out += attr(ALG_CRYPT, b"cbc(aes)".ljust(64, b"\0") + struct.pack("<I", len(enc) * 8) + enc)
        name, trunc = AUTH[sa["Suite"]["Integ"]]
        out += attr(ALG_AUTH_TRUNC, name.ljust(64, b"\0") + struct.pack("<II", len(integ) * 8, trunc) + integ)
    if sa.get("Encap"):
        out += attr(ENCAP, struct.pack("<H", 2) + struct.pack(">HH", sa["SrcPort"], sa["DstPort"]) + bytes(2 + 16))
    if "Mark" in sa:
        out += attr(MARK, struct.pack("<II", *sa["Mark"]))
    if "IfID" in sa:
        out += attr(IF_ID, struct.pack("<I", sa["IfID"]))
    if "SetMark" in sa:
        out += attr(SET_MARK, struct.pack("<I", sa["SetMark"][0])) + attr(SET_MARK_MASK, struct.pack("<I", sa["SetMark"][1]))
    if sa.get("TFC") and sa["Mode"] == 2:
        out += attr(TFCPAD, struct.pack("<I", sa["TFC"]))
    if long:
        words = (window + 31) // 32
        out += attr(ESN_VAL, struct.pack("<6I", words, 0, 0, 0, 0, window) + bytes(4 * words))
    return message(kind, out)


def named(kind, sa):
    out = addr(sa["Dst"]) + struct.pack(">I", sa["SPI"]) + struct.pack("<HBx", fam(sa["Dst"]), 50)
    if kind == GETAE:
        out += addr(sa["Src"]) + bytes(8)
    if "Mark" in sa:
        out += attr(MARK, struct.pack("<II", *sa["Mark"]))
    if "IfID" in sa and kind != GETAE:
        out += attr(IF_ID, struct.pack("<I", sa["IfID"]))
    return message(kind, out)


def policy(p):
    out = (selector(p["Src"], p["Dst"], p.get("Protocol", 0), p.get("SrcPort", 0), p.get("DstPort", 0)) + limits({}) + bytes(32)
           + struct.pack("<IIBBBB4x", p["Priority"], 0, p["Dir"], 1 if p.get("Block") else 0, 0, 0))
    assert len(out) == 168
    return message(NEWPOLICY, out)


def key(seed, n):
    return bytes((seed + i * 7) & 0xFF for i in range(n))


BASE = {"Src": "192.0.2.1", "Dst": "192.0.2.2", "SPI": 0xC1020304, "ReqID": 5, "Mode": 2, "Inbound": True, "Window": 32,
        "Suite": {"Encr": 20, "EncrBits": 256}}
V6 = {"Src": "2001:db8::1", "Dst": "2001:db8::2"}
CASES = [
    ("gcm256 inbound", {}), ("gcm256 outbound", {"Inbound": False}), ("gcm128", {"Suite": {"Encr": 20, "EncrBits": 128}}),
    ("gcm192", {"Suite": {"Encr": 20, "EncrBits": 192}}), ("chacha", {"Suite": {"Encr": 28}}),
    ("cbc256 sha256", {"Suite": {"Encr": 12, "EncrBits": 256, "Integ": 12}}), ("cbc192 sha384", {"Suite": {"Encr": 12, "EncrBits": 192, "Integ": 13}}),
    ("cbc128 sha512", {"Suite": {"Encr": 12, "EncrBits": 128, "Integ": 14}}),
    ("esn inbound", {"ESN": True, "Window": 64}), ("esn outbound", {"ESN": True, "Inbound": False, "Window": 64}),
    ("esn inbound 33", {"ESN": True, "Window": 33}), ("window 64", {"Window": 64}), ("window 64 outbound", {"Window": 64, "Inbound": False}),
    ("window 4096", {"Window": 4096}), ("window 0", {"Window": 0}), ("ipv6", V6),
    ("transport", {"Mode": 1, "SrcTS": "192.0.2.1/32", "DstTS": "192.0.2.0/24"}),
    ("transport ipv6", {**V6, "Mode": 1, "SrcTS": "2001:db8::1/128", "DstTS": "2001:db8::2/128", "TFC": 1400}),
    ("encap", {"Encap": True, "SrcPort": 4500, "DstPort": 20000}),
    ("copy all", {"CopyDF": True, "CopyECN": True, "CopyDSCP": 2}), ("copy dscp out only, inbound", {"CopyDSCP": 0}),
    ("copy dscp in only, outbound", {"CopyDSCP": 1, "Inbound": False}), ("copy dscp no, outbound", {"CopyDSCP": 3, "Inbound": False}),
    ("marks, if_id, tfc", {"Mark": [0x10, 0xFF], "SetMark": [0x20, 0xFFFF0000], "IfID": 42, "TFC": 1400}),
    ("lifetimes", {"Lifetime": {"TimeLife": 3960, "TimeRekey": 3300, "BytesLife": 1 << 40, "BytesRekey": 1 << 39, "PacketsLife": 9, "PacketsRekey": 8}}),
]
KEYS = {(20, 128): 20, (20, 192): 28, (20, 256): 36, (28, 0): 36, (12, 128): 16, (12, 192): 24, (12, 256): 32}
INTEG = {0: 0, 12: 32, 13: 48, 14: 64}
POLICIES = [
    {"Dir": 1, "Src": "0.0.0.0/1", "Dst": "10.2.0.0/16", "Block": True, "Priority": 0x51495053},
    {"Dir": 2, "Src": "2001:db8:2::/48", "Dst": "8000::/1", "Block": True, "Priority": 0x51495053},
    {"Dir": 0, "Src": "10.2.0.1/32", "Dst": "128.0.0.0/1", "Protocol": 6, "SrcPort": 8443, "DstPort": 0, "Priority": 0x51495052},
    {"Dir": 1, "Src": "::/1", "Dst": "2001:db8:2::/48", "Protocol": 58, "SrcPort": 135, "Priority": 0x51495052},
]


def main():
    out = []
    for name, change in CASES:
        sa = {**BASE, **change}
        suite = sa["Suite"]
        enc = key(1, KEYS[suite["Encr"], suite.get("EncrBits", 0)])
        integ = key(99, INTEG[suite.get("Integ", 0)])
        out.append({"name": name, "sa": sa, "enc": enc.hex(), "integ": integ.hex(), "add": add(NEWSA, sa, enc, integ).hex(),
                    "update": add(UPDSA, sa, enc, integ).hex(), "delete": named(DELSA, sa).hex(), "get": named(GETSA, sa).hex(),
                    "getae": named(GETAE, sa).hex()})
    print(json.dumps({"sas": out, "policies": [{"policy": p, "add": policy(p).hex()} for p in POLICIES]}, indent=1))


main()
