/* The user-space side of the same types. */
#include <linux/types.h>
