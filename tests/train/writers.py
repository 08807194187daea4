"""Programs that stand for vLLM where it is to write text; see the fixture `stand_in`."""

import sys

# What runs in place of Python: `-P -m vllm_lexico.train.vllm_writer JOB.json` are its arguments.
START = f"""#!{sys.executable}
import json, sys, time
job = json.load(open(sys.argv[4]))
"""
WRITES = (
    START
    + """
print("a library greets you")
print(json.dumps({"tokens": 10}))
print(json.dumps({"tokens": 640}))
import numpy
from safetensors.numpy import save_file
ids = numpy.arange(job["tokens"], dtype=numpy.int32) % 26 + 2
save_file({"ids": ids, "lengths": numpy.array([len(ids)]), "kinds": numpy.array([0])}, job["out"])
wrote = {"writer": "vLLM 9", "tokens": {"bare": job["tokens"]}}
print(json.dumps({"wrote": wrote, "start_seconds": 3.2, "write_seconds": 60.7}))
"""
)
FAILS = START + """print(json.dumps({"error": "ValueError: no such architecture"})); sys.exit(1)"""
DIES = START + """print("the log\\n\\nCUDA error: no luck\\n", file=sys.stderr); sys.exit(3)"""
FAILS_WITH_GRAPHS = WRITES.replace(
    'print("a library', 'if job["graphs"]: print(json.dumps({"error": "no graph"})); sys.exit(1)\nprint("a library'
)
HANGS = START + """print(json.dumps({"tokens": 5}), flush=True); time.sleep(600)"""
