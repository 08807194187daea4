"""What families answer with settings that interact, in a process that finds this by its name."""

import sys


def answer_in_turn(benchmarks, model, dtype, name, faults):
    """What vLLM answers without LEXICO, then LEXICO with a setting."""
    sys.path.insert(0, benchmarks)
    from bench import crossed

    plain, setting, settings = crossed.PEERS[crossed.SQUEEZED], crossed.SETTINGS[name], {"dtype": dtype}
    theirs = crossed.answer(model, plain, "CPU_ATTN", settings)
    return theirs, crossed.answer(model, setting, "LEXICO", settings, faults)
