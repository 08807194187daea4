"""Models of random weights by their shape: that they are whole, and finite in what they say."""

import torch

from vllm_lexico.train.capture import load_model

SMALL = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
FEW = {"num_key_value_heads": 1, "head_dim": 32, "vocab_size": 64, "bos_token_id": 0, "eos_token_id": 1}


def test_random_weights_of_a_shape(import_benchmark, tmp_path, write_letters_model):
    shapes = import_benchmark("bench.shapes")
    letters = write_letters_model(tmp_path / "letters", layers=1)
    folder = shapes.write_model(tmp_path / "model", shapes.LLAMA_3_1_8B | SMALL | FEW)
    written = shapes.write_random_weights(folder, letters, shards=3)
    model = load_model(str(folder), "cpu", "auto")  # refuses what lacks weights
    weights = list(model.parameters())
    assert written == sum(weight.nbytes for weight in weights) and weights[0].dtype == torch.bfloat16
    assert len(list(folder.glob("model-*.safetensors"))) == 3 and (folder / "tokenizer.json").is_file()
    chances = model(torch.arange(32)[None]).logits.float().softmax(-1)
    assert chances.isfinite().all() and chances.max() < 0.9  # so that sampling draws many tokens
