"""Moves frames between two programs. Knows bytes and deadlines, nothing of what the frames mean.

`transport.api` is the vocabulary everyone may import; the other modules make channels of one kind each and are named
only where programs are wired together.
"""
