"""The search behind `onnxc compress`: what to do to a model, and how much of it, under one bound.

metric     the drop of a candidate, with its interval, on samples that no statistic saw
moves      what may be done: tasks with their settings, from mild to harsh
strategy   which plan to look at next, as a function of what was found so far
workshop   makes the candidates of a plan
judging    size, drop, time and energy of candidates
journal    what was found, on disk, so that a search goes on where it was stopped
run        the search itself: it always has a best model, and has written it
"""
