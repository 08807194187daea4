"""What LEXICO would do for a model, known from its configuration alone: `vllm-lexico check`.

`source` finds the configuration and the size of the weights, `model` reads the shape, `verdict` asks what is refused,
`memory` counts pages as vLLM does, `dictionary` looks for one, `report` puts it together and into words.
"""
