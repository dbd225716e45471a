"""The ops for CPUs in C: kernels.c, which compiles ops.h for each instruction set; bf16.h and amx.h."""
