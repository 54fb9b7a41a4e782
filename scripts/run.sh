#!/bin/bash
# run.sh IMGFS DIR IMAGE: mounts at DIR and lists IMAGE. When the image cannot be
# reached, the mount is made again with the demo image, which needs no network.
set -euo pipefail
imgfs=$1 dir=$2 image=$3
root=$(dirname "$0")/asroot.sh

flags=()
if [ "$(id -u)" != 0 ]; then flags=(--allow-other); fi # root mounts, and the caller looks

mounted() { grep -qs " $dir fuse.imgfs " /proc/mounts; }
show() {
	echo
	echo "\$ ls $dir/$1"
	"$root" ls "$dir/$1"
}

"$root" mkdir -p "$dir"
if ! mounted; then
	"$root" "$imgfs" mount "${flags[@]}" "$dir"
fi
if ! show "$image"; then
	echo "run.sh: $image cannot be reached; mounting the demo image instead" >&2
	"$root" "$imgfs" umount "$dir"
	"$root" "$imgfs" mount --demo "${flags[@]}" "$dir"
	image=$("$root" "$imgfs" images --mount "$dir" --format '{{.Repository}}/{{.Tag}}' | head -n 1)
	show "$image"
fi
echo
echo "Mounted at $dir. Try:  ls $dir/$image/etc    Unmount with:  make umount"
