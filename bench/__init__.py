"""The benchmark suite: `compiled-llm bench COMMAND`, also `python -m bench COMMAND`.

What a worker process imports (`worker`, `workloads`, `systems`) needs the standard library alone, because a peer's environment
may have nothing of ours.
"""
