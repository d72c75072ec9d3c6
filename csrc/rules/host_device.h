// What every rule needs to be compiled for the host at several ISA levels and for the device.
#pragma once

// A rule is inlined into every loop that runs it. That is needed for speed, and on the host for
// correctness too: an out-of-line copy would be a weak symbol, and the linker could keep the
// AVX-512 copy for the baseline loop.
#if defined(__CUDACC__)
#define FUSED_OPT_HD __host__ __device__ __forceinline__
#else
#define FUSED_OPT_HD inline __attribute__((always_inline))
#endif

// The ISA level that a translation unit is compiled for. It names an inline namespace around the
// rules, so that units compiled for different levels never share a symbol.
#if !defined(FUSED_OPT_ISA)
#define FUSED_OPT_ISA any
#endif
