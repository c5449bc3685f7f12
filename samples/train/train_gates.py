"""Trains retention gates of the shipped autoregressive model (TRIM-KV, arXiv 2512.03324; with --share-budget Make Each Token Count):
a small network a layer says from a token's hidden state how long its key and value are worth keeping. The model itself is frozen.

    python train_gates.py --corpus TEXT --out ../models/text-ar/gates/retention.safetensors --seconds 180
    python train_gates.py --corpus TEXT --out ../models/text-ar/gates/retention-global.safetensors --seconds 180 --share-budget
    python train_gates.py --corpus TEXT --out /tmp/gates.safetensors --smoke                     a few tiny steps on any machine

Gate of a layer: h (the normed input of its attention) -> 64 -> key heads, SiLU between, log beta = logsigmoid; --share-budget has one
more 64 -> 64 between, and its capacity is one sum over all layers and heads, so that scores compare between them.
Training: logits of attention get (t - i) log beta_i; loss = KL(frozen || gated) + next token + lambda * capacity,
capacity = mean over t of max(0, sum_{i <= t} beta_i^(t - i) - M) / t. Published widths (512) and biases (10, 18) are of larger models
and longer contexts. Tensors (f16): layers.L.fc1.weight, .bias, fc2..., as dlm/kv_tables.h reads them."""
import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from train_text import CONTEXT, EOS, BOS, ROOT, VOCAB, Tasks, read_folder, rotate

TASKS = ("needle", "needle-mk", "needle-mv", "vt-long", "kv-long", "cwe")


class Gate(nn.Module):
    def __init__(self, hidden, mid, heads, parts, bias):
        super().__init__()
        widths = [hidden] + [mid] * (parts - 1) + [heads]
        self.parts = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, widths[1:]))
        nn.init.normal_(self.parts[-1].weight, std=0.01)
        nn.init.constant_(self.parts[-1].bias, bias)

    def forward(self, h):
        """log beta, [rows, tokens, key heads] in f32."""
        x = h.float()
        for part in self.parts[:-1]:
            x = F.silu(part(x))
        return F.logsigmoid(self.parts[-1](x))


def run_layers(model, gates, ids):
    """Logits, and [layer] sums of retention [rows, heads, tokens] (None without gates)."""
    b, t = ids.shape
    pos = torch.arange(t, device=ids.device)
    angle = pos.float()[None, :, None, None] * model.inv_freq
    cos, sin = angle.cos(), angle.sin()
    age = (pos[:, None] - pos[None, :]).float()
    future = age < 0
    x, held = model.embed(ids), []
    for i, layer in enumerate(model.layers):
        n = layer.attn_norm(x)
        split = lambda y, heads: y.view(b, t, heads, layer.d)
        q, k = (rotate(split(p(n), h), cos, sin).transpose(1, 2) for p, h in ((layer.q, layer.heads), (layer.k, layer.kv_heads)))
        v = split(layer.v(n), layer.kv_heads).transpose(1, 2).to(q.dtype)
        if gates is None:
            a = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            log_beta = gates[i](n).transpose(1, 2)  # [b, heads, t]
            bias = (age * log_beta[:, :, None, :]).masked_fill(future, float("-inf"))
            held.append(bias.exp().sum(-1))
            bias = bias.repeat_interleave(layer.heads // layer.kv_heads, 1).to(q.dtype)
            a = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, enable_gqa=True)
        x = x + layer.o(a.transpose(1, 2).reshape(b, t, -1).to(x.dtype))
        n = layer.ffn_norm(x)
        x = x + layer.down(F.silu(layer.gate(n)) * layer.up(n))
    return model.head(model.norm(x)).float(), held


def capacity_loss(held, memory, valid, share):
    t = torch.arange(1, valid.shape[1] + 1, device=valid.device).float()
    kept = torch.stack(held)  # [layers, rows, heads, tokens]
    kept = kept.mean((0, 2), keepdim=True) if share else kept
    over = F.relu(kept - memory) / t
    return (over * valid[None, :, None]).sum() / (valid.sum() * over.shape[0] * over.shape[2])


def draw(tasks, rng, rows, length, device):
    """ids [rows, length]: prompt, answer, end of text; a part of the rows is plain text. Which of them are a sample's, and which
    are answers or text: the model was not trained to say prompts."""
    ids = np.full((rows, length), EOS, dtype=np.int64)
    valid, said = np.zeros((rows, length), dtype=np.float32), np.zeros((rows, length), dtype=np.float32)
    for r in range(rows):
        if rng.random() < 0.15:
            at = int(rng.integers(0, len(tasks.corpus) * 19 // 20 - length))
            sample, begin = tasks.corpus[at:at + length].astype(np.int64), 0
        else:
            name = TASKS[int(rng.integers(len(TASKS)))]
            low = 512 if name in ("needle-mv", "vt-long", "cwe") else 256
            head, answer = None, None
            for fraction in (1.6, 0.8, 0.4, 0):  # bytes a token differ by task: the answer must fit
                top = max(low + 1, int(length * fraction))
                prompt, answer = map(tasks.encode, tasks.generate(name, int(rng.integers(10**6, 10**9)), length=int(rng.integers(low, top))))
                head = np.concatenate([[BOS] if tasks.bos else [], prompt])
                if len(head) + len(answer) < length:
                    break
            sample, begin = np.concatenate([head, answer, [EOS]]).astype(np.int64), len(head)
        n = min(length, len(sample))
        ids[r, :n], valid[r, :n], said[r, begin:n] = sample[:n], 1, 1
    return tuple(torch.from_numpy(x).to(device) for x in (ids, valid, said))


def write(path, gates):
    from safetensors.torch import save_file
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"layers.{i}.fc{p + 1}.{n}": getattr(part, n).detach().cpu().to(torch.float16).contiguous()
               for i, gate in enumerate(gates) for p, part in enumerate(gate.parts) for n in ("weight", "bias")}
    save_file(tensors, str(path), metadata={"format": "pt"})


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "samples" / "models" / "text-ar"))
    parser.add_argument("--corpus", required=True, help="plain text, as train_text.py takes it")
    parser.add_argument("--out", required=True)
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--share-budget", action="store_true")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--mid", type=int, default=64)
    parser.add_argument("--memory", type=float, default=96, help="M of the capacity loss, tokens a layer and head")
    parser.add_argument("--capacity-weight", type=float, default=1.0)
    parser.add_argument("--bias", type=float, default=8)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true")
    a = parser.parse_args()
    start = time.time()
    if a.smoke:
        a.rows, a.length, a.memory = 2, 400, 24
    device = torch.device("cuda" if torch.cuda.is_available() and not a.smoke else "cpu")
    torch.manual_seed(a.seed)
    rng = np.random.default_rng(a.seed)
    tasks = Tasks(Path(a.model) / "tokenizer.json", a.corpus)
    config = json.loads((Path(a.model) / "tokenizer_config.json").read_text())
    tasks.bos = bool(config.get("add_bos_token", False))
    model = read_folder(a.model).to(device).requires_grad_(False).eval()
    s = model.shape
    gates = nn.ModuleList(Gate(s["hidden"], a.mid, s["kv_heads"], 3 if a.share_budget else 2, a.bias) for _ in range(s["layers"])).to(device)
    optimizer = torch.optim.AdamW(gates.parameters(), lr=a.rate, weight_decay=0.0)
    step, first = 0, None
    while True:
        progress = step / 6 if a.smoke else (time.time() - start) / a.seconds
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = a.rate * min(1.0, (step + 1) / 50) * max(0.05, 1 - progress)
        ids, valid, said = draw(tasks, rng, a.rows, min(a.length, CONTEXT), device)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            with torch.no_grad():
                frozen, _ = run_layers(model, None, ids)
            gated, held = run_layers(model, gates, ids)
        weight = said[:, 1:]
        log_p, log_q = frozen[:, :-1].log_softmax(-1), gated[:, :-1].log_softmax(-1)
        total = weight.sum().clamp(min=1)
        kl = ((log_p.exp() * (log_p - log_q)).sum(-1) * weight).sum() / total
        ce = (F.nll_loss(log_q.reshape(-1, VOCAB), ids[:, 1:].reshape(-1), reduction="none").view_as(weight) * weight).sum() / total
        capacity = capacity_loss(held, a.memory, valid, a.share_budget)
        loss = kl + ce + a.capacity_weight * capacity
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(gates.parameters(), 1.0)
        optimizer.step()
        if not torch.isfinite(loss):
            raise SystemExit(f"step {step}: loss {loss.item()}")
        if step % (1 if a.smoke else 50) == 0:
            kept = torch.stack(held).mean().item()
            print(json.dumps(dict(step=step, seconds=round(time.time() - start, 1), kl=round(kl.item(), 5), ce=round(ce.item(), 4),
                                  capacity=round(capacity.item(), 4), kept=round(kept, 1))), flush=True)
        step += 1
    write(Path(a.out), gates)
    print(json.dumps(dict(steps=step, out=a.out, bytes=Path(a.out).stat().st_size)))


if __name__ == "__main__":
    main()
