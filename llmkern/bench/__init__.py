"""The benchmark harness behind `llmkern bench`: sweeps, timers and reports.

===================  =================================================================================================
schema.py            the one schema of results: rows of ops and of models, the environment, JSON
stats.py             medians, percentiles, ratios pair by pair, noise
environment.py       the header of a result; ceilings.py: the bandwidth and matmul rates that the device reaches
ops/<op>.py          what is swept for one op, and the bytes and operations of a call where they need a formula
models/<name>.json   published shapes, for models without weights
peers/<peer>.py      one adapter per library that we are compared with: its ops, its models, or why it is absent
sweep.py, timers.py, accuracy.py, run_ops.py      ops: check first, then time, interleaved
worker.py, workers.py, variants.py, run_models.py   models: each variant in a process of its own, interleaved
families.py            every family, untouched beside optimized; shapes in models/families/
tables.py, liger_csv.py, plots.py, html.py, compare.py, readme.py   what becomes of a result
===================  =================================================================================================
"""
