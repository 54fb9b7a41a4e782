#!/bin/bash
# fuzz.sh TIME: runs each fuzzer of the module for TIME, one after the other.
set -euo pipefail
time=${1:-60s}
cd "$(dirname "$0")/.."
status=0
while IFS=: read -r file name; do
	echo "--- $name ($(dirname "$file")), $time"
	go test -run '^$' -fuzz "^$name\$" -fuzztime "$time" -fuzzminimizetime 5x "./$(dirname "$file")" || status=1
done < <(git grep -o -E "^func Fuzz[A-Za-z0-9_]+" -- "*_test.go" | sed "s/:func /:/")
exit $status
