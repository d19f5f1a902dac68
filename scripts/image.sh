#!/usr/bin/env bash
# Builds the images that deploy/docker/test_image.py runs, without a Docker engine: a base made of Debian's packages, servinggraph on
# it, and examples/digits on that by `servinggraph build`. Needs root. What is there already is used again; IMAGE_ANEW=1 builds all anew.
set -euo pipefail
cd "$(dirname "$0")/.."
export STORAGE_DRIVER=vfs BUILDAH_ISOLATION=chroot
work=.cache/image
mkdir -p "$work"

if [ -n "${IMAGE_ANEW:-}" ] || ! buildah inspect --type image localhost/python-base >/dev/null 2>&1; then
  # From the mirror that this machine's own packages come from.
  mirror=$(apt-get download --print-uris debootstrap | cut -d"'" -f2 | sed 's#/pool/.*##')
  rm -rf "$work/base"
  debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$work/base" "$mirror" >"$work/debootstrap.log" 2>&1 \
    || { tail -5 "$work/debootstrap.log" >&2; exit 1; }
  rm -rf "$work"/base/var/cache/apt/archives/*.deb "$work"/base/var/lib/apt/lists/*
  container=$(buildah from scratch)
  buildah add --quiet "$container" "$work/base" / >/dev/null
  buildah commit --quiet "$container" localhost/python-base >/dev/null
  buildah rm "$container" >/dev/null
  rm -rf "$work/base"
fi

# How this machine's pip reaches its registry is this machine's business, and stays out of the images.
here=()
for file in /etc/pip.conf /etc/ssl/certs; do [ -e "$file" ] && here+=(--volume "$file:$file:ro"); done

buildah bud --quiet --format docker --build-arg BASE=localhost/python-base "${here[@]}" -f deploy/docker/Dockerfile -t localhost/servinggraph-test . >/dev/null
.venv/bin/servinggraph build examples/digits/graph.yaml -t localhost/digits-test --base localhost/servinggraph-test --engine buildah -- --quiet "${here[@]}"
buildah rmi --prune >/dev/null
buildah images --format '{{.Name}} {{.Size}}' | grep localhost/
