/* The ops for one instruction set; kernels.c includes this file once for each. */
#include "vectors.h"
#include "weights.h"
#include "adamw.h"
#include "linear.h"
#include "rms_norm.h"
#include "attend.h"

#undef vf
#undef vi
#undef vl
#undef vf_any
#undef vi_any
#undef table
#undef FIRST_OF_PAIRS
#undef SECOND_OF_PAIRS
#undef LOW_PAIRS
#undef HIGH_PAIRS
#undef COUNTING
#undef SET
#undef LEVEL
#undef W
