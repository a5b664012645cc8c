// Functions of the headers here run on both sides.
#pragma once

#ifdef __CUDACC__
#define DLOGP_HOST_DEVICE __host__ __device__
#else
#define DLOGP_HOST_DEVICE
#endif
