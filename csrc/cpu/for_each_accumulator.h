// Includes the file DLOGP_LOOPS, functions that stand there once, for each type Acc that accumulates: of float they are
// compiled for each instruction set (vector_math.h), of double for the common one.
#define Acc float
#define DLOGP_CLONED DLOGP_CLONES
#include DLOGP_LOOPS
#undef Acc
#undef DLOGP_CLONED

#define Acc double
#define DLOGP_CLONED
#include DLOGP_LOOPS
#undef Acc
#undef DLOGP_CLONED
#undef DLOGP_LOOPS
