"""The dictionaries that come with the package; it makes an installed copy importable as `vllm_lexico.bundled`."""
