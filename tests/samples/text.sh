# shellcheck shell=bash
# tests/samples/text.sh - `refrain text`, `refrain eval`, `refrain bench --what text`, `refrain sweep` and `refrain info` of text: what is
# refused, what they print. Tiny random models (ids alone) where what matters is the program, the shipped ones where it is the text.
# shellcheck source=tests/lib/program.sh
. "$(dirname "${BASH_SOURCE[0]}")/../lib/program.sh"
export OMP_NUM_THREADS=1 TERM=xterm-256color
llada=$FIXTURES/text-llada dream=$FIXTURES/text-dream sdar=$FIXTURES/text-sdar llama=$FIXTURES/text-llama
[ -d "$llada" ] || exit 77
value() { "$JSON_GET" "$@" 2>/dev/null; }
true_that() { awk "BEGIN { exit !($1) }"; }
ids=(--device cpu --tokens "3,1,4,1,5,9,2,6" -n 32)
own=(text -m "$llada" "${ids[@]}")

# ---- refused ----
refused "no prompt" 2 "expected a prompt" text -m "$llada" --device cpu
refused "empty prompt" 2 "--prompt|empty" text -m "$llada" --device cpu -p ""
refused "two prompts" 2 "--prompt|--tokens|exclude" "${own[@]}" -p a
: >empty.txt
refused "empty file" 2 "empty.txt|the prompt is empty" text -m "$llada" --device cpu -f empty.txt
refused "missing file" 1 "none.txt" text -m "$llada" --device cpu -f none.txt
refused "missing model" 1 "no such model" text -m nowhere -p a
refused "words without a tokenizer" 2 "tokenizer.json|--tokens" text -m "$llada" --device cpu -p a
refused "invalid UTF-8" 2 "not valid UTF-8|byte 2|0xff" text -m "$llada" --device cpu -p $'ab\xff'
refused "id out of range" 2 "id 9999|0..299" text -m "$llada" --device cpu --tokens 1,9999
refused "negative id" 2 "-3|out of range" text -m "$llada" --device cpu --tokens 1,-3
refused "no id" 2 "expected ids|seven" text -m "$llada" --device cpu --tokens 1,seven
refused "only commas" 2 "the prompt is empty" text -m "$llada" --device cpu --tokens ,,
refused "huge id" 2 "out of range" text -m "$llada" --device cpu --tokens 99999999999999999999
refused "canvas longer than the model" 2 "512" text -m "$llada" --device cpu --tokens 1 -n 512
seq -s, 1 200 >ids.txt && for _ in 1 2 3; do
    printf ',' && seq -s, 1 200
done >>ids.txt
refused "prompt longer than the context" 2 "prompt has 800 tokens|512" text -m "$llada" --device cpu --tokens ids.txt
refused "blocks that do not divide" 2 "32|blocks of 5" "${own[@]}" --block 5
refused "steps that do not divide" 2 "7 steps|4 blocks" "${own[@]}" --block 8 --steps 7
refused "an image model" 2 "not a text model|refrain image" text -m "$tiny" --device cpu -p a
refused "a world" 2 "not a text model|refrain world" text -m "$FIXTURES/oasis-tiny" --device cpu -p a
refused "a text model as one of images" 2 "refrain text" image -m "$llada" --device cpu
refused "a text model as a world" 2 "refrain text" world -m "$llada" --device cpu
refused "feature policy" 2 "teacache|diffusion transformers|dual" "${own[@]}" --cache-mode teacache
refused "row policy of images" 2 "dual|refrain text" image -m "$tiny" --device cpu --cache-mode dual
refused "unknown row policy" 2 "did you mean window" "${own[@]}" --cache-mode windw
refused "policy option" 2 "--cache-option|refresh" "${own[@]}" --cache-mode window --cache-option refrsh=3
refused "policy option without a policy" 2 "--cache-option" "${own[@]}" --cache-option refresh=3
refused "row policy of a block model" 1 "dual|bidirectional" text -m "$sdar" "${ids[@]}" --cache-mode dual
refused "row policy of an autoregressive model" 2 "--cache-mode|autoregressive" text -m "$llama" "${ids[@]}" --cache-mode dual
refused "commit rule of an autoregressive model" 2 "--commit|autoregressive" text -m "$llama" "${ids[@]}" --commit topn
refused "compare with nothing" 2 "--compare|autoregressive" text -m "$llama" "${ids[@]}" --compare
refused "attention reuse without frozen keys" 2 "reuse" "${own[@]}" --attention-reuse flashblock
refused "threshold without its rule" 2 "--threshold|commit threshold" "${own[@]}" --threshold 0.9
refused "threshold over 1" 2 "--threshold|0..1" "${own[@]}" --commit threshold --threshold 2
refused "alg and commit" 2 "--alg|--commit|exclude" "${own[@]}" --alg entropy --commit topn
refused "guided without a guide" 2 "--guide" "${own[@]}" --commit guided
refused "guide without guided" 2 "--guide|--commit guided" "${own[@]}" --guide "$llama"
refused "guide that is no autoregressive model" 1 "--guide|llada" "${own[@]}" --commit guided --guide "$llada"
refused "random order for greedy dkv" 1 "dkv|random remasking" "${own[@]}" --cache-mode dkv --cache-option variant=greedy
refused "chat of ids" 2 "--chat" "${own[@]}" --chat
refused "system without chat" 2 "--system" "${own[@]}" --system a
refused "unknown task" 2 "--task|did you mean sort" text -m "$llada" --device cpu --task srot
refused "task too large" 2 "--task-size|1..8" text -m "$llada" --device cpu --task add --task-size 99
refused "synthetic name" 2 "--synthetic-weights|llada-8b" text --device cpu --synthetic-weights llada
refused "trace in a missing folder" 1 "nowhere" "${own[@]}" --trace nowhere/t
refused "stop at nothing" 2 "--stop" "${own[@]}" --stop ""
refused "missing shard" 1 "model" text -m "$dream" --device cpu --tokens 1 --guide nowhere --commit guided
mkdir unfit torn other
cp "$llada"/* unfit/ && cp "$FIXTURES/tokenizer-llama3/tokenizer.json" unfit/
refused "tokenizer that does not fit" 1 "unfit|tokenizer|only 300" text -m unfit --device cpu -p a
cp "$llada/config.json" torn/ && head -c 3000 "$llada/model.safetensors" >torn/model.safetensors
refused "torn weights" 1 "torn" text -m torn --device cpu --tokens 1
cp "$llada/config.json" other/ && cp "$llama/model.safetensors" other/
refused "weights of another architecture" 1 "other" text -m other --device cpu --tokens 1
mkdir moe && sed 's/"llada"/"mixtral"/; s/LLaDAModelLM/MixtralForCausalLM/' "$llada/config.json" >moe/config.json
refused "unknown architecture" 1 "moe" text -m moe --device cpu --tokens 1
accepted "help" text --help
check "help fits 80 columns" [ "$(wc -L <out)" -le 80 ]

# ---- ids ----
accepted "diffusion" "${own[@]}" --json
check "one object" "$JSON_GET" out >/dev/null
check "one token a pass" [ "$(value out forwards)" -le 32 ]
check "prompt" [ "$(value out prompt_tokens)" = 8 ]
check "ids" [ "$(value out tokens '#')" = "$(value out num_tokens)" ]
check "rows" true_that "$(value out row_passes) > 0 && $(value out key_reads) > $(value out row_passes)"
check "head rows are of the canvas" true_that "$(value out head_rows) <= 32 * 32"
cp out first.json
accepted "again" "${own[@]}" --json
check "again: the same ids" [ "$(value out text)" = "$(value first.json text)" ]
check "text is ids where there is no tokenizer" grep -qE '^[0-9,]*$' <(value out text)
printf '[3, 1,4\n1 5 9 2 6]' >some.txt
accepted "a file of ids, quiet" text -m "$llada" --device cpu --tokens some.txt -n 32 -q
check "quiet" [ ! -s err ]
check "the same ids" [ "$(cat out)" = "$(value first.json text)" ]
accepted "stats" "${own[@]}"
check "stats: one line" grep -qE 'refrain: [0-9]+ tokens? .*in [0-9]+ forwards .*tokens/s.* ms a forward' err
for policy in prefix dual window freecache dkv dllm-cache elastic vicinity; do
    accepted "$policy" "${own[@]}" --block 8 --cache-mode "$policy" --compare --json
    check "$policy: agreement" true_that "$(value out compare agreement) >= 0 && $(value out compare agreement) <= 1"
    check "$policy: fewer rows" true_that "$(value out row_passes) <= $(value out compare row_passes)"
    check "$policy: named" [ "$(value out policy)" = "$policy" ]
done
accepted "exact policy" "${own[@]}" --block 8 --cache-mode window --cache-option refresh=1,external=1000,active=1000 --compare --json
check "exact policy: equal" [ "$(value out compare equal)" = true ]
check "exact policy: no divergence" [ "$(value out compare first_divergence)" = null ]
for rule in threshold factor entropy-bound sequential; do
    accepted "commit $rule" "${own[@]}" --commit $rule --json
    check "commit $rule: told" [ "$(value out commit)" = $rule ]
done
accepted "half the steps" "${own[@]}" --steps 16 --end none --json
check "half the steps: forwards" [ "$(value out forwards)" = 16 ]
for alg in origin maskgit_plus topk_margin entropy; do
    accepted "Dream $alg" text -m "$dream" "${ids[@]}" --alg $alg --steps 8 --json
    check "Dream $alg: forwards" [ "$(value out forwards)" -le 8 ]
done
accepted "blocks" text -m "$sdar" "${ids[@]}" --attention-reuse flashblock --compare --json
check "blocks: reused" true_that "$(value out external_rows_reused) > 0"
accepted "blocks, exact reuse" text -m "$sdar" "${ids[@]}" --attention-reuse flashblock --reuse-refresh 1 --compare --json
check "blocks, exact reuse: equal" [ "$(value out compare equal)" = true ]
accepted "dynamic" text -m "$sdar" "${ids[@]}" --remasking low_confidence_dynamic --threshold 0.5 --json
check "dynamic: the rule" [ "$(value out commit)" = threshold ]
accepted "autoregressive" text -m "$llama" "${ids[@]}" --json --ignore-eos
check "autoregressive: all tokens" [ "$(value out num_tokens)" = 32 ]
accepted "sampled" text -m "$llama" "${ids[@]}" --temperature 1 --top-k 20 --top-p 0.9 --min-p 0.01 -s 7 --json
cp out sampled.json
accepted "sampled again" text -m "$llama" "${ids[@]}" --temperature 1 --top-k 20 --top-p 0.9 --min-p 0.01 -s 7 --json
check "sampled again: the same" [ "$(value out text)" = "$(value sampled.json text)" ]
accepted "another seed" text -m "$llama" "${ids[@]}" --temperature 1 -s 8 --json
check "another seed: other ids" [ "$(value out text)" != "$(value sampled.json text)" ]
accepted "trace" "${own[@]}" --trace t.txt --end none -q
check "trace: a line a pass" [ "$(num_lines t.txt)" = 32 ]
accepted "visual" "${own[@]}" --diffusion-visual --steps 4 --end none -q
check "visual: a line a pass" [ "$(grep -c '^pass ' err)" = 4 ]
"$PTY_RUN" 60x20 screen 'wait:tokens/s' -- "$REFRAIN" "${own[@]}" --diffusion-visual --steps 4 >out 2>err
check "visual in a terminal: redrawn" grep -q $'\e\\[J' screen
check "visual in a terminal: done" has out "exit 0"

# ---- interrupted ----
"$REFRAIN" "${own[@]}" --tokens 1 -n 500 --end none --trace stopped.txt >out 2>stopped.err &
pid=$!
sleep 0.5
kill -TERM "$pid" 2>/dev/null
status=0
wait "$pid" || status=$?
if [ "$status" != 0 ]; then # a fast machine is done by then
    check "interrupted: exit status $status" [ "$status" = 130 ]
    check "interrupted: message" has stopped.err interrupted
    check "interrupted: nothing is left" [ -z "$(find . -name 'stopped.txt*')" ]
fi

# ---- eval, bench, sweep, info ----
refused "unknown tasks" 2 "did you mean add" eval ad -m "$llada" --device cpu
refused "eval without a tokenizer" 1 "tokenizer.json" eval add -m "$llada" --device cpu
refused "text without a corpus" 2 "--corpus" eval text
refused "size that no task has" 2 "--size" eval needle --size 3
accepted "list of tasks" eval list
check "list: sizes" grep -q '^add .*digits' out
accepted "eval help" eval --help
check "eval help fits 80 columns" [ "$(wc -L <out)" -le 80 ]
refused "sweep of an autoregressive model" 1 "refrain eval" sweep -m "$llama" --device cpu
refused "sweep of synthetic weights" 2 "llada-8b" sweep --synthetic-weights llada-8b
refused "sweep with a feature policy" 2 "teacache|model of text" sweep -m "$llada" --policy teacache
refused "sweep of steps" 2 "--steps|text" sweep -m "$llada" --steps 5
refused "wrong setting" 2 "commit|thershold" sweep -m "$llada" --policy dual+commit=thershold
refused "sweep of images with tasks" 2 "--task" sweep -m "$tiny" --task add
refused "bench too long" 2 "512 positions" bench --what text -m "$llada" --device cpu --kept 600
refused "rows of images" 2 "--rows|--what text" bench --rows 3
accepted "bench" bench --what text -m "$llada" --device cpu -r 3 -p 1,32 --kept 64 -o json
check "bench: two shapes, three ways" [ "$(value out '#')" = 6 ]
check "bench: time" true_that "$(value out 0 median_ms) > 0"
check "bench: bandwidth" true_that "$(value out 0 gbytes_per_s) > 0"
for format in md csv jsonl; do
    accepted "bench $format" bench --what text -m "$llama" --device cpu -r 2 -p 4 --kept 8 -o $format
    check "bench $format: lines" [ "$(num_lines out)" -ge 1 ]
done
accepted "info" info "$sdar"
check "info: kind" has out "block diffusion"
check "info: cache" grep -q '^cache .*a token' out
accepted "info --json" info "$FIXTURES/text-qwen2" --json
check "info --json: family" [ "$(value out family)" = qwen2 ]
check "info --json: shards" [ "$(value out weights parameters)" -gt 0 ]
accepted "policies" policies --json
check "policies: of rows" [ "$(grep -c '"row"' out)" -ge 16 ]
accepted "one policy" policies elastic
check "one policy: nothing about worlds" [ "$(grep -c worlds out)" = 0 ]

# ---- the shipped models ----
models=$FIXTURES/../../samples/models
if [ -d "$models/text" ]; then
    export REFRAIN_MODELS=$models
    accepted "completion" text --device cpu -p "37+85=" -n 32 --commit threshold
    check "completion: the text alone" [ "$(cat out)" = 122 ]
    accepted "no model named" text --device cpu -p "37+85=" -n 32 --commit threshold --json
    check "no model named: the shipped one" [ "$(value out text)" = 122 ]
    check "tokens before the end of text" [ "$(value out num_tokens)" = 3 ]
    check "ended" [ "$(value out ended)" = true ]
    accepted "task" text --device cpu --task copy --task-seed 3 -n 32 --commit threshold --compare --json
    check "task: judged" [ "$(value out exact_match)" = true ]
    check "task: reference judged" [ "$(value out compare exact_match)" = true ]
    accepted "autoregressive" text --device cpu -m text-ar -p "37+85=" --stop 2
    check "stop string: cut" [ "$(cat out)" = 1 ]
    accepted "guided" text --device cpu -p "37+85=" -n 32 --commit guided --guide text-ar --json
    check "guided: guide passes" true_that "$(value out guide_forwards) > 0"
    accepted "chat" text --device cpu -m text-ar -p "hello" --chat --system "be brief" -n 4 --json
    check "chat: more than the prompt" true_that "$(value out prompt_tokens) > 6"
    refused "a tokenizer of another guide" 1 "--guide" text --device cpu -p a --commit guided --guide "$llama"
    accepted "eval" eval add,copy --device cpu -n 2 --size 3 --policy "none,dual+commit=threshold+threshold=0.8,0.9,none+steps=8" --json
    check "eval: rows" [ "$(value out '#')" = 8 ]
    check "eval: exact" true_that "$(value out 0 exact_match) >= 0 && $(value out 0 exact_match) <= 1"
    check "eval: agreement of the reference" [ "$(value out 0 agreement)" = 1 ]
    check "eval: fewer passes" true_that "$(value out 1 nfe) < $(value out 0 nfe)"
    check "eval: the control" [ "$(value out 3 nfe)" = 8 ]
    check "eval: settings" [ "$(value out 2 options)" = "+commit=threshold+threshold=0.9" ]
    refused "eval: a setting that never fits" 2 "threshold: needs commit threshold" eval add --device cpu -n 1 --policy dual+threshold=0.5
    refused "eval: feature policy" 2 "fora" eval add --device cpu --policy fora
    refused "eval: prompts that do not fit" 2 "2048 positions" eval needle --device cpu -n 1 --length 9000
    accepted "eval: a refusal among others" eval add --device cpu -n 1 --policy "none+commit=threshold,dkv:variant=greedy" --no-agreement
    check "eval: a refusal is a row" grep -q 'dkv:variant=greedy *refused: ' out
    yes "First Citizen: before we proceed any further, hear me speak." | head -n 200 >corpus.txt
    accepted "likelihood" eval text -m text-ar --device cpu -n 1 --corpus corpus.txt --json
    check "likelihood: finite" true_that "$(value out 0 nll) > 0"
    sweep=(sweep -m text --device cpu --task add -n 2 --fewer-steps "8,1" --policy none+commit=threshold --policy dual+commit=threshold
        --policy dkv:variant=greedy --report report)
    accepted "sweep" "${sweep[@]}" --json
    check "sweep: results" [ "$(value out results '#')" = 6 ]
    check "sweep: the uncached run" [ "$(value out results 0 agreement)" = 1 ]
    check "sweep: the control" [ "$(value out results 1 policy)" = steps ]
    check "sweep: rows left out" true_that "$(value out results 2 row_passes) < $(value out results 0 row_passes)"
    check "sweep: refused" [ "$(value out results 5 status)" = refused ]
    check "sweep: plots" [ "$(grep -o '<svg' report/report.html | wc -l)" -ge 4 ]
    check "sweep: no pictures of images" [ "$(grep -c 'PSNR dB' report/report.html)" = 0 ]
    check "sweep: the control in the report" has report/report.html "no cache, 8 passes a block"
    accepted "sweep again" "${sweep[@]}"
    check "sweep again: goes on" has err "5 of 6 settings already"
    check "sweep again: table" grep -q '^dual+commit=threshold ' out
fi
done_testing
