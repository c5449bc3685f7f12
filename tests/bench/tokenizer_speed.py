"""Encoding speed of bench_tokenizer and of the `tokenizers` library, one thread each, on the same files.

    python tests/bench/tokenizer_speed.py BENCH FOLDER FILE [FILE ...] [--repeats 5]
    python tests/bench/tokenizer_speed.py BENCH --make DIR --vocab 128256 --train FILE [FILE ...]

The second form makes a tokenizer of the size of Llama-3's first (trained on the files, then filled up with merges of
random tokens) and times how long opening it takes. Best of the repeats; the library runs without its threads."""
import argparse
import json
import os
import random
import subprocess
import time
from pathlib import Path

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["RAYON_NUM_THREADS"] = "1"
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: E402

PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def make(folder, vocab_size, files):
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PATTERN), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    t.decoder = decoders.ByteLevel()
    t.train([str(f) for f in files], trainers.BpeTrainer(vocab_size=vocab_size, min_frequency=2, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    d = json.loads(t.to_str())
    vocab, merges = d["model"]["vocab"], d["model"]["merges"]
    trained, rng = len(vocab), random.Random(1)
    names = list(vocab)
    while len(vocab) < vocab_size:
        a, b = rng.choice(names), rng.choice(names)
        if a + b not in vocab and len(a + b) < 30:
            vocab[a + b] = len(vocab)
            merges.append([a, b])
    seen = {tuple(m) for m in merges}
    tokens = list(vocab)
    for _ in range(20 * vocab_size):  # several ways to one token, as in Llama-3
        if len(merges) >= 280000:
            break
        word = rng.choice(tokens)
        cut = rng.randrange(1, len(word)) if len(word) > 1 else 0
        pair = (word[:cut], word[cut:])
        if cut and pair[0] in vocab and pair[1] in vocab and pair not in seen:
            seen.add(pair)
            merges.append(list(pair))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(d, ensure_ascii=False, indent=2))
    print(f"{trained} tokens trained, {len(vocab)} in all, {len(merges)} merges, {(folder / 'tokenizer.json').stat().st_size / 1e6:.1f} MB")


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ap.add_argument("bench")
    ap.add_argument("folder", type=Path, nargs="?")
    ap.add_argument("files", type=Path, nargs="*")
    ap.add_argument("--repeats", type=int, default=5)
    ap.add_argument("--make", type=Path)
    ap.add_argument("--vocab", type=int, default=128256)
    ap.add_argument("--train", type=Path, nargs="*", default=[])
    args = ap.parse_args()
    if args.make:
        make(args.make, args.vocab, args.train)
    folder = args.make or args.folder
    start = time.perf_counter()
    t = Tokenizer.from_file(str(folder / "tokenizer.json"))
    library_open = time.perf_counter() - start
    for path in args.files or args.train:
        text = path.read_bytes().decode("utf-8", "replace")
        ours = json.loads(subprocess.run([args.bench, str(folder), str(path), str(args.repeats)], check=True, capture_output=True).stdout)
        best = 1e30
        for _ in range(args.repeats):
            start = time.perf_counter()
            e = t.encode(text, add_special_tokens=False)
            best = min(best, time.perf_counter() - start)
        assert len(e.ids) == ours["ids"], (len(e.ids), ours["ids"])
        mb = len(text.encode()) / 1e6
        print(f"{path.name}: {mb:.2f} MB, {ours['ids']} ids; encode {mb / best:.2f} MB/s library, {ours['encode_mb_s']:.2f} MB/s bench_tokenizer "
              f"({best / ours['encode_s']:.1f}x); open {library_open:.3f} s library, {ours['open_s']:.3f} s bench_tokenizer")


if __name__ == "__main__":
    main()
