"""What kernels share: device functions, launch settings, the compiler of CUDA C++."""
