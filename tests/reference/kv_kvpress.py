"""The same rules by kvpress and by kv.py: do they keep the same tokens?

    pip install kvpress==0.5.5 "transformers<5.3"
    python tests/reference/kv_kvpress.py            # exit 0: all agree

Two kinds of input. (1) A random Llama (3 layers, 4 query heads, 2 key heads of 16, f64, matrices scaled so that attention is not flat)
on 96 random tokens, seeds 0 to 3: a press compresses the cache through the package's context manager, and each key that is left is found
among the keys of a run without. (2) The tensors of kv.py (its SEED), given to score and compress of the presses that take keys, values
and probabilities as they are. Budgets 12, 24 and 48 of 96 tokens, windows 4, 8 and 16.

kvpress has other parameters or other rules than ours in places; compared is kv.py's statement with kvpress's parameters:

  SnapKV        window protected, mean for sum (the same order), average pool of 5 on query heads, then the group's mean
  PyramidKV     budgets are real numbers, rounded, the window included, uniform where the smallest is below the window: `press_pyramid`
  AdaKV         int(0.2 n) best of every head are safe, then the lowest of all heads are masked; no rounding of head budgets, and the
                window's tokens take part: `press_ada`. Pool as SnapKV (ours: maximum of 7 behind the group)
  TOVA          the last token is kept whatever its score, one set for a layer
  Expected      mean and covariance of queries before rotation, rotated by the mean of 512 future rotations: `press_expected`
  CriticalKV    scores are means of the window
  Merging       values compared, to 1e-5: kvpress adds 1e-6 to the sum of two norms and merges in f32
  Random        its own generator: not compared

Result of kvpress 0.5.5, torch 2.11.0, transformers 5.2.0, numpy 2.4.6:

sets of a layer and head that agree:
  llama: Knorm                        72 of 72
  llama: KeyDiff                      72 of 72
  llama: StreamingLLM                 72 of 72
  llama: SnapKV                       72 of 72
  llama: PyramidKV beta 20            72 of 72
  llama: PyramidKV beta 2             72 of 72
  llama: TOVA                         72 of 72
  llama: AdaKV of SnapKV              72 of 72
  llama: AdaKV of Knorm               72 of 72
  llama: ExpectedAttention            72 of 72
  llama: CriticalKV of SnapKV         72 of 72
  llama: Merging of SnapKV            72 of 72
  llama: Observed                     72 of 72
  recorded: Knorm                     18 of 18
  recorded: KeyDiff                   18 of 18
  recorded: StreamingLLM              18 of 18
  recorded: SnapKV                    18 of 18
  recorded: PyramidKV beta 20         18 of 18
  recorded: PyramidKV beta 2          18 of 18
  recorded: TOVA                      18 of 18
  recorded: Observed                  18 of 18
  recorded: AdaKV of SnapKV           18 of 18
  recorded: AdaKV of Knorm            18 of 18
  merged values: 1.7e-07 of the largest
"""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import transformers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

sys.path.insert(0, str(Path(__file__).resolve().parent))
import kv  # noqa: E402
import kvpress  # noqa: E402

L, HQ, HKV, G, D, T = kv.L, kv.HQ, kv.HKV, kv.G, kv.D, kv.T
SEEDS = range(4)
FUTURE = 512


# kvpress's rules in the words of kv.py --------------------------------------------------------------


def snap_scores(x, l, w, size=5):
    p = kv.prompt_attention(x, l, T)[1]
    return kv.over_group([kv.pool(one, "avg", size) for one in kv.window_scores(p, w) / w])


def press_pyramid(x, budget, w, beta):
    base = budget  # w + T (1 - r) - w
    low = base / beta
    high = 2 * base - low
    if high >= T - w:
        high = T - w
        low = 2 * base - high
    fits = T >= high >= low >= w
    share = [round(high - l * (high - low) / (L - 1)) if fits else budget for l in range(L)]
    return [[kv.behind(one, share[l] - w, w) for one in snap_scores(x, l, w)] for l in range(L)]


def press_ada(scores, budget):
    """scores [L][Hkv][T], window included."""
    kept = []
    for one in scores:
        safe = max(1, int(0.2 * budget))
        s = np.array(one)
        for h in range(HKV):
            s[h][kv.top(s[h], safe)] = np.inf
        stay = kv.top(s.reshape(-1), HKV * budget)
        kept.append([[i - h * T for i in stay if i // T == h] for h in range(HKV)])
    return kept


def with_window(s, w):
    return np.concatenate([s, np.full((HKV, w), s.max() + 1)], -1)


def press_tova(x, budget):
    return [[kv.heavy(kv.prompt_attention(x, l, T)[1][:, -1].mean(0), budget, 0, 1)] * HKV for l in range(L)]


def press_expected(x, budget, sinks=4):
    r = x["rotation"]  # the mean of FUTURE rotations, [D, D]
    kept = []
    for l in range(L):
        s = np.zeros((HQ, T - sinks))
        for h in range(HQ):
            q, k = x["plain_q"][l, sinks:, h], x["k"][l, sinks:, h // G]
            mean = q.mean(0)
            cov = (q - mean).T @ (q - mean) / len(q)
            mean, cov = r @ mean, r @ cov @ r.T
            s[h] = kv.softmax(k @ mean / np.sqrt(D) + np.einsum("ti,ij,tj->t", k, cov, k) / (2 * D))
        s = kv.over_group(s) * np.linalg.norm(x["v"][l, sinks:T], axis=-1).T
        kept.append([[*range(sinks), *(sinks + j for j in kv.top(one, budget - sinks))] for one in s])
    return kept


def merged_values(x, kept):
    """[layer][head] -> values of the kept tokens."""
    out, joins = [], iter(kv.merge_joins(x, kept))
    for l in range(L):
        layer = []
        for g in range(HKV):
            v = x["v"][l, :T, g].copy()
            new, total = v.copy(), np.ones(T)
            for e, t, w in next(joins):
                new[t] += w * v[e]
                total[t] += w
            layer.append((new / total[:, None])[kept[l][g]])
        out.append(layer)
    return out


# Inputs ---------------------------------------------------------------------------------------------


def random_llama(seed, attention):
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=128, hidden_size=HQ * D, intermediate_size=96, num_hidden_layers=L, num_attention_heads=HQ,
                         num_key_value_heads=HKV, head_dim=D, max_position_embeddings=1024, initializer_range=0.2,
                         attn_implementation=attention)
    model = LlamaForCausalLM(config).double().eval()
    ids = torch.randint(0, 128, (1, T), generator=torch.Generator().manual_seed(seed))
    return model, ids


def record(model, ids):
    """What kv.py's rules want, of a run without a press."""
    x = {n: np.zeros((L, T, h, D)) for n, h in (("q", HQ), ("plain_q", HQ), ("k", HKV), ("v", HKV))}

    def hook(module, args, kwargs):
        h, (cos, sin) = kwargs["hidden_states"], kwargs["position_embeddings"]
        q = module.q_proj(h).view(1, T, HQ, D).transpose(1, 2)
        x["plain_q"][module.layer_idx] = q[0].transpose(0, 1).detach().numpy()
        q, _ = apply_rotary_pos_emb(q, q, cos, sin)
        x["q"][module.layer_idx] = q[0].transpose(0, 1).detach().numpy()

    hooks = [layer.self_attn.register_forward_pre_hook(hook, with_kwargs=True) for layer in model.model.layers]
    cache = DynamicCache()
    with torch.no_grad():
        model.model(ids, past_key_values=cache)
        at = torch.arange(T, T + FUTURE)[None]
        cos, sin = (a[0].numpy() for a in model.model.rotary_emb(torch.zeros(1, dtype=torch.float64), at))
    for h in hooks:
        h.remove()
    for l in range(L):
        x["k"][l] = cache.layers[l].keys[0].transpose(0, 1).numpy()
        x["v"][l] = cache.layers[l].values[0].transpose(0, 1).numpy()
    turn = np.zeros((D, D))  # x cos + rotate_half(x) sin, as a matrix
    for i in range(D // 2):
        turn[i, i + D // 2], turn[i + D // 2, i] = -1, 1
    x["rotation"] = (cos[:, :, None] * np.eye(D) + sin[:, :, None] * turn).mean(0)
    x["wo"] = np.stack([layer.self_attn.o_proj.weight.detach().numpy().T.reshape(HQ, D, -1) for layer in model.model.layers])
    return x


def run_press(press, model, ids, x):
    """Kept positions and values [layer][head], found by their keys; of masked heads by what is masked."""
    cache = DynamicCache()
    with torch.no_grad(), press(model):
        model.model(ids, past_key_values=cache)
    kept, values = [], []
    for l, layer in enumerate(model.model.layers):
        masked = getattr(layer.self_attn, "masked_key_indices", None)
        if masked is not None:
            gone = {(int(h), int(j)) for h, j in zip(masked[1], masked[2])}
            kept.append([[j for j in range(T) if (h, j) not in gone] for h in range(HKV)])
            layer.self_attn.masked_key_indices = None
            continue
        rows, vals = [], []
        for h in range(HKV):
            k, v = cache.layers[l].keys[0, h].numpy(), cache.layers[l].values[0, h].numpy()
            found = [int(np.flatnonzero((x["k"][l, :, h] == one).all(-1))[0]) for one in k]
            order = np.argsort(found)
            rows.append([found[i] for i in order])
            vals.append(v[order])
        kept.append(rows)
        values.append(vals)
    return kept, values


def direct(press, x, l):
    """score and compress of one layer on given tensors: kept positions of each head."""
    p = torch.from_numpy(kv.prompt_attention(x, l, T)[1])[None]
    rows = lambda a: torch.from_numpy(a[l, :T].transpose(1, 0, 2).copy())[None]
    k, v, hidden = rows(x["k"]), rows(x["v"]), torch.zeros(1, T, 1)
    config = SimpleNamespace(num_attention_heads=HQ, num_key_value_heads=HKV, num_hidden_layers=L, head_dim=D,
                             _attn_implementation="sdpa")
    module = SimpleNamespace(config=config, layer_idx=l, head_dim=D, num_key_value_groups=G, masked_key_indices=None)
    left, _ = press.compress(module, hidden, k, v, p, {})
    if module.masked_key_indices is not None:
        gone = {(int(h), int(j)) for h, j in zip(*module.masked_key_indices[1:])}
        return [[j for j in range(T) if (h, j) not in gone] for h in range(HKV)]
    return [sorted(int(np.flatnonzero((k[0, h].numpy() == one).all(-1))[0]) for one in left[0, h].numpy()) for h in range(HKV)]


# Comparing ------------------------------------------------------------------------------------------


def presses(budget, w, x, recorded):
    """name -> press, kv.py's kept positions."""
    r = 1 - budget / T
    snap = lambda: kvpress.SnapKVPress(r, w, 5)
    ada = lambda scores: press_ada([scores(l) for l in range(L)], budget)
    out = {
        "Knorm": (kvpress.KnormPress(r), kv.knorm(x, budget)),
        "KeyDiff": (kvpress.KeyDiffPress(r), kv.keydiff(x, budget)),
        "StreamingLLM": (kvpress.StreamingLLMPress(r, 4), kv.streaming(T, budget)),
        "SnapKV": (snap(), kv.snapkv(x, budget, w, "avg", 5)),
        "PyramidKV beta 20": (kvpress.PyramidKVPress(r, w, 5, 20), press_pyramid(x, budget, w, 20)),
        "PyramidKV beta 2": (kvpress.PyramidKVPress(r, w, 5, 2), press_pyramid(x, budget, w, 2)),
        "TOVA": (kvpress.TOVAPress(r), press_tova(x, budget)),
        "Observed": (kvpress.ObservedAttentionPress(r), kv.observed(x, budget)),
        "AdaKV of SnapKV": (kvpress.AdaKVPress(snap(), 0.2), ada(lambda l: with_window(snap_scores(x, l, w), w))),
        "AdaKV of Knorm": (kvpress.AdaKVPress(kvpress.KnormPress(r), 0.2),
                           ada(lambda l: -np.linalg.norm(x["k"][l, :T], axis=-1).T)),
    }
    if not recorded:
        out |= {
            "ExpectedAttention": (kvpress.ExpectedAttentionPress(r, FUTURE, 4), press_expected(x, budget)),
            "CriticalKV of SnapKV": (kvpress.CriticalKVPress(snap()), kv.criticalkv(x, budget, w, True)),
            "Merging of SnapKV": (kvpress.MergingPress(snap()), kv.snapkv(x, budget, w, "avg", 5)),
        }
    return out


def main():
    good = {}  # name -> [agreeing sets of a layer and head, all]

    def count(name, got, want, where):
        for l in range(L):
            for h in range(HKV):
                tally = good.setdefault(name, [0, 0])
                tally[1] += 1
                if got[l][h] == want[l][h]:
                    tally[0] += 1
                    continue
                lacks, has = sorted(set(want[l][h]) - set(got[l][h])), sorted(set(got[l][h]) - set(want[l][h]))
                print(f"{name}, {where}, layer {l}, head {h}: kvpress lacks {lacks}, has {has}")

    worst = 0.0
    for seed in SEEDS:
        x = None
        for budget in kv.BUDGETS:
            w = kv.WINDOW[budget]
            for attention in ("sdpa", "eager"):
                model, ids = random_llama(seed, attention)
                x = record(model, ids)
                for name, (press, want) in presses(budget, w, x, False).items():
                    if (name == "Observed") != (attention == "eager"):
                        continue  # it alone wants probabilities
                    got, values = run_press(press, model, ids, x)
                    count(f"llama: {name}", got, want, f"seed {seed}, budget {budget}")
                    if name.startswith("Merging") and got == want:
                        for one, two in zip(values, merged_values(x, want)):
                            for a, b in zip(one, two):
                                worst = max(worst, np.abs(a - b).max() / np.abs(b).max())
    x = kv.make_tensors(kv.SEED)
    for budget in kv.BUDGETS:
        for name, (press, want) in presses(budget, kv.WINDOW[budget], x, True).items():
            count(f"recorded: {name}", [direct(press, x, l) for l in range(L)], want, f"budget {budget}")
    versions = {m.__name__: getattr(m, "__version__", None) for m in (torch, transformers, np)}
    print(f"versions {versions}; sets of a layer and head that agree:")
    for name, (same, num) in good.items():
        print(f"  {name:34s} {same:3d} of {num}")
    print(f"  merged values: {worst:.2g} of the largest")
    return 0 if all(a == b for a, b in good.values()) and worst < 1e-5 else 1


if __name__ == "__main__":
    sys.exit(main())
