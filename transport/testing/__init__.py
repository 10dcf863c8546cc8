"""Channels for tests, of this project and of others. They pass the same contract suite as the real ones."""
