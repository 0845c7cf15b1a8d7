#!/bin/sh
# Install what the database tests need: PostgreSQL's programs and strace (Debian, Ubuntu). Starts nothing:
# the tests run a private server in a temporary folder. Run as root: scripts/install_postgres.sh
set -eu
export DEBIAN_FRONTEND=noninteractive
if ls /usr/lib/postgresql/*/bin/initdb >/dev/null 2>&1 && command -v strace >/dev/null 2>&1; then
    exit 0
fi
# The package would make a cluster and start it as a service of the system.
mkdir -p /etc/postgresql-common/createcluster.d
printf 'create_main_cluster = false\nstart_conf = disabled\n' >/etc/postgresql-common/createcluster.d/ayllu-tests.conf
apt-get update
apt-get install --yes --no-install-recommends postgresql strace
