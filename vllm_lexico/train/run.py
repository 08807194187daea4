"""A dictionary from a model: rounds of reading text and learning from it, then one file.

Where vLLM is to write the text, it does so first, in a process that has ended when the rounds begin (see `ahead`).

A round captures as many vectors as memory is set aside for, learns from them and lets them go; so memory does not grow
with the amount of text. After a round its state is kept: an interrupted run goes on from there. The last half of the
rounds anneals: the step falls to nothing, and codes are the stored ones.
"""

import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from lexico_kernels.files import cache_folder
from lexico_kernels.memory.layout import KV

from vllm_lexico.dictionary.file import Dictionary, check_out, load_dictionary
from vllm_lexico.dictionary.info import DictionaryInfo
from vllm_lexico.dictionary.names import check_name, file_name, plain_name
from vllm_lexico.train.ahead import Ahead
from vllm_lexico.train.asked_only import add_shares
from vllm_lexico.train.identity import file_checksum, model_identity
from vllm_lexico.train.in_turn import comes_in_turn, refuse_writing
from vllm_lexico.train.layer_learners import FinishedLayers, layers_at_once
from vllm_lexico.train.model import ModelFacts, check_folder, read_facts
from vllm_lexico.train.own_text import read_tokenizer
from vllm_lexico.train.package_text import package_documents, package_text_identity
from vllm_lexico.train.progress import Progress, Stage
from vllm_lexico.train.rounds import (
    GUESSES,
    Job,
    Share,
    asked_shares,
    finished_layers,
    finished_name,
    rounds_name,
    stages_of,
    texts_of,
    train_share,
)
from vllm_lexico.train.settings import (
    READ_TOKENS,
    Plan,
    TrainSettings,
    bytes_per_token,
    check,
    cpu_dtype,
    cpu_words,
    own_tokens,
    rounds_in_words,
    share_layers,
)
from vllm_lexico.train.state import RunFolder, check_writable
from vllm_lexico.train.vllm_writer import WriterJob
from vllm_lexico.train.writing import TEXT, own_text


def train_dictionary(
    model: str,
    settings: TrainSettings | None = None,
    *,
    name: str | None = None,
    out: Path | None = None,
    device: str | None = None,
    verbose: bool = False,
    check_first: Callable[[], None] | None = None,
) -> Path:
    """Train the dictionary of a transformers model and write it. Everything that can be known is checked before.

    Finished rounds wait in OUT.partial, and the same call goes on from them.

    Args:
        model: hub id or folder.
        settings: see `TrainSettings`.
        name: what the dictionary calls its model (default: model).
        out: the file (default: in the user's cache).
        device: "cuda" for every GPU that PyTorch sees, which share the layers, "cuda:1" for one, or "cpu" (default:
            cuda when there is one).
        verbose: tell every layer's errors after each round. What interrupts it gets a note that says what is kept.
        check_first: called before anything of the model is read; what it raises is raised.

    Returns:
        The file's path.

    Raises:
        ValueError: bad settings, an unsuitable model, a dictionary to go on from that does not fit it, text that cannot
            be read, another training of this file, an OUT.partial of another run, too little memory, or vectors that
            cannot be learned from.
        OSError: the model is not there, or a file cannot be read or written.
    """
    started = time.time()
    settings = settings or TrainSettings()
    devices = checked_devices(device)
    check_name(model if name is None else name)
    name = plain_name(model if name is None else name)
    if out is not None:
        check_out(out, name)
        check_writable(out, given=True)
    if check_first is not None:
        check_first()
    facts = read_facts(model, settings.hf_overrides, settings.max_model_len)
    check_folder(model, reads=bool(settings.data))
    out = _out_or_default(out, name, facts)
    longest = facts.longest or settings.length
    settings = _settled(model, settings, facts, longest, torch.device(devices[0]).type)
    check("--sequence-tokens", settings.length, settings.length <= longest, f"up to {longest}, the model's longest")
    if settings.rounds == 0:
        return add_shares(model, settings, name, longest, out, devices[0])
    plan = Plan.of(settings, facts.fingerprint, longest, torch.device(devices[0]).type)
    in_turn, shares = _share(model, settings, facts, plan, devices)
    run = RunFolder(out.with_name(out.name + ".partial"), _identity(model, name, facts, settings, plan, shares))
    job = Job(model, settings, facts.fingerprint, plan, run, started, verbose, in_turn)
    with run.locked():
        with _noting_what_is_kept(run, shares, plan):
            made = _train_shares(job, shares, len(devices))
        _collect(run, shares, name, facts, settings, plan, made).save(out)
        run.remove()
    return out


def _out_or_default(out: Path | None, name: str, facts: ModelFacts) -> Path:
    """The file to write; ValueError where the default cannot be. A given one was checked before the model was read."""
    if out is None:
        out = cache_folder() / file_name(name, facts.fingerprint.rope if facts.overridden else "")
        check_out(out, name)
        check_writable(out, given=False)
    return out


def _share(
    model: str, settings: TrainSettings, facts: ModelFacts, plan: Plan, devices: list[str]
) -> tuple[bool, list[tuple[str, list[int]]]]:
    """Whether the model's layers come in turn, and each device's layers."""
    kind, heads = torch.device(devices[0]).type, facts.fingerprint.num_kv_heads
    together = layers_at_once(kind, 1 if settings.learn.shared else heads)
    beside = plan.sequences * settings.kept_tokens * bytes_per_token(settings, facts.fingerprint)
    in_turn = comes_in_turn(model, settings.dtype, settings.hf_overrides, -(-beside // len(devices)), devices[0])
    return in_turn, share_layers(facts.fingerprint.layers, devices[:1] if in_turn else devices, together)


def _settled(model: str, settings: TrainSettings, facts: ModelFacts, longest: int, kind: str) -> TrainSettings:
    """Settings with what the model, the kind of device and the dictionary that is adapted decide.

    Raises:
        ValueError: that dictionary cannot be read, or is of a model of another shape or rotary embedding.
    """
    if settings.sequence_tokens is None:
        settings = replace(settings, sequence_tokens=min(READ_TOKENS[kind], longest))
    if kind == "cpu":
        settings = replace(settings, dtype=cpu_dtype(settings.dtype))
    if settings.package_text and (settings.data or not package_documents() or read_tokenizer(model) is None):
        settings = replace(settings, package_text=0.0)
    if not settings.continue_from:
        return settings
    parent = load_dictionary(settings.continue_from)
    differences = parent.info.fingerprint.differences(facts.fingerprint)
    if differences:
        raise ValueError(
            f"--continue-from is {settings.continue_from}, a dictionary of {parent.info.model_name}, and does not fit "
            f"({'; '.join(differences)}); allowed: a dictionary of the same shape and rotary embedding; name another, "
            f"or leave it out to learn from nothing"
        )
    info = parent.info
    learn = replace(settings.learn, atoms=info.atoms, atom_bits=info.atom_bits, shared=parent.shared)
    return replace(settings, learn=learn)


def checked_devices(device: str | None) -> list[str]:
    """Devices that share the work, for what a user named."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    usual = re.fullmatch(r"cpu|cuda(:\d+)?", device) is not None
    check("--device", device, usual, "cpu, cuda, cuda:1 and so on")
    check("--device", device, device == "cpu" or torch.cuda.is_available(), "cpu, as PyTorch sees no GPU here")
    there = [f"cuda:{at}" for at in range(torch.cuda.device_count())]
    check("--device", device, device in ("cpu", "cuda", *there), f"cpu, cuda, {', '.join(there)}")
    return there if device == "cuda" else [device]


def _identity(
    model: str,
    name: str,
    facts: ModelFacts,
    settings: TrainSettings,
    plan: Plan,
    shares: list[tuple[str, list[int]]],
) -> dict[str, Any]:
    """Everything that decides the file: a run goes on from state of the same alone."""
    text = texts_of(model, settings).identity() if settings.data else {}
    if settings.package_text:
        text = {"package": package_text_identity()}
    parent = file_checksum(Path(settings.continue_from)) if settings.continue_from else ""
    return asdict(settings) | {
        "data": list(settings.data),
        "text": text,
        "parent": parent,
        "model": name,
        "weights": model_identity(model, facts.revision),
        "fingerprint": facts.fingerprint.to_json(),
        "plan": asdict(plan),
        "first_layers": [layers[0] for _, layers in shares],
        "release": _release(),
    }


def _train_shares(job: Job, shares: list[tuple[str, list[int]]], gpus: int) -> dict[str, Any]:
    """Train every layer: here for one device, else in a process per device, which end with this one.

    gpus: that vLLM may take to write with a model that one does not hold.

    Returns:
        How the text came about, as the dictionary says it.
    """
    progress = Progress(verbose=job.verbose, started=job.started)
    if shares[0][0] == "cpu":
        progress.say(cpu_words(job.settings, job.plan))
    if job.in_turn:
        progress.say(f"{shares[0][0]} does not hold the model: its layers wait in host memory and come in turn")
    try:
        made, loaded = ({}, None) if job.settings.data else _write(job, shares, progress, gpus if job.in_turn else 1)
        if len(shares) == 1:
            train_share(0, job, shares, progress, loaded)
            return made
    finally:
        progress.close()
    try:
        torch.multiprocessing.spawn(train_share, (job, shares), nprocs=len(shares), daemon=True)
    except torch.multiprocessing.ProcessRaisedException as error:
        words = str(error).strip().splitlines()[-1]
        if not words.startswith(("ValueError: ", "OSError: ")):
            raise
        raise ValueError(words.split(": ", 1)[1]) from error
    return made


def _write(
    job: Job, shares: list[tuple[str, list[int]]], progress: Progress, gpus: int
) -> tuple[dict[str, Any], Share | None]:
    """Have vLLM write the text of the run where it can.

    Args:
        job: of the run.
        shares: each device's layers.
        progress: of the run.
        gpus: that vLLM takes, at most.

    Returns:
        How the text came about, or will; and what was loaded meanwhile, if anything was.
    """
    settings, (device, layers) = job.settings, shares[0]
    kind = torch.device(device).type
    tokens = own_tokens(settings, job.plan)
    writing = Stage("write", "vLLM writes the text", tokens, GUESSES[kind]["write"])
    progress.plan([writing, *stages_of(job, len(layers), kind, writes=False)])
    ahead = Ahead(job, shares, progress)
    longest = min(settings.text_tokens or settings.length, settings.length)
    wanted = WriterJob(
        job.model, "", tokens, longest, kind, settings.dtype, settings.seed, settings.hf_overrides,
        to_the_end=settings.text_tokens is not None, gpus=1 << (gpus.bit_length() - 1),
        most_bytes=ahead.most_bytes,
    )  # fmt: skip
    meanwhile = ahead.prepare if ahead.fits else None
    made = own_text(settings.writer, wanted, job.run, device, progress, meanwhile)
    if made is None and job.in_turn:
        refuse_writing(job.model)
    made = {"writer": "transformers", "texts": "bare"} if made is None else made
    return made | ({"package_text": settings.package_text} if settings.package_text else {}), ahead.share


@contextmanager
def _noting_what_is_kept(run: RunFolder, shares: list[tuple[str, list[int]]], plan: Plan) -> Iterator[None]:
    """Have Ctrl-C and SIGTERM, where they end what is done inside, say how to go on: in a note of the exception."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception):
            error.add_note(f"{kept_words(run, shares, plan)}; the same command goes on from there")
        raise


def kept_words(run: RunFolder, shares: list[tuple[str, list[int]]], plan: Plan) -> str:
    """What an interrupted run has done and where it is."""
    done = []
    for _, layers in shares:
        rounds = (run.facts(rounds_name(layers)) or {"rounds_done": 0})["rounds_done"]
        done.append(rounds if run.facts(finished_name(layers)) is None else plan.rounds)
    text = "the text and " if run.facts(TEXT) is not None else ""
    if not text and not any(done):
        return "nothing is finished yet that could be kept"
    verb = "is" if plan.rounds == 1 and not text else "are"
    return f"{text}{min(done)} of {rounds_in_words(plan.rounds)} {verb} kept in {run.folder}"


def _collect(
    run: RunFolder,
    shares: list[tuple[str, list[int]]],
    name: str,
    facts: ModelFacts,
    settings: TrainSettings,
    plan: Plan,
    made: dict[str, Any],
) -> Dictionary:
    """The dictionary of what all devices have finished. ValueError when a part was damaged meanwhile."""
    done: list[FinishedLayers] = []
    for _, layers in shares:
        finished = finished_layers(run, layers)
        if finished is None:
            raise ValueError(f"{run.folder} was changed while it was in use; give the same command again")
        done.append(finished)
    asked = asked_shares(run)
    if asked is None:
        raise ValueError(f"{run.folder} was changed while it was in use; give the same command again")
    tensors = {key: torch.cat([own.tensors[key] for own in done]) for key in done[0].tensors} | asked
    errors = {kv: {s: [x for own in done for x in own.errors[kv][s]] for s in done[0].errors[kv]} for kv in KV}
    read = plan.sequences * max(own.rounds for own in done)
    info = DictionaryInfo(
        model_name=name,
        fingerprint=facts.fingerprint,
        atoms=settings.learn.atoms,
        atom_bits=settings.learn.atom_bits,
        sparsity=settings.learn.sparsity,
        data=", ".join(Path(data).name if Path(data).exists() else data for data in settings.data)
        or f"text sampled from the model itself{', and text of the package' if settings.package_text else ''}",
        tokens_seen=read * settings.length,
        vectors_seen=read * settings.kept_tokens * facts.fingerprint.num_kv_heads,
        errors=errors,
        version=_version(),
        seed=settings.seed,
        recipe=_recipe(settings, made),
    )
    return Dictionary(info, tensors)


def _recipe(settings: TrainSettings, made: dict[str, Any]) -> dict[str, Any]:
    """How a dictionary came about, beyond what its other facts say."""
    recipe: dict[str, Any] = {"passes": settings.passes, "rounds": settings.rounds}
    if made:
        recipe["own_text"] = made
    if settings.continue_from:
        parent = load_dictionary(settings.continue_from).info
        recipe["parent"] = {
            "model": parent.model_name,
            "data": parent.data,
            "sha256": file_checksum(Path(settings.continue_from)),
        }
    return recipe


def _release() -> str:
    try:
        return metadata.version("vllm-lexico")
    except metadata.PackageNotFoundError:
        return "source"


def _version() -> str:
    """The release, and the commit when this is a source checkout."""
    here = Path(__file__)
    git = ["git", "-C", str(here.parent)]
    try:  # an installed package may lie in a checkout of something else, whose commit says nothing of this
        subprocess.run([*git, "ls-files", "--error-unmatch", here.name], capture_output=True, check=True)
        found = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return _release()
    return f"{_release()} ({found.stdout.strip()})"
