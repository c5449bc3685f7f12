# tests/samples/usage.sh - the command line: what is refused before anything is loaded, and what --help shows.
# shellcheck source=tests/lib/program.sh
. "$(dirname "${BASH_SOURCE[0]}")/../lib/program.sh"

refused "no command" 2 "image|bench"
refused "unknown command" 2 "imgae|did you mean image" imgae
refused "unknown option before a command" 2 "--nope" --nope
refused "unknown option" 2 "--step|did you mean --steps" image --step 5
refused "option far from all" 2 "--qqqqqq" image --qqqqqq
refused "single dash" 2 "-steps|did you mean --steps" image -steps 5
refused "missing value" 2 "--steps" image --steps
refused "value of a flag" 2 "--grid" image --grid=yes
refused "steps 0" 2 "--steps|1..10000|0" image -m "$tiny" --steps 0
refused "steps 100001" 2 "--steps|1..10000|100001" image -m "$tiny" --steps 100001
refused "steps not a number" 2 "--steps|whole number|5x" image -m "$tiny" --steps 5x
refused "steps overflow" 2 "--steps|99999999999999999999" image -m "$tiny" --steps 99999999999999999999
refused "cfg not a number" 2 "--cfg-scale|nan" image -m "$tiny" --cfg-scale nan
refused "eta above 1" 2 "--eta|0..1" image -m "$tiny" --eta 1.5
refused "n 0" 2 "--num" image -m "$tiny" -n 0
refused "sampler" 2 "--sampling-method|eulr|did you mean euler" image -m "$tiny" --sampling-method eulr
refused "plain argument" 2 "cube" image cube
refused "two models" 2 "--model|--synthetic-weights" image -m "$tiny" --synthetic-weights dit-s-2-256
refused "empty name" 2 "--output" image -m "$tiny" -o ""
refused "info of nothing" 2 "model folder" info
refused "metadata of two" 2 "b.png" metadata a.png b.png
refused "bench batch" 2 "--batch-size|2,x" bench -m "$tiny" -b 2,x
refused "bench format" 2 "--output|xml" bench -m "$tiny" -o xml

for command in image info bench metadata; do
    accepted "$command --help" "$command" --help
    check "$command --help fits a screen: $(num_lines out) lines" [ "$(num_lines out)" -le 40 ]
    check "$command --help fits 80 columns" [ "$(wc -L <out)" -le 80 ]
    check "$command --help shows defaults" has out "default"
    check "$command --help is quiet" [ ! -s err ]
done
accepted "--help" --help
check "--help lists the commands" has out "metadata"
accepted "--version" --version
check "--version" grep -q '^refrain [0-9]' out
accepted "--list-devices" --list-devices
check "--list-devices lists the host" grep -q 'cpu' out

if [ -w /dev/full ]; then
    status=0
    "$REFRAIN" --help >/dev/full 2>err || status=$?
    check "full standard output: exit status $status" [ "$status" = 1 ]
    check "full standard output: message" has err "standard output"
fi
done_testing
