"""DiT and AutoencoderKL as PyTorch modules whose parameters export to diffusers' key names.

Numerics are diffusers': timestep frequencies 10000^(-i/127), layer norm eps 1e-6 before attention and 1e-5 before the MLP,
tanh GELU. In training one timestep and one label embedder serve all blocks; the export writes a copy for each block, as
the released files have them."""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F


class Block(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)
        self.mod = nn.Linear(width, 6 * width)

    def forward(self, x, c):
        b, n, d = x.shape
        s1, k1, g1, s2, k2, g2 = self.mod(c).unsqueeze(1).chunk(6, -1)
        h = F.layer_norm(x, (d,), eps=1e-6) * (1 + k1) + s1
        q, k, v = self.qkv(h).view(b, n, 3, self.heads, d // self.heads).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, n, d)
        x = x + g1 * self.out(h)
        h = F.layer_norm(x, (d,), eps=1e-5) * (1 + k2) + s2
        return x + g2 * self.fc2(F.gelu(self.fc1(h), approximate="tanh"))


def sincos_2d(width, side):
    quarter = width // 4
    freq = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    rows, cols = torch.meshgrid(torch.arange(side).double(), torch.arange(side).double(), indexing="ij")
    parts = []
    for axis in (cols, rows):
        angle = axis.reshape(-1, 1) * freq
        parts += [angle.sin(), angle.cos()]
    return torch.cat(parts, 1).float()


class DiT(nn.Module):
    def __init__(self, width, heads, depth, num_classes, side=32, patch=2, channels=4):
        super().__init__()
        self.cfg = dict(width=width, heads=heads, depth=depth, num_classes=num_classes, side=side, patch=patch, channels=channels)
        self.patch_embed = nn.Conv2d(channels, width, patch, patch)
        self.temb1 = nn.Linear(256, width)
        self.temb2 = nn.Linear(width, width)
        self.labels = nn.Embedding(num_classes + 1, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.final_mod = nn.Linear(width, 2 * width)
        self.final = nn.Linear(width, patch * patch * 2 * channels)
        self.register_buffer("pos", sincos_2d(width, side // patch), persistent=False)
        self.register_buffer("freqs", torch.exp(-math.log(10000.0) * torch.arange(128) / 127.0), persistent=False)
        for m in self.modules():
            if isinstance(m, nn.Linear):
                nn.init.xavier_uniform_(m.weight)
                nn.init.zeros_(m.bias)
        nn.init.xavier_uniform_(self.patch_embed.weight.view(width, -1))
        nn.init.zeros_(self.patch_embed.bias)
        nn.init.normal_(self.labels.weight, std=0.02)
        nn.init.normal_(self.temb1.weight, std=0.02)
        nn.init.normal_(self.temb2.weight, std=0.02)
        for m in [b.mod for b in self.blocks] + [self.final_mod, self.final]:
            nn.init.zeros_(m.weight)
            nn.init.zeros_(m.bias)

    def forward(self, x, t, y):
        p, b, c = self.cfg["patch"], x.shape[0], self.cfg["channels"]
        grid = x.shape[2] // p
        h = self.patch_embed(x).flatten(2).transpose(1, 2) + self.pos
        a = t.float()[:, None] * self.freqs[None]
        cond = self.temb2(F.silu(self.temb1(torch.cat([a.cos(), a.sin()], 1)))) + self.labels(y)
        cond = F.silu(cond)
        for block in self.blocks:
            h = block(h, cond)
        shift, scale = self.final_mod(cond).unsqueeze(1).chunk(2, -1)
        h = self.final(F.layer_norm(h, (h.shape[-1],), eps=1e-6) * (1 + scale) + shift)
        return h.view(b, grid, grid, p, p, 2 * c).permute(0, 5, 1, 3, 2, 4).reshape(b, 2 * c, grid * p, grid * p)

    def export(self, state):
        """state: this module's state dict -> diffusers' names."""
        out = {"pos_embed.proj.weight": state["patch_embed.weight"], "pos_embed.proj.bias": state["patch_embed.bias"]}
        width = self.cfg["width"]
        for i in range(self.cfg["depth"]):
            pre, src = f"transformer_blocks.{i}.", f"blocks.{i}."
            for j, name in enumerate(("to_q", "to_k", "to_v")):
                for kind in ("weight", "bias"):
                    out[f"{pre}attn1.{name}.{kind}"] = state[f"{src}qkv.{kind}"][j * width:(j + 1) * width]
            for kind in ("weight", "bias"):
                out[f"{pre}attn1.to_out.0.{kind}"] = state[f"{src}out.{kind}"]
                out[f"{pre}ff.net.0.proj.{kind}"] = state[f"{src}fc1.{kind}"]
                out[f"{pre}ff.net.2.{kind}"] = state[f"{src}fc2.{kind}"]
                out[f"{pre}norm1.linear.{kind}"] = state[f"{src}mod.{kind}"]
                out[f"{pre}norm1.emb.timestep_embedder.linear_1.{kind}"] = state[f"temb1.{kind}"]
                out[f"{pre}norm1.emb.timestep_embedder.linear_2.{kind}"] = state[f"temb2.{kind}"]
            out[f"{pre}norm1.emb.class_embedder.embedding_table.weight"] = state["labels.weight"]
        for kind in ("weight", "bias"):
            out[f"proj_out_1.{kind}"] = state[f"final_mod.{kind}"]
            out[f"proj_out_2.{kind}"] = state[f"final.{kind}"]
        return {k: v.clone().contiguous() for k, v in out.items()}

    def config(self):
        c = self.cfg
        return {"_class_name": "DiTTransformer2DModel", "_diffusers_version": "0.35.0", "num_attention_heads": c["heads"],
                "attention_head_dim": c["width"] // c["heads"], "in_channels": c["channels"], "out_channels": 2 * c["channels"],
                "num_layers": c["depth"], "sample_size": c["side"], "patch_size": c["patch"], "num_embeds_ada_norm": c["num_classes"],
                "norm_type": "ada_norm_zero", "norm_elementwise_affine": False, "norm_eps": 1e-5, "attention_bias": True,
                "activation_fn": "gelu-approximate", "dropout": 0.0, "norm_num_groups": 32, "upcast_attention": False}


class Resnet(nn.Module):
    def __init__(self, cin, cout, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, cin, eps=1e-6)
        self.conv1 = nn.Conv2d(cin, cout, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, cout, eps=1e-6)
        self.conv2 = nn.Conv2d(cout, cout, 3, padding=1)
        if cin != cout:
            self.conv_shortcut = nn.Conv2d(cin, cout, 1)

    def forward(self, x):
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return h + (self.conv_shortcut(x) if hasattr(self, "conv_shortcut") else x)


class Attention(nn.Module):
    def __init__(self, c, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.to_q, self.to_k, self.to_v = nn.Linear(c, c), nn.Linear(c, c), nn.Linear(c, c)
        self.to_out = nn.ModuleList([nn.Linear(c, c)])

    def forward(self, x):
        b, c, h, w = x.shape
        n = self.group_norm(x).flatten(2).transpose(1, 2)
        o = F.scaled_dot_product_attention(self.to_q(n)[:, None], self.to_k(n)[:, None], self.to_v(n)[:, None])[:, 0]
        return x + self.to_out[0](o).transpose(1, 2).reshape(b, c, h, w)


class Mid(nn.Module):
    def __init__(self, c, groups):
        super().__init__()
        self.resnets = nn.ModuleList([Resnet(c, c, groups), Resnet(c, c, groups)])
        self.attentions = nn.ModuleList([Attention(c, groups)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Down(nn.Module):
    def __init__(self, cin, cout, groups, layers, last):
        super().__init__()
        self.resnets = nn.ModuleList(Resnet(cin if i == 0 else cout, cout, groups) for i in range(layers))
        if not last:
            self.downsamplers = nn.ModuleList([nn.ModuleDict({"conv": nn.Conv2d(cout, cout, 3, stride=2)})])

    def forward(self, x):
        for r in self.resnets:
            x = r(x)
        return self.downsamplers[0]["conv"](F.pad(x, (0, 1, 0, 1))) if hasattr(self, "downsamplers") else x


class Up(nn.Module):
    def __init__(self, cin, cout, groups, layers, last):
        super().__init__()
        self.resnets = nn.ModuleList(Resnet(cin if i == 0 else cout, cout, groups) for i in range(layers + 1))
        if not last:
            self.upsamplers = nn.ModuleList([nn.ModuleDict({"conv": nn.Conv2d(cout, cout, 3, padding=1)})])

    def forward(self, x):
        for r in self.resnets:
            x = r(x)
        return self.upsamplers[0]["conv"](F.interpolate(x, scale_factor=2.0)) if hasattr(self, "upsamplers") else x


class Encoder(nn.Module):
    def __init__(self, chans, layers, groups, z):
        super().__init__()
        self.conv_in = nn.Conv2d(3, chans[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(Down(chans[max(i - 1, 0)], c, groups, layers, i == len(chans) - 1) for i, c in enumerate(chans))
        self.mid_block = Mid(chans[-1], groups)
        self.conv_norm_out = nn.GroupNorm(groups, chans[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(chans[-1], 2 * z, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for d in self.down_blocks:
            x = d(x)
        return self.conv_out(F.silu(self.conv_norm_out(self.mid_block(x))))


class Decoder(nn.Module):
    def __init__(self, chans, layers, groups, z):
        super().__init__()
        rev = list(reversed(chans))
        self.conv_in = nn.Conv2d(z, rev[0], 3, padding=1)
        self.mid_block = Mid(rev[0], groups)
        self.up_blocks = nn.ModuleList(Up(rev[max(i - 1, 0)], c, groups, layers, i == len(rev) - 1) for i, c in enumerate(rev))
        self.conv_norm_out = nn.GroupNorm(groups, chans[0], eps=1e-6)
        self.conv_out = nn.Conv2d(chans[0], 3, 3, padding=1)

    def forward(self, z):
        x = self.mid_block(self.conv_in(z))
        for u in self.up_blocks:
            x = u(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class AutoencoderKL(nn.Module):
    def __init__(self, chans=(32, 64, 112), layers=1, groups=16, z=4):
        super().__init__()
        self.cfg = dict(chans=list(chans), layers=layers, groups=groups, z=z)
        self.encoder = Encoder(chans, layers, groups, z)
        self.decoder = Decoder(chans, layers, groups, z)
        self.quant_conv = nn.Conv2d(2 * z, 2 * z, 1)
        self.post_quant_conv = nn.Conv2d(z, z, 1)

    def encode(self, x):
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, 1)
        return mean, logvar.clamp(-30, 20)

    def decode(self, z):
        return self.decoder(self.post_quant_conv(z))

    def forward(self, x):
        mean, logvar = self.encode(x)
        return self.decode(mean + torch.randn_like(mean) * (0.5 * logvar).exp()), mean, logvar

    def config(self, scaling_factor, sample_size):
        c, n = self.cfg, len(self.cfg["chans"])
        return {"_class_name": "AutoencoderKL", "_diffusers_version": "0.35.0", "in_channels": 3, "out_channels": 3,
                "down_block_types": ["DownEncoderBlock2D"] * n, "up_block_types": ["UpDecoderBlock2D"] * n,
                "block_out_channels": c["chans"], "layers_per_block": c["layers"], "act_fn": "silu", "latent_channels": c["z"],
                "norm_num_groups": c["groups"], "sample_size": sample_size, "scaling_factor": scaling_factor}
