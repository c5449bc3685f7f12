"""A DiT (diffusers' DiTTransformer2DModel, ada_norm_zero) as plain functions of one image, cut where caching
policies cut it.

Source   Peebles & Xie 2022, arXiv 2212.09748; weights and numerics as diffusers stores and runs them.
Symbols  G branches (rows of `labels`: conditional, unconditional), N tokens, D width. Activations are [G, N, D].
A block has two parts, "self" and "mlp"; `part` returns a part's output BEFORE its gate, the caller adds gate * output.
Token columns of model input and output are ordered (channel, row in patch, column in patch).
"""

import json
import math
from pathlib import Path

import torch
from safetensors.torch import load_file

from dit_original import sincos_2d, timestep_frequencies

PARTS = ("self", "mlp")


def layer_norm(x, eps):
    mean = x.mean(-1, keepdim=True)
    var = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / torch.sqrt(var + eps)


def silu(x):
    return x / (1 + torch.exp(-x))


def gelu_tanh(x):
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


class Net:
    def __init__(self, folder, dtype):
        folder = Path(folder)
        self.dtype = dtype
        self.config = json.loads((folder / "config.json").read_text())
        weights = {}
        for file in sorted(folder.glob("*.safetensors")):
            weights.update(load_file(str(file)))
        self.w = {k: v.to(dtype) for k, v in weights.items()}
        c = self.config
        self.num_heads, self.patch = c["num_attention_heads"], c["patch_size"]
        self.width = c["num_attention_heads"] * c["attention_head_dim"]
        self.num_blocks, self.channels, self.out_channels = c["num_layers"], c["in_channels"], c["out_channels"]
        self.grid = c["sample_size"] // self.patch
        self.tokens = self.grid**2
        self.null_class = c["num_embeds_ada_norm"]
        self.pos = sincos_2d(self.width, self.grid).to(dtype)

    def linear(self, name, x):
        return x @ self.w[f"{name}.weight"].T + self.w[f"{name}.bias"]

    def patchify(self, x):
        """[C, S, S] -> [N, C*p*p]"""
        c, g, p = x.shape[0], self.grid, self.patch
        return x.reshape(c, g, p, g, p).permute(1, 3, 0, 2, 4).reshape(g * g, c * p * p)

    def unpatchify(self, rows):
        """[N, C*p*p] -> [C, S, S]"""
        g, p = self.grid, self.patch
        c = rows.shape[-1] // (p * p)
        return rows.reshape(g, g, c, p, p).permute(2, 0, 3, 1, 4).reshape(c, g * p, g * p)

    def embed(self, rows, branches):
        """Model input [N, C*p*p] -> hidden state before block 0 [G, N, D]"""
        kernel = self.w["pos_embed.proj.weight"].reshape(self.width, -1)
        x = rows @ kernel.T + self.w["pos_embed.proj.bias"] + self.pos
        return x.expand(branches, *x.shape).clone()

    def time_embedding(self, t):
        """[D] of timestep t alone"""
        emb = "transformer_blocks.0.norm1.emb.timestep_embedder"
        freqs = timestep_frequencies(torch.tensor([float(t)]), 256, 1)[0].to(self.dtype)
        return self.linear(f"{emb}.linear_2", silu(self.linear(f"{emb}.linear_1", freqs)))

    def condition(self, t, labels):
        """[G, D]: timestep plus label embedding"""
        table = self.w["transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"]
        return self.time_embedding(t) + table[torch.tensor(labels)]

    def modulation(self, block, c):
        """shift, scale, gate of "self" and "mlp", each [G, 1, D]"""
        m = self.linear(f"transformer_blocks.{block}.norm1.linear", silu(c))[:, None]
        m = m.chunk(6, dim=-1)
        return {"self": m[:3], "mlp": m[3:]}

    def modulated(self, part, x, mod):
        shift, scale, _gate = mod[part]
        eps = 1e-6 if part == "self" else self.config["norm_eps"]
        return layer_norm(x, eps) * (1 + scale) + shift

    def qkv(self, block, h):
        """[G, n, D] -> q, k, v, each [G, heads, n, d]"""
        name = f"transformer_blocks.{block}.attn1.to_"
        g, n, _ = h.shape
        return [self.linear(name + which, h).reshape(g, n, self.num_heads, -1).transpose(1, 2) for which in "qkv"]

    def attend(self, block, q, k, v):
        """Returns the output after the projection [G, n, D], and the attention map [G, heads, n, kv]"""
        weights = torch.softmax(q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1]), dim=-1)
        g, _, n, _ = q.shape
        y = (weights @ v).transpose(1, 2).reshape(g, n, self.width)
        return self.linear(f"transformer_blocks.{block}.attn1.to_out.0", y), weights

    def mlp(self, block, h):
        name = f"transformer_blocks.{block}.ff.net"
        return self.linear(f"{name}.2", gelu_tanh(self.linear(f"{name}.0.proj", h)))

    def part(self, block, part, x, mod):
        h = self.modulated(part, x, mod)
        return self.mlp(block, h) if part == "mlp" else self.attend(block, *self.qkv(block, h))[0]

    def final(self, x, c):
        """[G, N, D] -> model output [G, N, out_channels*p*p], columns (channel, row, column)"""
        shift, scale = self.linear("proj_out_1", silu(c))[:, None].chunk(2, dim=-1)
        y = self.linear("proj_out_2", layer_norm(x, 1e-6) * (1 + scale) + shift)
        g, p = len(x), self.patch  # the layer's own column order is (row, column, channel)
        return y.reshape(g, -1, p, p, self.out_channels).permute(0, 1, 4, 2, 3).reshape(g, self.tokens, -1)


class Ddim:
    """DDIM, eta 0, epsilon, spacing "leading", linear betas (Song et al. 2021); x' from x and the guided output."""

    def __init__(self, config, num_steps):
        n = config["num_train_timesteps"]
        assert config["timestep_spacing"] == "leading" and config["beta_schedule"] == "linear"
        assert not config["clip_sample"]
        # f32, as in diffusers
        alphas = torch.cumprod(1 - torch.linspace(config["beta_start"], config["beta_end"], n), dim=0)
        self.timesteps = [(num_steps - 1 - i) * (n // num_steps) + config["steps_offset"] for i in range(num_steps)]
        self.alpha = [float(alphas[t]) for t in self.timesteps]
        self.alpha_next = [float(alphas[t - n // num_steps]) if t >= n // num_steps else 1.0 for t in self.timesteps]

    def step(self, s, x, eps):
        a, b = self.alpha[s], self.alpha_next[s]
        x0 = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
        return math.sqrt(b) * x0 + math.sqrt(1 - b) * eps
