"""Benchmark suite: `compiled-llm bench COMMAND` or `python -m bench COMMAND`.

Modules that a worker process imports (`worker`, `workloads`, `systems`) depend on the standard
library only, because the environment of another system may lack our dependencies.
"""
