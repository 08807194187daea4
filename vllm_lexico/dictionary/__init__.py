"""Dictionary files: their format, the search for one, sharing and inspecting them."""
