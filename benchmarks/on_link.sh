#!/bin/sh
# Runs a command where loopback carries no more than RATE, both directions together: a stand-in for a network card.
# After a pause 256 kB pass at once.
#
#     benchmarks/on_link.sh RATE COMMAND ...          RATE in tc's words: 10gbit, 800mbit
#
# The command gets a network namespace of its own, which ends with it and reaches nothing else. Needs Linux, unshare
# (util-linux), ip and tc (iproute2); root only where user namespaces are not allowed.
set -eu
rate=${1:?RATE COMMAND ...}
shift
if [ "$(id -u)" = 0 ]; then user=; else user=--map-root-user; fi
exec unshare --net $user sh -euc '
    PATH=$PATH:/usr/sbin:/sbin
    ip link set lo up
    tc qdisc add dev lo root tbf rate "$0" burst 256kb latency 200ms
    exec "$@"' "$rate" "$@"
