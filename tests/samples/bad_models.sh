# tests/samples/bad_models.sh - model folders that are incomplete, truncated or hostile: one line, no output file.
# shellcheck source=tests/lib/program.sh
. "$(dirname "${BASH_SOURCE[0]}")/../lib/program.sh"
shard=transformer/diffusion_pytorch_model-00002-of-00002.safetensors
vae=vae/diffusion_pytorch_model.safetensors

# broken NAME WORDS COMMAND...: COMMAND runs inside a fresh copy of the tiny model, then the model is refused.
broken() {
    local name=$1 words=$2
    shift 2
    rm -rf model
    cp -r "$tiny" model
    chmod -R u+w model
    (cd model && "$@")
    refused "$name" 1 "$words" image -q -m model --steps 2 -o out.png
}
cut_to() { head -c "$2" "$1" >shorter && mv shorter "$1"; }
# set_header_length FILE BYTES (little endian, octal escapes)
set_header_length() { printf %b "$2" | dd of="$1" bs=1 conv=notrunc status=none; }
nested() {
    {
        printf '{"x":'
        head -c 200000 /dev/zero | tr '\0' '['
    } >"$1"
}
swap() { sed -i "s/$2/$3/" "$1"; }

refused "no such model" 1 "nowhere" image -m nowhere
refused "a file as model" 1 "model_index.json" image -m "$tiny/model_index.json"
refused "unknown class" 2 "spheer|sphere" image -q -m "$tiny" --class spheer
refused "class number too large" 2 "5" image -q -m "$tiny" --class 5
refused "negative class" 2 "-1" image -q -m "$tiny" --class=-1
refused "missing device" 1 "" image -q -m "$tiny" --device cuda:99
refused "unknown device" 2 "tpu" image -q -m "$tiny" --device tpu
refused "bf16 on the host" 2 "bf16" image -q -m "$tiny" --device cpu --dtype bf16
refused "size that does not fit the patch" 2 "36" image -q -m "$tiny" -W 36 -H 32
refused "unknown synthetic config" 2 "dit-xl-3" image -q --synthetic-weights dit-xl-3

broken "no model index" "model_index.json" rm model_index.json
broken "no transformer" "transformer" rm -r transformer
broken "no scheduler" "scheduler_config.json" rm -r scheduler
broken "no vae weights" "vae" rm "$vae"
broken "missing shard" "00002-of-00002" rm "$shard"
broken "truncated shard" "00002-of-00002" cut_to "$shard" 5000
broken "empty shard" "00002-of-00002" cut_to "$shard" 0
broken "seven bytes" "00002-of-00002" cut_to "$shard" 7
broken "header longer than the file" "$vae" set_header_length "$vae" '\0377\0377\0377\0\0\0\0\0'
broken "header of 2^64 bytes" "$vae" set_header_length "$vae" '\0377\0377\0377\0377\0377\0377\0377\0377'
broken "negative shape" "" swap "$vae" '"shape":\[4\]' '"shape":[-4]'
broken "shape of 2^60" "" swap "$vae" '"shape":\[4\]' '"shape":[1152921504606846976]'
broken "unreadable dtype" "" swap "$vae" '"dtype":"F32"' '"dtype":"F99"'
broken "config is not JSON" "transformer/config.json" cut_to transformer/config.json 40
broken "config nested 200000 deep" "transformer/config.json" nested transformer/config.json
broken "index nested" "model_index.json" nested model_index.json
broken "scheduler nested" "scheduler_config.json" nested scheduler/scheduler_config.json
broken "config is an array" "transformer/config.json" cp /dev/stdin transformer/config.json <<<'[]'
broken "one layer more than there are weights" "transformer_blocks.3" swap transformer/config.json '"num_layers": 3' '"num_layers": 4'
broken "10^9 layers" "num_layers" swap transformer/config.json '"num_layers": 3' '"num_layers": 1000000000'
broken "wrong width" "" swap transformer/config.json '"attention_head_dim": 24' '"attention_head_dim": 32'
broken "negative heads" "num_attention_heads" swap transformer/config.json '"num_attention_heads": 2' '"num_attention_heads": -2'
broken "zero patch" "patch_size" swap transformer/config.json '"patch_size": 2' '"patch_size": 0'
broken "unknown family" "" swap transformer/config.json DiTTransformer2DModel NoSuchModel
broken "unknown scheduler" "" swap scheduler/scheduler_config.json DDIMScheduler NoSuchScheduler
broken "vae channels" "" swap vae/config.json '"latent_channels": 4' '"latent_channels": 5'
broken "class outside the table" "id2label" swap model_index.json '"4": "teapot"' '"4000": "teapot"'

# The same files through info.
rm -rf model
cp -r "$tiny" model
chmod -R u+w model
cut_to "model/$shard" 5000
refused "info of a truncated model" 1 "00002-of-00002" info model
refused "info of a truncated file" 1 "00002-of-00002" info "model/$shard"
refused "info of a config" 1 "config.json" info model/vae/config.json
refused "metadata of a text" 1 "config.json" metadata model/vae/config.json
done_testing
