"""The differential fuzzer: random models with planted adapters, and oracles of what the passes may make of them.

    python -m tests.fuzz --cases 5000

Every case is a plain torch program (`grammar.py`, its steps in `adapters.py` and `others.py`), traced to a joint graph,
rewritten, and judged by `oracles.py`. One that fails is cut down to fewer lines and stored in `tests/fuzz_cases`, where
`tests/project/test_fuzz.py` replays it for ever.
"""
