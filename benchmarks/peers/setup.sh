#!/bin/sh
# Create a virtual environment for each peer: sh benchmarks/peers/setup.sh DIR [PYTHON]
# Celery also needs redis-server (Debian package redis-server).
set -eu
folder=$1
python=${2:-python3.11}

make() {
    [ -x "$folder/$1/bin/python" ] || "$python" -m venv "$folder/$1"
    name=$1
    shift
    "$folder/$name/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
}

mkdir -p "$folder"
make dbos 'dbos==3.4.*' 'psycopg[binary]'
make celery 'celery[redis]==5.7.*' hiredis
make huey 'huey==3.5.*'
command -v redis-server > /dev/null || echo "redis-server is missing: Celery will not be measured" >&2
