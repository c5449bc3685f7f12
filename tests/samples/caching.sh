# tests/samples/caching.sh - reuse between steps as a user asks for it: policies and their options, presets, traces and their replay,
# the comparison with the uncached run, and what a PNG and --json say about it.
# shellcheck source=tests/lib/program.sh
. "$(dirname "${BASH_SOURCE[0]}")/../lib/program.sh"
image=(image -m "$tiny" --steps 12 --device cpu)
value() { "$JSON_GET" "$@" 2>/dev/null; }
# at_least A B: real numbers.
at_least() { awk -v a="$1" -v b="$2" 'BEGIN { exit !(a + 0 >= b + 0) }'; }
# The data of a PNG, which comes after its texts: those differ where the pixels need not.
pixels() { tail -c +"$(LC_ALL=C grep -abo IDAT "$1" | head -n 1 | cut -d: -f1)" "$1"; }
pixels_equal() { cmp -s <(pixels "$1") <(pixels "$2"); }

# ---- refrain policies ----
accepted "policies" policies
for name in interval worldcache fbcache taylorseer toca diffsparse replay; do check "policies: $name" grep -q "^$name " out; done
check "policies: fits 80 columns" [ "$(wc -L <out)" -le 80 ]
check "policies: papers" has out 2603.06331
accepted "policies NAME" policies worldcache
check "policies NAME: an option with its default" has out "threshold=0.2"
check "policies NAME: paper" has out "arXiv 2603.06331"
check "policies NAME: choices" has out "code | paper"
accepted "policies --json" policies --json
num_policies=$(value out '#')
check "policies --json: many" [ "$num_policies" -ge 19 ]
for ((i = 0; i < num_policies; i++)); do
    check "policy $i: family" grep -qE "^(feature|row)$" <(value out $i family)
    check "policy $i: five keys" [ "$(value out $i '#')" = 5 ]
    for key in name level paper; do check "policy $i: $key" [ -n "$(value out $i $key)" ]; done
    check "policy $i: options" [ -n "$(value out $i options '#')" ]
done
accepted "policies NAME --json" policies --json worldcache
check "policies NAME --json: one" [ "$(value out '#')" = 1 ]
check "policies NAME --json: option" [ "$(value out 0 options 0 name)" = p_stable ]
for key in type default min max choices; do check "option: $key" [ -n "$(value out 0 options 0 $key)" ]; done
accepted "policies --json again" policies --json
names=$(for ((i = 0; i < num_policies; i++)); do [ "$(value out $i family)" = row ] || value out $i name; done)
accepted "policies --help" policies --help
check "policies --help" has out "default"
refused "policy that is not there" 2 "worldcach|did you mean 'worldcache'|taylorseer" policies worldcach
refused "policy and model" 2 "exclude" policies worldcache -m "$tiny"
refused "two policies" 2 "fora" policies interval fora

# ---- what is refused ----
refused "no such mode" 2 "--cache-mode|wordcache|did you mean 'worldcache'" "${image[@]}" --cache-mode wordcache
refused "no such option" 2 "--cache-option|treshold|did you mean 'threshold'|max_skips|warmup" "${image[@]}" \
    --cache-mode worldcache --cache-option treshold=1
refused "option out of range" 2 "p_stable|0..1" "${image[@]}" --cache-mode worldcache --cache-option p_stable=2
refused "option without a value" 2 "warmup=VALUE" "${image[@]}" --cache-mode worldcache --cache-option warmup
refused "option without a policy" 2 "--cache-option|--cache-mode" "${image[@]}" --cache-option threshold=1
refused "option of none" 2 "--cache-option" "${image[@]}" --cache-mode none --cache-option threshold=1
refused "force without a policy" 2 "--force" "${image[@]}" --force
refused "drift without a policy" 2 "--max-drift" "${image[@]}" --max-drift 0.1
refused "compare without a policy" 2 "--compare" "${image[@]}" --compare
refused "trace without a policy" 2 "--trace" "${image[@]}" --trace t.jsonl
refused "two sources" 2 "--cache-mode|--replay|exclude" "${image[@]}" --cache-mode fora --replay t.jsonl
refused "two sources again" 2 "--replay|--cache-preset|exclude" "${image[@]}" --replay t.jsonl --cache-preset fast
refused "compare with previews" 2 "--compare|--preview" "${image[@]}" --cache-mode fora --compare --preview p.png
refused "no such trace" 1 "nowhere.jsonl" "${image[@]}" --replay nowhere.jsonl
refused "trace in no folder" 1 "nowhere/t.jsonl" "${image[@]}" --cache-mode fora --trace nowhere/t.jsonl
refused "few steps" 1 "worldcache|9 steps|force" image -q -m "$tiny" --steps 4 --device cpu --cache-mode worldcache
refused "a solver that adds noise" 1 "worldcache|ddpm|force" "${image[@]}" -q --cache-mode worldcache --sampling-method ddpm
accepted "few steps, insisted" image -q -m "$tiny" --steps 4 --device cpu --cache-mode worldcache --force
accepted "adding noise, insisted" "${image[@]}" -q --cache-mode worldcache --sampling-method ddpm --force

# ---- runs ----
accepted "uncached" "${image[@]}" -s 7 -o plain.png --json
check "uncached: no cache in json" [ -z "$(value out cache)" ]
accepted "mode none" "${image[@]}" -s 7 --cache-mode none -o none.png
check "mode none is no policy" cmp -s plain.png none.png

accepted "cached" "${image[@]}" -s 7 --cache-mode interval --cache-option interval=3 --cache-option first=2 --json -o a.png \
    --trace a.jsonl
check "options are said" has err "interval=3,first=2"
check "bytes are said" grep -q 'cache interval keeps [0-9.]* kB' err
check "steps are said" has err "of 12 steps computed"
check "json: 10 keys" [ "$(value out '#')" = 10 ]
check "json cache: 11 keys" [ "$(value out cache '#')" = 11 ]
check "json cache mode" [ "$(value out cache mode)" = interval ]
check "json cache options" has <(value out cache options) "interval=3,first=2"
full=$(value out cache steps_full)
skipped=$(value out cache steps_skipped)
check "json steps add up" [ $((full + skipped + $(value out cache steps_partial))) = 12 ]
check "json blocks add up" [ "$(value out cache blocks_computed)" = $((full * $(value out cache blocks_total) / 12)) ]
check "json rows add up" [ "$(value out cache rows_computed)" = $((full * $(value out cache rows_total) / 12)) ]
check "json bytes" [ "$(value out cache bytes)" -gt 0 ]
check "json decide_ms" at_least "$(value out cache decide_ms)" 0
check "trace: a header and a line a step" [ "$(num_lines a.jsonl)" = 13 ]
check "trace: steps that were skipped" [ "$(grep -c '"kind":"skip"' a.jsonl)" = "$skipped" ]
check "trace: options" has a.jsonl "interval=3,first=2"
while read -r line; do
    printf '%s\n' "$line" >line.json
    check "trace: every line is JSON" "$JSON_GET" line.json >/dev/null
done <a.jsonl
accepted "metadata" metadata a.png
check "metadata: mode" has out "Cache mode: interval, Cache options: \"interval=3,first=2"
accepted "metadata --json" metadata --json a.png
check "metadata: settings" [ "$(value out settings cache_mode)" = interval ]
check "metadata: settings options" has <(value out settings cache_options) "interval=3"
accepted "metadata of an uncached picture" metadata plain.png
check "metadata: nothing about a cache" [ -z "$(grep -i cache out)" ]

# ---- replay ----
mkdir -p traces
cp a.jsonl traces/a.jsonl
accepted "replay" "${image[@]}" -s 7 --replay traces/a.jsonl --trace again.jsonl -o r.png --json
check "replay: same steps" [ "$(value out cache steps_full)" = "$full" ]
check "replay: mode" [ "$(value out cache mode)" = replay ]
check "replay: the same pixels" pixels_equal a.png r.png
check "replay: other pixels than uncached" [ "$(cmp -s <(pixels a.png) <(pixels plain.png) || echo differ)" = differ ]
check "replay: decides the same" cmp -s <(grep -o '"kind":"[a-z]*"' a.jsonl) <(grep -o '"kind":"[a-z]*"' again.jsonl)
accepted "replay metadata" metadata r.png
check "replay: the PNG does not name the folder" [ -z "$(grep traces/ out)" ]
# Several batches, the last one smaller: pictures are numbered through, and each is what it is alone.
accepted "batches" "${image[@]}" -s 7 -n 3 -b 2 --cache-mode interval --cache-option interval=3,first=2 -o b%d.png --trace b.jsonl --json
check "batches: two headers" [ "$(grep -c '"trace":1' b.jsonl)" = 2 ]
check "batches: numbered through" has b.jsonl '"first_image":2'
check "batches: counts add up" [ "$(value out cache steps_full)" = $((3 * full)) ]
accepted "replay of batches" "${image[@]}" -s 7 -n 3 -b 2 --replay b.jsonl -o c%d.png
for i in 0 1 2; do check "replay of batches: picture $i" pixels_equal b$i.png c$i.png; done
check "batches: a batch gives what one gives" pixels_equal a.png b0.png

# ---- comparison ----
for name in $names; do
    case $name in
    replay | measure) continue ;;
    magcache) options=table=flat:1.02 ;;
    diffsparse) options=table=uniform ;;
    *) options= ;;
    esac
    accepted "$name" "${image[@]}" -q --cache-mode "$name" --cache-option "$options" --compare --json -o x.png --trace x.jsonl
    check "$name: said nothing" [ ! -s err ]
    check "$name: 12 keys" [ "$(value out '#')" = 12 ]
    check "$name: quality" [ "$(value out quality '#')" = 5 ]
    check "$name: speedup" at_least "$(value out speedup)" 0.001
    check "$name: SSIM" at_least "$(value out quality ssim)" 0.8
    if [ "$(value out cache rows_computed)" = "$(value out cache rows_total)" ]; then
        check "$name: nothing reused is nothing changed" [ "$(value out quality max_abs)" = 0 ]
        check "$name: infinite PSNR is null" [ "$(value out quality psnr_db)" = null ]
    else
        check "$name: PSNR" at_least "$(value out quality psnr_db)" 20
    fi
    check "$name: trace" [ "$(num_lines x.jsonl)" = 13 ]
done
accepted "compare, several" "${image[@]}" -n 3 -b 2 --cache-mode interval --compare -o m.png --json
check "compare: said" has err "against no cache: PSNR"
check "compare: worst is said" has err "worst picture"
check "compare: worst is below the mean" at_least "$(value out quality psnr_db)" "$(value out quality worst_psnr_db)"
check "compare: time of the other" at_least "$(value out time reference_denoise_ms)" 0.001
accepted "drift guard" "${image[@]}" --cache-mode interval --max-drift 1e-9 -o d.png --json -q
check "drift guard: more full steps" [ "$(value out cache steps_full)" -gt "$full" ]
accepted "drift guard metadata" metadata d.png
check "drift guard: in the PNG" has out "Max drift: 1e-09"

# ---- traces that cannot be replayed ----
rm -f ./*.png
refused "replay of another length" 1 "12|5" image -q -m "$tiny" --steps 5 --device cpu --replay a.jsonl
printf '{"trace":1,"policy":"interval"' >cut.jsonl
refused "replay of a damaged trace" 1 "cut.jsonl" "${image[@]}" -q --replay cut.jsonl

refused "replay of no trace" 1 "line.json" "${image[@]}" -q --replay line.json

# ---- presets ----
refused "preset of a model without any" 2 "dit-tiny|no cache presets" "${image[@]}" --cache-preset fast
refused "preset that is not a preset" 2 "fastt|did you mean fast" "${image[@]}" --cache-preset fastt
cp -r "$tiny" model
chmod -R u+w model
cat >model/cache.json <<'JSON'
{"presets": {
  "slow": {"mode": "interval", "options": "interval=2", "measured": [
    {"device": "a device", "steps": 50, "cfg": 4, "speedup": 1.84, "psnr_db": 36.9, "ssim": 0.981, "command": "refrain sweep"}]},
  "fast": {"mode": "worldcache", "options": "max_skips=3"}}}
JSON
preset=(image -m model --steps 12 --device cpu -q -o p.png)
accepted "preset" image -m model --steps 12 --device cpu --cache-preset slow -o p.png --json
check "preset: what it stands for" has err "--cache-mode interval --cache-option interval=2"
check "preset: measured" has err "1.84x at PSNR 36.9 dB, SSIM 0.981 on a device, 50 steps, cfg 4"
check "preset: mode" [ "$(value out cache mode)" = interval ]
check "preset: options" has <(value out cache options) "interval=2"
accepted "preset, one option changed" "${preset[@]}" --cache-preset slow --cache-option interval=4 --json
check "preset, one option changed: is" has <(value out cache options) "interval=4"
rm -f ./*.png
refused "preset that the model lacks" 2 "model|ultra|slow, fast" "${preset[@]}" --cache-preset ultra
accepted "policies -m" policies -m model
check "policies -m: preset" has out "slow    --cache-mode interval --cache-option interval=2"
check "policies -m: measured" has out "1.84x"
accepted "policies -m --json" policies -m model --json
check "policies -m --json: two" [ "$(value out '#')" = 2 ]
check "policies -m --json: measured" [ "$(value out 0 measured 0 speedup)" = 1.84 ]
accepted "policies -m without presets" policies -m "$tiny"
check "policies -m without presets: says so" has err "no cache presets"

# hostile NAME WORDS JSON: both commands refuse the file in one line.
hostile() {
    printf '%s' "$3" >model/cache.json
    refused "$1" 1 "$2" "${preset[@]}" --cache-preset slow
    refused "$1, policies" 1 "$2" policies -m model
}
hostile "not JSON" "cache.json" '{"presets": {"slow":'
hostile "a number as preset" "preset slow" '{"presets": {"slow": 5}}'
hostile "no mode" "preset slow|mode" '{"presets": {"slow": {"options": "interval=2"}}}'
hostile "mode of another type" "mode" '{"presets": {"slow": {"mode": ["interval"]}}}'
hostile "no such mode" "preset slow|nope" '{"presets": {"slow": {"mode": "nope"}}}'
hostile "no such option" "preset slow|nope" '{"presets": {"slow": {"mode": "interval", "options": "nope=1"}}}'
hostile "options of another type" "options" '{"presets": {"slow": {"mode": "interval", "options": 3}}}'
hostile "a file of the model's choice" "replay" '{"presets": {"slow": {"mode": "replay", "options": "file=a.jsonl"}}}'
hostile "a table of the model's choice" "table" '{"presets": {"slow": {"mode": "diffsparse", "options": "table=/etc/passwd"}}}'
hostile "measured: no array" "measured" '{"presets": {"slow": {"mode": "interval", "measured": {}}}}'
hostile "measured: no object" "measured" '{"presets": {"slow": {"mode": "interval", "measured": [1]}}}'
hostile "measured: no speed" "speedup" '{"presets": {"slow": {"mode": "interval", "measured": [{"device": "d", "steps": 5}]}}}'
hostile "measured: speed" "speedup" '{"presets": {"slow": {"mode": "interval", "measured": [{"device": "d", "steps": 5, "speedup": 1e99}]}}}'
hostile "measured: steps" "steps" '{"presets": {"slow": {"mode": "interval", "measured": [{"device": "d", "steps": 5.5, "speedup": 2}]}}}'
hostile "measured: SSIM" "ssim" '{"presets": {"slow": {"mode": "interval", "measured": [{"device": "d", "steps": 5, "speedup": 2, "ssim": 9}]}}}'
many=$(printf '{"device":"d","steps":5,"speedup":2},%.0s' $(seq 40))
hostile "measured: too many" "32" "{\"presets\": {\"slow\": {\"mode\": \"interval\", \"measured\": [${many%,}]}}}"
hostile "a long string" "options" "{\"presets\": {\"slow\": {\"mode\": \"interval\", \"options\": \"$(head -c 5000 /dev/zero | tr '\0' x)\"}}}"
printf '{"presets": [1, 2]}' >model/cache.json
refused "presets as an array" 2 "no cache presets" "${preset[@]}" --cache-preset slow
printf '{"presets": {"slow": {"mode": "interval", "measured": [{"device": "\\u001b[31mred", "steps": 5, "speedup": 2}]}}}' >model/cache.json
accepted "control characters" policies -m model
check "control characters: not on the terminal" [ -z "$(grep "$(printf '\033')" out)" ]
done_testing
