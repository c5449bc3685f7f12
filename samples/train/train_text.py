"""Trains the three shipped text models on the tasks of ../tasks and a plain text: a masked diffusion model (LLaDA layout), its
block-causal twin (SDAR layout) and an autoregressive one (Llama layout). One GPU each; nothing is read but code and corpus.

    python train_text.py mdm   --out OUT --work W --seconds 500 --seconds-total 950    first part
    python train_text.py mdm   --out OUT --resume W --seconds 500 --finish             the rate anneals to the end
    python train_text.py block --out OUT3 --resume OUT --seconds 480 --finish          starts from a mdm checkpoint
    python train_text.py ar    --out OUT4 --seconds 500 --finish
    python train_text.py eval  --model FOLDER --out OUT                                exact match by task
    python train_text.py export --resume OUT --out FOLDER                              model folder of a checkpoint
    python train_text.py mdm   --out OUT --smoke                                       a few tiny steps on any machine

`--seconds` covers start, compiling and training; evaluation has `--eval-seconds` after it. `--seconds-total` is the training
time over all commands, along which the rate anneals and samples lengthen; `--finish` makes this command the last. OUT gets
log.jsonl and checkpoint.pt.NN: the averaged weights in bf16, one piece under 16 MiB, from which `export` makes the model folder
and any command can go on; WORK (or OUT with --keep all) has weights in f32 and Adam's second moment besides, four pieces.

Several GPUs of one host: `torchrun --nproc-per-node N train_text.py ...`; each draws samples of its own, gradients are averaged,
and a step has N times the tokens.

Masked diffusion: LLaDA's objective with the number of masked tokens drawn uniformly (the variant with exact counts of its
likelihood bound; weight n / masked); a part of the samples is masked as in semi-autoregressive decoding, clean before a
window and masked after it: there the window is masked more often than not, and what lies behind it weighs a tenth. Block twin: the training mask of BD3-LM over [x_t ; x_0], unshifted."""
import argparse
import ctypes
import io
import json
import math
import os
import queue
import re
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
START = time.time()
EOS, MASK, BOS = 0, 1, 2
VOCAB, CONTEXT, BLOCK = 1024, 2048, 8
KINDS = ("mdm", "block", "ar")
FOLDER = {"mdm": "text", "block": "text-block", "ar": "text-ar"}
SHAPE = {"mdm": dict(hidden=256, layers=9, heads=4, kv_heads=4, ffn=704, qk_norm=False),
         "block": dict(hidden=256, layers=9, heads=4, kv_heads=4, ffn=704, qk_norm=True),
         "ar": dict(hidden=256, layers=9, heads=4, kv_heads=2, ffn=704, qk_norm=False)}
THETA, EPS = 10000.0, 1e-5
# share of the tokens by task; what is left of rows goes to text
SHARE = {"add": .04, "sort": .04, "reverse": .04, "copy": .03, "kv": .14, "vt": .12, "sudoku": .04, "countdown": .06, "total": .07,
         "multiply": .10, "eval": .11, "trace": .12, "chain": .10, "walk": .10, "text": .03}
SHARE_AR = {"kv-long": .14, "needle": .03, "needle-mk": .07, "needle-mv": .06, "vt-long": .12, "cwe": .08}
TRAIN_MAX = {"kv": 130}  # sizes above the task's usual ones; others stop a little above them
PIECE = 16 * 1024 * 1024 - 4096


def elapsed():
    return time.time() - START


# Data ------------------------------------------------------------------------------------------------------------------


class Info(ctypes.Structure):
    _fields_ = [("name", ctypes.c_char_p), ("about", ctypes.c_char_p), ("kind", ctypes.c_int), ("exact", ctypes.c_bool),
                ("size_name", ctypes.c_char_p), ("min_size", ctypes.c_int), ("max_size", ctypes.c_int), ("usual_min", ctypes.c_int),
                ("usual_max", ctypes.c_int), ("min_length", ctypes.c_size_t), ("max_length", ctypes.c_size_t)]


class Settings(ctypes.Structure):
    _fields_ = [("size", ctypes.c_int), ("length", ctypes.c_size_t), ("aware", ctypes.c_bool), ("question", ctypes.c_int),
                ("corpus", ctypes.c_char_p), ("corpus_len", ctypes.c_size_t)]


class Mixture(ctypes.Structure):
    _fields_ = [("weight", ctypes.c_double * 64)] + [(n, ctypes.c_int32 * 64) for n in ("size_low", "size_high", "length_low", "length_high")] + \
        [(n, ctypes.c_int32) for n in ("layout", "block", "branches", "eos", "text_low", "text_high", "max_doc")] + \
        [("fill_weight", ctypes.c_double), ("aware_part", ctypes.c_double)]


class Tasks:
    """The C tasks, tokenizer and packer."""

    def __init__(self, tokenizer, corpus):
        sources = [HERE / "text_batches.c"] + [ROOT / "samples" / "tasks" / f"{n}.c" for n in ("tasks", "tasks_short", "tasks_steps", "tasks_recall")]
        lib = Path(tempfile.mkdtemp()) / "libtasks.so"
        subprocess.run(["cc", "-std=c11", "-O2", "-shared", "-fPIC", "-o", str(lib), *map(str, sources), "-lm"], check=True)
        self.lib = lib = ctypes.CDLL(str(lib))
        lib.task_at.restype = ctypes.POINTER(Info)
        lib.task_score.restype = ctypes.c_double
        lib.text_encode.restype = ctypes.c_int64
        if lib.mixture_size() != ctypes.sizeof(Mixture):
            raise SystemExit("train_text.py and text_batches.c disagree about the mixture")
        self.info = [lib.task_at(i).contents for i in range(lib.task_count())]
        self.names = [i.name.decode() for i in self.info]
        data = json.loads(Path(tokenizer).read_text())["model"]
        vocab = data["vocab"]
        pairs = [m if isinstance(m, list) else m.split(" ") for m in data["merges"]]
        merges = np.array([[vocab[a], vocab[b], vocab[a + b]] for a, b in pairs], dtype=np.int32)
        chars = byte_chars()
        byte_id = np.array([vocab[chars[b]] for b in range(256)], dtype=np.int32)
        self.bytes_of = [b""] * VOCAB
        back = {c: b for b, c in enumerate(chars)}
        for token, i in vocab.items():
            self.bytes_of[i] = b"" if re.fullmatch(r"<\|\w+\|>", token) else bytes(back[c] for c in token)
        self.source = ctypes.create_string_buffer(lib.source_size())
        self.text = Path(corpus).read_bytes()
        self.corpus = np.zeros(len(self.text), dtype=np.uint16)
        lib.source_init(self.source, merges.ctypes.data_as(ctypes.c_void_p), len(merges), byte_id.ctypes.data_as(ctypes.c_void_p), None,
                        ctypes.c_int64(0))
        n = self.encode_to(self.text, self.corpus)
        held = n // 20  # the last twentieth is held out
        self.held_out = self.corpus[n - held:n].astype(np.int64)
        lib.source_init(self.source, merges.ctypes.data_as(ctypes.c_void_p), len(merges), byte_id.ctypes.data_as(ctypes.c_void_p),
                        self.corpus.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(n - held))
        self.prompt = ctypes.create_string_buffer(32768)
        self.answer = ctypes.create_string_buffer(8192)

    def encode_to(self, text, out):
        return self.lib.text_encode(self.source, ctypes.c_char_p(text), ctypes.c_int64(len(text)), out.ctypes.data_as(ctypes.c_void_p))

    def encode(self, text):
        out = np.zeros(max(1, len(text)), dtype=np.uint16)
        return out[:self.encode_to(text, out)].astype(np.int64)

    def decode(self, ids):
        return b"".join(self.bytes_of[i] for i in ids)

    def generate(self, name, seed, **settings):
        s = Settings(corpus=self.text, corpus_len=len(self.text), **settings)
        if self.lib.task_generate(self.names.index(name), ctypes.c_uint64(seed), ctypes.byref(s), self.prompt, ctypes.c_size_t(32768), self.answer, ctypes.c_size_t(8192)):
            raise RuntimeError(f"{name} refused {settings}")
        return self.prompt.value, self.answer.value

    def score(self, name, prompt, answer, completion):
        return self.lib.task_score(self.names.index(name), prompt, answer, completion.split(b"\0")[0])


def byte_chars():
    """The character that stands for each byte in a byte-level vocabulary (GPT-2)."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    extra = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(extra)) for b in range(256)]


class Mix:
    """What is drawn: sizes grow with progress; a task's share of tokens falls as it is learned."""

    def __init__(self, tasks, kind, max_doc, share):
        self.tasks, self.kind, self.max_doc = tasks, kind, max_doc
        self.share = {**SHARE, **(SHARE_AR if kind == "ar" else {}), **share}
        self.fail = {n: 1.0 for n in tasks.names}
        self.struct = Mixture(layout={"ar": 0, "mdm": 1, "block": 2}[kind], block=BLOCK, branches=6, eos=EOS, text_low=64, text_high=64,
                              max_doc=max_doc, fill_weight=0.1, aware_part=0.25)
        self.lengths = {}

    def update(self, progress):
        """Sets the ranges for the progress, 0..1, and shares by tokens. Workers read the struct as it changes: any mixture of
        old and new is a valid one."""
        m, grown = self.struct, min(1.0, 0.2 + progress / 0.45)
        room = self.max_doc - 120
        for i, info in enumerate(self.tasks.info):
            name = self.tasks.names[i]
            if self.share.get(name, 0.0) == 0.0:
                m.weight[i] = 0.0
                continue
            if info.size_name:
                top = min(info.max_size, TRAIN_MAX.get(name, info.usual_max + max(0, info.usual_max // 8)))
                if name == "countdown":
                    top = 4 if progress > 0.3 else 3
                low = max(info.min_size, min(info.usual_min, 2))
                high = max(low + 1, round(low + (top - low) * grown))
                high = self.fit(name, "size", low, min(high, info.max_size), room)
                m.size_low[i], m.size_high[i] = low, high
                probe = dict(size=(low + high) // 2)
            elif info.kind == 3:
                m.text_low, m.text_high = min(64, room), max(64, min(room, int(160 + 900 * grown)))
                self.lengths[name] = (m.text_low + m.text_high) / 2
                m.weight[i] = self.share[name] / self.lengths[name]
                continue
            else:
                low = int(info.min_length)
                per_token = self.chars_per_token(name)
                high = int(max(low + 64, (room - 40) * per_token * grown))
                high = self.fit(name, "length", low, min(high, int(info.max_length)), room)
                m.length_low[i], m.length_high[i] = max(low, high // 4), high
                probe = dict(length=(low + high) // 2)
            samples = [self.tasks.generate(name, 77 + s, **probe) for s in range(4)]
            self.lengths[name] = sum(len(self.tasks.encode(p + a)) for p, a in samples) / 4 + 16
            # what diffusion is measured by while it trains, its surest token, hides how it fails at long answers
            fail = 1.0 if self.kind != "ar" and (info.kind == 1 or name in ("vt", "kv", "countdown")) else self.fail[name]
            m.weight[i] = self.share[name] * (0.15 + 0.85 * fail) / self.lengths[name]

    def chars_per_token(self, name):
        p, a = self.tasks.generate(name, 5, length=1500)
        return len(p) / len(self.tasks.encode(p))

    def fit(self, name, what, low, high, room):
        while high > low:
            if max(sum(len(self.tasks.encode(x)) for x in self.tasks.generate(name, 900 + s, **{what: high})) for s in range(3)) <= room:
                break
            high = max(low, int(high * 0.93) - (what == "size"))
        return high


class Feeder:
    """Threads that fill batches ahead of the GPU; ctypes lets them run in parallel."""

    FIELDS = (("id", torch.int16), ("doc", torch.int16), ("pos", torch.int16), ("kind", torch.uint8), ("branch", torch.uint8), ("task", torch.uint8),
              ("weight", torch.float32))

    def __init__(self, tasks, mix, rows, length, seed, threads, pinned):
        self.tasks, self.mix, self.rows, self.length = tasks, mix, rows, length
        self.free, self.ready, self.in_use, self.stopping = queue.Queue(), queue.Queue(), [], False
        for _ in range(threads + 4):
            self.free.put({n: torch.empty(rows, length, dtype=t, pin_memory=pinned) for n, t in self.FIELDS})
        self.threads = [threading.Thread(target=self.run, args=(seed * 1000 + i,), daemon=True) for i in range(threads)]
        for t in self.threads:
            t.start()

    def run(self, seed):
        lib = self.tasks.lib
        worker = ctypes.create_string_buffer(lib.worker_size())
        lib.worker_init(worker, self.tasks.source, ctypes.c_uint64(seed))
        while True:
            b = self.free.get()
            if self.stopping:
                return
            lib.worker_fill(worker, ctypes.byref(self.mix.struct), self.rows, self.length, *(ctypes.c_void_p(b[n].data_ptr()) for n, _ in self.FIELDS))
            self.ready.put(b)

    def next(self, device):
        while self.in_use and self.in_use[0][1].query():
            self.free.put(self.in_use.pop(0)[0])
        b = self.ready.get()
        out = {n: t.to(device, non_blocking=True) for n, t in b.items()}
        if device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
            self.in_use.append((b, event))
        else:
            out = {n: t.clone() for n, t in out.items()}
            self.free.put(b)
        return out

    def stop(self):
        self.stopping = True
        for _ in self.threads:
            self.free.put(None)


# The model -------------------------------------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    def __init__(self, n):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))

    def forward(self, x):
        f = x.float()
        return (f * torch.rsqrt(f.square().mean(-1, keepdim=True) + EPS)).to(x.dtype) * self.weight.to(x.dtype)


def attend(q, k, v, mask):
    """mask: a BlockMask of flex attention, bool [.., queries, keys], or "causal"."""
    gqa = q.shape[1] != k.shape[1]
    if isinstance(mask, str):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
    if isinstance(mask, torch.Tensor):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=gqa)
    return flex_attention(q, k, v, block_mask=mask, enable_gqa=gqa)


class Layer(nn.Module):
    def __init__(self, c):
        super().__init__()
        h, self.heads, self.kv_heads = c["hidden"], c["heads"], c["kv_heads"]
        self.d = 64 if h % 64 == 0 and h // c["heads"] == 64 else h // c["heads"]
        linear = lambda a, b: nn.Linear(a, b, bias=False)
        self.attn_norm, self.ffn_norm = RMSNorm(h), RMSNorm(h)
        self.q, self.k, self.v = linear(h, self.heads * self.d), linear(h, self.kv_heads * self.d), linear(h, self.kv_heads * self.d)
        self.o = linear(self.heads * self.d, h)
        self.gate, self.up, self.down = linear(h, c["ffn"]), linear(h, c["ffn"]), linear(c["ffn"], h)
        if c["qk_norm"]:
            self.q_norm, self.k_norm = RMSNorm(self.d), RMSNorm(self.d)
        self.qk_norm = c["qk_norm"]

    def forward(self, x, cos, sin, mask):
        b, t, _ = x.shape
        n = self.attn_norm(x)
        split = lambda y, heads: y.view(b, t, heads, self.d)
        q, k, v = split(self.q(n), self.heads), split(self.k(n), self.kv_heads), split(self.v(n), self.kv_heads)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, cos, sin).transpose(1, 2), rotate(k, cos, sin).transpose(1, 2)
        a = attend(q, k, v.transpose(1, 2).to(q.dtype), mask)
        x = x + self.o(a.transpose(1, 2).reshape(b, t, -1))
        n = self.ffn_norm(x)
        return x + self.down(F.silu(self.gate(n)) * self.up(n))


def rotate(x, cos, sin):
    """x [b, t, heads, d], cos and sin [b, t, 1, d / 2] in f32; halves, as in Llama."""
    a, b = x.float().chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype).contiguous()


class TextModel(nn.Module):
    def __init__(self, kind, shape):
        super().__init__()
        self.kind, self.shape = kind, shape
        self.embed = nn.Embedding(VOCAB, shape["hidden"])
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape["layers"]))
        self.norm = RMSNorm(shape["hidden"])
        self.head = nn.Linear(shape["hidden"], VOCAB, bias=False)
        d = shape["hidden"] // shape["heads"]
        self.register_buffer("inv_freq", THETA ** (-torch.arange(0, d, 2).float() / d), persistent=False)
        for n, p in self.named_parameters():
            if p.dim() > 1:
                nn.init.normal_(p, std=0.02 / (math.sqrt(2 * shape["layers"]) if re.search(r"\.(o|down)\.", n) else 1))

    def forward(self, ids, pos, mask):
        """Hidden states after the last norm."""
        x = self.embed(ids)
        angle = pos.float()[:, :, None, None] * self.inv_freq
        cos, sin = angle.cos(), angle.sin()
        for layer in self.layers:
            x = layer(x, cos, sin, mask)
        return self.norm(x)


# Masking and loss ------------------------------------------------------------------------------------------------------


def mask_tokens(b, kind, suffix_part):
    """Which tokens of the answers (and of text) are masked, bool [rows, len], and the weight of each one's loss.

    A segment is a sample, or a block of one. Of its n tokens m are masked, m uniform in 1..n, and each weighs n / m. In a part
    of the samples (mdm) tokens before a window stay clean, those after it are masked, and m is drawn inside."""
    doc, pos = b["doc"], b["pos"]
    rows, t = doc.shape
    dev = doc.device
    maskable = b["kind"] > 0
    part = doc * 4096 + pos // BLOCK if kind == "block" else doc
    change = torch.ones_like(part, dtype=torch.bool)
    change[:, 1:] = part[:, 1:] != part[:, :-1]
    seg = change.long().cumsum(1) - 1
    place = torch.arange(t, device=dev).expand(rows, t)
    begin = torch.where(change, place, 0).cummax(1).values
    zeros = torch.zeros(rows, t, device=dev)
    n = zeros.scatter_add(1, seg, maskable.float()).gather(1, seg)
    count = maskable.long().cumsum(1)
    index = count - maskable.long() - (count - maskable.long()).gather(1, begin)  # among the maskable of its segment
    draw = lambda: torch.rand(rows, t, device=dev).gather(1, seg)
    windowed = draw() < (suffix_part if kind == "mdm" else 0.0)
    cut = torch.where(windowed, (draw() * n).floor(), 0.0)
    width = torch.where(windowed, torch.minimum(8.0 * 2.0 ** (draw() * 4).floor(), n - cut), n)
    inside = (torch.where(windowed, 1 - draw().square(), draw()) * width).ceil().clamp(min=1.0)
    m = (n - cut - width) + inside
    group = torch.where(maskable, torch.where(index < cut, 2, torch.where(index < cut + width, 1, 0)), 3)
    key = (seg * 4 + group) * 65536 + (torch.rand(rows, t, device=dev) * 65536).long()
    rank = torch.empty_like(key).scatter_(1, key.argsort(1), place) - begin
    masked = maskable & (rank < m)
    behind = (n - cut - width).clamp(min=1.0)
    weight = torch.where(windowed, torch.where(group == 0, 0.1 * n / behind, n / inside), n / m.clamp(min=1.0))
    return masked, b["weight"] * weight, seg


def visible(kind, doc, pos, branch, t):
    """mask_mod of flex attention: may query i of row b see key j?"""
    if kind == "mdm":
        return lambda b, h, i, j: doc[b, i] == doc[b, j]
    if kind == "ar":
        return lambda b, h, i, j: (i >= j) & (doc[b, i] == doc[b, j]) & ((branch[b, j] == 0) | (branch[b, i] == branch[b, j]))

    def block(b, h, i, j):
        noisy_i, noisy_j = i < t, j < t
        bi, bj = pos[b, i] // BLOCK, pos[b, j] // BLOCK
        inside = noisy_i & noisy_j & (bi == bj)
        before = noisy_i & ~noisy_j & (bi > bj)
        clean = ~noisy_i & ~noisy_j & (bi >= bj)
        return (doc[b, i] == doc[b, j]) & (inside | before | clean)
    return block


def prepare(b, kind):
    """A batch in the types that the loss takes, with the sample, position and branch of every token of the sequence that the
    model sees (`see_*`, int32; the block twin's is [x_t ; x_0])."""
    b = dict(b, id=b["id"].long())
    for n in ("doc", "pos", "branch"):
        b[n] = b[n].int()
        b["see_" + n] = torch.cat([b[n], b[n]], 1) if kind == "block" else b[n].clone()
    return b


def flex_mask(b, kind):
    rows, length = b["see_doc"].shape
    mod = visible(kind, b["see_doc"], b["see_pos"], b["see_branch"], b["id"].shape[1])
    return create_block_mask(mod, rows, None, length, length, device=b["id"].device)


def plain_mask(b, kind):
    """bool [rows, 1, length, length]"""
    rows, length = b["see_doc"].shape
    i, r = torch.arange(length, device=b["id"].device), torch.arange(rows, device=b["id"].device)
    mod = visible(kind, b["see_doc"], b["see_pos"], b["see_branch"], b["id"].shape[1])
    return mod(r[:, None, None], None, i[None, :, None], i[None, None, :])[:, None]


def loss_of(model, b, mask, suffix_part, num_tasks):
    """Mean loss of a prepared batch, and by task the number of right and of all predictions that count: every token of answers
    (ar), or the surest masked one of each segment, which greedy decoding would commit. mask: a BlockMask, a bool mask, or
    "flex" for a BlockMask made here."""
    kind = model.kind
    ids, doc, branch = b["id"], b["doc"], b["branch"]
    rows, t = ids.shape
    if kind == "ar":
        inputs, target = ids, torch.cat([ids[:, 1:], ids[:, :1]], 1)
        same = torch.zeros_like(ids, dtype=torch.bool)
        same[:, :-1] = (doc[:, 1:] == doc[:, :-1]) & (branch[:, 1:] == branch[:, :-1])
        weight = torch.cat([b["weight"][:, 1:], b["weight"][:, :1]], 1) * same
        total = weight.sum()
    else:
        masked, weight, seg = mask_tokens(b, kind, suffix_part)
        weight = weight * masked
        target, total = ids, b["weight"].sum()
        inputs = torch.where(masked, MASK, ids)
    if kind == "block":
        inputs = torch.cat([inputs, ids], 1)
    pos = b["see_pos"]
    if isinstance(mask, str):
        mask = flex_mask(b, kind)
    hidden = model(inputs, pos, mask)[:, :t]
    logits = model.head(hidden).float()
    ce = F.cross_entropy(logits.reshape(-1, VOCAB), target.reshape(-1), reduction="none").view(rows, t)
    loss = (ce * weight).sum() / total.clamp(min=1e-6)
    with torch.no_grad():
        right = logits.argmax(-1) == target
        if kind == "ar":
            counted = weight > 0
        else:
            top = logits.detach().amax(-1) - logits.detach().logsumexp(-1)
            top = torch.where(masked & (b["kind"] != 2), top, -1e9)
            best = torch.full_like(top, -1e9).scatter_reduce(1, seg, top, "amax").gather(1, seg)
            counted = (top == best) & (top > -1e8)
        task = b["task"].long().reshape(-1)
        stats = torch.zeros(2, num_tasks, device=ids.device)
        stats[0].scatter_add_(0, task, (counted & right).float().reshape(-1))
        stats[1].scatter_add_(0, task, counted.float().reshape(-1))
    return loss, stats


# Optimizer -------------------------------------------------------------------------------------------------------------


def orthogonal(x):
    """The nearest (semi-)orthogonal matrices, roughly: Newton-Schulz of degree 5 on x [n, rows, cols], bf16."""
    x = x.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        a = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x


class Optimizer:
    """AdamW, or Muon (Jordan 2024) for the layers' matrices and AdamW for the rest, Muon's update scaled to AdamW's usual size
    (Moonlight, Liu et al. 2025)."""

    def __init__(self, kind, model, decay):
        named = list(model.named_parameters())
        self.matrices = [p for n, p in named if kind == "muon" and n.startswith("layers.") and p.dim() == 2]
        taken = {id(p) for p in self.matrices}
        rest = [p for _, p in named if id(p) not in taken]
        self.params, self.rest, self.decay = [p for _, p in named], rest, decay
        self.adamw = torch.optim.AdamW([{"params": [p for p in rest if p.dim() > 1], "weight_decay": decay},
                                        {"params": [p for p in rest if p.dim() <= 1], "weight_decay": 0.0}], lr=0.0, betas=(0.9, 0.98),
                                       fused=rest[0].is_cuda)
        self.groups = {}
        for p in self.matrices:
            self.groups.setdefault(tuple(p.shape), []).append(p)
        self.momentum = {s: torch.zeros(len(ps), *s, device=ps[0].device) for s, ps in self.groups.items()}
        self.ema = [p.detach().clone() for p in self.params]
        self.steps = 0

    @torch.no_grad()
    def step(self, rate, ema):
        for g in self.adamw.param_groups:
            g["lr"] = rate
        self.adamw.step()
        for shape, ps in self.groups.items():
            grad = torch.stack([p.grad for p in ps])
            m = self.momentum[shape]
            m.mul_(0.95).add_(grad)
            update = orthogonal(grad.add(m, alpha=0.95)).float() * (0.2 * math.sqrt(max(shape)))
            torch._foreach_mul_(ps, 1 - rate * self.decay)
            torch._foreach_add_(ps, list(update.unbind()), alpha=-rate)
        self.steps += 1
        torch._foreach_lerp_(self.ema, [p.detach() for p in self.params], 1 - min(ema, (1 + self.steps) / (10 + self.steps)))

    def second_moments(self):
        return [self.adamw.state[p].get("exp_avg_sq") if p in self.adamw.state else None for p in self.params]

    def load_second_moments(self, moments, steps):
        for p, v in zip(self.params, moments):
            if v is not None and any(p is r for r in self.rest):
                on = p.device if p.is_cuda else "cpu"
                self.adamw.state[p] = {"step": torch.tensor(float(steps), device=on), "exp_avg": torch.zeros_like(p),
                                       "exp_avg_sq": v.to(p.device).float().view(p.shape)}


# Checkpoints and model folders -----------------------------------------------------------------------------------------


def write_pieces(state, folder):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getbuffer()
    folder.mkdir(parents=True, exist_ok=True)
    pieces = [data[i:i + PIECE] for i in range(0, len(data), PIECE)]
    for i, piece in enumerate(pieces):
        temporary = folder / f".piece{i:02d}"
        temporary.write_bytes(piece)
        temporary.rename(folder / f"checkpoint.pt.{i:02d}")
    for i in range(len(pieces), 16):
        (folder / f"checkpoint.pt.{i:02d}").unlink(missing_ok=True)


def read_pieces(folder):
    pieces = sorted(Path(folder).glob("checkpoint.pt.*"))
    if not pieces:
        raise SystemExit(f"no checkpoint.pt.NN in {folder}")
    return torch.load(io.BytesIO(b"".join(p.read_bytes() for p in pieces)), map_location="cpu", weights_only=True)


def flat_here(tensors):
    return torch.cat([t.detach().reshape(-1) for t in tensors])


def flat(tensors, dtype):
    return torch.cat([t.detach().reshape(-1).cpu().to(dtype) for t in tensors])


def public_name(kind, name):
    """Name of a parameter in the published layout."""
    if kind == "mdm":
        m = re.fullmatch(r"layers\.(\d+)\.(\w+)\.weight", name)
        top = {"embed.weight": "wte", "norm.weight": "ln_f", "head.weight": "ff_out"}
        leaf = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "attn_out", "gate": "ff_proj", "up": "up_proj", "down": "ff_out",
                "attn_norm": "attn_norm", "ffn_norm": "ff_norm"}
        return f"model.transformer.blocks.{m[1]}.{leaf[m[2]]}.weight" if m else f"model.transformer.{top[name]}.weight"
    m = re.fullmatch(r"layers\.(\d+)\.(\w+)\.weight", name)
    top = {"embed.weight": "model.embed_tokens.weight", "norm.weight": "model.norm.weight", "head.weight": "lm_head.weight"}
    leaf = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj", "gate": "mlp.gate_proj",
            "up": "mlp.up_proj", "down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
            "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
    return f"model.layers.{m[1]}.{leaf[m[2]]}.weight" if m else top[name]


def config_of(kind, s):
    if kind == "mdm":
        return {"architectures": ["LLaDAModelLM"], "model_type": "llada", "d_model": s["hidden"], "n_layers": s["layers"], "n_heads": s["heads"],
                "n_kv_heads": s["kv_heads"], "mlp_hidden_size": s["ffn"], "vocab_size": VOCAB, "embedding_size": VOCAB, "rope": True,
                "rope_theta": THETA, "rope_full_precision": True, "rms_norm_eps": EPS, "layer_norm_type": "rms", "max_sequence_length": CONTEXT,
                "weight_tying": False, "include_bias": False, "include_qkv_bias": False, "attention_layer_norm": False, "block_type": "llama",
                "activation_type": "silu", "scale_logits": False, "input_emb_norm": False, "mask_token_id": MASK, "eos_token_id": EOS,
                "pad_token_id": EOS, "torch_dtype": "bfloat16"}
    common = {"hidden_size": s["hidden"], "num_hidden_layers": s["layers"], "num_attention_heads": s["heads"],
              "num_key_value_heads": s["kv_heads"], "head_dim": s["hidden"] // s["heads"], "intermediate_size": s["ffn"], "vocab_size": VOCAB,
              "rope_theta": THETA, "rms_norm_eps": EPS, "max_position_embeddings": CONTEXT, "tie_word_embeddings": False,
              "attention_bias": False, "hidden_act": "silu", "bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": EOS, "torch_dtype": "bfloat16"}
    if kind == "block":
        return {"architectures": ["SDARForCausalLM"], "model_type": "sdar", "block_size": BLOCK, "mask_token_id": MASK, **common}
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "mlp_bias": False, **common}


def write_folder(model, weights, folder, tokenizer_folder):
    """weights: tensors in the order of the parameters."""
    from safetensors.torch import save_file
    folder.mkdir(parents=True, exist_ok=True)
    kind = model.kind
    tensors = {public_name(kind, n): w.detach().cpu().to(torch.bfloat16).contiguous() for (n, _), w in zip(model.named_parameters(), weights)}
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})
    (folder / "model.safetensors").chmod(0o644)
    (folder / "config.json").write_text(json.dumps(config_of(kind, model.shape), indent=2) + "\n")
    generation = {"eos_token_id": EOS, "pad_token_id": EOS, "do_sample": False}
    if kind == "mdm":
        generation |= {"mask_token_id": MASK, "gen_length": 128, "block_length": 32, "steps": 128, "temperature": 0.0, "remasking": "low_confidence"}
    if kind == "block":
        generation |= {"mask_token_id": MASK, "block_length": BLOCK, "denoising_steps": BLOCK, "temperature": 0.0,
                       "remasking_strategy": "low_confidence_dynamic", "confidence_threshold": 0.9}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    for n in ("tokenizer.json", "tokenizer_config.json"):
        source = Path(tokenizer_folder) / n
        if source.resolve() != (folder / n).resolve():
            (folder / n).write_bytes(source.read_bytes())


def read_folder(folder):
    from safetensors.torch import load_file
    config = json.loads((Path(folder) / "config.json").read_text())
    kind = {"llada": "mdm", "sdar": "block", "llama": "ar"}[config["model_type"]]
    get = lambda *names: next(config[n] for n in names if n in config)
    shape = dict(hidden=get("hidden_size", "d_model"), layers=get("num_hidden_layers", "n_layers"), heads=get("num_attention_heads", "n_heads"),
                 kv_heads=get("num_key_value_heads", "n_kv_heads"), ffn=get("intermediate_size", "mlp_hidden_size"), qk_norm=kind == "block")
    model = TextModel(kind, shape)
    tensors = load_file(str(Path(folder) / "model.safetensors"))
    model.load_state_dict({n: tensors[public_name(kind, n)].float() for n, _ in model.named_parameters()})
    return model


@torch.no_grad()
def start_block(model, state):
    """Weights of a mdm checkpoint; q_norm and k_norm start as the mean size of q and k, measured on tokens drawn at random."""
    mdm = TextModel("mdm", dict(state["shape"]))
    vector_to(mdm, state["weights"])
    model.load_state_dict(mdm.state_dict(), strict=False)
    ids = torch.randint(6, VOCAB, (4, 128))
    sizes = []
    hooks = [m.register_forward_hook(lambda m, i, o: sizes.append(o.view(-1, layer.d).square().mean(1).sqrt().mean().item()))
             for layer in mdm.layers for m in (layer.q, layer.k)]
    mdm(ids, torch.arange(128).expand(4, 128), torch.ones(4, 1, 128, 128, dtype=torch.bool))
    for h in hooks:
        h.remove()
    for i, layer in enumerate(model.layers):
        layer.q_norm.weight.fill_(sizes[2 * i])
        layer.k_norm.weight.fill_(sizes[2 * i + 1])


@torch.no_grad()
def vector_to(model, vector):
    at = 0
    for p in model.parameters():
        p.copy_(vector[at:at + p.numel()].view(p.shape))
        at += p.numel()


# Evaluation ------------------------------------------------------------------------------------------------------------


def eval_list(tasks, kind, context):
    """(task, settings) judged: usual sizes; recall at lengths up to the context."""
    out = []
    for i, info in enumerate(tasks.info):
        name = tasks.names[i]
        if info.kind < 2:
            out.append((name, {}))
    if kind != "ar":
        return out + [("kv", dict(size=100))] + ([("kv", dict(size=130))] if context >= 1024 else [])
    for name in ("kv-long", "needle", "needle-mk", "needle-mv", "vt-long", "cwe"):
        p, _ = tasks.generate(name, 5, length=1500)
        per_token = len(p) / len(tasks.encode(p))
        for tokens in (500, 1000, 1850):
            if tokens < context:
                out.append((name, dict(length=max(512, int(tokens * per_token)))))
        out.append((name, dict(length=max(512, int(min(1000, context - 60) * per_token)), aware=True)))
    return out


@torch.no_grad()
def decode_ar(run, model, prompts, slot):
    n = len(prompts)
    lens = torch.tensor([len(p) for p in prompts], device=run.device)
    ids = torch.zeros(n, int(lens.max()) + slot, dtype=torch.long, device=run.device)
    for i, p in enumerate(prompts):
        ids[i, :len(p)] = torch.from_numpy(p)
    done = torch.zeros(n, dtype=torch.bool, device=run.device)
    at, rows = lens.clone(), torch.arange(n, device=run.device)
    for _ in range(slot):
        length = int(at.max())
        pos = torch.arange(length, device=run.device).expand(n, length)
        with run.autocast():
            h = model(ids[:, :length], pos, "causal")
            token = model.head(h[rows, at - 1]).argmax(-1)
        ids[rows, at] = torch.where(done, EOS, token)
        done |= token == EOS
        at += 1
        if done.all():
            break
    return [ids[i, len(p):len(p) + slot].tolist() for i, p in enumerate(prompts)], None


@torch.no_grad()
def decode_diffusion(run, model, prompts, slot, threshold=None):
    """Greedy, the surest token a step (and all above the threshold), block after block: of 32 tokens from the prompt's end on,
    or of the model's own size. Ends for a sample once all before its first end-of-text is there. Returns texts and forwards."""
    n, dev = len(prompts), run.device
    own = model.kind == "block"
    size = BLOCK if own else 32
    lens = torch.tensor([len(p) for p in prompts], device=dev)
    ends = lens + slot
    if own:
        ends = (ends + BLOCK - 1) // BLOCK * BLOCK
    length = int(ends.max())
    place = torch.arange(length, device=dev).expand(n, length)
    ids = torch.where((place >= lens[:, None]) & (place < ends[:, None]), MASK, EOS)
    for i, p in enumerate(prompts):
        ids[i, :len(p)] = torch.from_numpy(p)
    block = (place - (0 if own else lens[:, None])).clamp(min=0) // size
    valid = place < ends[:, None]
    # what lies behind a sample's end is in later blocks
    mask = (place[0, None, :] // BLOCK <= place[0, :, None] // BLOCK)[None, None] if own else valid[:, None, None, :]
    forwards = torch.zeros(n, device=dev)
    for _ in range(length):
        masked = ids == MASK
        first_mask = torch.where(masked, place, length).amin(1)
        first_end = torch.where((ids == EOS) & (place >= lens[:, None]) & valid, place, length).amin(1)
        running = (first_mask < length) & (first_end > first_mask)
        if not running.any():
            break
        forwards += running
        with run.autocast():
            logits = model.head(model(ids, place, mask))
        logits = logits.float()
        logits[..., MASK] = -1e9
        top, token = logits.max(-1)
        top = top - logits.logsumexp(-1)
        current = torch.where(masked, block, 1 << 30).amin(1)
        open_ = masked & (block == current[:, None])
        top = torch.where(open_, top, -1e9)
        pick = torch.zeros_like(masked).scatter(1, top.argmax(1, True), True)
        if threshold is not None:
            pick |= top > math.log(threshold)
        ids = torch.where(pick & open_ & running[:, None], token, ids)
    texts = []
    for i, p in enumerate(prompts):
        texts.append(ids[i, len(p):int(ends[i])].tolist())
    return texts, forwards.mean().item()


@torch.no_grad()
def held_out_loss(run, model, tasks):
    """Nats a token on held-out text: ar exact; diffusion the bound with m drawn uniformly."""
    t = min(512, CONTEXT)
    rows = min(24, len(tasks.held_out) // t)
    ids = torch.from_numpy(tasks.held_out[:rows * t].reshape(rows, t)).to(run.device)
    b = {"id": ids, "doc": torch.zeros_like(ids), "pos": torch.arange(t, device=run.device).expand(rows, t), "kind": torch.full_like(ids, 3),
         "branch": torch.zeros_like(ids), "task": torch.zeros_like(ids), "weight": torch.ones(rows, t, device=run.device)}
    torch.manual_seed(1)
    with run.autocast():
        b = prepare(b, model.kind)
        mask = plain_mask(b, model.kind)
        return sum(loss_of(model, b, mask, 0.0, 1)[0].item() for _ in range(1 if model.kind == "ar" else 8)) / (1 if model.kind == "ar" else 8)


def evaluate(run, model, tasks, seconds, samples):
    begin = time.time()
    results = [{"task": "text", "nats_a_token": round(held_out_loss(run, model, tasks), 4)}]
    context = run.args.length
    long_first = sorted(eval_list(tasks, model.kind, context), key=lambda e: tasks.info[tasks.names.index(e[0])].kind)
    for mode in (None, 0.9):
        for name, settings in long_first:
            if time.time() - begin > seconds:
                run.log(eval_stopped_after_s=round(time.time() - begin, 1))
                return results
            kind = tasks.info[tasks.names.index(name)].kind
            if mode is not None and (model.kind == "ar" or settings):
                continue
            pairs = [tasks.generate(name, s, **settings) for s in range(samples)]
            prompts = [tasks.encode(p) for p, _ in pairs]
            slot = (max(len(tasks.encode(a)) for _, a in pairs) + 1 + 31) // 32 * 32
            right, forwards, t0 = 0.0, [], time.time()
            order = sorted(range(samples), key=lambda i: len(prompts[i]))
            for at in range(0, samples, 128):
                chosen = order[at:at + 128]
                some = [prompts[i] for i in chosen]
                texts, f = decode_ar(run, model, some, slot) if model.kind == "ar" else decode_diffusion(run, model, some, slot, mode)
                forwards.append(f)
                for i, ids in zip(chosen, texts):
                    ids = ids[:ids.index(EOS)] if EOS in ids else ids
                    right += tasks.score(name, *pairs[i], tasks.decode(ids))
            mean = sum(len(tasks.encode(a)) + 1 for _, a in pairs) / samples
            r = {"model": model.kind, "task": name, **settings, "n": samples, "exact_match": round(right / samples, 4), "answer_tokens": round(mean, 1),
                 "prompt_tokens": round(sum(map(len, prompts)) / samples, 1), "slot": slot, "s": round(time.time() - t0, 2)}
            if model.kind != "ar":
                r |= {"threshold": mode, "nfe": round(sum(forwards) / len(forwards), 1)}
            results.append(r)
            run.log(eval=r)
    return results


# The run ---------------------------------------------------------------------------------------------------------------


class Run:
    def __init__(self, args):
        self.args = args
        self.rank, self.ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.device = torch.device(args.device or (f"cuda:{self.rank}" if torch.cuda.is_available() else "cpu"))
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.ranks > 1:
            torch.distributed.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        self.out = Path(args.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.file = open(self.out / "log.jsonl" if args.stage != "export" and self.rank == 0 else os.devnull, "a")
        torch.manual_seed(args.seed)
        torch.set_float32_matmul_precision("high")

    def log(self, **k):
        k = {"at_s": round(elapsed(), 1), **k}
        line = json.dumps(k)
        print(line, file=self.file, flush=True)
        if self.rank == 0:
            print(f"[{self.args.stage}] {line[:600]}", flush=True)

    def average(self, tensors):
        """In place, over the processes."""
        if self.ranks > 1:
            together = flat_here(tensors)
            torch.distributed.all_reduce(together)
            together /= self.ranks
            for t, part in zip(tensors, together.split([t.numel() for t in tensors])):
                t.copy_(part.view_as(t))

    def agree(self, value):
        """The value of process 0."""
        if self.ranks == 1:
            return value
        t = torch.tensor([float(value)], device=self.device)
        torch.distributed.broadcast(t, 0)
        return t.item()

    def autocast(self):
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.device.type == "cuda")


def choose_step(run, model, b, num_tasks):
    """The fastest way that works here: flex attention compiled, then plain attention with a mask, compiled or not. A way counts
    as working if its loss is that of the plain one."""
    args = run.args

    def loss(batch, mask):
        with run.autocast():
            return loss_of(model, batch, mask, args.suffix_part, num_tasks)

    def loss_at(f, batch):
        model.zero_grad(set_to_none=True)
        value, _ = f(prepare(batch, model.kind))
        value.backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        model.zero_grad(set_to_none=True)
        return value.item(), norm.item()

    def plain(batch):
        return loss(batch, plain_mask(batch, model.kind))

    def flex_inside():
        step = torch.compile(lambda batch: loss(batch, "flex"), dynamic=False)
        return step

    def flex_outside():
        step, make = torch.compile(loss, dynamic=False), torch.compile(flex_mask, dynamic=False)
        return lambda batch: step(batch, make(batch, model.kind))

    def compiled_plain():
        step = torch.compile(loss, dynamic=False)
        return lambda batch: step(batch, plain_mask(batch, model.kind))

    if run.device.type != "cuda" or args.no_compile:
        return plain, "plain"
    few = {n: t[:4] for n, t in b.items()}
    reference = [loss_at(plain, few) for _ in range(3)]
    low, high = min(r[0] for r in reference), max(r[0] for r in reference)
    for name, make in (("flex", flex_inside), ("flex, mask apart", flex_outside), ("compiled plain", compiled_plain)):
        try:
            step = make()
            t0 = time.time()
            loss_at(step, b)
            torch.cuda.synchronize()
            t1 = time.time()
            value, norm = loss_at(step, b)
            torch.cuda.synchronize()
            run.log(attention=name, compile_s=round(t1 - t0, 1), step_s=round(time.time() - t1, 4), loss=value, grad_norm=norm, plain_on_few_rows=reference)
            if not (math.isfinite(value) and math.isfinite(norm) and abs(value - (low + high) / 2) < 0.7 + 2 * (high - low)):
                run.log(warning=f"{name}: loss {value} against {low}..{high} plain; not used")
                continue
            return step, name
        except Exception as e:  # noqa: BLE001 - the next way is tried
            run.log(warning=f"{name} failed: {type(e).__name__}: {str(e)[-1500:]}")
            torch._dynamo.reset()
    return plain, "plain"


def train(run):
    args, kind = run.args, run.args.stage
    shape = dict(hidden=64, layers=2, heads=1 if kind != "ar" else 2, kv_heads=1, ffn=128, qk_norm=kind == "block") if args.smoke else SHAPE[kind]
    model = TextModel(kind, shape).to(run.device)
    tasks = Tasks(args.tokenizer, args.corpus)
    spent, steps, fail = 0.0, 0, None
    state = read_pieces(args.resume) if args.resume else None
    if state is not None:
        state.setdefault("weights", state["ema"].float())
    if state is not None and state["kind"] == kind:
        vector_to(model, state["weights"])
        spent, steps, fail = state["spent_s"], state["steps"], state["fail"]
    elif state is not None and kind == "block" and state["kind"] == "mdm":
        state["weights"] = state["ema"].float()
        start_block(model.cpu(), state)
        model.to(run.device)
    elif state is not None:
        raise SystemExit(f"--resume is a {state['kind']} checkpoint")
    torch.manual_seed(args.seed + 7919 * run.rank)  # what is masked
    opt = Optimizer(args.optimizer, model, args.decay)
    if state is not None and state["kind"] == kind:
        opt.steps = steps
        at = 0
        for e in opt.ema:
            e.copy_(state["ema"][at:at + e.numel()].view(e.shape))
            at += e.numel()
        if "second" in state and state["optimizer"] == args.optimizer:
            moments, at = [], 0
            for p, n in zip(opt.params, state["second_sizes"]):
                moments.append(state["second"][at:at + n] if n else None)
                at += n
            opt.load_second_moments(moments, steps)
    del state
    length = args.length // 2 if kind == "block" else args.length
    mix = Mix(tasks, kind, length, dict(args.share))
    if fail:
        mix.fail.update(fail)
    remaining = args.seconds - elapsed()
    total = spent + remaining if args.finish or not args.seconds_total else args.seconds_total
    mix.update(spent / total)
    threads = args.threads or max(1, min(14, ((os.cpu_count() or 2) - 2) // run.ranks))
    rows = max(1, args.tokens // args.length)
    feeder = Feeder(tasks, mix, rows, length, args.seed + steps + 500009 * run.rank, threads, run.device.type == "cuda")
    run.log(kind=kind, parameters=sum(p.numel() for p in model.parameters()), rows=rows, length=length, threads=threads, spent_s=spent, total_s=total,
            steps=steps, arguments=vars(args), hardware=torch.cuda.get_device_name() if run.device.type == "cuda" else "CPU", torch=torch.__version__)
    step_fn, way = choose_step(run, model, feeder.next(run.device), len(tasks.names))
    begin, first_step = time.time(), steps
    compiled = begin - START
    total = spent + args.seconds - compiled if args.finish or not args.seconds_total else args.seconds_total
    run.log(attention=way, training_starts_s=round(compiled, 1), total_s=total)
    sums = torch.zeros(2, len(tasks.names), device=run.device)
    losses, logged, saved, updated, bad, late = [], begin, begin, begin, 0, False

    def save():
        if run.rank > 0:
            return
        base = {"kind": kind, "shape": shape, "steps": steps, "spent_s": spent + time.time() - begin, "fail": mix.fail, "optimizer": args.optimizer,
                "ema": flat(opt.ema, torch.bfloat16)}
        second = opt.second_moments()
        full = {"weights": flat(opt.params, torch.float32), "second": flat([v for v in second if v is not None] or [torch.zeros(1)], torch.bfloat16),
                "second_sizes": [0 if v is None else v.numel() for v in second]}
        if args.work:
            write_pieces(base | full, Path(args.work))
        write_pieces(base | full if args.keep == "all" else base, run.out)

    while True:
        now = time.time()
        if steps % 10 == 0:
            late = run.agree(elapsed() > args.seconds) > 0
        if late or (args.max_steps and steps - first_step >= args.max_steps):
            break
        progress = min(1.0, (spent + now - begin) / total)
        annealed = (now - begin) / (total - spent) if args.restart else progress
        rate = run.agree(args.lr * min(1.0, (steps + 1) / args.warmup, (steps - first_step + 1) / 50) * (0.02 + 0.98 * (0.5 + 0.5 * math.cos(math.pi * min(1.0, annealed)))))
        loss, stats = step_fn(prepare(feeder.next(run.device), kind))
        for p in opt.params:
            p.grad = None
        loss.backward()
        run.average([p.grad for p in opt.params])
        norm = torch.nn.utils.clip_grad_norm_(opt.params, 1.0, foreach=True)
        opt.step(rate, args.ema)
        sums += stats
        losses.append(loss.detach())
        steps += 1
        if steps % 50 == 0 or args.smoke:
            mean = torch.stack(losses[-50:]).mean().item()
            if not math.isfinite(mean):
                bad += 1
                run.log(error="loss is not finite", step=steps, norm=norm.item())
                raise SystemExit("stopped: loss is not finite")
            if now - logged > 10 or args.smoke:
                right, n = sums.cpu().tolist()
                accuracy = {t: round(a / b, 4) for t, a, b in zip(tasks.names, right, n) if b > 0}
                for t, a in accuracy.items():
                    answer = 4 if kind == "ar" and t not in mix.lengths else max(2.0, mix.lengths.get(t, 20) / (3 if kind == "ar" else 2))
                    mix.fail[t] = 0.5 * mix.fail[t] + 0.5 * (1 - a ** answer)
                sums.zero_()
                seconds = max(1e-6, time.time() - logged)
                run.log(step=steps, progress=round(progress, 3), loss=round(mean, 4), norm=round(norm.item(), 3), rate=round(rate, 6),
                        tokens_s=round(len(losses) * rows * args.length * run.ranks / seconds), ready=feeder.ready.qsize(), accuracy=accuracy)
                losses, logged = [], time.time()
            if now - updated > 8 or args.smoke:
                mix.update(progress)
                updated = now
        if now - saved > args.save_every:
            save()
            saved = now
    save()
    feeder.stop()
    if run.ranks > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        if run.rank > 0:
            return
    run.log(trained_s=round(time.time() - begin, 1), steps=steps, checkpoint=str(run.out))
    vector_to(model, flat(opt.ema, torch.bfloat16).float())  # as it is shipped
    if args.finish and args.folder:
        write_folder(model, list(model.parameters()), Path(args.folder), Path(args.tokenizer).parent)
    finish_eval(run, model, tasks)


def finish_eval(run, model, tasks):
    args = run.args
    if args.eval_seconds <= 0:
        return
    results = evaluate(run, model, tasks, args.eval_seconds, args.samples)
    run.log(results=results)
    for r in results:
        if "exact_match" in r:
            note = f" nfe {r['nfe']:6.1f} at {r['threshold']}" if "nfe" in r else ""
            print(f"{r['model']:6s} {r['task']:10s} size {r.get('size', r.get('length', '-'))!s:6s} {'aware' if r.get('aware') else '':6s} "
                  f"answer {r['answer_tokens']:6.1f} exact {r['exact_match']:.3f}{note}", flush=True)
        else:
            print(r, flush=True)


def task_share(text):
    name, share = text.split("=")
    return name, float(share)


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    ap.add_argument("stage", choices=[*KINDS, "eval", "export"])
    ap.add_argument("--out", required=True)
    ap.add_argument("--resume", help="folder with checkpoint.pt.NN")
    ap.add_argument("--model", help="eval: a model folder")
    ap.add_argument("--seconds", type=float, default=540.0, help="until training ends, start included; default %(default)s")
    ap.add_argument("--seconds-total", type=float, default=0.0, help="of training over all commands; default: this one alone")
    ap.add_argument("--finish", action="store_true", help="anneal to the end of this command and write the model folder")
    ap.add_argument("--restart", action="store_true", help="the rate anneals over this command, from its start")
    ap.add_argument("--share", type=task_share, action="append", default=[], metavar="TASK=SHARE", help="another share of the tokens")
    ap.add_argument("--eval-seconds", type=float, default=60.0, help="0: none; default %(default)s")
    ap.add_argument("--samples", type=int, default=128, help="of each task, evaluated; default %(default)s")
    ap.add_argument("--tokens", type=int, default=65536, help="in a step; default %(default)s")
    ap.add_argument("--length", type=int, default=CONTEXT, help="of a row; the block twin's holds two copies; default %(default)s")
    ap.add_argument("--optimizer", choices=["adamw", "muon"], default="adamw")
    ap.add_argument("--lr", type=float, default=1.5e-3)
    ap.add_argument("--decay", type=float, default=0.01)
    ap.add_argument("--warmup", type=int, default=300)
    ap.add_argument("--ema", type=float, default=0.999)
    ap.add_argument("--suffix-part", type=float, default=0.35, help="mdm: samples masked as in semi-autoregressive decoding; default %(default)s")
    ap.add_argument("--work", help="folder for the whole state of training, for --resume on the same machine (4 pieces)")
    ap.add_argument("--keep", choices=["average", "all"], default="average", help="what OUT gets; default %(default)s")
    ap.add_argument("--folder", help="model folder to write with --finish")
    ap.add_argument("--save-every", type=float, default=60.0)
    ap.add_argument("--max-steps", type=int, default=0)
    ap.add_argument("--threads", type=int, default=0, help="that make samples; default: the cores less two, 14 at most")
    ap.add_argument("--device", help="default: cuda where there is one")
    ap.add_argument("--no-compile", action="store_true")
    ap.add_argument("--corpus", help="plain ASCII text; default: tinyshakespeare.txt here, or in shared/data of or beside the repository")
    ap.add_argument("--tokenizer", default=str(ROOT / "samples" / "models" / "text" / "tokenizer.json"))
    ap.add_argument("--seed", type=int, default=1)
    ap.add_argument("--smoke", action="store_true", help="a few tiny steps")
    args = ap.parse_args()
    if args.smoke:
        args.tokens, args.length, args.samples = 4096, 1024, 4
        args.max_steps = args.max_steps or 5
    if not args.corpus:
        places = [HERE / "tinyshakespeare.txt", ROOT / "shared" / "data" / "tinyshakespeare.txt", ROOT.parent / "shared" / "data" / "tinyshakespeare.txt"]
        args.corpus = next((str(p) for p in places if p.exists()), None)
        if not args.corpus:
            raise SystemExit("no corpus: name one with --corpus")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(tempfile.gettempdir()) / "train-text-inductor"))
    run = Run(args)
    if args.stage in KINDS:
        train(run)
    elif args.stage == "eval":
        model = read_folder(args.model).to(run.device)
        finish_eval(run, model, Tasks(args.tokenizer, args.corpus))
    else:
        state = read_pieces(args.resume)
        model = TextModel(state["kind"], dict(state["shape"]))
        vector_to(model, state["ema"].float())
        write_folder(model, list(model.parameters()), run.out, Path(args.tokenizer).parent)


if __name__ == "__main__":
    main()
