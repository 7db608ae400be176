#!/usr/bin/env bash
# Build this checkout on a machine with dnf (Amazon Linux 2023, Rocky Linux 9): packages of the
# system, then make setup. A second call does only what is missing.
set -euo pipefail
cd "$(dirname "$0")/../.."

root=()
if [ "$(id -u)" != 0 ]; then root=(sudo); fi
# Their own GCC is 11, which lacks _Float16; here is the newer one that each offers beside it.
if "${root[@]}" dnf -q list gcc14-c++ > /dev/null 2>&1; then
    compiler=(gcc14 gcc14-c++)
    export CC=gcc14-gcc CXX=gcc14-g++
else
    compiler=(gcc-toolset-14-gcc-c++)
    export PATH=/opt/rh/gcc-toolset-14/root/usr/bin:$PATH
fi
"${root[@]}" dnf install -y --setopt=install_weak_deps=False \
    python3.11 python3.11-devel gcc-c++ "${compiler[@]}" make git

# A machine with a GPU must build the CUDA kernels; nvcc has to be CUDA 13, as PyTorch's is.
if [ -e /dev/nvidiactl ]; then
    export SBF_DIST_CUDA=1
fi
for toolkit in /usr/local/cuda-13.*; do
    if [ -x "$toolkit/bin/nvcc" ]; then export CUDA_HOME=$toolkit; fi
done
make setup PYTHON=python3.11

# The token that file_mounts has brought is for this user's eyes.
if [ -e ~/.ray/auth_token ]; then
    chmod 700 ~/.ray
    chmod 600 ~/.ray/auth_token
fi
# For shells by SSH, and `ray exec` and `ray attach`, which start one.
line=". $PWD/launchers/nodes/environment.sh"
touch ~/.bashrc
grep -qxF "$line" ~/.bashrc || echo "$line" >> ~/.bashrc
