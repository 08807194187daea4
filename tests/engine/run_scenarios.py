"""Run the scenarios of exactness.py on one backend: `python run_scenarios.py BENCHMARKS JOB.json ANSWERS.json`.

All engines in one process, which saves most of what starting takes. LEXICO's answer again with each fault planted, in
short.
"""

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

TEXT_CHARACTERS = 1 << 17
FAULTY = {"ANSWER_TOKENS": 8, "PREEMPTED_TOKENS": 24}  # a fault shows soon or never


def answers(model: str, backend: str, lexico: dict[str, Any]) -> dict[str, Any]:
    """Answers and counts of every scenario, by its name; with faults, by the fault's name and then the scenario's."""
    import exactness
    from faults import FAULTS
    from vllm.distributed import cleanup_dist_env_and_memory

    settings = {"enforce_eager": True, "dtype": "float32"}
    if backend == "LEXICO":
        settings["worker_extension_cls"] = "faults.Faults"
    found: dict[str, Any] = {"whole": {}, **{fault: {} for fault in FAULTS}}
    for name in exactness.ENGINES:
        if name == "codes" and backend != "LEXICO":
            continue
        engine, scenarios = exactness.start(name, model, backend, lexico, settings, characters=TEXT_CHARACTERS)
        _run(engine, scenarios, found["whole"])
        if backend == "LEXICO":
            whole = {setting: getattr(exactness, setting) for setting in FAULTY}
            for setting, value in FAULTY.items():
                setattr(exactness, setting, value)
            for fault in FAULTS:
                engine.llm.collective_rpc("plant_fault", args=(fault,))
                _run(engine, scenarios, found[fault])
            engine.llm.collective_rpc("plant_fault", args=(None,))
            for setting, value in whole.items():
                setattr(exactness, setting, value)
        del engine
        gc.collect()
        cleanup_dist_env_and_memory()
    return found


def _run(engine: Any, scenarios: list, found: dict[str, Any]) -> None:
    for scenario in scenarios:
        engine.llm.reset_prefix_cache()
        said, counts = scenario(engine, 1)
        found[scenario.__name__] = {"answers": said, "counts": counts}


if __name__ == "__main__":
    sys.path.insert(0, sys.argv[1])
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    Path(sys.argv[3]).write_text(json.dumps(answers(**json.loads(Path(sys.argv[2]).read_text()))))
