"""Serving: vLLM's side of LEXICO, from the backend's name to a layer's attention."""
