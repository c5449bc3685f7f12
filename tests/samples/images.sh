# tests/samples/images.sh - runs that work: names, seeds, grids, reports, metadata, and the same bytes for the same seed.
# shellcheck source=tests/lib/program.sh
. "$(dirname "${BASH_SOURCE[0]}")/../lib/program.sh"
image=(image -m "$tiny" --steps 3 --device cpu)
# A value of a JSON file, or nothing.
value() { "$JSON_GET" "$@" 2>/dev/null; }

accepted "one image" "${image[@]}" --class sphere -s 7 --json -o a.png
check "one image: file" [ -s a.png ]
check "--json is one object" "$JSON_GET" out >/dev/null
check "json command" [ "$(value out command)" = image ]
check "json device" [ "$(value out device)" = cpu ]
check "json dtype" [ "$(value out dtype)" = f32 ]
check "json seed" [ "$(value out seed)" = 7 ]
check "json steps" [ "$(value out steps)" = 3 ]
check "json step times" [ "$(value out time step_ms '#')" = 3 ]
for key in load_ms denoise_ms decode_ms total_ms; do check "json time.$key" [ -n "$(value out time $key)" ]; done
for key in weights_bytes arena_bytes peak_device_bytes; do check "json memory.$key" [ "$(value out memory $key)" -gt 0 ]; done
check "json outputs" [ "$(value out outputs '#')" = 1 ]
check "json path" [ "$(value out outputs 0 path)" = a.png ]
check "json class" [ "$(value out outputs 0 class)" = sphere ]
check "json output seed" [ "$(value out outputs 0 seed)" = 7 ]
check "json width" [ "$(value out outputs 0 width)" = 32 ]
check "json has nothing else" [ "$(value out '#')" = 9 ]

accepted "the same again" "${image[@]}" --class ball -s 7 -o b.png
check "a synonym and the same seed give the same bytes" cmp -s a.png b.png
accepted "another seed" "${image[@]}" --class sphere -s 8 -o c.png
check "another seed gives other bytes" [ "$(cmp -s a.png c.png || echo differ)" = differ ]
accepted "by number" "${image[@]}" --class 1 -s 7 -o d.png
check "a class by number is the same class" cmp -s a.png d.png

accepted "metadata" metadata a.png
check "metadata: parameters" has out "Steps: 3, Sampler: ddim"
check "metadata: seed" has out "Seed: 7"
check "metadata: class" has out "sphere"
accepted "metadata --json" metadata --json a.png
check "metadata: settings" [ "$(value out settings steps)" = 3 ]
check "metadata: class in settings" [ "$(value out settings images 0 class)" = sphere ]
check "metadata: parameters in json" grep -q '"parameters"' out

accepted "several, numbered" "${image[@]}" --class cube --class cone -n 3 -s 1 -o n%02d.png -q
check "numbered names" [ "$(find . -name 'n0[0-2].png' | wc -l)" = 3 ]
check "-q is quiet" [ ! -s err ]
accepted "several without a pattern" "${image[@]}" --class cube --class cone -s 1 -o m.png
check "numbers are put in" [ -s m_000.png ] && [ -s m_001.png ]
accepted "batches" "${image[@]}" --class cube --class cone -n 3 -s 1 -b 2 -o k%02d.png -q --json
check "three outputs" [ "$(value out outputs '#')" = 3 ]
check "seeds count up" [ "$(value out outputs 2 seed)" = 3 ]
check "classes take turns" [ "$(value out outputs 2 class)" = cube ]

accepted "grid" "${image[@]}" --grid -o grid.png --json
check "grid: one file" [ "$(value out outputs '#')" = 1 ]
check "grid: all classes" [ "$(value out outputs 0 class '#')" = 5 ]
check "grid: larger than one picture" [ "$(value out outputs 0 width)" -gt 96 ]
accepted "grid metadata" metadata --json grid.png
check "grid metadata: all seeds" [ "$(value out settings images '#')" = 5 ]

accepted "random seed" "${image[@]}" -s -1 --json -o r.png
seed=$(value out seed)
check "random seed is told" [ "$seed" -ge 0 ]
check "random seed is printed" has err "seed $seed"
accepted "random seed again" "${image[@]}" -s "$seed" -o r2.png
check "the told seed gives the same bytes" cmp -s r.png r2.png

for sampler in ddpm ddim dpm++2m dpm++2m-sde euler; do
    accepted "sampler $sampler" "${image[@]}" --sampling-method "$sampler" -o "sampler.png"
    check "sampler $sampler: file" [ -s sampler.png ]
done
for rng in counter torch-cpu torch-cuda; do accepted "rng $rng" "${image[@]}" --rng "$rng" -o "rng-$rng.png"; done
check "generators differ" [ "$(cmp -s rng-counter.png rng-torch-cpu.png || echo differ)" = differ ]
accepted "no guidance" "${image[@]}" --cfg-scale 1 -o cfg.png
accepted "another size" "${image[@]}" -W 48 -H 32 --json -o size.png
check "width of another size" [ "$(value out outputs 0 width)" = 48 ]
accepted "preview" "${image[@]}" --preview p.png:1 -o q.png
check "preview: file" [ -s p.png ]

# Interrupted: a message, its own exit status, no file. Wait until the run has begun (it says so), not for a fixed time.
"$REFRAIN" image -m "$tiny" --device cpu -W 512 -H 512 -n 4 --steps 1000 -o stopped.png >out 2>stopped.err &
pid=$!
for _ in $(seq 300); do
    [ -s stopped.err ] && break
    sleep 0.1
done
kill -TERM "$pid"
status=0
wait "$pid" || status=$?
check "interrupted: exit status $status" [ "$status" = 130 ]
check "interrupted: message" has stopped.err "interrupted after"
check "interrupted: no file" [ -z "$(find . -name 'stopped*.png*')" ]

accepted "info" info "$tiny"
check "info: classes" has out "teapot"
accepted "info --json" info --json "$tiny"
check "info: json" [ "$(value out num_classes)" = 5 ]
check "info: name" [ "$(value out classes 4)" = teapot ]
accepted "info of a file" info "$tiny/vae/diffusion_pytorch_model.safetensors"
check "info: tensors" has out "decoder.conv_in.weight"

for format in md csv json jsonl; do
    accepted "bench $format" bench -m "$tiny" --device cpu -b 2,3 -r 2 -o "$format"
    check "bench $format: something" [ -s out ]
done
check "bench jsonl: two lines" [ "$(num_lines out)" = 2 ]
accepted "bench json" bench -m "$tiny" --device cpu -b 2 -r 3 -o json --floors -q
check "bench: median" [ -n "$(value out 0 median_ms)" ]
check "bench: floor" [ -n "$(value out 0 floor_ms)" ]
check "bench -q is quiet" [ ! -s err ]
accepted "bench image" bench -m "$tiny" --device cpu --what image -b 2 -r 2 --steps 2 -o json
check "bench image: rate" [ -n "$(value out 0 images_per_s)" ]

status=0
"$HELLO_IMAGE" "$tiny" cone hello.png 2>err || status=$?
check "the library example" [ "$status" = 0 ] && [ -s hello.png ]
done_testing
