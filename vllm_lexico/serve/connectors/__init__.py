"""KV connectors: other memory, and other engines, that whole blocks of codes go to and come back from.

All follow one rule: a connector brings whole blocks of codes, and with the first of them the sinks; never a window.
What it brings is a prefix hit without its window, which is read from codes. Whole, since only a full block is known to
be coded to its end: earlier spans wait for as long as the number of their page says (`coding_plan.py`), and another
pool gives another number. The first tokens past what was brought are computed by the engine itself.

`allowed_connectors.py` says which connectors and settings are served, `adopt` changes vLLM's schedulers of each, and
`identity` is what two engines have to agree on.
"""
