#!/usr/bin/env bash
# What a bare Debian or Ubuntu lacks before `make` can install llmtrain. CI and the images run this same file.
# usage: docker/install.sh [more Debian packages...]
set -euo pipefail

packages=()
have() { command -v "$1" >/dev/null 2>&1; }
if ! have make || ! have g++ || ! python3 -c 'import venv, ensurepip' 2>/dev/null; then
    packages+=(make g++ python3 python3-dev python3-venv)
fi
for package in "$@"; do
    dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed || packages+=("$package")
done

if [ "${#packages[@]}" -gt 0 ]; then
    apt-get update -q
    DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "${packages[@]}"
fi
