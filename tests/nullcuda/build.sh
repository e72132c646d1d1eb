#!/usr/bin/env bash
# Makes the null device, once: a venv with a CUDA build of torch (5 GB), and the shared library of this
# folder's C files.
# Prints the folder of the library; the venv lies next to it. Needs a C compiler, nm and a Python from 3.11 to
# 3.14.
# $NULLCUDA_HOME: where; default ~/.cache/speedrun/nullcuda, so that checkouts share the 5 GB.
set -euo pipefail
here=$(CDPATH='' cd -- "$(dirname -- "$0")" && pwd)
home=${NULLCUDA_HOME:-${XDG_CACHE_HOME:-$HOME/.cache}/speedrun/nullcuda}
cc=$(command -v "${CC:-gcc}" || command -v clang || true)
stop() {
    echo "error: $1" >&2
    exit 2
}
[ -n "$cc" ] ||
    stop "the null device needs a C compiler: install gcc, or set CC (Debian, Ubuntu: apt install gcc)"
command -v nm > /dev/null || stop "the null device needs nm (Debian, Ubuntu: apt install binutils)"
[ "$(uname -sm)" = "Linux x86_64" ] ||
    stop "the null device needs torch's wheels for Linux x86_64, not $(uname -sm)"
mkdir -p "$home"
exec 9> "$home/lock"
flock 9  # two runs at once: the second waits for the first one's packages

if [ ! -e "$home/venv/installed" ]; then
    python=${SPEEDRUN_PYTHON:-python3}
    echo "null device: installing a CUDA build of torch into $home/venv (about 5 GB, minutes)" >&2
    rm -rf "$home/venv"
    "$python" -m venv "$home/venv" || stop "$python cannot make a venv: set SPEEDRUN_PYTHON to one that can"
    # pip's default index: local settings often lead to CPU builds
    env -u PIP_FIND_LINKS -u PIP_EXTRA_INDEX_URL PIP_CONFIG_FILE=/dev/null "$home/venv/bin/python" -m pip \
        install -q --only-binary :all: -r "$here/requirements.txt" >&2 ||
        stop "pip could not install tests/nullcuda/requirements.txt"
    touch "$home/venv/installed"
fi

packages=$("$home/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
stamp=$(cat "$here"/*.c "$here"/*.h "$here"/*.sh "$packages"/torch/version.py | sha256sum | cut -c1-16)
to=$home/$stamp
if [ ! -e "$to/libcuda.so.1" ]; then
    part=$(mktemp -d "$home/part.XXXXXX")
    trap 'rm -rf "$part"' EXIT
    include=$(find "$packages/nvidia" -name cuda_runtime_api.h -printf '%h\n' | head -1)
    nccl=$(find "$packages/nvidia" -name nccl.h -printf '%h\n' | head -1)
    headers=$packages/triton/backends/nvidia/include  # crt/, which the wheel of the runtime lacks
    flags=(-O1 -fPIC -Wall -I"$include" -I"$nccl" -I"$headers")
    for name in runtime libraries; do
        "$cc" "${flags[@]}" -c -o "$part/$name.o" "$here/$name.c"
    done
    bash "$here/stubs.sh" "$packages/torch/lib" "$part"/*.o > "$part/stubs.c"
    "$cc" -O1 -fPIC -w -c -o "$part/stubs.o" "$part/stubs.c"
    # loaded under the driver's name, so that whoever opens libcuda.so.1 later gets this one
    "$cc" -shared -Wl,-soname,libcuda.so.1 -o "$part/libcuda.so.1" "$part"/*.o -lpthread
    chmod 755 "$part"
    mv "$part" "$to"
    trap - EXIT
fi
echo "$to"
