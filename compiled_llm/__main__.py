"""Entry point of `compiled-llm` and `python -m compiled_llm`."""


def main() -> None:
    """Run the command line; an interrupt during its import has the usual exit status."""
    try:
        from compiled_llm.cli.main import main as run
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    run()


if __name__ == "__main__":
    main()
