"""Systems without a model, for tests of what runs them."""

import os
import time
from dataclasses import asdict
from typing import Any

from bench.systems import Generated


class Fake:
    """Takes 10 ms for a prompt and 2 ms for a step, as far as it says; prints where it should not."""

    def __init__(self, **setup: Any) -> None:
        self.setup = setup

    def start(self) -> float:
        print("starting, on standard output")
        os.write(1, b"and from beneath Python\n")
        return 1.5

    def generate(
        self, prompts: list[list[int]], output_lengths: list[int], temperature: float
    ) -> dict[str, Any]:
        seconds = 0.010 * len(prompts) + 0.002 * max(output_lengths)
        return asdict(Generated(counts=list(output_lengths), seconds=seconds, counters={}))

    def describe(self) -> dict[str, Any]:
        return {"version": "1"}

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def fail(self) -> None:
        raise ValueError("it cannot\ndo this")

    def close(self) -> None:
        print("let go")


class Crashing(Fake):
    """Its process dies at the first request of two prompts."""

    def generate(
        self, prompts: list[list[int]], output_lengths: list[int], temperature: float
    ) -> dict[str, Any]:
        if len(prompts) == 2:
            os.write(2, b"a last word\n")
            os._exit(3)
        return super().generate(prompts, output_lengths, temperature)


class Unstartable(Fake):
    """Has no such device."""

    def start(self) -> float:
        raise RuntimeError("no device")


class Short(Fake):
    """Gives less than was asked for."""

    def generate(
        self, prompts: list[list[int]], output_lengths: list[int], temperature: float
    ) -> dict[str, Any]:
        return super().generate(prompts, [n - 1 for n in output_lengths], temperature)
