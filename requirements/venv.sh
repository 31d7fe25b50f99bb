#!/bin/sh
# Usage: venv.sh python folder [arguments for pip]
# Builds a virtual environment in `folder` with this project and the versions of constraints.txt, or brings one up to
# date. An environment that was left unfinished, or whose Python is gone, is built anew. Run by make.
set -eu
python=$1
venv=$2
shift 2
pins=requirements/constraints.txt
unfinished=$venv/.unfinished

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    found=$(command -v "$python" >/dev/null && "$python" -V 2>&1 | head -n 1) || found=missing
    cat <<EOF
sloth_fx is developed with Python 3.11 or newer, and $python is ${found:-broken}.
Install a newer one (https://www.python.org/downloads, or your system's package manager). If you have one already, say
where it is: make test PYTHON=/path/to/python3.11
EOF
    exit 1
fi
if ! "$python" -c 'import venv, ensurepip' 2>/dev/null; then
    cat <<EOF
$python lacks the modules venv and ensurepip, with which $venv is made. On Debian and Ubuntu they come with
    sudo apt install $("$python" -c 'import sys; print("python%d.%d-venv" % sys.version_info[:2])')
and elsewhere with Python itself (https://www.python.org/downloads). Then run make again.
EOF
    exit 1
fi

if [ -e "$venv" ] && { [ -e "$unfinished" ] || ! "$venv/bin/python" -c 'import pip' 2>/dev/null; }; then
    echo "$venv is unfinished or broken: removing it"
    rm -rf "$venv"
fi
if [ ! -e "$venv" ]; then
    echo "Building $venv with $("$python" -V): once, a few minutes, most of them for torch"
    mkdir "$venv"
    touch "$unfinished"
    "$python" -m venv "$venv"
else
    echo "Bringing $venv up to date"
fi

# pip, without its warnings about package indexes that do not have every package
install() {
    { { "$venv/bin/python" -m pip install --disable-pip-version-check --constraint "$pins" "$@" && touch "$venv/.done"; } \
        2>&1 1>&3 | { grep -v '^WARNING: Location' >&2 || true; }; } 3>&1
    rm "$venv/.done" 2>/dev/null
}

touch "$unfinished"
if install "$@" hatchling editables setuptools && install "$@" --no-build-isolation --editable '.[dev]'; then
    rm "$unfinished"
    pwd >"$venv/.ready"
else
    rm "$unfinished" # pip installs nothing before it has found everything
    cat <<EOF

The packages could not be installed; pip says above why. Where it finds no fitting version, this Python may be too new
for the pinned ones: make test PYTHON=python3.12 takes another. Where the network is to blame, run make again.
EOF
    exit 1
fi
