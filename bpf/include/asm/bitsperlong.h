/* BPF is a 64-bit machine. */
#ifndef BITS_PER_LONG
#define BITS_PER_LONG 64
#endif
