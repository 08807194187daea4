"""Small trainings of a tiny model."""

import torch

from vllm_lexico.dictionary.file import load_dictionary
from vllm_lexico.train import rounds
from vllm_lexico.train.learn import LearnSettings
from vllm_lexico.train.run import train_dictionary
from vllm_lexico.train.settings import TrainSettings

LEARN = LearnSettings(atoms=32, sparsity=4, batch=128)


def settings_for(data: tuple[str, ...] = (), **changes) -> TrainSettings:
    rounds.texts_of.cache_clear()
    usual = {"data": data, "learn": LEARN, "vectors": 768, "passes": 2, "rounds": 3, "sequence_tokens": 64}
    return TrainSettings(**(usual | changes))


def train(model, settings, out):
    return load_dictionary(train_dictionary(str(model), settings, name="me/tiny", out=out, device="cpu"))


def same(one, other) -> bool:
    tensors = one.tensors.keys() == other.tensors.keys()
    return tensors and one.info == other.info and all(torch.equal(t, other.tensors[n]) for n, t in one.tensors.items())
