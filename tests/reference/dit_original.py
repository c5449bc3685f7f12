"""DiT with the parameter names and the numerics of the original release, for parity fixtures only.

Source   Peebles & Xie 2022, arXiv 2212.09748; names and constants as in facebookresearch/DiT. Written for this project.
Symbols  B batch, C latent channels, G grid side (input_size / patch_size), N = G*G tokens, D hidden_size, H heads.
Differs from diffusers' DiTTransformer2DModel in exactly two numbers, both arguments here so that a test can bridge
the two: the denominator of the timestep frequencies (`freq_shift` 0 here, 1 there) and the epsilon of the norm in
front of the MLP (`mlp_norm_eps` 1e-6 here, 1e-5 there).
Pitfalls final layer chunks (shift, scale); the first half of the position table encodes the column, the second the
row; tokens are unpatchified as (row, col, channel) although the input side is (channel, row, col).
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


def sincos_1d(dim, pos):
    """[len(pos), dim] f64: sines then cosines of pos * 10000^(-i / (dim/2))."""
    omega = 10000.0 ** (-np.arange(dim // 2, dtype=np.float64) / (dim / 2))
    angle = np.outer(pos.reshape(-1).astype(np.float64), omega)
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)


def sincos_2d(dim, grid):
    """[grid*grid, dim] f32, row-major tokens: column code in the first half, row code in the second."""
    rows, cols = np.meshgrid(np.arange(grid), np.arange(grid), indexing="ij")
    table = np.concatenate([sincos_1d(dim // 2, cols), sincos_1d(dim // 2, rows)], axis=1)
    return torch.from_numpy(table).float()


def timestep_frequencies(t, dim, freq_shift):
    """[B, dim]: cosines first, then sines, of t * 10000^(-i / (dim/2 - freq_shift)). t [B], any real, not rescaled."""
    half = dim // 2
    freqs = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32) / (half - freq_shift))
    angle = t[:, None].float() * freqs[None]
    return torch.cat([torch.cos(angle), torch.sin(angle)], dim=1)


def modulate(x, shift, scale):
    return x * (1 + scale[:, None]) + shift[:, None]


class PatchEmbedder(nn.Module):
    def __init__(self, patch_size, in_channels, hidden_size):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    FREQ_DIM = 256

    def __init__(self, hidden_size, freq_shift):
        super().__init__()
        self.freq_shift = freq_shift
        self.mlp = nn.Sequential(
            nn.Linear(self.FREQ_DIM, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, t):
        freqs = timestep_frequencies(t, self.FREQ_DIM, self.freq_shift)
        return self.mlp(freqs.to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    def __init__(self, num_classes, hidden_size):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, hidden_size)  # last row: the null class

    def forward(self, labels):
        return self.embedding_table(labels)


class Attention(nn.Module):
    def __init__(self, hidden_size, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x):
        b, n, d = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.num_heads, d // self.num_heads).permute(2, 0, 3, 1, 4)
        weights = torch.softmax((q @ k.transpose(-2, -1)) * (d // self.num_heads) ** -0.5, dim=-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(b, n, d))


class Mlp(nn.Module):
    def __init__(self, hidden_size, mlp_ratio):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, int(hidden_size * mlp_ratio))
        self.fc2 = nn.Linear(int(hidden_size * mlp_ratio), hidden_size)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, hidden_size, num_heads, mlp_ratio, mlp_norm_eps):
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=mlp_norm_eps)
        self.mlp = Mlp(hidden_size, mlp_ratio)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attn(modulate(self.norm1(x), shift1, scale1))
        return x + gate2[:, None] * self.mlp(modulate(self.norm2(x), shift2, scale2))


class FinalLayer(nn.Module):
    def __init__(self, hidden_size, patch_size, out_channels):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(nn.Module):
    def __init__(self, input_size=32, patch_size=2, in_channels=4, hidden_size=1152, depth=28, num_heads=16,
                 mlp_ratio=4.0, num_classes=1000, learn_sigma=True, freq_shift=0, mlp_norm_eps=1e-6):
        super().__init__()
        self.patch_size = patch_size
        self.out_channels = in_channels * (2 if learn_sigma else 1)
        self.x_embedder = PatchEmbedder(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size, freq_shift)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        # A parameter, not a buffer computed on load: released checkpoints carry the key `pos_embed`.
        table = sincos_2d(hidden_size, input_size // patch_size)[None]
        self.pos_embed = nn.Parameter(table, requires_grad=False)
        self.blocks = nn.ModuleList(
            [Block(hidden_size, num_heads, mlp_ratio, mlp_norm_eps) for _ in range(depth)]
        )
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels)

    def unpatchify(self, x):
        """[B, N, p*p*C] -> [B, C, G*p, G*p]; the last axis is (row in patch, column in patch, channel)."""
        b, n, _ = x.shape
        g, p = math.isqrt(n), self.patch_size
        x = x.view(b, g, g, p, p, self.out_channels)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(b, self.out_channels, g * p, g * p)

    def condition(self, t, labels):
        return self.t_embedder(t) + self.y_embedder(labels)

    def forward(self, x, t, labels):
        """x [B, C, S, S]; t [B] in 0..999, fractions allowed; labels [B] int64. Returns [B, 2C, S, S]: eps | variance."""
        c = self.condition(t, labels)
        x = self.x_embedder(x) + self.pos_embed
        for block in self.blocks:
            x = block(x, c)
        return self.unpatchify(self.final_layer(x, c))

    def forward_with_cfg(self, x, t, labels, guidance_scale):
        """Batch is [cond, uncond]; both halves of x are replaced by the first half. Guidance mixes the first three
        channels only; channel 3 of eps and the variance channels stay those of their own branch."""
        half = x[: len(x) // 2]
        out = self.forward(torch.cat([half, half]), t, labels)
        eps, rest = out[:, :3], out[:, 3:]
        cond, uncond = eps.chunk(2)
        mixed = uncond + guidance_scale * (cond - uncond)
        return torch.cat([torch.cat([mixed, mixed]), rest], dim=1)
