"""What a KV cache costs and what the model can still do with it, for LEXICO and for every other cache that vLLM has."""
