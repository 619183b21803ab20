"""The workload of bench/throughput.py on vLLM, for a comparison on the same machine: needs vLLM, and nothing of compiled_llm.

    python bench/peer_vllm.py --model configs/architectures/qwen3-0.6b.json

A bare config.json is served with random weights. Prints one JSON object as the last line.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path

from workloads import offline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--max-model-len", type=int, default=4096)
    options = parser.parse_args()

    import vllm
    from vllm import LLM, SamplingParams

    model = options.model
    if model.endswith(".json"):
        directory = Path(tempfile.mkdtemp())
        shutil.copy(model, directory / "config.json")
        model = str(directory)
    began = time.perf_counter()
    llm = LLM(
        model=model, load_format="dummy", skip_tokenizer_init=True, max_model_len=options.max_model_len,
        enable_prefix_caching=False, dtype="bfloat16",
    )  # fmt: skip
    ready = time.perf_counter() - began
    workload = offline()
    prompts = [{"prompt_token_ids": prompt} for prompt in workload.prompts]
    params = [
        SamplingParams(temperature=workload.temperature, max_tokens=n, ignore_eos=True, detokenize=False)
        for n in workload.output_lengths
    ]
    seconds = []
    for _ in range(options.rounds + 1):
        began = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds.append(time.perf_counter() - began)
        assert sum(len(output.outputs[0].token_ids) for output in outputs) == workload.num_output_tokens
    result = {
        "peer": f"vllm {vllm.__version__}",
        "output_tokens": workload.num_output_tokens,
        "seconds": [round(s, 3) for s in seconds],
        "tokens_per_second": round(workload.num_output_tokens / statistics.median(seconds[1:]), 1),
        "ready_s": round(ready, 1),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
