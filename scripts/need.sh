#!/bin/bash
# need.sh COMMAND=PACKAGE...
#
# Installs the Debian packages of the commands that this machine lacks. No
# service that a package brings is started: a registry's package would else
# leave a daemon on port 5000.
set -euo pipefail

packages=()
for pair in "$@"; do
	command -v "${pair%%=*}" >/dev/null 2>&1 || packages+=("${pair#*=}")
done
[ ${#packages[@]} -gt 0 ] || exit 0

if ! command -v apt-get >/dev/null 2>&1; then
	echo "need.sh: please install: ${packages[*]}" >&2
	exit 1
fi
if [ "$(id -u)" != 0 ]; then
	exec sudo "$0" "$@"
fi

listening() { (exec 3<>/dev/tcp/127.0.0.1/5000) 2>/dev/null; }
before=no
if listening; then before=yes; fi

# While this file says 101, maintainer scripts start nothing.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
	printf '#!/bin/sh\nexit 101\n' >"$policy"
	chmod +x "$policy"
	trap 'rm -f "$policy"' EXIT
fi
echo "installing: ${packages[*]}" >&2
export DEBIAN_FRONTEND=noninteractive
install() { apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null; }
install 2>/dev/null || { apt-get update -qq && install; }

if [ "$before" = no ] && listening; then
	systemctl disable --now docker-registry.service >/dev/null 2>&1 || true
	if listening; then
		echo "need.sh: installing ${packages[*]} started a server on port 5000; stop it" >&2
		exit 1
	fi
fi
