"""sparse_decode: attention of single tokens over codes and the raw tail."""
