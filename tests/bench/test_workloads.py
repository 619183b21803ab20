"""Prompts and lengths of the workloads."""

from bench.workloads import offline_workload, random_prompts, workload_of_lengths


def test_offline_workload_has_the_published_totals() -> None:
    workload = offline_workload()
    assert (workload.num_prompt_tokens, workload.num_output_tokens) == (142827, 133966)
    assert workload.temperature == 0.6


def test_offline_workload_stays_within_the_vocabulary() -> None:
    assert max(max(prompt) for prompt in offline_workload(4, vocab_size=50).prompts) < 50


def test_workload_of_lengths_has_the_given_lengths() -> None:
    workload = workload_of_lengths([(3, 2), (1, 50)], temperature=0.0, vocab_size=160)
    assert [len(prompt) for prompt in workload.prompts] == [3, 1]
    assert workload.output_lengths == [2, 50]
    assert workload.max_sequence_length == 51


def test_prompts_differ_by_seed_only() -> None:
    prompts = [random_prompts(2, 30, vocab_size=160, seed=seed) for seed in (1, 2)]
    assert prompts[0] != prompts[1]
    assert prompts[0] == random_prompts(2, 30, vocab_size=160, seed=1)
