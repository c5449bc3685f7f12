#!/usr/bin/env python3
"""Writes the seed corpora of the fuzzers (standard library only): python3 tests/fuzz/make_corpus.py"""
import json
import struct
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parent / "corpus"


def put(target, name, data):
    folder = ROOT / target
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)


def safetensors(header, data=b"", pad=0):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * pad
    return struct.pack("<Q", len(text)) + text + data


def tensor(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def weights():
    two = {"__metadata__": {"format": "pt"}, "b": tensor("F32", [2, 3], 0, 24), "a": tensor("BF16", [4], 24, 32)}
    put("weights", "two", safetensors(two, bytes(32)))
    put("weights", "empty", safetensors({}))
    put("weights", "scalar", safetensors({"s": tensor("I64", [], 0, 8)}, bytes(8)))
    put("weights", "zero_elems", safetensors({"z": tensor("F16", [0, 7], 0, 0)}))
    put("weights", "misaligned", safetensors({"m": tensor("F32", [1], 0, 4)}, bytes(4), pad=1))
    put("weights", "rank6", safetensors({"r": tensor("U8", [1] * 6, 0, 1)}, bytes(1)))
    put("weights", "float8", safetensors({"f": tensor("F8_E4M3", [2], 0, 2), "g": tensor("F4", [2], 2, 3)}, bytes(3)))
    put("weights", "unknown", safetensors({"u": tensor("Q9_9", [2], 0, 5)}, bytes(5)))
    put("weights", "escapes", safetensors(rb'{"a\u00e9\ud83d\ude00\n":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', bytes(1)))
    put("weights", "huge_dim", safetensors({"h": tensor("F32", [2**60, 2**60], 0, 4)}, bytes(4)))
    put("weights", "twice", safetensors(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
                                        b'"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}', bytes(2)))


def configs():
    put("json", "config", json.dumps({"_class_name": "T", "num_layers": 28, "eps": 1e-6, "bias": True, "x": None,
                                      "blocks": [1, 2, {"a": [-0.5]}], "s": "\u00e9\U0001f600\n"}).encode())
    put("json", "deep", b"[" * 65 + b"]" * 65)
    put("json", "numbers", b'{"a":1e999,"b":-0,"c":9007199254740993,"d":0.1,"e":1e-400}')
    put("json", "zero", rb'"a\u0000b"')
    put("json", "cut", b'{"a":[1,2,"x')
    put("json", "scalar", b" 7 ")


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, depth, colour, raw, *extra, interlace=0):
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + b"".join(extra) + chunk(b"IDAT", zlib.compress(raw))
            + chunk(b"IEND", b""))


def jpeg(frame, sampling, scans, tail=b""):
    """A JPEG of 8 x 8 whose every Huffman table has one code, 0, for symbol 0: all coefficients are zero."""
    def segment(marker, body):
        return bytes([0xff, marker]) + struct.pack(">H", len(body) + 2) + body

    n = len(sampling)
    parts = b"".join(bytes([i + 1, factors, 0]) for i, factors in enumerate(sampling))
    out = b"\xff\xd8" + segment(0xdb, b"\0" + b"\1" * 64) + segment(frame, bytes([8, 0, 8, 0, 8, n]) + parts)
    for table in (0x00, 0x10):
        out += segment(0xc4, bytes([table, 1] + [0] * 15 + [0]))
    for start, end, approx, coded in scans:
        used = n if start == 0 else 1
        out += segment(0xda, bytes([used]) + b"".join(bytes([i + 1, 0]) for i in range(used)) + bytes([start, end, approx]))
        out += coded
    return out + tail + b"\xff\xd9"


def pictures():
    rgb = b"".join(b"\0" + bytes(range(y, y + 9)) for y in range(3))
    put("image", "rgb.png", png(3, 3, 8, 2, rgb))
    put("image", "grey16.png", png(2, 2, 16, 0, b"\0\1\2\3\4" * 2))
    put("image", "palette.png", png(4, 2, 2, 3, b"\0\x1b" * 2, chunk(b"PLTE", bytes(range(12))), chunk(b"tRNS", b"\0\x80")))
    put("image", "rgba.png", png(2, 2, 8, 6, (b"\4" + bytes(range(8))) * 2))
    put("image", "interlaced.png", png(1, 1, 8, 2, b"\0\1\2\3", interlace=1))
    put("image", "bomb.png", png(1, 1, 8, 2, bytes(4_000_000)))
    put("image", "grey.jpg", jpeg(0xc0, [0x11], [(0, 63, 0, b"\x3f")]))
    put("image", "colour.jpg", jpeg(0xc0, [0x22, 0x11, 0x11], [(0, 63, 0, b"\0\x0f")]))
    put("image", "progressive.jpg", jpeg(0xc2, [0x11], [(0, 0, 0, b"\x7f"), (1, 63, 0, b"\x7f")]))
    text = chunk(b"tEXt", b"parameters\0a cube\nSteps: 4")
    latin = chunk(b"tEXt", b"Author\0Andr\xe9")
    itxt = chunk(b"iTXt", "prompt\0\0\0de\0Eingabe\0Würfel".encode())
    put("png_texts", "three.png", png(3, 3, 8, 2, rgb, text, latin, itxt))
    put("png_texts", "ztxt.png", png(3, 3, 8, 2, rgb, chunk(b"zTXt", b"k\0\0" + zlib.compress(b"v"))))
    put("png_texts", "itxt_packed.png", png(3, 3, 8, 2, rgb, chunk(b"iTXt", b"k\0\1\0\0\0" + zlib.compress(b"v"))))
    put("png_texts", "no_keyword.png", png(3, 3, 8, 2, rgb, chunk(b"tEXt", b"\0v")))


def animation(colour, first, *frames):
    """first: raw data of the 3 x 2 canvas; frames: (x, y, width, height, disposal, blending, raw data)."""
    def control(number, width, height, x, y, dispose, blend):
        return chunk(b"fcTL", struct.pack(">IIIIIHHBB", number, width, height, x, y, 1, 20, dispose, blend))

    head = struct.pack(">IIBBBBB", 3, 2, 8, colour, 0, 0, 0)
    out = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"acTL", struct.pack(">II", 1 + len(frames), 0))
    out += control(0, 3, 2, 0, 0, 0, 0) + chunk(b"IDAT", zlib.compress(first))
    for i, (x, y, width, height, dispose, blend, raw) in enumerate(frames):
        out += control(2 * i + 1, width, height, x, y, dispose, blend)
        out += chunk(b"fdAT", struct.pack(">I", 2 * i + 2) + zlib.compress(raw))
    return out + chunk(b"IEND", b"")


def animations():
    rgb = b"".join(bytes([filter]) + bytes(range(9)) for filter in (1, 4))
    rgba = b"".join(bytes([filter]) + bytes(range(200, 212)) for filter in (2, 3))
    put("apng", "rgb.png", animation(2, rgb, (1, 0, 2, 1, 0, 0, b"\0abcdef"), (0, 1, 1, 1, 0, 0, b"\0abc")))
    put("apng", "rgba.png", animation(6, rgba, (0, 0, 1, 2, 2, 0, b"\0abcd\1efgh"), (2, 1, 1, 1, 1, 1, b"\0abcd"),
                                      (0, 0, 3, 2, 0, 1, rgba)))
    put("apng", "still.png", png(3, 2, 8, 2, rgb, chunk(b"acTL", struct.pack(">II", 1, 0))))


def trace(policy, options, steps, images=1, batches=1, tokens=16):
    """One batch after another; a step is a list of (which image or images, entry)."""
    lines = []
    for batch in range(batches):
        lines.append({"trace": 1, "policy": policy, "options": options, "model": "m", "sampler": "ddim",
                      "steps": len(steps), "images": images, "first_image": batch * images, "branches": 2, "blocks": 2,
                      "parts": 2, "tokens": tokens})
        for step, entries in enumerate(steps):
            told = []
            for which, entry in entries:
                at = [i + batch * images for i in which] if isinstance(which, list) else which + batch * images
                told.append({"image": at, "span": 0, "horizon": 0, "statistic": None, "threshold": None, "forced": False,
                             **entry})
            lines.append({"step": step, "timestep": 999 - step, "images": told})
    return "".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines).encode()


def traces():
    full = {"kind": "full", "produce": "none", "weights": [], "blocks": "cc cc"}
    again = {**full, "weights": [[1]], "drift": [0.1, 0.2], "signals": {"output_size": [3, 4]}}
    skip = {"kind": "skip", "produce": "none", "horizon": 1, "weights": [[1]], "blocks": "rr rr"}
    put("trace", "fora", trace("fora", "", [[(0, full)], [(0, skip)], [(0, again)], [(0, {**skip, "statistic": 0.5})]]))
    rows = {"kind": "partial", "produce": "none", "horizon": 1, "weights": [[1]], "blocks": "rt rt", "rows": [0, 3, 0, 5]}
    put("trace", "toca", trace("toca", "ratio=0.5", [[([0, 1], full)], [(0, rows), (1, skip)]], images=2, batches=2))
    output = {"kind": "skip", "produce": "output", "horizon": 1, "weights": [[1.5, -0.5, 0]] * 3, "blocks": "-- --"}
    put("trace", "worldcache", trace("worldcache", "", [[(0, full)]] * 3 + [[(0, output)]] * 2))
    span = {"kind": "partial", "produce": "span", "horizon": 1, "weights": [[1]], "blocks": "cc --"}
    put("trace", "fbcache", trace("fbcache", "", [[(0, full)], [(0, span)]]))
    verified = {"kind": "partial", "produce": "none", "verify": "use", "horizon": 1, "weights": [[2, -1]], "blocks": "pp pp"}
    put("trace", "speca", trace("speca", "output=verified", [[(0, full)]] * 3 + [[(0, verified)]]))
    put("trace", "replay", trace("replay", "file=x", [[(0, full)]]))
    put("trace", "cut", trace("fora", "", [[(0, full)], [(0, skip)]])[:-40])


weights()
configs()
pictures()
animations()
traces()
