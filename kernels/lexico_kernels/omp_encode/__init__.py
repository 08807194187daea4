"""omp_encode: orthogonal matching pursuit of K and V into code pages."""
