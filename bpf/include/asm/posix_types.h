/* Nothing: see linux/posix_types.h. */
