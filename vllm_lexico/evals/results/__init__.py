"""From rows of samples to estimates, tables and the picture."""
