# shellcheck shell=bash
# Shared by the scripts here: sourced by bash, never run.

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$ROOT" || exit 1

fail() {
    printf '%s: %s\n' "${0##*/}" "$1" >&2
    exit 1
}

is_supported() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1
}

# The interpreter to build .venv with: $PYTHON where it is set, else the first that will do.
find_python() {
    local candidate
    if [ -n "${PYTHON:-}" ]; then
        is_supported "$PYTHON" || fail "PYTHON=$PYTHON is not Python 3.11 or later"
        printf '%s\n' "$PYTHON"
        return
    fi
    for candidate in python3 python3.13 python3.12 python3.11 python; do
        if is_supported "$candidate"; then
            printf '%s\n' "$candidate"
            return
        fi
    done
    fail "needs Python 3.11 or later (set PYTHON to its path)"
}

# What a virtual environment depends on beyond its packages: its interpreter and its place
# (the commands in .venv/bin hold both).
identity() {
    "$1" -c 'import sys; print(sys.version, sys.base_prefix, sys.argv[1])' "$ROOT" 2>/dev/null
}

digest() {
    .venv/bin/python -c '
import hashlib, pathlib, sys
print(hashlib.sha256(b"".join(pathlib.Path(p).read_bytes() for p in sys.argv[1:])).hexdigest())
' "$@"
}

pip_install() {
    .venv/bin/python -m pip --disable-pip-version-check install --quiet "$@"
}

# Makes .venv hold what the lock file $1 names, and this project; does nothing where it already does.
ensure_venv() {
    local lock=$1 python stamp want
    if ! is_supported .venv/bin/python ||
        { [ -n "${PYTHON:-}" ] && [ "$(identity "$PYTHON")" != "$(identity .venv/bin/python)" ]; } ||
        { [ -f .venv/identity ] && [ "$(cat .venv/identity)" != "$(identity .venv/bin/python)" ]; }; then
        python=$(find_python) || exit 1
        "$python" -c 'import venv, ensurepip' 2>/dev/null ||
            fail "$python has no venv module (Debian: apt-get install python3-venv)"
        rm -rf .venv
        "$python" -m venv .venv || fail "could not make .venv"
    fi
    stamp=.venv/$lock.installed
    want=$(digest "$lock" pyproject.toml) || fail "could not read $lock"
    [ "$(cat "$stamp" 2>/dev/null)" = "$want" ] && return
    echo "installing $lock into .venv" >&2
    rm -f "$stamp"
    identity .venv/bin/python >.venv/identity
    pip_install --require-hashes -r "$lock" || fail "pip could not install $lock"
    pip_install --no-deps -e . || fail "pip could not install the project"
    printf '%s\n' "$want" >"$stamp"
}
