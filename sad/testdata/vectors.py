#!/usr/bin/env python3
"""Test vectors of docs/key-schedule.md, written from that document with nothing
but hashlib and hmac, so that they do not share a line with the Go code.

usage: python3 vectors.py > schedule.json
"""
import hashlib
import hmac
import json
import struct


def extract(salt, ikm):
    return hmac.new(salt, ikm, hashlib.sha512).digest()


def expand(prk, info, length):
    out, block, counter = b"", b"", 1
    while len(out) < length:
        block = hmac.new(prk, block + info + bytes([counter]), hashlib.sha512).digest()
        out += block
        counter += 1
    return out[:length]


def F(*parts):
    return b"".join(struct.pack(">H", len(p)) + p for p in parts)


def u8(n):
    return struct.pack(">B", n)


def u16(n):
    return struct.pack(">H", n)


def u32(n):
    return struct.pack(">I", n)


def pattern(seed, n):
    """n bytes that look random and are the same everywhere."""
    out = b""
    i = 0
    while len(out) < n:
        out += hashlib.sha256(b"q-ipsec test vector %s %d" % (seed.encode(), i)).digest()
        i += 1
    return out[:n]


ENCR = [(20, b, b // 8 + 4) for b in (128, 192, 256)] + [(28, 0, 36)] + [(12, b, b // 8) for b in (128, 192, 256)]
INTEG = {0: 0, 12: 32, 13: 48, 14: 64}
MIX = {"classical": 0, "hybrid": 1, "qkd": 2}
CLASS = {"": 0, "derived": 1, "relayed": 2, "direct": 3}
MODE = {"transport": 1, "tunnel": 2}


def vector(mix, key_class, encr, bits, enc_len, integ, esn, mode, exchange, id_i, id_r):
    name = f"{mix}-{encr}-{bits}-{integ}-esn{int(esn)}-{mode}-{exchange}"
    k = b"" if mix == "classical" else pattern(name + " K", 32)
    key_id = bytes(16) if mix == "classical" else pattern(name + " Key-ID", 16)
    int_len = INTEG[integ]
    chunks = [pattern(name + f" keymat {i}", n) for i, n in enumerate((enc_len, int_len, enc_len, int_len))]
    spi_i, spi_r = pattern(name + " SPIi", 8), pattern(name + " SPIr", 8)
    ni = pattern(name + " Ni", 32) + (b"Q-IPsec\x01" + key_id if mix != "classical" else b"")
    nr = pattern(name + " Nr", 32)
    spis = [struct.unpack(">I", pattern(name + " SPI 0", 4))[0] | 0x100, struct.unpack(">I", pattern(name + " SPI 1", 4))[0] | 0x100]

    v = {
        "name": name, "mix": mix, "class": key_class, "k": k.hex(), "key_id": key_id.hex(),
        "spi_i": spi_i.hex(), "spi_r": spi_r.hex(),
        "id_i": {"type": id_i[0], "data": id_i[1].hex()}, "id_r": {"type": id_r[0], "data": id_r[1].hex()},
        "exchange": exchange, "ni": ni.hex(), "nr": nr.hex(),
        "encr": encr, "encr_bits": bits, "integ": integ, "esn": esn, "mode": mode,
        "keymat": [c.hex() for c in chunks],
    }
    ctx = hashlib.sha512(F(
        b"Q-IPsec v1 ctx", u8(MIX[mix]), u8(CLASS[key_class]), key_id, spi_i, spi_r,
        u8(id_i[0]) + id_i[1], u8(id_r[0]) + id_r[1], u8(exchange), ni, nr,
        u8(3) + u16(encr) + u16(bits) + u16(integ) + u8(int(esn)))).digest()
    v["ctx"] = ctx.hex()
    ikm = b"" if mix == "qkd" else b"".join(chunks)
    if mix != "classical":
        kx = extract(b"Q-IPsec v1 session", k)
        ci_key = expand(kx, F(b"confirm i"), 64)
        v["confirm_i"] = hmac.new(ci_key, F(key_id, spi_i, spi_r, ni, u8(id_i[0]) + id_i[1], u8(exchange)), hashlib.sha512).digest()[:32].hex()
        ikm += expand(kx, F(b"mix"), 64)
    prk = extract(ctx, ikm)
    if mix != "classical":
        cr_key = expand(prk, F(b"confirm r"), 64)
        v["confirm_r"] = hmac.new(cr_key, F(ctx), hashlib.sha512).digest()[:32].hex()
    v["sa"] = []
    for direction, spi in enumerate(spis):
        info = F(b"esp", u8(direction), u8(50), u32(spi), u16(encr), u16(bits), u16(integ), u8(int(esn)), u8(MODE[mode]))
        out = expand(prk, info, enc_len + int_len)
        fingerprint = hmac.new(out, b"Q-IPsec v1 fingerprint", hashlib.sha256).hexdigest()[:16]
        v["sa"].append({"direction": direction, "spi": spi, "enc": out[:enc_len].hex(), "integ": out[enc_len:].hex(), "fingerprint": fingerprint})
    return v


def main():
    fqdn = (2, b"gw-a"), (2, b"gw-b")
    address = (1, bytes([192, 0, 2, 1])), (5, bytes.fromhex("20010db8000000000000000000000002"))
    out = []
    for mix, key_class in (("hybrid", "direct"), ("qkd", "direct"), ("hybrid", "relayed"), ("classical", "")):
        for encr, bits, enc_len in ENCR:
            for integ in (12, 13, 14) if encr == 12 else (0,):
                for exchange, ids, esn, mode in ((35, fqdn, False, "tunnel"), (36, address, True, "transport")):
                    if key_class == "relayed" and bits != 256:
                        continue
                    out.append(vector(mix, key_class, encr, bits, enc_len, integ, esn, mode, exchange, *ids))
    for v in out:
        if v["class"] == "relayed":
            v["name"] += "-relayed"
    print(json.dumps(out, indent=1))


main()
