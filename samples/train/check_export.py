"""Compares an exported model folder with diffusers: same files, both implementations, f32 on the CPU.

    python check_export.py MODEL_FOLDER

Prints the relative L2 distance of the transformer's output, of the VAE's encoder and decoder, and of a picture after four
guided DDIM steps (diffusers' own scheduler on its side). Reading the folder also checks every tensor's name and shape, that
all values are finite and that all copies of the embedders agree. Exit status 1 if a distance reaches its bound. The bounds
are tight because the smallest mistake worth finding is small: a wrong eps in front of the MLP moves the transformer's output
by 2.5e-6 and the picture by 6e-5. Needs diffusers.

Pitfall: DiTPipeline takes row 1000 as the null class whatever the table's length, so of a 36-class model it can only be
called with guidance_scale=1. That is why guidance is written out here. Null is the last row, num_embeds_ada_norm."""
import argparse
import json
import sys
from pathlib import Path

import torch
from diffusers import DiTPipeline

from load_export import load_dit, load_vae

GUIDANCE, STEPS, CLASSES = 3.0, 4, torch.tensor([5, 30])


def rel_l2(got, want):
    return ((got.double() - want.double()).norm() / want.double().norm()).item()


def guided(net, x, now, null):
    times = torch.full((len(CLASSES),), int(now))
    cond, uncond = (net(x, times, y)[:, :x.shape[1]] for y in (CLASSES, torch.full_like(CLASSES, null)))
    return uncond + GUIDANCE * (cond - uncond)


@torch.no_grad()
def distances(folder):
    """Yields (what, distance, bound)."""
    pipe = DiTPipeline.from_pretrained(folder, dtype=torch.float32)
    dit, (vae, scale) = load_dit(folder / "transformer"), load_vae(folder / "vae")
    reference = lambda x, t, y: pipe.transformer(x, t, y).sample
    generator = torch.Generator().manual_seed(0)
    side, channels, null = dit.cfg["side"], dit.cfg["channels"], dit.cfg["num_classes"]

    x = torch.randn(3, channels, side, side, generator=generator)
    t, y = torch.tensor([0, 500, 999]), torch.tensor([0, null // 2, null])
    yield "transformer", rel_l2(dit(x, t, y), reference(x, t, y)), 1e-6

    size = pipe.vae.config.sample_size
    picture = torch.rand(2, 3, size, size, generator=generator) * 2 - 1
    posterior, (mean, logvar) = pipe.vae.encode(picture).latent_dist, vae.encode(picture)
    yield "vae encode, mean", rel_l2(mean, posterior.mean), 1e-5
    yield "vae encode, logvar", rel_l2(logvar, posterior.logvar), 1e-5
    yield "vae decode", rel_l2(vae.decode(x), pipe.vae.decode(x).sample), 1e-5

    got = want = torch.randn(len(CLASSES), channels, side, side, generator=generator)
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    stride = 1000 // STEPS
    for now in range(stride * (STEPS - 1), -1, -stride):
        eps = guided(dit, got, now, null)
        a, a_next = alpha_bar[now].item(), alpha_bar[now - stride].item() if now >= stride else 1.0
        x0 = (got - (1 - a) ** 0.5 * eps) / a ** 0.5
        got = a_next ** 0.5 * x0 + (1 - a_next) ** 0.5 * eps
    pipe.scheduler.set_timesteps(STEPS)
    for now in pipe.scheduler.timesteps:
        want = pipe.scheduler.step(guided(reference, want, now, null), now, want).prev_sample
    yield "picture, 4 steps", rel_l2(vae.decode(got / scale), pipe.vae.decode(want / scale).sample), 2e-5


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    total = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    print(f"{len(json.loads((folder / 'model_index.json').read_text())['id2label'])} classes, {total} bytes in all")
    failed = False
    for what, distance, bound in distances(folder):
        failed |= not distance < bound
        print(f"{what:20s} rel L2 {distance:.1e}  bound {bound:.0e}  {'ok' if distance < bound else 'TOO FAR'}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
