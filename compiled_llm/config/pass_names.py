"""Names of passes in configs, the former ones included."""

import warnings

from compiled_llm.config.messages import suggestion

# Former names, accepted until the next release.
RENAMED_PASSES = {
    "paged_attention": "lower_attention_marker",
    "once_a_step": "hoist_step_invariants",
    "small_linear": "fuse_skinny_linear",
}


def known_passes() -> list[str]:
    """Return the names of all passes in the order in which they run by default."""
    from passes import PASSES  # imports torch, which a config that names no pass does not need

    return list(PASSES)


def resolve_pass_names(switches: dict[str, bool]) -> dict[str, bool]:
    """Return `switches` under the current names, in the same order; warn of each former name.

    Raises:
        ValueError: a name is unknown, or a pass is given under both of its names.
    """
    known, resolved = known_passes(), dict[str, bool]()
    for given, is_on in switches.items():
        name = RENAMED_PASSES.get(given, given)
        if name not in known:
            raise ValueError(f"unknown pass {name!r}{suggestion(name, known)}")
        if name in resolved:
            raise ValueError(f"pass {name!r} is given under its former name too: drop that one")
        if name != given:
            warnings.warn(
                f"pass {given!r} is now called {name!r}: rename it in the config; the former name "
                "will be refused in the next release",
                FutureWarning,
                stacklevel=2,
            )
        resolved[name] = is_on
    return resolved
