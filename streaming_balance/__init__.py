"""Streaming Balance: exact, fair, resumable class balancing for streams of medical volumes."""
