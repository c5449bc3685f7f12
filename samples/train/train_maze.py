"""Trains the shipped world model: a ViT autoencoder and a space-time DiT on walks through a rendered maze (../worlds/maze.c),
in the open-oasis layout. The architecture is tests/reference/oasis.py; nothing is read but the code.

    torchrun --nproc-per-node 2 train_maze.py all --out OUT --work WORK --seconds 560 --seconds-total 950
    torchrun --nproc-per-node 2 train_maze.py dit --resume-work WORK --out OUT --work WORK --seconds 560 --finish
    python train_maze.py dit --resume OUT --out OUT2 --work WORK --seconds 560 --finish   from the f16 pieces, fresh optimizer
    python train_maze.py ab --resume OUT --out OUT2 --seconds 60 --arms "optimizer=adamw;optimizer=muon"
    python train_maze.py eval --model FOLDER --out OUT          scores.json and a sheet; also --resume, --resume-work
    python train_maze.py export --resume OUT --out FOLDER       config.json, dit and vae safetensors (no GPU needed)
    python train_maze.py all --out OUT --work WORK --smoke      a few tiny steps of every stage on any machine

`--seconds` covers one command, compiling and scores included; `--seconds-total` is the DiT's time over all commands, along
which its rate anneals; `--finish` makes this command the last. OUT gets log.jsonl, sheets and checkpoint.pt.NN (averaged
weights in f16, in pieces under 16 MB); WORK gets the whole state of training and the compiler's cache, for `--resume-work`.

Layout "twin" (the default): every clip enters the DiT twice in one sequence, as context (nearly clean, at the stabilisation
level) and as noisy frames, each of which sees the context before it and itself. That is what sampling sees, for every frame of
the clip at once. Layout "forcing" is diffusion forcing: one sequence, a noise level of its own for each frame."""
import argparse
import copy
import ctypes
import io
import json
import math
import os
import queue
import re
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
sys.path.insert(0, str(ROOT / "tests" / "reference"))
from oasis import (DiT, ViTVAE, add_noise, ddim_update, denoising_steps, latent_to_tokens, load_world, rotate,  # noqa: E402
                   sigmoid_alphas_cumprod, tokens_to_latent)

ACTIONS = ["none", "forward", "back", "left", "right", "strafe-left", "strafe-right"]
SIZE, LEVEL, VAL_SEED = 64, 15, 4_000_000_000
CHUNK = 128  # clips rendered and encoded at a time
CONFIG = {
    "vae": dict(input_height=SIZE, input_width=SIZE, patch_size=8, latent_dim=16, enc_dim=192, enc_depth=3, enc_heads=3,
                dec_dim=192, dec_depth=6, dec_heads=3, mlp_ratio=4.0),
    "dit": dict(input_h=8, input_w=8, patch_size=1, in_channels=16, hidden_size=256, depth=6, num_heads=4, mlp_ratio=4.0,
                external_cond_dim=len(ACTIONS), max_frames=32)}
SMOKE = {
    "vae": dict(CONFIG["vae"], patch_size=16, latent_dim=4, enc_dim=32, enc_depth=1, enc_heads=2, dec_dim=32, dec_depth=1,
                dec_heads=2),
    "dit": dict(CONFIG["dit"], input_h=4, input_w=4, in_channels=4, hidden_size=32, depth=2, num_heads=2, max_frames=8)}
START = time.time()


def elapsed():
    return time.time() - START


# The simulator ---------------------------------------------------------------------------------------------------------


class Maze:
    def __init__(self, threads):
        source = ROOT / "samples" / "worlds" / "maze.c"
        lib = Path(tempfile.mkdtemp()) / "libmaze.so"
        subprocess.run(["cc", "-O3", "-fopenmp", "-shared", "-fPIC", "-o", str(lib), str(source), "-lm"], check=True)
        self.lib, self.threads = ctypes.CDLL(str(lib)), threads
        self.lib.maze_action_name.restype = ctypes.c_char_p
        names = [self.lib.maze_action_name(i).decode() for i in range(len(ACTIONS))]
        if names != ACTIONS:
            raise SystemExit(f"maze.c has the actions {names}")

    def clips(self, frames, actions, seed, first):
        """Fills frames [n, length, size, size, 3] and actions [n, length], u8 on the host."""
        # per thread of the caller, and torchrun sets OMP_NUM_THREADS=1
        self.lib.omp_set_num_threads(ctypes.c_int(self.threads))
        n, length, height, width, _ = frames.shape
        if self.lib.maze_clips(ctypes.c_void_p(frames.data_ptr()), ctypes.c_void_p(actions.data_ptr()), ctypes.c_uint64(seed),
                               ctypes.c_uint64(first), ctypes.c_int(n), ctypes.c_int(length), ctypes.c_int(width),
                               ctypes.c_int(height), ctypes.c_int(3)):
            raise RuntimeError(f"maze_clips refused {n} clips of {length} frames {width}x{height}")

    def new_clips(self, seed, first, n, length):
        frames = torch.empty(n, length, SIZE, SIZE, 3, dtype=torch.uint8)
        actions = torch.empty(n, length, dtype=torch.uint8)
        self.clips(frames, actions, seed, first)
        return frames, actions

    def walk(self, seed, script, size=SIZE, samples=3):
        """Frames [1 + len(script), size, size, 3] from the world's start, and the actions that led to them."""
        world = (ctypes.c_double * 1024)()  # a maze_world, and room to spare
        frames = torch.empty(1 + len(script), size, size, 3, dtype=torch.uint8)
        self.lib.maze_init(world, ctypes.c_uint64(seed))
        for i in range(len(frames)):
            if i > 0:
                self.lib.maze_step(world, ctypes.c_int(script[i - 1]))
            self.lib.maze_render(world, ctypes.c_int(size), ctypes.c_int(size), ctypes.c_int(samples), ctypes.c_void_p(frames[i].data_ptr()))
        return frames, torch.tensor([0] + list(script), dtype=torch.uint8)


def script(text):
    """forward*3,left -> action numbers"""
    parts = [p.partition("*") for p in text.split(",")]
    return [ACTIONS.index(name) for name, _, times in parts for _ in range(int(times or 1))]


class Feeder(threading.Thread):
    """Renders clips into pinned buffers while the GPU trains. `drain(use)` calls use(frames, actions) for what is ready."""

    def __init__(self, maze, seed, chunk, length, pinned):
        super().__init__(daemon=True)
        self.maze, self.seed, self.chunk, self.first, self.busy_s, self.frames = maze, seed, chunk, 0, 1e-9, 0
        self.free, self.ready, self.in_use, self.stopping = queue.Queue(), queue.Queue(), [], False
        for _ in range(4):
            frames = torch.empty(chunk, length, SIZE, SIZE, 3, dtype=torch.uint8, pin_memory=pinned)
            self.free.put((frames, torch.empty(chunk, length, dtype=torch.uint8, pin_memory=pinned)))
        self.start()

    def run(self):
        try:
            while True:
                buffer = self.free.get()
                if self.stopping:
                    return
                begin = time.time()
                self.maze.clips(*buffer, self.seed, self.first)
                self.busy_s += time.time() - begin
                self.first += self.chunk
                self.frames += buffer[1].numel()
                self.ready.put(buffer)
        except Exception as e:  # noqa: BLE001 - handed to the training thread
            self.ready.put(e)

    def drain(self, use, wait=False):
        while self.in_use and self.in_use[0][1].query():
            self.free.put(self.in_use.pop(0)[0])
        try:
            buffer = self.ready.get(block=wait)
        except queue.Empty:
            return False
        if isinstance(buffer, Exception):
            raise buffer
        use(*buffer)
        if torch.cuda.is_available():  # reused once the copy to the GPU is done
            event = torch.cuda.Event()
            event.record()
            self.in_use.append((buffer, event))
            if wait:
                event.synchronize()
        else:
            self.free.put(buffer)
        return True

    def stop(self):
        self.stopping = True
        self.free.put(None)
        self.join(timeout=10)


# One process of the run ------------------------------------------------------------------------------------------------


class Run:
    """Rank, device, log and clock of one process."""

    def __init__(self, args):
        self.args = args
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = int(os.environ.get("RANK", "0"))
        self.cuda = torch.cuda.is_available()
        self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if self.cuda else torch.device("cpu")
        if self.cuda:
            torch.cuda.set_device(self.device)
        if self.world > 1:
            dist.init_process_group("nccl" if self.cuda else "gloo", device_id=self.device if self.cuda else None)
        self.out = Path(args.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.work = Path(args.work) if args.work else None
        self.log_file = open(self.out / "log.jsonl", "a") if self.rank == 0 and args.stage != "export" else None
        self.printed = 0.0
        torch.manual_seed(args.seed * 1000 + self.rank)
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        if self.cuda:
            torch.set_num_threads(2)

    def log(self, often=False, **k):
        """`often`: printed every 20 s at most; the file has all."""
        if self.rank != 0:
            return
        k["at_s"] = round(elapsed(), 1)
        line = json.dumps(k)
        if self.log_file is not None:
            print(line, file=self.log_file, flush=True)
        if not often or elapsed() - self.printed > 20:
            print(line[:1500], flush=True)
            self.printed = elapsed() if often else self.printed

    def agree(self, value):
        """Rank 0's number, on every rank."""
        if self.world == 1:
            return value
        t = torch.tensor([float(value)], device=self.device, dtype=torch.float64)
        dist.broadcast(t, 0)
        return t.item()

    def broadcast(self, *tensors):
        if self.world > 1:
            for t in tensors:
                dist.broadcast(t, 0)

    def autocast(self):
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    @property
    def compile(self):
        return self.cuda and not self.args.no_compile


# Parameters, optimizer, loop -------------------------------------------------------------------------------------------

HIDDEN = re.compile(r"(attn\.(to_qkv|to_out|qkv|proj)|mlp\.fc[12])\.weight$")


class Flat:
    """A model's parameters as views of one buffer, and so their gradients; hidden matrices first, batched by shape.

    groups: [(begin, n, rows, cols)], each n matrices next to one another; a fused q|k|v counts as three. The rest begins at
    `tail`."""

    def __init__(self, model):
        named = [(n, p) for n, p in model.named_parameters()]
        shape = lambda n, p: (3, p.shape[1], p.shape[1]) if "qkv" in n else (1, *p.shape)
        hidden = sorted(((n, p) for n, p in named if HIDDEN.search(n)), key=lambda e: (shape(*e)[1:], e[0]))
        order = hidden + [(n, p) for n, p in named if not HIDDEN.search(n)]
        self.names = [n for n, _ in order]
        self.params = [p for _, p in order]
        total = sum(p.numel() for p in self.params)
        self.data = torch.empty(total, device=self.params[0].device)
        self.grad = torch.zeros_like(self.data)
        self.groups, at = [], 0
        for i, p in enumerate(self.params):
            self.data[at:at + p.numel()].copy_(p.detach().reshape(-1))
            p.data = self.data[at:at + p.numel()].view(p.shape)
            p.grad = self.grad[at:at + p.numel()].view(p.shape)
            if i < len(hidden):
                n, rows, cols = shape(self.names[i], p)
                if self.groups and self.groups[-1][2:] == (rows, cols):
                    self.groups[-1] = (self.groups[-1][0], self.groups[-1][1] + n, rows, cols)
                else:
                    self.groups.append((at, n, rows, cols))
                self.tail = at + p.numel()
            at += p.numel()
        self.ema = self.data.clone()
        self.num_ema = 0

    def average(self, decay):
        self.num_ema += 1
        self.ema.lerp_(self.data, 1 - min(decay, (1 + self.num_ema) / (10 + self.num_ema)))

    def ema_state(self):
        """Averaged parameters by name."""
        state, at = {}, 0
        for n, p in zip(self.names, self.params):
            state[n] = self.ema[at:at + p.numel()].view(p.shape)
            at += p.numel()
        return state


def orthogonal(x, steps=5):
    """The nearest (semi-)orthogonal matrices, roughly: Newton-Schulz iteration of degree 5 on x [n, rows, cols], bf16."""
    x = x.bfloat16()
    tall = x.shape[1] > x.shape[2]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(a, a, a, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x


class Optimizer:
    """AdamW over the flat buffer, or Muon (Jordan 2024) for the hidden matrices and AdamW for the rest; Muon's update is scaled
    to AdamW's usual size (Moonlight, Liu et al. 2025), so one learning rate serves both."""

    def __init__(self, kind, flat, cuda):
        self.kind, self.flat = kind, flat
        self.begin = flat.tail if kind == "muon" else 0
        self.tail = nn.Parameter(flat.data[self.begin:])
        self.tail.grad = flat.grad[self.begin:]
        self.adamw = torch.optim.AdamW([self.tail], lr=0.0, betas=(0.9, 0.98), weight_decay=0.0, fused=cuda)
        self.momentum = torch.zeros(self.begin, device=flat.data.device)

    @torch.no_grad()
    def step(self, rate):
        self.adamw.param_groups[0]["lr"] = rate
        self.adamw.step()
        if self.kind == "muon":
            grad = self.flat.grad[:self.begin]
            self.momentum.mul_(0.95).add_(grad)
            update = grad.add(self.momentum, alpha=0.95)
            for at, n, rows, cols in self.flat.groups:
                part = slice(at, at + n * rows * cols)
                u = orthogonal(update[part].view(n, rows, cols))
                self.flat.data[part].view(n, rows, cols).add_(u, alpha=-rate * 0.2 * math.sqrt(max(rows, cols)))

    def state(self):
        return {"kind": self.kind, "adamw": self.adamw.state_dict(), "momentum": self.momentum}

    def load(self, state):
        if state["kind"] != self.kind:
            return False
        self.adamw.load_state_dict(state["adamw"])
        self.momentum.copy_(state["momentum"])
        return True


def cosine(progress, floor=0.01):
    return floor + (1 - floor) * (0.5 + 0.5 * math.cos(math.pi * min(1.0, max(0.0, progress))))


def fit(run, tag, flat, opt, step_fn, progress_fn, lr, first_step=0, warmup=400, clip=1.0, ema=0.999, max_steps=None, at_check=None):
    """Steps until progress_fn() (rank 0's, 0..1) reaches 1. step_fn(step, progress) -> (loss, {name: (sum, count)}).

    Gradients that are not finite are dropped; ten such steps end the run. at_check(step, progress) is called on rank 0 every
    CHECK steps, outside the count of steps a second. Returns the number of the last step."""
    CHECK = 20
    step, progress = first_step, 0.0
    sums, last, last_step, bad = {}, time.time(), step, torch.zeros((), device=run.device)
    run.broadcast(flat.data, flat.ema)
    while True:
        if (step - first_step) % CHECK == 0:
            progress = run.agree(progress_fn())
            if bad.item() > 10:
                raise SystemExit(f"{tag}: gradients are not finite, last at step {step}; the last checkpoint is kept")
            if run.rank == 0 and sums and time.time() - last > 5:
                mean = {k: round(float(s) / max(1.0, float(n)), 5) for k, (s, n) in sums.items()}
                rate = (step - last_step) / (time.time() - last)
                run.log(often=True, kind=tag, step=step, progress=round(progress, 4), steps_per_s=round(rate, 2), lr=now, **mean,
                        dropped=int(bad.item()))
                sums, last, last_step = {}, time.time(), step
            if run.rank == 0 and at_check is not None:
                spent = time.time()
                at_check(step, progress)
                last += time.time() - spent
            if progress >= 1.0 or (max_steps is not None and step - first_step >= max_steps):
                return step
        now = lr * cosine(progress) * min(1.0, (step - first_step + 1) / warmup)
        flat.grad.zero_()
        loss, parts = step_fn(step, progress)
        loss.backward()
        if run.world > 1:
            dist.all_reduce(flat.grad)
            flat.grad.div_(run.world)
        norm = flat.grad.norm()
        fine = norm.isfinite()
        flat.grad.mul_(torch.where(fine, clip / norm.clamp(min=clip), torch.zeros_like(norm)))
        torch.where(fine, flat.grad, torch.zeros_like(flat.grad), out=flat.grad)
        bad += ~fine
        opt.step(now)
        flat.average(ema)
        step += 1
        if (step - first_step) % 1000 == 0:
            run.broadcast(flat.data, flat.ema)  # ranks compute the same updates; this keeps rounding from parting them
        if run.rank == 0:
            one = torch.ones((), device=run.device)
            for k, (s, n) in {"loss": (loss.detach(), one), "grad_norm": (norm, one), **parts}.items():
                old = sums.get(k, (0.0, 0.0))
                sums[k] = (old[0] + s, old[1] + n)


# Autoencoder -----------------------------------------------------------------------------------------------------------


def to_float(frames):
    """u8 [..., H, W, 3] -> f32 [..., 3, H, W] in -1..1"""
    return frames.movedim(-1, -3).float() / 127.5 - 1


def psnr(a, b):
    """Over the last three axes, for values in -1..1."""
    return -10 * ((a - b) / 2).square().mean((-3, -2, -1)).clamp(min=1e-10).log10()


def edge_loss(a, b):
    """L1 of finite differences at two scales."""
    total = 0.0
    for level in range(2):
        total = total + (a.diff(dim=2) - b.diff(dim=2)).abs().mean() + (a.diff(dim=3) - b.diff(dim=3)).abs().mean()
        if level == 0:
            a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    return total / 2


class FramePool:
    """Rendered clips on the device, a ring."""

    def __init__(self, run, clips, length):
        self.frames = torch.empty(clips, length, SIZE, SIZE, 3, dtype=torch.uint8, device=run.device)
        self.actions = torch.empty(clips, length, dtype=torch.uint8, device=run.device)
        self.at = self.count = 0

    def put(self, frames, actions):
        n = min(len(frames), len(self.frames))
        if self.at + n > len(self.frames):
            self.at = 0
        self.frames[self.at:self.at + n].copy_(frames[:n], non_blocking=True)
        self.actions[self.at:self.at + n].copy_(actions[:n], non_blocking=True)
        self.at += n
        self.count = max(self.count, self.at)

    def draw(self, n):
        device = self.frames.device
        clip = torch.randint(0, self.count, (n,), device=device)
        return to_float(self.frames[clip, torch.randint(0, self.frames.shape[1], (n,), device=device)])


@torch.no_grad()
def encode(vae, frames, scale, chunk=4096):
    """u8 [n, H, W, 3] -> scaled latents [n, C, h, w], f32: what the engine computes, so no autocast."""
    return torch.cat([tokens_to_latent(vae.encode(to_float(f))[0] * scale, vae.grid) for f in frames.split(chunk)])


@torch.no_grad()
def decode(vae, latents, scale, chunk=2048):
    """[..., C, h, w] -> [..., 3, H, W] in -1..1"""
    flat = latents.flatten(0, -4).float()
    out = torch.cat([vae.decode(latent_to_tokens(z) / scale).clamp(-1, 1) for z in flat.split(chunk)])
    return out.unflatten(0, latents.shape[:-3])


def fold_statistics(vae, mean, std):
    """Makes `mean` [C] and `std` [C] of the latents 0 and 1 by changing the two linear layers around them; exact."""
    c = len(mean)
    with torch.no_grad():
        vae.quant_conv.weight[:c] /= std[:, None]
        vae.quant_conv.bias[:c] = (vae.quant_conv.bias[:c] - mean) / std
        vae.quant_conv.bias[c:] -= 2 * std.log()
        vae.post_quant_conv.bias += vae.post_quant_conv.weight @ mean
        vae.post_quant_conv.weight *= std


def compiled_copy(run, vae):
    """A copy whose blocks are compiled, one at a time: they share the code. For calls of one shape."""
    vae = copy.deepcopy(vae)
    if run.compile:
        for block in [*vae.encoder, *vae.decoder]:
            block.compile(dynamic=False)
    return vae


def train_vae(run, feeder, pool, target, judge, end_s):
    """Trains, loads the average into `target`, folds the latents' statistics in. Returns the scaling factor."""
    args = run.args
    batch = 4 if args.smoke else args.vae_batch
    vae = compiled_copy(run, target)
    flat = Flat(vae)
    opt = Optimizer(args.optimizer, flat, run.cuda)
    while pool.count < (4 if args.smoke else 512):
        feeder.drain(pool.put, wait=True)
    clock = {"begin": elapsed(), "steps": 0}

    def progress():
        if clock["steps"] == 40:  # compiling is over
            clock["begin"] = elapsed()
        return 0.0 if clock["steps"] <= 40 else (elapsed() - clock["begin"]) / max(1.0, end_s - clock["begin"])

    def step_fn(step, _):
        clock["steps"] = step + 1
        feeder.drain(pool.put)
        x = pool.draw(batch)
        with run.autocast():
            mean, logvar = vae.encode(x)
            mean, logvar = mean.float(), logvar.float()
            z = mean + torch.randn_like(mean) * (0.5 * logvar).exp()
            # half the pictures get up to a tenth of the latents' spread as noise more, so that the decoder forgives small errors
            amount = (torch.rand(batch, 1, 1, device=run.device) * 0.2 - 0.1).clamp(min=0)
            z = z + torch.randn_like(z) * amount * mean.detach().std()
            got = vae.decode(z)
        got = got.float()
        l1, mse, edge = (got - x).abs().mean(), (got - x).square().mean(), edge_loss(got, x)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum((1, 2)).mean()
        one = torch.ones((), device=run.device)
        parts = {"l1": (l1.detach(), one), "mse": (mse.detach(), one), "edge": (edge.detach(), one), "kl": (kl.detach(), one)}
        return l1 + 4 * mse + edge + args.kl * kl, parts

    steps = fit(run, "vae", flat, opt, step_fn, progress, args.vae_lr, warmup=200, max_steps=20 if args.smoke else None)
    vae = target
    vae.load_state_dict(flat.ema_state())
    vae.requires_grad_(False).eval()
    with torch.no_grad():
        z = encode(vae, pool.frames[torch.randperm(pool.count, device=run.device)[:512], ::4].flatten(0, 1), 1.0)
        std = z.std((0, 2, 3))
        fold_statistics(vae, z.mean((0, 2, 3)), std.clamp(min=0.25 * std.square().mean().sqrt()))
        run.broadcast(*(p.data for p in vae.parameters()))
        z = encode(vae, pool.frames[:min(pool.count, 512), 1], 1.0)
        scale = run.agree(round(1.0 / z.std().item(), 5))
    run.log(kind="vae_done", steps=steps, clips=pool.count, channel_std=[round(v, 3) for v in std.tolist()], scaling_factor=scale,
            render_fps=round(feeder.frames / feeder.busy_s), **(judge.vae(vae, scale, sheet=True) if judge else {}))
    return scale


# DiT: forward passes over the reference's blocks ---------------------------------------------------------------------------


def temporal(attn, x, rope, past=None, mask=None):
    """Attention(temporal=True) with earlier frames' keys and values, or a mask. Returns the output and this x's (k, v)."""
    b, t, n, d = x.shape
    q, k, v = attn.to_qkv(x).view(b, t, n, 3, attn.num_heads, d // attn.num_heads).permute(3, 0, 2, 4, 1, 5).flatten(1, 2)
    q, k = rotate(q, *rope), rotate(k, *rope)
    kv = (k, v) if past is None else (torch.cat([past[0], k], 2), torch.cat([past[1], v], 2))
    causal = mask is None and past is None
    out = F.scaled_dot_product_attention(q, *kv, attn_mask=mask, is_causal=causal)
    out = out.transpose(1, 2).reshape(b, n, t, d).transpose(1, 2)
    return attn.to_out(out), (k, v)


def twin_block(block, x, c, s_rope, t_rope, mask):
    s = block.s_adaLN_modulation(c).chunk(6, dim=-1)
    t = block.t_adaLN_modulation(c).chunk(6, dim=-1)
    x = block.part(x, block.s_attn, *s[:3], s_rope)
    x = block.part(x, block.s_mlp, *s[3:])
    x = block.part(x, lambda h: temporal(block.t_attn, h, t_rope, mask=mask)[0], *t[:3])
    return block.part(x, block.t_mlp, *t[3:])


def twin_forward(dit, context, noisy, t_context, t_noisy, actions, block_fn=twin_block):
    """context, noisy [B, T, C, H, W] at levels t_context, t_noisy [B, T]; actions [B, T, A]. v of the noisy frames, where noisy
    frame i sees context frames before i and itself."""
    n = context.shape[1]
    c = dit.condition(torch.cat([t_context, t_noisy], 1), torch.cat([actions, actions], 1))
    s_rope, t_rope = dit.rotary(n)
    t_rope = tuple(torch.cat([table, table]) for table in t_rope)
    before = torch.ones(n, n, dtype=torch.bool, device=context.device).tril(-1)
    self_only = torch.eye(n, dtype=torch.bool, device=context.device)
    mask = torch.cat([torch.cat([before | self_only, torch.zeros_like(before)], 1), torch.cat([before, self_only], 1)])
    x = dit.embed(torch.cat([context, noisy], 1))
    for block in dit.blocks:
        x = block_fn(block, x, c, s_rope, t_rope, mask)
    return dit.unpatchify(dit.final_layer(x[:, n:], c[:, n:]))


def cached_forward(dit, x, t, actions, first, past):
    """dit.forward for frames at window positions first.., with the (k, v) of every block for the frames before them."""
    c = dit.condition(t, actions)
    angles = dit.t_angles[first:first + x.shape[1]]
    s_rope, t_rope = (dit.s_angles.cos(), dit.s_angles.sin()), (angles.cos(), angles.sin())
    x, kept = dit.embed(x), []
    for i, block in enumerate(dit.blocks):
        s = block.s_adaLN_modulation(c).chunk(6, dim=-1)
        u = block.t_adaLN_modulation(c).chunk(6, dim=-1)

        def attend(h):
            out, kv = temporal(block.t_attn, h, t_rope, past and past[i])
            kept.append(kv)
            return out

        x = block.part(x, block.s_attn, *s[:3], s_rope)
        x = block.part(x, block.s_mlp, *s[3:])
        x = block.part(x, attend, *u[:3])
        x = block.part(x, block.t_mlp, *u[3:])
    return dit.unpatchify(dit.final_layer(x, c)), kept


@torch.no_grad()
def rollout(dit, latents, actions, prompt, steps, level=LEVEL, seed=0):
    """oasis.generate with the context's keys and values kept, rebuilt for every frame once the window slides.

    latents [B, T, C, H, W]: row b's first prompt[b] frames are taken from it; actions [B, T, A]. Returns [B, T, C, H, W]."""
    b, frames = latents.shape[:2]
    alphas = sigmoid_alphas_cumprod().to(latents.device)
    noise = torch.randn(b, frames, *latents.shape[2:], generator=torch.Generator().manual_seed(seed)).to(latents.device)
    known = (torch.arange(frames, device=latents.device)[None] < prompt.to(latents.device)[:, None])[..., None, None, None]
    first = int(prompt.min())
    out = torch.where(known, latents, torch.zeros_like(latents))
    context = None
    for i in range(first, frames):
        start = max(0, i + 1 - dit.max_frames)
        t = torch.full((b, i - start), level - 1, device=latents.device)
        if context is None or start > 0:
            _, context = cached_forward(dit, out[:, start:i], t, actions[:, start:i], 0, None)
        else:
            _, newest = cached_forward(dit, out[:, i - 1:i], t[:, :1], actions[:, i - 1:i], i - 1, context)
            context = [tuple(torch.cat(pair, 2) for pair in zip(old, new)) for old, new in zip(context, newest)]
        x = noise[:, i].clamp(-20, 20)
        for now, following, is_last in denoising_steps(steps):
            at = torch.full((b, 1), now, device=latents.device)
            v, _ = cached_forward(dit, x[:, None], at, actions[:, i:i + 1], i - start, context)
            x = ddim_update(x, v[:, 0].float(), alphas[now], torch.ones_like(alphas[0]) if is_last else alphas[following])
        out[:, i] = torch.where(known[:, i], latents[:, i], x)
    return out


def one_hot(actions, zero_first=True):
    """u8 [B, T] -> f32 [B, T, A]; the row of a clip's first frame is all zero."""
    rows = F.one_hot(actions.long(), len(ACTIONS)).float()
    if zero_first:
        rows[:, 0] = 0
    return rows


# DiT: data and loss ----------------------------------------------------------------------------------------------------


class LatentPool:
    """Every clip rendered so far, encoded: [clips, length, C, h, w] f16 and actions. Old ones go when it is full."""

    def __init__(self, run, vae, scale, clips, length, shape):
        self.vae, self.scale = compiled_copy(run, vae), scale
        self.latents = torch.empty(clips, length, *shape, dtype=torch.float16, device=run.device)
        self.actions = torch.empty(clips, length, dtype=torch.uint8, device=run.device)
        self.at = self.count = 0
        self.length = length

    def put(self, frames, actions):
        device = self.latents.device
        z = encode(self.vae, frames.to(device, non_blocking=True).flatten(0, 1), self.scale, chunk=max(1, len(frames) * self.length))
        self.put_latents(z.unflatten(0, frames.shape[:2]), actions.to(device, non_blocking=True))

    def put_latents(self, latents, actions):
        n = min(len(latents), len(self.latents))
        if self.at + n > len(self.latents):
            self.at = 0
        self.latents[self.at:self.at + n] = latents[:n].half()
        self.actions[self.at:self.at + n] = actions[:n]
        self.at += n
        self.count = max(self.count, self.at)

    def draw(self, n, frames):
        """n clips of `frames` frames from anywhere in the stored ones. The first action's row is zero where a clip begins, and in
        half of the others: a window that has slid keeps the row of its first frame."""
        device = self.latents.device
        clip = torch.randint(0, self.count, (n,), device=device)
        offset = torch.randint(0, self.length - frames + 1, (n,), device=device)
        index = offset[:, None] + torch.arange(frames, device=device)
        rows = one_hot(self.actions[clip[:, None], index], zero_first=False)
        rows[:, 0] *= ((offset > 0) & (torch.rand(n, device=device) < 0.5))[:, None]
        return self.latents[clip[:, None], index].float(), rows

    def save(self, path, gigabytes):
        n = min(self.count, int(gigabytes * 1e9 / (self.latents[0].numel() * 2)))
        if n > 0:
            torch.save((self.latents[:n].cpu(), self.actions[:n].cpu(), fingerprint(self.vae)), path)

    def load(self, path):
        if path.exists():
            latents, actions, made_by = torch.load(path)
            if made_by == fingerprint(self.vae) and latents.shape[1:] == self.latents.shape[1:]:
                self.put_latents(latents.to(self.latents.device), actions.to(self.actions.device))


def fingerprint(model):
    return round(sum(p.detach().double().abs().sum().item() for p in model.parameters()), 3)


BUCKETS = (0, 200, 400, 600, 800, 1000)


class DitLoss:
    """One training step's loss in either layout; `carry` keeps what the last step's predictions are reused for."""

    def __init__(self, run, dit, pool):
        self.run, self.dit, self.pool, self.carry = run, dit, pool, None
        self.alphas = sigmoid_alphas_cumprod().to(run.device)
        # index 0: no noise at all
        self.levels = torch.cat([torch.ones(1, device=run.device), self.alphas])
        self.block_fn = torch.compile(twin_block, dynamic=False) if run.compile else twin_block
        if run.compile and run.args.layout == "forcing":
            for block in dit.blocks:
                block.compile(dynamic=False)

    def __call__(self, clips, frames):
        return self.twin(clips, frames) if self.run.args.layout == "twin" else self.forcing(clips, frames)

    def report(self, per_frame, t, weight):
        loss = (per_frame * weight).sum() / weight.sum()
        parts, detached = {}, per_frame.detach()
        for low, high in zip(BUCKETS, BUCKETS[1:]):
            chosen = ((t >= low) & (t < high) & (weight > 0)).float()
            parts[f"v{low}"] = ((detached * chosen).sum(), chosen.sum())
        return loss, parts

    def twin(self, clips, frames):
        device, args = self.run.device, self.run.args
        rand = lambda *shape: torch.rand(*shape, device=device)
        latents, actions = self.pool.draw(clips, frames)
        context = latents.clone()
        # A share of the clips is the last step's: their context is what the model made of the frames then. The content is the
        # true one, with the model's own errors.
        share = int(clips * args.carry)
        if self.carry is not None and self.carry[0].shape[1] == frames and share > 0:
            old, error, old_actions = (part[:share] for part in self.carry)
            latents[:share], actions[:share] = old, old_actions
            context[:share] = old + error * (0.3 + 0.9 * rand(share, 1, 1, 1, 1))
        # The level the context is said to have, and the noise it has: that, less, or none, as in sampling.
        kind = rand(clips, 1)
        label = torch.where(kind < 0.6, LEVEL - 1, torch.where(kind < 0.9, (rand(clips, 1) * 101).long(), (rand(clips, 1) * 401).long()))
        label = label.expand(clips, frames)
        kind = rand(clips, 1)
        noise_level = torch.where(kind < 0.4, label, torch.where(kind < 0.7, (label * rand(clips, frames)).long(), -1))
        a = self.levels[noise_level + 1][..., None, None, None]
        context = a.sqrt() * context + (1 - a).sqrt() * torch.randn_like(context)
        t = torch.randint(0, 1000, (clips, frames), device=device)
        noisy, target = add_noise(latents, torch.randn_like(latents), t, self.alphas)
        with self.run.autocast():
            v = twin_forward(self.dit, context, noisy, label, t, actions, self.block_fn)
        v = v.float()
        per_frame = (v - target).square().mean((2, 3, 4))
        a = self.alphas[t][..., None, None, None]
        error = a.sqrt() * noisy - (1 - a).sqrt() * v.detach() - latents
        error *= ((t >= 30) & (t < 750))[..., None, None, None]
        error[:, 0] = 0
        # clips that were carried are not carried again
        self.carry = (latents[share:], error[share:], actions[share:])
        weight = torch.ones_like(per_frame)
        weight[:, 0] = 0  # nothing precedes it, and sampling never makes it
        return self.report(per_frame, t, weight)

    def forcing(self, clips, frames):
        device = self.run.device
        rand = lambda *shape: torch.rand(*shape, device=device)
        latents, actions = self.pool.draw(clips, frames)
        t = torch.randint(0, 1000, (clips, frames), device=device)
        small = torch.where(rand(clips, frames) < 0.6, LEVEL - 1, (rand(clips, frames) * 61).long())
        share = torch.tensor([0.5, 0.75, 0.9], device=device)[torch.randint(0, 3, (clips, 1), device=device)]
        is_context = (rand(clips, frames) < share) & (rand(clips, 1) < 0.6)
        t = torch.where(is_context, small, t)
        noisy, target = add_noise(latents, torch.randn_like(latents), t, self.alphas)
        with self.run.autocast():
            v = self.dit(noisy, t, actions)
        per_frame = (v.float() - target).square().mean((2, 3, 4))
        weight = torch.where(is_context, 0.02, 1.0)
        weight[:, 0] = 0.02
        return self.report(per_frame, t, weight)


# Judging ---------------------------------------------------------------------------------------------------------------

WALKS = ("forward*23", "right*8,left*8,forward*7", "right*12,forward*11", "strafe-left*6,strafe-right*6,back*4,forward*7")


def save_sheet(path, rows):
    """rows: [n, 3, H, W] each, in -1..1; one row of pictures each."""
    sheet = torch.cat([torch.cat(list(r), -1) for r in rows], 1)
    Image.fromarray(((sheet + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()).save(path)


class Judge:
    """Held-out clips, scripted walks and loops with their true frames, and what the model makes of them. Rank 0 only."""

    def __init__(self, run, maze, frames, clips=32, loops=8):
        self.run, self.maze, self.frames, self.num_clips = run, maze, frames, clips
        self.true, self.actions = maze.new_clips(VAL_SEED, 0, clips, frames)
        scripts = [script(w)[:frames - 1] for w in WALKS]
        walks = [maze.walk(VAL_SEED + 1000 + i, s + [0] * (frames - 1 - len(s))) for i, s in enumerate(scripts)]
        turn = min(8, (frames - 1) // 2)
        self.turn = turn
        loop = script(f"right*{turn},left*{turn}") + [0] * (frames - 1 - 2 * turn)
        loops = [maze.walk(VAL_SEED + 2000 + i, loop) for i in range(loops)]
        stack = lambda pairs: tuple(torch.stack(part).to(run.device) for part in zip(*pairs))
        self.walks, self.loops = stack(walks), stack(loops)
        self.true, self.actions = self.true.to(run.device), self.actions.to(run.device)

    def vae(self, vae, scale, sheet=False):
        true = self.true[:, ::4].flatten(0, 1)
        z = encode(vae, true, scale)
        x, got = to_float(true), decode(vae, z, scale)
        level = (1 - sigmoid_alphas_cumprod()[LEVEL - 1]).sqrt().item()
        noisy = decode(vae, z + level * torch.randn_like(z), scale)
        if sheet:
            save_sheet(self.run.out / "sheet_vae.png", [p for i in range(0, 48, 16) for p in (x[i:i + 16], got[i:i + 16]) if len(p)])
        each = psnr(got, x)
        return {"vae_psnr": round(each.mean().item(), 2), "vae_psnr_worst": round(each.min().item(), 2),
                "vae_psnr_noise15": round(psnr(noisy, x).mean().item(), 2)}

    @torch.no_grad()
    def validation(self, vae, dit, scale):
        """v error of single noisy frames behind clean context, as sampling meets them; comparable between any two runs."""
        n = min(16, self.frames, dit.max_frames)
        z = encode(vae, self.true[:, :n].flatten(0, 1), scale).unflatten(0, (-1, n))
        alphas, grid = sigmoid_alphas_cumprod().to(z.device), (99, 299, 499, 699, 899, 999)
        generator = torch.Generator().manual_seed(1)
        out = {}
        for level in grid:
            noise = torch.randn(z.shape, generator=generator).to(z.device)
            t = torch.full(z.shape[:2], level, device=z.device)
            noisy, target = add_noise(z, noise, t, alphas)
            with self.run.autocast():
                v = twin_forward(dit, z, noisy, torch.full_like(t, LEVEL - 1), t, one_hot(self.actions[:, :n]))
            out[level] = (v.float() - target)[:, 1:].square().mean().item()
        return {"val_v": round(sum(out.values()) / len(out), 5), "val_by_t": {k: round(v, 4) for k, v in out.items()}}

    def rollouts(self, vae, dit, scale, sets, steps, level, frames):
        """sets: [(true frames u8, actions u8, prompt)]. Returns pairs (true, got) [B, frames, 3, H, W] in -1..1 for each."""
        true = torch.cat([s[0][:, :frames] for s in sets])
        z = encode(vae, true.flatten(0, 1), scale).unflatten(0, true.shape[:2])
        prompt = torch.cat([torch.full((len(s[0]),), s[2]) for s in sets])
        z = rollout(dit, z, one_hot(torch.cat([s[1][:, :frames] for s in sets])), prompt, steps, level)
        got, sizes = decode(vae, z, scale), [len(s[0]) for s in sets]
        return list(zip(to_float(true).split(sizes), got.split(sizes)))

    def curve(self, pair, prompt):
        p = psnr(*pair).mean(0)[prompt:]
        return p, [round(p[i].item(), 2) for i in (0, 1, 3, 7, 15, 23, 31, 47, 62) if i < len(p)]

    def loop_psnr(self, pair):
        return psnr(pair[1][:, 2 * self.turn], pair[1][:, 0])

    def __call__(self, vae, dit, scale, steps=10):
        """The quick evaluation while training."""
        begin = time.time()
        n = min(24, self.frames)
        late = min(8, n // 2)
        sets = [(*self.walks, 1), (self.true, self.actions, 1), (self.true, self.actions, late), (*self.loops, 1)]
        walks, one, eight, loops = self.rollouts(vae, dit, scale, sets, steps, LEVEL, n)
        save_sheet(self.run.out / "sheet.png", [r for a, b in zip(*walks) for r in (a, b)])
        frozen = psnr(one[0][:, 1:], one[0][:, :1]).mean().item()
        (p1, c1), (p8, c8) = self.curve(one, 1), self.curve(eight, late)
        return {"psnr_after_1": round(p1.mean().item(), 2), "psnr_after_8": round(p8.mean().item(), 2), "frozen": round(frozen, 2),
                "curve_1": c1, "curve_8": c8, "loop": round(self.loop_psnr(loops).mean().item(), 2),
                "walks": round(psnr(*walks)[:, 1:].mean().item(), 2), **self.validation(vae, dit, scale),
                "eval_s": round(time.time() - begin, 1)}

    def wall_walks(self, count, steps):
        """Walks that push into a wall ten steps off: the simulator's frames are all the same from the twelfth on."""
        found, seed = [], VAL_SEED + 3000
        push = script(f"forward*{steps}")
        while len(found) < count and seed < VAL_SEED + 3000 + 100 * count:
            coarse = self.maze.walk(seed, push, 16, 1)[0].float().diff(dim=0).abs().mean((1, 2, 3))
            if coarse[0] > 0.5 and coarse[12:].max() == 0:
                found.append(self.maze.walk(seed, push))
            seed += 1
        return tuple(torch.stack(part).to(self.run.device) for part in zip(*found)) if found else None

    def full(self, vae, dit, scale, smoke):
        """Everything the model card reports."""
        frames, quick = self.frames, min(self.frames, dit.max_frames)
        late = min(8, quick // 2)
        sharp = lambda x: x.diff(dim=-1).abs().mean().item() + x.diff(dim=-2).abs().mean().item()
        scores = {"frames": frames, "clips": self.num_clips, "window": dit.max_frames, "steps": 10, "stabilization_level": LEVEL}
        scores.update(self.vae(vae, scale), **self.validation(vae, dit, scale))
        sets = [(*self.walks, 1), (self.true, self.actions, 1), (self.true, self.actions, late)]
        walks, one, eight = self.rollouts(vae, dit, scale, sets, 10, LEVEL, frames)
        stride = max(1, frames // 16)
        save_sheet(self.run.out / "sheet_eval.png", [r[::stride] for pair in (walks, tuple(p[:4] for p in one)) for a, b in zip(*pair) for r in (a, b)])
        for name, pair, prompt in (("prompt_1", one, 1), ("prompt_8", eight, late)):
            each = psnr(*pair)[:, prompt:]
            scores[name] = {"mean": round(each.mean().item(), 2), "worst_clip": round(each.mean(1).min().item(), 2),
                            "per_frame": [round(v, 2) for v in each.mean(0).tolist()],
                            "sharpness": round(sharp(pair[1][:, prompt:]) / sharp(pair[0][:, prompt:]), 3),
                            "last_8_frames_sharpness": round(sharp(pair[1][:, -8:]) / sharp(pair[0][:, -8:]), 3)}
        scores["frozen"] = [round(v, 2) for v in psnr(one[0][:, 1:], one[0][:, :1]).mean(0).tolist()]
        each = self.loop_psnr(self.rollouts(vae, dit, scale, [(*self.loops, 1)], 10, LEVEL, 2 * self.turn + 1)[0])
        true_loop = psnr(to_float(self.loops[0][:, 2 * self.turn]), to_float(self.loops[0][:, 0]))
        scores["loop"] = {"seeds": len(each), "mean": round(each.mean().item(), 2), "median": round(each.median().item(), 2),
                          "worst": round(each.min().item(), 2), "over_20_db": round((each > 20).float().mean().item(), 3),
                          "simulator_median": round(true_loop.median().item(), 2)}
        length = 25 if smoke else frames
        wall = self.wall_walks(2 if smoke else 16, length - 1)
        if wall is not None:
            true, got = self.rollouts(vae, dit, scale, [(*wall, 1)], 10, LEVEL, length)[0]
            change = lambda x: x.diff(dim=1).abs().mean((0, 2, 3, 4)) * 127.5  # of 255, per frame
            moving = self.true[:, :quick].float().diff(dim=1).abs().mean().item()
            scores["wall"] = {"walks": len(true), "change_per_frame": [round(v, 2) for v in change(got).tolist()],
                              "last_8": round(change(got)[-8:].mean().item(), 3), "simulator_while_moving": round(moving, 2),
                              "psnr_last": round(psnr(true[:, -1], got[:, -1]).mean().item(), 2)}
        sweep = [(s, LEVEL) for s in (2, 4, 10, 20)] + [(10, level) for level in (1, 50, 100, 200)]
        scores["sweep"], length = [], max(quick, 2 * self.turn + 1)
        for steps, level in sweep if not smoke else sweep[:1]:
            pair, loops = self.rollouts(vae, dit, scale, [(self.true, self.actions, 1), (*self.loops, 1)], steps, level, length)
            p, c = self.curve(pair, 1)
            scores["sweep"].append({"steps": steps, "stabilization_level": level, "psnr": round(p.mean().item(), 2), "curve": c,
                                    "loop": round(self.loop_psnr(loops).median().item(), 2),
                                    "sharpness": round(sharp(pair[1][:, 1:]) / sharp(pair[0][:, 1:]), 3)})
        return scores


# Files -----------------------------------------------------------------------------------------------------------------


def split_file(out, name, data, limit=15_500_000):
    """All pieces are written under temporary names before the first is renamed: a run stopped here keeps the old set."""
    pieces = [out / f"{name}.{i:02d}" for i in range(max(1, (len(data) + limit - 1) // limit))]
    for i, piece in enumerate(pieces):
        piece.with_name(f"tmp-{piece.name}").write_bytes(data[i * limit:(i + 1) * limit])
    for piece in pieces:
        piece.with_name(f"tmp-{piece.name}").replace(piece)


class Session:
    """The models, what is known about them, and their files."""

    def __init__(self, run):
        self.run = run
        self.config = copy.deepcopy(SMOKE if run.args.smoke else CONFIG)
        self.scale, self.trained_s, self.step, self.runs = None, 0.0, 0, 0
        self.flat = self.opt = self.writer = None
        self.pending = {}
        source = Path(run.args.resume_work) / "state.pt" if run.args.resume_work else None
        state = {}
        if source is not None:
            state = torch.load(source, map_location="cpu", mmap=True)
        elif run.args.resume:
            data = b"".join(p.read_bytes() for p in sorted(Path(run.args.resume).glob("checkpoint.pt.*")))
            state = torch.load(io.BytesIO(data), map_location="cpu")
        self.config = state.get("config", self.config)
        if run.args.model:
            self.dit, self.vae, config = load_world(run.args.model)
            self.scale = config["scaling_factor"]
        else:
            self.vae, self.dit = ViTVAE(**self.config["vae"]), DiT(**self.config["dit"])
        self.vae.to(run.device)
        self.dit.to(run.device)
        if state:
            self.vae.load_state_dict({k: v.float() for k, v in state["vae"].items()})
            self.dit.load_state_dict({k: v.float() for k, v in state["dit"].items()})
            self.scale, self.trained_s, self.step, self.runs = state["scale"], state["trained_s"], state["step"], state["runs"]
        if self.scale is not None:
            self.vae.requires_grad_(False).eval()
        self.pending = {k: state[k] for k in ("flat", "opt", "num_ema") if k in state}
        self.runs += 1

    def new_dit(self):
        """A copy for judging, with the averaged weights if there are any."""
        dit = DiT(**self.config["dit"]).to(self.run.device).requires_grad_(False).eval()
        dit.load_state_dict(self.dit.state_dict() if self.flat is None else self.flat.ema_state())
        return dit

    def begin_training(self):
        """Flat parameters and optimizer, where --resume-work left them; from averaged weights (--resume), a fresh optimizer.
        Returns whether the optimizer is fresh."""
        self.flat = Flat(self.dit)
        self.opt = Optimizer(self.run.args.optimizer, self.flat, self.run.cuda)
        fresh = True
        if self.pending:
            self.flat.ema.copy_(self.flat.data)  # state["dit"] is the average
            self.flat.data.copy_(self.pending["flat"])
            self.flat.num_ema = self.pending["num_ema"]
            fresh = not self.opt.load(self.pending["opt"])
            self.pending = {}
        return fresh

    def header(self):
        return {"config": self.config, "scale": self.scale, "trained_s": self.trained_s, "step": self.step, "runs": self.runs}

    def save(self, wait=False):
        """f16 pieces of the average to OUT and the whole state to WORK, written by a thread while training goes on."""
        if self.writer is not None:
            if self.writer.is_alive() and not wait:
                return
            self.writer.join()
        host = lambda d: {k: v.detach().cpu().clone() for k, v in d.items()}
        average = self.flat.ema_state() if self.flat is not None else self.dit.state_dict()
        if not all(v.isfinite().all() for v in average.values()):
            raise SystemExit("the averaged weights are not finite; the last checkpoint is kept")
        state = {**self.header(), "vae": host(self.vae.state_dict()), "dit": host(average)}
        if self.flat is not None and self.run.work is not None:
            opt = self.opt.state()
            tensors = {k: v.cpu().clone() if torch.is_tensor(v) else v for k, v in opt["adamw"]["state"].get(0, {}).items()}
            opt = {"kind": opt["kind"], "momentum": opt["momentum"].cpu().clone(),
                   "adamw": {"state": {0: tensors}, "param_groups": opt["adamw"]["param_groups"]}}
            state.update(flat=self.flat.data.cpu().clone(), opt=opt, num_ema=self.flat.num_ema)
        self.writer = threading.Thread(target=self.write, args=(state,))
        self.writer.start()
        if wait:
            self.writer.join()

    def write(self, state):
        half = lambda d: {k: v.half() for k, v in d.items()}
        buffer = io.BytesIO()
        torch.save({**{k: state[k] for k in self.header()}, "vae": half(state["vae"]), "dit": half(state["dit"])}, buffer)
        split_file(self.run.out, "checkpoint.pt", buffer.getvalue())
        if self.run.work is not None:
            self.run.work.mkdir(parents=True, exist_ok=True)
            torch.save(state, self.run.work / "tmp-state.pt")
            (self.run.work / "tmp-state.pt").replace(self.run.work / "state.pt")


def save_shards(folder, name, tensors, limit=14_500_000):
    """f16 safetensors; more than one file, and an index, if `limit` bytes are passed."""
    tensors = {k: v.detach().half().cpu().contiguous() for k, v in tensors.items()}
    if not all(v.isfinite().all() for v in tensors.values()):
        raise SystemExit(f"{name}: a weight does not fit f16")
    shards, size = [{}], 0
    for k, v in tensors.items():
        if size + v.numel() * 2 > limit and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][k] = v
        size += v.numel() * 2
    where = {}
    for i, shard in enumerate(shards):
        file = f"{name}.safetensors" if len(shards) == 1 else f"{name}-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # save_file leaves them readable by their owner alone
        where.update({k: file for k in shard})
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(v.numel() * 2 for v in tensors.values())}, "weight_map": where}
        (folder / f"{name}.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def export(run, session):
    out = run.out
    save_shards(out, "dit", session.dit.state_dict())
    save_shards(out, "vae", session.vae.state_dict())
    config = {"_class_name": "OasisWorld", "dit": session.config["dit"], "vae": session.config["vae"],
              "scaling_factor": session.scale, "actions": ACTIONS, "fps": 10, "steps": run.args.export_steps,
              "stabilization_level": run.args.stabilization_level, "simulator": "maze"}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    dit, vae, _ = load_world(out)
    for got, want in ((dit, session.dit), (vae, session.vae)):
        for k, v in want.state_dict().items():
            if not torch.equal(got.state_dict()[k], v.detach().cpu().half().float()):
                raise SystemExit(f"export: {k} does not read back")
    files = [p for p in out.iterdir() if p.suffix in (".safetensors", ".json")]
    run.log(kind="export", bytes=sum(p.stat().st_size for p in files), largest=max(p.stat().st_size for p in files),
            scaling_factor=session.scale)


# Stages ----------------------------------------------------------------------------------------------------------------


def window_sizes(run, config):
    """(clips, frames) of a step in the first part of training and in the rest: the same number of frames."""
    longest = config["dit"]["max_frames"]
    per_step = run.args.frames // (2 if run.args.layout == "twin" else 1)
    if run.args.smoke:
        return (4, longest // 2), (2, longest)
    return (max(1, per_step // 16), 16), (max(1, per_step // longest), longest)


def train_dit(run, session, feeder, pool, judge, end_s, tag="dit", compact=False):
    """compact: no checkpoints and no evaluations on the way (stage ab)."""
    args = run.args
    fresh = session.begin_training()
    loss = DitLoss(run, session.dit, pool)
    short, long = window_sizes(run, session.config)
    watch = {"begin": elapsed(), "steps": 0, "saved": time.time(), "judged": time.time(), "fed": (time.time(), feeder.frames)}
    before = session.trained_s
    first_step = session.step

    def progress():
        if watch["steps"] == 40:
            watch["begin"] = elapsed()
        here = elapsed() - watch["begin"] if watch["steps"] > 40 else 0.0
        session.trained_s = before + here
        left = max(1.0, end_s - watch["begin"])
        total = before + left if args.finish or compact or not args.seconds_total else max(args.seconds_total, before + left)
        # 1 exactly where this command must end, the schedule's position before
        watch["schedule"] = session.trained_s / total
        return 1.0 if elapsed() >= end_s and watch["steps"] > 40 else min(watch["schedule"], 0.9999)

    def step_fn(step, progress):
        watch["steps"] += 1
        feeder.drain(pool.put)
        return loss(*(short if progress < args.short_part else long))

    def at_check(step, progress):
        session.step = step
        if compact:
            return
        if time.time() - watch["saved"] > 60:
            fed = (feeder.frames - watch["fed"][1]) / (time.time() - watch["fed"][0])
            run.log(kind="save", step=step, clips=pool.count, rendered_per_s=round(fed))
            watch["saved"], watch["fed"] = time.time(), (time.time(), feeder.frames)
            session.save()
        if judge and time.time() - watch["judged"] > args.judge_every:
            run.log(kind="judge", step=step, **judge(session.vae, session.new_dit(), session.scale))
            watch["judged"] = time.time()

    frames = run.world * short[0] * short[1]
    run.log(kind=f"{tag}_start", short=short, long=long, frames_per_step=frames, from_step=first_step, before_s=round(before),
            clips=pool.count, layout=args.layout, optimizer=args.optimizer, lr=args.lr)
    smoke_steps = None
    if args.smoke:  # both lengths in a few steps
        smoke_steps, progress = 40, lambda: 0.0 if watch["steps"] < 20 else 0.9
    session.step = fit(run, tag, session.flat, session.opt, step_fn, progress, args.lr, first_step=first_step,
                       warmup=args.warmup if fresh else 50, ema=args.ema, max_steps=smoke_steps, at_check=at_check)


def make_pool(run, session, frame_pool=None):
    dit, length = session.config["dit"], clip_length(session.config)
    pool = LatentPool(run, session.vae, session.scale, 64 if run.args.smoke else run.args.pool_clips, length,
                      (dit["in_channels"], dit["input_h"], dit["input_w"]))
    if run.args.resume_work:
        pool.load(Path(run.args.resume_work) / f"pool.{run.rank}.pt")
    if frame_pool is not None:
        n = frame_pool.count
        for frames, actions in zip(frame_pool.frames[:n].split(CHUNK), frame_pool.actions[:n].split(CHUNK)):
            pool.put(frames, actions)
    return pool


def clip_length(config):
    """A little more than a window, so that windows begin in the middle of a walk too."""
    return config["dit"]["max_frames"] + 8


def fill(run, feeder, pool, clips):
    while pool.count < clips:
        feeder.drain(pool.put, wait=True)


def stage_train(run):
    args = run.args
    session = Session(run)
    maze = Maze(args.render_threads or max(1, (os.cpu_count() or 2) // run.world - 2))
    length = clip_length(session.config)
    # every command and rank has a seed of its own: clips are counted from 0 in each
    feeder = Feeder(maze, 1_000_000 * args.seed + 1000 * session.runs + run.rank, 2 if args.smoke else CHUNK, length, run.cuda)
    judge = Judge(run, maze, 8 if args.smoke else 32, *((2, 2) if args.smoke else (32, 8))) if run.rank == 0 else None
    run.log(kind="start", world=run.world, device=torch.cuda.get_device_name() if run.cuda else "cpu", torch=torch.__version__,
            vae_params=sum(p.numel() for p in session.vae.parameters()), dit_params=sum(p.numel() for p in session.dit.parameters()),
            cores=os.cpu_count(), render_threads=maze.threads, args={k: v for k, v in vars(args).items() if v is not None})
    frame_pool = None
    if session.scale is None:
        frame_pool = FramePool(run, 32 if args.smoke else args.frame_clips, length)
        session.scale = train_vae(run, feeder, frame_pool, session.vae, judge, args.vae_seconds)
        if run.rank == 0:
            session.save(wait=True)
    if args.stage != "vae":
        pool = make_pool(run, session, frame_pool)
        del frame_pool
        fill(run, feeder, pool, 4 if args.smoke else 1024)
        run.log(kind="pool", clips=pool.count, render_fps=round(feeder.frames / feeder.busy_s))
        if args.stage == "ab":
            compare(run, session, feeder, pool, judge)
        else:
            train_dit(run, session, feeder, pool, judge, args.seconds - args.tail_seconds)
            if run.rank == 0:
                session.save(wait=True)
                run.log(kind="judge", step=session.step, trained_s=round(session.trained_s), clips=pool.count,
                        **judge(session.vae, session.new_dit(), session.scale))
            if run.work is not None and args.pool_gb > 0:
                run.work.mkdir(parents=True, exist_ok=True)
                pool.save(run.work / f"pool.{run.rank}.pt", args.pool_gb)
    feeder.stop()
    run.log(kind="end")


def compare(run, session, feeder, pool, judge):
    """Each arm trains a DiT from the same start for args.seconds; the last line of each tells them apart."""
    base, state = vars(run.args).copy(), copy.deepcopy(session.dit.state_dict())
    if not run.args.from_checkpoint:
        torch.manual_seed(0)
        state = DiT(**session.config["dit"]).state_dict()
    for arm in run.args.arms.split(";"):
        changes = dict(part.split("=") for part in arm.split(","))
        run.args.__dict__.update(base)
        run.args.__dict__.update({k: type(base[k])(v) for k, v in changes.items()})
        session.dit = DiT(**session.config["dit"]).to(run.device)
        session.dit.load_state_dict(state)
        session.trained_s, session.step, session.pending = 0.0, 0, {}
        torch.manual_seed(run.args.seed * 1000 + run.rank)
        begin = elapsed()
        train_dit(run, session, feeder, pool, None, begin + run.args.seconds, tag="ab", compact=True)
        if run.rank == 0:
            run.log(kind="arm", arm=arm, step=session.step, seconds=round(elapsed() - begin, 1),
                    **judge(session.vae, session.new_dit(), session.scale))
        torch._dynamo.reset()


def stage_eval(run):
    session = Session(run)
    maze = Maze(os.cpu_count() or 1)
    smoke = run.args.smoke
    judge = Judge(run, maze, 12 if smoke else 64, clips=2 if smoke else 32, loops=2 if smoke else 32)
    dit = session.new_dit() if not run.args.model else session.dit.requires_grad_(False).eval()
    scores = {"trained_s": round(session.trained_s), "step": session.step, **judge.full(session.vae, dit, session.scale, smoke)}
    (run.out / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")
    short = {k: v for k, v in scores.items() if not isinstance(v, (list, dict))}
    run.log(kind="scores", **short, prompt_1=scores["prompt_1"]["mean"], prompt_8=scores["prompt_8"]["mean"], loop=scores["loop"],
            wall={k: v for k, v in scores.get("wall", {}).items() if not isinstance(v, list)})
    for row in scores["sweep"]:
        run.log(kind="sweep", **row)


def self_check(run):
    """The two passes written here against the reference's own, on a perturbed tiny model."""
    from oasis import generate
    torch.manual_seed(3)
    dit = DiT(**SMOKE["dit"]).eval()
    with torch.no_grad():
        for p in dit.parameters():
            p.add_(0.1 * torch.randn_like(p))
    b, n, shape = 2, 6, (4, 4, 4)
    x, y, actions = torch.randn(b, n, *shape), torch.randn(b, n, *shape), torch.rand(b, n, 7)
    context_t, t = torch.full((b, n), 14), torch.randint(0, 1000, (b, n))
    with torch.no_grad():
        got = twin_forward(dit, x, y, context_t, t, actions)
        for i in range(n):
            window = torch.cat([x[:, :i], y[:, i:i + 1]], 1)
            levels = torch.cat([context_t[:, :i], t[:, i:i + 1]], 1)
            torch.testing.assert_close(got[:, i], dit(window, levels, actions[:, :i + 1])[:, -1], rtol=1e-4, atol=1e-4)
        frames = 11  # past the window of 8
        latents, actions = torch.randn(b, frames, *shape), torch.rand(b, frames, 7)
        noise = torch.randn(b, frames, *shape, generator=torch.Generator().manual_seed(5))
        want = generate(dit, latents[:, :2], actions, frames, 3, noise)
        torch.testing.assert_close(rollout(dit, latents, actions, torch.tensor([2, 2]), 3, seed=5), want, rtol=1e-3, atol=1e-3)
        vae = ViTVAE(**SMOKE["vae"])
        frames = torch.rand(3, 3, SIZE, SIZE) * 2 - 1
        before = vae.decode(vae.encode(frames)[0])
        fold_statistics(vae, torch.randn(4), torch.rand(4) + 0.5)
        torch.testing.assert_close(vae.decode(vae.encode(frames)[0]), before, rtol=1e-4, atol=1e-4)
    run.log(kind="self_check", ok=True)


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("stage", choices=["all", "vae", "dit", "ab", "eval", "export"])
    ap.add_argument("--out", required=True)
    ap.add_argument("--work", help="folder for the whole state of training and the compiler's cache")
    ap.add_argument("--resume", help="folder with checkpoint.pt.NN")
    ap.add_argument("--resume-work", help="folder with state.pt")
    ap.add_argument("--model", help="eval: an exported folder")
    ap.add_argument("--seconds", type=float, default=540.0, help="for everything, or of each arm; default %(default)s")
    ap.add_argument("--vae-seconds", type=float, default=150.0, help="the autoencoder's end; default %(default)s")
    ap.add_argument("--tail-seconds", type=float, default=20.0, help="kept for the last evaluation and files; default %(default)s")
    ap.add_argument("--seconds-total", type=float, default=0.0, help="of the DiT over all commands; default: this one alone")
    ap.add_argument("--finish", action="store_true", help="the rate anneals to the end of this command")
    ap.add_argument("--frames", type=int, default=1024, help="that enter the DiT in a step, each GPU; default %(default)s")
    ap.add_argument("--short-part", type=float, default=0.6, help="share of the time with 16-frame clips; default %(default)s")
    ap.add_argument("--layout", choices=["twin", "forcing"], default="twin")
    ap.add_argument("--carry", type=float, default=0.25, help="twin: share of clips with the model's own errors; default %(default)s")
    ap.add_argument("--optimizer", choices=["adamw", "muon"], default="adamw")
    ap.add_argument("--lr", type=float, default=6e-4)
    ap.add_argument("--warmup", type=int, default=400)
    ap.add_argument("--ema", type=float, default=0.999)
    ap.add_argument("--vae-batch", type=int, default=256, help="of each GPU; default %(default)s")
    ap.add_argument("--vae-lr", type=float, default=1e-3)
    ap.add_argument("--kl", type=float, default=1e-6)
    ap.add_argument("--frame-clips", type=int, default=32768, help="clips kept as pictures for the autoencoder; default %(default)s")
    ap.add_argument("--pool-clips", type=int, default=300000, help="clips kept as latents; default %(default)s")
    ap.add_argument("--pool-gb", type=float, default=2.0, help="of latents saved to WORK at the end, each GPU; default %(default)s")
    ap.add_argument("--render-threads", type=int, default=0, help="default: cores a process, less two")
    ap.add_argument("--judge-every", type=float, default=150.0, help="seconds between evaluations; default %(default)s")
    ap.add_argument("--arms", default="optimizer=adamw;optimizer=muon", help="ab: option=value,..;.. ; default %(default)s")
    ap.add_argument("--from-checkpoint", action="store_true", help="ab: arms start from the checkpoint's DiT")
    ap.add_argument("--stabilization-level", type=int, default=LEVEL, help="export; default %(default)s")
    ap.add_argument("--export-steps", type=int, default=10, help="export; default %(default)s")
    ap.add_argument("--no-compile", action="store_true")
    ap.add_argument("--seed", type=int, default=1)
    ap.add_argument("--smoke", action="store_true", help="a few tiny steps of every stage")
    args = ap.parse_args()
    if args.stage not in ("all", "vae") and not (args.resume or args.resume_work or args.model):
        raise SystemExit(f"stage {args.stage} needs --resume, --resume-work or --model")
    if args.work:
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(args.work).resolve() / "inductor"))
    run = Run(args)
    if args.smoke and args.stage == "all" and run.rank == 0:
        self_check(run)
    if args.stage == "eval":
        if run.rank == 0:
            stage_eval(run)
    elif args.stage == "export":
        export(run, Session(run))
    else:
        stage_train(run)
    if run.world > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
