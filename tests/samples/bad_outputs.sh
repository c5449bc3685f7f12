# tests/samples/bad_outputs.sh - places that cannot be written: found before the run where that can be known, and never a
# half-written file.
# shellcheck source=tests/lib/program.sh
. "$(dirname "${BASH_SOURCE[0]}")/../lib/program.sh"
image=(image -q -m "$tiny" --steps 2 --device cpu)

refused "missing folder" 1 "nowhere/a" "${image[@]}" -o nowhere/a.png
mkdir -p folder
refused "a folder" 1 "folder" "${image[@]}" -o folder
refused "jpeg" 2 "a.jpg|PNG" "${image[@]}" -o a.jpg
refused "two numbers in the pattern" 2 "%d" "${image[@]}" -n 2 -o a%d_%d.png
refused "another conversion" 2 "%s" "${image[@]}" -o %s.png
refused "preview in a missing folder" 1 "nowhere" "${image[@]}" --preview nowhere/p.png
refused "preview every 0 steps" 2 "--preview" "${image[@]}" --preview p.png:0
if [ "$(id -u)" != 0 ]; then
    mkdir -p locked
    chmod a-w locked
    refused "unwritable folder" 1 "locked" "${image[@]}" -o locked/a.png
fi
if [ -w /dev/full ]; then
    refused "full device" 1 "/dev/full" "${image[@]}" -o /dev/full
fi

# A disk that fills up: files may not grow past one kilobyte. What was there before stays.
echo "precious" >kept.txt
cp kept.txt kept.dat
(
    ulimit -f 1
    status=0
    "$REFRAIN" "${image[@]}" -W 64 -H 64 -o kept.dat >out2 2>err2 || status=$?
    echo "$status" >status2
)
if [ -s status2 ]; then
    cp err2 err
    check "full disk: exit status" [ "$(cat status2)" = 1 ]
    check "full disk: one line" [ "$(num_lines err2)" = 1 ]
    check "full disk: names the file" has err2 "kept.dat"
    check "full disk: the old file is untouched" cmp -s kept.txt kept.dat
    check "full disk: no temporary file" [ -z "$(find . -name '*.tmp-*')" ]
fi
done_testing
