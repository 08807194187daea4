"""`vllm-lexico push`: share a dictionary on the Hugging Face hub."""

import argparse
from pathlib import Path
from typing import Any

from vllm_lexico.dictionary.push import push_dictionary

EXAMPLES = """examples:
  vllm-lexico push ~/.cache/vllm-lexico/Qwen_Qwen2.5-7B-Instruct.safetensors me/qwen2.5-7b-lexico
      then serve with: --additional-config '{"lexico": {"dictionary": "me/qwen2.5-7b-lexico"}}'
  vllm-lexico push ~/.cache/vllm-lexico/Qwen_Qwen2.5-7B-Instruct.safetensors
      for members of the project: into vllm-lexico/Qwen_Qwen2.5-7B-Instruct
  vllm-lexico push my-finetune.safetensors me/my-finetune-lexico --private
      keep the repository to yourself

Log in first, with `hf auth login` or the environment variable HF_TOKEN. Pushing again replaces the file and its model
card."""


def add(commands: Any) -> None:
    """Add the parser."""
    parser = commands.add_parser(
        "push",
        help="share a dictionary on the Hugging Face hub",
        description="Check that a dictionary file is intact and upload it to the Hugging Face hub, with a model card.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("file", metavar="FILE", type=Path, help="a dictionary file")
    parser.add_argument(
        "repo",
        metavar="REPO",
        nargs="?",
        help="repository on the hub, org/name; it is created if it does not exist (default: vllm-lexico/ORG_MODEL)",
    )
    parser.add_argument("--private", action="store_true", help="make the repository private")
    parser.set_defaults(run=run, after_interrupt="the same command starts the upload again")


def run(arguments: argparse.Namespace) -> None:
    """Upload and say where it can be seen and how it is used."""
    repo, url = push_dictionary(arguments.file, arguments.repo, private=arguments.private)
    print(f'pushed to {url}; serve with it: --additional-config \'{{"lexico": {{"dictionary": "{repo}"}}}}\'')
