# shellcheck shell=bash
# tests/samples/sweep.sh - `refrain sweep`: what is refused, a sweep killed twice and resumed, the report, a search.
# shellcheck source=tests/lib/program.sh
. "$(dirname "${BASH_SOURCE[0]}")/../lib/program.sh"
value() { "$JSON_GET" "$@" 2>/dev/null; }
sweep=(sweep -m "$tiny" --device cpu --steps 12 -n 2 -s 7 -r 1 --fewer-steps "4,8"
    --policy "interval:interval=2..6" --policy "fora:interval=2,3,4" --policy "taylorseer:interval=3;mode=parts,last"
    --policy "worldcache:threshold=0.05..0.5/3;warmup=3" --policy "fbcache:threshold=0.05,0.2" --policy "toca:interval=3")
# Names of all settings in a results.csv, sorted; the key is the last column, and the only field that may end a line in a quote.
keys() { tail -n +2 "$1" | sed -E 's/^.*,("[^"]*"|[^",]*)$/\1/' | sort; }

refused "unknown policy" 2 "wordlcache|worldcache" sweep -m "$tiny" --policy wordlcache
refused "unknown option of a policy" 2 "character 6|intervall" sweep -m "$tiny" --policy fora:intervall=3
refused "range without count" 2 "character 22|/N" sweep -m "$tiny" --policy worldcache:threshold=0.1..0.5
refused "value outside" 2 "character 15" sweep -m "$tiny" --policy fora:interval=0
refused "fewer steps than one" 2 "--fewer-steps|character 3" sweep -m "$tiny" --fewer-steps 5,0
refused "search without a policy" 2 "--policy" sweep -m "$tiny" --target-psnr 30
refused "search of all" 2 "all" sweep -m "$tiny" --target-psnr 30 --policy all
refused "batch that does not divide" 2 "--batch|divisor" sweep -m "$tiny" --device cpu -n 3 -b 2
accepted "sweep --help" sweep --help
check "sweep --help fits a screen: $(num_lines out) lines" [ "$(num_lines out)" -le 40 ]
check "sweep --help fits 80 columns" [ "$(wc -L <out)" -le 80 ]

# Without a stop.
accepted "whole" "${sweep[@]}" --report whole --json
check "whole: one object" "$JSON_GET" out >/dev/null
num=$(value out results '#')
check "whole: $num results" [ "${num:-0}" -ge 15 ]
check "whole: csv has as many rows" [ "$(keys whole/results.csv | wc -l)" = "${num:-0}" ]
check "whole: results.json is the same object" cmp -s out whole/results.json
check "whole: progress" has err "[1/"
check "whole: the control is there" grep -q '^steps,' whole/results.csv
for key in psnr_mean ssim_mean latent_mean speedup loop_ms share_rows; do
    check "whole: $key is a number" [ -n "$(value out results 3 $key)" ]
done
accepted "again: nothing to do" "${sweep[@]}" --report whole -q
check "again: quiet" [ ! -s err ]
check "again: as many rows" [ "$(keys whole/results.csv | wc -l)" = "${num:-0}" ]

# Killed twice, at whatever point that is, then a torn line on top, then to the end.
rows() { [ ! -f killed/results.csv ] || wc -l <killed/results.csv; }
for stop in 3 7; do
    "$REFRAIN" "${sweep[@]}" --report killed -q >/dev/null 2>kill.err &
    pid=$!
    for _ in $(seq 3000); do
        lines=$(rows)
        [ "${lines:-0}" -lt "$stop" ] || break
        kill -0 "$pid" 2>/dev/null || break
        sleep 0.02
    done
    kill -9 "$pid" 2>/dev/null
    wait "$pid" 2>/dev/null
    check "killed at $stop lines: something was there" [ "$(rows)" -ge "$stop" ]
    check "killed at $stop lines: not all" [ "$(rows)" -lt "$((num + 1))" ]
done
torn=$(sed -n 2p killed/results.csv | head -c 20)
printf %s "$torn" >>killed/results.csv
accepted "resumed" "${sweep[@]}" --report killed
check "resumed: says what is there" has err "holds"
keys whole/results.csv >whole.keys
keys killed/results.csv >killed.keys
check "resumed: no row lost or doubled" cmp -s whole.keys killed.keys
check "resumed: no row twice" [ -z "$(uniq -d killed.keys)" ]
check "resumed: same reference" cmp -s <(tail -n +2 whole/reference.f32) <(tail -n +2 killed/reference.f32)
quality() { "$JSON_GET" "$1/results.json" results "$2" psnr_each 0; }
for key in 0 3 9; do
    check "resumed: json row $key" [ -n "$(quality killed $key)" ]
done

# A folder of another run.
run "${sweep[@]}" --steps 13 --report killed -q
check "other steps: exit status $status" [ "$status" = 2 ]
check "other steps: message" has err "steps 12 (now 13)"
cp killed/reference.f32 reference.keep
printf 'torn' >killed/reference.f32
run "${sweep[@]}" --report killed -q
check "torn reference: exit status $status" [ "$status" = 1 ]
check "torn reference: message" has err "reference.f32"
cp reference.keep killed/reference.f32

# The report stands alone.
check "report: there" [ -s whole/report.html ]
check "report: no address" [ -z "$(grep -oE 'https?:|//[a-z]+\.[a-z]|<script|<link|@import|url\(' whole/report.html | head -3)" ]
check "report: plots" [ "$(grep -o '<svg' whole/report.html | wc -l)" -ge 4 ]
check "report: pictures" [ "$(grep -o 'data:image/png;base64,' whole/report.html | wc -l)" -ge 3 ]
check "report: the control" has whole/report.html "no cache, 8 steps"
check "report: verdicts" grep -qE 'fewer-steps curve|worth nothing' whole/report.html
check "report: says what PSNR is" has whole/report.html "own uncached run"
check "report: tags close" [ "$(grep -o '<table' whole/report.html | wc -l)" = "$(grep -o '</table>' whole/report.html | wc -l)" ]
mkdir empty
status=0
PATH=$PWD/empty "$REFRAIN" "${sweep[@]}" --report whole -q >out 2>err || status=$?
check "report without gnuplot: exit status $status" [ "$status" = 0 ]
check "report without gnuplot: says so" has whole/report.html "gnuplot was not found"
check "report without gnuplot: plots" [ "$(grep -o '<svg' whole/report.html | wc -l)" -ge 4 ]

# Interrupted politely: a message, its own status, and the report of what is there.
"$REFRAIN" "${sweep[@]}" --steps 400 --report polite >out 2>polite.err &
pid=$!
for _ in $(seq 600); do
    grep -q '^refrain: \[1/' polite.err 2>/dev/null && break
    sleep 0.1
done
kill -TERM "$pid"
status=0
wait "$pid" || status=$?
check "interrupted: exit status $status" [ "$status" = 130 ]
check "interrupted: message" has polite.err "goes on from here"
check "interrupted: report" [ -s polite/report.html ]

# Searches.
search=(sweep -m "$tiny" --device cpu --steps 12 -n 2 -s 7 -r 1 -q)
accepted "search" "${search[@]}" --policy interval:interval=1..6 --target-psnr 15
check "search: prints a setting" grep -q '^--cache-mode interval --cache-option interval=[1-6]$' out
psnr=$(grep -oE 'PSNR [0-9.]+' out | cut -d' ' -f2)
check "search: measured $psnr dB" [ "$(printf '%.0f' "${psnr:-0}")" -ge 15 ]
accepted "search --json" "${search[@]}" --policy fora --target-psnr 15 --target-ssim 0.5 --json
check "search --json: the setting" [ "$(value out found policy)" = fora ]
check "search --json: its options" grep -qE '^interval=[0-9]+$' <(value out found options)
# Milliseconds on a busy machine may show anything: either answer is right, no answer is not.
run "${search[@]}" --policy worldcache:warmup=3 --target-speedup 1
check "search by speed: a setting or the nearest one" grep -qE \
    'cache-mode worldcache --cache-option warmup=3,threshold=|cannot be reached; nearest: worldcache:warmup=3;threshold=' out err
run "${search[@]}" --policy interval:interval=2..6 --target-psnr 98
check "search out of reach: exit status $status" [ "$status" = 1 ]
check "search out of reach: says how near" has err "cannot be reached; nearest: interval:interval="
done_testing
