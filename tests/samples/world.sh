# tests/samples/world.sh - `refrain world`: what is refused, what a rollout leaves behind, and a game in a terminal.
# shellcheck source=tests/lib/program.sh
. "$(dirname "${BASH_SOURCE[0]}")/../lib/program.sh"
export OMP_NUM_THREADS=1 TERM=xterm-256color
oasis=$FIXTURES/oasis-tiny
[ -d "$oasis" ] || exit 77
value() { "$JSON_GET" "$@" 2>/dev/null; }
# true_that EXPRESSION: arithmetic with fractions.
true_that() { awk "BEGIN { exit !($1) }"; }
# psnr_over QUALITY DB: a mean of null stands for equal frames.
psnr_over() {
    local db
    db=$(value out quality "$1" mean_psnr_db)
    [ "$db" = null ] || true_that "${db:-0} > $2"
}

# A first frame, under a name that the checks for files left behind do not mind.
"$REFRAIN" image -q -m "$tiny" --steps 2 --device cpu --class 1 -o start.png && mv start.png start.picture
check "a first frame" [ -s start.picture ]
world=(world -m "$oasis" --device cpu --init start.picture)

# ---- refused before anything is made ----
refused "frames 0" 2 "--frames|found 0" "${world[@]}" --frames 0
refused "frames -1" 2 "--frames|found -1" "${world[@]}" --frames -1
refused "frames 1" 2 "--frames|2..1000001" "${world[@]}" --frames 1
refused "frames 1e9" 2 "--frames|1e9" "${world[@]}" --frames 1e9
refused "frames of a billion" 2 "--frames|1000000000|at most" "${world[@]}" --frames 1000000000
refused "unknown action" 2 "foward|did you mean forward" "${world[@]}" --actions "forward,foward*3"
refused "action far from all" 2 "jump|noop, forward, back, left, right" "${world[@]}" --actions jump
refused "repeats without end" 2 "1000000" "${world[@]}" --actions "forward*999999999999"
refused "empty element" 2 "element 2" "${world[@]}" --actions "forward,,left"
refused "missing action file" 1 "none.csv" "${world[@]}" --actions none.csv
printf 'forward,lfet\n1,0\n' >wrong.csv
refused "wrong action file" 1 "wrong.csv|line 1, column 2|did you mean left" "${world[@]}" --actions wrong.csv
printf '[{"forward": 1e999}]' >wrong.json
refused "infinite action" 1 "wrong.json|finite" "${world[@]}" --actions wrong.json
{
    echo forward
    yes 1 | head -n 1000001
} >long.csv
refused "too many lines" 1 "long.csv|1000000" "${world[@]}" --actions long.csv --frames 3
refused "window" 2 "--window|6 frames|found 9" "${world[@]}" --window 9
refused "sinks without sinks" 2 "--sinks|--context sinks" "${world[@]}" --sinks 1
refused "sinks that fill the window" 2 "--sinks|room for 4" "${world[@]}" --context sinks --sinks 5
refused "context" 2 "--context|did you mean keep" "${world[@]}" --context kep
refused "keep and no context cache" 2 "--no-context-cache|keep" "${world[@]}" --context keep --no-context-cache
refused "carry without a policy" 2 "--carry" "${world[@]}" --carry last
refused "trace without a policy" 2 "--trace" "${world[@]}" --trace t.jsonl
refused "compare with nothing" 2 "--compare" "${world[@]}" --compare --no-context-cache
refused "simulator of a picture" 2 "--compare-simulator|--init SEED" "${world[@]}" --compare-simulator
refused "policy" 2 "--cache-mode|no-such" "${world[@]}" --cache-mode no-such
refused "two models" 2 "--model|--synthetic-weights" "${world[@]}" --synthetic-weights oasis-500m
refused "seed without a simulator" 2 "--init 3|no simulator" world -m "$oasis" --device cpu --init 3
refused "no first frame" 2 "--init|no simulator" world -m "$oasis" --device cpu
refused "missing first frame" 1 "none.jpg" world -m "$oasis" --device cpu --init none.jpg
refused "another size, strict" 1 "32x32|32x24|--strict" "${world[@]}" --strict
refused "missing folder" 1 "nowhere/a" "${world[@]}" -o nowhere/a.png
refused "missing folder of frames" 1 "nowhere/" "${world[@]}" -o nowhere/%03d.png
refused "%s" 2 "%s" "${world[@]}" -o %s.png
refused "two numbers" 2 "%d" "${world[@]}" -o a%d_%d.png
refused "jpeg" 2 "a.jpg|mp4" "${world[@]}" -o a.jpg
refused "strip as jpeg" 2 "--strip|.png" "${world[@]}" --strip a.jpg
refused "strip in a missing folder" 1 "nowhere" "${world[@]}" --strip nowhere/a.png
refused "one file for both" 2 "same file" "${world[@]}" -o a.png --strip a.png
refused "an image model" 2 "not a world" world -m "$tiny" --device cpu --init start.picture
refused "a world as an image model" 2 "refrain world" image -m "$oasis" --device cpu
refused "play without a terminal" 2 "--play|not a terminal" "${world[@]}" --play
refused "play and compare" 2 "--play|--compare" "${world[@]}" --play --compare
refused "draw without play" 2 "--draw" "${world[@]}" --draw blocks
accepted "help" world --help
check "help fits 80 columns" [ "$(wc -L <out)" -le 80 ]
check "help is short: $(num_lines out) lines" [ "$(num_lines out)" -le 42 ]

# ---- a walk ----
accepted "walk" "${world[@]}" --actions "forward*4,right*2,left+forward" --frames 8 -o walk.png --strip strip.png --json
check "walk: files" [ -s walk.png ] && [ -s strip.png ]
check "walk: resized with a note" has err "resized from 32x32 to 32x24"
check "json command" [ "$(value out command)" = world ]
check "json frames" [ "$(value out frames)" = 8 ]
check "json settings" [ "$(value out settings actions)" = "forward*4,right*2,forward+left" ]
check "json window" [ "$(value out context window)" = 6 ]
check "json frame times" [ "$(value out time frame_ms '#')" = 7 ]
check "json slid" [ "$(value out context frames_slid)" = 2 ]
check "json reuse" true_that "$(value out context frame_forwards) < $(value out context frame_forwards_without_reuse)"
check "json rates" true_that "$(value out fps) >= $(value out fps_with_decode)"
check "json codec" [ "$(value out output codec)" = "animated PNG" ]
check "json size: the short side is 256 or more" [ "$(value out output height)" = 264 ]
check "no progress bar off a terminal" [ "$(grep -c $'\r' err)" = 0 ]
accepted "the same again" "${world[@]}" --actions "forward*4,right*2,left+forward" --frames 8 -o again.png -q
check "the same again: same bytes" cmp -s walk.png again.png
check "-q is quiet" [ ! -s err ]
accepted "another seed" "${world[@]}" --actions "forward*4,right*2,left+forward" -s 7 -o other.png -q
check "another seed: other bytes" [ "$(cmp -s walk.png other.png || echo differ)" = differ ]
for file in walk.png strip.png; do
    accepted "metadata of $file" metadata --json "$file"
    check "$file: settings" [ "$(value out settings actions)" = "forward*4,right*2,forward+left" ]
    check "$file: steps" [ "$(value out settings steps)" = 10 ]
done
accepted "demonstration" "${world[@]}" --steps 2 -o demo.png --json
check "demonstration: 29 frames" [ "$(value out frames)" = 29 ]
accepted "fewer actions" "${world[@]}" --steps 2 --actions "forward*2" --frames 5 -o few.png --json
check "fewer actions: note" has err "the last 2 do 'noop'"
check "fewer actions: noop" [ "$(value out settings actions)" = "forward*2,noop*2" ]
accepted "more actions" "${world[@]}" --steps 2 --actions "forward*9" --frames 5 -o more.png
check "more actions: note" has err "the last 5 are not used"
head -n 1000001 long.csv >million.csv
accepted "a million lines" "${world[@]}" --steps 2 --actions million.csv --frames 3 -o million.png
check "a million lines: note" has err "1000000 actions"
printf '{"actions": [{"action": "left", "repeat": 2}, [0, 1, 0, 0, 0]]}' >list.json
accepted "json list" "${world[@]}" --steps 2 --actions list.json -o list.png --json
check "json list: actions" [ "$(value out settings actions)" = "left*2,forward" ]

# ---- outputs ----
mkdir frames
accepted "single frames" "${world[@]}" --steps 2 --actions "forward*3" -o frames/%02d.png -q --json
check "single frames: 4 of them" [ "$(find frames -name '0[0-3].png' | wc -l)" = 4 ]
check "single frames: not enlarged" [ "$(value out output width)" = 32 ]
accepted "metadata of a frame" metadata --json frames/03.png
check "frame: settings" [ "$(value out settings command)" = world ]
accepted "a first frame of the right size" world -m "$oasis" --device cpu --init frames/00.png --strict --steps 2 \
    --actions forward -o right.png
check "right size: no note" [ "$(grep -c resized err)" = 0 ]
accepted "an animated first part" world -m "$oasis" --device cpu --init walk.png --steps 2 --actions forward -o go-on.png --json
check "video: last frames" has err "the last 5 of its 8 frames"
check "video: prompt" [ "$(value out context prompt_frames)" = 5 ]
head -c 3000 walk.png >cut.apng
run world -m "$oasis" --device cpu --init cut.apng -o cut-on.png
check "cut video: status $status" [ "$status" = 1 ]
check "cut video: one line" [ "$(num_lines err)" = 1 ]
check "cut video: nothing written" [ ! -e cut-on.png ]
run "${world[@]}" --steps 2 --actions "forward*3" -o walk.mp4 --scale 2 --json
if [ "$status" = 0 ]; then
    check "mp4" [ -s walk.mp4 ]
    check "mp4: scale" [ "$(value out output width)" = 64 ]
    accepted "mp4 as a first part" world -m "$oasis" --device cpu --init walk.mp4 --steps 2 --actions forward -o on.png
    head -c 700 walk.mp4 >cut.mp4
    run world -m "$oasis" --device cpu --init cut.mp4 -o cut-on.png
    check "cut mp4: status $status" [ "$status" = 1 ]
    check "cut mp4: one line" [ "$(num_lines err)" = 1 ]
    check "cut mp4: nothing written" [ ! -e cut-on.png ]
else
    check "no mp4: says what to do" has err "animated PNG"
fi

# ---- context and policies ----
accepted "rebuild against everything again" "${world[@]}" --frames 12 --compare --json -o c.png -q
check "rebuild is exact" psnr_over uncached 60
check "reference computed more" true_that "$(value out context reference_frame_forwards) > $(value out context frame_forwards)"
check "per frame" [ "$(value out quality uncached ssim '#')" = 11 ]
accepted "no context cache" "${world[@]}" --frames 12 --no-context-cache --json -o d.png -q
check "no context cache: the same walk" [ "$(value out context cache)" = false ]
for context in keep sinks; do
    accepted "context $context" "${world[@]}" --frames 12 --context "$context" --compare --json -o c.png --strip s.png -q
    check "context $context is another" [ "$(value out quality uncached mean_psnr_db)" != null ]
    check "context $context: worst frame after the window slid" true_that "$(value out quality uncached worst_frame) > 5"
done
accepted "table" "${world[@]}" --frames 12 --context keep --compare -o c.png
check "table: a line a frame" [ "$(grep -cE '^[0-9]+ ' out)" = 11 ]
check "table: summary" has err "against no reuse"
accepted "policy" "${world[@]}" --frames 6 --steps 12 --cache-mode fora --compare --trace t.jsonl --json -o p.png
check "policy: skipped" true_that "$(value out cache steps_skipped) > 0"
check "policy: quality" psnr_over uncached 5
check "policy: speed-up" [ -n "$(value out speedup)" ]
check "policy: trace of all frames" [ "$(num_lines t.jsonl)" = 65 ]
check "policy: frames are numbered" has t.jsonl '"first_image":5'
accepted "replay" "${world[@]}" --frames 6 --steps 12 --replay t.jsonl -o r.png -q
accepted "carry" "${world[@]}" --frames 6 --steps 12 --cache-mode taylorseer --carry last -o p.png --json
check "carry: told" [ "$(value out cache carry)" = last ]

# ---- interrupted ----
"$REFRAIN" "${world[@]}" --frames 100000 --steps 50 -o stopped.png --strip stopped-strip.png >out 2>stopped.err &
pid=$!
for _ in $(seq 300); do
    grep -q window stopped.err && break
    sleep 0.1
done
kill -TERM "$pid"
status=0
wait "$pid" || status=$?
check "interrupted: exit status $status" [ "$status" = 130 ]
check "interrupted: message" has stopped.err "interrupted after"
check "interrupted: no file" [ -z "$(find . -name 'stopped*.png*')" ]

# ---- the game: played with a policy and recorded, in each way of drawing ----
escape=$'\e'
# played NAME EVENT... -- OPTION...: the game in a terminal of 80 x 24.
played() {
    local name=$1 events=()
    shift
    while [ "$1" != -- ]; do
        events+=("$1")
        shift
    done
    shift
    status=0
    "$PTY_RUN" 80x24 screen "${events[@]}" -- "$REFRAIN" "${world[@]}" --play "$@" >out 2>err || status=$?
    check "$name: $(tr '\n' ' ' <out)" [ "$status" = 0 ]
    check "$name: terminal restored" has out "terminal restored"
}
export COLORTERM=truecolor
played "blocks" 'wait:[c' "send:${escape}[?62;22c" 'wait:frame 2' send:w 'wait:forward' "send:${escape}[C" 'wait:right' \
    'send:?' 'wait:save the frame' send:o 'wait:saved frame-000.png' send:p 'wait:paused' send:p size:60x20 'wait:frame' \
    send:x -- --cache-mode fora --steps 12 -o played.png --json --trace played.jsonl
check "blocks: exit status" has out "exit 0"
check "blocks: 24-bit colour" has screen "${escape}[38;2;"
check "blocks: synchronized" has screen "${escape}[?2026h"
check "blocks: leaves the other screen" has screen "${escape}[?1049l"
check "blocks: what was reused" has screen "steps computed"
check "blocks: report" has screen '"command":'
check "blocks: recorded" [ -s played.png ]
check "blocks: saved frame" [ -s frame-000.png ]
check "blocks: trace" has played.jsonl '"first_image":1'
accepted "metadata of a game" metadata --json played.png
check "metadata of a game: actions" [ "$(value out settings actions)" = played ]
COLORTERM='' played "256 colours" 'wait:[c' "send:${escape}[?62;22c" 'wait:frame 2' "send:$escape" -- --steps 2
check "256 colours" has screen "${escape}[38;5;"
played "sixel" 'wait:[c' "send:${escape}[?62;4;22c" 'wait:frame 2' 'send:q' 'wait:left' kill:15 -- --steps 2
check "sixel: drawn" has screen "$escape""P0;1q"
played "kitty" 'wait:[c' "send:$escape""_Gi=31;OK${escape}\\${escape}[?0u${escape}[?62;4c" 'wait:frame 2' \
    "send:${escape}[119;1:1u" 'wait:forward' "send:${escape}[119;1:3u" 'wait:noop' "send:${escape}[122;5u" stopped: restored: \
    kill:18 'wait:[?1049h' 'wait:frame' "send:${escape}[99;5u" -- --steps 2
check "kitty: drawn" has screen "$escape""_Ga=T,f=24"
check "kitty: keyboard given back" has screen "${escape}[<u"
played "suspended" 'wait:frame 2' $'send:\x1a' stopped: restored: kill:18 'wait:[?1049h' 'wait:frame' $'send:\x03' -- --steps 2 --draw blocks
played "ends by itself" 'wait:frame 4' -- --steps 2 --draw blocks --frames 5 --context keep
check "ends by itself: exit status" has out "exit 0"

# ---- the shipped world ----
maze=$FIXTURES/../../samples/models/maze
if [ -d "$maze" ]; then
    accepted "maze" world -m "$maze" --device cpu --init 3 --actions "forward*3,right*2" --steps 4 --compare-simulator -o m.png --json
    check "maze: five frames compared" [ "$(value out quality simulator psnr_db '#')" = 5 ]
    check "maze: it is seen" psnr_over simulator 12
    run world -m "$maze" --device cpu --actions "forward+left" --compare-simulator -o n.png
    check "maze: two actions at once, status $status" [ "$status" = 2 ]
fi
done_testing
