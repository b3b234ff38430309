"""`python -m streaming_balance` is the command `streaming-balance`."""

from streaming_balance.cli.app import main

if __name__ == "__main__":
    main()
