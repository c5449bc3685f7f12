# shellcheck shell=bash
# tests/samples/kv.sh - the cache of an autoregressive model under a budget: `refrain text --kv-policy`, its picture, `refrain eval` and
# `refrain sweep` by policy and size, `refrain bench --kv`, `refrain policies`. Tiny random models where what matters is the program.
# shellcheck source=tests/lib/program.sh
. "$(dirname "${BASH_SOURCE[0]}")/../lib/program.sh"
export OMP_NUM_THREADS=1
llada=$FIXTURES/text-llada llama=$FIXTURES/text-llama
[ -d "$llama" ] || exit 77
value() { "$JSON_GET" "$@" 2>/dev/null; }
true_that() { awk "BEGIN { exit !($1) }"; }
ids=$(seq -s, 3 202)
own=(text -m "$llama" --device cpu --tokens "$ids" -n 16 --ignore-eos)

# ---- refused ----
refused "budget without a policy" 2 "--kv-budget|--kv-policy" "${own[@]}" --kv-budget 64
refused "ratio without a policy" 2 "--kv-ratio|--kv-policy" "${own[@]}" --kv-ratio 0.5
refused "option without a policy" 2 "--kv-option|--kv-policy" "${own[@]}" --kv-option window=8
refused "map without a policy" 2 "--kv-map|--kv-policy" "${own[@]}" --kv-map map.png
refused "budget and ratio" 2 "--kv-budget|--kv-ratio|exclude" "${own[@]}" --kv-policy snapkv --kv-budget 64 --kv-ratio 0.5
refused "neither" 2 "--kv-budget|--kv-ratio" "${own[@]}" --kv-policy snapkv
refused "budget of nothing" 2 "--kv-budget|found '0'" "${own[@]}" --kv-policy snapkv --kv-budget 0
refused "half a token" 2 "--kv-budget|whole number|1.5" "${own[@]}" --kv-policy snapkv --kv-budget 1.5
refused "ratio of nothing" 2 "--kv-ratio|found '0'" "${own[@]}" --kv-policy snapkv --kv-ratio 0
refused "ratio over 1" 2 "--kv-ratio|up to 1" "${own[@]}" --kv-policy snapkv --kv-ratio 1.5
refused "ratio that is no number" 2 "--kv-ratio|half" "${own[@]}" --kv-policy snapkv --kv-ratio half
refused "two ratios" 2 "one number|0.5,0.25|refrain eval" "${own[@]}" --kv-policy snapkv --kv-ratio 0.5,0.25
refused "two policies" 2 "one policy|h2o" "${own[@]}" --kv-policy snapkv,h2o --kv-ratio 0.5
refused "no budget for none" 2 "none|keeps everything" "${own[@]}" --kv-policy none --kv-ratio 0.5
refused "unknown policy" 2 "--kv-policy|snapkv" "${own[@]}" --kv-policy snapvk --kv-ratio 0.5
refused "unknown key" 2 "--kv-policy|window" "${own[@]}" --kv-policy snapkv:windwo=8 --kv-ratio 0.5
refused "unknown option" 2 "--kv-option|windwo" "${own[@]}" --kv-policy snapkv --kv-ratio 0.5 --kv-option windwo=8
refused "option without a value" 2 "--kv-option|KEY=VALUE" "${own[@]}" --kv-policy snapkv --kv-ratio 0.5 --kv-option window
refused "a diffusion model" 2 "--kv-policy|autoregressive|text-llada" text -m "$llada" --device cpu --tokens 1,2 -n 32 --kv-policy snapkv --kv-ratio 0.5
refused "a map in a missing folder" 1 "nowhere" "${own[@]}" --kv-policy snapkv --kv-ratio 0.5 --kv-map nowhere/map.png
refused "an episode that nobody asks" 2 "--kv-episode|epicache" "${own[@]}" --kv-policy snapkv --kv-ratio 0.5 --kv-episode what
refused "no episode" 2 "epicache|--kv-episode" "${own[@]}" --kv-policy epicache --kv-ratio 0.5
refused "eval: one way without a policy" 2 "--agnostic|--kv-policy" eval needle --device cpu --agnostic
refused "sweep: ratio without --kv" 2 "--kv-ratio" sweep --kv-ratio 0.5
refused "sweep: a control" 2 "--kv|--fewer-steps|exclude" sweep --kv --fewer-steps 3
refused "sweep: policies of another kind" 2 "--policy|dual" sweep --kv --policy dual
refused "sweep: a diffusion model" 2 "--kv|autoregressive" sweep --kv --policy streaming -m "$llada" --device cpu
refused "bench: images" 2 "--kv|--what text" bench --kv
refused "bench: ratio without a policy" 2 "--kv-ratio|--kv-policy" bench --what text --kv-ratio 0.5

# ---- one run ----
accepted "full" "${own[@]}" --json
cp out full.json
check "full: nothing about a policy" [ -z "$(value out kv)" ]
accepted "none" "${own[@]}" --kv-policy none --json
check "none: the same ids" [ "$(value out text)" = "$(value full.json text)" ]
check "none: everything kept, and lists of it" true_that "$(value out kv kept_bytes) >= $(value out kv full_bytes)"
check "none: no budget" [ "$(value out kv budget)" = null ]
for policy in snapkv h2o streaming; do
    accepted "$policy, ratio 1" "${own[@]}" --kv-policy $policy --kv-budget 400 --json
    check "$policy, all in budget: the same ids" [ "$(value out text)" = "$(value full.json text)" ]
    accepted "$policy" "${own[@]}" --kv-policy $policy --kv-budget 64 --json
    check "$policy: named" [ "$(value out kv policy)" = $policy ]
    check "$policy: budget" [ "$(value out kv budget)" = 64 ]
    check "$policy: less is kept" true_that "$(value out kv kept_bytes) < 0.6 * $(value out kv full_bytes)"
    check "$policy: evicted" true_that "$(value out kv evictions) > 0"
    check "$policy: scoring is timed" true_that "$(value out kv score_ms) >= 0"
done
accepted "by ratio" "${own[@]}" --kv-policy snapkv --kv-ratio 0.25 --json
check "by ratio: budget" [ "$(value out kv budget)" = 50 ]
accepted "options in the spec" "${own[@]}" --kv-policy snapkv:window=8+pool=avg --kv-ratio 0.25 --json
cp out spec.json
check "options in the spec: in the rule" grep -q window=8 <(value out kv rule)
accepted "options beside it" "${own[@]}" --kv-policy snapkv --kv-ratio 0.25 --kv-option window=8 --kv-option pool=avg --json
check "options beside it: the same rule" [ "$(value out kv rule)" = "$(value spec.json kv rule)" ]
check "options beside it: the same ids" [ "$(value out text)" = "$(value spec.json text)" ]
accepted "parts" "${own[@]}" --kv-policy score=knorm,recents=8 --kv-ratio 0.25 --json
check "parts: budget" [ "$(value out kv budget)" = 50 ]
accepted "for people" "${own[@]}" --kv-policy h2o --kv-budget 64 --kv-map map.png
check "for people: a line" grep -qE 'refrain: cache h2o, budget 64: .* kept \([0-9.]+ %\), [0-9]+ evictions, scoring' err
check "map: a picture" [ "$(head -c 4 map.png | tail -c 3)" = PNG ]
cp map.png first.png
accepted "map again" "${own[@]}" --kv-policy h2o --kv-budget 64 --kv-map map.png -q
check "map again: the same bytes" cmp -s map.png first.png
accepted "map of another policy" "${own[@]}" --kv-policy streaming --kv-budget 64 --kv-map map.png -q
check "map of another policy: other bytes" [ "$(cmp -s map.png first.png && echo same)" = "" ]
rm -f ./*.png

# ---- policies ----
accepted "policies" policies
for name in streaming h2o snapkv cake; do check "policies: $name" grep -q "^$name " out; done
accepted "policies kv" policies kv
check "policies kv: keys" grep -q '^  window=' out
check "policies kv: fits 80 columns" [ "$(wc -L <out)" -le 80 ]
accepted "policies snapkv" policies snapkv
check "policies snapkv: its rule" has out "snapkv:"
accepted "policies kv --json" policies kv --json
check "policies kv --json: family" [ "$(value out 0 family)" = kv ]
check "policies kv --json: rule" [ -n "$(value out 0 rule)" ]

# ---- bench ----
accepted "bench" bench --what text -m "$llama" --device cpu -r 2 --kept 64,128 --kv-policy none,snapkv,streaming --kv-budget 32 -o json
check "bench: rows" [ "$(value out '#')" = 6 ]
check "bench: a step" true_that "$(value out 0 median_ms) > 0"
check "bench: a prefill" true_that "$(value out 4 prefill_ms) > 0"
check "bench: no budget" [ "$(value out 3 budget)" = null ]
check "bench: the budget" [ "$(value out 4 budget)" = 32 ]
check "bench: less is kept" true_that "$(value out 4 kept_bytes) < 0.5 * $(value out 3 kept_bytes)"
for format in md csv; do
    accepted "bench $format" bench --what text -m "$llama" --device cpu -r 1 --kept 64 --kv-policy snapkv --kv-budget 32 -o $format
    check "bench $format: lines" [ "$(num_lines out)" -ge 2 ]
done
refused "bench too long" 2 "--kept 5000|positions" bench --what text -m "$llama" --device cpu --kept 5000 --kv-policy snapkv

# ---- the shipped model ----
models=$FIXTURES/../../samples/models
if [ -d "$models/text-ar" ]; then
    export REFRAIN_MODELS=$models
    accepted "no model named" text --device cpu --task needle --task-length 400 -n 8 --kv-policy snapkv --kv-ratio 0.5 --json
    check "no model named: the autoregressive one" grep -q 'text-ar$' <(value out model)
    check "no model named: judged" [ -n "$(value out exact_match)" ]
    accepted "eval" eval needle,kv --device cpu -n 2 --length 400 --kv-policy none,snapkv:window=8+pool=avg,streaming --kv-ratio 1,0.25 --json -q
    check "eval: rows" [ "$(value out '#')" = 18 ]
    check "eval: short names" grep -q '"kv-long"' out
    check "eval: none" [ "$(value out 0 agreement)" = 1 ]
    check "eval: none is neither" [ "$(value out 0 aware)" = null ]
    check "eval: a policy" [ "$(value out 1 kv_policy)" = "snapkv:window=8+pool=avg" ]
    check "eval: all kept is the same" [ "$(value out 1 agreement)" = 1 ]
    check "eval: all kept, agnostic" [ "$(value out 3 agreement)" = 1 ]
    check "eval: aware first" [ "$(value out 2 aware)" = true ]
    check "eval: ratio" [ "$(value out 2 kv_ratio)" = 0.25 ]
    check "eval: bytes" true_that "$(value out 2 kept_bytes) < 0.5 * $(value out 2 full_bytes)"
    check "eval: then agnostic" [ "$(value out 4 aware)" = false ]
    check "eval: agnostic keeps the question besides" true_that "$(value out 4 kept_bytes) != $(value out 2 kept_bytes)"
    accepted "eval, a table" eval vt --device cpu -n 1 --length 600 --kv-policy none,streaming --kv-budget 64 --agnostic
    check "eval, a table: short names said" has err "vt stands for vt-long"
    check "eval, a table: way" grep -qE '^vt-long +streaming +64 tokens agnostic' out
    check "eval, a table: summary" has out "exact match, %"
    accepted "eval: without a question one way" eval add --device cpu -n 1 --size 2 --kv-policy none,streaming --kv-ratio 0.5 --json -q
    check "eval: without a question one way: rows" [ "$(value out '#')" = 2 ]
    refused "eval: no question" 2 "add: asks no question" eval add --device cpu -n 1 --kv-policy streaming --agnostic -q
    sweep=(sweep --device cpu --task needle -n 1 --kv --policy "streaming,knorm" --kv-ratio "0.5,0.25" --report report)
    accepted "sweep" "${sweep[@]}" --json
    check "sweep: results" [ "$(value out results '#')" = 5 ]
    check "sweep: the full cache" true_that "$(value out results 0 kept_bytes) == $(value out results 0 full_bytes)"
    check "sweep: less" true_that "$(value out results 1 kept_bytes) > $(value out results 2 kept_bytes)"
    check "sweep: plots" [ "$(grep -o '<svg' report/report.html | wc -l)" -ge 3 ]
    check "sweep: CSV" grep -q '^streaming,ratio=0.25,ok' report/results.csv
    check "sweep: no control" [ "$(grep -ciE 'fewer (steps|passes)' report/report.html)" = 0 ]
    accepted "sweep again" "${sweep[@]}"
    check "sweep again: goes on" has err "5 of 5 settings already"
    check "sweep again: table" grep -q '^knorm:ratio=0.5 ' out
    refused "sweep: the other way" 2 "report|kv" "${sweep[@]}" --agnostic
fi
done_testing
