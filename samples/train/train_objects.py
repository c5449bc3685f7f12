"""Trains the shipped image model: an AutoencoderKL and a DiT on rendered objects (objects.c), and exports a diffusers folder.

    python train_objects.py all --out OUT --seconds 540                        one GPU
    torchrun --nproc-per-node 2 train_objects.py all --out OUT --seconds 540   several
    python train_objects.py dit --resume DIR --out OUT --seconds 540           goes on with the DiT from DIR's checkpoint
    python train_objects.py export --resume DIR --out MODEL_FOLDER             checkpoint to a diffusers folder (no GPU needed)
    python train_objects.py all --out OUT --smoke                              a few tiny steps of every stage on any machine

`--seconds` covers everything. Pictures are rendered when they are needed; nothing is read but the code. Files in OUT: log.jsonl,
sheet_*.png and checkpoint.pt.NN (the VAE and the averaged DiT in f16, in pieces under 16 MB; written every minute)."""
import argparse
import ctypes
import io
import json
import math
import os
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

from models import AutoencoderKL, DiT

HERE = Path(__file__).resolve().parent
NUM_CLASSES, SIZE, SIDE = 36, 128, 32
START = time.time()


def elapsed():
    return time.time() - START


class Renderer:
    """Batches of pictures [n, 3, SIZE, SIZE] in -1..1 from objects.c, on the GPU if there is one."""

    def __init__(self, device, build_dir, rank):
        self.device, self.next = device, 0
        lib = Path(build_dir) / f"libobjects{rank}.so"
        if device.type == "cuda":
            # where nvcc sees no GPU it warns and builds its default, which holds PTX for any later card
            cmd = ["nvcc", "-O3", "-arch=native", "-shared", "-Xcompiler", "-fPIC", "-o", str(lib), str(HERE / "objects.cu")]
        else:
            cmd = ["cc", "-O3", "-fopenmp", "-shared", "-fPIC", "-o", str(lib), str(HERE / "objects.c"), "-lm"]
        subprocess.run(cmd, check=True)
        self.lib = ctypes.CDLL(str(lib))

    def __call__(self, seed, classes, samples=3):
        n = classes.numel()
        out = torch.empty(n, 3, SIZE, SIZE, device=self.device)
        classes = classes.to(torch.int32).contiguous()
        args = [ctypes.c_void_p(out.data_ptr()), ctypes.c_void_p(classes.data_ptr()), ctypes.c_uint64(seed), ctypes.c_uint64(self.next), ctypes.c_int(n), ctypes.c_int(SIZE), ctypes.c_int(samples)]
        if self.device.type == "cuda":
            rc = self.lib.obj_render_cuda(*args, ctypes.c_void_p(torch.cuda.current_stream().cuda_stream))
        else:
            rc = self.lib.obj_render_host(*args)
        if rc != 0:
            raise RuntimeError(f"renderer returned {rc}")
        self.next += n
        return out


def class_names(renderer):
    f = renderer.lib.obj_class_name
    f.restype, f.argtypes = ctypes.c_char_p, [ctypes.c_int]
    return [f(i).decode() for i in range(NUM_CLASSES)]


class Ema:
    def __init__(self, model, decay):
        self.decay, self.num = decay, 0
        self.params = [p for p in model.parameters()]
        self.shadow = [p.detach().clone().float() for p in self.params]

    @torch.no_grad()
    def update(self):
        self.num += 1
        d = min(self.decay, (1 + self.num) / (10 + self.num))
        torch._foreach_lerp_(self.shadow, [p.detach() for p in self.params], 1 - d)

    @torch.no_grad()
    def copy_to(self, model):
        for p, s in zip(model.parameters(), self.shadow):
            p.copy_(s)


class Run:
    """Rank, device, log and clock of one process."""

    def __init__(self, args):
        self.args = args
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        if torch.cuda.is_available():
            self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
            torch.cuda.set_device(self.device)
        else:
            self.device = torch.device("cpu")
        if self.world > 1:
            dist.init_process_group("nccl" if self.device.type == "cuda" else "gloo")
        self.out = Path(args.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.log_file = open(self.out / "log.jsonl", "a") if self.rank == 0 and args.stage != "export" else None
        torch.manual_seed(args.seed * 1000 + self.rank)
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = True

    def log(self, **k):
        if self.rank == 0:
            k["at_s"] = round(elapsed(), 1)
            if self.log_file is not None:
                print(json.dumps(k), file=self.log_file, flush=True)
            print(json.dumps(k), flush=True)

    def sync_grads(self, model):
        if self.world == 1:
            return
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        flat = torch.cat([g.reshape(-1) for g in grads])
        dist.all_reduce(flat)
        flat /= self.world
        at = 0
        for g in grads:
            g.copy_(flat[at:at + g.numel()].view_as(g))
            at += g.numel()

    def sync_params(self, model):
        if self.world > 1:
            for p in model.parameters():
                dist.broadcast(p.data, 0)

    def agree(self, value):
        """Rank 0's number, on every rank: all ranks stop at the same step."""
        if self.world == 1:
            return value
        t = torch.tensor([float(value)], device=self.device, dtype=torch.float64)
        dist.broadcast(t, 0)
        return t.item()


def autocast(device):
    return torch.autocast(device.type, dtype=torch.bfloat16)


def compiled(module, run):
    return module if run.args.smoke or run.device.type != "cuda" else torch.compile(module, dynamic=False)


def train_loop(run, model, ema, step_fn, begin_s, end_s, lr, tag, warmup=300, betas=(0.9, 0.99), clip=1.0, decay_part=0.5, save=None):
    """Steps until the clock says end_s. The rate warms up over `warmup` steps, stays, and falls to zero (cosine) over the last
    decay_part of the time, so that a run of any length ends annealed."""
    opt = torch.optim.AdamW(model.parameters(), lr=lr, betas=betas, weight_decay=0.0, fused=run.device.type == "cuda")
    run.sync_params(model)
    step, last, seen, progress, sums, saved = 0, time.time(), 0, 0.0, {}, time.time()
    first_s = None
    while True:
        if step % 20 == 0:
            if step == 20:
                first_s = elapsed()  # compiling is over
            start = first_s if first_s is not None else begin_s
            progress = run.agree(min(1.0, max(0.0, (elapsed() - start) / max(1e-6, end_s - start))) if step >= 20 else 0.0)
            if progress >= 1.0 or (run.args.smoke and step >= 20):
                break
            if save is not None and run.rank == 0 and time.time() - saved > 60:
                save()
                saved = time.time()
        rate = lr * min(1.0, (step + 1) / warmup)
        if progress > 1 - decay_part:
            rate *= 0.5 + 0.5 * math.cos(math.pi * (progress - (1 - decay_part)) / decay_part)
        for g in opt.param_groups:
            g["lr"] = max(rate, lr * 1e-3)
        losses, n = step_fn(step)
        opt.zero_grad(set_to_none=True)
        losses["loss"].backward()
        run.sync_grads(model)
        norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
        opt.step()
        if ema is not None:
            ema.update()
        step += 1
        seen += n * run.world
        for k, v in {**losses, "grad_norm": norm}.items():
            sums[k] = sums.get(k, 0) + v.detach().float()
        if step % 200 == 0 or (run.args.smoke and step % 10 == 0):
            every = 200 if not run.args.smoke else 10
            values = {k: round((v / every).item(), 5) for k, v in sums.items()}
            run.log(kind=tag, step=step, images_per_s=round(seen / (time.time() - last)), progress=round(progress, 3), **values)
            if not math.isfinite(values["loss"]):
                raise SystemExit(f"{tag}: the loss is not finite at step {step}")
            last, seen, sums = time.time(), 0, {}
    return step


def gradient_loss(a, b):
    """L1 of finite differences at three scales: edges stay sharp without a pretrained network."""
    total = 0.0
    for level in range(3):
        total = total + (a.diff(dim=2) - b.diff(dim=2)).abs().mean() + (a.diff(dim=3) - b.diff(dim=3)).abs().mean()
        if level < 2:
            a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    return total / 3


def train_vae(run, render, vae, end_s):
    batch = 8 if run.args.smoke else 128
    vae.to(memory_format=torch.channels_last)
    net = compiled(vae, run)
    ema = Ema(vae, 0.999)

    def step_fn(step):
        y = torch.randint(0, NUM_CLASSES, (batch,), device=run.device)
        x = render(run.args.seed * 100 + run.rank, y).contiguous(memory_format=torch.channels_last)
        with autocast(run.device):
            got, mean, logvar = net(x)
        got, mean, logvar = got.float(), mean.float(), logvar.float()
        pixel = (got - x).abs().mean() + 2.0 * (got - x).square().mean()
        edge = gradient_loss(got, x)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2, 3)).mean()
        return {"loss": pixel + edge + 2e-6 * kl, "pixel": pixel, "edge": edge, "kl": kl}, batch

    steps = train_loop(run, vae, ema, step_fn, elapsed(), end_s, 1.0e-3, "vae", warmup=200)
    ema.copy_to(vae)
    vae.requires_grad_(False).eval()
    scores = score_vae(run, render, vae)
    run.log(kind="vae_done", steps=steps, **scores)
    return scores


@torch.no_grad()
def score_vae(run, render, vae):
    """PSNR of reconstructions on fresh pictures, and the standard deviation of latents."""
    sse, n, std, mean_abs = 0.0, 0, [], 0
    rounds, batch = (1, 8) if run.args.smoke else (16, 64)
    for i in range(rounds):
        y = torch.randint(0, NUM_CLASSES, (batch,), device=run.device)
        x = render(10 ** 6 + run.rank, y)
        mean, logvar = vae.encode(x)
        got = vae.decode(mean).clamp(-1, 1)
        sse += ((got - x) / 2).square().mean((1, 2, 3)).log10().sum().item()
        n += batch
        z = mean + torch.randn_like(mean) * (0.5 * logvar).exp()
        std.append(z.square().mean().item())
    return {"psnr_db": round(-10 * sse / n, 2), "latent_std": round(math.sqrt(sum(std) / len(std)), 4)}


class LatentPool:
    """A ring of encoded pictures that is refreshed a little every step, so that the VAE's encoder costs little of the time."""

    def __init__(self, run, render, vae, scale, size):
        self.run, self.render, self.vae, self.scale, self.size = run, render, vae, scale, size
        self.mean = torch.empty(size, 4, SIDE, SIDE, device=run.device, dtype=torch.float16)
        self.std = torch.empty_like(self.mean)
        self.labels = torch.empty(size, dtype=torch.long, device=run.device)
        self.at = 0
        chunk = min(size, 1024)
        for _ in range(size // chunk):
            self.refresh(chunk)

    @torch.no_grad()
    def refresh(self, n):
        y = torch.randint(0, NUM_CLASSES, (n,), device=self.run.device)
        x = self.render(self.run.args.seed * 100 + 50 + self.run.rank, y).contiguous(memory_format=torch.channels_last)
        with autocast(self.run.device):
            mean, logvar = self.vae.encode(x)
        idx = torch.arange(self.at, self.at + n, device=self.run.device) % self.size
        self.mean[idx] = (mean.float() * self.scale).half()
        self.std[idx] = ((0.5 * logvar.float()).exp() * self.scale).half()
        self.labels[idx] = y
        self.at = (self.at + n) % self.size

    def draw(self, n):
        i = torch.randint(0, self.size, (n,), device=self.run.device)
        mean = self.mean[i].float()
        return mean + self.std[i].float() * torch.randn_like(mean), self.labels[i]


class Diffusion:
    """Linear betas 1e-4..0.02 over 1000 steps; epsilon prediction with a learned-range variance."""

    def __init__(self, device):
        beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
        ac = torch.cumprod(1 - beta, 0)
        prev = torch.cat([torch.ones(1, dtype=torch.float64), ac[:-1]])
        post = beta * (1 - prev) / (1 - ac)
        self.ac = ac
        f = lambda v: v.float().to(device)
        self.sqrt_ac, self.sqrt_1m = f(ac.sqrt()), f((1 - ac).sqrt())
        self.log_beta, self.log_post = f(beta.log()), f(torch.cat([post[1:2], post[1:]]).log())
        self.c0, self.ct = f(beta * prev.sqrt() / (1 - ac)), f((1 - prev) * (1 - beta).sqrt() / (1 - ac))
        self.weight = f((ac / (1 - ac)).clamp(max=5.0) / (ac / (1 - ac)))  # min-SNR, gamma 5, for epsilon

    def losses(self, net, x0, y):
        b = x0.shape[0]
        t = torch.randint(0, 1000, (b,), device=x0.device)
        view = lambda v: v[t].view(-1, 1, 1, 1)
        noise = torch.randn_like(x0)
        xt = view(self.sqrt_ac) * x0 + view(self.sqrt_1m) * noise
        out = net(xt, t, y).float()
        eps, v = out.chunk(2, 1)
        per = (eps - noise).square().mean((1, 2, 3))
        mse = per.mean()
        simple = (per * self.weight[t]).mean()
        # variational bound of the variance alone: the mean is detached
        frac = (v + 1) / 2
        logvar = frac * view(self.log_beta) + (1 - frac) * view(self.log_post)
        true_mean = view(self.c0) * x0 + view(self.ct) * xt
        pred_x0 = (xt - view(self.sqrt_1m) * eps.detach()) / view(self.sqrt_ac)
        mean = view(self.c0) * pred_x0 + view(self.ct) * xt
        true_logvar = view(self.log_post)
        kl = 0.5 * (logvar - true_logvar - 1 + (true_logvar - logvar).exp() + (true_mean - mean).square() * (-logvar).exp())
        vb = kl.mean((1, 2, 3)) / math.log(2.0)
        vb = torch.where(t == 0, vb * 0, vb).mean()
        return {"loss": simple + vb, "mse": mse, "vb": vb}

    @torch.no_grad()
    def ddim(self, net, x, y, steps, cfg):
        """Deterministic DDIM, leading spacing; cond and null in one batch."""
        null = torch.full_like(y, NUM_CLASSES)
        stride = 1000 // steps
        for t in range(stride * (steps - 1), -1, -stride):
            tt = torch.full((y.shape[0],), t, device=x.device)
            if cfg == 1.0:
                eps = net(x, tt, y).float()[:, :4]
            else:
                both = net(torch.cat([x, x]), torch.cat([tt, tt]), torch.cat([y, null])).float()[:, :4]
                c, u = both.chunk(2)
                eps = u + cfg * (c - u)
            a, ap = self.ac[t].item(), self.ac[t - stride].item() if t >= stride else 1.0
            x0 = (x - math.sqrt(1 - a) * eps) / math.sqrt(a)
            x = math.sqrt(ap) * x0 + math.sqrt(1 - ap) * eps
        return x


def train_dit(run, render, vae, dit, ema, scale, end_s):
    batch = 8 if run.args.smoke else run.args.batch // run.world
    pool = LatentPool(run, render, vae, scale, 64 if run.args.smoke else 131072)
    run.log(kind="pool", size=pool.size)
    diffusion = Diffusion(run.device)
    net = compiled(dit, run)

    def step_fn(step):
        pool.refresh(8 if run.args.smoke else 128)
        x0, y = pool.draw(batch)
        y = torch.where(torch.rand(batch, device=run.device) < 0.1, torch.full_like(y, NUM_CLASSES), y)
        with autocast(run.device):
            losses = diffusion.losses(net, x0, y)
        return losses, batch

    steps = train_loop(run, dit, ema, step_fn, elapsed(), end_s, run.args.lr, "dit", warmup=500, betas=(0.9, 0.95),
                       save=lambda: save_checkpoint(run, vae, ema, scale))
    run.log(kind="dit_done", steps=steps, batch=batch * run.world)


@torch.no_grad()
def sample(run, vae, dit, scale, y, steps, cfg, seed):
    g = torch.Generator(device=run.device).manual_seed(seed)
    x = torch.randn(y.shape[0], 4, SIDE, SIDE, device=run.device, generator=g)
    with autocast(run.device):
        z = Diffusion(run.device).ddim(dit, x, y, steps, cfg)
    return torch.cat([vae.decode(p / scale) for p in z.split(64)]).clamp(-1, 1)


def save_sheet(path, pictures, columns):
    a = ((pictures / 2 + 0.5).clamp(0, 1) * 255).round().byte().cpu().numpy().transpose(0, 2, 3, 1)
    rows = (len(a) + columns - 1) // columns
    sheet = np.zeros((rows * SIZE, columns * SIZE, 3), np.uint8)
    for i, p in enumerate(a):
        r, c = divmod(i, columns)
        sheet[r * SIZE:(r + 1) * SIZE, c * SIZE:(c + 1) * SIZE] = p
    Image.fromarray(sheet).save(path)


class Classifier(nn.Module):
    """A small convolutional judge of class and features, trained on fresh pictures when scores are taken."""

    def __init__(self):
        super().__init__()
        chans, layers = [3, 32, 64, 128, 192], []
        for a, b in zip(chans, chans[1:]):
            layers += [nn.Conv2d(a, b, 3, stride=2, padding=1), nn.GroupNorm(8, b), nn.SiLU(), nn.Conv2d(b, b, 3, padding=1), nn.GroupNorm(8, b), nn.SiLU()]
        self.body, self.head = nn.Sequential(*layers), nn.Linear(192, NUM_CLASSES)

    def features(self, x):
        return self.body(x).mean((2, 3))

    def forward(self, x):
        return self.head(self.features(x))


def frechet(a, b):
    a, b = a.double(), b.double()
    ma, mb = a.mean(0), b.mean(0)
    ca, cb = torch.cov(a.T), torch.cov(b.T)
    ev = torch.linalg.eigvals(ca @ cb)
    return ((ma - mb).square().sum() + ca.trace() + cb.trace() - 2 * ev.real.clamp(min=0).sqrt().sum()).item()


def score(run, render, vae, dit, scale, seconds):
    """Class accuracy of samples and the Frechet distance of judge features, by steps and guidance. Rank 0 alone."""
    judge = Classifier().to(run.device)
    opt = torch.optim.AdamW(judge.parameters(), lr=2e-3)
    begin, smoke = time.time(), run.args.smoke
    total = 12.0 if not smoke else 1.0
    step = 0
    while time.time() - begin < total:
        y = torch.randint(0, NUM_CLASSES, (256 if not smoke else 8,), device=run.device)
        x = render(2 * 10 ** 6, y)
        with autocast(run.device):
            loss = F.cross_entropy(judge(x).float(), y)
        opt.zero_grad(set_to_none=True)
        loss.backward()
        opt.step()
        for g in opt.param_groups:
            g["lr"] = 2e-3 * max(0.02, 1 - (time.time() - begin) / total)
        step += 1
    judge.eval()
    n = 1008 if not smoke else 36
    with torch.no_grad():
        y = torch.arange(n, device=run.device) % NUM_CLASSES
        real = torch.cat([render(3 * 10 ** 6, p) for p in y.split(252)])
        rec = torch.cat([vae.decode(vae.encode(p)[0]) for p in real.split(126)])
        feats = lambda x: torch.cat([judge.features(p) for p in x.split(252)])
        acc = lambda x: (torch.cat([judge(p) for p in x.split(252)]).argmax(1) == y).float().mean().item()
        real2 = torch.cat([render(4 * 10 ** 6, p) for p in y.split(252)])
        fr = feats(real)
        run.log(kind="judge", steps=step, accuracy_real=round(acc(real), 4), accuracy_reconstructed=round(acc(rec), 4),
                frechet_real=round(frechet(fr, feats(real2)), 3), frechet_reconstructed=round(frechet(fr, feats(rec)), 3))
        for cfg, counts in ((2.0, (50, 5, 20, 10)), (4.0, (50, 5)), (1.0, (50,))) if not smoke else ((2.0, (1,)),):
            for steps in counts:
                if elapsed() > seconds:
                    return
                x = torch.cat([sample(run, vae, dit, scale, p, steps, cfg, 77 + i) for i, p in enumerate(y.split(504))])
                run.log(kind="score", steps=steps, cfg=cfg, accuracy=round(acc(x), 4), frechet=round(frechet(fr, feats(x)), 3))


def save_shards(folder, tensors, limit):
    """f16 safetensors named as diffusers names them; more than one file if `limit` bytes are passed."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().half().cpu().contiguous() for k, v in tensors.items()}
    shards, size = [{}], 0
    for k, v in tensors.items():
        n = v.numel() * 2
        if size + n > limit and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][k] = v
        size += n
    base = "diffusion_pytorch_model"

    def save(shard, name):
        save_file(shard, folder / name, metadata={"format": "pt"})
        (folder / name).chmod(0o644)  # save_file leaves them readable by their owner alone

    if len(shards) == 1:
        save(shards[0], f"{base}.safetensors")
        return
    where = {}
    for i, s in enumerate(shards):
        name = f"{base}-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        save(s, name)
        where.update({k: name for k in s})
    index = {"metadata": {"total_size": sum(v.numel() * 2 for v in tensors.values())}, "weight_map": where}
    (folder / f"{base}.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def export(run, vae, dit, scale, names):
    root = run.out
    write = lambda path, value: (path.parent.mkdir(parents=True, exist_ok=True), path.write_text(json.dumps(value, indent=2) + "\n"))
    save_shards(root / "transformer", dit.export(dit.state_dict()), 12_000_000)
    write(root / "transformer" / "config.json", dit.config())
    save_shards(root / "vae", vae.state_dict(), 12_000_000)
    write(root / "vae" / "config.json", vae.config(scale, SIZE))
    write(root / "scheduler" / "scheduler_config.json",
          {"_class_name": "DDIMScheduler", "_diffusers_version": "0.35.0", "num_train_timesteps": 1000, "beta_start": 0.0001, "beta_end": 0.02,
           "beta_schedule": "linear", "clip_sample": False, "prediction_type": "epsilon", "set_alpha_to_one": True, "steps_offset": 0,
           "timestep_spacing": "leading"})
    write(root / "model_index.json",
          {"_class_name": "DiTPipeline", "_diffusers_version": "0.35.0", "id2label": {str(i): n for i, n in enumerate(names)},
           "scheduler": ["diffusers", "DDIMScheduler"], "transformer": ["diffusers", "DiTTransformer2DModel"], "vae": ["diffusers", "AutoencoderKL"]})
    run.log(kind="export", bytes=sum(p.stat().st_size for p in root.rglob("*") if p.is_file()), scaling_factor=scale)


def split_file(out, name, data, limit=15_500_000):
    """All pieces are written under temporary names before the first is renamed: a run stopped here keeps the old set."""
    pieces = [out / f"{name}.{i:02d}" for i in range(max(1, (len(data) + limit - 1) // limit))]
    for i, piece in enumerate(pieces):
        piece.with_name(f"tmp-{piece.name}").write_bytes(data[i * limit:(i + 1) * limit])
    for piece in pieces:
        piece.with_name(f"tmp-{piece.name}").replace(piece)


def save_checkpoint(run, vae, ema, scale):
    if not all(s.isfinite().all() for s in ema.shadow):  # the loss is looked at every 200 steps, this may come first
        raise SystemExit("the averaged weights are not finite; the last checkpoint is kept")
    buffer = io.BytesIO()
    half = lambda s: {k: v.half() for k, v in s.items()}
    torch.save({"vae": half(vae.state_dict()), "ema": [s.half() for s in ema.shadow], "scale": scale}, buffer)
    split_file(run.out, "checkpoint.pt", buffer.getvalue())


def load_checkpoint(folder, vae, dit, ema, device):
    data = b"".join(p.read_bytes() for p in sorted(Path(folder).glob("checkpoint.pt.*")))
    state = torch.load(io.BytesIO(data), map_location=device)
    vae.load_state_dict({k: v.float() for k, v in state["vae"].items()})
    # training goes on from the averaged weights; the optimizer's state is not kept
    ema.shadow = [s.float().to(device) for s in state["ema"]]
    ema.copy_to(dit)
    return state["scale"]


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("stage", choices=["all", "dit", "export"])
    ap.add_argument("--out", required=True)
    ap.add_argument("--resume", help="folder with checkpoint.pt.NN")
    ap.add_argument("--seconds", type=float, default=540.0, help="for everything; default %(default)s")
    ap.add_argument("--vae-seconds", type=float, default=120.0, help="default %(default)s")
    ap.add_argument("--score-seconds", type=float, default=50.0, help="kept at the end for sheets, scores and export; default %(default)s")
    ap.add_argument("--width", type=int, default=216)
    ap.add_argument("--heads", type=int, default=3)
    ap.add_argument("--depth", type=int, default=10)
    ap.add_argument("--batch", type=int, default=1024, help="of the DiT over all GPUs; default %(default)s")
    ap.add_argument("--lr", type=float, default=1e-3)
    ap.add_argument("--seed", type=int, default=1)
    ap.add_argument("--smoke", action="store_true", help="a few tiny steps of every stage")
    args = ap.parse_args()
    run = Run(args)
    render = Renderer(run.device, tempfile.mkdtemp(), run.rank)
    names = class_names(render)
    vae = AutoencoderKL().to(run.device)
    dit = DiT(args.width, args.heads, args.depth, NUM_CLASSES).to(run.device)
    run.log(kind="start", world=run.world, device=torch.cuda.get_device_name() if run.device.type == "cuda" else "cpu", torch=torch.__version__,
            vae_params=sum(p.numel() for p in vae.parameters()), dit_params=sum(p.numel() for p in dit.parameters()), args=vars(args))
    ema = Ema(dit, 0.9995)
    if args.resume:
        scale = load_checkpoint(args.resume, vae, dit, ema, run.device)
        vae.requires_grad_(False).eval()
    else:
        if args.stage != "all":
            raise SystemExit(f"stage {args.stage} needs --resume")
        scores = train_vae(run, render, vae, args.vae_seconds)
        run.sync_params(vae)
        scale = run.agree(round(1.0 / scores["latent_std"], 5))
        if run.rank == 0:
            with torch.no_grad():
                y = torch.arange(18, device=run.device)
                x = render(5 * 10 ** 6, y)
                save_sheet(run.out / "sheet_vae.png", torch.cat([x[:9], vae.decode(vae.encode(x[:9])[0]), x[9:], vae.decode(vae.encode(x[9:])[0])]), 9)
    if args.stage == "export":
        dit.eval()
        export(run, vae, dit, scale, names)
        return
    train_dit(run, render, vae, dit, ema, scale, args.seconds - args.score_seconds)
    ema.copy_to(dit)
    dit.eval()
    if run.rank == 0:
        save_checkpoint(run, vae, ema, scale)
        y = torch.arange(NUM_CLASSES, device=run.device)
        for s in (50, 5) if not args.smoke else (2, 1):
            save_sheet(run.out / f"sheet_{s}_steps.png", sample(run, vae, dit, scale, y, s, 3.0, 5), 12)
        score(run, render, vae, dit, scale, args.seconds - 5)
        run.log(kind="end")
    if run.world > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
