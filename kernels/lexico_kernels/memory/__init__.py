"""What a byte means: sizes and offsets, codebooks, pages."""
