# tests/samples/measure_world.sh - what measures a world: `refrain sweep`, `bench --what world`, `info`, `calibrate`, on a tiny model.
# shellcheck source=tests/lib/program.sh
. "$(dirname "${BASH_SOURCE[0]}")/../lib/program.sh"
export OMP_NUM_THREADS=1
oasis=$FIXTURES/oasis-tiny
[ -d "$oasis" ] || exit 77
value() { "$JSON_GET" "$@" 2>/dev/null; }
true_that() { awk "BEGIN { exit !($1) }"; }
keys() { tail -n +2 "$1" | sed -E 's/^.*,("[^"]*"|[^",]*)$/\1/' | sort; }
cp -r "$oasis" model
chmod -R u+w model

# ---- sweep: refused ----
sweep=(sweep -m "$oasis" --device cpu -r 1)
refused "pictures of a world" 2 "--class|a world" "${sweep[@]}" --class 3
refused "guidance of a world" 2 "--cfg-scale|a world" "${sweep[@]}" --cfg-scale 2
refused "walks of images" 2 "--walks|one of images" sweep -m "$tiny" --walks 2
refused "walks that the batch does not divide" 2 "--batch 2|3 walks" "${sweep[@]}" --walks 3 -b 2
refused "window" 2 "--window|6 frames|found 9" "${sweep[@]}" --window 9
refused "action" 2 "foward|did you mean forward" "${sweep[@]}" --actions foward
refused "seed without a simulator" 2 "--init 3|no simulator" "${sweep[@]}" --init 3
refused "value of carry" 2 "character 12|off first last" "${sweep[@]}" --policy fora:carry=always
refused "carry of images" 2 "carry" sweep -m "$tiny" --policy fora:carry=last

# ---- sweep: everything ----
accepted "all" "${sweep[@]}" --walks 2 --frames 8 --policy all --report all --json
num=$(value out results '#')
check "all: $num settings" [ "${num:-0}" -ge 100 ]
check "all: csv has as many rows" [ "$(keys all/results.csv | wc -l)" = "${num:-0}" ]
check "all: the plain run first" [ "$(value out results 0 key)" = none:context=off ]
check "all: its speed-up over itself" [ "$(value out results 0 plain_speedup)" = 1 ]
check "all: nine controls" [ "$(grep -c '^steps,' all/results.csv)" = 9 ]
check "all: keep and sinks, since frames leave" [ "$(grep -cE '^none,context=(keep|sinks),ok' all/results.csv)" = 2 ]
check "all: history carried" [ "$(grep -c 'carry=' all/results.csv)" -ge 8 ]
psnr_of() {
    for ((i = 0; i < num; i++)); do
        [ "$(value out results $i key)" != "$1" ] || value out results $i psnr_mean
    done
}
for key in none: none:context=off; do check "all: $key is the reference" true_that "$(psnr_of $key) > 90"; done
index=$(for ((i = 0; i < num; i++)); do [ "$(value out results $i key)" != "steps:5" ] || echo $i; done)
for name in frame_denoise_ms frame_context_ms frame_decode_ms frames_per_s plain_speedup worst_frame first_under_30 frame_forwards; do
    check "all: $name" true_that "$(value out results "$index" $name) > 0"
done
check "all: PSNR of every frame" [ "$(value out results "$index" psnr_each '#')" = 14 ]
check "all: no simulator" [ "$(value out results "$index" kept)" = null ]
check "all: refusals say why" grep -q '^magcache,.*refrain calibrate magcache' all/results.csv
for words in "Quality over frames" "Frames along the front" "Refused at 10 steps" "refrain calibrate magcache" "no cache, 5 steps" \
    "over<br>no reuse" "Last frame of the first walk"; do
    check "report: $words" has all/report.html "$words"
done
check "report: pictures" [ "$(grep -o 'data:image/png;base64,' all/report.html | wc -l)" -ge 21 ]
check "report: no address" [ -z "$(grep -oE 'https?:|//[a-z]+\.[a-z]|<script|<link|@import|url\(' all/report.html | head -3)" ]
check "report: tags close" [ "$(grep -o '<table' all/report.html | wc -l)" = "$(grep -o '</table>' all/report.html | wc -l)" ]
mkdir empty
status=0
PATH=$PWD/empty "$REFRAIN" "${sweep[@]}" --walks 2 --frames 8 --policy all --report all -q >out 2>err || status=$?
check "report without gnuplot: exit status $status" [ "$status" = 0 ]
check "report without gnuplot: plots" [ "$(grep -o '<svg' all/report.html | wc -l)" -ge 7 ]
check "again: table names refusals" has out "refused: magcache:threshold=0.06"
run "${sweep[@]}" --walks 2 --frames 9 --policy all --report all -q
check "other frames: exit status $status" [ "$status" = 2 ]
check "other frames: message" has err "frames 8 (now 9)"
rm -rf all

# ---- sweep: walks of one's own, side by side, a window, a search ----
"$REFRAIN" image -q -m "$tiny" --steps 2 --device cpu --class 1 -o start.png && mv start.png start.picture
own=(--init start.picture --actions "forward*2,left" --actions "right" --walks 2 --frames 5 --steps 9 --window 3)
accepted "own walks" "${sweep[@]}" "${own[@]}" --context keep -b 2 --policy "interval:interval=3;context=off" --fewer-steps 5 --json
check "own walks: actions" [ "$(value out settings actions)" = "forward*2,left*1,forward*1; right*4" ]
check "own walks: from" has out "picture start.picture"
check "own walks: of two settings" [ "$(value out results '#')" = 2 ]
check "own walks: context in the key" has out ";context=off"
accepted "quiet" "${sweep[@]}" --frames 4 --policy fora:interval=3 -q
check "quiet: nothing said" [ ! -s err ]
accepted "search" "${sweep[@]}" --frames 4 --policy "fora:interval=1..4;carry=last" --target-psnr 20 -q
check "search: as options" grep -qE '^--cache-mode fora --cache-option interval=[1-4] --carry last$' out

# ---- bench ----
bench=(bench --what world -m "$oasis" --device cpu -r 2)
refused "frames of images" 2 "--frames|world" bench -m "$tiny" --frames 3
refused "bench of an image model" 2 "not a world" bench --what world -m "$tiny" --device cpu
refused "bench: policy" 2 "worldcach" "${bench[@]}" --policy worldcach
accepted "bench" "${bench[@]}" -o json --policy interval:interval=3 --no-context-cache --floors -q
check "bench: a step" has out "step, 5 frames kept"
for row in "rebuild of 5 frames" "commit of 1 frame, 4 kept" decode frame "rollout of 5 frames" "rollout of 5 frames, nothing kept" \
    "rollout of 5 frames, interval:interval=3"; do
    check "bench: $row" has out "\"$row\""
done
check "bench: time" true_that "$(value out 0 median_ms) > 0"
check "bench: arena" true_that "$(value out 0 arena_bytes) > 1000"
check "bench: floor of a step" true_that "$(value out 0 floor_ms) > 0"
for format in md csv jsonl; do
    accepted "bench $format" "${bench[@]}" -o $format -b 1,2 --frames 3
    check "bench $format: frames a second" [ -s out ]
done
check "bench jsonl: both batches" [ "$(grep -c '"batch":2' out)" -ge 6 ]
accepted "bench of random weights" bench --what world --synthetic-weights "$oasis/config.json" --device cpu -r 1 --steps 2

# ---- info ----
accepted "info" info "$oasis"
for words in "window       6 frames" "noop, forward, back, left, right" "SELF(over frames, causal; rotary, time)" "GFLOP" "kept frame"; do
    check "info: $words" has out "$words"
done
accepted "info -m --json" info -m "$oasis" --json
check "info --json: window" [ "$(value out window)" = 6 ]
check "info --json: actions" [ "$(value out actions '#')" = 5 ]
check "info --json: memory of a frame" [ "$(value out memory kept_frame_f32_bytes)" = $((2 * 3 * 12 * 48 * 4)) ]
accepted "info of the release's names" info "$FIXTURES/oasis-tiny-release"
refused "info of two" 2 "exclude" info "$oasis" -m "$oasis"
printf '{"_class_name": "OasisWorld", "dit": 3, "vae": {}}' >model/config.json
refused "info of a wrong config" 1 "config.json|dit" info model
cp "$oasis/config.json" model/config.json

# ---- calibrate ----
refused "calibrate diffsparse" 1 "diffsparse|uniform" calibrate diffsparse -m model
refused "calibrate: guidance" 2 "--cfg-scale" calibrate magcache -m model --cfg-scale 3
refused "calibrate: presets of nothing" 2 "--from" calibrate presets -m model
accepted "calibrate magcache" calibrate magcache -m model -n 2 --frames 5
check "calibrate magcache: ten ratios" [ "$(value model/cache.json magcache ratios 0 '#')" = 10 ]
accepted "calibrate teacache" calibrate teacache -m model -n 2 --frames 5 -q
check "calibrate teacache: polynomial" [ "$(value model/cache.json teacache coefficients '#')" = 5 ]
accepted "calibrated sweep" sweep -m model --device cpu -r 1 --frames 4 --policy magcache --fewer-steps 5 --json
check "calibrated sweep: not refused" [ "$(value out results 1 status)" = ok ]
cat >results.json <<'JSON'
{"settings": {"model": "m", "steps": "10", "frames": "24", "device": "a device", "dtype": "f32"}, "results": [
{"policy": "steps", "options": "", "status": "ok", "speedup": 2, "psnr_mean": 30, "ssim_mean": 0.9, "kept": 0.97, "share_rows": 0.5},
{"policy": "none", "options": "", "status": "ok", "speedup": 9, "psnr_mean": 100, "ssim_mean": 1, "kept": 1, "share_rows": 1},
{"policy": "fora", "options": "interval=2", "status": "ok", "speedup": 1.6, "psnr_mean": 40, "ssim_mean": 0.99, "kept": 0.999, "share_rows": 0.6},
{"policy": "fora", "options": "interval=3;carry=last", "status": "ok", "speedup": 2.9, "psnr_mean": 50, "kept": 1, "share_rows": 0.3},
{"policy": "interval", "options": "interval=3;order=1", "status": "ok", "speedup": 2.4, "psnr_mean": 36, "kept": 0.985, "share_rows": 0.4},
{"policy": "fora", "options": "interval=5", "status": "ok", "speedup": 1.9, "psnr_mean": 20, "kept": 0.96, "share_rows": 0.5},
{"policy": "magcache", "options": "", "status": "refused", "speedup": null, "psnr_mean": null}]}
JSON
accepted "presets" calibrate presets -m model --from results.json
check "presets: slow" [ "$(value model/cache.json presets slow options)" = "interval=2" ]
check "presets: fast" [ "$(value model/cache.json presets fast options)" = "interval=3,order=1" ]
check "presets: no other" [ "$(value model/cache.json presets '#')" = 2 ]
check "presets: tables stay" [ "$(value model/cache.json magcache ratios 0 '#')" = 10 ]
accepted "presets are read" policies -m model
check "presets are read: measured" has out "2.4x at PSNR 36.0 dB"
printf '{"results": 3}' >results.json
refused "presets of something else" 1 "results.json" calibrate presets -m model --from results.json
accepted "policy and worlds" policies fora
check "policy and worlds: carry" has out "--carry"
done_testing
