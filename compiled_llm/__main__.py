"""`compiled-llm` and `python -m compiled_llm`."""


def main() -> None:
    """Run the command line; Ctrl-C while that is imported ends as it does later."""
    try:
        from compiled_llm.cli.main import main as run
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    run()


if __name__ == "__main__":
    main()
