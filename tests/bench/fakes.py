"""Systems without a model, for tests of the processes and commands around them."""

import os
import time
from dataclasses import asdict
from typing import Any

from bench.systems import GenerateResult


class Fake:
    """Reports 10 ms per prompt and 2 ms per step; prints to standard output."""

    def __init__(self, **setup: Any) -> None:
        self.setup = setup

    def start(self) -> float:
        print("printed by Python")
        os.write(1, b"written to the file descriptor\n")
        return 1.5

    def generate(
        self, prompts: list[list[int]], output_lengths: list[int], temperature: float
    ) -> dict[str, Any]:
        seconds = 0.010 * len(prompts) + 0.002 * max(output_lengths)
        return asdict(GenerateResult(counts=list(output_lengths), seconds=seconds, counters={}))

    def describe(self) -> dict[str, Any]:
        return {"version": "1"}

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def fail(self) -> None:
        raise ValueError("first line\nsecond line")

    def close(self) -> None:
        print("closed")


class Crashing(Fake):
    """A system whose process exits at a request of two prompts."""

    def generate(
        self, prompts: list[list[int]], output_lengths: list[int], temperature: float
    ) -> dict[str, Any]:
        if len(prompts) == 2:
            os.write(2, b"last line of the log\n")
            os._exit(3)
        return super().generate(prompts, output_lengths, temperature)


class Unstartable(Fake):
    """A system that fails to start."""

    def start(self) -> float:
        raise RuntimeError("no device")


class Short(Fake):
    """A system that generates one token less than requested."""

    def generate(
        self, prompts: list[list[int]], output_lengths: list[int], temperature: float
    ) -> dict[str, Any]:
        return super().generate(prompts, [n - 1 for n in output_lengths], temperature)
