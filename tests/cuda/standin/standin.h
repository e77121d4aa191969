/* What the parts of the stand-in know of one another. */

#include <stdint.h>

/* A kernel runs its blocks one after another; see blocks.c. */
void standin_run_kernel(void (*function)(void **), unsigned grid, const unsigned *size,
                        void **given);
