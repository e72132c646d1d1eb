#!/usr/bin/env bash
# C source of a function that does nothing and succeeds for each function of the CUDA runtime, the driver,
# cuBLAS and NCCL
# that torch's libraries call and no given object file defines; products are counted. stubs.sh FOLDER_OF_TORCH
# OBJECT ...
set -euo pipefail
libraries=$1
shift
called=$(nm -D --undefined-only "$libraries"/*.so |
    grep -oE '\b(__cuda|cuda|cublas|nccl|cu[A-Z])[A-Za-z0-9_]*' | sort -u)
defined=$(nm --defined-only "$@" | awk 'NF == 3 {print $3}' | sort -u)
echo "int nullcuda_gemm(void);"
comm -23 <(echo "$called") <(echo "$defined") | while read -r name; do
    case $name in
    cuFile*) ;;  # a library of its own, which torch opens and nobody here calls
    cublas*gemm* | cublas*symm* | cublas*syrk* | cublas*hemm* | cublas*Gemm*)
        echo "int $name(void) { return nullcuda_gemm(); }"
        ;;
    *) echo "int $name(void) { return 0; }" ;;
    esac
done
