"""Trains the tokenizer that the three shipped text models share, and writes tokenizer.json and tokenizer_config.json.

    python text_tokenizer.py --corpus tinyshakespeare.txt --out ../models/text ../models/text-block ../models/text-ar

Byte-level BPE over all 256 bytes with Qwen2's pre-tokenizer pattern, in which every digit stands alone. Merges are learned
from prose only (the corpus, and the sentences and words of the recall tasks), with punctuation kept apart from letters, so
that numbers, operators and the formats of the tasks stay one token a character. Needs the `tokenizers` library."""
import argparse
import json
import re
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

HERE = Path(__file__).resolve().parent
SPECIAL = ["<|endoftext|>", "<|mask|>", "<|bos|>", "<|user|>", "<|assistant|>", "<|end|>"]
VOCAB = 1024
PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
# in training: no merge of letters with punctuation, none of two marks
LEARN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]|\s+"
CHAT = ("{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}")


def prose():
    """String literals of the recall tasks that hold words, and the words alone."""
    source = (HERE.parent / "tasks" / "tasks_recall.c").read_text()
    for name in ("tasks_short.c", "tasks_steps.c"):
        source += (HERE.parent / "tasks" / name).read_text()
    literals = [s for s in re.findall(r'"((?:[^"\\\n]|\\.)*)"', source) if re.search(r"[a-z]{2}", s) and "%" not in s and "." not in s[1:-1]]
    words = re.findall(r"[A-Za-z]{2,}", " ".join(literals))
    return [" " + w for w in words] + [s for s in literals if " " in s.strip()]


def main():
    ap = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    ap.add_argument("--corpus", required=True, help="plain text")
    ap.add_argument("--out", required=True, nargs="+", help="model folders")
    args = ap.parse_args()
    corpus = Path(args.corpus).read_text()
    extra = prose()
    letters = [f" {c}" for c in "abcdefghijklmnopqrstuvwxyz"]
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(LEARN), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=SPECIAL, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
                                  show_progress=False)
    learner.train_from_iterator([corpus] + extra * 300 + letters * 3000, trainer)
    learned = json.loads(learner.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in learned["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=learned["vocab"], merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(PATTERN), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    assert tokenizer.get_vocab_size() == VOCAB and [tokenizer.token_to_id(s) for s in SPECIAL] == list(range(len(SPECIAL)))
    config = {"add_bos_token": False, "add_prefix_space": False, "bos_token": "<|bos|>", "eos_token": "<|endoftext|>",
              "pad_token": "<|endoftext|>", "mask_token": "<|mask|>", "chat_template": CHAT, "clean_up_tokenization_spaces": False,
              "model_max_length": 2048, "tokenizer_class": "PreTrainedTokenizerFast"}
    for out in map(Path, args.out):
        out.mkdir(parents=True, exist_ok=True)
        tokenizer.save(str(out / "tokenizer.json"))
        (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    print(f"{len(merges)} merges; {len(tokenizer.encode(corpus).ids) / len(corpus):.3f} tokens a byte of the corpus")


if __name__ == "__main__":
    main()
