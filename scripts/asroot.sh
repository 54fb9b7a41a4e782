#!/bin/sh
# asroot.sh COMMAND...: runs a command as root, by sudo where needed.
if [ "$(id -u)" = 0 ]; then exec "$@"; fi
exec sudo "$@"
