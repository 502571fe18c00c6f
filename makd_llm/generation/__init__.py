"""Summaries that a model writes: decoding, who decodes, and the pieces that are kept on the way.

decoding.py    greedy, beams, sampling; `continuations`, one batch
summaries.py   `summarize`: a list of prompts on all ranks, greedy
pieces.py      a split's summaries on disk, piece by piece, joined at the end
documents.py   the records that are to be summarized, and what is said of each
engine.py      pieces written with the training engine, one to each rank at a time
endpoint.py    pieces written through an OpenAI-compatible server
"""
