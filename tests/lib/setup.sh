# tests/lib/setup.sh - what samples/quickstart and tests/run share: packages, configuring, building. Sourced, bash.
# Every function does nothing when there is nothing to do, so a second run is quick.

say() { printf '%s\n' "$*"; }
die() {
    printf '%s: %s\n' "${0##*/}" "$*" >&2
    exit 1
}
have() { command -v "$1" >/dev/null 2>&1; }

# The CUDA toolkit often lies outside the search path.
if ! have nvcc && [ -x /usr/local/cuda/bin/nvcc ]; then
    PATH=$PATH:/usr/local/cuda/bin
fi

# Does the C compiler find this header?
have_header() {
    have cc && printf '#include <%s>\n' "$1" | cc -E -x c - >/dev/null 2>&1
}
have_pkg() { have pkg-config && pkg-config --exists "$1"; }
have_ffmpeg() { have_pkg libavcodec && have_pkg libavformat && have_pkg libswscale && have_pkg libavutil; }
have_build_tool() { have ninja || have make; }

# missing_packages WHAT...: names the Debian packages of what is not there. WHAT: build, video, tests.
missing_packages() {
    local what
    for what in "$@"; do
        case $what in
            build)
                have cc && have_header stdlib.h || printf 'gcc libc6-dev '
                have cmake || printf 'cmake '
                have_build_tool || printf 'ninja-build '
                have pkg-config || printf 'pkg-config '
                have_pkg openblas || printf 'libopenblas-dev '
                have_pkg libcjson || printf 'libcjson-dev '
                have_header stb/stb_image.h || printf 'libstb-dev '
                have_header zlib.h || printf 'zlib1g-dev '
                have_pkg libpcre2-8 || printf 'libpcre2-dev '
                have_pkg libutf8proc || printf 'libutf8proc-dev '
                ;;
            video)
                have_ffmpeg || printf 'libavcodec-dev libavformat-dev libswscale-dev libavutil-dev '
                ;;
            tests)
                have_pkg check || printf 'check '
                # Debian's Check is linked against subunit.
                have_header subunit/child.h || printf 'libsubunit-dev '
                ;;
        esac
    done
}

# Runs a command as root, or fails where that is not possible without a password.
as_root() {
    if [ "$(id -u)" = 0 ]; then
        "$@"
    elif have sudo && sudo -n true 2>/dev/null; then
        sudo -n "$@"
    else
        return 1
    fi
}

# need_packages WHAT...: installs what is missing where it may, otherwise names it and stops.
need_packages() {
    local missing
    missing=$(missing_packages "$@")
    missing=${missing% }
    [ -n "$missing" ] || return 0
    if ! have apt-get || ! as_root true; then
        die "missing: $missing (Debian and Ubuntu names). Install them, then run this again."
    fi
    install_packages "$missing" || die "could not install: $missing"
    missing=$(missing_packages "$@")
    [ -z "$missing" ] || die "still missing after installing: $missing"
}

install_packages() {
    say "installing $1"
    # shellcheck disable=SC2086  # a list of names
    as_root env DEBIAN_FRONTEND=noninteractive sh -c '
        apt-get -qq update &&
        apt-get -qq -y -o Dpkg::Use-Pty=0 --no-install-recommends install "$@"' sh $1 >/dev/null
}

# want_packages WHY WHAT...: the same for what the build can do without; WHY is what is missing then.
want_packages() {
    local why=$1 missing
    shift
    missing=$(missing_packages "$@")
    missing=${missing% }
    [ -n "$missing" ] || return 0
    if ! have apt-get || ! as_root true || ! install_packages "$missing"; then
        say "$why: $missing could not be installed"
    fi
}

# configure DIR OPTION...: runs cmake once; again only if an option differs from what the folder holds.
configure() {
    local dir=$1 option name wanted
    shift
    if [ -f "$dir/CMakeCache.txt" ] && { [ -f "$dir/build.ninja" ] || [ -f "$dir/Makefile" ]; }; then
        for option in "$@"; do
            name=${option#-D}
            name=${name%%=*}
            wanted=${option#*=}
            grep -q "^$name:[A-Z]*=$wanted\$" "$dir/CMakeCache.txt" || break
            option=
        done
        # What was installed since then is looked for again.
        if ! has_cuda_build "$dir" && have nvcc && grep -q '^RF_CUDA:[A-Z]*=auto$' "$dir/CMakeCache.txt"; then
            set -- "$@" -U CMAKE_CUDA_COMPILER
            option=again
        fi
        if ! has_ffmpeg_build "$dir" && have_ffmpeg && grep -q '^RF_FFMPEG:[A-Z]*=auto$' "$dir/CMakeCache.txt"; then
            option=again
        fi
        [ -n "${option:-}" ] || return 0
    fi
    local generator=()
    if [ ! -f "$dir/CMakeCache.txt" ] && have ninja; then generator=(-G Ninja); fi
    say "configuring $dir"
    cmake -S . -B "$dir" "${generator[@]}" "$@" >"$dir.configure.log" 2>&1 || {
        tail -n 20 "$dir.configure.log" >&2
        rm -f "$dir.configure.log"
        die "cmake could not configure $dir"
    }
    rm -f "$dir.configure.log"
}

num_cores() { nproc 2>/dev/null || echo 2; }

# build DIR [TARGET...]: quiet unless it fails or there is work to do.
build() {
    local dir=$1 targets=()
    shift
    if [ $# -gt 0 ]; then targets=(--target "$@"); fi
    cmake --build "$dir" --parallel "$(num_cores)" "${targets[@]}" >"$dir/build.log" 2>&1 || {
        grep -nE 'error|FAILED|undefined reference' "$dir/build.log" | head -n 20 >&2 || true
        tail -n 20 "$dir/build.log" >&2
        die "building $dir failed (the whole output is in $dir/build.log)"
    }
}

# Were FFmpeg's libraries, was CUDA compiled into this build folder?
has_ffmpeg_build() { grep -q '^FFMPEG_FOUND:INTERNAL=1' "$1/CMakeCache.txt"; }
has_cuda_build() { grep -qE '^CMAKE_CUDA_COMPILER:[A-Z]*=/' "$1/CMakeCache.txt"; }
