"""Compares an exported model folder with diffusers: same files, both implementations, f32 on the CPU.

    python check_export.py MODEL_FOLDER

Loads the folder as diffusers does, loads the same tensors into models.py, and prints the relative L2 distance of the
transformer's output, of the VAE's encoder and decoder, and of four guided DDIM steps against DiTPipeline. Also checks
that every tensor is finite and present under the right shape, and prints the folder's size. Exit status 1 if any
distance reaches 1e-5, or the four steps 1e-4 (guidance and the steps themselves multiply rounding). Needs diffusers."""
import argparse
import json
import sys
from pathlib import Path

import torch
from diffusers import DiTPipeline
from safetensors.torch import load_file

from models import AutoencoderKL, DiT

MAX_REL_L2 = 1e-5
MAX_REL_L2_STEPS = 1e-4


def rel_l2(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def dit_from_diffusers(model):
    """A models.DiT with the weights of a diffusers transformer. The inverse of DiT.export."""
    c = model.config
    heads, width = c.num_attention_heads, c.num_attention_heads * c.attention_head_dim
    dit = DiT(width, heads, c.num_layers, c.num_embeds_ada_norm, c.sample_size, c.patch_size, c.in_channels)
    given = model.state_dict()
    for name, tensor in dit.export(dit.state_dict()).items():
        if name not in given:
            raise SystemExit(f"{name}: not in the file")
        if given[name].shape != tensor.shape:
            raise SystemExit(f"{name}: expected {tuple(tensor.shape)}, found {tuple(given[name].shape)}")
    state, block = {}, "transformer_blocks.0.norm1.emb."
    for kind in ("weight", "bias"):
        state[f"patch_embed.{kind}"] = given[f"pos_embed.proj.{kind}"]
        state[f"temb1.{kind}"] = given[f"{block}timestep_embedder.linear_1.{kind}"]
        state[f"temb2.{kind}"] = given[f"{block}timestep_embedder.linear_2.{kind}"]
        state[f"final_mod.{kind}"] = given[f"proj_out_1.{kind}"]
        state[f"final.{kind}"] = given[f"proj_out_2.{kind}"]
        for i in range(c.num_layers):
            src, dst = f"transformer_blocks.{i}.", f"blocks.{i}."
            state[f"{dst}qkv.{kind}"] = torch.cat([given[f"{src}attn1.{n}.{kind}"] for n in ("to_q", "to_k", "to_v")])
            state[f"{dst}out.{kind}"] = given[f"{src}attn1.to_out.0.{kind}"]
            state[f"{dst}fc1.{kind}"] = given[f"{src}ff.net.0.proj.{kind}"]
            state[f"{dst}fc2.{kind}"] = given[f"{src}ff.net.2.{kind}"]
            state[f"{dst}mod.{kind}"] = given[f"{src}norm1.linear.{kind}"]
    state["labels.weight"] = given[f"{block}class_embedder.embedding_table.weight"]
    dit.load_state_dict(state)
    written = dit.export(dit.state_dict())
    extra = sorted(set(given) - set(written) - {"pos_embed.pos_embed"})
    if extra:
        raise SystemExit(f"{extra[0]}: in the file, but not a name that is exported")
    for name, tensor in written.items():  # also proves that all copies of the embedders are equal
        if not torch.equal(tensor, given[name]):
            raise SystemExit(f"{name}: the export does not reproduce the file")
    return dit.eval()


def check_files(folder):
    total = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    num_tensors = 0
    for path in sorted(folder.rglob("*.safetensors")):
        for name, tensor in load_file(path).items():
            num_tensors += 1
            if not tensor.isfinite().all():
                raise SystemExit(f"{path.name}: {name} is not finite")
    labels = json.loads((folder / "model_index.json").read_text())["id2label"]
    print(f"{num_tensors} tensors, all finite; {len(labels)} labels; {total} bytes in all")


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    check_files(folder)

    pipe = DiTPipeline.from_pretrained(folder, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    dit = dit_from_diffusers(pipe.transformer)
    vae_config = pipe.vae.config
    vae = AutoencoderKL(tuple(vae_config.block_out_channels), vae_config.layers_per_block, vae_config.norm_num_groups,
                        vae_config.latent_channels).eval()
    vae.load_state_dict(pipe.vae.state_dict())

    generator = torch.Generator().manual_seed(0)
    side, channels, null = dit.cfg["side"], dit.cfg["channels"], dit.cfg["num_classes"]
    x = torch.randn(3, channels, side, side, generator=generator)
    t, y = torch.tensor([0, 500, 999]), torch.tensor([0, 17, null])
    picture = torch.rand(2, 3, vae_config.sample_size, vae_config.sample_size, generator=generator) * 2 - 1
    posterior = pipe.vae.encode(picture).latent_dist
    mean, logvar = vae.encode(picture)
    distances = {
        "transformer": (rel_l2(dit(x, t, y), pipe.transformer(x, t, y).sample), MAX_REL_L2),
        "vae encode, mean": (rel_l2(mean, posterior.mean), MAX_REL_L2),
        "vae encode, logvar": (rel_l2(logvar, posterior.logvar), MAX_REL_L2),
        "vae decode": (rel_l2(vae.decode(x), pipe.vae.decode(x).sample), MAX_REL_L2),
    }

    # Four guided DDIM steps, written out, against the whole pipeline with the same starting noise.
    guidance, steps, ids = 3.0, 4, [5, 30]
    wanted = pipe(class_labels=ids, guidance_scale=guidance, num_inference_steps=steps, output_type="np",
                  generator=torch.Generator().manual_seed(1)).images
    z = torch.randn(len(ids), channels, side, side, generator=torch.Generator().manual_seed(1))
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    stride = 1000 // steps
    for now in range(stride * (steps - 1), -1, -stride):
        labels, times = torch.tensor(ids), torch.full((len(ids),), now)
        cond = dit(z, times, labels)[:, :channels]
        uncond = dit(z, times, torch.full_like(labels, null))[:, :channels]
        eps = uncond + guidance * (cond - uncond)
        a, a_next = alpha_bar[now].item(), alpha_bar[now - stride].item() if now >= stride else 1.0
        z0 = (z - (1 - a) ** 0.5 * eps) / a ** 0.5
        z = a_next ** 0.5 * z0 + (1 - a_next) ** 0.5 * eps
    got = (vae.decode(z / vae_config.scaling_factor) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    distances["four DDIM steps"] = (rel_l2(got, torch.from_numpy(wanted)), MAX_REL_L2_STEPS)

    for name, (distance, bound) in distances.items():
        print(f"{name:20s} rel L2 {distance:.2e} (bound {bound:.0e}) {'ok' if distance < bound else 'TOO FAR'}")
    sys.exit(any(not distance < bound for distance, bound in distances.values()))


if __name__ == "__main__":
    main()
