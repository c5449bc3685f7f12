"""Text models in plain PyTorch: causal, bidirectional and block-causal transformers, and the decoders that go with them.

Source   LLaDA (Nie et al. 2025), Dream (Ye et al. 2025), SDAR (Cheng et al. 2025); layer as in Llama, Qwen2 and Qwen3. Written for
         this project. One sequence at a time, every pass over the whole sequence, nothing cached.
Symbols  L rows, V vocabulary, P prompt length, G new tokens, B block, S steps, M masked positions. Positions are absolute, from 0.
Pitfalls Dream's row p - 1 predicts position p (row 0 predicts itself); LLaDA's and SDAR's row p predicts p. SDAR's blocks are aligned
         to position 0, so the first block that is decoded may begin with the prompt's tail. LLaDA keeps a head of embedding_size rows:
         rows past vocab_size are dropped here. ff_out is LLaDA's head outside the blocks and its down-projection inside.
Types    weights and activations in `dtype`, norms and softmax in f32 at least; rotary angles are f32 whatever the dtype, as in the
         released codes. Confidences are f64. Ties go to the lowest id, then to the lowest position.
"""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F


@dataclass
class Config:
    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    theta: float
    attention: str  # "causal", "bidirectional", "block"
    shift: int  # row p - shift predicts position p
    qkv_bias: bool = False
    qk_norm: bool = False
    tied: bool = False
    scaling: dict = field(default_factory=dict)  # llama3: factor, low_freq_factor, high_freq_factor, original_max_position_embeddings
    block: int = 0
    mask: int = -1


def read_config(c):
    """Config of the dictionary in a config.json."""
    if c["model_type"] == "llada":
        heads = c["n_heads"]
        return Config(
            c["vocab_size"], c["d_model"], c["n_layers"], heads, c["n_kv_heads"] or heads, c["d_model"] // heads,
            c["rms_norm_eps"], c["rope_theta"], "bidirectional", 0, tied=c["weight_tying"], mask=c["mask_token_id"],
            qkv_bias=c["include_qkv_bias"])
    rope = c.get("rope_parameters") or {"rope_theta": c["rope_theta"], **(c.get("rope_scaling") or {})}
    heads = c["num_attention_heads"]
    kind = c["model_type"]
    return Config(
        c["vocab_size"], c["hidden_size"], c["num_hidden_layers"], heads, c["num_key_value_heads"],
        c.get("head_dim") or c["hidden_size"] // heads, c["rms_norm_eps"], rope["rope_theta"],
        {"Dream": "bidirectional", "sdar": "block"}.get(kind, "causal"), 0 if kind == "sdar" else 1,
        qkv_bias=kind in ("qwen2", "Dream"), qk_norm=kind in ("qwen3", "sdar"), tied=c["tie_word_embeddings"],
        scaling=rope if rope.get("rope_type", "default") == "llama3" else {}, block=c.get("block_size", 0),
        mask=c.get("mask_token_id", -1))


HF_NAMES = {
    "embedding": "model.embed_tokens", "head": "lm_head", "final_norm": "model.norm", "layer": "model.layers",
    "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "q": "self_attn.q_proj",
    "k": "self_attn.k_proj", "v": "self_attn.v_proj", "out": "self_attn.o_proj", "gate": "mlp.gate_proj",
    "up": "mlp.up_proj", "down": "mlp.down_proj", "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm",
}
LLADA_NAMES = {
    "embedding": "model.transformer.wte", "head": "model.transformer.ff_out", "final_norm": "model.transformer.ln_f",
    "layer": "model.transformer.blocks", "attention_norm": "attn_norm", "ffn_norm": "ff_norm", "q": "q_proj",
    "k": "k_proj", "v": "v_proj", "out": "attn_out", "gate": "ff_proj", "up": "up_proj", "down": "ff_out",
}


# The model ------------------------------------------------------------------------------------------


def inverse_frequencies(config):
    """[head_dim/2] f32. Llama 3.1: wavelengths above original/low are divided by factor, below original/high kept, between blended."""
    j = torch.arange(0, config.head_dim, 2, dtype=torch.float32)
    inv = 1.0 / (config.theta ** (j / config.head_dim))
    s = config.scaling
    if not s:
        return inv
    original, low, high = s["original_max_position_embeddings"], s["low_freq_factor"], s["high_freq_factor"]
    wavelength = 2 * math.pi / inv
    blend = ((original / wavelength - low) / (high - low)).clamp(0, 1)  # 0: long, 1: short
    mixed = (1 - blend) * inv / s["factor"] + blend * inv
    return torch.where(wavelength < original / high, inv, torch.where(wavelength > original / low, inv / s["factor"], mixed))


def rotary(config, positions):
    """cos, sin [L, head_dim/2] f32."""
    angles = positions.float()[:, None] * inverse_frequencies(config)
    return angles.cos(), angles.sin()


def turn(x, cos, sin):
    """x [L, heads, D]: element j turns with element j + D/2."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


def rms_norm(x, weight, eps):
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype) * weight


def visible(config, length):
    """[L, L] bool: may row i see row j."""
    i, j = torch.arange(length)[:, None], torch.arange(length)[None]
    if config.attention == "causal":
        return j <= i
    if config.attention == "block":
        return j // config.block <= i // config.block
    return torch.ones(length, length, dtype=torch.bool)


class TextModel:
    """weights: names of the file -> tensors."""

    def __init__(self, config, weights, dtype=torch.float32):
        self.config, self.dtype = config, dtype
        names = LLADA_NAMES if LLADA_NAMES["embedding"] + ".weight" in weights else HF_NAMES

        def get(role, layer=None, kind="weight"):
            prefix = "" if layer is None else f"{names['layer']}.{layer}."
            return weights[f"{prefix}{names[role]}.{kind}"].to(dtype)

        self.embedding = get("embedding")[: config.vocab]
        self.head = self.embedding if config.tied else get("head")[: config.vocab]
        self.final_norm = get("final_norm")
        self.layers = []
        for i in range(config.layers):
            w = {r: get(r, i) for r in ("attention_norm", "ffn_norm", "q", "k", "v", "out", "gate", "up", "down")}
            for r in ("q", "k", "v"):
                w[r + "_bias"] = get(r, i, "bias") if config.qkv_bias else None
            for r in ("q_norm", "k_norm"):
                w[r] = get(r, i) if config.qk_norm else None
            self.layers.append(w)

    def attention(self, w, x, cos, sin, mask):
        c, rows = self.config, x.shape[0]
        q = F.linear(x, w["q"], w["q_bias"]).view(rows, c.heads, c.head_dim)
        k = F.linear(x, w["k"], w["k_bias"]).view(rows, c.kv_heads, c.head_dim)
        v = F.linear(x, w["v"], w["v_bias"]).view(rows, c.kv_heads, c.head_dim)
        if c.qk_norm:  # over each head, before the turn
            q, k = rms_norm(q, w["q_norm"], c.eps), rms_norm(k, w["k_norm"], c.eps)
        q, k = turn(q, cos, sin), turn(k, cos, sin)
        group = c.heads // c.kv_heads
        k, v = k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)
        scores = torch.einsum("ihd,jhd->hij", q, k) / math.sqrt(c.head_dim)
        p = scores.masked_fill(~mask, -math.inf).softmax(dim=-1)
        return F.linear(torch.einsum("hij,jhd->ihd", p, v).reshape(rows, -1), w["out"])

    @torch.no_grad()
    def hidden(self, tokens):
        """tokens [L]. The residual stream after each layer [L, d], and the final norm of the last."""
        c = self.config
        cos, sin = rotary(c, torch.arange(len(tokens)))
        mask = visible(c, len(tokens))
        x = self.embedding[torch.as_tensor(tokens)]
        layers = []
        for w in self.layers:
            x = x + self.attention(w, rms_norm(x, w["attention_norm"], c.eps), cos, sin, mask)
            n = rms_norm(x, w["ffn_norm"], c.eps)
            x = x + F.linear(F.silu(F.linear(n, w["gate"])) * F.linear(n, w["up"]), w["down"])
            layers.append(x)
        return layers, rms_norm(x, self.final_norm, c.eps)

    @torch.no_grad()
    def logits(self, tokens):
        """[L, V], row i as the network gives it."""
        return F.linear(self.hidden(tokens)[1], self.head)

    def predictions(self, tokens):
        """[L, V]: row p is for position p. Models of shift 0, and Dream's shift."""
        z = self.logits(tokens)
        return z if self.config.shift == 0 else torch.cat([z[:1], z[:-1]])


def load(folder, dtype=torch.float32):
    from safetensors.torch import load_file

    weights = {}
    for path in sorted(Path(folder).glob("*.safetensors")):
        weights.update(load_file(path))
    return TextModel(read_config(json.loads((Path(folder) / "config.json").read_text())), weights, dtype)


# Choosing -------------------------------------------------------------------------------------------


class Decode:
    """A canvas filling in: what every pass committed, and how near any of its decisions was to another (`margin`, of
    confidences; `gap`, of the two best logits of a committed row)."""

    def __init__(self, canvas, mask):
        self.canvas, self.mask = list(canvas), mask
        self.passes = []  # [(position, token), ...] each
        self.margin = self.gap = math.inf

    def masked(self, begin=0, end=None):
        end = len(self.canvas) if end is None else end
        return [i for i in range(begin, end) if self.canvas[i] == self.mask]

    def commit(self, picks):
        for position, token in picks:
            self.canvas[position] = token
        self.passes.append(list(picks))

    def near(self, a, b):
        self.margin = min(self.margin, abs(a - b))

    def note_gaps(self, rows, positions):
        for i in positions:
            best = rows[i].topk(2).values
            self.gap = min(self.gap, (best[0] - best[1]).item())


class Row:
    """Statistics of one position: p = softmax(z) in f64."""

    def __init__(self, z):
        p = z.double().softmax(-1)
        best = p.topk(2).values
        self.token = int(z.argmax())
        self.prob = best[0].item()
        self.margin = (best[0] - best[1]).item()
        self.entropy = -(p * (p + 1e-10).log()).sum().item()


def confidence_of(row, kind):
    return {"prob": row.prob, "margin": row.margin, "neg_entropy": -row.entropy}[kind]


def take_best(run, scored, count):
    """The `count` surest of [(confidence, position, token)]."""
    order = sorted(scored, key=lambda s: (-s[0], s[1]))
    count = min(count, len(order))
    if 0 < count < len(order):
        run.near(order[count - 1][0], order[count][0])
    return order[:count]


def by_rule(run, scored, entropies, rule, count, options):
    """The commit rules on [(confidence, position, token)]: which go. entropies: position -> nats."""
    order = sorted(scored, key=lambda s: (-s[0], s[1]))
    if rule == "topn":
        return take_best(run, scored, count)
    if rule == "threshold":  # the best, and all that are sure enough
        for s in scored:
            run.near(s[0], options["threshold"])
        return [s for n, s in enumerate(order) if n == 0 or s[0] >= options["threshold"]]
    if rule == "dynamic":  # all above the threshold if they are at least `count`, else the `count` best
        for s in scored:
            run.near(s[0], options["threshold"])
        sure = [s for s in order if s[0] > options["threshold"]]
        return sure if len(sure) >= count else take_best(run, scored, count)
    if rule == "factor":  # the largest n with (n + 1)(1 - c_n) < f
        n = 1
        for i, s in enumerate(order, 1):
            run.near((i + 1) * (1 - s[0]), options["factor"])
            if (i + 1) * (1 - s[0]) < options["factor"]:
                n = i
        return take_best(run, scored, n)
    if rule == "entropy_bound":  # the longest prefix by entropy with sum - max <= bound
        order = sorted(scored, key=lambda s: (entropies[s[1]], s[1]))
        total, n = 0.0, 0
        for s in order:
            if n:
                run.near(total, options["bound"])
            if n and total > options["bound"]:
                break
            total += entropies[s[1]]
            n += 1
        if n < len(order):
            run.near(entropies[order[n - 1][1]], entropies[order[n][1]])
        return order[:n]
    if rule == "sequential":
        return sorted(scored, key=lambda s: s[1])[:count]
    raise ValueError(rule)


def share(masks, steps, t):
    return masks // steps + (1 if t < masks % steps else 0)


# Decoders, all greedy -------------------------------------------------------------------------------


def greedy(model, prompt, count):
    """Autoregressive. Returns a Decode whose passes have one token each."""
    run = Decode(prompt, None)
    for _ in range(count):
        z = model.logits(run.canvas)[-1]
        best = z.topk(2).values
        run.gap = min(run.gap, (best[0] - best[1]).item())
        run.canvas.append(int(z.argmax()))
        run.passes.append([(len(run.canvas) - 1, run.canvas[-1])])
    return run


def llada(model, prompt, length, block, steps, cfg=0.0, rule="topn", **options):
    """LLaDA's generate with low-confidence remasking. steps: over all blocks (topn); other rules go on until the block is full."""
    mask = model.config.mask
    run = Decode(list(prompt) + [mask] * length, mask)
    blocks = length // block
    assert length % block == 0 and steps % blocks == 0
    for b in range(blocks):
        begin = len(prompt) + b * block
        end = begin + block
        masks, t = len(run.masked(begin, end)), 0
        while run.masked(begin, end):
            z = model.predictions(run.canvas)
            if cfg:
                unconditional = model.predictions([mask] * len(prompt) + run.canvas[len(prompt):])
                z = unconditional + (cfg + 1) * (z - unconditional)
            rows = {i: Row(z[i]) for i in run.masked(0, end)}
            scored = [(r.prob, i, r.token) for i, r in rows.items()]
            picks = by_rule(run, scored, {i: r.entropy for i, r in rows.items()}, rule,
                            share(masks, steps // blocks, t), options)
            run.note_gaps(z, [p[1] for p in picks])
            run.commit([(i, token) for _, i, token in picks])
            t += 1
    return run


DREAM_CONFIDENCE = {"maskgit_plus": "prob", "topk_margin": "margin", "entropy": "neg_entropy"}


def dream(model, prompt, length, steps, alg, eps=1e-3, seed=0):
    """Dream's diffusion_generate at temperature 0, alg_temp 0. `origin` draws from uniform(seed, 2, step, position)."""
    mask = model.config.mask
    run = Decode(list(prompt) + [mask] * length, mask)
    times = [1 + (eps - 1) * k / steps for k in range(steps + 1)]
    for i in range(steps):
        masked = run.masked()
        z = model.predictions(run.canvas)
        ratio = 1 - times[i + 1] / times[i] if i < steps - 1 else 1.0
        if alg == "origin":
            draws = {p: uniform(seed, 2, i, p) for p in masked}
            for u in draws.values():
                if ratio < 1:
                    run.near(u, ratio)
            picks = [p for p in masked if ratio >= 1 or draws[p] < ratio]
            run.note_gaps(z, picks)
            run.commit([(p, int(z[p].argmax())) for p in picks])
            continue
        count = math.floor(len(masked) * ratio) if i < steps - 1 else len(masked)
        if i < steps - 1:  # floor must not hang on the last bit
            run.near(len(masked) * ratio, round(len(masked) * ratio))
        rows = {p: Row(z[p]) for p in masked}
        scored = [(confidence_of(r, DREAM_CONFIDENCE[alg]), p, r.token) for p, r in rows.items()]
        picks = take_best(run, scored, count)
        run.note_gaps(z, [p[1] for p in picks])
        run.commit([(p, token) for _, p, token in picks])
    return run


def sdar(model, prompt, length, steps, rule, **options):
    """SDAR's block_diffusion_generate: `steps` for each block, rule topn (low_confidence_static), dynamic or sequential. The
    canvas is whole blocks, so it may end behind P + G. Passes that only store keys and values choose nothing and are not listed. A
    count larger than the masks left takes them all (the released code's top-k would reach for fixed positions then)."""
    mask, block = model.config.mask, model.config.block
    total = -(-(len(prompt) + length) // block) * block
    run = Decode(list(prompt) + [mask] * (total - len(prompt)), mask)
    for begin in range(len(prompt) // block * block, total, block):
        end, t = begin + block, 0
        while run.masked(begin, end):
            z = model.predictions(run.canvas[:end])
            rows = {i: Row(z[i]) for i in run.masked(begin, end)}
            scored = [(r.prob, i, r.token) for i, r in rows.items()]
            entropies = {i: r.entropy for i, r in rows.items()}
            picks = by_rule(run, scored, entropies, rule, share(block, steps, t), options)
            run.note_gaps(z, [p[1] for p in picks])
            run.commit([(i, token) for _, i, token in picks])
            t += 1
    return run


# Draws ----------------------------------------------------------------------------------------------


def philox(counter, key):
    """Philox4x32-10 (Salmon et al. 2011): four words and a key of two to four words."""
    c, k = list(counter), list(key)
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(b >> 32) ^ c[1] ^ k[0], b & 0xFFFFFFFF, (a >> 32) ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return c


def uniform(seed, stream, step, position):
    """In (0, 1), of (seed, stream, step, position) alone."""
    word = philox((0, position, step, stream), (seed & 0xFFFFFFFF, seed >> 32))[0]
    return (word + 0.5) / 4294967296.0
