#!/usr/bin/env bash
# A Docker image as the squashfs file that enroot and pyxis start containers from.
set -euo pipefail

usage() {
    cat <<'EOF'
Usage: docker/enroot.sh [--force] IMAGE [FILE]

Writes the image IMAGE into FILE, which is minitron.sqsh unless it is given.

IMAGE is a URI of `enroot import`:
  dockerd://minitron:0.1                            an image of this machine's Docker
  docker://registry.example.com#team/minitron:0.1   an image in a registry; enroot wants a # after the registry's name
A name without a scheme is one of this machine's Docker.

  --force   replace FILE where it exists
  --help    this text

Enroot reads the password of a registry from $ENROOT_CONFIG_PATH/.credentials.
EOF
}

fail() {
    printf 'enroot.sh: %s\n' "$*" >&2
    exit 2
}

force=false
arguments=()
for argument in "$@"; do
    case $argument in
    -h | --help)
        usage
        exit 0
        ;;
    --force) force=true ;;
    -*) fail "unknown option $argument, see --help" ;;
    *) arguments+=("$argument") ;;
    esac
done
(( ${#arguments[@]} == 1 || ${#arguments[@]} == 2 )) || fail "expected IMAGE and perhaps FILE, see --help"

image=${arguments[0]}
file=${arguments[1]:-minitron.sqsh}
case $image in
docker://* | dockerd://*) ;;
*://*) fail "$image: the scheme must be docker:// or dockerd://" ;;
*) image=dockerd://$image ;;
esac

command -v enroot > /dev/null ||
    fail "enroot is not installed here: https://github.com/NVIDIA/enroot/blob/master/doc/installation.md"
[[ $image != dockerd://* ]] || command -v docker > /dev/null ||
    fail "docker is not installed here: give docker://REGISTRY#IMAGE:TAG to import from a registry"
if [[ -e $file ]]; then
    $force || fail "$file exists: remove it, or give --force"
fi

# Beside the target first: a job never finds half an image, and one that runs from the old file keeps it.
partial=$file.$$.partial
trap 'rm -f -- "$partial"' EXIT
enroot import --output "$partial" -- "$image"
mv -f -- "$partial" "$file"
printf 'wrote %s\n' "$file"
