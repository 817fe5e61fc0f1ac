#!/usr/bin/env bash
# Compiles the kernels (tests/attention/kernels/compile_kernels.py) by several versions of Triton, without a GPU and without PyTorch.
# Usage: tools/triton_matrix.sh [--dir DIR] [--jobs N] [--discard] [VERSION ...]  (default: .venv-triton, 2 at once, the versions below)
# `newest` is whatever pip installs today. One environment a version, kept in DIR and used again, or with --discard
# removed before the next is made (0.6 to 1 GB each); logs in DIR/logs.
# Interpreter: PYTHON, else the first Python of 3.11, 3.10, 3.12, for which every one of these versions has a wheel.
set -euo pipefail
cd "$(dirname "$0")/.."

DIR=.venv-triton
JOBS=2
DISCARD=
ARCHS=(90 80 86 89)
# The oldest and the newest version compile every variant; 86 and 89, which have the tiles of 80, only the newest.
# Those between compile a quarter of the variants on 80 and another on 90; four of them compile all.
BETWEEN=" 3.1.0 3.2.0 3.4.0 3.6.0 "
VERSIONS=()
while [ $# -gt 0 ]; do
    case $1 in
        --dir) DIR=$2; shift 2 ;;
        --jobs) JOBS=$2; shift 2 ;;
        --discard) DISCARD=1; shift ;;
        newest | [0-9]*.[0-9]*) VERSIONS+=("$1"); shift ;;
        *) echo "$0: unknown argument '$1'; expected --dir DIR, --jobs N, --discard or versions of Triton" >&2; exit 2 ;;
    esac
done
[ ${#VERSIONS[@]} -gt 0 ] || VERSIONS=(3.0.0 3.1.0 3.2.0 3.4.0 3.6.0 newest)
export PIP_DISABLE_PIP_VERSION_CHECK=1
unset TRITON_INTERPRET

find_python() {
    local version found
    for version in 3.11 3.10 3.12; do
        for found in "python$version" "$HOME/.pyenv/versions/$version".*/bin/python; do
            if "$found" -c "import sys; sys.exit(sys.version_info[:2] != (3, ${version#3.}))" 2>/dev/null; then
                echo "$found"; return
            fi
        done
    done
    echo "$0: no Python 3.10, 3.11 or 3.12: install one or name it with PYTHON=" >&2
    return 1
}

mkdir -p "$DIR"
DIR=$(cd "$DIR" && pwd)
export DIR
rm -rf "$DIR/logs" "$DIR/cache"
mkdir "$DIR/logs"
trap 'rm -rf "$DIR/cache"' EXIT
PYTHON=${PYTHON:-$(find_python)}

install() { # VERSION; prints which version of Triton that is
    local wanted=triton==$1
    [ "$1" != newest ] || wanted=triton
    [ -x "$DIR/$1/bin/python" ] || "$PYTHON" -m venv "$DIR/$1"
    "$DIR/$1/bin/pip" install --quiet --upgrade "$wanted" setuptools
    "$DIR/$1/bin/python" -c 'import triton; print(triton.__version__)'
}

one() { # VERSION ARCH [PART]; the status is left in a file, so that every other one still runs
    local log=$DIR/logs/$1-$2 start=$SECONDS status=0
    TRITON_CACHE_DIR=$DIR/cache/$1-$2 "$DIR/$1/bin/python" tests/attention/kernels/compile_kernels.py "$2" ${3:+"$3"} > "$log.log" 2>&1 || status=$?
    echo "$status $((SECONDS - start))" > "$log.status"
    [ "$status" = 0 ] || tail -n 25 "$log.log" | sed "s/^/    /"
    echo "[$1] arch $2: $(tail -n 1 "$log.log" | cut -c1-100), $((SECONDS - start)) s"
}
export -f one

archs() { # VERSION
    case " 3.0.0$BETWEEN" in *" $1 "*) echo 90 80 ;; *) echo "${ARCHS[@]}" ;; esac
}

part() { # VERSION ARCH
    case "$1 $2" in
        "3.1.0 90" | "3.2.0 80") echo 1/4 ;;
        "3.2.0 90" | "3.4.0 80") echo 2/4 ;;
        "3.4.0 90" | "3.6.0 80") echo 3/4 ;;
        "3.6.0 90" | "3.1.0 80") echo 4/4 ;;
    esac
}

for version in "${VERSIONS[@]}"; do
    start=$SECONDS
    install "$version" > "$DIR/logs/$version"
    echo "[$version] triton $(cat "$DIR/logs/$version"), installed in $((SECONDS - start)) s"
    # xargs reads a blank at the end of a line as "goes on".
    for arch in $(archs "$version"); do echo $version $arch $(part "$version" "$arch"); done |
        xargs -P "$JOBS" -L 1 bash -c 'one "$@"' one
    rm -rf "$DIR/cache"
    [ -z "$DISCARD" ] || rm -rf "${DIR:?}/$version"
done

printf '\n%-8s %-8s' asked triton
printf ' %12s' "${ARCHS[@]}"
echo
failures=0
for version in "${VERSIONS[@]}"; do
    printf '%-8s %-8s' "$version" "$(cat "$DIR/logs/$version")"
    for arch in "${ARCHS[@]}"; do
        if [[ " $(archs "$version") " != *" $arch "* ]]; then
            printf ' %12s' -
            continue
        fi
        read -r status took < "$DIR/logs/$version-$arch.status" || status=missing took=0
        if [ "$status" = 0 ]; then
            printf ' %12s' "$(tail -n 1 "$DIR/logs/$version-$arch.log" | cut -d' ' -f2) in $took s"
        else
            printf ' %12s' FAILED
            failures=$((failures + 1))
        fi
    done
    echo
done
echo "$((SECONDS / 60)) min $((SECONDS % 60)) s, $failures failures"
[ "$failures" = 0 ]
