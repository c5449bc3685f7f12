"""Writes the model card of an exported text model to standard output, from its files and the logs of its training.

    python text_card.py MODEL_FOLDER --hardware "NVIDIA H200" \\
        --run LOG.jsonl "mdm --out OUT --seconds 480 --seconds-total 880" \\
        --run LOG.jsonl "mdm --resume OUT --out OUT --seconds 425 --finish" [--eval LOG.jsonl "32 samples, CPU, f32"] > README.md

`--run`: the log of a command of train_text.py and its arguments, in their order ("torchrun --nproc-per-node 2 | mdm ...": what
stands before the script).
`--eval`: a log with more scores (as `train_text.py eval` writes), and where they come from; they fill in what the runs' own
evaluations, which stop after `--eval-seconds`, have not reached. Every number comes from these files; nothing is measured here."""
import argparse
import json
import textwrap
from pathlib import Path

SHARD_LIMIT, WIDTH = 16 * 1024 * 1024, 130
CURVE_ROWS = 10
TITLE = {"llada": "text: a masked diffusion language model on tasks with exact answers",
         "sdar": "text-block: a block-causal diffusion language model on tasks with exact answers",
         "llama": "text-ar: an autoregressive language model on tasks with exact answers"}
LAYOUT = {"llada": "LLaDA's layout (every row sees every row)",
          "sdar": "SDAR's layout (q/k norm; rows see the blocks up to their own)",
          "llama": "Llama's layout"}
TOO_WEAK, WELL_LEARNED = 0.2, 0.95
BY_HEART = 5.0  # nats a token; a model that has seen no Shakespeare at all has ln 1024 = 6.9


def table(header, rows):
    lines = [header, ["---"] * len(header)] + rows
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines) + "\n"


def para(text, indent=""):
    return textwrap.fill(" ".join(text.split()), WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def read(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def scores_of(log):
    return [e["eval"] for e in log if "eval" in e]


def key_of(r):
    return r["task"], r.get("size"), r.get("length"), bool(r.get("aware"))


def label(key):
    task, size, length, aware = key
    return task + (f", {size} pairs" if size else "") + (f", {length:,} bytes" if length else "") + (", question first" if aware else "")


def run_of(log, command):
    """What the log of one command says."""
    start = next(e for e in log if "parameters" in e)
    steps = [e for e in log if "step" in e]
    end = next(e for e in log if "trained_s" in e)
    text = [r["nats_a_token"] for e in log for r in e.get("results", []) if r["task"] == "text"]
    launcher, command = command.split(" | ") if " | " in command else ("python", command)
    ranks = int(launcher.split()[-1]) if launcher.startswith("torchrun") else 1
    return dict(command=f"{launcher} samples/train/train_text.py {command}", start=start, steps=steps, end=end, minutes=end["at_s"] / 60, taken=end["steps"] - start["steps"],
                tokens=(end["steps"] - start["steps"]) * start["rows"] * start["length"] * ranks, scores=scores_of(log), text=text[-1] if text else None)


def score_table(diffusion, sure, fast):
    """sure, fast: scores of one token a step, and of the threshold; a row for each setting, those of a task together."""
    found = {}
    for column, rows in (("sure", sure), ("fast", fast)):
        for r in rows:
            found.setdefault(key_of(r), {}).setdefault(column, r)
    cell = lambda r: f"{r['exact_match']:.2f}" if r else ""
    lines = []
    order = list(dict.fromkeys(key[0] for key in found))
    for key, by in sorted(found.items(), key=lambda item: order.index(item[0][0])):
        a, b = by.get("sure"), by.get("fast")
        any_ = a or b
        line = [label(key), round(any_["prompt_tokens"]), round(any_["answer_tokens"]), cell(a), a["n"] if a else ""]
        if diffusion:
            line += [a["nfe"] if a else "", cell(b), b["nfe"] if b else "", b["n"] if b else ""]
        lines.append(line)
    header = ["task", "prompt", "answer", "exact", "samples"] + (["forwards", "exact, 0.9", "forwards, 0.9", "samples, 0.9"] if diffusion else [])
    return table(header, lines)


def weaknesses(kind, last, fast):
    """Sentences that follow from the scores."""
    plain = [r for r in last["scores"] if not r.get("threshold")]
    by_task = {}
    for r in plain:
        by_task.setdefault(r["task"], []).append(r["exact_match"])
    span = lambda v: f"{min(v):.2f}" + (f" to {max(v):.2f}" if f"{min(v):.2f}" != f"{max(v):.2f}" else "")
    of = lambda low, high: ", ".join(f"{task} ({span(v)})" for task, v in sorted(by_task.items(), key=lambda i: min(i[1])) if low <= min(v) < high)
    out = []
    if of(0.0, TOO_WEAK):
        out.append(f"Does not solve {of(0.0, TOO_WEAK)}: nothing can be told about a cache from these.")
    if of(TOO_WEAK, WELL_LEARNED):
        out.append(f"Not always right even uncached{'' if kind == 'llama' else ' and one token a step'}: {of(TOO_WEAK, WELL_LEARNED)}.")
    before = {key_of(r): r for r in plain}
    worse = [(r, before[key_of(r)]) for r in fast if key_of(r) in before and r["exact_match"] < before[key_of(r)]["exact_match"] - 0.15]
    if worse:
        out.append("Committing every token above 0.9 costs much on " +
                   ", ".join(f"{r['task']} ({b['exact_match']:.2f} to {r['exact_match']:.2f})" for r, b in worse) +
                   ": compare a cache with the uncached decode of the same rule.")
    if last["text"] is not None and last["text"] > BY_HEART:
        train = last["steps"][-1]["accuracy"].get("text")
        out.append(f"It has learned the text of its training by heart ({100 * train:.1f} % of the tokens right) and is useless on any other: "
                   f"{last['text']:.1f} nats a token held out, where a uniform guess has 6.9. Do not judge it, or anything it guides, on plain text.")
    elif last["text"] is not None:
        out.append(f"Plain text is barely learned ({last['text']:.2f} nats a token held out" +
                   (", an upper bound" if kind != "llama" else "") + "): what it writes there has the look of the corpus, no sense.")
    seen = {r["task"] for r in last["scores"]}
    if kind == "llama":
        unheld = [t for t in ("needle-mk", "needle-mv", "vt-long", "cwe") if t not in seen]
        accuracy = last["steps"][-1]["accuracy"]
        if unheld:
            out.append("Trained on " + ", ".join(f"{t} ({accuracy[t]:.2f})" for t in unheld if t in accuracy) +
                       " too, which were not judged; the numbers are those of single tokens of the answers while training.")
    missing = [t for t in ("trace", "chain", "walk") if t not in seen]
    if missing:
        out.append("Not judged at one token a step (time was up): " + ", ".join(missing) + ".")
    out.append("No instructions, no chat, no language but the formats of `samples/tasks/tasks.h`: a prompt that differs by a space is unknown to it.")
    return "\n".join(para("- " + w, "  ") for w in out)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--hardware", required=True)
    parser.add_argument("--run", nargs=2, action="append", required=True, metavar=("LOG", "COMMAND"))
    parser.add_argument("--seed", type=int, default=1, help="of the runs; default %(default)s, as theirs")
    parser.add_argument("--before", help="what the first run starts from, in words")
    parser.add_argument("--eval", nargs=2, action="append", default=[], metavar=("LOG", "WHERE"))
    args = parser.parse_args()
    config = json.loads((args.folder / "config.json").read_text())
    kind, runs = config["model_type"], [run_of(read(log), command) for log, command in args.run]
    last, diffusion = runs[-1], config["model_type"] != "llama"
    get = lambda *names: next(config[n] for n in names if n in config)
    files = [p for p in args.folder.iterdir() if p.suffix in (".safetensors", ".json")]
    shards = [p.stat().st_size for p in args.folder.glob("*.safetensors")]
    assert max(shards) < SHARD_LIMIT
    sure = [r for r in last["scores"] if not r.get("threshold")]
    fast = [r for r in last["scores"] if r.get("threshold") == 0.9]
    notes = []
    for path, where in args.eval:
        more = scores_of(read(path))
        added = [r for r in more if not r.get("threshold")], [r for r in more if r.get("threshold") == 0.9]
        have = {key_of(r) for r in sure}, {key_of(r) for r in fast}
        new = [[r for r in rows if key_of(r) not in h] for rows, h in zip(added, have)]
        sure, fast = sure + new[0], fast + new[1]
        if new[0]:
            notes.append(f"Rows of {' and '.join(sorted({str(r['n']) for r in new[0]}))} samples: {where}.")
        if new[1]:
            notes.append(f"Threshold 0.9: {where}.")
    commands = "\n".join(textwrap.fill(r["command"], WIDTH - 6, initial_indent="    ", subsequent_indent="        ", break_long_words=False,
                                       break_on_hyphens=False).replace("\n", " \\\n") for r in runs)
    curve = []
    for number, r in enumerate(runs, 1):
        every = max(1, len(r["steps"]) * len(runs) // CURVE_ROWS)
        for e in r["steps"][every - 1::every]:
            curve.append([e["step"], e["loss"], e["rate"], f"{e['tokens_s']:,}"] + ([number] if len(runs) > 1 else []))
    counted = {"llada": "a forward is one pass over prompt and answer, until the text before the first end-of-text is there; blocks of 32 tokens",
               "sdar": f"a forward is one pass over everything so far; blocks of {config.get('block_size')} tokens"}.get(kind)
    how = {"llada": "LLaDA's objective, the number of masked tokens drawn uniformly; a part of the samples masked as in semi-autoregressive decoding (`--suffix-part`)",
           "sdar": "the training mask of BD3-LM over a noisy and a clean copy of each row, which tokens/s counts both",
           "llama": "next token, answers and text only; several questions about one context share its tokens"}[kind]
    size = sum(p.stat().st_size for p in files)
    blocks = f", blocks of {config['block_size']}" if "block_size" in config else ""
    what = f"""{last['start']['parameters']:,} parameters (width {get('hidden_size', 'd_model')}, {get('num_hidden_layers', 'n_layers')} layers,
        {get('num_attention_heads', 'n_heads')} heads, {get('num_key_value_heads', 'n_kv_heads')} of keys and values,
        {get('intermediate_size', 'mlp_hidden_size')} in the feed-forward), {LAYOUT[kind]},
        context {get('max_position_embeddings', 'max_sequence_length'):,}, vocabulary {config['vocab_size']:,}{blocks}. Weights are bf16, {size:,} bytes in
        all. Licence: Apache 2.0, as the rest of the tree."""
    data = """Data: the tasks of `samples/tasks/tasks.h`, made while training from seeds that no judge uses (bit 31 set), and Tiny Shakespeare
        (public domain; the last twentieth held out). The tokenizer, which `text`, `text-block` and `text-ar` share, is the byte-level BPE
        of `samples/train/text_tokenizer.py`: numbers and signs of the tasks are one token a character. Made to show what caches and
        commit rules do to a language model, not to be one."""
    where = f"""On one {args.hardware}, {sum(r['minutes'] for r in runs):.1f} minutes, compiling included{', from ' + args.before if args.before else ''};
        seed {args.seed}:"""
    training = f"""{sum(r['taken'] for r in runs):,} steps, {sum(r['tokens'] for r in runs) / 1e9:.2f} billion tokens in rows of
        {last['start']['length']:,} packed with whole samples, adamw, rate annealed to 2 % of its start (`--restart`: in each command), weight average exported. {how[0].upper() + how[1:]}. Sizes grow while it trains and a task's share falls as it is learned, so the loss is
        of a changing mixture: compare it within a command only."""
    scoring = f"""Exact match, seeds 0 up, sizes drawn from the task's usual range where none is
        named; greedy, uncached. Prompt and answer: mean length in tokens, end-of-text included."""
    if diffusion:
        scoring += f""" Forwards: mean of a sample; {counted}. First the surest token a step, then with it every token above a confidence of
            0.9."""
    bound = " (a bound; number of masked tokens drawn uniformly)" if diffusion else ""
    print(f"# {TITLE[kind]}\n\n{para(what)}\n\n{para(data)}\n\n## How it was trained\n\n{para(where)}\n\n{commands}\n\n{para(training)}\n")
    print(table(["step", "loss", "rate", "tokens/s"] + ["command"] * (len(runs) > 1), curve))
    print(f"## Scores\n\n{para(scoring)}\n\n{score_table(diffusion, sure, fast)}")
    for note in notes:
        print(para(note) + "\n")
    print(f"Held-out text: {last['text']:.2f} nats a token{bound}.\n\n## Known weaknesses\n")
    print(weaknesses(kind, dict(last, scores=sure), fast))


if __name__ == "__main__":
    main()
