"""Channels that go together: followed through a graph, ranked, and cut out."""
