"""Entry point of `compiled-llm` and `python -m compiled_llm`."""

import gc

# Importing torch and the library creates about a million objects that stay; with Python's default,
# the garbage collector looks through them more than a thousand times.
_OBJECTS_BETWEEN_COLLECTIONS = 100_000


def main() -> None:
    """Run the command line; an interrupt during its import has the usual exit status."""
    gc.set_threshold(_OBJECTS_BETWEEN_COLLECTIONS)
    try:
        from compiled_llm.cli.main import main as run
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    run()


if __name__ == "__main__":
    main()
