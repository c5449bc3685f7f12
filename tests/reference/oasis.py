"""The open-oasis world model: space-time DiT, ViT autoencoder, noise schedule and rollout, for fixtures and training.

Source   "Oasis: a universe in a transformer" (Decart and Etched 2024), names and constants as in etched-ai/open-oasis
         f59deef. Written for this project. Rotary frequencies are computed, not stored.
Symbols  B batch, T frames of a window, C latent channels, [H, W] latent grid, N = (H/p)*(W/p) tokens of a frame,
         row-major, D hidden_size, A actions, P prompt frames.
Pitfalls modulation and timestep are per frame; chunks (shift, scale, gate) twice, in the final layer (shift, scale);
         to_qkv has no bias, to_out has; the DiT's tokens are unpatchified as (row, col, channel), the VAE's as
         (channel, row, col), both patchified as (channel, row, col); the VAE rotates only the first half of each head;
         the DiT's GELU is the tanh form, the VAE's the exact one; angles are f32 products of f32 frequencies and f32
         positions, and up to 128*pi (DiT), so their rounding shows.
Types    parameters stay f32 (f64 for a check), lower precision through autocast: `.bfloat16()` would round the angles.
"""

import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

SCALING_FACTOR_500M = 0.07843137255  # latents of the released autoencoder are multiplied by it
NOISE_ABS_MAX = 20.0


# Rotary embedding ---------------------------------------------------------------------------------


def axial_angles(rows, cols, count, max_freq):
    """[rows*cols, 2*count] f32: `count` angles of the row, then of the column. Positions span -1..1 on each axis."""
    freqs = torch.linspace(1.0, max_freq / 2, count) * math.pi
    row = torch.linspace(-1, 1, rows)[:, None] * freqs
    col = torch.linspace(-1, 1, cols)[:, None] * freqs
    both = torch.cat([row[:, None].expand(-1, cols, -1), col[None].expand(rows, -1, -1)], dim=-1)
    return both.reshape(rows * cols, 2 * count)


def frame_angles(frames, head_dim):
    """[frames, head_dim/2] f32: frame index in the window * 10000^(-2i/head_dim)."""
    freqs = 1.0 / (10000 ** (torch.arange(0, head_dim, 2).float() / head_dim))
    return torch.arange(frames).float()[:, None] * freqs


def rotate(x, cos, sin):
    """x [..., L, d]: pairs (2i, 2i+1) turned by the table's angle i [L, r], in f32; dims from 2r on stay."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    rotated = 2 * cos.shape[-1]
    even, odd = x[..., :rotated].to(dtype).unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2).to(x.dtype)
    return turned if rotated == x.shape[-1] else torch.cat([turned, x[..., rotated:]], dim=-1)


# Shared layers ------------------------------------------------------------------------------------


class PatchEmbed(nn.Module):
    def __init__(self, patch_size, in_channels, hidden_size):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)

    def forward(self, x):
        """[B, C, H, W] -> [B, N, D]"""
        return self.proj(x).flatten(2).transpose(1, 2)


class Mlp(nn.Module):
    def __init__(self, hidden_size, mlp_ratio, approximate):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, int(hidden_size * mlp_ratio))
        self.fc2 = nn.Linear(int(hidden_size * mlp_ratio), hidden_size)
        self.approximate = approximate

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x), approximate=self.approximate))


def init_linear(module):
    """Xavier for matrices and patch kernels (as matrices), zero biases."""
    for m in module.modules():
        if isinstance(m, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(m.weight.data.flatten(1))
            if m.bias is not None:
                nn.init.zeros_(m.bias)


# Space-time DiT -----------------------------------------------------------------------------------


def timestep_frequencies(t, dim=256):
    """[..., dim] f32: cosines, then sines, of t * 10000^(-i / (dim/2))."""
    half = dim // 2
    freqs = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angle = t[..., None].float() * freqs
    return torch.cat([torch.cos(angle), torch.sin(angle)], dim=-1)


def modulate(x, shift, scale):
    """x [B, T, N, D]; shift, scale [B, T, D]"""
    return x * (1 + scale[:, :, None]) + shift[:, :, None]


class TimestepEmbedder(nn.Module):
    FREQ_DIM = 256

    def __init__(self, hidden_size):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(self.FREQ_DIM, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size)
        )

    def forward(self, t):
        return self.mlp(timestep_frequencies(t, self.FREQ_DIM).to(self.mlp[0].weight.dtype))


class Attention(nn.Module):
    """Over the tokens of each frame, or, `temporal`, over the frames of each token, causally."""

    def __init__(self, hidden_size, num_heads, temporal):
        super().__init__()
        self.num_heads = num_heads
        self.temporal = temporal
        self.to_qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.to_out = nn.Linear(hidden_size, hidden_size)

    def forward(self, x, rope):
        b, t, n, d = x.shape
        qkv = self.to_qkv(x).view(b, t, n, 3, self.num_heads, d // self.num_heads)
        if self.temporal:
            q, k, v = qkv.permute(3, 0, 2, 4, 1, 5).flatten(1, 2)  # [B*N, heads, T, head_dim] each
        else:
            q, k, v = qkv.permute(3, 0, 1, 4, 2, 5).flatten(1, 2)  # [B*T, heads, N, head_dim] each
        out = F.scaled_dot_product_attention(rotate(q, *rope), rotate(k, *rope), v, is_causal=self.temporal)
        out = out.transpose(1, 2).flatten(2)
        out = out.view(b, n, t, d).transpose(1, 2) if self.temporal else out.view(b, t, n, d)
        return self.to_out(out)


class Block(nn.Module):
    def __init__(self, hidden_size, num_heads, mlp_ratio):
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.s_attn = Attention(hidden_size, num_heads, temporal=False)
        self.s_mlp = Mlp(hidden_size, mlp_ratio, "tanh")
        self.s_adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))
        self.t_attn = Attention(hidden_size, num_heads, temporal=True)
        self.t_mlp = Mlp(hidden_size, mlp_ratio, "tanh")
        self.t_adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))

    def part(self, x, branch, shift, scale, gate, *rope):
        return x + gate[:, :, None] * branch(modulate(self.norm(x), shift, scale), *rope)

    def parts(self, x, c, s_rope, t_rope):
        """x after spatial attention, spatial MLP, temporal attention, temporal MLP."""
        s = self.s_adaLN_modulation(c).chunk(6, dim=-1)
        t = self.t_adaLN_modulation(c).chunk(6, dim=-1)
        x1 = self.part(x, self.s_attn, *s[:3], s_rope)
        x2 = self.part(x1, self.s_mlp, *s[3:])
        x3 = self.part(x2, self.t_attn, *t[:3], t_rope)
        x4 = self.part(x3, self.t_mlp, *t[3:])
        return x1, x2, x3, x4

    def forward(self, x, c, s_rope, t_rope):
        return self.parts(x, c, s_rope, t_rope)[-1]


class FinalLayer(nn.Module):
    def __init__(self, hidden_size, patch_size, out_channels):
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = nn.Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(nn.Module):
    def __init__(self, input_h=18, input_w=32, patch_size=2, in_channels=16, hidden_size=1024, depth=16, num_heads=16,
                 mlp_ratio=4.0, external_cond_dim=25, max_frames=32):
        super().__init__()
        if input_h % patch_size or input_w % patch_size or hidden_size % (4 * num_heads):
            raise ValueError("patches must tile the latent grid, and a head's width must be a multiple of 4")
        self.patch_size = patch_size
        self.in_channels = in_channels
        self.max_frames = max_frames
        self.grid = (input_h // patch_size, input_w // patch_size)
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        if external_cond_dim > 0:
            self.external_cond = nn.Linear(external_cond_dim, hidden_size)
        self.blocks = nn.ModuleList([Block(hidden_size, num_heads, mlp_ratio) for _ in range(depth)])
        self.final_layer = FinalLayer(hidden_size, patch_size, in_channels)
        head_dim = hidden_size // num_heads
        self.register_buffer("s_angles", axial_angles(*self.grid, head_dim // 4, 256), persistent=False)
        self.register_buffer("t_angles", frame_angles(max_frames, head_dim), persistent=False)
        self.init_weights()

    def init_weights(self):
        """As DiT: gates and head start at zero."""
        init_linear(self)
        nn.init.normal_(self.t_embedder.mlp[0].weight, std=0.02)
        nn.init.normal_(self.t_embedder.mlp[2].weight, std=0.02)
        for block in self.blocks:
            nn.init.zeros_(block.s_adaLN_modulation[1].weight)
            nn.init.zeros_(block.t_adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.adaLN_modulation[1].weight)
        nn.init.zeros_(self.final_layer.linear.weight)

    def condition(self, t, external_cond=None):
        """t [B, T], integers or fractions in 0..999; external_cond [B, T, A] or None. Returns [B, T, D]."""
        c = self.t_embedder(t)
        return c if external_cond is None else c + self.external_cond(external_cond)

    def embed(self, x):
        """[B, T, C, H, W] -> [B, T, N, D]"""
        return self.x_embedder(x.flatten(0, 1)).unflatten(0, x.shape[:2])

    def rotary(self, frames):
        if frames > self.max_frames:
            raise ValueError(f"{frames} frames in a window of at most {self.max_frames}")
        t_angles = self.t_angles[:frames]
        return (self.s_angles.cos(), self.s_angles.sin()), (t_angles.cos(), t_angles.sin())

    def unpatchify(self, x):
        """[B, T, N, p*p*C] -> [B, T, C, H, W]; the last axis is (row in patch, column in patch, channel)."""
        b, t = x.shape[:2]
        (h, w), p = self.grid, self.patch_size
        x = x.reshape(b, t, h, w, p, p, self.in_channels).permute(0, 1, 6, 2, 4, 3, 5)
        return x.reshape(b, t, self.in_channels, h * p, w * p)

    def forward(self, x, t, external_cond=None):
        """x [B, T, C, H, W]; t [B, T]; external_cond [B, T, A] or None. Returns v [B, T, C, H, W]."""
        c = self.condition(t, external_cond)
        s_rope, t_rope = self.rotary(x.shape[1])
        x = self.embed(x)
        for block in self.blocks:
            x = block(x, c, s_rope, t_rope)
        return self.unpatchify(self.final_layer(x, c))


# ViT autoencoder ----------------------------------------------------------------------------------


class VaeAttention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x, rope):
        b, n, d = x.shape
        q, k, v = self.qkv(x).view(b, n, 3, self.num_heads, d // self.num_heads).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(rotate(q, *rope), rotate(k, *rope), v)
        return self.proj(out.transpose(1, 2).flatten(2))


class VaeBlock(nn.Module):
    def __init__(self, dim, num_heads, mlp_ratio):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = VaeAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, mlp_ratio, "none")

    def forward(self, x, rope):
        x = x + self.attn(self.norm1(x), rope)
        return x + self.mlp(self.norm2(x))


class ViTVAE(nn.Module):
    def __init__(self, input_height=360, input_width=640, patch_size=20, latent_dim=16, enc_dim=1024, enc_depth=6,
                 enc_heads=16, dec_dim=1024, dec_depth=12, dec_heads=16, mlp_ratio=4.0):
        super().__init__()
        odd_width = enc_dim % (8 * enc_heads) or dec_dim % (8 * dec_heads)
        if input_height % patch_size or input_width % patch_size or odd_width:
            raise ValueError("patches must tile the frame, and a head's width must be a multiple of 8")
        self.patch_size = patch_size
        self.latent_dim = latent_dim
        self.grid = (input_height // patch_size, input_width // patch_size)
        self.patch_embed = PatchEmbed(patch_size, 3, enc_dim)
        self.encoder = nn.ModuleList([VaeBlock(enc_dim, enc_heads, mlp_ratio) for _ in range(enc_depth)])
        self.enc_norm = nn.LayerNorm(enc_dim, eps=1e-6)
        self.quant_conv = nn.Linear(enc_dim, 2 * latent_dim)
        self.post_quant_conv = nn.Linear(latent_dim, dec_dim)
        self.decoder = nn.ModuleList([VaeBlock(dec_dim, dec_heads, mlp_ratio) for _ in range(dec_depth)])
        self.dec_norm = nn.LayerNorm(dec_dim, eps=1e-6)
        self.predictor = nn.Linear(dec_dim, 3 * patch_size * patch_size)
        tokens = self.grid[0] * self.grid[1]  # the largest frequency grows with the number of tokens
        for name, head_dim in (("enc_angles", enc_dim // enc_heads), ("dec_angles", dec_dim // dec_heads)):
            self.register_buffer(name, axial_angles(*self.grid, head_dim // 8, tokens), persistent=False)
        self.init_weights()

    def init_weights(self):
        init_linear(self)

    def encode(self, x):
        """x [B, 3, H, W] in -1..1 -> mean, log variance [B, seq, z] of the posterior."""
        x, rope = self.patch_embed(x), (self.enc_angles.cos(), self.enc_angles.sin())
        for block in self.encoder:
            x = block(x, rope)
        mean, logvar = self.quant_conv(self.enc_norm(x)).chunk(2, dim=-1)
        return mean, logvar.clamp(-30.0, 20.0)

    def decode(self, z):
        """z [B, seq, z], not scaled -> [B, 3, H, W], about -1..1, not clamped."""
        x, rope = self.post_quant_conv(z), (self.dec_angles.cos(), self.dec_angles.sin())
        for block in self.decoder:
            x = block(x, rope)
        x = self.predictor(self.dec_norm(x))
        (h, w), p = self.grid, self.patch_size
        x = x.reshape(len(x), h, w, 3, p, p).permute(0, 3, 1, 4, 2, 5)  # (channel, row in patch, column in patch)
        return x.reshape(len(x), 3, h * p, w * p)


def tokens_to_latent(z, grid):
    """VAE side [B, seq, z] -> DiT side [B, z, h, w]."""
    return z.transpose(1, 2).unflatten(2, grid)


def latent_to_tokens(latent):
    """DiT side [B, z, h, w] -> VAE side [B, seq, z]."""
    return latent.flatten(2).transpose(1, 2)


def encode_frames(vae, frames, scaling_factor=SCALING_FACTOR_500M):
    """frames [B, 3, H, W] in 0..1 -> latents [B, z, h, w]: the posterior's mean, scaled."""
    return tokens_to_latent(vae.encode(frames * 2 - 1)[0] * scaling_factor, vae.grid)


def decode_frames(vae, latents, scaling_factor=SCALING_FACTOR_500M):
    """latents [B, z, h, w] -> frames [B, 3, H, W] in 0..1."""
    return ((vae.decode(latent_to_tokens(latents) / scaling_factor) + 1) / 2).clamp(0, 1)


# Schedule and rollout -----------------------------------------------------------------------------


def sigmoid_alphas_cumprod(num=1000):
    """[num] f32. Betas are formed in f64 (sigmoid(+-3) itself in f32), clipped to [0, .999] and rounded to f32; the
    product runs over f32 factors (torch keeps it in f64 on a CPU, in f32 on a GPU)."""
    u = torch.linspace(0, num, num + 1, dtype=torch.float64) / num
    low, high = torch.tensor(-3.0).sigmoid(), torch.tensor(3.0).sigmoid()
    curve = (high - (6 * u - 3).sigmoid()) / (high - low)
    curve = curve / curve[0]
    betas = (1 - curve[1:] / curve[:-1]).clamp(0, 0.999).float()
    return torch.cumprod(1 - betas, dim=0)


def add_noise(latents, noise, t, alphas_cumprod):
    """Training pair: x_t and its v, for t of any shape that matches the leading axes of latents, 0..num-1."""
    a = alphas_cumprod[t].reshape(t.shape + (1,) * (latents.dim() - t.dim()))
    return a.sqrt() * latents + (1 - a).sqrt() * noise, a.sqrt() * noise - (1 - a).sqrt() * latents


def denoising_steps(steps, num=1000):
    """[(t, t_next, is_last)] from noise to data. Levels linspace(-1, num-1, steps+1) are cut to integers; the one below
    zero stands for clean data: t_next is then t, and unused since the last step takes alpha_next = 1."""
    if not 1 <= steps <= num:
        raise ValueError(f"{steps} steps: expected 1 to {num}")
    levels = [int(level) for level in torch.linspace(-1, num - 1, steps + 1)]
    return [(levels[k], levels[k - 1] if levels[k - 1] >= 0 else levels[k], k == 1) for k in range(steps, 0, -1)]


def ddim_update(x, v, alpha, alpha_next):
    """v-prediction, eta 0, in the order of operations of the public loop."""
    x0 = alpha.sqrt() * x - (1 - alpha).sqrt() * v
    eps = ((1 / alpha).sqrt() * x - x0) / (1 / alpha - 1).sqrt()
    return alpha_next.sqrt() * x0 + eps * (1 - alpha_next).sqrt()


@torch.no_grad()
def generate(dit, latents, actions, num_frames, steps, noise, stabilization_level=15, max_frames=None, on_step=None):
    """Autoregressive rollout that recomputes the whole window in every step; positions count from the window's start.

    latents [B, P, C, H, W], scaled; actions [B, num_frames, A], row i leads to frame i (row 0 is zero in the release);
    noise [num_frames, C, H, W] or [B, num_frames, C, H, W], row i for frame i, rows below P unused.
    on_step(frame, step, t, t_next, alpha, alpha_next, v, x): after each step, v and x of the newest frame [B, C, H, W].
    Returns [B, num_frames, C, H, W], the prompt first.
    """
    max_frames = dit.max_frames if max_frames is None else max_frames
    alphas = sigmoid_alphas_cumprod().to(latents)
    noise = noise.expand(len(latents), *noise.shape[-4:]).to(latents)
    x = latents
    for i in range(latents.shape[1], num_frames):
        x = torch.cat([x, noise[:, i:i + 1].clamp(-NOISE_ABS_MAX, NOISE_ABS_MAX)], dim=1)
        start = max(0, i + 1 - max_frames)
        for step, (t_last, t_next, is_last) in enumerate(denoising_steps(steps)):
            t = torch.full((len(x), i + 1 - start), stabilization_level - 1, dtype=torch.long, device=x.device)
            t[:, -1] = t_last
            v = dit(x[:, start:], t, actions[:, start:i + 1])[:, -1].to(x)
            alpha, alpha_next = alphas[t_last], torch.ones_like(alphas[0]) if is_last else alphas[t_next]
            newest = ddim_update(x[:, -1], v, alpha, alpha_next)
            x = torch.cat([x[:, :-1], newest[:, None]], dim=1)
            if on_step:
                on_step(i, step, t_last, t_next, alpha, alpha_next, v, newest)
    return x


# A world in a folder ------------------------------------------------------------------------------


def load_weights(folder, name):
    """`name`.safetensors, or its shards by `name`.safetensors.index.json; rotary tables some files hold are dropped."""
    from safetensors.torch import load_file
    folder, state = Path(folder), {}
    index = folder / f"{name}.safetensors.index.json"
    files = json.loads(index.read_text())["weight_map"].values() if index.exists() else [f"{name}.safetensors"]
    for file in sorted(set(files)):
        state.update(load_file(folder / file))
    return {key: value.float() for key, value in state.items() if not key.endswith("rotary_emb.freqs")}


def load_world(folder):
    """config.json, dit, vae -> (DiT, ViTVAE, config), in f32."""
    config = json.loads((Path(folder) / "config.json").read_text())
    dit, vae = DiT(**config["dit"]), ViTVAE(**config["vae"])
    dit.load_state_dict(load_weights(folder, "dit"))
    vae.load_state_dict(load_weights(folder, "vae"))
    return dit.eval(), vae.eval(), config
