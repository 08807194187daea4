"""`python -m vllm_lexico.cli`, for where the command `vllm-lexico` is not on the path."""

import sys

from vllm_lexico.cli import main

sys.exit(main())
