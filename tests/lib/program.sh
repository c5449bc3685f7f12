# tests/lib/program.sh - for tests of the program: run it, look at exit status, standard error and files. Sourced, bash.
# shellcheck shell=bash
# The environment gives REFRAIN, JSON_GET (programs) and FIXTURES (a folder).
set -u
# shellcheck disable=SC2034  # for the tests
tiny=$FIXTURES/dit-tiny
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cd "$dir" || exit 1
num_failed=0
num_checks=0

# check NAME CONDITION...: runs the condition.
check() {
    local name=$1
    shift
    num_checks=$((num_checks + 1))
    "$@" && return 0
    num_failed=$((num_failed + 1))
    printf 'FAILED %s: %s\n' "$name" "$*"
    [ ! -s err ] || sed 's/^/    stderr: /' err
    return 0
}

# run ARGUMENT...: the program, its output to out and err, its exit status to $status.
run() {
    status=0
    "$REFRAIN" "$@" >out 2>err || status=$?
}

has() { grep -qF -- "$2" "$1"; }
num_lines() { wc -l <"$1"; }

# refused NAME STATUS WORDS ARGUMENT...: exit status STATUS, one line on standard error that holds each of WORDS (separated by
# |), nothing on standard output, and no PNG or temporary file left in the folder.
refused() {
    local name=$1 want=$2 words=$3 word
    shift 3
    run "$@"
    check "$name: exit status $status, expected $want" [ "$status" = "$want" ]
    check "$name: $(num_lines err) lines on stderr, expected 1" [ "$(num_lines err)" = 1 ]
    check "$name: message starts with the program's name" grep -q '^refrain: ' err
    while read -r word; do
        [ -z "$word" ] || check "$name: message names it" has err "$word"
    done < <(printf '%s\n' "$words" | tr '|' '\n')
    check "$name: nothing on stdout" [ ! -s out ]
    check "$name: no output file" [ -z "$(find . -name '*.png' -o -name '*.tmp-*')" ]
}

# accepted NAME ARGUMENT...
accepted() {
    local name=$1
    shift
    run "$@"
    check "$name: exit status $status, expected 0" [ "$status" = 0 ]
}

done_testing() {
    printf '%s checks, %s failed\n' "$num_checks" "$num_failed"
    [ "$num_failed" = 0 ]
    exit
}
